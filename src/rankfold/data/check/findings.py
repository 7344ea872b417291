"""What each rule of the data doctor means, and what to do about it."""

from __future__ import annotations

# Rules that only a whole file, a model or a look at the words can break; those of a single example that
# training checks too stand in ``rules``, with the same names here and there.
MEND = "Mend it, or leave such rows out with --skip-bad."
MEANINGS = {
    "unreadable": f"cannot be read as a row. {MEND}",
    "shape": f"is of no shape that can be trained on. {MEND}",
    "unknown-role": f"has a turn of a role that nobody knows. {MEND}",
    "encoding": "stands in a file of another encoding than UTF-8.",
    "nan": "holds NaN or an infinite number, which JSON does not know.",
    "not-text": "holds a number, a truth value or a date where text belongs, and is read as the text that is "
    "shown.",
    "not-used": "holds what changes its meaning, and would be passed over. Name it under "
    "--leave-out, or mend it.",
    "media-mark": "speaks of a video or a sound that is not there for a model.",
    "role-order": "has turns in an unusual order, which not every template renders. With --model its "
    "template is asked.",
    "last-is-answer": "does not end with an answer, so there is nothing to learn. --fix drops what comes "
    "after the last answer.",
    "null-content": f"has a turn without content. {MEND}",
    "empty-turn": "has an empty question or answer. --fix drops such pairs.",
    "empty-system": "has an empty system message, which is not the same as none. --fix drops it.",
    "empty-text": f"holds no text. {MEND}",
    "missing-image": f"names an image that is not there. {MEND}",
    "image-count": f"has another number of <image> marks than of images. {MEND}",
    "tool-results": "has calls of tools whose results are missing or too many.",
    "unknown-tool": "calls a tool that is not on offer.",
    "nothing-trained": f"has all its answers flagged not to be trained. {MEND}",
    "loss-weight": "has a turn whose loss counts more or less than that of others.",
    "same-answers": f"has the same words as chosen and as rejected answer. {MEND}",
    "too-many-turns": f"has too many turns for a conversation. {MEND}",
    "template": f"cannot be encoded: the model's template or vocabulary refuses it. {MEND}",
    "over-length": "is longer than the chosen length and is left out. Raise --max-length to keep it.",
    "partly-over-length": "becomes several training rows (the template drops earlier thoughts), and those "
    "over the chosen length are left out.",
    "duplicate": "is the same as an earlier row. Kept, and so counts twice; --fix leaves copies out.",
    "near-duplicate": "is almost the same as an earlier row (Jaccard similarity of 5-character pieces of at "
    "least 0.8). Kept; look at some.",
    "in-held-out": "is in the held-out rows too. Training leaves it out.",
    "near-held-out": "is almost the same as a held-out row, so what is measured there is partly memory.",
    "special-token": "spells a special token of the model. It is trained on as plain text, never as control; "
    "often a sign that a template was applied already.",
    "mojibake": "was UTF-8 and was read as Windows-1252 once. --fix reads it as it was meant.",
    "control-character": "holds characters that control a terminal and are no text. --fix removes them.",
    "replacement-character": "has lost characters to an earlier conversion. Go back to the source.",
    "lone-surrogate": "holds half of a surrogate pair, which is not text.",
    "bidi-control": "holds characters that turn the writing direction; they can hide what is written.",
    "key": "seems to hold a secret key or token. A model can repeat it: take it out, and revoke it.",
    "e-mail": "seems to hold an e-mail address. A model can repeat it.",
    "card": "seems to hold a payment card number (its check digit is right). A model can repeat it.",
    "phone": "seems to hold a phone number. A model can repeat it.",
}


def explained(rule: str) -> str:
    """What it means that a row breaks ``rule``, as a sentence about the row."""
    return MEANINGS.get(rule, "breaks a rule of training. Mend it, or leave such rows out with --skip-bad.")

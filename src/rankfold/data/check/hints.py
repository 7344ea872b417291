"""What in a text deserves a look: personal data, encoding trouble, spelt special tokens.

These are hints.  A number that looks like a phone number need not be one, and what is not found may
still be there."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator

CONTEXT_CHARS = 30  # shown on either side of a find
LEAST_DIGITS, MOST_DIGITS = 8, 15  # of a phone number; ITU-T E.164 has the upper one
FIND_CHARS = 120  # shown of a find at most, with what follows it

# Special tokens of well-known templates, for a check without a model; with one, its own are looked for.
KNOWN_SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
)


Span = tuple[int, int, str]  # start, end (exclusive) and the rule of a find


def _luhn(digits: str) -> bool:
    """The check digit of payment cards.  ISO/IEC 7812-1, annex B."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(sum(divmod(value, 10)) for value in doubled) % 10 == 0


def _is_card(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    return digits[0] in "23456" and len(set(digits)) > 1 and _luhn(digits)


def _is_phone(found: str) -> bool:
    return LEAST_DIGITS <= len(re.sub(r"\D", "", found)) <= MOST_DIGITS


def _always(_: str) -> bool:
    return True


# (rule, pattern, check of a match).  A pattern starts only where no such character stands before it, so
# that the time stays linear in the text.  Cards come before phones: a find takes its place from later ones.
_PERSONAL: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        "key",
        re.compile(
            r"-----BEGIN (?:[A-Z]{1,12} ){0,3}PRIVATE KEY-----(?:[^-]*-----END[A-Z ]{1,40}-----)?"
            r"|(?<![\w-])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
            r"|sk-[\w-]{20,}|hf_[A-Za-z0-9]{20,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}"
            r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
        ),
        _always,
    ),
    (
        "e-mail",
        re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])"),
        _always,
    ),
    ("card", re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)"), _is_card),
    (
        "phone",
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}"  # +44 20 7946 0958
            r"|\(?[2-9]\d\d\)?[ .-]{1,2}\d{3}[ .-]\d{4}"  # (212) 555-0147
            r"|1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # 138 0013 8000
            r"|0\d{2,4}[ /-]\d{3,8}(?:[ -]\d{2,4}){0,3})(?![\w-]|\.\d)"  # 010-62345678
        ),
        _is_phone,
    ),
)
PERSONAL_RULES = tuple(rule for rule, _, _ in _PERSONAL)
_KEY_LIKE = re.compile(r"[A-Za-z0-9_-]{15}")  # every key but a private one has such a run
_DIGITS = re.compile(r"[0-9](?:[ ()/.-]{0,3}[0-9]){7}")


def _candidates(text: str) -> Iterator[tuple[str, re.Pattern[str], Callable[[str], bool]]]:
    """The personal patterns that can match at all: a cheap look before the dear one."""
    key, mail, card, phone = _PERSONAL
    if _KEY_LIKE.search(text) or "-----BEGIN" in text:
        yield key
    if "@" in text:
        yield mail
    if _DIGITS.search(text):
        yield card
        yield phone


def personal_spans(text: str) -> list[Span]:
    """Everything that looks like personal data, in order, without overlaps."""
    spans: list[Span] = []
    for rule, pattern, check in _candidates(text):
        found = [(*match.span(), rule) for match in pattern.finditer(text) if check(match.group())]
        spans = sorted([*spans, *(span for span in found if _is_free(span, spans))]) if spans else found
    return spans


def _is_free(span: Span, spans: list[Span]) -> bool:
    """Whether ``span`` overlaps none of ``spans``, which are in order."""
    place = bisect(spans, span)
    before_ends = place == 0 or spans[place - 1][1] <= span[0]
    return before_ends and (place == len(spans) or span[1] <= spans[place][0])


def mask_personal(text: str) -> str:
    """``text`` with everything that looks like personal data replaced by its kind, as ``[e-mail]``."""
    return _masked(text, 0, len(text), personal_spans(text))


def _masked(text: str, low: int, high: int, spans: list[Span]) -> str:
    """``text[low:high]`` with ``spans`` replaced; one that reaches over an edge is replaced as a whole."""
    pieces, done = [], low
    for start, end, rule in spans:
        if low < end and start < high:
            pieces += [text[done:start], f"[{rule}]"]
            done = end
    return "".join([*pieces, text[done:high]])


def _continuation() -> str:
    """The characters that UTF-8's continuation bytes 0x80 to 0xBF become when read as Windows-1252."""
    chars = []
    for byte in range(0x80, 0xC0):
        try:
            chars.append(bytes([byte]).decode("cp1252"))
        except UnicodeDecodeError:
            chars.append(chr(byte))
    return "[" + "".join(re.escape(char) for char in chars) + "]"


_C = _continuation()
# UTF-8 read as Windows-1252.  A two-byte letter other than Â or Ã counts only beside another one, because
# a capital before a closing quotation mark looks the same: «CAFÉ».
_MOJIBAKE = re.compile(f"(?:[ÂÃ]{_C}|(?:[Ä-ß]{_C}){{2,}}|[à-ï]{_C}{{2}}|[ð-ô]{_C}{{3}})+")
_TROUBLE = re.compile(
    r"(?P<control>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff])"
    r"|(?P<replacement>\ufffd|锟斤拷)"
    r"|(?P<surrogate>[\ud800-\udfff])"
    r"|(?P<bidi>[\u202a-\u202e\u2066-\u2069])"
)
_SUSPECT = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffd锟\ud800-\udfff\u202a-\u202e\u2066-\u2069]"
)
_RULE_OF = {
    "control": "control-character",
    "replacement": "replacement-character",
    "surrogate": "lone-surrogate",
    "bidi": "bidi-control",
}
ENCODING_RULES = ("mojibake", *_RULE_OF.values())


def encoding_spans(text: str) -> list[Span]:
    """Everything that a wrong encoding, or a hand, seems to have left in ``text``."""
    spans: list[Span] = []
    if _SUSPECT.search(text):
        spans += [(*match.span(), _RULE_OF[match.lastgroup or ""]) for match in _TROUBLE.finditer(text)]
    if not text.isascii():
        spans += [
            (*match.span(), "mojibake")
            for match in _MOJIBAKE.finditer(text)
            if _meant(match.group()) is not None
        ]
    return spans


def repaired_encoding(text: str) -> tuple[str, list[str]]:
    """``text`` with mojibake read as it was meant and control characters removed, and what was done."""
    done: dict[str, int] = {}

    def decode(match: re.Match[str]) -> str:
        meant = _meant(match.group())
        if meant is None:
            return match.group()
        done["read as UTF-8 again"] = done.get("read as UTF-8 again", 0) + 1
        return meant

    def remove(match: re.Match[str]) -> str:
        if match.lastgroup != "control":
            return match.group()
        done["control characters removed"] = done.get("control characters removed", 0) + 1
        return ""

    # Mojibake first: its continuation bytes may be control characters.
    text = text if text.isascii() else _MOJIBAKE.sub(decode, text)
    text = _TROUBLE.sub(remove, text)
    return text, [f"{what}: {count}" for what, count in done.items()]


def _meant(text: str) -> str | None:
    """The text whose UTF-8 bytes, read as Windows-1252, are ``text``; None if there is none."""
    data = bytearray()
    for char in text:
        try:
            data += char.encode("cp1252")
        except UnicodeEncodeError:
            # Bytes without a character in Windows-1252 were kept as they were.
            if char > "\xff":
                return None
            data.append(ord(char))
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def special_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of ``tokens`` as a text; the longest where several fit."""
    ordered = sorted({token for token in tokens if token}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def special_token_spans(text: str, pattern: re.Pattern[str]) -> list[Span]:
    """Every special token that ``text`` spells."""
    return [(*match.span(), "special-token") for match in pattern.finditer(text)]


def excerpt(text: str, find: Span) -> str:
    """The find and what stands around it, on one line, with personal data masked."""
    start, end, rule = find
    low, high = max(0, start - CONTEXT_CHARS), min(len(text), start + FIND_CHARS, end + CONTEXT_CHARS)
    shown = _masked(text, low, high, personal_spans(text))
    if rule == "mojibake":
        shown += f" (meant: {_meant(text[start:end])})"
    return printable(f"{'...' if low else ''}{shown}{'...' if high < len(text) else ''}")


def printable(text: str) -> str:
    """``text`` on one line, with every character that does not print written as its escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)

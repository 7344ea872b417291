"""The tokenizer of a GGUF file, cutting text as llama.cpp cuts it.

How text is split before byte pairs are merged is not in the file but in llama.cpp, under the name that
the file gives; ``pre_tokenizers.json`` is that table.  The rest is what its ``src/llama-vocab.cpp`` does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from rankfold.errors import ModelError, bullet_list, nearest
from rankfold.models.gguf.file import GgufFile

KEY = "tokenizer.ggml."
KINDS = ("gpt2", "llama")  # byte pairs, and sentencepiece
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of tokens; others are matched by their words alone
# Tokens that end an answer in llama.cpp whatever the file says of them.
ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    *("<｜end▁of▁sentence｜>", "[e~["),
}
# And tokens that it takes for control tokens by their text: those around the middle of a text.
MIDDLE_ENDS = {
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>"),
    *("<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
}
MIDDLE = {
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    *("<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>"),
    *("<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>"),
    *("<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
}
HARMONY = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}  # always words of the text
END_IDS = (
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
)
USUAL_IDS = {"llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}}
ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
KNOWN = {
    *("model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token"),
    *("add_space_prefix", "bos_token_id", "unknown_token_id", "padding_token_id", *END_IDS),
}
# They do not bear on training or answers: tokens of tasks that are not done here, and remarks.
WITHOUT_BEARING = {
    *("seperator_token_id", "separator_token_id", "mask_token_id", "cls_token_id", "add_sep_token"),
    *("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "prefix_token_id", "suffix_token_id"),
    *("middle_token_id", "remove_extra_whitespaces", "token_type_count", "added_tokens"),
}


def gguf_tokenizer(file: GgufFile) -> Any:
    """transformers' tokenizer with the file's words, splitting, control tokens and chat templates.

    Raises ModelError for a kind of tokenizer, a way of splitting or a key that is not known."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = _Vocabulary(file)
    kind = vocabulary.kind
    backend = {"gpt2": _byte_pairs, "llama": _sentencepiece}[kind](vocabulary)
    roles = {role: vocabulary.word(key) for role, key in ROLES.items()} | {
        "unk_token": vocabulary.word("unknown_token_id")
    }
    if vocabulary.pre in table()["no_bos"]:
        roles["bos_token"] = None
    _put_around(backend, vocabulary, roles)
    backend.add_special_tokens(vocabulary.added(special=True))
    backend.add_tokens(vocabulary.added(special=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_templates(file),
        model_max_length=file.own("context_length"),
        clean_up_tokenization_spaces=False,
        **{role: word for role, word in roles.items() if word is not None},
    )


def end_ids(file: GgufFile) -> list[int]:
    """Every token that ends an answer: what the file names as end of text, turn or message, and what
    llama.cpp knows as such."""
    vocabulary = _Vocabulary(file)
    named = (vocabulary.special_id(key) for key in END_IDS)
    ends = {number for number in named if number is not None}
    words = {word: number for number, word in enumerate(vocabulary.words) if word in ENDS | MIDDLE_ENDS}
    calls = words.keys() & {"<|call|>", "<|calls|>"}
    if "<|end|>" in words and calls and words.keys() & {"<|return|>", "<|flush|>"}:
        ends.discard(words.pop("<|end|>"))  # of harmony: it ends a message, and the turn goes on
    return sorted({*ends, *words.values()})


def special_ids(tokenizer: Any, file: GgufFile) -> dict[str, Any]:
    """The tokens that a config names: where a text begins and ends, and what fills a batch."""
    ends = end_ids(file)
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
    }


class _Vocabulary:
    """The words of a file and what is said of them."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.kind = str(file.keys.get(f"{KEY}model"))
        self.pre = file.keys.get(f"{KEY}pre", "default")
        self.words = [
            word or f"[EMPTY_{place}]" for place, word in enumerate(file.keys.get(f"{KEY}tokens", ()))
        ]
        self._check()
        types: Sequence[int] = file.keys.get(f"{KEY}token_type", [1] * len(self.words))
        self.types = types[: len(self.words)]

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.keys.get(KEY + key, default)

    def special_id(self, key: str) -> int | None:
        number = self.get(key, USUAL_IDS.get(self.kind, {}).get(key))
        return number if number is not None and number < len(self.words) else None

    def word(self, key: str) -> str | None:
        number = self.special_id(key)
        return None if number is None else self.words[number]

    def added(self, special: bool) -> list[Any]:
        """The tokens that are cut out of a text before anything else: control tokens where the text is a
        template's (``special``), and words that the model's makers added or llama.cpp knows by their text."""
        from tokenizers import AddedToken

        found = []
        for word, kind in zip(self.words, self.types, strict=True):
            known = word in ENDS | MIDDLE_ENDS | MIDDLE
            is_control = kind in (CONTROL, UNKNOWN) or (known and kind == USER_DEFINED)
            if word in HARMONY:
                is_control, known = False, True
            is_word = not is_control and (known or kind == USER_DEFINED)
            if is_control if special else is_word:
                found.append(AddedToken(word, normalized=False, special=special, rstrip=self._swallows(word)))
        return found

    def _swallows(self, word: str) -> bool:
        """Whether the white space after a token goes with it, which llama.cpp tells by the model's name."""
        name = str(self.file.keys.get("general.name", "")).lower()
        return ("phi-3" in name or "phi3" in name) and word not in ("<unk>", "<s>", "<|endoftext|>")

    def _check(self) -> None:
        problems = []
        known = KNOWN | WITHOUT_BEARING
        for key in self.file.keys:
            if key.startswith(KEY) and key.removeprefix(KEY) not in known:
                problems.append(f"the key {key} is none that is known")
        if self.kind not in KINDS:
            problems.append(
                f"{KEY}model is {self.kind!r}; gpt2 (byte pairs) and llama (sentencepiece) are read"
            )
        elif self.kind == "gpt2" and self.pre not in splits():
            problems.append(
                f"{KEY}pre is {self.pre!r}, a splitting that is not known{nearest(self.pre, splits())}"
            )
        wanted = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores")}.get(self.kind, ())
        problems += [f"the key {KEY}{key} is missing" for key in wanted if self.get(key) is None]
        problems += [
            f"{KEY}{key} has {len(self.get(key)):,} entries for {len(self.words):,} tokens"
            for key in ("scores", "token_type")
            if self.get(key) is not None and len(self.get(key)) < len(self.words)
        ]
        words = {*self.words}
        if len(words) < len(self.words):
            [(doubled, _)] = Counter(self.words).most_common(1)
            problems.append(f"{KEY}tokens has {doubled!r} twice")
        made = ("".join(_pair(merge)) for merge in self.get("merges") or () if self.kind == "gpt2")
        if lost := [word for word in made if word not in words]:
            problems.append(f"{len(lost)} of the {KEY}merges make words that are no tokens: {lost[0]!r} ...")
        if problems:
            text = f"the tokenizer of {self.file.path.name} cannot be read as llama.cpp reads it:"
            raise ModelError(bullet_list(text, problems))


@cache
def table() -> dict[str, Any]:
    text = files(__package__).joinpath("pre_tokenizers.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def splits() -> dict[str, list[str]]:
    """The patterns, each for what those before it left whole, of every name that llama.cpp knows."""
    return {name: each["patterns"] for each in table()["splits"] for name in each["names"]}


def pre_tokenizer(name: str) -> Any:
    """What splits text in the way that is called ``name``."""
    from tokenizers import Regex, pre_tokenizers

    patterns = [pre_tokenizers.Split(Regex(one), "isolated") for one in splits()[name]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*patterns, to_bytes])


def _byte_pairs(vocabulary: _Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models

    merges = [_pair(merge) for merge in vocabulary.get("merges")]
    ignored = vocabulary.pre in table()["ignore_merges"]
    words = {word: number for number, word in enumerate(vocabulary.words)}
    backend = Tokenizer(models.BPE(words, merges, ignore_merges=ignored))
    backend.pre_tokenizer = pre_tokenizer(vocabulary.pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")
    return merge[0] + left, right


def _sentencepiece(vocabulary: _Vocabulary) -> Any:
    """Pieces are joined by the score of what they make: the highest first, of two the left one."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = {word: number for number, word in enumerate(vocabulary.words)}
    scores = vocabulary.get("scores")
    pairs = [
        (-scores[number], number, word[:cut], word[cut:])
        for word, number in words.items()
        for cut in range(1, len(word))
        if word[:cut] in words and word[cut:] in words
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    unknown = vocabulary.word("unknown_token_id")
    backend = Tokenizer(models.BPE(words, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins = vocabulary.get("add_space_prefix", True)
    spaced = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaced]) if begins else spaced
    backend.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            *([decoders.Strip(" ", 1, 0)] if begins else []),
        ]
    )
    return backend


def _put_around(backend: Any, vocabulary: _Vocabulary, roles: dict[str, str | None]) -> None:
    """Let the tokenizer put the token of the beginning before a text, and that of the end after it."""
    from tokenizers import processors

    usual = vocabulary.kind == "llama" or vocabulary.pre in table()["add_bos"]
    before = roles["bos_token"] if vocabulary.get("add_bos_token", usual) else None
    after = roles["eos_token"] if vocabulary.get("add_eos_token", False) else None
    around = [word for word in (before, after) if word is not None]
    if around:
        template = [*([before] if before else []), "$A", *([after] if after else [])]
        numbers = [(word, vocabulary.words.index(word)) for word in dict.fromkeys(around)]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)


def _templates(file: GgufFile) -> str | dict[str, str] | None:
    """The chat template, or by their names the several that a file may have."""
    prefix = "tokenizer.chat_template"
    default = file.keys.get(prefix)
    named = {
        key.removeprefix(f"{prefix}."): text
        for key, text in file.keys.items()
        if key.startswith(f"{prefix}.")
    }
    if not named:
        return default
    return named if default is None else {"default": default, **named}

"""What llama.cpp computes from the tiny files of ``gguf_files``, kept so that tests need no engine.

``make engines`` makes it anew: it writes the files, asks llama.cpp in an environment of its own, compares
all 64 positions and all 2,000 texts with what rankfold makes of the files, and writes the reference and the
table of ``docs/gguf.md``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import numpy as np
import torch

HERE = Path(__file__).parent
TESTS = HERE.parent
sys.path[:0] = [str(TESTS), str(HERE)]

from strings import strings  # noqa: E402

from chat_formats import FORMATS  # noqa: E402
from gguf_files import (  # noqa: E402
    FAMILIES,
    KINDS,
    MODELS,
    VARIANTS,
    WIDE,
    WIDE_GEMMA,
    tiny_model,
    vocabulary,
    write_gguf,
    write_vocabulary,
)
from rankfold.models.base.find import DEFAULT_MODEL, find_base  # noqa: E402
from rankfold.models.base.load import load_base  # noqa: E402
from rankfold.models.gguf.file import read_gguf  # noqa: E402
from rankfold.models.gguf.tokenizer import end_ids, gguf_tokenizer, splits  # noqa: E402
from rankfold.models.messages.template import Conversation, render_all  # noqa: E402

# Texts that are cut otherwise: white space beyond ASCII after a token that swallows it (phi3).
KNOWN_DIFFERENCES = {"phi3.vocab.gguf": 1}
POSITIONS = 64
LOGITS, ANSWERS = HERE / "llama_cpp_logits.npz", HERE / "llama_cpp_answers.json"
PAGE = TESTS.parent / "docs" / "gguf.md"
CONVERSATIONS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 + 1?\n"}],
    [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Now in <b>English</b>, please  "},
    ],
]


def ids() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return [int(one) for one in torch.randint(0, 320, (POSITIONS,), generator=generator)]


KIND_FILES = [f"{family}-{kind}.gguf" for family in FAMILIES for kind in KINDS]
MODEL_FILES = [*(f"{name}.gguf" for name in (*MODELS, *VARIANTS)), *KIND_FILES]


def write_model(folder: Path, file: str) -> Path:
    """One of MODEL_FILES."""
    name = file.removesuffix(".gguf")
    if name in MODELS:
        return write_gguf(folder / file, tiny_model(name), MODELS[name][0])
    if name in VARIANTS:
        own, keys = VARIANTS[name]
        return write_gguf(folder / file, tiny_model(own), MODELS[own][0], keys=keys)
    family, _, kind = name.partition("-")
    wide = WIDE_GEMMA if family in ("gemma2", "gemma3") else WIDE
    return write_gguf(folder / file, tiny_model(family, **wide), family, kind=kind)


def kept(name: str) -> slice:
    """The positions whose logits are kept: every fourth, of the many files of kinds every sixteenth."""
    return slice(None, None, 16 if name in KIND_FILES else 4)


def ways_of_splitting() -> list[str]:
    """A name for each list of patterns, and those that people's files have most."""
    first = {str(patterns): name for name, patterns in reversed(splits().items())}
    return sorted({*first.values(), "smollm", "llama-bpe", "tekken", "qwen2"})


def scored_pieces(word: str = "   ") -> dict[str, Any]:
    """A sentencepiece vocabulary of the texts' own letters and frequent strings, and an added ``word``."""
    texts = [text.replace(" ", "▁") for text in strings()]
    letters = [letter for letter, count in Counter("".join(texts)).items() if count > 2]
    counts = Counter(text[i : i + size] for text in texts for size in range(2, 7) for i in range(len(text)))
    frequent = sorted((piece for piece, count in counts.items() if count > 40 and len(piece) > 1))
    frequent.sort(key=lambda piece: -counts[piece])
    control, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    added = ["<|user|>", "<|end|>", "<|endoftext|>", word]
    pieces = [one for one in (*sorted(letters), *frequent[:1500]) if one not in {*control, *added}]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [*control, *bytes_, *pieces, *added],
        "scores": [0.0] * 259 + [-float(place) for place in range(len(pieces))] + [-1000.0] * 4,
        "token_type": [2, 3, 3, *([6] * 256), *([1] * len(pieces)), 3, 3, 3, 4],
    }


def write_words(folder: Path, file: str) -> Path:
    """One of VOCABULARIES: the default model's words with a way of splitting, pieces with scores, or a
    template."""
    name = file.removesuffix(".vocab.gguf")
    keys: dict[str, Any] = {}
    if name in splits():
        real = read_gguf(find_base(DEFAULT_MODEL).gguf_file).keys
        own = "tokenizer.ggml."
        words = {key.removeprefix(own): real[key] for key in real if key.startswith(own)} | {"pre": name}
    elif name == "phi3":
        words, keys["general.name"] = scored_pieces("<think>"), "Phi3 tiny"
    elif name.startswith("pieces"):
        words = scored_pieces() | {"add_space_prefix": name == "pieces"}
    else:
        words = vocabulary()
    if name in TEMPLATES:
        keys["tokenizer.chat_template"] = FORMATS[name].path.read_text(encoding="utf-8")
    return write_vocabulary(folder / file, words, **keys)


# Without those that write today's date.
TEMPLATES = ["chatml", "qwen2.5", "qwen3", "llama2", "llama3", "mistral", "gemma3", "phi3", "zephyr"]
VOCABULARIES = [
    f"{name}.vocab.gguf"
    for name in (*ways_of_splitting(), "pieces", "pieces-without-space", "tiny", *TEMPLATES)
]


def divergence(theirs: Any, ours: Any) -> float:
    """The largest Kullback-Leibler divergence at a position, in nats."""
    first, second = (torch.as_tensor(np.asarray(one)).double().log_softmax(-1) for one in (theirs, ours))
    return float((first.exp() * (first - second)).sum(-1).max())


def our_logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_base(str(path)).model(torch.tensor([ids()])).logits[0]
    return logits


def checksums(rows: list[list[int]]) -> list[int]:
    """One for every ten texts."""
    return [crc32(str(rows[start : start + 10]).encode()) for start in range(0, len(rows), 10)]


def our_tokens(path: Path) -> list[list[int]]:
    tokenizer = gguf_tokenizer(read_gguf(path))
    found: list[list[int]] = tokenizer(strings(), add_special_tokens=False)["input_ids"]
    return found


def our_renderings(path: Path) -> list[str]:
    tokenizer = gguf_tokenizer(read_gguf(path))
    asked = [Conversation(one, [(len(one), True)]) for one in CONVERSATIONS]
    return ["refused" if isinstance(one, Exception) else one[0].text for one in render_all(tokenizer, asked)]


def main(python: str) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        jobs = {
            "ids": ids(),
            "logits": [write_model(folder, name).name for name in MODEL_FILES],
            "tokens": [write_words(folder, name).name for name in VOCABULARIES],
            "texts": strings(),
            "conversations": CONVERSATIONS,
        }
        (folder / "jobs.json").write_text(json.dumps(jobs))
        judge = HERE / "llama_cpp_judge.py"
        subprocess.run([python, str(judge), place], check=True)
        theirs = dict(np.load(folder / "logits.npz"))
        answers = json.loads((folder / "answers.json").read_text())
        table = {name: divergence(theirs[name], our_logits(folder / name)) for name in jobs["logits"]}
        equal = {}
        for name, answer in answers.items():
            pairs = zip(our_tokens(folder / name), answer["tokens"], strict=True)
            equal[name] = sum(ours == wanted for ours, wanted in pairs)
            assert len(strings()) - equal[name] <= KNOWN_DIFFERENCES.get(name, 0), name
            tokenizer = gguf_tokenizer(read_gguf(folder / name))
            assert tokenizer("Hello")["input_ids"] == answer["with_bos"], name
            assert end_ids(read_gguf(folder / name)) == answer["ends"], name
            assert not answer["rendered"] or our_renderings(folder / name) == answer["rendered"], name
    np.savez_compressed(LOGITS, **{name: one[kept(name)].astype(np.float16) for name, one in theirs.items()})
    answered = {name: {**one, "tokens": checksums(one["tokens"])} for name, one in answers.items()}
    ANSWERS.write_text(
        json.dumps(answered, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    write_page(table, equal)


def write_page(divergences: dict[str, float], equal: dict[str, int]) -> None:
    """Put the three tables into the page, each after its mark."""
    told = {name.removesuffix(".gguf"): f"{value:.0e}" for name, value in divergences.items()}
    plain = [f"| {name} | {told[name]} |" for name in (*MODELS, *VARIANTS)]
    kinds = [
        " | ".join(["", one, *(told[f"{one}-{kind}"] for kind in KINDS), ""]).strip() for one in FAMILIES
    ]
    tokens = [f"| {name.removesuffix('.vocab.gguf')} | {count:,} |" for name, count in equal.items()]
    text = PAGE.read_text(encoding="utf-8")
    for mark, head, rows in (
        ("logits", "| file | largest divergence in nats |\n|---|---|", plain),
        ("kinds", f"| | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}", kinds),
        ("tokens", "| splitting | of 2,000 texts equal |\n|---|---|", tokens),
    ):
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        before, _, rest = text.partition(begin)
        text = before + "\n".join([begin, head, *rows, end]) + rest.partition(end)[2]
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

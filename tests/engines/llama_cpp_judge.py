"""What llama.cpp makes of GGUF files: run in an environment of its own, which has only llama-cpp-python.

``python llama_cpp_judge.py FOLDER`` reads FOLDER/jobs.json and writes FOLDER/logits.npz and
FOLDER/answers.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama, llama_vocab_is_eog
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def logits_of(path: Path, ids: list[int]) -> np.ndarray:
    exact = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "flash_attn": False}
    model = Llama(str(path), n_ctx=len(ids), logits_all=True, n_batch=len(ids), verbose=False, **exact)
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float32)


def answers_of(path: Path, texts: list[str], conversations: list[list[dict[str, str]]]) -> dict[str, object]:
    model = Llama(str(path), vocab_only=True, verbose=False)
    tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    template = model.metadata.get("tokenizer.chat_template")
    rendered = []
    if template is not None:
        word = lambda number: model._model.token_get_text(number) if number >= 0 else ""  # noqa: E731
        formatter = Jinja2ChatFormatter(template, word(model.token_eos()), word(model.token_bos()))
        rendered = [render(formatter, messages) for messages in conversations]
    return {
        "tokens": tokens,
        "with_bos": model.tokenize(b"Hello", add_bos=True, special=True),
        "rendered": rendered,
        "ends": [i for i in range(model.n_vocab()) if llama_vocab_is_eog(model._model.vocab, i)],
    }


def render(formatter: Jinja2ChatFormatter, messages: list[dict[str, str]]) -> str:
    try:
        return str(formatter(messages=messages).prompt)
    except Exception:  # a template may refuse a conversation, in whatever way
        return "refused"


def main(folder: Path) -> None:
    jobs = json.loads((folder / "jobs.json").read_text())
    np.savez_compressed(
        folder / "logits.npz", **{name: logits_of(folder / name, jobs["ids"]) for name in jobs["logits"]}
    )
    found = {name: answers_of(folder / name, jobs["texts"], jobs["conversations"]) for name in jobs["tokens"]}
    (folder / "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

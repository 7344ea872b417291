"""The command that a run prints at its end is run, for every kind of target, base and objective."""

from __future__ import annotations

import io
import re
import shlex
import sys

import pytest

from conftest import tiny_llama
from gguf_files import tiny_model, write_gguf

TARGETS = {
    "linear layers": "all-linear",
    "the head too": "q_proj,lm_head",
    "the embedding too": "q_proj,embed_tokens",
    "a pattern": r".*layers\.1\..*(q|v)_proj",
}
BASES = ("folder", "tied folder", "GGUF", "tied GGUF")
ROWS = {
    "prompt-completion": '{"prompt": "Why?", "completion": "Because."}',
    "conversations": '{"messages": [{"role": "user", "content": "Why"}, '
    '{"role": "assistant", "content": "So"}]}',
    "running text": '{"text": "Cats sleep. Dogs bark."}',
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, real_base):
    place = tmp_path_factory.mktemp("bases")
    for name, tied in (("folder", False), ("tied folder", True)):
        tiny_llama(tied=tied).save_pretrained(place / name)
        real_base.tokenizer.save_pretrained(place / name)
    write_gguf(place / "GGUF", tiny_model("llama"), "llama").rename(place / "plain.gguf")
    write_gguf(place / "tied", tiny_model("llama-tied"), "llama").rename(place / "tied.gguf")
    return {
        **{name: place / name for name in BASES[:2]},
        **{"GGUF": place / "plain.gguf", "tied GGUF": place / "tied.gguf"},
    }


CASES = [
    *((target, "tied folder", "prompt-completion") for target in TARGETS),
    *((target, "tied GGUF", "conversations") for target in TARGETS),
    *(("the head too", base, "running text") for base in BASES),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_what_a_run_says_at_its_end_can_be_done(case, bases, tmp_path, command, monkeypatch):
    target, base, objective = case
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            ROWS[objective].replace("Why", f"Why {i}").replace("Cats", f"{i} cats") + "\n" for i in range(24)
        )
    )
    run = [
        "train",
        "--model",
        bases[base],
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--targets",
        TARGETS[target],
    ]
    options = [
        "--max-steps",
        "1",
        "--samples",
        "0",
        "--precision",
        "float32",
        "--rank",
        "2",
    ]
    status, said, told = command(*run, *options)
    assert status == 0, told
    words = shlex.split(re.search(r"^Go on: +(.*)$", said, re.MULTILINE)[1])
    assert words[1] == "chat"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\n/quit\n"))
    status, _, told = command(*words[1:], "--max-new-tokens", "3", "--temperature", "0")
    assert (status, "Traceback" in told) == (0, False), told

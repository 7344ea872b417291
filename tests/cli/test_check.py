"""``rankfold check`` as a user meets it."""

from __future__ import annotations

import json
import sys

import pytest

from conftest import rankfold_command
from rankfold.cli.main import main

GOOD = [
    {"prompt": f"Which is number {n * 7919}?", "completion": f"The {n * 104729}th of them."} for n in range(9)
]


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``rankfold check`` in this process: (exit status, standard output, standard error)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rankfold", "check", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run


def test_sound_rows_end_with_status_0(command, write_rows):
    status, out, err = command(write_rows(GOOD))
    assert (status, err) == (0, "")
    assert "Nothing here would stop training." in out
    assert "\x1b[" not in out


def test_rows_that_would_stop_a_run_end_with_status_1(command, write_rows):
    path = write_rows([*GOOD, {"prompt": "a", "completion": ""}])
    status, out, err = command(path)
    assert (status, err) == (1, "")
    assert "1 of 10 rows cannot be used" in out
    assert f"{path}:10: message 2 (assistant): empty" in out
    assert command(path, "--skip-bad", "0.1")[0] == 0


def test_rows_that_cannot_be_read_end_with_status_2_and_the_whole_report(command, write_rows):
    path = write_rows(GOOD)
    with path.open("a") as file:
        file.write('{"prompt": "a" "completion"}\n')
    status, out, _ = command(path)
    assert status == 2
    assert f"{path}:10:16: Expecting ',' delimiter" in out
    assert "kept        9" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jsonl"], "no such data file: gone.jsonl"),
        ([], "Missing argument 'DATA'"),
        (["{data}", "--show", "3"], "name the model"),
        (["{data}", "--fix", "{data}"], "is, or lies in, the data to check"),
        (["{data}", "--shwo", "3"], "No such option '--shwo'"),
        (["{data}", "--model", "no/such"], "cannot load the model 'no/such'"),
        (["{data}", "--shape", "alpacca"], "did you mean 'alpaca'"),
    ],
)
def test_a_mistake_is_a_sentence_and_status_2(command, write_rows, arguments, message):
    data = write_rows(GOOD)
    status, out, err = command(*(argument.format(data=data) for argument in arguments))
    assert status == 2
    assert message in err
    assert "Traceback" not in out + err


def test_every_output_is_written_and_named(command, write_rows, tmp_path):
    data = write_rows([*GOOD, GOOD[0]])
    names = {"--html": "a.html", "--json": "a.json", "--ledger": "a.tsv", "--fix": "a.jsonl"}
    status, out, _ = command(
        data, *(part for flag, name in names.items() for part in (flag, tmp_path / name))
    )
    assert status == 0
    for name in names.values():
        assert f"written  {tmp_path / name}" in out
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == 10
    assert len((tmp_path / "a.tsv").read_text().splitlines()) == 10
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 9
    assert f"{data}:10: left out: a copy of an earlier or a held-out row" in out
    assert (tmp_path / "a.jsonl.changes.tsv").read_text().count("\n") == 1


def test_tokens_and_the_mask_are_shown_with_a_model(write_rows, tiny_folder):
    run = rankfold_command("check", write_rows(GOOD), "--model", tiny_folder, "--show", 1)
    assert run.returncode == 0, run.stderr
    assert "Length in tokens" in run.stdout
    assert "trained tokens stand in {+ +}" in run.stdout
    assert "th of them.<|im_end|>+}" in run.stdout


def test_what_a_row_holds_cannot_steer_the_terminal(command, write_rows):
    evil = "\x1b]0;title\x07\x1b[31m [bold]x[/bold]"
    rows = [
        *GOOD,
        {"prompt": evil, "completion": f"yes {evil}"},
        {"text": "y", "label": evil},
        {evil: 1, "b": 2},
    ]
    status, out, _ = command(write_rows(rows))
    assert status == 1
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]x[/bold]" in out

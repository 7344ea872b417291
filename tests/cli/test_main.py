"""The command as a user meets it: what it prints, its exit status, and what it leaves behind."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import yaml

from children import Command
from conftest import rankfold_command
from rankfold.cli.main import VERBS
from rankfold.lora.files.adapter_reader import Fault

COMMAND = str(Path(sys.executable).with_name("rankfold"))


@pytest.fixture
def data(write_rows, joke_rows):
    return write_rows(joke_rows)


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """A finished run of the tiny model."""
    folder = tmp_path_factory.mktemp("trained")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Joke {n}?", "completion": "No {n}."}}\n' for n in range(24)))
    arguments = ("--model", tiny_folder, "--data", rows, "--out", folder / "run", "--samples", 1)
    run = rankfold_command("train", *arguments)
    assert run.returncode == 0, run.stderr
    return folder / "run", run.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(command, verb):
    status, out, _ = command(verb, "--help")
    assert status == 0
    assert out.startswith(f"Usage: rankfold {verb}")


def test_the_version_is_printed(command):
    assert command("--version")[1] == "rankfold 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--rnak", "4"], "No such option '--rnak'"),
        (["train"], r"data is missing(.|\n)*out is missing"),
        (["train", "--data", "{data}", "--out", "{out}", "--rank", "0"], "rank: .*got '0'"),
        (["train", "--data", "nope.jsonl", "--out", "{out}"], "no such data file: nope.jsonl"),
        (["train", "--data", "{empty}", "--out", "{out}"], "holds no rows"),
        (["train", "--data", "{bad}", "--out", "{out}"], r"bad.jsonl:2:14: Expecting ',' delimiter: .*wrong"),
        (
            ["train", "--data", "{textless}", "--out", "{out}"],
            r"textless.jsonl:1: message 2 \(assistant\): empty",
        ),
        (["train", "--data", "{data}", "--out", "{data}"], "exists and is not an empty folder"),
        (["train", "--data", "{data}", "--out", "{data}/run"], "is a file"),
        (
            ["train", "--data", "{data}", "--out", "{out}", "--model", "no/such"],
            "cannot load the model 'no/such'",
        ),
        (
            ["train", "--data", "{data}", "--out", "{out}", "--model", "{tiny}", "--targets", "q_porj"],
            "nearest names: q_proj",
        ),
        (["chat", "--adapter", "nowhere"], "is not an adapter folder"),
        (["generate", "--prompt", "hi", "--adapter", "nowhere"], "is not an adapter folder"),
        (
            ["generate", "--prompt", "hi", "--temperature", "nan"],
            "temperature: input should be a finite number",
        ),
        (["generate", "--prompt", "hi", "--allow", "base"], "there is no --adapter"),
        (["chat", "--adapter", "nowhere", "--allow", "bsae"], "allow='bsae' is none of missing, unexpected"),
        (["generate"], "Missing option '--prompt'"),
        (["explain", "--out", "picture.exe"], "must end in .png or .svg"),
        (["demo", "--out", "{data}"], "exists and is not an empty folder"),
    ],
)
def test_a_mistake_is_a_sentence_and_status_2(command, tmp_path, data, tiny_folder, arguments, message):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "a" wrong}\n')
    (tmp_path / "textless.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    places = {name: tmp_path / f"{name}.jsonl" for name in ("empty", "bad", "textless")}
    places |= {"data": data, "out": tmp_path / "out", "tiny": tiny_folder}
    before = sorted(path.name for path in tmp_path.iterdir())
    status, out, err = command(*(argument.format(**places) for argument in arguments))
    assert status == 2
    assert re.search(message, err), err
    assert "Traceback" not in out + err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_tells_everything_without_a_terminal(trained):
    folder, out = trained
    assert "\x1b[" not in out
    for part in (
        "The plan",
        "learning rate",
        "expected",
        "step 1/",
        "95 % interval",
        f"chat --adapter {folder}",
    ):
        assert part in out
    assert re.search(r"tokens\s+\d+ trained of [\d,]+", out)
    assert re.search(r"\{\+No \d+\.<\|im_end\|>\+\}", out)


def test_a_fault_of_an_adapter_can_be_allowed(trained, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(trained[0], folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    options = ("generate", "--prompt", "Joke?", "--adapter", folder, "--max-new-tokens", 2)
    refused = rankfold_command(*options)
    assert refused.returncode == 2
    assert "adapter_config.json is not what was saved" in refused.stderr
    allowed = rankfold_command(*options, "--allow", "config")
    assert allowed.returncode == 0, allowed.stderr
    assert "was loaded in spite of" in allowed.stderr
    assert allowed.stdout.strip()


def test_the_help_names_every_fault_that_can_be_allowed():
    words = " ".join(rankfold_command("generate", "--help").stdout.split())
    assert all(fault in words for fault in get_args(Fault))


def test_generate_and_chat_speak_with_the_adapter(trained):
    folder, _ = trained
    options = ("--adapter", folder, "--max-new-tokens", 5, "--temperature", 0)
    generated = rankfold_command("generate", "--prompt", "Joke?", *options)
    assert generated.returncode == 0, generated.stderr
    chat = rankfold_command("chat", *options, input="Joke?\n/reset\nJoke?\n/quit\nnever read\n")
    assert chat.returncode == 0, chat.stderr
    first, second = chat.stdout.strip().split("\n", 1)
    assert first.strip() == second.strip() == generated.stdout.strip()


def test_an_answer_is_the_only_thing_on_standard_output(real_base):
    run = rankfold_command(
        "generate", "--prompt", "What is the capital of France?", "--temperature", 0, "--max-new-tokens", 12
    )
    assert "Paris" in run.stdout
    assert len(run.stdout.splitlines()) == 1
    assert run.stderr == ""


def test_explain_prints_the_numbers_and_writes_the_picture(command, tmp_path):
    status, out, _ = command("explain", "--out", tmp_path / "a.png")
    assert status == 0
    assert "W holds 100 numbers, B and A together 40" in out
    assert "the first output is the base's to the last bit" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def start_training(tiny_folder: Path, data: Path, out: Path, *more: object) -> Command:
    files = ("--model", tiny_folder, "--data", data, "--out", out)
    return Command("train", *files, "--epochs", 1000, "--samples", 0, *more)


def test_ctrl_c_while_training_keeps_a_usable_adapter(tiny_folder, data, tmp_path):
    process = start_training(tiny_folder, data, tmp_path / "run")
    process.wait_for("step 1/")
    process.send_signal(signal.SIGINT)
    ended = process.finish()
    assert ended.returncode == 130
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "Stopped after step" in ended.stdout
    assert f"resume {tmp_path / 'run'}" in ended.stdout
    answer = rankfold_command(
        "generate", "--prompt", "Joke?", "--adapter", tmp_path / "run", "--max-new-tokens", 2
    )
    assert answer.returncode == 0, answer.stderr


def test_ctrl_c_before_training_leaves_nothing(tiny_folder, data, tmp_path):
    process = start_training(tiny_folder, data, tmp_path / "run")
    process.wait_for("loading the model")
    process.send_signal(signal.SIGINT)
    ended = process.finish()
    assert ended.returncode == 130
    assert ended.stderr.strip() == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


def test_a_killed_run_is_resumed_and_finishes(tiny_folder, data, tmp_path):
    process = start_training(tiny_folder, data, tmp_path / "run", "--epochs", 3, "--save-every-steps", 1)
    process.wait_for("step 2/")
    process.send_signal(signal.SIGKILL)
    assert process.finish().returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    again = rankfold_command("resume", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "note: going on after step" in again.stdout
    assert (tmp_path / "run" / "adapter_config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [data.name, "run"]


def test_sigterm_saves_and_ends_with_its_own_status(tiny_folder, data, tmp_path):
    process = start_training(tiny_folder, data, tmp_path / "run")
    process.wait_for("step 1/")
    process.send_signal(signal.SIGTERM)
    ended = process.finish()
    assert ended.returncode == 143, ended.stderr
    assert "Stopped after step" in ended.stdout
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_recipe_file_words_and_options_are_settings_and_the_last_wins(tiny_folder, data, tmp_path, command):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_folder}\ndata: {data}\nrank: 4\nepochs: 7\nsamples: 0\n")
    out = tmp_path / "run"
    status, shown, _ = command("train", recipe, "epochs=5", f"out={out}", "--epochs", "1", "--dry-run")
    assert status == 0
    assert "The plan" in shown
    assert not out.exists()
    assert command("train", recipe, "epochs=5", f"out={out}", "--epochs", "1")[0] == 0
    resolved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (resolved["rank"], resolved["epochs"], resolved["alpha"]) == (4, 1, 8.0)


def test_a_disk_that_fills_up_leaves_nothing_half(tiny_folder, data, tmp_path):
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from rankfold.cli.main import main\n"
        "main()\n"
    )
    arguments = [
        "train",
        "--model",
        tiny_folder,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--samples",
        0,
        "--epochs",
        1,
    ]
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 2
    assert re.search(r"error: cannot complete the folder .*step-00000003: File too large", run.stderr)
    assert "Traceback" not in run.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "adapter_config.json").exists()


def run_in_terminal(arguments: list[str], **environment: str) -> str:
    """Run the command on a pseudo-terminal and return what it shows."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, *arguments],
        stdout=slave,
        stderr=slave,
        stdin=slave,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"} | environment,
    )
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 1)
        if ready:
            try:
                shown += os.read(master, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
    assert process.wait(timeout=10) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("colour", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_terminal_gets_a_progress_bar_and_colour_unless_it_refuses_it(tiny_folder, data, tmp_path, colour):
    arguments = [
        "train",
        "--model",
        tiny_folder,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--samples",
        0,
        "--epochs",
        2,
    ]
    shown = run_in_terminal([str(a) for a in arguments], **({} if colour else {"NO_COLOR": "1"}))
    assert re.search(r"tokens/s.*0:00:\d\d", shown)
    assert "loss " in shown
    assert ("trained tokens are green" in shown) == colour
    assert ("\x1b[1;32m" in shown) == colour
    assert ("{+There were" in shown) != colour


def test_the_demo_takes_the_next_free_folder_and_trains_on_the_jokes_it_ships(
    tiny_folder, tmp_path, monkeypatch
):
    (tmp_path / "runs" / "cold-jokes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = rankfold_command("demo", "--model", tiny_folder)
    assert run.returncode == 0, run.stderr
    assert "264 to train on" in run.stdout
    assert "44 held out" in run.stdout
    assert (tmp_path / "runs" / "cold-jokes-2" / "report.html").is_file()


def test_the_schema_is_that_of_the_recipe(command):
    import json

    from rankfold import Recipe

    status, out, _ = command("schema")
    assert status == 0
    assert set(json.loads(out)["properties"]) == set(Recipe.model_fields)


def test_a_setting_that_is_on_or_off_is_a_switch(tiny_folder, data, tmp_path, command):
    words = ("--model", tiny_folder, "--data", data, "--max-steps", "1", "--samples", "0")
    status, _, told = command("train", "--out", tmp_path / "on", *words, "--shard-base")
    assert (status, "shard_base" in told) == (2, True)  # one process has nobody to share with
    assert not (tmp_path / "on").exists()
    assert command("train", "--out", tmp_path / "off", *words, "shard_base=true", "--no-shard-base")[0] == 0

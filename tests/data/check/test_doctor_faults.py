"""The data doctor on every fault of rows and files that we know of, by the numbers of our list of faults."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankfold.data.check import doctor
from rankfold.data.check.doctor import CheckRequest, check
from rankfold.data.check.report import OK, UNREADABLE, WOULD_STOP, Report
from rankfold.errors import DataError

GOOD = {"prompt": "What is the capital of France?", "completion": "The capital of France is Paris."}
USER, ANSWER = (
    {"role": "user", "content": "Which is it?"},
    {"role": "assistant", "content": "It is this one."},
)


def write(folder: Path, *rows: dict | bytes, name: str = "rows.jsonl", end: bytes = b"\n") -> Path:
    path = folder / name
    path.write_bytes(
        end.join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + end
    )
    return path


def good(number: int) -> dict:
    words = ("apple", "brick", "cloud", "delta", "eagle", "frost", "grape", "honey", "ivory", "jelly")
    return {
        "prompt": f"Tell me about the {words[number % 10]} and number {number * 7919}.",
        "completion": f"{words[(number + 3) % 10]} is {number * 104729}, and no more is known of it.",
    }


def examined(path: Path, **options) -> Report:
    report = check(CheckRequest.of({"data": str(path), **options}))
    assert report.kept + report.cut + report.dropped == report.rows
    return report


def places(report: Report, rule: str) -> list[str]:
    finding = next((finding for finding in report.findings if finding.rule == rule), None)
    return [f"{Path(origin).name}: {text}" for origin, text in finding.examples] if finding else []


def dropped_for(tmp_path: Path, row: dict | bytes) -> tuple[str, str]:
    """The only rule that drops ``row``, which stands between two good ones, and what it says."""
    report = examined(write(tmp_path, good(1), row, good(2)))
    assert (report.kept, report.dropped) == (2, 1)
    assert report.status in (WOULD_STOP, UNREADABLE)
    ((_, rule), count) = report.reasons[0]
    assert count == 1
    (place,) = places(report, rule)
    return rule, place


def test_fault_41_bad_json_is_named_by_line_and_column_and_may_be_skipped_up_to_a_share(tmp_path):
    bad = b'{"prompt": "a" "completion": "b"}'
    rule, place = dropped_for(tmp_path, bad)
    assert rule == "unreadable"
    assert place.startswith("rows.jsonl:2:16: Expecting ',' delimiter: ")
    assert '"completion": "b"' in place
    path = write(tmp_path, *(good(n) for n in range(9)), bad)
    assert examined(path).status == UNREADABLE
    assert examined(path, skip_bad=0.09).status == UNREADABLE
    skipped = examined(path, skip_bad=0.1)
    assert (skipped.status, skipped.kept, skipped.dropped) == (OK, 9, 1)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"text": "你好 caf'.encode() + b'\xe9"}', "not UTF-8 (byte 0xe9)"),
        (b'{"text": "half \\ud800"}', "half of a surrogate pair"),
        (b'{"text": "a\\u0000b"}', "NUL"),
        (b'{"text": "a\x00b"}', "Invalid control character"),
        (b'{"text": "a\rb"}', "Invalid control character"),
    ],
)
def test_fault_42_wrong_characters_are_errors_with_their_line(tmp_path, row, says):
    _, place = dropped_for(tmp_path, row)
    assert place.startswith("rows.jsonl:2")
    assert says in place


def test_fault_42_a_byte_order_mark_and_crlf_are_accepted_and_only_line_feeds_end_a_line(tmp_path):
    path = write(tmp_path, good(1), {"prompt": "one\u2028line", "completion": "yes\u0085it is"}, end=b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\\u2028", "\u2028".encode()))
    report = examined(path)
    assert (report.status, report.kept) == (OK, 2)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
def test_fault_43_a_file_without_rows_is_an_error(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no rows"):
        examined(path)


def test_fault_43_no_usable_row_and_a_single_row(tmp_path):
    report = examined(write(tmp_path, {"prompt": "a", "completion": ""}), skip_bad=1.0)
    assert (report.status, report.verdict) == (WOULD_STOP, "Training would stop: no row is left.")
    path = tmp_path / "one.jsonl"
    path.write_bytes(json.dumps(GOOD).encode())  # without a line feed at its end
    report = examined(path)
    assert report.kept == 1


def peak_of_check(path: Path) -> tuple[dict, int]:
    """The report as JSON and the peak memory in bytes of a check in a process of its own."""
    out = path.with_suffix(".report")
    program = (
        "import re, sys\nfrom rankfold.data.check.doctor import CheckRequest, check\n"
        "check(CheckRequest.of({'data': sys.argv[1], 'json_out': sys.argv[2]}))\n"
        # ru_maxrss would begin with what the parent, this process, has in memory.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)\n"
    )
    command = [sys.executable, "-c", program, str(path), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.read_text()), int(run.stdout)


def test_fault_44_a_huge_line_is_a_bad_row_in_bounded_memory(tmp_path):
    path = write(tmp_path, good(1))
    with path.open("ab") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + json.dumps(good(2)).encode() + b"\n")
    report, peak = peak_of_check(path)
    assert (report["kept"], report["dropped"]) == (2, 1)
    assert report["findings"][0]["rule"] == "unreadable"
    assert report["findings"][0]["examples"][0]["origin"].endswith("rows.jsonl:2")
    assert peak < 1.2e9


@pytest.mark.parametrize("messages", [5_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_fault_44_a_conversation_without_end_is_a_bad_row_in_bounded_memory(tmp_path, messages):
    turn = b'{"role":"user","content":"x"}'
    path = write(tmp_path, good(1), b'{"messages":[' + b",".join([turn] * messages) + b"]}", good(2))
    report, peak = peak_of_check(path)
    assert (report["kept"], report["dropped"]) == (2, 1)
    assert peak < 2e9


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"massages": [USER, ANSWER], "id": 1}, "shape"),
        ({"messages": []}, "shape"),
        ({"messages": "hello"}, "shape"),
        ({"messages": [{"role": "user"}, ANSWER]}, "null-content"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "null-content"),
        ({"messages": [USER, {"role": "assistant", "content": {"a": 4}}]}, "shape"),
        ({"messages": [USER, {"role": "narrator", "content": "x"}]}, "unknown-role"),
        ({"messages": [{"role": 3, "content": "x"}, ANSWER]}, "shape"),
        ({"messages": [ANSWER]}, "nothing-trained"),
        ({"messages": [USER, ANSWER], "videos": ["a.mp4"]}, "not-used"),
        ({"messages": [USER, ANSWER, USER]}, "last-is-answer"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty-turn"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [3]}]}, "shape"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "a"}]}, ANSWER]}, "shape"),
        ({"prompt": "x", "completion": None}, "null-content"),
        ({"prompt": "look: <image>", "completion": "a cat", "images": ["no-such.png"]}, "missing-image"),
        ({"prompt": "<image> or <image>", "completion": "a cat"}, "image-count"),
        ({"text": "  "}, "empty-text"),
    ],
)
def test_fault_45_each_broken_rule_is_named_with_its_line(tmp_path, row, rule):
    found, place = dropped_for(tmp_path, row)
    assert found == rule, place
    assert place.startswith("rows.jsonl:2: ")


def test_fault_45_content_as_a_list_of_text_parts_is_no_fault(tmp_path):
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}, ANSWER]}
    assert examined(write(tmp_path, row)).kept == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "given twice: prompt"),
        (b'{"prompt": "a", "completion": "c", "score": 1e999}', "1e999"),
        (b"[1, 2]", "expected an object"),
        (b"[" * 100_000, ""),
    ],
)
def test_fault_46_json_that_others_read_silently_is_an_error(tmp_path, row, says):
    rule, place = dropped_for(tmp_path, row)
    assert rule == "unreadable"
    assert says in place


def test_fault_47_a_type_that_differs_is_an_error_of_that_row_alone(tmp_path):
    rows = [good(1), {"prompt": ["a"], "completion": "b"}, {"prompt": None, "completion": "b"}, good(2)]
    rows += [{"prompt": {"a": 1}, "completion": "b"}, good(3)]
    report = examined(write(tmp_path, *rows))
    assert (report.kept, report.dropped) == (3, 3)


def test_fault_48_what_is_no_file_of_rows_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty").mkdir()
    for source, says in (
        (tmp_path / "pipe.jsonl", "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path / "empty", "holds no data files"),
        (tmp_path / "gone.jsonl", "no such data file"),
    ):
        with pytest.raises(DataError, match=says):
            examined(source)
    with pytest.raises(DataError, match="is a URL"):
        check(CheckRequest.of({"data": "https://host.example/rows.jsonl"}))


def test_fault_48_a_decompression_bomb_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(300):
            file.write((b" " * 99_999 + b"\n") * 10)
    with pytest.raises(DataError, match="bomb"):
        examined(path)


def test_fault_48_rows_that_change_between_the_two_passes_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path, good(1), good(2))
    write_fixed = doctor.write_fixed

    def change_and_write(*arguments):
        write(tmp_path, good(1), b"", good(2))
        return write_fixed(*arguments)

    monkeypatch.setattr(doctor, "write_fixed", change_and_write)
    with pytest.raises(DataError, match="changed while they were checked"):
        examined(path, fix=str(tmp_path / "fixed.jsonl"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.jsonl"]


def test_fault_49_a_special_token_in_the_words_is_reported_and_stays_text(tmp_path, tiny_folder, real_base):
    spelt = {
        "prompt": "Say <|im_end|> twice.<|im_start|>system",
        "completion": "<|im_end|> and <|im_end|>, I say.",
    }
    path = write(tmp_path, good(1), spelt, good(2))
    for model in (None, str(tiny_folder)):
        report = examined(path, **({"model": model, "show": 3} if model else {}))
        assert (report.status, report.kept) == (OK, 3)
        (place,) = places(report, "special-token")
        assert "rows.jsonl:2: Say <|im_end|> twice.<|im_start|>" in place
        finding = next(finding for finding in report.findings if finding.rule == "special-token")
        assert (finding.rows, finding.times) == (1, 4)

    from rankfold.data.shapes.example import Example, Message
    from rankfold.data.tokens.encode import encode

    messages = (Message("user", (spelt["prompt"],)), Message("assistant", (spelt["completion"],)))
    plain = (Message("user", ("Say it twice. Now",)), Message("assistant", ("This and that, I say.",)))
    control = {
        token: real_base.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")
    }
    counts = [
        [encode(Example("f:1", turns), real_base.tokenizer).input_ids.count(id) for id in control.values()]
        for turns in (messages, plain)
    ]
    assert counts[0] == counts[1]


def test_fault_50_copies_near_copies_and_leaks_are_counted_and_reported(tmp_path):
    near = {**good(3), "completion": good(3)["completion"] + " Yes."}
    data = write(tmp_path, good(1), good(2), good(1), good(3), near, good(4))
    report = examined(data)
    assert (report.status, report.kept) == (OK, 6)
    assert places(report, "duplicate") == [f"rows.jsonl:3: the same as {data}:1"]
    assert places(report, "near-duplicate") == [f"rows.jsonl:5: almost the same as {data}:4"]
    held_out = write(tmp_path, good(2), near, good(9), name="held-out.jsonl")
    report = examined(data, held_out=str(held_out))
    assert (report.status, report.kept, report.dropped) == (OK, 4, 2)
    assert [place.split(":")[1] for place in places(report, "in-held-out")] == ["2", "5"]
    assert [place.split(":")[1] for place in places(report, "near-held-out")] == ["4"]


ONE_OF_EVERY_FAULT: list[tuple[dict | bytes, str]] = [
    (b'{"prompt": "a" "completion": "b"}', "unreadable"),
    ('{"prompt": "你好", "completion": "caf'.encode() + b'\xe9"}', "unreadable"),
    (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "unreadable"),
    ({"prompt": "alone"}, "shape"),
    ({"messages": [USER, {"role": "narrator", "content": "x"}]}, "unknown-role"),
    ({"messages": [ANSWER, {**USER, "content": "And then?"}, ANSWER]}, "role-order"),
    ({"prompt": "How many?", "completion": 12}, "not-text"),
    ({"messages": [{**USER, "content": "Or so?"}, {**ANSWER, "weight": 0.5}]}, "loss-weight"),
    ({"prompt": "What did he say?", "completion": "No.", "audio": "a.wav"}, "not-used"),
    ({"messages": [USER, ANSWER, USER]}, "last-is-answer"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "null-content"),
    ({"prompt": "a", "completion": ""}, "empty-turn"),
    (
        {"messages": [{"role": "system", "content": ""}, {**USER, "content": "Alone?"}, ANSWER]},
        "empty-system",
    ),
    ({"prompt": "look: <image>", "completion": "a cat", "images": ["no-such.png"]}, "missing-image"),
    ({"prompt": "<image> or <image>", "completion": "a cat"}, "image-count"),
    ({"prompt": "chat", "chosen": "same", "rejected": "same"}, "same-answers"),
    ({"prompt": "Write <|im_end|> at the end", "completion": "I rather would not do that."}, "special-token"),
    ({"prompt": "Un cafÃ© ?", "completion": "Volontiers, avec du sucre."}, "mojibake"),
    ({"prompt": "Lost \ufffd here", "completion": "Something was lost on the way."}, "replacement-character"),
    ({"prompt": "Bell \x07 rings", "completion": "So it does, every hour."}, "control-character"),
    ({"prompt": "abc\u202etxt.exe", "completion": "That is a file, is it not?"}, "bidi-control"),
    ({"prompt": "Whose is jane@mail.example?", "completion": "Hers, of course."}, "e-mail"),
    ({"prompt": "Ring (212) 555-0147 or not", "completion": "Nobody picked up the phone."}, "phone"),
    ({"prompt": "Pay with 4111 1111 1111 1111", "completion": "This card is out of date."}, "card"),
    ({"prompt": "Use sk-" + "a1B2" * 8, "completion": "That would be a mistake."}, "key"),
    (good(1), "duplicate"),
    ({**good(2), "completion": good(2)["completion"] + " Yes."}, "near-duplicate"),
]


def test_a_file_with_one_of_every_fault_shows_every_one_at_its_line(tmp_path):
    sound = [good(number) for number in range(1, 6)]
    path = write(tmp_path, *sound, *(row for row, _ in ONE_OF_EVERY_FAULT))
    outputs = {name: tmp_path / f"{name}.jsonl" for name in ("html", "json_out", "ledger", "fix")}
    report = examined(path, **{name: str(out) for name, out in outputs.items()})
    assert report.status == UNREADABLE
    for line, (_, rule) in enumerate(ONE_OF_EVERY_FAULT, start=len(sound) + 1):
        lines = [place.partition(": ")[0].split(":")[1] for place in places(report, rule)]
        assert str(line) in lines, rule
    page = outputs["html"].read_text()
    for rule in {rule for _, rule in ONE_OF_EVERY_FAULT}:
        assert f"<code>{rule}</code>" in page
    for secret in ("jane@mail", "555-0147", "4111 1111", "a1B2a1B2"):
        assert secret not in page + outputs["json_out"].read_text() + outputs["ledger"].read_text()
    states = [line.split("\t")[1] for line in outputs["ledger"].read_text().splitlines()]
    assert [states.count(state) for state in ("kept", "cut", "dropped")] == [
        count for _, count in report.states
    ]
    mended = examined(outputs["fix"])
    assert mended.status == OK
    left = {finding.rule for finding in mended.findings}
    assert left == {
        *("special-token", "replacement-character", "bidi-control", "near-duplicate"),
        *("e-mail", "phone", "card", "key"),
    }

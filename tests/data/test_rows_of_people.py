"""Files as people have them: each kind in every format that can carry it, as a run and a check see it."""

from __future__ import annotations

import csv
import datetime
import json

import pytest

from rankfold.data.check.doctor import CheckRequest, check
from rankfold.data.shapes.convert import refuse_untrainable
from rankfold.data.shapes.sources import read_examples, sources_of
from rankfold.errors import DataError

DAY = datetime.date(2024, 5, 1)


def write(path, rows):
    """``rows`` (dictionaries with the same keys) in the format that the name of ``path`` tells."""
    kind, columns = path.suffix, list(rows[0])
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows, default=str, indent=1))
    elif kind in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",")
            writer.writerows([columns, *([row[c] for c in columns] for row in rows)])
    elif kind == ".xlsx":
        import openpyxl

        book = openpyxl.Workbook()
        for row in [columns, *([row[c] for c in columns] for row in rows)]:
            book.active.append(row)
        book.save(path)
    else:
        import pyarrow as pa
        import pyarrow.feather
        import pyarrow.parquet

        table = pa.Table.from_pylist(rows)
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            pyarrow.feather.write_feather(table, path, compression="uncompressed")
    return path


def checked(path, **options):
    return check(CheckRequest.of({"data": str(path), **options}))


def rules_of(report):
    return {finding.rule: finding.rows for finding in report.findings}


def answers(path, **options):
    return [example.answer for example in read_examples(sources_of(path, **options)).examples]


TYPED = (".jsonl", ".json", ".xlsx", ".parquet", ".arrow")
FORMATS = (*TYPED, ".csv", ".tsv")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("value", "shown"), [(7, "7"), (2.5, "2.5"), (True, "true"), (DAY, "2024-05-01")], ids=str
)
def test_an_answer_that_is_no_text_is_the_text_that_is_shown(tmp_path, kind, value, shown):
    rows = [{"prompt": f"What is number {n} of them?", "completion": value} for n in range(3)]
    path = write(tmp_path / f"rows{kind}", rows)
    shown = {".xlsx": shown.upper(), ".csv": str(value), ".tsv": str(value)}.get(kind, shown)
    assert answers(path) == [shown] * 3
    report = checked(path)
    assert report.status == 0
    is_typed = kind in TYPED and not (kind in (".json", ".jsonl") and value == DAY)
    assert rules_of(report).get("not-text", 0) == (3 if is_typed else 0)
    assert any("completion" in note for note in read_examples(sources_of(path)).notes) == is_typed


def test_a_number_stays_as_it_was_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "The price?", "completion": 0.10}\n{"prompt": "And?", "completion": 1e3}\n')
    assert answers(path) == ["0.10", "1e3"]


def test_numbers_inside_turns_are_text_too(tmp_path):
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": 4}]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert answers(path) == ["4"]
    [finding] = [found for found in checked(path).findings if found.rule == "not-text"]
    assert "messages[1].content" in finding.examples[0][1]


@pytest.mark.parametrize(
    ("value", "number_format", "shown"),
    [
        (0.5, "0%", "50%"),
        (0.1234, "0.0%", "12.3%"),
        (1234567.891, "#,##0.00", "1,234,567.89"),
        (3.0, "0.00", "3.00"),
        (12.5, '"€"#,##0.00', "€12.50"),
        (-4, '0" °C"', "-4 °C"),
        (0.1 + 0.2, "General", "0.3"),
        (7, "0000", "7"),  # not one of the usual ones: in full
        (datetime.datetime(2024, 5, 1, 9, 5), "d/m/yy hh:mm", "1/5/24 09:05"),
        (datetime.datetime(2024, 5, 1, 21, 5), "h:mm AM/PM", "9:05 PM"),
        (datetime.datetime(2024, 5, 1), "mm-dd-yy", "2024-05-01"),
        (datetime.time(9, 5, 7), "hh:mm:ss", "09:05:07"),
    ],
    ids=str,
)
def test_a_cell_is_what_the_sheet_shows(tmp_path, value, number_format, shown):
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["question", "answer"])
    book.active.append(["How much?", value])
    book.active["B2"].number_format = number_format
    book.save(tmp_path / "rows.xlsx")
    assert answers(tmp_path / "rows.xlsx") == [shown]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("Query", "Answer"),
        ("QUESTION", "RESPONSE"),
        ("User Query", "Model Response"),
        ("input", "output"),
        ("Frage", "Antwort"),
        ("问题", "回答"),
        ("質問", "応答"),
        ("Pregunta", "Respuesta"),
        ("Вопрос", "Ответ"),
        ("Instruction", "Output"),
    ],
)
def test_columns_are_found_however_they_are_called(tmp_path, kind, asked, answered):
    rows = [{asked: f"question {n} of some", answered: f"answer {n}"} for n in range(2)]
    path = write(tmp_path / f"rows{kind}", rows)
    assert answers(path) == ["answer 0", "answer 1"]
    assert checked(path).status == 0


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".arrow"])
def test_squad_is_a_question_about_a_text(tmp_path, kind):
    row = {
        "id": "1",
        "title": "Notre Dame",
        "context": "The statue is copper.",
        "question": "What is it made of?",
        "answers": {"text": ["copper", "of copper"], "answer_start": [14, 11]},
    }
    path = write(tmp_path / f"rows{kind}", [row])
    [example] = read_examples(sources_of(path)).examples
    assert example.messages[0].text == "The statue is copper.\n\nWhat is it made of?"
    assert example.answer == "copper"
    write(path, [row | {"answers": {"text": [], "answer_start": []}}]) if kind == ".jsonl" else None
    assert kind != ".jsonl" or "no answer" in checked(path).findings[0].examples[0][1]


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-16-le"])
def test_unicode_of_any_width_is_read(tmp_path, kind, encoding):
    rows = [{"prompt": f"Was heißt {n} 你好?", "completion": "grüß dich"} for n in range(3)]
    plain = write(tmp_path / f"plain{'.tsv' if kind == '.txt' else kind}", rows)
    path = tmp_path / f"rows{kind}"
    path.write_bytes(plain.read_text(encoding="utf-8").encode(encoding))
    if kind == ".txt" and encoding in ("utf-8-sig", "utf-32"):
        return  # Excel's Unicode text is UTF-16
    assert answers(path) == ["grüß dich"] * 3
    assert rules_of(checked(path)).get("encoding", 0) == (0 if encoding == "utf-8-sig" else 3)


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        ("cp1252", "Grüße aus Köln, “sagt” er – für 5 €"),
        ("cp1251", "Привет, как дела? Сегодня хорошая погода и мы идём гулять"),
        ("gb18030", "你好，今天天气很好，我们去公园散步吧。机器学习是什么？"),
        ("cp932", "こんにちは、今日は天気がいいですね。散歩に行きましょう。"),
    ],
)
def test_an_older_encoding_is_told_by_the_bytes_and_said(tmp_path, kind, encoding, word):
    rows = [{"prompt": f"plain {n}", "completion": f"{word} {n}"} for n in range(6)]
    path = tmp_path / f"rows{kind}"
    if kind == ".csv":
        path.write_bytes(write(tmp_path / "plain.csv", rows).read_text(encoding="utf-8").encode(encoding))
    else:
        path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode(encoding))
    assert answers(path) == [row["completion"] for row in rows]
    [finding] = [found for found in checked(path).findings if found.rule == "encoding"]
    assert finding.rows == 6
    assert encoding in finding.examples[0][1]
    assert answers(path, encoding=encoding) == [row["completion"] for row in rows]
    assert "encoding" not in rules_of(checked(path, encoding=encoding))


def test_an_encoding_that_is_not_the_files_is_told_with_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "plain"}\n{"text": "größer"}\n'.encode("cp1252"))
    with pytest.raises(DataError, match=r"rows.jsonl:2: not ascii"):
        answers(path, encoding="ascii")
    with pytest.raises(DataError, match=r"no encoding 'cp125' \(did you mean"):
        answers(path, encoding="cp125")


def test_a_damaged_byte_of_a_utf_8_file_is_no_other_encoding(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "Grüße?", "completion": "你好"}\n'.encode()
    path.write_bytes(good + b'{"prompt": "x", "completion": "\xff"}\n' + good)
    report = checked(path)
    assert rules_of(report)["unreadable"] == 1
    assert "encoding" not in rules_of(report)


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_nan_is_null(tmp_path, kind):
    rows = [{"prompt": "What?", "completion": "This.", "score": float("nan"), "input": float("nan")}]
    path = write(tmp_path / f"rows{kind}", rows)
    assert answers(path) == ["This."]
    assert rules_of(checked(path))["nan"] == 1
    write(path, [{"prompt": "What?", "completion": float("nan")}])
    assert rules_of(checked(path)).keys() >= {"nan", "null-content"}


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_nan_of_a_table_is_null_where_it_is_read(tmp_path, kind):
    path = write(
        tmp_path / f"rows{kind}", [{"prompt": "What?", "completion": x} for x in (1.5, float("nan"))]
    )
    report = checked(path)
    assert report.kept == 1
    assert rules_of(report)["null-content"] == 1


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize(
    "beside",
    [
        {"videos": ["a.mp4"]},
        {"audios": ["a.wav"]},
        {"Audio_Path": "a.wav"},
        {"weight": 0.5},
        {"label": "joke"},
        {"tool_calls": "search"},
        {"rejected_answer": "No."},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_what_would_change_the_meaning_stops_unless_it_is_left_out(tmp_path, kind, beside):
    path = write(tmp_path / f"rows{kind}", [{"prompt": "Why?", "completion": "So."} | beside])
    [name] = beside
    with pytest.raises(DataError, match=f"--leave-out {name}"):
        answers(path)
    report = checked(path)
    assert report.status == 1
    assert rules_of(report)["not-used"] == 1
    assert answers(path, leave_out=[name]) == ["So."]
    assert checked(path, leave_out=name.lower()).status == 0
    empty = write(tmp_path / "empty.jsonl", [{"prompt": "Why?", "completion": "So.", name: None}])
    assert checked(empty).status == 0


def test_a_mark_of_media_without_media_is_told(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", [{"prompt": "<video>Why?", "completion": "So.", "videos": ["a.mp4"]}]
    )
    assert rules_of(checked(path, leave_out="videos"))["media-mark"] == 1


def test_keys_of_turns_that_are_not_used_are_told_and_media_among_them_stop(tmp_path):
    turns = [{"role": "user", "content": "q", "mood": "good"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert any("messages[].mood" in note for note in checked(path).notes)
    turns[0]["audio"] = {"id": "x"}
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert checked(path).status == 1
    assert answers(path, leave_out=["audio"]) == ["a"]


def part(kind, value):
    return {"type": kind, "value": value}


def test_llama_factory_s_parts_are_words_thoughts_and_calls(tmp_path):
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    turns = [
        {"role": "user", "content": [part("text", "1 + 1?")], "loss_weight": 0.0},
        {"role": "assistant", "content": [part("reasoning", "A sum."), part("tool_call", call)]},
        {"role": "tool", "content": [part("text", "2")]},
        {"role": "assistant", "content": [part("text", "2.")], "loss_weight": 1.0},
    ]
    [example] = read_examples(sources_of(write(tmp_path / "r.jsonl", [{"messages": turns}]))).examples
    assert example.messages[1].reasoning == "A sum."
    assert example.messages[1].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert [message.train for message in example.messages] == [False, None, None, True]
    assert example.answer == "2."


@pytest.mark.parametrize("key", ["weight", "loss", "loss_weight"])
@pytest.mark.parametrize("value", [0.5, "0.5", 3])
def test_a_turn_s_weight_is_what_its_loss_counts(tmp_path, key, value):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: value}]
    path = write(tmp_path / "r.jsonl", [{"messages": turns}])
    [example] = read_examples(sources_of(path)).examples
    assert (example.messages[1].train, example.messages[1].weight) == (True, float(value))
    report = checked(path)
    assert (report.status, rules_of(report)["loss-weight"]) == (0, 1)


@pytest.mark.parametrize(("flag", "trained"), [(True, True), (False, False)])
def test_a_turn_with_a_flag_and_a_weight_has_both(tmp_path, flag, trained):
    turn = {"role": "assistant", "content": "a", "train": flag, "weight": 0.5}
    asked, last = {"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}
    path = write(tmp_path / "r.jsonl", [{"messages": [asked, turn, asked, last]}])
    [example] = read_examples(sources_of(path)).examples
    assert (example.messages[1].train, example.messages[1].weight) == (trained, 0.5)


def test_an_answer_that_is_json_stays_text_whatever_is_left_out(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"prompt": "List it.", "completion": '[{"a": 1}]', "videos": ["a"]}])
    assert answers(path, leave_out=["videos"]) == ['[{"a": 1}]']


@pytest.mark.parametrize("value", [-1, "half", float("inf"), [1]])
def test_a_weight_that_is_no_number_of_at_least_nought_is_refused(tmp_path, value):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": value}]
    assert checked(write(tmp_path / "r.jsonl", [{"messages": turns}])).status == 1


@pytest.mark.parametrize("names", [("chosen_messages", "rejected_messages"), ("chosen", "rejected")])
def test_pairs_are_pairs_however_their_columns_are_called(tmp_path, names):
    asked = {"role": "user", "content": [part("text", "q")], "loss_weight": 0.0}
    ends = [{"role": "assistant", "content": [part("text", text)]} for text in ("good", "bad")]
    row = {name: [asked, end] for name, end in zip(names, ends, strict=True)}
    [example] = read_examples(sources_of(write(tmp_path / "r.jsonl", [row]))).examples
    assert (example.kind, example.answer, example.rejected[0].text) == ("preference", "good", "bad")
    with pytest.raises(DataError, match="preference pairs"):
        refuse_untrainable([example])


def test_a_messages_row_with_a_rejected_response_is_a_pair(tmp_path):
    """ms-swift's; without its name the rejected answer would be lost."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "r.jsonl", [{"messages": turns, "rejected_response": "b"}])
    assert checked(path).status == 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_list_of_turns_in_the_place_of_an_object_is_a_conversation(tmp_path, whole):
    talks = [
        [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]
        for n in range(3)
    ]
    path = tmp_path / ("rows.json" if whole else "rows.jsonl")
    lines = [json.dumps(talk) for talk in talks]
    path.write_text(f"[{','.join(lines)}]" if whole else "\n".join(lines))
    assert answers(path) == ["answer 0", "answer 1", "answer 2"]
    one = tmp_path / "one.jsonl"
    one.write_text(lines[0])
    assert answers(one) == ["answer 0"]


def test_an_array_of_turns_is_told_apart_from_an_array_of_rows(tmp_path):
    path = tmp_path / "one.json"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps(turns, indent=1))
    with pytest.raises(DataError, match="one turn, not a conversation"):
        answers(path)


def test_xtuner_s_pretrain_turns_are_running_text(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"messages": [{"role": "pretrain", "content": "Some words."}]}])
    mixture = read_examples(sources_of(path))
    assert (mixture.examples[0].text, mixture.prompt_style) == ("Some words.", "plain")


def test_xtuner_s_images_stand_where_their_marks_are(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    content = [
        {"type": "image_url", "image_url": {"url": "a.png", "image_wh": [3, 4]}},
        {"type": "text", "text": "Look: <IMG_CONTEXT>\nWhat is it?"},
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    [example] = read_examples(sources_of(write(tmp_path / "r.jsonl", [{"messages": turns}]))).examples
    before, image, after = example.messages[0].parts
    assert (before, image.path.name, after) == ("Look: ", "a.png", "\nWhat is it?")


def test_parts_that_nothing_reads_are_named_and_can_be_left_out(tmp_path):
    content = [{"type": "video_url", "video_url": {"url": "a.mp4"}}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    path = write(tmp_path / "r.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match="--leave-out video_url"):
        answers(path)
    assert answers(path, leave_out=["video_url"]) == ["A cat."]
    table = tmp_path / "r.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(turns)]])
    with pytest.raises(DataError, match="--leave-out video_url"):
        answers(table)
    assert answers(table, leave_out=["video_url"]) == ["A cat."]


def test_rows_for_a_reward_are_told_as_what_they_are(tmp_path):
    row = {"prompt": [{"role": "user", "content": "2 + 2?"}], "reward_model": {"ground_truth": "4"}}
    path = write(tmp_path / "r.jsonl", [row])
    with pytest.raises(DataError, match="verl"):
        answers(path)
    assert answers(path, shape="prompt=prompt,completion=reward_model.ground_truth") == ["4"]


ORDERS = {
    "assistant first": ["assistant", "user", "assistant"],
    "system in the middle": ["user", "assistant", "system", "user", "assistant"],
    "two questions": ["user", "user", "assistant"],
    "two answers": ["user", "assistant", "assistant"],
    "a result without a call": ["user", "assistant", "tool", "assistant"],
}


@pytest.mark.parametrize("roles", ORDERS.values(), ids=ORDERS)
def test_the_order_of_turns_is_for_the_template_to_judge(tmp_path, roles):
    turns = [{"role": role, "content": f"words {n}"} for n, role in enumerate(roles)]
    path = write(tmp_path / "r.jsonl", [{"messages": turns}])
    report = checked(path)
    assert report.status == 0
    assert rules_of(report)["role-order"] == 1
    assert answers(path) == [f"words {len(roles) - 1}"]


@pytest.mark.parametrize("kind", FORMATS)
def test_mended_rows_are_plain_rows_of_text(tmp_path, kind):
    rows = [{"Query": f"How many are there of {n}?", "Answer": n} for n in (3, 4)]
    path = write(tmp_path / f"rows{kind}", rows)
    fixed = tmp_path / "fixed.jsonl"
    checked(path, fix=str(fixed))
    assert answers(fixed) == ["3", "4"]
    assert "not-text" not in rules_of(checked(fixed))

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.check.doctor import CheckRequest, check
from rankfold.data.reading.rows import Row, stream_rows
from rankfold.data.shapes.convert import convert
from rankfold.data.tokens.encode import encode_all
from rankfold.errors import ConfigError, DataError, OutputError


def examined(path, **options):
    return check(CheckRequest.of({"data": str(path), **options}))


PIECES = st.sampled_from(
    ["", " ", "one two three", "jane@mail.example", "<|im_end|>", "cafÃ©", "\ud800", "\x00", "你好"]
)
ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": PIECES, "completion": PIECES}),
        st.fixed_dictionaries({"text": PIECES}),
        st.fixed_dictionaries(
            {
                "messages": st.lists(
                    st.fixed_dictionaries(
                        {
                            "role": st.sampled_from(["user", "assistant", "system", "x"]),
                            "content": st.one_of(PIECES, st.none(), st.integers()),
                        }
                    ),
                    max_size=4,
                )
            }
        ),
        st.dictionaries(
            st.text(max_size=3), st.one_of(st.none(), st.integers(), st.text(max_size=5)), max_size=2
        ),
        st.just("no row"),
    ),
    min_size=1,
    max_size=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ROWS)
def test_every_row_is_kept_cut_or_dropped_and_training_keeps_the_same_ones(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = examined(path, ledger=str(tmp_path / "ledger.tsv"))
    assert report.kept + report.cut + report.dropped == report.rows == len(rows)
    lines = [line.split("\t") for line in (tmp_path / "ledger.tsv").read_text().splitlines()]
    assert [origin for origin, _, _ in lines] == [f"{path}:{line}" for line in range(1, len(rows) + 1)]
    readable = [row for row in stream_rows(path) if isinstance(row, Row)]
    trained = [example.origin for example in convert(readable).examples]
    assert [origin for origin, state, _ in lines if state == "kept"] == trained
    assert all(bool(reason) == (state != "kept") for _, state, reason in lines)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ROWS)
def test_mended_rows_can_be_trained_on_and_need_no_mending(tmp_path, rows):
    path, first, second = (tmp_path / f"{name}.jsonl" for name in ("rows", "first", "second"))
    for old in (first, second):
        old.unlink(missing_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()
    try:
        fixed = examined(path, fix=str(first)).fixed
    except DataError:  # nothing is left
        assert not first.exists()
        return
    assert path.read_bytes() == before
    assert fixed.rows + fixed.left_out == len(rows)
    assert fixed.rows == len(first.read_text().splitlines())
    assert not convert(list(stream_rows(first))).bad
    again = examined(first, fix=str(second)).fixed
    assert (again.rows, again.mended, again.left_out) == (fixed.rows, 0, 0)
    assert first.read_bytes() == second.read_bytes()


def questions(count: int) -> list[dict]:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def words(number: int) -> str:
        return " ".join("".join(draw.choices(letters, k=6)) for _ in range(number))

    return [{"prompt": words(5), "completion": words(draw.randint(1, 40))} for _ in range(count)]


def test_rows_over_the_chosen_length_are_those_that_training_leaves_out(
    tmp_path, write_rows, tiny_folder, real_base
):
    path = write_rows(questions(200))
    ledger = tmp_path / "ledger.tsv"
    report = examined(path, model=str(tiny_folder), max_length=100, ledger=str(ledger))
    kept, left_out = encode_all(convert(list(stream_rows(path))).examples, real_base.tokenizer, 100)
    assert 0 < report.dropped == len(left_out) == report.lengths.over
    states = dict(line.split("\t")[:2] for line in ledger.read_text().splitlines())
    assert {origin for origin, state in states.items() if state == "kept"} == {row.origin for row in kept}
    assert report.status == 0


def test_the_chosen_length_is_the_99th_percentile_but_never_more_than_the_model_reads(
    write_rows, tiny_folder
):
    path = write_rows(questions(200))
    report = examined(path, model=str(tiny_folder))
    assert report.lengths.unit == "tokens"
    assert "99th percentile" in report.lengths.reason
    long = write_rows([*questions(20), {"prompt": "x", "completion": "word " * 3000}] * 3, "long.jsonl")
    report = examined(long, model=str(tiny_folder))
    assert report.lengths.cut == 512
    assert "longest input" in report.lengths.reason


def test_rows_are_not_left_out_for_their_length_in_characters(write_rows):
    report = examined(write_rows([*questions(150), {"prompt": "x", "completion": "word " * 3000}]))
    assert (report.kept, report.lengths.unit, report.lengths.over) == (151, "characters", 1)


def test_the_mask_is_shown_with_personal_data_masked(write_rows, tiny_folder):
    path = write_rows([{"prompt": "Whose is it?", "completion": "It is jane@mail.example's, I think."}])
    report = examined(path, model=str(tiny_folder), show=1)
    pieces = report.proof.shown[0].pieces
    assert [text for text, trained in pieces if trained] == ["It is [e-mail]'s, I think.<|im_end|>"]
    assert "Whose is it?" in "".join(text for text, trained in pieces if not trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"show": 2}, "name the model"),
        ({"max_length": 100}, "name the model"),
        ({"skip_bad": "1.5"}, "skip_bad: .*less than or equal to 1"),
        ({"skip_bad": "nan"}, "skip_bad: .*finite"),
        ({"shwo": 2}, "did you mean 'show'"),
    ],
)
def test_a_mistaken_request_is_refused(write_rows, options, message):
    with pytest.raises(ConfigError, match=message):
        examined(write_rows(questions(3)), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fix": "rows.jsonl"}, "is, or lies in, the data to check"),
        ({"html": "rows.jsonl"}, "is, or lies in, the data to check"),
        ({"fix": "link.jsonl"}, "is, or lies in, the data to check"),
        ({"fix": "old.jsonl"}, "exists; name a new file"),
        ({"fix": "new.csv"}, "does not end in .jsonl"),
        ({"html": "nowhere/page.html"}, "is no folder"),
        ({"html": "."}, "name (another )?file|is a folder"),
        ({"html": "same", "json_out": "same"}, "named for two outputs"),
    ],
)
def test_no_output_overwrites_what_it_must_not(tmp_path, write_rows, options, message):
    path = write_rows(questions(3))
    before = path.read_bytes()
    (tmp_path / "link.jsonl").hardlink_to(path)
    (tmp_path / "old.jsonl").write_text("old")
    names = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(OutputError, match=message):
        examined(path, **{name: str(tmp_path / place) for name, place in options.items()})
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names


def test_an_output_inside_a_folder_of_data_is_refused(tmp_path, write_rows):
    write_rows(questions(3))
    with pytest.raises(OutputError, match="lies in, the data"):
        examined(tmp_path, fix=str(tmp_path / "fixed.jsonl"))


def test_text_beside_messages_would_stop_a_run(write_rows):
    report = examined(write_rows([{"text": "words"}, *questions(2)]))
    assert report.status == 1
    assert "running text" in report.verdict
    assert "split" in report.verdict


def test_broken_held_out_rows_would_stop_a_run(write_rows):
    held_out = write_rows([{"prompt": "a", "completion": ""}], "held-out.jsonl")
    report = examined(write_rows(questions(3)), held_out=str(held_out))
    assert report.status == 1
    assert "held-out.jsonl:1" in report.verdict


def test_the_report_for_programs_is_the_report(tmp_path, write_rows):
    rows = [*questions(5), {"prompt": "a", "completion": ""}, {"text": "spam spam spam", "label": "spam"}]
    out = tmp_path / "report.json"
    report = examined(write_rows(rows), json_out=str(out))
    told = json.loads(out.read_text())
    assert told == json.loads(json.dumps(report.as_json()))
    assert told["kept"] + told["cut"] + told["dropped"] == told["rows"] == 7
    assert told["labels"] == {"spam": 1}
    assert {finding["rule"] for finding in told["findings"]} >= {"empty-turn"}


def test_who_waits_hears_how_many_rows_were_seen(write_rows, monkeypatch):
    monkeypatch.setattr("rankfold.data.check.examination.PROGRESS_ROWS", 10)
    heard = []
    check(CheckRequest.of({"data": str(write_rows(questions(25)))}), heard.append)
    assert heard == [10, 20]


def test_what_a_supervised_run_refuses_would_stop_it(write_rows, tmp_path):
    pairs = [{"prompt": "Which one?", "chosen": "This one.", "rejected": "That one."}]
    report = examined(write_rows(pairs))
    assert report.status == 1
    assert "preference pairs" in report.verdict
    assert examined(write_rows(pairs), shape="chosen").status == 0
    (tmp_path / "cat.png").write_bytes(b"")
    report = examined(
        write_rows([{"prompt": "<image> What?", "completion": "A cat.", "images": ["cat.png"]}])
    )
    assert (report.status, report.kept) == (1, 1)
    assert "pictures" in report.verdict


def test_every_row_of_several_sources_is_looked_at_once_and_each_source_counts_by_itself(write_rows):
    sound, broken = (
        write_rows(questions(30), "a.jsonl"),
        write_rows([{"text": ""}, {"text": "x y"}], "b.jsonl"),
    )
    report = examined(f"{sound}:3,{broken}", skip_bad=0.2)
    assert (report.rows, report.kept, report.status) == (32, 31, 1)
    assert f"1 of 2 rows of {broken} cannot be used" in report.verdict
    assert any("whatever the weight" in note for note in report.notes)

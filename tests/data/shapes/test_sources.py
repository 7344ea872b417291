from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.data.shapes.sources import Source, read_examples, sources_of, weighted
from rankfold.errors import DataError


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "a"}}\n' for n in range(10)))
    (tmp_path / "b.csv").write_text("task,reply\n" + "".join(f"t{n},r\n" for n in range(4)))
    (tmp_path / "c.txt").write_text("words")
    return tmp_path


def asked(mixture) -> list[str]:
    return [example.messages[0].text for example in mixture.examples]


@given(st.integers(0, 40), st.floats(0.01, 4), st.integers(0, 3))
def test_a_weight_says_how_often_each_example_counts(count, weight, seed):
    drawn = Counter(weighted(range(count), weight, f"{seed}/0"))
    assert sum(drawn.values()) == int(weight) * count + round((weight - int(weight)) * count)
    assert all(int(weight) <= drawn[place] <= int(weight) + 1 for place in range(count))


def test_the_draw_depends_on_the_seed_alone(files):
    sources = [Source(files / "a.jsonl", 0.5)]
    draws = [asked(read_examples(sources, seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 5


def test_sources_are_mixed_in_their_order_and_described(files):
    shape = "prompt=task,completion=reply"
    mixture = read_examples([Source(files / "a.jsonl", 2), Source(files / "b.csv", shape=shape)])
    assert asked(mixture) == [f"q{n}" for n in range(10)] * 2 + [f"t{n}" for n in range(4)]
    assert mixture.prompt_style == "chat"
    assert mixture.description == (
        f"{files}/a.jsonl: 10 rows of prompt-completion (columns question, answer), 2 times: 20 examples; "
        f"{files}/b.csv: 4 rows of prompt-completion (as given)"
    )


def test_sources_are_named_in_one_line_with_weights():
    assert sources_of("a.jsonl:2, b.parquet:.5,org/name:test,org/name:main:test:3") == [
        Source("a.jsonl", 2),
        Source("b.parquet", 0.5),
        Source("org/name:test"),
        Source("org/name:main:test", 3),
    ]


def test_a_path_that_exists_is_one_source_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b:2", "c:3"):
        (tmp_path / name).write_text("")
    assert sources_of("a,b:2", "text") == [Source("a,b:2", shape="text")]
    assert sources_of("c:3,d:4") == [Source("c:3"), Source("d", 4)]


def test_a_source_of_its_own_shape_keeps_it():
    sources = sources_of([Source("a", shape="text"), Source("b", 2)], "alpaca")
    assert sources == [Source("a", shape="text"), Source("b", 2, "alpaca")]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_means_nothing_is_refused(weight):
    with pytest.raises(DataError, match="the weight of a must be a number above 0"):
        Source("a", weight)


def test_an_empty_name_is_refused():
    with pytest.raises(DataError, match="a source without a name in 'a,,b'"):
        sources_of("a,,b")


def test_text_and_messages_are_not_mixed(files):
    with pytest.raises(DataError, match=r"c\.txt holds running text and .*a\.jsonl messages"):
        read_examples(sources_of(f"{files}/a.jsonl,{files}/c.txt"))


def test_a_weight_that_leaves_nothing_is_an_error(files):
    with pytest.raises(DataError, match=r"the weight 0\.01 leaves none of the rows"):
        read_examples([Source(files / "a.jsonl", 0.01)])


BAD_ROWS = [{"prompt": "q", "completion": ""}, {"prompt": {}, "completion": "a"}, {"x": 1, "y": 2}]


def test_bad_rows_of_every_kind_are_allowed_up_to_the_share_and_told(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [{"prompt": f"q{number}", "completion": "a"} for number in range(16)]
    path.write_text("\n".join([*map(json.dumps, [*good, *BAD_ROWS]), "nonsense"]))
    mixture = read_examples([Source(path)], skip_bad=0.2)
    assert len(mixture.examples) == 16
    assert sorted(row.origin for row in mixture.bad) == [f"{path}:{n}" for n in (17, 18, 19)] + [
        f"{path}:20:1"
    ]
    with pytest.raises(DataError, match=r"4 of the rows in .* cannot be used, more than 10 % of 20:"):
        read_examples([Source(path)], skip_bad=0.1)
    with pytest.raises(
        DataError, match=r"4 of the rows(.|\n)*:20:1(.|\n)*:17: message 2(.|\n)*:18(.|\n)*:19"
    ):
        read_examples([Source(path)])


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_rows_are_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="holds no rows"):
        read_examples([Source(tmp_path / "a.jsonl")])


def test_only_bad_rows_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="every row of .* is bad"):
        read_examples([Source(tmp_path / "a.jsonl")], skip_bad=1.0)


def test_no_source_is_an_error():
    with pytest.raises(DataError, match="no source of data was named"):
        read_examples([])


def test_a_source_is_called_by_its_file_or_by_its_whole_hub_name(files):
    assert [source.name for source in sources_of(f"{files}/a.jsonl:2,{files},org/name:test")] == [
        "a.jsonl",
        files.name,
        "org/name:test",
    ]

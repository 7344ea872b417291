from __future__ import annotations

import gzip
import json

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.reading.arrow_rows import arrow_rows, parquet_rows, saved_dataset_rows
from rankfold.errors import DataError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tables = st.lists(
    st.fixed_dictionaries(
        {"text": text, "n": st.none() | st.integers(-(2**62), 2**62), "tags": st.lists(text)}
    ),
    min_size=1,
    max_size=5,
)
SCHEMA = pyarrow.schema(
    {"text": pyarrow.string(), "n": pyarrow.int64(), "tags": pyarrow.list_(pyarrow.string())}
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables, st.sampled_from(["", ".gz", ".zst"]))
def test_any_parquet_file_is_read_back(tmp_path, rows, suffix):
    plain = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), plain, row_group_size=2)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"b.parquet{suffix}"
    path.write_bytes(pack(plain.read_bytes()))
    found = list(parquet_rows(path, "f"))
    assert [row.values for row in found] == rows
    assert [row.origin for row in found] == [f"f:{number}" for number in range(1, len(rows) + 1)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables, st.sampled_from([pyarrow.ipc.new_file, pyarrow.ipc.new_stream]))
def test_any_arrow_file_is_read_back(tmp_path, rows, writer):
    with writer(tmp_path / "a.arrow", SCHEMA) as file:
        file.write_table(pyarrow.Table.from_pylist(rows, SCHEMA), max_chunksize=2)
    assert [row.values for row in arrow_rows(tmp_path / "a.arrow", "f")] == rows


def test_what_pandas_writes_is_read_back(tmp_path):
    frame = pandas.DataFrame({"question": ["a", "b"], "answer": ["c", None]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert [row.values["answer"] for row in parquet_rows(tmp_path / "a.parquet", "f")] == ["c", None]


def test_keys_that_arrow_filled_with_null_are_gone(tmp_path):
    call = {"function": {"name": "add", "arguments": "{}"}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    assert next(parquet_rows(tmp_path / "a.parquet", "f")).values == {"messages": messages}


@pytest.fixture
def labelled() -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)


def test_class_numbers_become_the_names_that_datasets_kept(tmp_path, labelled):
    labelled.to_parquet(tmp_path / "a.parquet")
    found = [row.values for row in parquet_rows(tmp_path / "a.parquet", "f")]
    assert found == [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]


def test_a_saved_dataset_is_read_back_over_all_its_files(tmp_path, labelled):
    labelled.save_to_disk(tmp_path / "saved", num_shards=2)
    rows = list(saved_dataset_rows(tmp_path / "saved", ""))
    assert [row.values["label"] for row in rows] == ["good", "bad"]
    assert [row.origin.rpartition("/")[2] for row in rows] == [
        "data-00000-of-00002.arrow:1",
        "data-00001-of-00002.arrow:1",
    ]


def test_a_split_is_chosen_by_name_and_train_by_default(tmp_path, labelled):
    two = datasets.DatasetDict({"train": labelled.select([0]), "dev": labelled.select([1])})
    two.save_to_disk(tmp_path / "two")
    assert [row.values["text"] for row in saved_dataset_rows(tmp_path / "two", "")] == ["a"]
    assert [row.values["text"] for row in saved_dataset_rows(tmp_path / "two", "dev")] == ["b"]
    with pytest.raises(DataError, match=r"has no split 'test'; name one of:(.|\n)*two:train(.|\n)*two:dev"):
        saved_dataset_rows(tmp_path / "two", "test")


def test_without_train_the_only_split_is_read_and_several_are_listed(tmp_path, labelled):
    datasets.DatasetDict({"dev": labelled}).save_to_disk(tmp_path / "one")
    assert len(list(saved_dataset_rows(tmp_path / "one", ""))) == 2
    datasets.DatasetDict({"dev": labelled, "test": labelled}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="has several splits; name one of"):
        saved_dataset_rows(tmp_path / "two", "")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd"])
def test_a_description_cannot_lead_out_of_its_folder(tmp_path, labelled, name):
    labelled.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="names a file outside its folder"):
        saved_dataset_rows(tmp_path / "saved", "")


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}'])
def test_a_damaged_description_is_an_error(tmp_path, labelled, state):
    labelled.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"state\.json|cannot read .*/3"):
        saved_dataset_rows(tmp_path / "saved", "")


@pytest.mark.parametrize("reader", [parquet_rows, arrow_rows])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_a_damaged_file_is_an_error(tmp_path, reader, damage):
    table = pyarrow.Table.from_pylist([{"text": "x" * 100}] * 50)
    path = tmp_path / "a.data"
    if reader is parquet_rows:
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-8] ^= 0xFF  # the length of the footer
    path.write_bytes({"empty": b"", "text": b"hello", "cut": content[:-40]}.get(damage, content))
    with pytest.raises(DataError, match="f: damaged, or not what its name says"):
        list(reader(path, "f"))

"""``datasets`` reads a folder called organisation/name as it reads the hub; no test needs the network."""

from __future__ import annotations

import json
from contextlib import chdir

import pytest

from rankfold.data.reading.hub_rows import hub_rows
from rankfold.errors import DataError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        rows = [json.dumps({"question": f"{split} {number}", "answer": "a"}) for number in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    with chdir(tmp_path):
        yield


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("name", "split", "count"), [("org/name", "train", 3), ("org/name:test", "test", 2)])
def test_a_data_set_is_read_by_name_with_its_rows_counted(name, split, count):
    rows = list(hub_rows(name))
    assert [row.origin for row in rows] == [f"org/name:{split}:{number}" for number in range(1, count + 1)]
    assert rows[1].values == {"question": f"{split} 1", "answer": "a"}


@pytest.mark.usefixtures("hub")
def test_a_configuration_is_named_before_the_split():
    assert len(list(hub_rows("org/name:default:test"))) == 2


@pytest.mark.usefixtures("hub")
def test_a_split_that_is_not_there_is_an_error_that_lists_the_others():
    with pytest.raises(DataError, match=r"has no split 'dev'; name one of:(.|\n)*org/name:train"):
        hub_rows("org/name:dev")


@pytest.mark.usefixtures("hub")
def test_a_data_set_that_the_hub_does_not_give_is_named():
    with pytest.raises(DataError, match="cannot load the data set 'no/such'"):
        hub_rows("no/such")


@pytest.mark.usefixtures("hub")
def test_rows_that_datasets_cannot_read_are_an_error(tmp_path):
    (tmp_path / "org" / "name" / "train.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(DataError, match="cannot load the data set 'org/name'"):
        list(hub_rows("org/name"))

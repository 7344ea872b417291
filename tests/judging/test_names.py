from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.errors import ConfigError
from rankfold.judging.names import short_names

PARTS = st.lists(st.sampled_from(["a", "b", "runs"]), min_size=1, max_size=3).map(
    lambda own: "/" + "/".join(own)
)


def test_names_are_as_short_as_they_can_be_and_alike_for_alike_paths():
    assert short_names(["runs/jokes", "runs/sums"]) == ["jokes", "sums"]
    assert short_names(["low/jokes", "high/jokes", "sums"]) == ["low/jokes", "high/jokes", "sums"]


def test_a_name_that_is_taken_is_not_given():
    assert short_names(["/runs/base"], ["base"]) == ["runs/base"]
    assert short_names(["/base"], ["base"]) == ["/base"]


def test_a_path_named_twice_is_refused_however_it_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="jokes is named twice"):
        short_names(["sums", Path("jokes"), tmp_path / "jokes"])


@given(st.lists(PARTS, min_size=1, max_size=8, unique=True))
def test_every_path_has_a_name_of_its_own_that_it_ends_in(paths):
    names = short_names(paths)
    assert len({*names}) == len(paths)
    assert all(path.endswith(name) for path, name in zip(paths, names, strict=True))

"""The rows of a run that was made before."""

from __future__ import annotations

from rankfold.data.shapes.sources import read_examples, sources_of
from rankfold.train.asked.run_rows import told_of_leaks
from rankfold.train.keeping.names import RECIPE_NAME


def test_rows_that_a_run_was_all_trained_on_are_judged_and_it_is_told(tmp_path, write_rows, joke_rows):
    data = write_rows(joke_rows[:12])
    (tmp_path / RECIPE_NAME).write_text(
        f"data: {data}\nheld_out: {write_rows(joke_rows[12:20], 'other.jsonl')}\n"
    )
    examples = read_examples(sources_of(str(data))).examples
    (told,) = told_of_leaks(tmp_path, examples[:5])
    assert told.startswith("5 of the 5 rows are among those that")

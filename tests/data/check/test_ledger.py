from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rankfold.data.check.ledger import EXAMPLES, SHOWN_CHARS, Ledger


def test_a_row_is_kept_until_something_happens_to_it():
    ledger = Ledger()
    rows = [ledger.open(f"a.jsonl:{line}") for line in (1, 2, 5)]
    ledger.note(rows[0], "e-mail", "x")
    ledger.cut(rows[1], "over-length", "long")
    ledger.drop(rows[2], "unreadable", "bad", stops=True)
    assert ledger.counts() == {"kept": 1, "cut": 1, "dropped": 1}
    assert ledger.reasons() == {("cut", "over-length"): 1, ("dropped", "unreadable"): 1}
    assert list(ledger.lines()) == [
        "a.jsonl:1\tkept\t",
        "a.jsonl:2\tcut\tover-length",
        "a.jsonl:5\tdropped\tunreadable",
    ]


def test_the_first_reason_to_drop_counts_and_outranks_a_cut():
    ledger = Ledger()
    row = ledger.open("a:1")
    ledger.cut(row, "over-length", "")
    ledger.drop(row, "role-order", "", stops=True)
    ledger.drop(row, "in-held-out", "", stops=False)
    ledger.cut(row, "over-length", "")
    assert (ledger.state(row), ledger.reason(row)) == ("dropped", "role-order")
    assert ledger.reasons() == {("dropped", "role-order"): 1}
    assert ledger.reasons(1) == ledger.reasons(0, 0) == {}


OPERATIONS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from(["note", "cut", "drop"]), st.sampled_from(["a", "b", "c"])),
    max_size=40,
)


@given(OPERATIONS)
def test_kept_and_cut_and_dropped_are_all_rows(operations):
    ledger = Ledger()
    for line in range(10):
        ledger.open(f"f:{line}")
    worst = dict.fromkeys(range(10), 0)
    for row, what, rule in operations:
        if what == "drop":
            ledger.drop(row, rule, "", stops=False)
        else:
            getattr(ledger, what)(row, rule, "")
        worst[row] = max(worst[row], ("note", "cut", "drop").index(what))
    counts = ledger.counts()
    assert sum(counts.values()) == len(ledger) == 10
    assert [counts[state] for state in ("kept", "cut", "dropped")] == [
        list(worst.values()).count(place) for place in range(3)
    ]
    assert sum(ledger.reasons().values()) == counts["cut"] + counts["dropped"]


@given(st.lists(st.text(max_size=12), max_size=20))
def test_every_origin_comes_back_as_it_was(origins):
    ledger = Ledger()
    rows = [ledger.open(origin) for origin in origins]
    assert [ledger.origin(row) for row in rows] == origins


def test_origins_of_many_files_come_back():
    ledger = Ledger()
    origins = [f"folder/{file}.jsonl:{line}" for file in range(20) for line in (1, 7, 123456789)]
    origins += ["x.jsonl:3:14", "no number", "leading:007", "big:12345678901234567890"]
    rows = [ledger.open(origin) for origin in origins]
    assert [ledger.origin(row) for row in rows] == origins


def test_examples_are_bounded_in_number_and_length_and_made_only_when_shown():
    ledger = Ledger()
    made = []

    def shown() -> str:
        made.append(1)
        return "x" * 10_000

    for line in range(100):
        row = ledger.open(f"f:{line}")
        ledger.note(row, "e-mail", shown)
        ledger.note(row, "e-mail", shown)
    finding = ledger.findings["e-mail"]
    assert (finding.rows, finding.times, len(made)) == (100, 200, EXAMPLES)
    assert finding.examples[0] == ("f:0", "x" * SHOWN_CHARS + "...")

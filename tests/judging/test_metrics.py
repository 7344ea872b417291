from __future__ import annotations

import math
import random

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from rankfold.judging.metrics import EvalRow, Judged, metric_of

LABELS = ("cold", "warm", "hot")
NOTHING = torch.zeros(0)


def judged(answers=(), chosen=(), losses=NOTHING, tokens=NOTHING, text_bytes=NOTHING):
    return Judged(
        losses=losses, tokens=tokens, text_bytes=text_bytes, answers=list(answers), chosen=list(chosen)
    )


def value_of(name, rows, found):
    metric = metric_of(name, LABELS)
    return float(metric.value(metric.terms(rows, found).sum(0)))


@pytest.mark.parametrize("prefix", ["", "choice"])
def test_labels_are_counted_as_sklearn_counts_them(prefix):
    draw = random.Random(0)
    wanted = [draw.choice(LABELS) for _ in range(60)]
    said = [draw.choice((*LABELS, "none of them")) for _ in range(60)]
    rows = [EvalRow(origin=str(n), wanted=label) for n, label in enumerate(wanted)]
    found = judged(said, said)
    accuracy, macro = ("choice", "choice_macro_f1") if prefix else ("accuracy", "macro_f1")
    assert value_of(accuracy, rows, found) == pytest.approx(accuracy_score(wanted, said))
    theirs = f1_score(wanted, said, labels=LABELS, average="macro")
    assert value_of(macro, rows, found) == pytest.approx(theirs)


def test_a_label_that_does_not_occur_counts_for_nothing():
    rows = [EvalRow(origin="1", wanted="cold"), EvalRow(origin="2", wanted="warm")]
    assert value_of("macro_f1", rows, judged(["cold", "warm"])) == 1
    assert value_of("macro_f1", rows, judged(["cold", "hot"])) == pytest.approx(1 / 3)


def test_losses_are_means_over_tokens_and_bytes():
    rows = [EvalRow(origin="1", wanted=""), EvalRow(origin="2", wanted="")]
    found = judged(
        losses=torch.tensor([6.0, 2.0]), tokens=torch.tensor([2.0, 6.0]), text_bytes=torch.tensor([9.0, 7.0])
    )
    assert value_of("loss", rows, found) == 1
    assert value_of("perplexity", rows, found) == pytest.approx(math.e)
    assert value_of("bits_per_byte", rows, found) == pytest.approx(8 / math.log(2) / 16)
    assert metric_of("loss").scores(rows, found).tolist() == [3, pytest.approx(1 / 3)]

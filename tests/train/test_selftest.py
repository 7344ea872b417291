from __future__ import annotations

import importlib.util

import pytest
import torch

from rankfold.data.order import batching
from rankfold.data.tokens.encode import IGNORE
from rankfold.kernels.forms import KERNELS
from rankfold.train.selftest import Check, in_one_process, self_test
from rankfold.train.selftest_kernels import ROUNDING, kernels_apart
from rankfold.train.step import loop


def test_every_promise_is_kept_here():
    checks = self_test()
    assert len(checks) == 9 + (len(KERNELS) if importlib.util.find_spec("numba") else 0)
    assert all(check.kept for check in checks), [check for check in checks if not check.kept]


def test_a_kernel_that_computes_something_else_is_noticed(monkeypatch):
    numba_forms = pytest.importorskip(
        "rankfold.kernels.numba_forms", reason="the extra named fast is missing"
    )
    plain = numba_forms.gated_gradient
    monkeypatch.setattr(numba_forms, "gated_gradient", lambda *t: plain(*t)[::-1])
    wrong = [what for what, apart in kernels_apart().items() if apart > ROUNDING]
    assert [what.split()[0] for what in wrong] == ["gated_gradient"]


def test_without_numba_there_is_no_kernel_to_try(monkeypatch):
    monkeypatch.setattr("rankfold.train.selftest_kernels.use_numba", lambda *_: "not installed")
    assert kernels_apart() == {}


def test_nothing_of_the_random_state_is_used_up():
    torch.manual_seed(3)
    wanted = torch.rand(5)
    torch.manual_seed(3)
    in_one_process()
    assert torch.equal(torch.rand(5), wanted)


def broken(checks: list[Check]) -> list[str]:
    return [check.promise for check in checks if not check.kept]


def test_packed_rows_that_see_each_other_are_noticed(monkeypatch):
    apart = batching.Packed.collate

    def joined(self, rows, pad, device):
        batch = apart(self, rows, pad, device)
        batch.inputs["position_ids"] = torch.arange(batch.inputs["input_ids"].shape[1])[None]
        return batch

    monkeypatch.setattr(batching.Packed, "collate", joined)
    assert any("packed" in promise for promise in broken(in_one_process()))


def test_micro_batches_that_do_not_weigh_by_tokens_are_noticed(monkeypatch):
    """The usual mistake: the mean of the micro-batches' means."""
    plain = loop.Trainer.micro_batch

    def by_rows(self, rows, weight=1):
        tokens = sum(label != IGNORE for row in rows for label in row.labels)
        return plain(self, rows, weight / tokens)

    monkeypatch.setattr(loop.Trainer, "micro_batch", by_rows)
    assert any("micro-batches" in promise for promise in broken(in_one_process()))


@pytest.mark.parametrize("forgotten", ["optimiser", "step"])
def test_a_resume_that_forgets_something_is_noticed(monkeypatch, forgotten):
    plain = loop.Trainer.restore

    def restore(self, checkpoint):
        plain(self, checkpoint)
        if forgotten == "step":
            self.step_done = 0
        else:
            self.optimiser.state.clear()

    monkeypatch.setattr(loop.Trainer, "restore", restore)
    assert broken(in_one_process()) == ["interrupted and resumed = uninterrupted"]

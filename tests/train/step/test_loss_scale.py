from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from rankfold.errors import TrainingError
from rankfold.models.base.precision import Precision
from rankfold.train.step.loss_scale import FIRST, GROW_AFTER, LEAST, LossScale
from train.step.test_loop import make_model, make_rows, make_trainer, trained


def test_formats_with_a_wide_range_need_no_scale():
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale(dtype)
        assert scale.scale == 1
        assert not scale.lower()


def test_it_halves_after_an_overflow_down_to_a_limit_and_doubles_after_many_steps_without():
    scale = LossScale(torch.float16)
    assert scale.lower()
    assert scale.scale == FIRST / 2
    for _ in range(GROW_AFTER):
        scale.held()
    assert scale.scale == FIRST
    while scale.lower():
        pass
    assert scale.scale == LEAST


def test_the_state_comes_back():
    scale, other = LossScale(torch.float16), LossScale(torch.float16)
    scale.lower()
    scale.held()
    other.restore(scale.state())
    assert (other.scale, other.steps_since) == (FIRST / 2, 1)


@dataclass
class Overflowing:
    """An objective whose gradient is infinite while the loss is scaled by more than ``limit``."""

    limit: float

    def sum(self, model, batch):
        total = sum(p.sum() for p in model.parameters() if p.requires_grad)
        total.register_hook(lambda grad: torch.where(grad > self.limit, torch.inf, grad))
        return total, 1.0


def test_a_step_that_overflows_is_done_again_at_half_the_scale_and_comes_out_the_same():
    results = []
    for precision, limit in (("float16", FIRST / 4), ("float32", 1e9)):
        model = make_model()
        trainer = make_trainer(model, objective=Overflowing(limit), precision=Precision.of(precision))
        record = trainer.step(1, make_rows(2))
        results.append((record.gradient_norm, trained(model)))
        assert trainer.loss_scale.scale == (FIRST / 4 if precision == "float16" else 1)
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], tensor) for name, tensor in results[1][1].items())


def test_an_overflow_that_no_scale_mends_stops_the_run():
    model = make_model()
    before = trained(model)
    trainer = make_trainer(model, objective=Overflowing(0.0), precision=Precision.of("float16"))
    with pytest.raises(TrainingError, match="gradient norm"):
        trainer.step(1, make_rows(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in trained(model).items())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_gradients_of_float32(name):
    norms = []
    for precision in (Precision.of("float32"), Precision.of(name)):
        model = make_model()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(precision.storage)
        trainer = make_trainer(model, precision=precision)
        loss = trainer.mean_gradients(make_rows(3))
        norms.append((loss, torch.cat([p.grad.flatten() for p in trainer.trained.values()])))
        assert all(p.grad.dtype == torch.float32 for p in trainer.trained.values())
    assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-2)
    assert torch.nn.functional.cosine_similarity(norms[0][1], norms[1][1], dim=0) > 0.99

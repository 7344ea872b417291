"""What must hold on a card as it does on a CPU, where it is run if there is no card."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, Recipe, fine_tune, get_peft_model, resume
from rankfold.data.order.batching import Packed, Padded
from rankfold.data.order.pack import choose_batching
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.kernels.cross_entropy import linear_cross_entropy
from rankfold.kernels.fused_linear import fused_linear
from rankfold.kernels.rms_norm import rms_norm
from rankfold.models.base.precision import default_device
from rankfold.train.keeping.listener import Listener
from rankfold.train.step.loop import Method, Trainer
from rankfold.train.step.objectives import Supervised
from rankfold.train.step.pace import Pace

pytestmark = pytest.mark.gpu
DEVICE = default_device()
FORMATS = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # how far apart, as a share of the largest number


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_near(found: torch.Tensor, wanted: torch.Tensor, share: float) -> None:
    apart = (found.double().cpu() - wanted.double().cpu()).abs().max()
    assert apart <= share * wanted.double().abs().max().cpu()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_layer_and_its_update_are_those_of_separate_operations_in_float64(dtype):
    x, weight, a, b = (
        random(*shape, dtype=dtype, seed=n) for n, shape in enumerate([(70, 64), (48, 64), (4, 64), (48, 4)])
    )
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    found = fused_linear(x, (weight, None), (a, b), 2.0)
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in leaves]
    wanted = wide[0] @ weight.double().cpu().T + 2.0 * wide[0] @ wide[1].T @ wide[2].T
    upstream = random(*found.shape, seed=9)
    gradients = torch.autograd.grad(found, leaves, upstream.to(dtype))
    expected = torch.autograd.grad(wanted, wide, upstream.double().cpu())
    for got, exact in zip((found, *gradients), (wanted, *expected), strict=True):
        assert_near(got.detach(), exact.detach(), FORMATS[dtype])


@pytest.mark.parametrize("dtype", FORMATS)
def test_losses_behind_a_frozen_head_are_torchs(dtype):
    hidden, head = random(37, 32, dtype=dtype).requires_grad_(), random(90, 32, dtype=dtype, seed=1)
    targets = torch.arange(37, device=DEVICE)
    found = linear_cross_entropy(hidden, head, targets, chunk_tokens=10)
    wanted = F.cross_entropy((hidden.double() @ head.double().T), targets, reduction="none")
    [ours] = torch.autograd.grad(found.sum(), hidden)
    [theirs] = torch.autograd.grad(wanted.sum(), hidden)
    assert_near(found.detach(), wanted.detach(), FORMATS[dtype])
    assert_near(ours, theirs, FORMATS[dtype])


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_norm_is_torchs(dtype):
    x, weight = random(33, 64, dtype=dtype).requires_grad_(), random(64, dtype=dtype, seed=1)
    found, wanted = rms_norm(x, weight, 1e-5), F.rms_norm(x.double(), (64,), weight.double(), 1e-5)
    upstream = random(33, 64, dtype=dtype, seed=2)
    [ours] = torch.autograd.grad(found, x, upstream)
    [theirs] = torch.autograd.grad(wanted, x, upstream.double())
    assert_near(found.detach(), wanted.detach(), FORMATS[dtype])
    assert_near(ours, theirs, FORMATS[dtype])


def adapted() -> torch.nn.Module:
    base = tiny_llama().to(DEVICE)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomise(model)
    return model.train()


def rows(count: int = 6) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for place in range(count):
        ids = torch.randint(5, 49000, (9 + 7 * place,), generator=generator).tolist()
        made.append(EncodedRow(f"r:{place}", ids, [IGNORE] * 4 + ids[4:]))
    return made


def test_packed_rows_have_the_gradients_of_padded_ones():
    found = []
    for way in (Packed(), Padded()):
        model = adapted()
        if way.kind == "packed":
            chosen = choose_batching(model.get_base_model(), rows(), 3, 0)
            assert not chosen.reason.startswith("the model lets packed rows see each other")
        loss, weight = Supervised().sum(model, way.collate(rows(), 0, DEVICE))
        (loss / weight).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[1].items():
        assert_near(found[0][name], gradient, 1e-3)


@pytest.mark.parametrize("batching", [Packed(), Padded()])
def test_a_micro_batch_does_not_wait_for_the_card(batching):
    """What a forward and backward need is sent ahead, and nothing is read back until the step ends."""
    if not torch.cuda.is_available():
        pytest.skip("there is no card to wait for")
    trainer = Trainer(adapted(), 0, Pace(1), Method(rates=lambda _: 1e-3, batching=batching))
    trainer.micro_batch(rows())  # tries the head once
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.micro_batch(rows())
    finally:
        torch.cuda.set_sync_debug_mode("default")


class StopAfter(Listener):
    def on_step(self, record):
        if record.step == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_stops_goes_on_to_the_same_bits(tiny_folder, write_rows, joke_rows, tmp_path):
    data = write_rows(joke_rows)

    def recipe(name: str) -> Recipe:
        settings = {"model": str(tiny_folder), "data": data, "out": tmp_path / name, "max_steps": 4}
        return Recipe.of(
            settings | {"samples": 0, "save_every_steps": 1, "learning_rate": 1e-2, "dropout": 0.1}
        )

    whole = fine_tune(recipe("whole"))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(recipe("cut"), StopAfter())
    resume(tmp_path / "cut")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert whole.steps[-1].loss < whole.steps[0].loss

"""``self_test``: what rankfold promises of its arithmetic, tried on this installation in a few seconds.

A small Llama with random weights and a random adapter stands for the user's model, so nothing is fetched."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rankfold.data.order.batches import MicroBatch
from rankfold.data.order.batching import Batching, Packed, Padded
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.errors import TrainingError
from rankfold.lora import LoraConfig, TaskType
from rankfold.peft_surface import PeftModel, get_peft_model
from rankfold.processes import Processes
from rankfold.train.keeping.checkpoints import read_checkpoint, save_checkpoint
from rankfold.train.selftest_kernels import ROUNDING as KERNEL_ROUNDING
from rankfold.train.selftest_kernels import kernels_apart
from rankfold.train.step.loop import Method, Trainer
from rankfold.train.step.pace import Pace

ROWS = 8
VOCABULARY = 512
STEP = "a step's gradient"
WAIT_S = 300
ROUNDING = 2e-5  # of the largest number compared: float32 sums in another order


@dataclass(frozen=True)
class Check:
    """One promise: the largest difference found, as a share of the largest number compared, and what may
    be.  ``allowed`` 0 means: the same bits."""

    promise: str
    difference: float
    allowed: float

    @property
    def kept(self) -> bool:
        return self.difference <= self.allowed


def self_test() -> list[Check]:
    """Every promise that can be tried without a model or a network."""
    kernels = [Check(what, apart, KERNEL_ROUNDING) for what, apart in kernels_apart().items()]
    return [*kernels, *in_one_process(), *in_two_processes()]


def in_one_process() -> list[Check]:
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        return [*_one_step_however_cut(), _resumed(place), *_merged(), _saved_and_loaded(place)]


def in_two_processes() -> list[Check]:
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        return _one_step_in_two_processes(Path(folder))


def _one_step_however_cut() -> list[Check]:
    """Every trained token weighs the same, whichever forward it is in."""
    whole = gradients(small_model(), random_rows(), _Cut(rows=ROWS))
    cuts: dict[str, Batching] = {
        "2 micro-batches of 4 rows": _Cut(rows=4),
        "8 micro-batches of 1 row": _Cut(rows=1),
        "packed": Packed(),
    }
    return [
        Check(
            f"{STEP}: {name} = 1 of 8 rows, padded",
            _apart(gradients(small_model(), random_rows(), cut), whole),
            ROUNDING,
        )
        for name, cut in cuts.items()
    ]


def _one_step_in_two_processes(folder: Path) -> list[Check]:
    """By torchrun on this machine's processor, as a run in several processes is started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "rankfold.train.selftest_worker", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    if done.returncode:
        raise TrainingError(f"two processes could not work together here: {done.stderr.strip()[-500:]}")
    alone = gradients(small_model(), random_rows(), Padded())
    bases = {"whole": "each with the whole base", "shared": "half of the base each (FSDP2)"}
    return [
        Check(f"{STEP}: 2 processes, {text} = 1 process", _apart(_in_file(folder / name), alone), ROUNDING)
        for name, text in bases.items()
    ]


def _in_file(path: Path) -> list[Tensor]:
    return [tensor for _, tensor in sorted(load_file(path).items())]


def gradients(
    model: PeftModel, rows: list[EncodedRow], batching: Batching, processes: Processes | None = None
) -> list[Tensor]:
    """Of the mean loss over the trained tokens of ``rows``, in the order of the trained parameters."""
    trainer = Trainer(model, 0, Pace(1), Method(rates=lambda _: 0.0, batching=batching), processes)
    trainer.mean_gradients(rows)
    return [p.grad for p in trainer.trained.values() if p.grad is not None]


@dataclass(frozen=True)
class _Cut(Padded):
    """Micro-batches of so many ``rows``."""

    rows: int = 1

    def cut(self, rows: Sequence[EncodedRow]) -> list[MicroBatch]:
        return [list(rows[place : place + self.rows]) for place in range(0, len(rows), self.rows)]


def _resumed(folder: Path) -> Check:
    """With dropout; the checkpoint goes through the disk and into a model that was trained otherwise."""
    steps = [random_rows(seed) for seed in range(4)]
    whole = _trainer()
    whole.run(steps, lambda _: None, lambda: False)
    first = _trainer()
    first.run(steps[:2], lambda _: None, lambda: False)
    saved = save_checkpoint(folder / "checkpoints", first.checkpoint(), keep=1)
    second = _trainer(seed=1)
    second.restore(read_checkpoint(saved))
    second.run(steps[2:], lambda _: None, lambda: False)
    apart = _apart(list(second.trained.values()), list(whole.trained.values()))
    return Check("interrupted and resumed = uninterrupted", apart, 0.0)


def _trainer(seed: int = 0) -> Trainer:
    return Trainer(small_model(seed, dropout=0.1), 0, Pace(4), Method(rates=lambda _: 1e-2))


def _merged() -> list[Check]:
    model, ids = small_model(), torch.tensor([random_rows()[-1].input_ids])
    weights = [weight.detach().clone() for weight in model.get_base_model().parameters()]
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        model.merge_adapter()
        together = model(input_ids=ids).logits
        model.unmerge_adapter()
    restored = _apart(list(model.get_base_model().parameters()), weights)
    return [
        Check("merged = not merged (logits)", _apart([together], [apart]), ROUNDING),
        Check("merged and unmerged = the base as it was", restored, 0.0),
    ]


def _saved_and_loaded(folder: Path) -> Check:
    model = small_model()
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(_base(), folder / "adapter")
    ids = torch.tensor([random_rows()[-1].input_ids])
    with torch.no_grad():
        apart = _apart([loaded(input_ids=ids).logits], [model(input_ids=ids).logits])
    return Check("saved and loaded = as it was (logits)", apart, 0.0)


def _apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference as a share of the largest number of ``wanted``, tensor by tensor."""
    with torch.no_grad():
        return max(
            float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
            for a, b in zip(found, wanted, strict=True)
        )


def _base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def small_model(seed: int = 0, dropout: float = 0.0) -> PeftModel:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(_base(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_rows(seed: int = 0) -> list[EncodedRow]:
    """Rows of different lengths, of which the first third is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in range(ROWS):
        ids = torch.randint(0, VOCABULARY, (9 + 3 * place,), generator=generator).tolist()
        prompt = len(ids) // 3
        rows.append(EncodedRow(f"row {place}", ids, [IGNORE] * prompt + ids[prompt:]))
    return rows

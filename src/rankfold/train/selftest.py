"""``self_test``: what rankfold promises of its arithmetic, tried on this installation in a few seconds.

A small Llama with random weights and a random adapter stands for the user's model, so nothing is fetched."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data.batches import MicroBatch
from rankfold.data.encode import IGNORE, EncodedRow
from rankfold.data.pack import Batching, blocks
from rankfold.lora import LoraConfig, PeftModel, TaskType, get_peft_model
from rankfold.train.checkpoints import read_checkpoint, save_checkpoint
from rankfold.train.loop import Trainer

ROWS = 8
VOCABULARY = 512
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
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        return [*_one_step_however_cut(), _resumed(Path(folder)), *_merged(), _saved_and_loaded(Path(folder))]


def _one_step_however_cut() -> list[Check]:
    """Every trained token weighs the same, whichever forward it is in."""
    rows = _rows()
    whole = _gradients([rows], Batching("padded"))
    cuts: dict[str, tuple[list[MicroBatch], Batching]] = {
        "2 micro-batches of 4 rows": ([rows[:4], rows[4:]], Batching("padded")),
        "8 micro-batches of 1 row": ([[row] for row in rows], Batching("padded")),
        "packed": (blocks(rows), Batching("packed")),
    }
    return [
        Check(f"a step's gradient: {name} = 1 of 8 rows, padded", _apart(_gradients(*cut), whole), ROUNDING)
        for name, cut in cuts.items()
    ]


def _gradients(micro_batches: list[MicroBatch], batching: Batching) -> list[Tensor]:
    trainer = Trainer(_model(), 0, lambda _: 0.0, 1, batching)
    trained_tokens = sum(row.trained_tokens for rows in micro_batches for row in rows)
    for rows in micro_batches:
        trainer.micro_batch(rows, trained_tokens)
    return [p.grad for p in trainer.trained.values() if p.grad is not None]


def _resumed(folder: Path) -> Check:
    """With dropout; the checkpoint goes through the disk and into a model that was trained otherwise."""
    steps = [_rows(seed) for seed in range(4)]
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
    model = _model(seed, dropout=0.1)
    torch.manual_seed(seed)
    return Trainer(model, 0, lambda _: 1e-2, 4)


def _merged() -> list[Check]:
    model, ids = _model(), torch.tensor([_rows()[-1].input_ids])
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
    model = _model()
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(_base(), folder / "adapter")
    ids = torch.tensor([_rows()[-1].input_ids])
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


def _model(seed: int = 0, dropout: float = 0.0) -> PeftModel:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(_base(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _rows(seed: int = 0) -> list[EncodedRow]:
    """Rows of different lengths, of which the first third is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in range(ROWS):
        ids = torch.randint(0, VOCABULARY, (9 + 3 * place,), generator=generator).tolist()
        prompt = len(ids) // 3
        rows.append(EncodedRow(f"row {place}", ids, [IGNORE] * prompt + ids[prompt:]))
    return rows

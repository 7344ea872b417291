from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from conftest import labelled, randomise, tiny_llama
from rankfold import LoraConfig, get_peft_model
from rankfold.data.order.batch import Batch
from rankfold.data.order.batching import Packed, Padded
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.judging.losses import token_losses
from rankfold.models.running.rows_apart import attend_rows_apart
from rankfold.train.step.objectives import Supervised
from tiny_models import tiny


def make_rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place, (length, prompt) in enumerate([(9, 4), (12, 3), (5, 4), (12, 11)]):
        ids = torch.randint(0, 49152, (length,), generator=generator).tolist()
        rows.append(EncodedRow(f"f:{place}", ids, [IGNORE] * prompt + ids[prompt:]))
    return rows


def row_sums(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of each row of ``batch``."""
    return torch.zeros(4).index_add(0, batch.targets.rows, token_losses(model, batch))


class WithoutColumns(torch.nn.Module):
    """A model whose forward cannot choose columns, as some architectures' cannot."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, use_cache):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("wrap", [lambda model: model, WithoutColumns])
def test_the_loss_of_a_batch_is_cross_entropy_row_by_row(wrap):
    model, rows = tiny_llama(), make_rows()
    sums = row_sums(wrap(model), Padded().collate(rows, 0, "cpu"))
    for row, got in zip(rows, sums, strict=True):
        logits = model(torch.tensor([row.input_ids])).logits[0]
        expected = F.cross_entropy(
            logits[:-1], torch.tensor(row.labels[1:]), ignore_index=IGNORE, reduction="sum"
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_the_plain_loss():
    rows = make_rows()
    ours, plain = tiny_llama(), tiny_llama()
    loss, weight = Supervised().sum(ours, Padded().collate(rows, 0, "cpu"))
    (loss / weight).backward()
    plain(**labelled(rows)).loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def few_rows() -> list[EncodedRow]:
    """For a vocabulary of 64."""

    def folded(ids: list[int]) -> list[int]:
        return [token if token == IGNORE else token % 60 + 3 for token in ids]

    return [EncodedRow(row.origin, folded(row.input_ids), folded(row.labels)) for row in make_rows()]


ADAPTERS = {
    "linears": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "head": LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"),
    "weight-decomposed head": LoraConfig(
        r=2, target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM"
    ),
    "copied head": LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "whole": None,
}


def adapted(architecture: str, config: LoraConfig | None) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny(architecture)
    if config is not None:
        model = get_peft_model(model, config)
        randomise(model)
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", ["Llama", "Gemma3Text", "Granite"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("packed", [False, True])
def test_the_sum_and_its_gradients_are_those_of_the_models_own_logits(
    architecture, adapter, smoothing, packed
):
    ours, plain = (adapted(architecture, ADAPTERS[adapter]) for _ in range(2))
    rows = few_rows()
    if packed:
        assert attend_rows_apart(ours) == ""
    batch = (Packed if packed else Padded)().collate(rows, 0, "cpu")
    loss, weight = Supervised(smoothing).sum(ours, batch)
    assert weight == sum(row.trained_tokens for row in rows)
    loss.backward()
    wanted = sum(
        F.cross_entropy(
            plain(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1],
            torch.tensor(row.labels[1:]),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=smoothing,
        )
        for row in rows
    )
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            apart = (found[name] - parameter.grad).abs().max()
            assert apart <= 1e-5 * parameter.grad.abs().max().clamp_min(1e-2), name


@pytest.mark.parametrize("wrap", [lambda model: model, WithoutColumns])
def test_label_smoothing_is_torchs_own(wrap):
    model, rows = tiny_llama(), make_rows()
    losses = token_losses(wrap(model), Padded().collate(rows, 0, "cpu"), 0.1)
    batch = labelled(rows)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=0.1,
    )
    torch.testing.assert_close(losses.sum(), wanted.sum())


def test_a_batch_without_a_trained_token_has_no_loss():
    model, row = tiny_llama(), EncodedRow("f:1", [5, 6, 7], [IGNORE] * 3)
    loss, weight = Supervised().sum(model, Padded().collate([row], 0, "cpu"))
    loss.backward()
    assert (float(loss.detach()), weight) == (0.0, 0.0)


def test_each_row_has_its_own_log_probability_to_prefer_by():
    """A preference loss weighs rows by what it makes of their sums: any weighting has the exact gradient."""
    ours, plain = tiny_llama(), tiny_llama()
    batch = Padded().collate(make_rows(), 0, "cpu")
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (row_sums(ours, batch) * weights).sum().backward()
    (row_sums(WithoutColumns(plain), batch) * weights).sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("way", [Packed, Padded])
def test_a_tokens_weight_is_what_its_loss_counts(way):
    """Beside a loss that knows no weights: of each row's tokens, one after another."""
    ours, plain = tiny_llama(), tiny_llama()
    if way is Packed:
        attend_rows_apart(ours)
    rows = [replace(row, weights=[place % 7 / 4 for place in range(len(row))]) for row in make_rows()]
    loss, weight = Supervised().sum(ours, way().collate(rows, 0, "cpu"))
    (loss / weight).backward()
    total, counted = torch.zeros(()), 0.0
    for row in rows:
        logits = plain(torch.tensor([row.input_ids])).logits[0]
        for place, (label, counts) in enumerate(zip(row.labels, row.weights, strict=True)):
            if place and label != IGNORE:
                total = total + counts * F.cross_entropy(logits[place - 1], torch.tensor(label))
                counted += counts
    (total / counted).backward()
    assert weight == pytest.approx(counted)
    assert weight == pytest.approx(sum(row.weight for row in rows))
    torch.testing.assert_close(loss / weight, total / counted)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)

from __future__ import annotations

import math

import pytest
import torch

from conftest import tiny_llama
from rankfold.data.order.batching import Packed, Padded
from rankfold.data.tokens.encode import EncodedRow
from rankfold.train.step.noise import Noisy, row_lengths

LENGTHS = (3, 7, 50)


def make_rows() -> list[EncodedRow]:
    return [EncodedRow(str(n), list(range(5, 5 + n)), list(range(5, 5 + n))) for n in LENGTHS]


def test_every_token_knows_the_length_of_its_row_padded_or_packed():
    padded = row_lengths(Padded().collate(make_rows(), 0, "cpu").inputs)
    assert padded.shape == (3, 50)
    assert padded[:, 0].tolist() == list(LENGTHS)
    packed = row_lengths(Packed().collate(make_rows(), 0, "cpu").inputs)
    assert packed.tolist() == [[n for n in LENGTHS for _ in range(n)]]


@pytest.mark.parametrize("pack", [False, True])
def test_the_noise_is_uniform_within_alpha_over_the_root_of_length_times_width(pack):
    """What reaches the first layer, against the embeddings themselves."""
    model, rows = tiny_llama(), make_rows()
    batch = (Packed if pack else Padded)().collate(rows, 0, "cpu")
    seen = []

    class Seeing:
        def sum(self, model, batch):
            seen.append(model.get_input_embeddings()(batch.inputs["input_ids"]))
            return seen[-1].sum(), 1.0

    Noisy(Seeing(), 5.0).sum(model, batch)
    noise = seen[0] - model.get_input_embeddings()(batch.inputs["input_ids"])
    reach = 5.0 / (row_lengths(batch.inputs) * 32).sqrt()
    share = noise.detach() / reach.unsqueeze(-1)
    assert share.abs().max() <= 1 + 1e-5
    long = share[row_lengths(batch.inputs) == 50]
    assert abs(long.mean()) < 5 / math.sqrt(3 * long.numel())
    assert long.var() == pytest.approx(1 / 3, rel=0.1)


def test_the_model_is_without_noise_afterwards_even_if_the_objective_fails():
    model, batch = tiny_llama(), Padded().collate(make_rows(), 0, "cpu")

    class Failing:
        def sum(self, model, batch):
            raise LookupError

    with pytest.raises(LookupError):
        Noisy(Failing(), 5.0).sum(model, batch)
    embed, ids = model.get_input_embeddings(), batch.inputs["input_ids"]
    assert torch.equal(embed(ids), embed.weight[ids])

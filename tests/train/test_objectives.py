from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from conftest import tiny_llama
from rankfold.data.batches import collate
from rankfold.data.encode import IGNORE, EncodedRow
from rankfold.train.objectives import token_losses


def make_rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place, (length, prompt) in enumerate([(9, 4), (12, 3), (5, 4), (12, 11)]):
        ids = torch.randint(0, 49152, (length,), generator=generator).tolist()
        rows.append(EncodedRow(f"f:{place}", ids, [IGNORE] * prompt + ids[prompt:]))
    return rows


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
    sums = token_losses(wrap(model), collate(rows, 0, "cpu")).sum(dim=1)
    for row, got in zip(rows, sums, strict=True):
        logits = model(torch.tensor([row.input_ids])).logits[0]
        expected = F.cross_entropy(
            logits[:-1], torch.tensor(row.labels[1:]), ignore_index=IGNORE, reduction="sum"
        )
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_the_plain_loss():
    rows = make_rows()
    ours, plain = tiny_llama(), tiny_llama()
    batch = collate(rows, 0, "cpu")
    trained = sum(row.trained_tokens for row in rows)
    (token_losses(ours, batch).sum() / trained).backward()
    plain(**batch).loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)

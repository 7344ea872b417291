from __future__ import annotations

import pytest
import torch

from rankfold.kernels.experts import add_expert_updates, expert_delta

EXPERTS, OUT, IN = 3, 5, 4


def updates(*ranks: int, dtype=torch.float64):
    torch.manual_seed(0)
    return [
        (torch.randn(EXPERTS * r, IN, dtype=dtype), torch.randn(OUT, r * EXPERTS, dtype=dtype), 0.5 + r)
        for r in ranks
    ]


def by_hand(lora_a, lora_b, scale):
    """PEFT 0.21.2, lora.ParamWrapper.get_delta_weight."""
    a, b = lora_a.reshape(EXPERTS, -1, IN), lora_b.reshape(OUT, -1, EXPERTS)
    return torch.einsum("o r e, e r i -> e o i", b, a) * scale


@pytest.mark.parametrize("ranks", [(2,), (1, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_updates_are_pefts_formula(ranks, transposed):
    given = updates(*ranks)
    wanted = sum(by_hand(*update) for update in given)
    wanted = wanted.mT if transposed else wanted
    weight = torch.randn(wanted.shape, dtype=torch.float64)
    torch.testing.assert_close(add_expert_updates(weight, given, transposed=transposed), weight + wanted)
    torch.testing.assert_close(expert_delta(given, weight.shape, transposed=transposed), wanted)


def test_a_matrix_is_a_single_expert():
    lora_a, lora_b = torch.randn(2, IN), torch.randn(OUT, 2)
    weight = torch.randn(OUT, IN)
    torch.testing.assert_close(
        add_expert_updates(weight, [(lora_a, lora_b, 3.0)]), weight + 3 * lora_b @ lora_a
    )
    torch.testing.assert_close(expert_delta([(lora_a, lora_b, 3.0)], weight.shape), 3 * lora_b @ lora_a)


def test_two_updates_in_half_precision_are_rounded_once():
    given = [(a.bfloat16(), b.bfloat16(), 1.0) for a, b, _ in updates(2, 2, dtype=torch.float32)]
    weight = torch.randn(EXPERTS, OUT, IN).bfloat16()
    exact = weight.double() + sum(by_hand(a.double(), b.double(), s) for a, b, s in given)
    got = add_expert_updates(weight, given)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.bfloat16())


def test_autocast_leaves_the_dtype_of_the_weight():
    weight = torch.randn(EXPERTS, OUT, IN)
    given = updates(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = add_expert_updates(weight, given)
    assert torch.equal(got, add_expert_updates(weight, given))


def test_shapes_can_be_worked_out_without_memory():
    weight = torch.empty(EXPERTS, OUT, IN, device="meta")
    given = [(a.to("meta"), b.to("meta"), s) for a, b, s in updates(2, dtype=torch.float32)]
    assert add_expert_updates(weight, given).shape == weight.shape

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankfold.kernels.grouped_low_rank import Groups, add_grouped_update, stacked

CPU = torch.device("cpu")


def one_by_one(out, x, factors, scales, index):
    """Row after row by dense products."""
    total = out.clone()
    for row, own in enumerate(index):
        if own >= 0:
            lora_a, lora_b = factors[own]
            total[row] += scales[own] * x[row] @ lora_a.T @ lora_b.T
    return total


@settings(deadline=None, max_examples=60)
@given(
    index=st.lists(st.integers(-1, 3), min_size=1, max_size=9).filter(lambda found: max(found) >= 0),
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    positions=st.lists(st.integers(1, 7), max_size=2),
    seed=st.integers(0, 1000),
)
@example(index=[-1, 1, 2, 3], ranks=[2] * 4, positions=[], seed=0)  # which looks sorted, filled with row 0
def test_each_row_gets_its_own_adapters_update(index, ranks, positions, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    factors = [(draw(rank, 6).requires_grad_(), draw(4, rank).requires_grad_()) for rank in ranks]
    scales = [0.5, 1.0, -2.0, 3.0]
    x, out = draw(len(index), *positions, 6).requires_grad_(), draw(len(index), *positions, 4)
    found = add_grouped_update(out, x, stacked(factors, scales), Groups.of(index, len(ranks), CPU))
    wanted = one_by_one(out, x, factors, scales, index)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    leaves = [x, *(factor for pair in factors for factor in pair)]
    weight = draw(*found.shape)
    got = torch.autograd.grad((found * weight).sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad((wanted * weight).sum(), leaves, allow_unused=True)
    for own, other, leaf in zip(got, expected, leaves, strict=True):
        reached = torch.zeros_like(leaf) if other is None else other
        torch.testing.assert_close(own, reached, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 40])
def test_rows_that_stand_together_are_not_copied(positions):
    factors = [(torch.randn(2, 6), torch.randn(4, 2)) for _ in range(3)]
    x, out, index = torch.randn(6, positions, 6), torch.randn(6, positions, 4), [0, 0, 1, 1, 2, 2]
    groups = Groups.of(index, 3, CPU)
    assert groups.rows is None
    found = add_grouped_update(out, x, stacked(factors, [1.0, 2.0, 3.0]), groups)
    torch.testing.assert_close(found, one_by_one(out, x, factors, [1.0, 2.0, 3.0], index))


@pytest.mark.parametrize("positions", [1, 40], ids=["rows brought together", "factors copied"])
def test_the_sum_has_the_dtype_of_the_output(positions):
    factors = [(torch.randn(2, 6), torch.randn(4, 2)) for _ in range(2)]
    x, out = torch.randn(3, positions, 6).bfloat16(), torch.randn(3, positions, 4).bfloat16()
    found = add_grouped_update(out, x, stacked(factors, [1.0, 1.0]), Groups.of([1, -1, 0], 2, CPU))
    wanted = one_by_one(out.float(), x.float(), factors, [1.0, 1.0], [1, -1, 0])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
    assert torch.equal(found[1], out[1])

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold.spectrum.explain import demonstrate
from rankfold.spectrum.plot import plot_singular_values


@pytest.mark.parametrize("seed", range(5))
def test_what_is_shown_is_true_of_the_weight_that_is_shown(seed):
    shown = demonstrate(seed)
    assert shown.weight.shape == (10, 10)
    assert shown.rank == torch.linalg.matrix_rank(shown.weight.double(), tol=1e-5).item() == 2
    assert (shown.weight.numel(), shown.factors.parameters) == (100, 40)
    torch.testing.assert_close(shown.factors.B @ shown.factors.A, shown.weight, rtol=1e-4, atol=1e-5)
    assert shown.output_error < 1e-5
    assert shown.starts_as_base
    assert shown.merged_error < 1e-4
    assert shown.merged_type == nn.Linear.__name__


def test_the_demonstration_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    demonstrate()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_picture_is_of_the_kind_that_its_name_says(tmp_path, name, start):
    plot_singular_values(demonstrate().values, 2, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)

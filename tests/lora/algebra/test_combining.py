"""Updates as one, in the basis that they share, beside PEFT's functions and a basis made by NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.utils.merge_utils import magnitude_prune, ties

from rankfold.lora.algebra.combining import Combining

WEIGHTS = [0.8, 0.5, -0.3]


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    ranks = (2, 3, 1)
    return [(torch.randn(12, r, generator=generator), torch.randn(r, 9, generator=generator)) for r in ranks]


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_the_cores_are_combined_as_peft_combines_tensors(pairs, method):
    left = np.linalg.svd(np.concatenate([b.numpy() for b, _ in pairs], 1).astype(np.float64))[0][:, :6]
    right = np.linalg.svd(np.concatenate([a.numpy().T for _, a in pairs], 1).astype(np.float64))[0][:, :6]
    left, right = torch.from_numpy(left), torch.from_numpy(right)
    cores = [left.T @ b.double() @ a.double() @ right for b, a in pairs]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = {
        "linear": lambda: sum(w * core for w, core in zip(weights, cores, strict=True)),
        "ties": lambda: ties(cores, weights, 0.4),
        "magnitude_prune": lambda: magnitude_prune(cores, weights, 0.4),
    }[method]()
    u, s, v = Combining(method, 0.4).of_products(pairs, WEIGHTS)
    torch.testing.assert_close(u @ s.diag() @ v.T, left @ expected @ right.T)

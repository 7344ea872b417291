"""How much stays of products in half precision of many widths."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import psutil, torch
from rankfold.models.base.precision import choose_precision
choose_precision("bfloat16", torch.device("cpu"))
weights = [torch.ones(*shape, dtype=torch.bfloat16) for shape in ((512, 512), (1024, 512), (16, 512))]
before = psutil.Process().memory_info().rss
for width in range(200, 840, 4):
    for weight in weights:
        torch.nn.functional.linear(torch.ones(width, 512, dtype=torch.bfloat16), weight)
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


def grown(**environment: str) -> float:
    """Megabytes that a process has more after 480 different products."""
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | environment,
        capture_output=True,
        check=True,
        text=True,
    )
    return float(child.stdout)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no programs are made on this processor"
)
def test_products_of_many_widths_leave_little_unless_the_environment_asks_for_more() -> None:
    many = grown(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024")
    assert grown() < 0.6 * many

"""The state of every random generator that a training step draws from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankfold.errors import CheckpointError


def random_states() -> dict[str, Tensor]:
    """``cpu`` and ``cuda:0``, ``cuda:1`` ... as the bytes PyTorch gives."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{place}": state for place, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Go on drawing from ``states``; raises CheckpointError if they are of other devices."""
    here = set(random_states())
    if set(states) != here:
        raise CheckpointError(f"the random states are of {sorted(states)}, this process uses {sorted(here)}")
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name != "cpu":
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda:")))

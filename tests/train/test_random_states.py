from __future__ import annotations

import pytest
import torch

from rankfold.errors import CheckpointError
from rankfold.train.random_states import random_states, set_random_states


def test_what_is_drawn_after_setting_a_state_is_what_was_drawn_after_taking_it():
    torch.rand(3)
    states = {name: state.clone() for name, state in random_states().items()}
    first = torch.rand(1000)
    set_random_states(states)
    assert torch.equal(torch.rand(1000), first)


def test_states_of_another_set_of_devices_are_refused():
    with pytest.raises(CheckpointError, match=r"\['cpu', 'cuda:9'\]"):
        set_random_states(random_states() | {"cuda:9": torch.zeros(8, dtype=torch.uint8)})

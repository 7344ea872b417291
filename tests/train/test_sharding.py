"""What is asked of a run before its base is cut among processes."""

from __future__ import annotations

import pytest

from rankfold.errors import ConfigError
from rankfold.processes import Processes
from rankfold.train.sharding import require_several


def test_bitsandbytes_layers_are_not_cut():
    with pytest.raises(
        ConfigError, match=r"cannot cut bitsandbytes' layers \(stored: nf4\); take q4_0 or int8"
    ):
        require_several(Processes(), "nf4")


def test_one_process_has_nobody_to_share_with():
    with pytest.raises(ConfigError, match="needs several processes"):
        require_several(Processes(), "q4_0")

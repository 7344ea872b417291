"""The processes of a run: one, or several that ``torchrun`` or ``accelerate launch`` started.

Every process works out the same plan from the same recipe.  Each trains on its share of a step's rows, and
the gradients of the adapter, which is small, are summed in one go; so every process holds the same adapter
at every step.  The frozen base is held whole by each, or cut among them (FSDP2).  Only the first process
writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from rankfold.errors import ConfigError, RankfoldError
from rankfold.models.base.precision import Precision, choose_precision, default_device
from rankfold.models.choices import PrecisionName

T = TypeVar("T")


class Processes:
    """``count`` processes, of which this is number ``index``; on ``device`` their tensors meet."""

    def __init__(self, count: int = 1, index: int = 0, device: str | torch.device = "cpu") -> None:
        self.count, self.index, self.device = count, index, torch.device(device)

    @classmethod
    def join(cls, environment: Mapping[str, str] = os.environ) -> Processes:
        """Meet the other processes of the ``environment`` (WORLD_SIZE, RANK, MASTER_ADDR ...), on the backend
        that Accelerate chooses: nccl on GPUs, gloo on CPUs.  Raises ConfigError for DeepSpeed."""
        if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise ConfigError(
                "DeepSpeed is not supported; launch without it, and cut the frozen base among the processes "
                "with shard_base=true"
            )
        wanted = int(environment.get("WORLD_SIZE", "1"))
        if wanted == 1:
            return cls()
        from accelerate.state import PartialState

        on_cpu = environment.get("ACCELERATE_USE_CPU") == "true" or not torch.accelerator.is_available()
        state: Any = PartialState(cpu=on_cpu)
        if state.num_processes != wanted:
            raise ConfigError(f"WORLD_SIZE is {wanted}, but {state.num_processes} process(es) met")
        return cls(state.num_processes, state.process_index, state.device)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits in each."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def highest(self, number: int) -> int:
        if self.count == 1:
            return number
        highest = torch.tensor(number, device=self.device)
        distributed.all_reduce(highest, op=distributed.ReduceOp.MAX)
        return int(highest)

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, which must be JSON."""
        if self.count == 1:
            return [value]
        content = bytearray(json.dumps(value).encode())
        longest = self.highest(len(content))
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)
        mine = mine.to(self.device)
        every = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(every, mine)
        return [json.loads(bytes(part.tolist()).rstrip(b"\0")) for part in every]

    def together(self, action: Callable[[], T]) -> T:
        """What ``action`` gives in this process, once it has succeeded in all of them.

        Where it raises a RankfoldError in some, all raise, so that none waits for one that has gone."""
        result, problem = None, None
        try:
            result = action()
        except RankfoldError as error:
            if self.count == 1:
                raise
            problem = error
        told = self.gather(None if problem is None else str(problem))
        if problem is not None:
            raise problem
        for index, text in enumerate(told):
            if text is not None:
                raise RankfoldError(f"process {index}: {text}")
        return result  # type: ignore[return-value]

    def first_does(self, action: Callable[[], T]) -> T:
        """What ``action`` gives in the first process, which alone does it; it must be JSON.  If it raises a
        RankfoldError, all do."""
        done = self.together(action if self.is_first else _nothing)
        return done if self.count == 1 else self.gather(done)[0]  # type: ignore[return-value]


def shared_precision(given: PrecisionName | None, processes: Processes) -> Precision:
    """``given``, or what the first process finds fast; so that all compute in the same format."""
    own = processes.together(lambda: choose_precision(given, default_device()))
    first = processes.gather(own.name)[0]
    return own if own.name == first else Precision.of(first, "as the first process found")


def _nothing() -> None:
    return None

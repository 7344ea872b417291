"""Child process: a run of rankfold, as a user starts it from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parts.sides import NO_SAVES, Job, Meter, Result, be_child, on_both

from rankfold import Recipe, fine_tune
from rankfold.train.keeping.listener import Listener
from rankfold.train.step.loop import StepRecord


class Metered(Listener):
    """Hears the end of each step, and counts nothing that a user's own listener would not hear."""

    def __init__(self) -> None:
        self.meter = Meter()

    def on_step(self, record: StepRecord) -> None:
        self.meter.step(record.loss, record.tokens, record.trained_tokens)


def train(job: Job) -> Result:
    listener = Metered()
    out = Path(job["folder"]) / "run"
    names = ("model", "data", "held_out", "rank", "alpha", "dropout", "learning_rate", "schedule")
    names += ("rows_per_step", "max_steps", "max_minutes", "epochs", "max_length", "seed")
    names += ("compile", "activation_checkpointing")
    settings: dict[str, Any] = {name: job[name] for name in names if name in job}
    settings["precision"] = job.get("precision") or on_both()
    settings |= {"samples": 0, "save_every_steps": NO_SAVES, "evaluate_every_steps": 0}
    fine_tune(Recipe.of(settings | {"out": out}), listener)
    return listener.meter.result(adapter=str(out), trainable=_trainable(out))


def _trainable(adapter: Path) -> int:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no dict


if __name__ == "__main__":
    be_child(train)

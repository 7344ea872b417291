"""``fine_tune``: one run from recipe to adapter and report."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.data.batches import epoch_steps
from rankfold.data.example import Example
from rankfold.errors import OutputError
from rankfold.files import require_space, staged_folder, write_whole
from rankfold.models.facts import tokenizer_marks
from rankfold.models.generate import reply
from rankfold.models.sampling import Sampling
from rankfold.models.template import template_of
from rankfold.train.evaluate import compare, row_losses
from rankfold.train.listener import Listener, RunResult, Sample
from rankfold.train.loop import StepRecord, Trainer, learning_rate_at
from rankfold.train.plan import Plan, make_plan, read_data
from rankfold.train.recipe import Recipe
from rankfold.train.report import render_report

RUN_NAME = "run.json"
REPORT_NAME = "report.html"
SAMPLING = Sampling(max_new_tokens=64, temperature=0.0)
OUTPUT_BYTES = 200_000_000  # adapter, report and room to spare


def fine_tune(recipe: Recipe, listener: Listener | None = None) -> RunResult:
    """Fine-tune ``recipe.model`` on ``recipe.data`` and write adapter, facts and report to ``recipe.out``.

    The folder appears when all of it is written.  Ctrl-C lets the running step finish, keeps the
    adapter trained so far and leaves out the comparison; a second Ctrl-C drops everything.

    Raises RankfoldError; ``recipe.out`` does not exist then."""
    listener = listener or Listener()
    refuse_used_folder(recipe.out)
    require_space(recipe.out, OUTPUT_BYTES)
    rows = read_data(recipe)
    listener.on_stage("loading the model and timing a step")
    plan = make_plan(recipe, rows)
    listener.on_plan(plan)
    with staged_folder(recipe.out) as folder:
        listener.on_stage("measuring the base model on held-out rows")
        base_losses = row_losses(plan.model, plan.held_out, plan.pad_id)
        base_answers = _answers(plan)
        with _finish_step_on_interrupt(listener) as interrupted:
            listener.on_stage("training")
            records = _train_steps(plan, listener, interrupted)
            _save_adapter(plan, folder)
            result = RunResult(out=recipe.out, steps=records, interrupted=interrupted())
            if not result.interrupted:
                listener.on_stage("measuring the tuned model on held-out rows")
                result = _judge(plan, result, base_losses, base_answers)
                write_whole(folder / REPORT_NAME, render_report(plan, result))
            record = json.dumps(run_record(plan, result), indent=2, ensure_ascii=False)
            write_whole(folder / RUN_NAME, record + "\n")
    listener.on_result(result)
    return result


def refuse_used_folder(out: Path) -> None:
    """Raise OutputError if ``out`` is anything but a new or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        holds = "holds a run already" if (out / RUN_NAME).is_file() else "exists and is not an empty folder"
        raise OutputError(f"the output folder {out} {holds}; name another --out, or remove it first")


def _save_adapter(plan: Plan, folder: Path) -> None:
    facts = {
        "prompt_style": plan.rows.prompt_style,
        "base_description": plan.base.source.description,
        "chat_template": template_of(plan.base.tokenizer)[0] if plan.rows.prompt_style == "chat" else "",
        "tokenizer": tokenizer_marks(plan.base.tokenizer),
    }
    plan.model.save_pretrained(folder, facts=facts)


def _judge(plan: Plan, result: RunResult, base_losses: Tensor, base_answers: list[str]) -> RunResult:
    tuned_losses = row_losses(plan.model, plan.held_out, plan.pad_id)
    samples = [
        Sample(prompt=example.prompt[-1]["content"], written=example.answer, base=base, tuned=tuned)
        for example, base, tuned in zip(_sampled(plan), base_answers, _answers(plan), strict=True)
    ]
    comparison = compare(plan.held_out, base_losses, tuned_losses, plan.recipe.seed)
    return replace(result, comparison=comparison, samples=samples)


def _train_steps(plan: Plan, listener: Listener, should_stop: Callable[[], bool]) -> list[StepRecord]:
    settings, seed = plan.settings, plan.recipe.seed
    schedule = partial(
        learning_rate_at,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        peak=settings.learning_rate,
    )
    steps = (epoch_steps(plan.train, settings.rows_per_step, seed, e) for e in range(settings.epochs))
    records: list[StepRecord] = []

    def on_step(record: StepRecord) -> None:
        records.append(record)
        listener.on_step(record)

    trainer = Trainer(plan.model, plan.pad_id, schedule, settings.steps, plan.batching)
    trainer.run(chain.from_iterable(steps), on_step, should_stop)
    return records


def _answers(plan: Plan) -> list[str]:
    return [reply(plan.base, example.prompt, SAMPLING) for example in _sampled(plan)]


def _sampled(plan: Plan) -> list[Example]:
    """``recipe.samples`` held-out rows, spread evenly over the file."""
    rows = plan.rows.held_out
    count = min(plan.recipe.samples, len(rows))
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def run_record(plan: Plan, result: RunResult) -> dict[str, Any]:
    """The run in JSON: settings, data, every step, and the comparison."""
    return {
        "status": "interrupted" if result.interrupted else "finished",
        "recipe": plan.recipe.model_dump(mode="json"),
        "settings": asdict(plan.settings),
        "batching": asdict(plan.batching),
        "base": plan.base.source.description,
        "rows": {"train": len(plan.train), "held_out": len(plan.held_out), "shape": plan.rows.shape},
        "notes": plan.notes,
        "steps": [asdict(record) for record in result.steps],
        "comparison": asdict(result.comparison) if result.comparison else None,
        "samples": [asdict(sample) for sample in result.samples],
    }


@contextmanager
def _finish_step_on_interrupt(listener: Listener) -> Iterator[Callable[[], bool]]:
    """Within the block a first Ctrl-C only sets the flag that is yielded; a second one raises."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        listener.on_stopping()

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)

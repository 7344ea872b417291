"""``fine_tune`` and ``resume``: one run from recipe to adapter and report, whatever comes between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data.batches import epoch_steps
from rankfold.data.example import Example
from rankfold.errors import CheckpointError, OutputError, TrainingError
from rankfold.files import require_space, write_whole
from rankfold.models.facts import tokenizer_marks
from rankfold.models.generate import reply
from rankfold.models.sampling import Sampling
from rankfold.models.template import template_of
from rankfold.train.checkpoints import clear_partial, latest_checkpoint, save_checkpoint
from rankfold.train.evaluate import compare, row_losses
from rankfold.train.folder import RECORD_NAME, REPORT_NAME, RunFolder
from rankfold.train.identity import identity_of, refuse_other_identity
from rankfold.train.listener import Listener, RunResult, Sample
from rankfold.train.loop import StepRecord, Trainer
from rankfold.train.plan import Plan, make_plan, read_data
from rankfold.train.recipe import Recipe
from rankfold.train.recipe_file import changed_recipe, read_recipe, resolved_recipe
from rankfold.train.report import render_report
from rankfold.train.schedule import learning_rate_at
from rankfold.train.stopping import stop_requests

SAMPLING = Sampling(max_new_tokens=64, temperature=0.0)
OUTPUT_BYTES = 200_000_000  # adapter, report and room to spare
SAVE_EVERY_S = 60.0
SAVE_SHARE = 0.01  # the next save is due when the last one took this share of the time since


def fine_tune(recipe: Recipe, listener: Listener | None = None) -> RunResult:
    """Fine-tune ``recipe.model`` on ``recipe.data`` and write adapter, facts and report to ``recipe.out``.

    The folder appears when everything is decided, and keeps checkpoints from which ``resume`` goes on as
    if nothing had happened.  SIGINT or SIGTERM lets the running step finish, saves, and leaves out the
    comparison; a second one stops at once.

    Raises RankfoldError: before the first step ``recipe.out`` does not exist then; a TrainingError
    leaves the last good state in it."""
    listener = listener or Listener()
    refuse_used_folder(recipe.out)
    require_space(recipe.out, OUTPUT_BYTES)
    plan = decide(recipe, listener)
    record = {"status": "running", "identity": identity_of(plan)}
    folder = RunFolder.create(
        recipe.out,
        resolved_recipe(recipe, plan.settings) | {"batching": plan.batching.kind},
        record,
    )
    with folder.locked():
        return Run(plan, folder, listener).go()


def resume(
    path: Path, changes: Mapping[str, Any] | None = None, listener: Listener | None = None
) -> RunResult:
    """Go on with the run in ``path`` from its newest whole checkpoint, to the very bits that the run
    would have reached without the interruption (on a CPU, with the same versions).

    ``changes`` are settings to change on the way; those that would make it another run are refused.
    Raises RankfoldError, and leaves the folder as it is, if data or base are not those of the run."""
    listener = listener or Listener()
    folder = RunFolder(path)
    record = folder.record()
    if record.get("status") == "finished":
        raise CheckpointError(f"the run in {path} is finished; there is nothing to resume")
    recipe = changed_recipe(read_recipe(folder.recipe_path), changes or {}, path)
    with folder.locked():
        plan = decide(recipe, listener)
        for note in refuse_other_identity(record.get("identity"), identity_of(plan), path):
            listener.on_note(note)
        return Run(plan, folder, listener).go()


def refuse_used_folder(out: Path) -> None:
    """Raise OutputError if ``out`` is anything but a new or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        if (out / RECORD_NAME).is_file():
            raise OutputError(
                f"the output folder {out} holds a run already; go on with it by `rankfold resume {out}`, "
                "or name another --out"
            )
        raise OutputError(
            f"the output folder {out} exists and is not an empty folder; "
            "name another --out, or remove it first"
        )


def decide(recipe: Recipe, listener: Listener) -> Plan:
    """Everything up to the first step: read, check, load, encode, choose, adapt and time.  Writes nothing."""
    rows = read_data(recipe)
    listener.on_stage("loading the model and timing a step")
    plan = make_plan(recipe, rows)
    listener.on_plan(plan)
    return plan


class Run:
    """A plan being carried out in its folder, which this process holds."""

    def __init__(self, plan: Plan, folder: RunFolder, listener: Listener) -> None:
        self.plan, self.folder, self.listener = plan, folder, listener
        self.records: list[StepRecord] = []
        self.saved_step = 0
        self.next_save = time.monotonic() + SAVE_EVERY_S
        settings = plan.settings
        rates = partial(
            learning_rate_at,
            schedule=plan.recipe.schedule,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            peak=settings.learning_rate,
        )
        self.trainer = Trainer(
            plan.model,
            plan.pad_id,
            rates,
            settings.steps,
            plan.batching,
            plan.recipe.b_rate_factor,
        )

    def go(self) -> RunResult:
        before = self._measure_before()
        self._restore()
        with stop_requests(self.listener.on_stopping) as stop_signal:
            self.listener.on_stage("training")
            self._train(stop_signal)
            result = RunResult(out=self.folder.path, steps=self.records, stopped_by=stop_signal())
            self._save_adapter()
            if not result.interrupted:
                self.listener.on_stage("measuring the tuned model on held-out rows")
                result = self._judge(result, before)
                write_whole(self.folder.path / REPORT_NAME, render_report(self.plan, result))
            self.folder.write_record(self.folder.record() | run_record(self.plan, result))
        self.listener.on_result(result)
        return result

    def _measure_before(self) -> dict[str, Any]:
        """The base model's held-out losses and answers: measured once, before anything is trained."""
        record = self.folder.record()
        if "before" not in record:
            self.listener.on_stage("measuring the base model on held-out rows")
            losses = row_losses(self.plan.model, self.plan.held_out, self.plan.pad_id)
            record["before"] = {"losses": losses.tolist(), "answers": self._answers()}
            self.folder.write_record(record)
        before: dict[str, Any] = record["before"]
        return before

    def _restore(self) -> None:
        clear_partial(self.folder.checkpoints)
        checkpoint, passed_over = latest_checkpoint(self.folder.checkpoints)
        for note in passed_over:
            self.listener.on_note(f"passed over, going back to the checkpoint before it: {note}")
        if checkpoint is not None:
            self.trainer.restore(checkpoint)
            self.saved_step = checkpoint.step
            self.listener.on_note(f"going on after step {checkpoint.step} of {self.plan.settings.steps}")
        else:
            torch.manual_seed(self.plan.recipe.seed)
        self.records = self.folder.cut_metrics(self.saved_step)

    def _train(self, stop_signal: Callable[[], int]) -> None:
        settings, seed = self.plan.settings, self.plan.recipe.seed
        epochs = (
            epoch_steps(self.plan.train, settings.rows_per_step, seed, e) for e in range(settings.epochs)
        )
        steps = islice(chain.from_iterable(epochs), self.saved_step, settings.steps)
        minutes = self.plan.recipe.max_minutes
        until = time.monotonic() + 60 * minutes if minutes else math.inf
        try:
            self.trainer.run(
                steps, self._on_step, lambda: stop_signal() or (self.records and time.monotonic() > until)
            )
        except TrainingError:
            with suppress(TrainingError):  # where the weights are not finite either, nothing is saved
                self._save(self.trainer.step_done)
            self.folder.write_record(self.folder.record() | {"status": "failed"})
            raise
        self._save(self.trainer.step_done)

    def _on_step(self, record: StepRecord) -> None:
        self.records.append(record)
        self.folder.add_metrics(record)
        self.listener.on_step(record)
        every = self.plan.recipe.save_every_steps
        if record.step % every == 0 if every else time.monotonic() >= self.next_save:
            try:
                self._save(record.step)
            except OutputError as error:  # the disk may have room again by the next time, or by the end
                self.listener.on_note(f"going on without a checkpoint of step {record.step}: {error}")
                self.next_save = time.monotonic() + SAVE_EVERY_S

    def _save(self, step: int) -> None:
        if step == self.saved_step:
            return
        started = time.monotonic()
        checkpoint = self.trainer.checkpoint()
        save_checkpoint(self.folder.checkpoints, checkpoint, self.plan.recipe.keep_checkpoints)
        self.saved_step = step
        now = time.monotonic()
        self.next_save = now + max(SAVE_EVERY_S, (now - started) / SAVE_SHARE)

    def _save_adapter(self) -> None:
        style, tokenizer = self.plan.rows.prompt_style, self.plan.base.tokenizer
        facts = {
            "prompt_style": style,
            "base_description": self.plan.base.source.description,
            "chat_template": template_of(tokenizer)[0] if style == "chat" else "",
            "tokenizer": tokenizer_marks(tokenizer),
        }
        self.plan.model.save_pretrained(self.folder.path, facts=facts)

    def _judge(self, result: RunResult, before: dict[str, Any]) -> RunResult:
        plan = self.plan
        base_losses = torch.tensor(before["losses"], dtype=torch.float64)
        tuned_losses: Tensor = row_losses(plan.model, plan.held_out, plan.pad_id)
        told = zip(_sampled(plan), before["answers"], self._answers(), strict=True)
        samples = [
            Sample(prompt=example.prompt[-1]["content"], written=example.answer, base=base, tuned=tuned)
            for example, base, tuned in told
        ]
        comparison = compare(plan.held_out, base_losses, tuned_losses, plan.recipe.seed)
        return replace(result, comparison=comparison, samples=samples)

    def _answers(self) -> list[str]:
        return [reply(self.plan.base, example.prompt, SAMPLING) for example in _sampled(self.plan)]


def _sampled(plan: Plan) -> list[Example]:
    """``recipe.samples`` held-out rows, spread evenly over the file."""
    rows = plan.rows.held_out
    count = min(plan.recipe.samples, len(rows))
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def run_record(plan: Plan, result: RunResult) -> dict[str, Any]:
    """The run in JSON: settings, data and the comparison; the steps are in metrics.jsonl."""
    return {
        "status": "interrupted" if result.interrupted else "finished",
        "settings": asdict(plan.settings),
        "batching": asdict(plan.batching),
        "base": plan.base.source.description,
        "rows": {"train": len(plan.train), "held_out": len(plan.held_out), "shape": plan.rows.shape},
        "notes": plan.notes,
        "steps": len(result.steps),
        "comparison": asdict(result.comparison) if result.comparison else None,
        "samples": [asdict(sample) for sample in result.samples],
    }

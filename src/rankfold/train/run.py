"""``fine_tune`` and ``resume``: one run from recipe to adapter and report, whatever comes between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rankfold.data.order.batches import epoch_steps
from rankfold.errors import CheckpointError, ConfigError, OutputError, TrainingError
from rankfold.files import require_space, write_whole
from rankfold.models.base.tokenizer_marks import tokenizer_marks
from rankfold.models.messages.template import template_of
from rankfold.peft_surface.saving_and_loading import fingerprint_to_save
from rankfold.processes import Processes, shared_precision
from rankfold.train.asked.recipe import Recipe
from rankfold.train.asked.recipe_file import changed_recipe, read_recipe, resolved_recipe
from rankfold.train.judging.judge import Judge
from rankfold.train.keeping.checkpoints import clear_partial, latest_checkpoint, save_checkpoint
from rankfold.train.keeping.energy import Energy
from rankfold.train.keeping.folder import RunFolder
from rankfold.train.keeping.identity import identity_of, refuse_other_identity
from rankfold.train.keeping.listener import Listener, RunResult
from rankfold.train.keeping.names import REPORT_NAME, refuse_used_folder
from rankfold.train.keeping.report import render_report
from rankfold.train.keeping.trackers import Trackers, require_trackers
from rankfold.train.planning.plan import Plan, make_plan
from rankfold.train.planning.preflight import preflight
from rankfold.train.planning.probe import probed
from rankfold.train.planning.rates import Probe
from rankfold.train.planning.recomputing import Activations, recompute_activations
from rankfold.train.planning.rows import Prepared, prepare
from rankfold.train.planning.start import as_its_adapter
from rankfold.train.planning.starting import FOLDER, TAKES_FROM_BASE, check_start, keep_start
from rankfold.train.sharding import require_several, shard_base
from rankfold.train.step.loop import StepRecord, Trainer
from rankfold.train.step.method import method_of
from rankfold.train.step.pace import Pace
from rankfold.train.stopping import stop_requests

OUTPUT_BYTES = 200_000_000  # adapter, report and room to spare
SAME_EVERYWHERE = ("train_rows", "held_out_rows", "base")
SAVE_EVERY_S = 60.0
SAVE_SHARE = 0.01  # the next save is due when the last one took this share of the time since


def fine_tune(
    recipe: Recipe, listener: Listener | None = None, prepared: Prepared | None = None
) -> RunResult:
    """Fine-tune ``recipe.model`` on ``recipe.data`` and write adapter, facts and report to ``recipe.out``.

    The folder appears when everything is decided, and keeps checkpoints from which ``resume`` goes on as
    if nothing had happened.  SIGINT or SIGTERM lets the running step finish, saves, and leaves out the
    comparison; a second one stops at once.  Under ``torchrun`` or ``accelerate launch`` every process calls
    it; the first one's ``listener`` is told.  ``prepared`` are the rows if they are there already.

    Raises RankfoldError: before the first step ``recipe.out`` does not exist then; a TrainingError
    leaves the last good state in it."""
    processes, listener = _met(listener)
    processes.first_does(partial(_prepare, recipe))
    plan = decide(recipe, listener, processes, prepared)
    identity = _shared_identity(plan)
    choices = resolved_recipe(plan.recipe, plan.settings) | plan.choices
    record = {"status": "running", "identity": identity, "steps_planned": plan.settings.steps}
    record["probe"] = asdict(plan.probe) if plan.probe else None
    processes.first_does(lambda: RunFolder.create(recipe.out, choices, record) and None)
    with ExitStack() as stack:
        folder = _hold(RunFolder(recipe.out), processes, stack)
        return Run(plan, folder, listener, identity).go()


def resume(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
    *,
    reset_optimizer: bool = False,
) -> RunResult:
    """Go on with the run in ``path`` from its newest whole checkpoint, to the very bits that the run
    would have reached without the interruption (on a CPU, with the same versions, threads and processes).

    ``changes`` are settings to change on the way; those that would make it another run are refused.
    ``reset_optimizer`` starts the optimiser's moments anew, for a checkpoint that has lost them.
    Raises RankfoldError, and leaves the folder as it is, if data or base are not those of the run."""
    processes, listener = _met(listener)
    folder = RunFolder(path)
    record = processes.together(folder.record)
    if record.get("status") == "finished":
        raise CheckpointError(f"the run in {path} is finished; there is nothing to resume")
    recipe = changed_recipe(read_recipe(folder.recipe_path), changes or {}, path)
    require_trackers(recipe.trackers)
    with ExitStack() as stack:
        _hold(folder, processes, stack)
        plan = decide(recipe, listener, processes)
        plan = planned_as(plan, record.get("steps_planned"))
        if record.get("probe"):
            plan = replace(plan, probe=Probe.read(record["probe"]))
        identity = _shared_identity(plan)
        for note in refuse_other_identity(record.get("identity"), identity, path):
            listener.on_note(note)
        return Run(plan, folder, listener, identity).go(reset_optimizer)


def _met(listener: Listener | None) -> tuple[Processes, Listener]:
    processes = Processes.join()
    return processes, listener if listener and processes.is_first else Listener()


def _prepare(recipe: Recipe) -> None:
    refuse_used_folder(recipe.out)
    require_space(recipe.out, OUTPUT_BYTES)
    require_trackers(recipe.trackers)


def _hold(folder: RunFolder, processes: Processes, stack: ExitStack) -> RunFolder:
    """Lock ``folder`` for the run, by its first process, until ``stack`` is left."""
    processes.first_does(lambda: stack.enter_context(folder.locked()))
    return folder


def _shared_identity(plan: Plan) -> dict[str, Any]:
    """What makes the run that run; raises ConfigError if it is not the same in every process."""
    identity = identity_of(plan)
    others = plan.processes.gather(identity)
    unlike = [
        f"process {index} has other {', '.join(k for k in SAME_EVERYWHERE if other[k] != others[0][k])}"
        for index, other in enumerate(others)
        if any(other[k] != others[0][k] for k in SAME_EVERYWHERE)
    ]
    if unlike:
        raise ConfigError(f"the processes do not agree on the run: {'; '.join(unlike)} than process 0")
    return identity


def decide(
    recipe: Recipe,
    listener: Listener,
    processes: Processes | None = None,
    prepared: Prepared | None = None,
) -> Plan:
    """Everything up to the first step: read, check, encode, load, choose, adapt and time.  Writes nothing."""
    processes = processes or Processes()
    recipe = as_its_adapter(recipe)
    check_start(recipe, processes.count)
    if recipe.shard_base:
        require_several(processes, recipe.stored)
    rows = prepared or processes.together(lambda: prepare(recipe))
    listener.on_stage("loading the model and timing a step")
    precision = shared_precision(recipe.precision, processes)
    about = f"the start {recipe.start}"
    tell = lambda text: listener.on_stage(f"{about}: {text}")  # noqa: E731
    plan = processes.together(lambda: make_plan(recipe, rows, precision, processes, tell))
    plan = recomputed_in_all(plan)
    if not recipe.shard_base:
        listener.on_stage("carrying out the largest step")
        plan = processes.together(lambda: preflight(plan))
    if recipe.probe and recipe.learning_rate is None:
        plan = probed(plan, lambda rate: listener.on_stage(f"trying the learning rate {rate:g}"))
    listener.on_plan(plan)
    return plan


def planned_as(plan: Plan, steps: int | None) -> Plan:
    """``plan`` with the steps that were planned when the run began, whatever fits into its time today: the
    learning rates of the steps that are done followed them."""
    if plan.recipe.max_minutes is None or steps is None:
        return plan
    warmup_steps = max(1, round(plan.recipe.warmup_share * steps))
    return replace(plan, settings=replace(plan.settings, steps=steps, warmup_steps=warmup_steps))


def recomputed_in_all(plan: Plan) -> Plan:
    """``plan`` with activations recomputed if they do not fit in one of its processes: those that share a
    base wait for each other in every layer, so they must do the same."""
    somewhere = plan.processes.highest(int(plan.activations.recomputed))
    if plan.activations.recomputed or not somewhere:
        return plan
    recompute_activations(plan.model)
    return replace(plan, activations=Activations(True, "they do not fit in another process"))


class Run:
    """A plan being carried out in its folder, which the first process holds."""

    def __init__(
        self, plan: Plan, folder: RunFolder, listener: Listener, identity: Mapping[str, Any]
    ) -> None:
        self.plan, self.folder, self.listener, self.identity = plan, folder, listener, identity
        self.processes = plan.processes
        self.records: list[StepRecord] = []
        self.saved_step = 0
        self.next_save = time.monotonic() + SAVE_EVERY_S
        self.base = fingerprint_to_save(plan.model.base_model)
        if plan.recipe.shard_base:
            shard_base(plan.model, plan.processes)
        method = method_of(plan.recipe, plan.settings, plan.batching, plan.precision)
        minutes, per_step = plan.recipe.max_minutes, plan.seconds_per_step / plan.processes.count
        pace = Pace(plan.settings.steps, minutes and 60 * minutes, per_step, plan.most_steps)
        self.trainer = Trainer(plan.model, plan.pad_id, pace, method, plan.processes)
        self.judge = Judge(plan, self.trainer)
        self.energy = Energy()

    def go(self, reset_optimizer: bool = False) -> RunResult:
        if self.plan.recipe.start != "plain":
            keep_start(self.plan.model, self.folder.path / FOLDER)
        self._restore(reset_optimizer)
        self.trackers = self.processes.together(self._open_trackers)
        try:
            result = self._go()
        except BaseException:
            self.trackers.close("failed")
            raise
        self.trackers.close("interrupted" if result.interrupted else "finished")
        self.listener.on_result(result)
        return result

    def _open_trackers(self) -> Trackers:
        names = self.plan.recipe.trackers if self.processes.is_first else []
        recipe = resolved_recipe(self.plan.recipe, self.plan.settings) | self.plan.choices
        return Trackers(names, self.folder.path, recipe, self._note, self.saved_step)

    def _go(self) -> RunResult:
        with stop_requests(self.listener.on_stopping, self.listener.wants_stop) as stop_signal:
            self.listener.on_stage("training")
            self._train(stop_signal)
            stopped_by = self.processes.highest(stop_signal())
            result = RunResult(out=self.folder.path, steps=self.records, stopped_by=stopped_by)
            if not result.interrupted:
                self.listener.on_stage("judging base and tuned model on held-out rows")
                self._note(self.judge.settle())
                comparison, samples, learnt = self.judge.compare()
                result = replace(result, comparison=comparison, samples=samples, learnt=learnt)
            self.processes.first_does(partial(self._write, result))
        return result

    def _restore(self, reset_optimizer: bool) -> None:
        self.processes.first_does(partial(clear_partial, self.folder.checkpoints))
        may_lack = ("optimiser",) if reset_optimizer else ()
        checkpoint, passed_over = self.processes.together(
            partial(latest_checkpoint, self.folder.checkpoints, may_lack)
        )
        for note in passed_over:
            self._note(f"passed over, going back to the checkpoint before it: {note}")
        if checkpoint is not None:
            self.trainer.restore(checkpoint, reset_optimizer)
            self.judge.restore(checkpoint.state, checkpoint.best)
            self.saved_step = checkpoint.step
            self._note(f"going on after step {checkpoint.step} of {self.plan.settings.steps}")
            if reset_optimizer:
                self._note("the optimiser starts anew: not bit for bit what it would have been")
            if checkpoint.version == 1 and self.plan.recipe.dropout:
                self._note("not bit for bit what it would have been: dropout is drawn in another way now")
        steps = self.processes.gather(self.saved_step)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"the processes find checkpoints of different steps in {self.folder.path}: {steps}; "
                "it must be a folder that all of them see"
            )
        self.processes.first_does(partial(self.folder.cut_metrics, self.saved_step))
        self.records = self.folder.metrics()

    def _train(self, stop_signal: Callable[[], int]) -> None:
        settings, seed = self.plan.settings, self.plan.recipe.seed
        epochs = (
            epoch_steps(self.plan.train, settings.rows_per_step, seed, e) for e in range(settings.epochs)
        )
        steps = islice(chain.from_iterable(epochs), self.saved_step, self.plan.most_steps)

        def should_stop() -> bool:
            return self.processes.highest(stop_signal()) > 0 or self.judge.had_enough

        try:
            self.trainer.run(steps, self._on_step, should_stop)
        except TrainingError:
            with suppress(TrainingError):  # where the weights are not finite either, nothing is saved
                self.processes.first_does(partial(self._save, self.trainer.step_done))
            self.processes.first_does(partial(self._set_status, "failed"))
            raise
        if self.judge.had_enough and self.trainer.pace.left(self.trainer.step_done):
            self._note(f"stopped early: {self.plan.recipe.patience} evaluations brought nothing better")
        self.processes.first_does(partial(self._save, self.trainer.step_done))

    def _on_step(self, record: StepRecord) -> None:
        recipe, step = self.plan.recipe, record.step
        record = replace(record, energy_joules=self.energy.joules())
        if _due(step, self.plan.settings.evaluate_every_steps) and self._has_time_to_look():
            record = replace(record, held_out_loss=self.judge.evaluate(step))
        if _due(step, recipe.sample_every_steps):
            record = replace(record, answers=self.judge.answers())
        self.records.append(record)
        self.listener.on_step(record)
        self.processes.first_does(partial(self._record_step, record))

    def _has_time_to_look(self) -> bool:
        """Whether a look now would let the run end in its time; at the end there is one anyway."""
        return not self.processes.highest(int(self.trainer.pace.remaining < self.plan.look_seconds))

    def _record_step(self, record: StepRecord) -> None:
        self.folder.add_metrics(record)
        self.trackers.log(record.numbers(), record.step)
        every = self.plan.recipe.save_every_steps
        if record.step % every == 0 if every else time.monotonic() >= self.next_save:
            try:
                self._save(record.step)
            except OutputError as error:  # the disk may have room again by the next time, or by the end
                self._note(f"going on without a checkpoint of step {record.step}: {error}")
                self.next_save = time.monotonic() + SAVE_EVERY_S

    def _save(self, step: int) -> None:
        if step == self.saved_step:
            return
        started = time.monotonic()
        checkpoint = self.trainer.checkpoint()
        checkpoint = replace(
            checkpoint, best=self.judge.best.weights, state=checkpoint.state | self.judge.state()
        )
        save_checkpoint(self.folder.checkpoints, checkpoint, self.plan.recipe.keep_checkpoints)
        self.saved_step = step
        now = time.monotonic()
        self.next_save = now + max(SAVE_EVERY_S, (now - started) / SAVE_SHARE)

    def _write(self, result: RunResult) -> None:
        """The adapter, the report if the run came to its end, and the record."""
        style, tokenizer = self.plan.rows.prompt_style, self.plan.base.tokenizer
        facts = {
            "prompt_style": style,
            "base_description": self.plan.base.source.description,
            "chat_template": template_of(tokenizer)[0] if style == "chat" else "",
            "tokenizer": tokenizer_marks(tokenizer),
            "base": self.base,
            "eos_token": self.plan.recipe.eos_token or self.plan.started.eos_token,
            "as_tokens": sorted({*self.plan.recipe.as_tokens, *self.plan.started.as_tokens}),
        }
        if self.plan.reader is not None:
            facts["image_tiles"] = self.plan.reader.tiles
        with self.trainer.counting():
            initial = self.folder.path / FOLDER if self.plan.recipe.start in TAKES_FROM_BASE else None
            self.plan.model.save_pretrained(
                self.folder.path, path_initial_model_for_weight_conversion=initial, facts=facts
            )
        if not result.interrupted:
            write_whole(self.folder.path / REPORT_NAME, render_report(self.plan, result))
        self.folder.write_record(self.folder.record() | run_record(self.plan, result))

    def _set_status(self, status: str) -> None:
        self.folder.write_record(self.folder.record() | {"status": status})

    def _note(self, note: str) -> None:
        if note:
            self.listener.on_note(note)


def _due(step: int, every: int | None) -> bool:
    return every is not None and every > 0 and step % every == 0


def run_record(plan: Plan, result: RunResult) -> dict[str, Any]:
    """The run in JSON: settings, data and the comparison; the steps are in metrics.jsonl."""
    return {
        "status": "interrupted" if result.interrupted else "finished",
        "settings": asdict(plan.settings),
        "batching": {name: getattr(plan.batching, name) for name in ("kind", "reason", "tokens")},
        "base": plan.base.source.description,
        "rows": {"train": len(plan.train), "held_out": len(plan.held_out), "shape": plan.rows.shape},
        "notes": plan.notes,
        "steps": len(result.steps),
        "comparison": asdict(result.comparison) if result.comparison else None,
        "learnt": asdict(result.learnt) if result.learnt else None,
        "samples": [asdict(sample) for sample in result.samples],
    }

"""``evaluate``: models by their names, on rows of a file or on those that a run held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rankfold.errors import ConfigError
from rankfold.files import require_space
from rankfold.judging.evaluation import Evaluation, compare_models, models_in_turn
from rankfold.judging.harness import TaskScore, task_scores
from rankfold.judging.judged import OnProgress
from rankfold.judging.page import write_evaluation
from rankfold.judging.request import EvalRequest
from rankfold.judging.rows import EvalData, data_of, read_data
from rankfold.models.choices import ModelRequest
from rankfold.train.asked.run_rows import is_run, rows_of_run, told_of_leaks
from rankfold.train.keeping.names import refuse_used_folder

SPACE_BYTES = 20_000_000


def evaluate(
    request: EvalRequest,
    names: Sequence[str | Path] = (),
    asked: ModelRequest | None = None,
    on_model: Callable[[str], object] = lambda _: None,
    on_progress: OnProgress = lambda *_: None,
) -> Evaluation:
    """Judge the models of ``names`` (adapters' folders, runs, bases) on the rows that ``request`` names;
    where it names none, on those that the first, a run, held out.  ``asked`` says how each is held, and the
    base of adapters.  ``request.out`` is written if it is given.

    Raises RankfoldError."""
    if request.out is not None:
        refuse_used_folder(request.out)
        require_space(request.out, SPACE_BYTES)
    models = [_model(str(name), asked or ModelRequest()) for name in names]
    data, source = _rows(request, [model.adapter for model in models if model.adapter is not None])
    evaluation = replace(compare_models(request, data, models, on_model, on_progress), source=source)
    if request.out is not None:
        write_evaluation(evaluation, request.out)
    return evaluation


def evaluate_tasks(
    request: EvalRequest,
    names: Sequence[str | Path],
    asked: ModelRequest | None = None,
    on_model: Callable[[str], object] = lambda _: None,
) -> dict[str, list[TaskScore]]:
    """The scores of each model, and of the base of the first if that is an adapter, on ``request.tasks``.

    Raises RankfoldError."""
    found = {}
    for name, base in models_in_turn([_model(str(name), asked or ModelRequest()) for name in names]):
        on_model(name)
        found[name] = task_scores(base, request.tasks, request.tasks_folder, request.rows)
    return found


def _model(name: str, asked: ModelRequest) -> ModelRequest:
    """The model of that name: an adapter's folder, on the base that is asked for; else a base."""
    if (Path(name) / "adapter_config.json").is_file():
        return asked.model_copy(update={"adapter": Path(name)})
    return asked.model_copy(update={"model": name, "allow": []})


def _rows(request: EvalRequest, adapters: Sequence[Path]) -> tuple[EvalData, str]:
    """The rows to judge on, and where they are from, in words."""
    if request.data is not None:
        data = read_data(request)
        told = [note for run in adapters if is_run(run) for note in told_of_leaks(run, data.examples)]
        return replace(data, notes=[*data.notes, *told]), request.data
    if not adapters:
        raise ConfigError("name the rows to judge on: --data FILE")
    return data_of(request, rows_of_run(adapters[0]).held_out), f"{adapters[0]}, which it held out"

"""Experiment trackers beside ``metrics.jsonl``, through Accelerate: only those that the user named.

None of them is logged in to from here, and none may stop a run that has begun."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from rankfold.errors import ConfigError, bullet_list, nearest
from rankfold.files import write_whole
from rankfold.settings import split_at_commas

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"]
Status = Literal["finished", "interrupted", "failed"]

KNOWN: tuple[TrackerName, ...] = get_args(TrackerName)  # each is the name of its package too
PROJECT = "rankfold"
FOLDER_NAME = "trackers"
MARKS_NAME = "marks.json"


def _names(value: object) -> object:
    """``"wandb, mlflow"`` or a list of names as a list, each once; what is neither is left to pydantic."""
    names = split_at_commas(value)
    if not isinstance(names, list | tuple):
        return names
    unknown = [f"{name!r}{nearest(str(name), KNOWN)}" for name in names if name not in KNOWN]
    if unknown:
        told = {"unknown": ", ".join(unknown), "known": ", ".join(KNOWN)}
        raise PydanticCustomError("tracker", "unknown tracker {unknown}; known are {known}", told)
    return list(dict.fromkeys(names))


# The type of a setting that names trackers: a list, or words with commas between them.
TrackerNames = Annotated[list[TrackerName], BeforeValidator(_names)]


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ConfigError naming every tracker whose package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            f"run: pip install {' '.join(missing)}"
        )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where one tracker writes and as what: ``mark`` is what it knows the run by, ``step`` the last one that
    is done, ``again`` whether it goes on in a run that it has begun."""

    name: str
    folder: Path
    mark: str
    step: int
    again: bool


class Trackers:
    """The open trackers of a run.  One process of a run opens them; without names this does nothing.

    What they know their runs by is kept in the run's folder, so that a resumed run goes on in the same
    ones; SwanLab does so in its cloud only.  Steps that are done a second time, after a crash, replace the
    first ones in TensorBoard, are left out by W&B and SwanLab, and stand twice in MLflow and trackio."""

    def __init__(
        self,
        names: Sequence[TrackerName],
        run_folder: Path,
        recipe: Mapping[str, Any],
        on_note: Callable[[str], None],
        step: int = 0,
    ) -> None:
        """Start the trackers ``names`` for the run in ``run_folder``, which has done ``step`` steps.

        Raises ConfigError listing those of a new run that cannot start; on resuming that is a note."""
        self._on_note = on_note
        self._open: dict[TrackerName, Any] = {}
        if not names:
            return
        require_trackers(names)
        folder = run_folder / FOLDER_NAME
        folder.mkdir(exist_ok=True)
        marks = _read_marks(folder)
        problems: list[str] = []
        for name in names:
            place = _Place(
                name=run_folder.absolute().name,
                folder=folder.absolute(),
                mark=marks.get(name) or secrets.token_hex(8),
                step=step,
                again=name in marks,
            )
            try:
                self._open[name], marks[name] = _start(name, place, flat(recipe))
            except Exception as error:  # whatever a tracker and its network may raise
                problems.append(f"{name}: {_told(error)}")
        if problems and not step:
            self.close("failed")
            headline = "these trackers cannot start; see to it, or leave them out of trackers:"
            raise ConfigError(bullet_list(headline, problems))
        for problem in problems:
            on_note(f"going on without the tracker {problem}")
        write_whole(folder / MARKS_NAME, json.dumps(marks, indent=2) + "\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step.  A tracker that fails is told once and left out from then on."""
        for name in list(self._open):
            try:
                self._open[name].log(dict(values), step=step)
            except Exception as error:
                del self._open[name]
                self._on_note(
                    f"going on without the tracker {name}, which failed at step {step}: {_told(error)}"
                )

    def close(self, status: Status) -> None:
        """Say how the run ended; a second call does nothing."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                _FINISH[name](tracker, status)
            except Exception as error:
                self._on_note(f"the tracker {name} could not be closed: {_told(error)}")


def flat(recipe: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """``recipe`` as trackers take it: numbers and text as they are, anything else as its JSON text."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
        for name, value in recipe.items()
        if value is not None
    }


def _start(name: TrackerName, place: _Place, config: dict[str, Any]) -> tuple[Any, str]:
    """The started tracker, and what it knows the run by."""
    from accelerate.state import PartialState

    PartialState()  # Accelerate's trackers ask it whether they are in the main process
    with _nobody_to_ask():
        tracker = _MAKE[name](place)
        tracker.start()
        if not place.again or name == "trackio":  # which forgets them where a run goes on
            tracker.store_init_configuration(config)
    return tracker, tracker.tracker.info.run_id if name == "mlflow" else place.mark


def _tensorboard(place: _Place) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # What was written of later steps, before the run was cut off, is hidden.
    later = {"purge_step": place.step + 1} if place.again else {}
    return TensorBoardTracker("tensorboard", place.folder, **later)


def _wandb(place: _Place) -> Any:
    import wandb
    from accelerate.tracking import WandBTracker

    return WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=place.name,
        id=place.mark,
        resume="allow",
        dir=str(place.folder),
        settings=wandb.Settings(console="off"),  # what is printed shows rows
    )


def _mlflow(place: _Place) -> Any:
    import mlflow
    from accelerate.tracking import MLflowTracker

    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(f"sqlite:///{place.folder}/mlflow.db")
    return MLflowTracker(
        PROJECT,
        logging_dir=(place.folder / "mlflow").as_uri(),
        run_id=place.mark if place.again else None,
        run_name=place.name,
    )


def _trackio(place: _Place) -> Any:
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(PROJECT, name=place.name, resume="must" if place.again else "never")


def _swanlab(place: _Place) -> Any:
    import swanlab
    from accelerate.tracking import SwanLabTracker

    return SwanLabTracker(
        PROJECT,
        name=place.name,
        id=place.mark,
        resume="allow",
        log_dir=str(place.folder / "swanlab"),
        settings=swanlab.Settings(console={"proxy_type": "none"}),  # what is printed shows rows
    )


def _finish_wandb(tracker: Any, status: Status) -> None:
    tracker.tracker.finish(exit_code=0 if status == "finished" else 1)


def _finish_mlflow(tracker: Any, status: Status) -> None:
    import mlflow

    mlflow.end_run({"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[status])


def _finish_swanlab(tracker: Any, status: Status) -> None:
    state = {"finished": "success", "interrupted": "aborted", "failed": "crashed"}[status]
    tracker.tracker.finish(state=state, error=status if state == "crashed" else None)


def _finish(tracker: Any, status: Status) -> None:
    tracker.finish()


_MAKE: dict[TrackerName, Callable[[_Place], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
    "swanlab": _swanlab,
}
_FINISH: dict[TrackerName, Callable[[Any, Status], None]] = {
    "tensorboard": _finish,
    "wandb": _finish_wandb,
    "mlflow": _finish_mlflow,
    "trackio": _finish,
    "swanlab": _finish_swanlab,
}


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Trackers that want a login ask at the terminal, where a run would wait for ever; so they raise."""
    stdin = sys.stdin
    with open(os.devnull, encoding="utf-8") as nobody:
        sys.stdin = nobody
        try:
            yield
        finally:
            sys.stdin = stdin


def _read_marks(folder: Path) -> dict[str, str]:
    try:
        marks = json.loads((folder / MARKS_NAME).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{folder / MARKS_NAME} is damaged ({error}); without it, trackers begin anew"
        ) from error
    return {name: str(mark) for name, mark in marks.items()} if isinstance(marks, dict) else {}


def _told(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]

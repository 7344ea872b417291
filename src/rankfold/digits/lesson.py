"""The whole demonstration: assemble a model, write the rows, ask, train by ``fine_tune``, and ask again."""

from __future__ import annotations

import importlib.resources
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rankfold.data.order.batching import pad_id_of
from rankfold.data.shapes.sources import read_examples, sources_of
from rankfold.data.tokens.encode import EncodedRow, encode_all
from rankfold.digits.assemble import Tower, assemble
from rankfold.digits.picture import draw
from rankfold.digits.rows import (
    HELD_OUT,
    TEST,
    TRAIN,
    DigitRow,
    accuracy,
    load_digits,
    read_rows,
    split_digits,
    write_rows,
)
from rankfold.errors import OutputError
from rankfold.files import require_space, staged_folder, write_whole
from rankfold.judging.held_out import Comparison, compare
from rankfold.judging.losses import row_losses
from rankfold.models.answering.answers import replies
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.load import load_base, load_tuned
from rankfold.train.asked.recipe import Recipe
from rankfold.train.keeping.listener import Listener, RunResult
from rankfold.train.run import fine_tune

NEEDED_BYTES = 1_500_000_000  # the model in float32, the rows, and the run
SAMPLING = Sampling(max_new_tokens=4, temperature=0.0)
TEXT_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is taught to what, and how: a language model, a tower, and the settings of the run."""

    out: Path
    language: str = DEFAULT_MODEL
    tower: Tower = Tower(patch_side=8)  # noqa: RUF009 - frozen
    held_out: int = 100
    test: int = 360
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def rows(self) -> Path:
        return self.out / "rows"

    @property
    def run(self) -> Path:
        return self.out / "run"

    def recipe(self) -> Recipe:
        """An ordinary run: LoRA on the language model, and the new parts trained whole."""
        return Recipe.of(
            {
                "model": str(self.model),
                "data": self.rows / f"{TRAIN}.jsonl",
                "held_out": self.rows / f"{HELD_OUT}.jsonl",
                "out": self.run,
                "parts": ["language", "projector", "vision"],
                "whole": ["projector", "vision"],
                "targets": ["q_proj", "v_proj"],
                "rank": 8,
                "learning_rate": 5e-4,
                "whole_learning_rate": 2e-3,
                "rows_per_step": 64,
                "epochs": 5,
                "samples": 3,
                "seed": self.seed,
                **self.settings,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a lesson: the run, the shares of digits read right before and after, what became of plain
    chat, and the time in seconds.  A run that was stopped early has only the run."""

    run: RunResult
    before: float = 0.0
    after: float = 0.0
    digits: int = 0
    text: Comparison | None = None
    picture: Path | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def teach(lesson: Lesson, listener: Listener) -> Outcome:
    """Carry out ``lesson`` in ``lesson.out``, which must not exist, or be an empty folder.

    Accuracy is counted on answers that the model generates for images that no part of the run has seen.
    Raises RankfoldError."""
    started, cpu = time.monotonic(), _cpu_seconds()
    rows = _prepare(lesson, listener)
    listener.on_stage(f"asking it for {len(rows)} digits before it has learnt anything")
    before = _examine(load_base(str(lesson.model)), rows)
    run = fine_tune(lesson.recipe(), listener)
    if run.interrupted:
        return Outcome(run=run)
    listener.on_stage(f"asking it for the same {len(rows)} digits")
    after = _examine(load_tuned(lesson.run), rows)
    outcome = Outcome(
        run=run,
        before=accuracy(rows, before.answers),
        after=accuracy(rows, after.answers),
        digits=len(rows),
        text=compare(after.chats, before.losses, after.losses, lesson.seed),
        picture=lesson.out / "digits.png",
        seconds=time.monotonic() - started,
        cpu_seconds=_cpu_seconds() - cpu,
    )
    draw(rows, after.answers, outcome.before, lesson.out / "digits.png")
    record = _record(outcome, before.answers, after.answers)
    write_whole(lesson.out / "digits.json", json.dumps(record, indent=1) + "\n")
    return outcome


def _prepare(lesson: Lesson, listener: Listener) -> list[DigitRow]:
    """Write model and rows; the rows to ask for.  What can be wrong is known before anything is written."""
    _refuse_used(lesson.out)
    lesson.recipe()
    digits = load_digits()
    parts = split_digits(digits, lesson.held_out, lesson.test, lesson.seed)
    require_space(lesson.out, NEEDED_BYTES)
    listener.on_stage("putting together a model that sees images, and its rows")
    language = load_base(lesson.language)
    write_rows(digits, parts, lesson.rows, lesson.tower.image_side)
    with staged_folder(lesson.model) as folder:
        assemble(language, lesson.tower, folder, lesson.seed)
    return read_rows(lesson.rows / f"{TEST}.jsonl")


def _refuse_used(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder; name another --out, or remove it first")


@dataclass(frozen=True)
class _Examined:
    """A model's answers to the digits, and its losses on the rows of plain chat, which are ``chats``."""

    answers: list[str]
    chats: list[EncodedRow]
    losses: Tensor


def _examine(base: Base, rows: list[DigitRow]) -> _Examined:
    answers = replies(base, [row.asked for row in rows], SAMPLING)
    chats = _chats(base)
    return _Examined(answers, chats, row_losses(base.model, chats, pad_id_of(base.tokenizer)))


def _chats(base: Base) -> list[EncodedRow]:
    """The held-out cold jokes that come with rankfold, as this model reads them."""
    jokes = importlib.resources.files("rankfold.data") / "cold_jokes" / "test.jsonl"
    with importlib.resources.as_file(jokes) as file:
        examples = read_examples(sources_of(file, None), 0, 0.0).examples
    rows, _ = encode_all(examples, tokenizer=base.tokenizer, max_length=TEXT_TOKENS, train_on="assistant")
    return list(rows)


def _cpu_seconds() -> float:
    return time.process_time()


def _record(outcome: Outcome, before: list[str], after: list[str]) -> dict[str, Any]:
    numbers = ("before", "after", "digits", "seconds", "cpu_seconds")
    return {
        **{name: getattr(outcome, name) for name in numbers},
        "text": asdict(outcome.text) if outcome.text else None,
        "steps": len(outcome.run.steps),
        "answers_before": before,
        "answers_after": after,
    }

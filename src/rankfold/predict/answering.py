"""Who answers a file: our own loop or an engine; and what the answers hang on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from rankfold import __version__
from rankfold.lora.files.fingerprint import fingerprint
from rankfold.models.answering.answers import in_turn
from rankfold.models.answering.asked import Question
from rankfold.models.answering.sampling import Sampling, told_of_own_settings
from rankfold.models.base.base import Base
from rankfold.models.base.load import load
from rankfold.models.choices import ModelRequest
from rankfold.predict.run import Answering, Rows


@dataclass(frozen=True)
class Engine:
    """``answer`` gives answers to numbered questions; ``identity`` is what these hang on; ``notes`` are for
    the user."""

    answer: Answering
    identity: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)


@contextmanager
def engine_of(rows: Rows, sampling: Sampling, asked: ModelRequest) -> Iterator[Engine]:
    """Who answers ``rows``, with the model that is ``asked``."""
    request, own = rows.request, rows.request.engine == "own"
    base = load(asked, merged=own)
    notes = [*base.notes, *told_of_own_settings(base.model, sampling)]
    identity = _identity(rows, sampling, base, asked)
    if own:
        answer = partial(in_turn, base, sampling=sampling, at_once=request.at_once)
        yield Engine(answer, identity, notes)
        return
    from rankfold.predict.engines import COMPARED, compared, engine_worker

    first = islice((question for _, question in rows if isinstance(question, Question)), COMPARED)
    with engine_worker(request.engine, request.engine_python, base, asked, sampling) as worker:
        told = f"{request.engine} answers; {compared(worker, list(first))}"
        yield Engine(worker.answers, identity, [*notes, told])


def _identity(rows: Rows, sampling: Sampling, base: Base, asked: ModelRequest) -> dict[str, Any]:
    return {
        "model": base.source.name,
        "weights": asdict(fingerprint(base.model)),
        "adapter": _hash_of(asked.adapter),
        "held": asked.stored or str(base.model.dtype).removeprefix("torch."),
        "sampling": sampling.model_dump(mode="json", exclude={"logprobs"}),
        "logprobs": sampling.logprobs,
        "samples": rows.request.samples,
        "engine": rows.request.engine,
        "rankfold": __version__,
    }


def _hash_of(adapter: Path | None) -> str:
    """sha256 of an adapter's config and weights; empty if there is none."""
    if adapter is None:
        return ""
    digest = sha256()
    for file in sorted(adapter.glob("adapter_*")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()

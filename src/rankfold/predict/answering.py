"""The model that answers a file, and what its answers hang on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from rankfold import __version__
from rankfold.lora.files.fingerprint import fingerprint
from rankfold.models.answering.answers import in_turn
from rankfold.models.answering.sampling import Sampling, told_of_own_settings
from rankfold.models.base.load import load
from rankfold.predict.request import PredictRequest
from rankfold.predict.run import Answering


@dataclass(frozen=True)
class Engine:
    """``answer`` gives answers to numbered questions; ``identity`` is what these hang on; ``notes`` are for
    the user."""

    answer: Answering
    identity: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)


def engine_of(request: PredictRequest, sampling: Sampling, options: Mapping[str, Any]) -> Engine:
    """The model that ``options`` name (see ``model_options``), as it answers."""
    base = load(options["adapter"], options["model"], options["allow"], options["eos_token"])
    identity = {
        "model": base.source.name,
        "weights": asdict(fingerprint(base.model)),
        "adapter": _hash_of(options["adapter"]),
        "sampling": sampling.model_dump(mode="json", exclude={"logprobs"}),
        "logprobs": sampling.logprobs,
        "samples": request.samples,
        "rankfold": __version__,
    }
    answer = partial(in_turn, base, sampling=sampling, at_once=request.at_once)
    return Engine(answer, identity, [*base.notes, *told_of_own_settings(base.model, sampling)])


def _hash_of(adapter: Path | None) -> str:
    """sha256 of an adapter's config and weights; empty if there is none."""
    if adapter is None:
        return ""
    digest = sha256()
    for file in sorted(adapter.glob("adapter_*")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()

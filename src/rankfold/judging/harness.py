"""Tasks of lm-evaluation-harness, where it is installed, through its own model interface.

https://github.com/EleutherAI/lm-evaluation-harness: its prompts, its metrics, its standard errors; ours are
the losses and the answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.data.order.batches import micro_batch_tokens
from rankfold.data.order.batching import pad_id_of, padded
from rankfold.data.tokens.encode import IGNORE, EncodedRow
from rankfold.errors import ConfigError
from rankfold.judging.judged import longest_of
from rankfold.judging.losses import target_logits
from rankfold.models.answering.answers import in_turn
from rankfold.models.answering.asked import Question
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.base import Base
from rankfold.models.messages.prompt import prompt_encoder

USUAL_ANSWER = 256  # tokens, where a task does not say, as the harness has it
STEERING = ("until", "max_gen_toks", "temperature", "top_p", "top_k", "min_p", "do_sample")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, as the harness tells it, with its standard error if there is one."""

    task: str
    metric: str
    value: float
    error: float | None


def task_scores(base: Base, tasks: Sequence[str], folder: Path | None, limit: int | None) -> list[TaskScore]:
    """The metrics of ``tasks``, of which ``folder`` may hold some, on ``limit`` rows of each.

    Raises ConfigError if the harness is not installed, or does not know a task."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("tasks need lm-evaluation-harness: pip install lm-eval") from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(f"lm-evaluation-harness knows no task {', '.join(unknown)}")
    found = simple_evaluate(
        _model_of(base), tasks=list(tasks), task_manager=manager, limit=limit, verbosity="ERROR"
    )
    return list(_scores(found["results"]))


def _scores(results: dict[str, dict[str, Any]]) -> Iterator[TaskScore]:
    for task, told in results.items():
        for name, value in told.items():
            metric, _, of = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or "," not in name:
                continue
            error = told.get(f"{metric}_stderr,{of}")
            shown = metric if of == "none" else f"{metric} ({of})"
            yield TaskScore(
                task, shown, float(value), float(error) if isinstance(error, int | float) else None
            )


def _model_of(base: Base) -> Any:
    """``base`` as the harness asks it."""
    from lm_eval.api.model import LM

    class Model(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            pairs = [_pair(base, *request.args) for request in requests]
            return _read(base, pairs)

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [
                sum(each for each, _ in _read(base, _windows(base, *request.args))) for request in requests
            ]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return _answers(base, [request.args for request in requests])

    return Model()


def _ids(base: Base, text: str) -> list[int]:
    encoder = prompt_encoder(base.tokenizer)
    return list(encoder.text_ids(text))


def _pair(base: Base, context: str, continuation: str) -> EncodedRow:
    """Spaces between the two belong to the continuation, whose tokens are those that the context lacks."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before, whole = _ids(base, context), _ids(base, context + continuation)
    return _row(base, whole[: len(before)] or _opening(base), whole[len(before) :] if before else whole)


def _opening(base: Base) -> list[int]:
    found = (base.tokenizer.bos_token_id, base.tokenizer.eos_token_id)
    return [next(token for token in found if token is not None)]


def _row(base: Base, before: list[int], after: list[int]) -> EncodedRow:
    """Cut on the left to what the model reads."""
    most = longest_of(base)
    ids, labels = before + after, [IGNORE] * len(before) + after
    return EncodedRow("", ids[-most:], labels[-most:])


def _windows(base: Base, text: str) -> list[EncodedRow]:
    """A text of any length: each token once, behind as many as the model reads."""
    ids, most = _ids(base, text), longest_of(base)
    whole = [*_opening(base), *ids] if ids[:1] != _opening(base) else ids
    rows = []
    for end in range(most, len(whole) + most - 1, most - 1):
        last = min(end, len(whole))
        first = max(0, last - most)
        told = last - (end - most + 1)
        window = whole[first:last]
        rows.append(EncodedRow("", window, [IGNORE] * (len(window) - told) + window[len(window) - told :]))
    return rows


@torch.inference_mode()
def _read(base: Base, rows: Sequence[EncodedRow]) -> list[tuple[float, bool]]:
    """The log-likelihood of each row's trained tokens, and whether each of them is the likeliest."""
    batching = padded(None, micro_batch_tokens(base.model.device))
    places = {id(row): place for place, row in enumerate(rows)}
    sums, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
    pad_id = pad_id_of(base.tokenizer)
    for group in batching.cut(rows):
        batch = batching.collate(group, pad_id, base.model.device)
        at = torch.tensor([places[id(row)] for row in group])[batch.targets.rows.cpu()]
        start = 0
        for logits in target_logits(base.model, batch):
            wanted = batch.targets.tokens[start : start + len(logits)]
            likely: Tensor = logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
            part = at[start : start + len(logits)]
            sums.index_add_(0, part, likely.double().cpu())
            greedy[part[(logits.argmax(-1) != wanted).cpu()]] = False
            start += len(logits)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _answers(base: Base, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """What ``base`` goes on with, for those that are to be answered alike together."""
    plain = replace(base, prompt_style="plain")
    groups: dict[str, list[int]] = defaultdict(list)
    for place, (_, how) in enumerate(asked):
        groups[repr(sorted(how.items(), key=str))].append(place)
    found = [""] * len(asked)
    for places in groups.values():
        sampling = _sampling(asked[places[0]][1])
        questions = ((at, Question([{"role": "user", "content": asked[at][0]}])) for at in places)
        for at, answer in in_turn(plain, questions, sampling):
            said = base.tokenizer.decode(answer.tokens, skip_special_tokens=True)  # spaces at its ends too
            found[at] = min((said.partition(stop)[0] for stop in sampling.stop), key=len, default=said)
    return found


def _sampling(how: dict[str, Any]) -> Sampling:
    if others := sorted(set(how) - set(STEERING)):
        raise ConfigError(f"a task draws its answers by {', '.join(others)}, which is not known here")
    until = how.get("until") or []
    drawn = bool(how.get("do_sample")) and float(how.get("temperature", 1.0)) > 0
    options: dict[str, Any] = {
        "temperature": float(how.get("temperature", 1.0)) if drawn else 0.0,
        "max_new_tokens": int(how.get("max_gen_toks", USUAL_ANSWER)),
        "stop": tuple([until] if isinstance(until, str) else until),
    }
    if drawn:
        options |= {name: how[name] for name in ("top_p", "top_k", "min_p") if name in how}
    return Sampling.of(options)

"""Asking a model for text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from rankfold.errors import DataError
from rankfold.kernels.few_rows import pays
from rankfold.models.answering import by_transformers
from rankfold.models.answering.answer import Answer
from rankfold.models.answering.answerable import why_not
from rankfold.models.answering.asked import Asked, Manner, Question
from rankfold.models.answering.fast_products import fast_products
from rankfold.models.answering.guessing import GUESSED
from rankfold.models.answering.loop import Loop
from rankfold.models.answering.sampling import AT_ONCE, Sampling
from rankfold.models.base.base import Base
from rankfold.models.base.load import load_base, load_tuned
from rankfold.models.base.memory import free_memory_bytes
from rankfold.models.messages.images import image_paths, image_prompt
from rankfold.models.messages.prompt import TemplateMessage, prompt_encoder
from rankfold.models.messages.turn import turn_form

CACHE_SHARE = 0.4  # of the free memory, for keys and values: while they move there are some of them twice
Conversation = Sequence[TemplateMessage]


def reply(
    base: Base,
    messages: Conversation,
    sampling: Sampling,
    write: Callable[[str], object] | None = None,
) -> str:
    """The model's answer to a conversation that ends with the user's turn.

    The prompt's tokens are those of training (see ``PromptEncoder``); words that spell a control token stay
    words.  For a model tuned on running text (``prompt_style`` "plain") the last message is continued as it
    stands.  A model that sees images gets those that stand in the messages' contents as parts
    ``{"type": "image", "path": ...}``.  ``write`` gets the answer piece by piece as it comes; a search with
    beams (see ``Sampling.options``) comes whole at the end.  Raises DataError."""
    with answerer(base, sampling, at_once=1) as ready:
        return ready.reply(messages, sampling.seed, write)


def replies(base: Base, conversations: Sequence[Conversation], sampling: Sampling) -> list[str]:
    """The words of ``answer_all``."""
    return [answer.text for answer in answer_all(base, conversations, sampling)]


def answer_all(base: Base, conversations: Sequence[Conversation], sampling: Sampling) -> list[Answer]:
    """The answers to ``conversations``, in their order.  Raises DataError if one cannot be given."""
    found = list(answers(base, conversations, sampling))
    if problem := next((answer.problem for answer in found if answer.problem), ""):
        raise DataError(problem)
    return found


def answers(
    model: Base | str | Path,
    prompts: Iterable[str | Conversation],
    sampling: Sampling | None = None,
    at_once: int = AT_ONCE,
) -> Iterator[Answer]:
    """The answers to ``prompts``, in their order, up to ``at_once`` at a time; prompts are taken as they are
    needed, so there may be any number of them.

    ``model``: one that is loaded, an adapter's folder, or a base's name (see ``find_base``).  A prompt is a
    conversation, as for ``reply``, or a text: the user's turn, or what a model of running text goes on with.
    One that cannot be answered gives an Answer with the finish reason "error".

    With a temperature of 0 an answer is the same whatever stands beside it, but for the rounding of sums in
    another order.  So is one that is drawn: its random numbers hang on ``sampling.seed``, on the prompt's
    tokens, and on how many prompts with the same tokens came before."""
    base = model if isinstance(model, Base) else _loaded(model)
    kept: dict[int, Answer] = {}
    place = 0
    for ended, answer in in_turn(base, enumerate(map(_question, prompts)), sampling or Sampling(), at_once):
        kept[ended] = answer
        while place in kept:
            yield kept.pop(place)
            place += 1


def in_turn(
    base: Base,
    questions: Iterable[tuple[int, Question]],
    sampling: Sampling,
    at_once: int = AT_ONCE,
    write: Callable[[str], object] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Numbers of questions with their answers, in the order in which these end."""
    with answerer(base, sampling, at_once) as ready:
        yield from ready.in_turn(questions, sampling.seed, write)


class Answerer:
    """Get it from ``answerer``."""

    def __init__(self, base: Base, sampling: Sampling, at_once: int) -> None:
        self.base, self.sampling, self.stops = base, sampling, stops_of(base)
        self.loop: Loop | None = None
        settled = sampling.settled(base.model)
        if settled is not None and not why_not(base, sampling):
            self.loop = loop_for(base.model, at_once)
        self.manner = Manner(base.tokenizer, self.stops, settled or sampling)

    def reply(self, messages: Conversation, seed: int, write: Callable[[str], object] | None = None) -> str:
        """As the function ``reply``."""
        [(_, answer)] = self.in_turn([(0, Question(messages))], seed, write)
        if answer.problem:
            raise DataError(answer.problem)
        return answer.text

    def in_turn(
        self,
        questions: Iterable[tuple[int, Question]],
        seed: int,
        write: Callable[[str], object] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Numbers of questions with their answers, in the order in which these end."""
        missing: list[tuple[int, Answer]] = []
        for found in self._answered(self._asked(questions, seed, write, missing)):
            yield from missing
            missing.clear()
            yield found
        yield from missing

    def _answered(self, asked: Iterator[tuple[int, Asked]]) -> Iterator[tuple[int, Answer]]:
        if self.loop is not None:
            return self.loop.run(asked)
        return ((n, by_transformers.answer(self.base, each, self.sampling, self.stops)) for n, each in asked)

    def _asked(
        self,
        questions: Iterable[tuple[int, Question]],
        seed: int,
        write: Callable[[str], object] | None,
        missing: list[tuple[int, Answer]],
    ) -> Iterator[tuple[int, Asked]]:
        """The questions as tokens; those that cannot be asked are added to ``missing``."""
        alike: Counter[bytes] = Counter()
        for number, question in questions:
            try:
                ids, seen = prompt_of(self.base, question)
            except DataError as error:
                missing.append((number, Answer.missing(str(error))))
                continue
            digest = sha256(repr(ids).encode()).digest()[:8]
            alike[digest] += 1
            yield number, Asked(ids, seen, f"{seed}/{digest.hex()}/{alike[digest]}", self.manner, write)


@contextmanager
def answerer(base: Base, sampling: Sampling, at_once: int = AT_ONCE) -> Iterator[Answerer]:
    """Within the block ``base`` is ready to answer again and again: what the last answer's prompt began with
    is not read anew.  Nothing of the model may be changed meanwhile."""
    with answering(base.model):
        yield Answerer(base, sampling, at_once)


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Within the block ``model`` is ready to answer: without dropout, its products made for few rows."""
    was_training = model.training
    model.eval()
    try:
        with fast_products(model):
            yield
    finally:
        model.train(was_training)


def loop_for(model: Any, at_once: int) -> Loop:
    """The loop for a model that is ``answering``, in a share of the memory that is free."""
    guesses = GUESSED if pays(GUESSED + 1) else 0
    return Loop(model, at_once, CACHE_SHARE * free_memory_bytes(model.device), guesses)


def _question(prompt: str | Conversation) -> Question:
    return Question([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def _loaded(name: str | Path) -> Base:
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    return load_tuned(name) if is_adapter else load_base(str(name))


def prompt_of(base: Base, question: Question) -> tuple[list[int], dict[str, Any]]:
    messages, tools = question.messages, question.tools
    encoder = prompt_encoder(base.tokenizer)
    if base.prompt_style == "plain":
        return encoder.text_ids(messages[-1]["content"]), {}
    if base.processor is not None:
        return image_prompt(base.processor, messages, tools)
    if image_paths(messages):
        raise DataError("the messages hold images, and this model cannot see them")
    return encoder.prompt_ids(messages, tools), {}


def stops_of(base: Base) -> frozenset[int]:
    """The tokens that end an answer: those that training teaches, and those that the model names itself."""
    own = base.model.generation_config.eos_token_id
    taught = (
        {base.tokenizer.eos_token_id}
        if base.prompt_style == "plain"
        else turn_form(prompt_encoder(base.tokenizer)).stop_ids
    )
    return frozenset({*taught, *(own if isinstance(own, list) else [own])} - {None})

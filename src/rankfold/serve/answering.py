"""What is done for a chat or a completion, from the request to the last byte of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from rankfold.models.answering.answer import Answer
from rankfold.models.answering.asked import Asked, Manner
from rankfold.models.answering.sampling import Sampling
from rankfold.serve import asking
from rankfold.serve.bending import bend_of, benders_of
from rankfold.serve.calls import CallForm, Tools, call_form
from rankfold.serve.engine import Engine
from rankfold.serve.refusing import RefusedError
from rankfold.serve.replies import GoneError, Piece, Replies, Reply
from rankfold.serve.schema import Answered, ChatRequest, CompletionRequest
from rankfold.serve.speakers import Speaker, Speakers
from rankfold.serve.telling import DONE, ChatStream, ChatTold, TextTold, sent, usage_of

T = TypeVar("T")
CLOSED = 499  # nginx's status for a client that has gone; nobody reads it


@dataclass
class Desk:
    """Takes requests: ``sampling`` says how answers are drawn where a request does not.  What is read and
    tokenised is so by one thread, as tokenizers are not made for several."""

    engine: Engine
    speakers: Speakers
    sampling: Sampling
    answer_s: float
    clerk: ThreadPoolExecutor

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        speaker = self.speakers.find(asked.model)
        makes, calls = await self._by_clerk(lambda: self._chat_asked(speaker, asked))
        tools = _offered(asked)
        told = ChatTold("chat.completion", speaker, asking.wants_logprobs(asked), calls=calls, tools=tools)
        replies = Replies(self.engine, makes, self.answer_s)
        if asked.stream:
            return _stream(self._chat_events(told, replies, asked, request))
        answers = await _all(replies, request)
        return _gone() if answers is None else JSONResponse(told.whole(replies.all, answers))

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        speaker = self.speakers.find(asked.model)
        prompts, makes = await self._by_clerk(lambda: self._completion_asked(speaker, asked))
        told = TextTold("text_completion", speaker, asking.wants_logprobs(asked), per_prompt=asked.n or 1)
        if asked.echo:
            told.echoed = [speaker.base.tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in prompts]
        replies = Replies(self.engine, makes, self.answer_s)
        if asked.stream:
            return _stream(self._text_events(told, replies, asked, request))
        answers = await _all(replies, request)
        return _gone() if answers is None else JSONResponse(told.whole(replies.all, answers))

    async def _by_clerk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.clerk, work)

    def _chat_asked(
        self, speaker: Speaker, asked: ChatRequest
    ) -> tuple[list[Callable[[Reply], Asked]], CallForm | None]:
        prompt = asking.chat_prompt(speaker, asked)
        calls = call_form(speaker.base.tokenizer) if _offered(asked) else None
        if _offered(asked) and calls is None:
            told = "the model's chat template has no place for calls of tools, or one that is not known here"
            raise RefusedError(400, told, param="tools")
        return self._makes(speaker, asked, [prompt]), calls

    def _completion_asked(
        self, speaker: Speaker, asked: CompletionRequest
    ) -> tuple[list[asking.Prompt], list[Callable[[Reply], Asked]]]:
        prompts = asking.completion_prompts(speaker, asked)
        return prompts, self._makes(speaker, asked, prompts)

    def _makes(
        self, speaker: Speaker, asked: Answered, prompts: Sequence[asking.Prompt]
    ) -> list[Callable[[Reply], Asked]]:
        """What makes the question of each answer, once its reply is there."""
        sampling = asking.sampling_of(self.sampling, speaker, asked, prompts)
        verbatim = isinstance(asked, CompletionRequest)
        manner = Manner(speaker.base.tokenizer, speaker.stops, sampling, speaker.adapter, verbatim)
        likeliest, streams = asking.likeliest_of(asked), bool(asked.stream)
        if sampling.logprobs:
            speaker.words  # noqa: B018 - made here once, not while others wait
        return [
            _asked_of(prompt, seed, manner, benders_of(speaker, asked), (likeliest, streams))
            for prompt in prompts
            for seed in asking.seeds_of(asked, prompt[0], self.sampling)
        ]

    async def _chat_events(
        self, told: ChatTold, replies: Replies, asked: ChatRequest, request: Request
    ) -> AsyncIterator[bytes]:
        streams = [ChatStream(told, reply) for reply in replies.all]
        answers: dict[int, Answer] = {}
        for stream in streams:
            yield sent(stream.begun())
        async for number, what in _events(replies, request):
            if isinstance(what, Piece):
                chunks = streams[number].piece(what)
            else:
                answers[number] = what
                chunks = streams[number].ended(what)
            for chunk in chunks:
                yield sent(chunk)
        if asked.stream_options and asked.stream_options.include_usage:
            yield sent(
                {**told.head(True), "choices": [], "usage": usage_of(_in_order(answers), len(answers))}
            )
        yield DONE

    async def _text_events(
        self, told: TextTold, replies: Replies, asked: CompletionRequest, request: Request
    ) -> AsyncIterator[bytes]:
        answers: dict[int, Answer] = {}
        shown = [told.echo(reply.number) for reply in replies.all]
        for number, text in enumerate(shown):
            if text:
                yield sent(told.chunk(number, text, None, []))
        written = [0] * len(shown)
        async for number, what in _events(replies, request):
            if isinstance(what, Piece):
                written[number] += len(what.text)
                yield sent(told.chunk(number, what.text, None, what.drawn))
            else:
                answers[number] = what
                rest = what.text[written[number] :]
                yield sent(told.chunk(number, rest, what.finish_reason, replies.all[number].rest()))
        if asked.stream_options and asked.stream_options.include_usage:
            yield sent(
                {**told.head(True), "choices": [], "usage": usage_of(_in_order(answers), told.per_prompt)}
            )
        yield DONE


def _offered(asked: ChatRequest) -> Tools:
    """The tools that may be called, with what each is given."""
    offered = (asked.tools or []) if asked.tool_choice != "none" else []
    return {tool.function.name: tool.function.parameters for tool in offered}


def _asked_of(
    prompt: asking.Prompt, seed: str, manner: Manner, benders: list[Any], told: tuple[int, bool]
) -> Callable[[Reply], Asked]:
    likeliest, streams = told

    def make(reply: Reply) -> Asked:
        def hear(drawn: Any) -> None:
            if manner.sampling.logprobs:
                reply.hear(drawn)
            for each in benders:
                each.hear(drawn)

        return Asked(
            *prompt,
            seed,
            manner,
            write=reply.write if streams else None,
            hear=hear if benders or manner.sampling.logprobs else None,
            gone=lambda: reply.is_gone,
            bend=bend_of(benders),
            likeliest=likeliest,
        )

    return make


async def _all(replies: Replies, request: Request) -> list[Answer] | None:
    """The answers in their order; None if the client has gone."""
    found: dict[int, Answer] = {}
    async for number, what in _events(replies, request):
        if isinstance(what, Answer):
            found[number] = what
    return _in_order(found) if len(found) == len(replies.all) else None


def _in_order(found: Mapping[int, Answer]) -> list[Answer]:
    return [found[number] for number in sorted(found)]


async def _events(replies: Replies, request: Request) -> AsyncIterator[tuple[int, Piece | Answer]]:
    """What comes until the client goes, after which nothing does."""
    gone: asyncio.Future[object] = asyncio.ensure_future(_disconnected(request))
    try:
        with suppress(GoneError):
            async for event in replies.events(gone):
                yield event
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _stream(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(_with_errors(events), media_type="text/event-stream")


async def _with_errors(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield event
    except RefusedError as error:
        yield sent(error.body())


def _gone() -> Response:
    return Response(status_code=CLOSED)

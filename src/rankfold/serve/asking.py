"""From a client's request to what the loop is asked."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankfold.data.reading.row import Row
from rankfold.data.shapes.asked import question_of
from rankfold.errors import DataError
from rankfold.models.answering.answerable import context_of
from rankfold.models.answering.answers import prompt_of
from rankfold.models.answering.sampling import Sampling
from rankfold.serve.refusing import RefusedError
from rankfold.serve.schema import Answered, ChatRequest, CompletionRequest
from rankfold.serve.speakers import Speaker

Prompt = tuple[list[int], dict[str, Any]]
IMAGE_TYPES = (
    "data:image/png;base64,",
    "data:image/jpeg;base64,",
    "data:image/webp;base64,",
    "data:image/gif;base64,",
)
TOO_LONG = "context_length_exceeded"
MOST_WRITTEN = 100_000
MOST_UNASKED = 4096  # tokens of an answer where neither the request nor the server says how many


def chat_prompt(speaker: Speaker, asked: ChatRequest) -> Prompt:
    """The tokens of a conversation, as the model met them in training, and what is read of its images.
    Raises RefusedError."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="rankfold-images-")))
        turns = [_turn(message.model_dump(exclude_none=True), folder) for message in asked.messages]
        values: dict[str, Any] = {"messages": turns}
        if asked.tools and asked.tool_choice != "none":
            values["tools"] = [tool.model_dump(exclude_none=True) for tool in asked.tools]
        try:
            question = question_of(Row(values, "the request"))
            return prompt_of(speaker.base, question)
        except (DataError, ValueError) as error:
            raise RefusedError(400, str(error), param="messages") from error


def _turn(turn: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A message with its images in files; what only a sent answer holds is left out."""
    for name in ("annotations", "audio", "refusal"):
        turn.pop(name, None)
    turn.setdefault("content", "")
    if isinstance(turn["content"], list):
        turn["content"] = [_part(part, folder) for part in turn["content"]]
    return turn


def _part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    if part["type"] != "image_url":
        text = part.get("text", part.get("refusal"))
        if text is None:
            raise RefusedError(400, f"a part of type {part['type']} has no text", param="messages")
        return {"type": "text", "text": text}
    url = part.get("image_url", {}).get("url", "")
    if not url.startswith(IMAGE_TYPES):
        kinds = "data:image/png;base64,... (or jpeg, webp, gif)"
        raise RefusedError(400, f"an image must be {kinds}: this server fetches nothing", param="messages")
    try:
        content = base64.b64decode(url.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RefusedError(400, f"an image's base64 is broken: {error}", param="messages") from error
    path = folder / f"image{len(list(folder.iterdir()))}"
    path.write_bytes(content)
    return {"type": "image", "path": str(path)}


def completion_prompts(speaker: Speaker, asked: CompletionRequest) -> list[Prompt]:
    """The tokens of each prompt.  In a text the model's control tokens are what they spell: who completes
    texts writes the template by hand.  Raises RefusedError."""
    given = asked.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    prompts: Sequence[Any] = given if several else [given]
    return [(_completion_ids(speaker, prompt), {}) for prompt in prompts]


def _completion_ids(speaker: Speaker, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = speaker.base.tokenizer(prompt, verbose=False)["input_ids"]
        return ids
    vocabulary = speaker.base.model.get_input_embeddings().weight.shape[0]
    if wrong := [token for token in prompt if token >= vocabulary]:
        raise RefusedError(
            400, f"the model has {vocabulary:,} tokens, and {wrong[0]} is none", param="prompt"
        )
    return prompt


def sampling_of(given: Sampling, speaker: Speaker, asked: Answered, prompts: Sequence[Prompt]) -> Sampling:
    """How the answers are drawn: as the request says, else as the server was started with.  Raises
    RefusedError if there is no room for an answer."""
    context, longest = context_of(speaker.base.model), max(len(ids) for ids, _ in prompts)
    if longest >= context:
        told = f"the prompt has {longest:,} tokens, and the model reads and writes {int(context):,}"
        raise RefusedError(400, told, TOO_LONG, "messages" if isinstance(asked, ChatRequest) else "prompt")
    limited = "max_new_tokens" in given.model_fields_set
    most = given.max_new_tokens if limited else int(min(context - longest, MOST_UNASKED))
    wanted = asked.max_tokens
    if isinstance(asked, ChatRequest):
        wanted = asked.max_completion_tokens or asked.max_tokens
    said = {
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": None if asked.top_k is None else max(0, asked.top_k),
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "stop": None if asked.stop is None else tuple(asked.stop),
    }
    changed = {name: value for name, value in said.items() if value is not None}
    counted = min(wanted or most, given.max_new_tokens if limited else MOST_WRITTEN)
    return given.model_copy(update=changed | {"max_new_tokens": counted, "logprobs": wants_logprobs(asked)})


def wants_logprobs(asked: Answered) -> bool:
    if isinstance(asked, CompletionRequest):
        return asked.logprobs is not None
    return isinstance(asked, ChatRequest) and bool(asked.logprobs or asked.top_logprobs)


def likeliest_of(asked: Answered) -> int:
    if isinstance(asked, CompletionRequest):
        return asked.logprobs or 0
    return (asked.top_logprobs or 0) if isinstance(asked, ChatRequest) else 0


def seeds_of(asked: Answered, prompt: list[int], given: Sampling) -> list[str]:
    """A text for each answer to a prompt: the same for the same seed and prompt."""
    seed: int | str | None = asked.seed
    if seed is None:
        seed = given.seed if "seed" in given.model_fields_set else secrets.token_hex(16)
    digest = sha256(repr(prompt).encode()).hexdigest()[:16]
    return [f"{seed}/{digest}/{number}" for number in range(1, (asked.n or 1) + 1)]

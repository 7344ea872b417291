"""Which stretches of a conversation are trained, found by construction.

For each trained turn the template is asked twice: for the text after which the assistant speaks, and for the
same text with the turn.  The turn is what the second adds to the first, so the prompt is by construction the
one that the model sees when it is asked.  Nothing is searched for in the text but the end of the words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankfold.data.shapes.example import Example, Message
from rankfold.errors import DataError
from rankfold.models.messages.images import ImageReader, image_paths
from rankfold.models.messages.prompt import PromptEncoder, TemplateMessage, squeeze
from rankfold.models.messages.template import Conversation, Rendering, render_all
from rankfold.models.messages.turn import Form, cut_turn, opening_of, reply_of, turn_form

END_OF_THOUGHT = "</think>"
TrainOn = Literal["assistant", "last", "all"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One trained turn: ``prompt`` is all that stands before it, ``answer`` its words and its end token.

    ``images`` are the files of the images that the prompt has a mark for."""

    prompt: str
    answer: str
    images: tuple[Path, ...] = ()


def find_turns(
    examples: Sequence[Example],
    encoder: PromptEncoder,
    train_on: TrainOn,
    reader: ImageReader | None = None,
) -> list[list[Turn] | DataError]:
    """The trained turns of each conversation in their order, or why it cannot be trained on."""
    form = turn_form(encoder)
    asked = [_to_render(example, encoder, train_on, reader) for example in examples]
    done = render_all(encoder.tokenizer, (one for one in asked if isinstance(one, Conversation)))
    return [_turns(one, next(done), encoder, form) if isinstance(one, Conversation) else one for one in asked]


def trained_places(messages: Sequence[Message], train_on: TrainOn) -> list[int]:
    """The places of the messages that are trained.  A message's own flag outranks ``train_on``.

    With "all" it is the last assistant's, and what stands before it is trained too.
    Raises DataError if there is none, or for a flag that cannot be obeyed."""
    if train_on == "all" and any(message.train is False or message.weight != 1 for message in messages):
        raise DataError(
            "a message is flagged not to be trained, or to count more or less than others, but everything is "
            "to be trained; drop one or the other"
        )
    assistants = [place for place, message in enumerate(messages) if message.role == "assistant"]
    by_default = assistants if train_on == "assistant" else assistants[-1:]
    chosen = []
    for place, message in enumerate(messages):
        if message.role != "assistant" and message.train and train_on != "all":
            raise DataError(
                f"message {place + 1} is flagged to be trained, but it is of the role {message.role}; "
                "flag assistants' turns only"
            )
        wanted = place in by_default if message.train is None or train_on == "all" else message.train
        if message.role == "assistant" and wanted:
            chosen.append(place)
    if not chosen:
        raise DataError("no assistant turn in this row is to be trained")
    if chosen[0] == 0:  # nothing was asked, so it is read and not learnt
        del chosen[0]
    if not chosen:
        raise DataError("the assistant speaks first and nobody answers, so there is no prompt to learn from")
    return chosen


def _to_render(
    example: Example, encoder: PromptEncoder, train_on: TrainOn, reader: ImageReader | None
) -> Conversation | DataError:
    try:
        if reader is None and any(message.images for message in example.messages):
            raise DataError("the row has images, and a text model cannot read them")
        if any(message.images and message.role == "assistant" for message in example.messages):
            raise DataError("an assistant's turn holds an image, and no model here can write one")
        places = trained_places(example.messages, train_on)
        for place in places:
            if not squeeze(example.messages[place].text) and not example.messages[place].tool_calls:
                raise DataError(f"message {place + 1}: the assistant says nothing")
        # The longest first: one that is too long is found out before all the shorter ones are rendered.
        renders = [pair for place in reversed(places) for pair in ((place + 1, False), (place, True))]
        messages: Sequence[TemplateMessage] = [message.for_template() for message in example.messages]
        messages = messages if reader is None else reader.tidied(messages)
        return encoder.shield(Conversation(messages, renders, example.tools))
    except DataError as error:
        return error


def _turns(
    asked: Conversation, rendered: list[Rendering] | DataError, encoder: PromptEncoder, form: Form
) -> list[Turn] | DataError:
    if isinstance(rendered, DataError):
        return rendered
    turns = []
    try:
        for (count, _), after, before in zip(asked.renders[::2], rendered[::2], rendered[1::2], strict=True):
            message = asked.messages[count - 1]
            prompt, reply = reply_of(before, after, encoder.spelling)
            spoken, stop = cut_turn(reply, message, encoder.spelling)
            opening = opening_of(spoken, message)
            if not message.get("tool_calls") and opening not in form.openings:
                raise DataError(f"the chat template puts words into the assistant's mouth: {opening[:80]!r}")
            turns.append(Turn(prompt, spoken + stop, tuple(image_paths(asked.messages[: count - 1]))))
        _check_prompt(asked, turns[0].prompt)
    except DataError as error:
        return error
    return turns[::-1]


def _check_prompt(asked: Conversation, prompt: str) -> None:
    """Raise DataError if the template drops what somebody says, or writes it in another order; a system
    message that opens the conversation may stand anywhere (Mistral's stands before the last question).
    Thoughts of earlier turns may be dropped, be they in a field of their own or in the words."""
    written, at = squeeze(prompt), 0
    for place, message in enumerate(asked.messages[: asked.renders[0][0] - 1], start=1):
        words = message["content"]
        parts = [words] if isinstance(words, str) else [part["text"] for part in words if "text" in part]
        if message["role"] == "assistant":
            parts = [part.rpartition(END_OF_THOUGHT)[2] for part in parts]
        for part in parts:
            spellings = [squeeze(part)]
            if message["role"] == "tool":  # which templates may write as JSON
                spellings += [squeeze(json.dumps(part, ensure_ascii=plain)[1:-1]) for plain in (False, True)]
            opens = place == 1 and message["role"] == "system"
            ends = [written.find(text, at) + len(text) for text in spellings if text in written[at:]]
            if not ends:
                how = "moves" if any(text in written for text in spellings) else "leaves out"
                raise DataError(f"the chat template {how} message {place}, of the role {message['role']}")
            at = 0 if opens else min(ends)
    for tool in asked.tools:
        name = str(tool.get("function", tool).get("name", ""))
        if squeeze(name) not in written:
            raise DataError(f"the chat template leaves out the tool {name!r}; it may have no place for tools")

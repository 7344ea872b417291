"""``Example``: what every row of data becomes, whatever file and shape it came in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rankfold.models.messages.prompt import TemplateMessage

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["chat", "text", "preference", "feedback"]


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a message: where its file is (a path already joined to the data file's folder)."""

    path: Path


Part = str | Image


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.  ``parts`` are text and images in the order in which they were written.

    ``train`` says whether this turn is trained on; None leaves it to the run (assistants' turns are);
    ``weight`` how much the loss of each of its tokens counts.
    ``tool_calls`` are OpenAI's: objects with ``function: {name, arguments}``, arguments parsed."""

    role: Role
    parts: tuple[Part, ...]
    train: bool | None = None
    weight: float = field(default=1.0, repr=False)  # no part of what a row is known by: see ``fingerprint``
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """The words alone."""
        if len(self.parts) == 1 and isinstance(self.parts[0], str):  # as most have it
            return self.parts[0]
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))

    def for_template(self) -> TemplateMessage:
        """The message as chat templates read it: content as text, or as a list of parts if it has images."""
        content: Any = self.text
        if self.images:
            content = [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "path": str(part.path)}
                for part in self.parts
            ]
        named = {
            "name": self.name,
            "reasoning_content": self.reasoning,
            "tool_calls": list(self.tool_calls),
            "tool_call_id": self.tool_call_id,
        }
        return {
            "role": self.role,
            "content": content,
            **{key: value for key, value in named.items() if value},
        }


@dataclass(frozen=True, slots=True)
class Example:
    """One row.  ``kind`` says which fields count:

    * chat: ``messages`` (the last is an assistant's), ``tools``
    * text: ``text``
    * preference: ``messages`` end with the chosen answer; ``rejected`` are the turns in its place
    * feedback: ``messages``, and ``desirable`` says whether the last answer is a good one (KTO)

    ``label`` is the class of a classification row, which is a chat whose answer is the label."""

    origin: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None
    label: str | None = None

    @property
    def kind(self) -> Kind:
        if self.rejected:
            return "preference"
        if self.desirable is not None:
            return "feedback"
        return "chat" if self.messages else "text"

    @property
    def prompt(self) -> list[TemplateMessage]:
        """What is asked: everything before the last turn, or the text's first few words."""
        if self.messages:
            return [message.for_template() for message in self.messages[:-1]]
        return [{"role": "user", "content": " ".join(self.text.split()[:4])}]

    @property
    def answer(self) -> str:
        return self.messages[-1].text if self.messages else self.text

"""What a line means that somebody types in a chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rankfold.errors import DataError, OutputError, nearest
from rankfold.files import write_whole
from rankfold.models.answering.answers import Answerer
from rankfold.models.base.several import BASE, Voice
from rankfold.models.messages.images import content_of, size_of

HELP = {
    "/use NAME ...": "who answers from now on, several side by side",
    "/base": "the base alone answers",
    "/image FILE": "shows one with the next message",
    "/system TEXT": "what the model is told first; begins anew",
    "/history": "prints the conversation",
    "/save FILE": "writes it as rows to train on; /load FILE goes on with it",
    "/reset": "forgets it",
    '"""': "begins and ends a message of several lines",
    "/quit": "or Ctrl-D ends",
}
Message = dict[str, Any]


class Speaking(Protocol):
    """Who answers in a chat; one that ``sees`` can be shown images."""

    @property
    def sees(self) -> bool: ...

    def reply(self, messages: Sequence[Message], seed: int, write: Callable[[str], object]) -> str:
        """The answer, of which ``write`` gets the pieces.  Raises DataError."""


@dataclass(frozen=True)
class Spoken:
    """A voice of a model that is loaded here."""

    voice: Voice
    answerer: Answerer

    @property
    def sees(self) -> bool:
        return self.voice.base.processor is not None

    def reply(self, messages: Sequence[Message], seed: int, write: Callable[[str], object]) -> str:
        with self.voice.speaking():
            return self.answerer.reply(messages, seed, write)


class Session:
    """Conversations with ``voices``, one for each, the base the first; ``say`` prints a piece of text as it
    is."""

    def __init__(self, voices: Mapping[str, Speaking], seed: int, say: Callable[[str], object]) -> None:
        self.voices, self.say = voices, say
        self.base = next(iter(voices))
        self.speaking = [next((name for name in voices if name != self.base), self.base)]
        self.seed, self.system = seed, ""
        self.images: list[Path] = []
        self.messages: dict[str, list[Message]] = {name: [] for name in voices}
        self.commands: dict[str, Callable[[str], object]] = {
            "/use": self._use,
            "/base": lambda _: self._use(self.base),
            "/image": self._show,
            "/system": self._tell,
            "/history": lambda _: self._print(),
            "/save": self._save,
            "/load": self._load,
            "/reset": lambda _: self._reset(),
            "/help": lambda _: self.say("".join(f"{name:14} {told}\n" for name, told in HELP.items())),
        }

    def take(self, line: str) -> None:
        """A command or a message.  Raises DataError or OutputError for one that cannot be done."""
        word, _, rest = line.partition(" ")
        if word in self.commands:
            self.commands[word](rest.strip())
        elif line.strip():
            self._ask(line)

    def _ask(self, text: str) -> None:
        content, self.images = content_of(text, self.images), []
        for name in self.speaking:
            if len(self.speaking) > 1:
                self.say(f"{name}> ")
            asked = [*self.messages[name], {"role": "user", "content": content}]
            told = [{"role": "system", "content": self.system}] if self.system else []
            answer = self.voices[name].reply([*told, *asked], self.seed, self.say)
            self.say("\n")
            self.messages[name] = [*asked, {"role": "assistant", "content": answer}]
        self.seed += 1  # otherwise a question asked again would draw the same random numbers again

    def _use(self, names: str) -> None:
        asked = [self.base if name == BASE else name for name in names.replace(",", " ").split()]
        for name in asked:
            if name not in self.voices:
                there = ", ".join(self.voices)
                raise DataError(f"nobody is called {name!r}{nearest(name, self.voices)}; there are {there}")
        self.speaking = list(dict.fromkeys(asked)) or self.speaking
        self.say(f"answering: {', '.join(self.speaking)}\n")

    def _show(self, name: str) -> None:
        if not name:
            raise DataError("/image wants the file of an image")
        if not self.voices[self.base].sees:
            raise DataError(f"{name}: this model cannot see images")
        size_of(Path(name))
        self.images.append(Path(name))

    def _tell(self, text: str) -> None:
        self.system = text
        self._reset()

    def _reset(self) -> None:
        self.images = []
        self.messages = {name: [] for name in self.voices}

    def _print(self) -> None:
        for name in self.speaking:
            for message in self.messages[name]:
                self.say(f"{name if message['role'] == 'assistant' else 'you'}> {message['content']}\n")

    def _save(self, name: str) -> None:
        path = Path(name)
        if not name or path.exists():
            raise OutputError(f"/save wants the name of a new file, and got {name or 'none'}")
        told = [{"role": "system", "content": self.system}] if self.system else []
        rows = [
            {"messages": [*told, *said], "answered_by": who}
            for who, said in self.messages.items()
            if said and who in self.speaking
        ]
        write_whole(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        self.say(f"written  {path}\n")

    def _load(self, name: str) -> None:
        try:
            rows = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines() if line]
            found = {row.get("answered_by"): [_message(each) for each in row["messages"]] for row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"/load {name}: no conversation that was saved: {error}") from error
        one = next(iter(found.values()), [])
        for who in self.voices:
            said = found.get(who, one if who in self.speaking else [])
            self.system = next((m["content"] for m in said if m["role"] == "system"), self.system)
            self.messages[who] = [message for message in said if message["role"] != "system"]
        self._print()


def _message(value: Any) -> Message:
    if value["role"] not in ("system", "user", "assistant") or not isinstance(value["content"], str | list):
        raise ValueError(f"{value!r:.60} is no message")
    return {"role": value["role"], "content": value["content"]}

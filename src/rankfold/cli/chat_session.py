"""What a line means that somebody types in a chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankfold.errors import DataError, OutputError, nearest
from rankfold.files import write_whole
from rankfold.models.answering.answers import Answerer
from rankfold.models.answering.sampling import Sampling
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


class Session:
    """Conversations with ``voices``, one for each; ``say`` prints a piece of text as it is."""

    def __init__(
        self,
        voices: Mapping[str, Voice],
        answerers: Mapping[str, Answerer],
        sampling: Sampling,
        say: Callable[[str], object],
    ) -> None:
        self.voices, self.answerers, self.say = voices, answerers, say
        self.speaking = [next((name for name in voices if name != BASE), BASE)]
        self.seed, self.system = sampling.seed, ""
        self.images: list[Path] = []
        self.messages: dict[str, list[Message]] = {name: [] for name in voices}
        self.commands: dict[str, Callable[[str], object]] = {
            "/use": self._use,
            "/base": lambda _: self._use(BASE),
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
            with self.voices[name].speaking():
                answer = self.answerers[name].reply([*told, *asked], self.seed, self.say)
            self.say("\n")
            self.messages[name] = [*asked, {"role": "assistant", "content": answer}]
        self.seed += 1  # otherwise a question asked again would draw the same random numbers again

    def _use(self, names: str) -> None:
        asked = names.replace(",", " ").split()
        for name in asked:
            if name not in self.voices:
                there = ", ".join(self.voices)
                raise DataError(f"nobody is called {name!r}{nearest(name, self.voices)}; there are {there}")
        self.speaking = list(dict.fromkeys(asked)) or self.speaking
        self.say(f"answering: {', '.join(self.speaking)}\n")

    def _show(self, name: str) -> None:
        base = self.voices[BASE].base
        if not name:
            raise DataError("/image wants the file of an image")
        if base.processor is None:
            raise DataError(f"{name}: {base.source.name} cannot see images")
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

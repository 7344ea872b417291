"""A GGUF file with the Modelfile that Ollama makes a model of.

Ollama does not read the file's own template: it has Go's language for them, in which a template that puts
every turn between the same words can be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankfold.errors import ConfigError
from rankfold.export.gguf_adapter import ADAPTER, write_gguf_pairs
from rankfold.export.gguf_model import MODEL, write_gguf_model
from rankfold.export.opened import open_adapter
from rankfold.export.request import ExportRequest
from rankfold.export.written import Written
from rankfold.files import write_whole
from rankfold.models.answering.answers import stops_of
from rankfold.models.base.base import Base

MODELFILE = "Modelfile"
ROLES = ("system", "user", "assistant")
TEXTS = dict(zip(ROLES, ("<<S>>", "<<U>>", "<<A>>"), strict=True))
NOT_TRIED = "Ollama was not run: the file was tried in {}, and the template compared with the model's own"


@dataclass(frozen=True)
class Turns:
    """What a text begins with; what stands before and after a turn, by its role; what begins an answer; and
    what the system is told where nobody says anything."""

    begin: str
    before: dict[str, str]
    after: dict[str, str]
    answer: str
    usual: str = ""

    @classmethod
    def of(cls, tokenizer: Any) -> Turns:
        """Raises ConfigError for a template that is more than that."""
        try:
            turns = _turns(tokenizer)
        except Exception as error:  # a template may refuse a conversation, in whatever way
            raise ConfigError(f"Ollama cannot say this chat template turn by turn: {error}") from error
        if any(mark in turns.in_go().replace("{{ ", "") for mark in ("{{", '"""')):
            raise ConfigError("Ollama cannot say this chat template: it holds marks of Go's own templates")
        for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
            messages = [{"role": role, "content": f"{role} said"} for role in roles]
            if turns.rendered(messages) != _rendered(tokenizer, messages, True):
                raise ConfigError(
                    f"Ollama cannot say this chat template, which does more with {', '.join(roles)}"
                )
        return turns

    def rendered(self, messages: Sequence[dict[str, str]]) -> str:
        """What Ollama makes of a conversation that ends with the user's turn."""
        if self.usual and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.usual}, *messages]
        turns = (self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages)
        return self.begin + "".join(turns) + self.answer

    def in_go(self) -> str:
        """In the language of Go's text/template, without spaces of its own."""
        said = {role: f"{self.before[role]}{{{{ .Content }}}}" for role in ROLES}
        last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        return (
            f"{self.begin}{{{{ range $i, $_ := .Messages }}}}{last}"
            f'{{{{ if eq .Role "system" }}}}{said["system"]}{self.after["system"]}'
            f'{{{{ else if eq .Role "user" }}}}{said["user"]}{self.after["user"]}'
            f'{{{{ else if eq .Role "assistant" }}}}{said["assistant"]}'
            f"{{{{ if not $last }}}}{self.after['assistant']}{{{{ end }}}}{{{{ end }}}}"
            f'{{{{ if and (ne .Role "assistant") $last }}}}{self.answer}{{{{ end }}}}{{{{ end }}}}'
        )


def write_for_ollama(adapter: Path, asked: ExportRequest, folder: Path) -> Written:
    """Write the merged model, or for "ollama-adapter" the adapter alone, and the Modelfile over it."""
    alone = asked.to == "ollama-adapter"
    opened = open_adapter(adapter, asked)
    base = opened.base
    file = asked.gguf_base or base.source.gguf_file
    if alone and file is None:
        raise ConfigError("an adapter alone needs its base as a GGUF file: name it with --gguf-base")
    turns = None if base.prompt_style == "plain" else Turns.of(base.tokenizer)
    written = (write_gguf_pairs if alone else write_gguf_model)(adapter, asked, folder)
    parts = [f"FROM {file}", f"ADAPTER ./{ADAPTER}"] if alone else [f"FROM ./{MODEL}"]
    write_whole(folder / MODELFILE, "\n".join([*parts, *_said(turns), *_parameters(base)]) + "\n")
    told = [
        NOT_TRIED.format("llama.cpp, where that is at hand"),
        "make it: ollama create NAME -f Modelfile, in the folder",
    ]
    return replace(written, notes=[*written.notes, *told])


def _said(turns: Turns | None) -> list[str]:
    if turns is None:
        return ['TEMPLATE """{{ .Prompt }}"""']
    usual = [f'SYSTEM """{turns.usual}"""'] if turns.usual else []
    return [f'TEMPLATE """{turns.in_go()}"""', *usual]


def _parameters(base: Base) -> list[str]:
    words = base.tokenizer.convert_ids_to_tokens(sorted(stops_of(base)))
    given = base.model.generation_config
    drawn = {
        "temperature": given.temperature,
        "top_p": given.top_p,
        "top_k": given.top_k,
        "repeat_penalty": given.repetition_penalty,
    }
    own = [f"PARAMETER {name} {value}" for name, value in drawn.items() if value is not None]
    return [*(f'PARAMETER stop "{word}"' for word in words), *own]


def _turns(tokenizer: Any) -> Turns:
    user, answer, system = (
        {"role": role, "content": TEXTS[role]} for role in ("user", "assistant", "system")
    )
    begun, whole = (_rendered(tokenizer, [user], ask) for ask in (True, False))
    after_user = whole.partition(TEXTS["user"])[2]
    opened = begun.partition(TEXTS["user"])[2].removeprefix(after_user)
    between, _, rest = _rendered(tokenizer, [user, answer, user], False).partition(TEXTS["assistant"])
    after_answer = _rendered(tokenizer, [user, answer], False).partition(TEXTS["assistant"])[2]
    before_user = rest.removeprefix(after_answer).partition(TEXTS["user"])[0]
    before_answer = between.partition(TEXTS["user"])[2].removeprefix(after_user)
    first, _, told = _rendered(tokenizer, [system, user], False).partition(TEXTS["system"])
    after_system = told.partition(TEXTS["user"])[0].removesuffix(before_user)
    begun_with = whole.partition(TEXTS["user"])[0].removesuffix(before_user)
    begin = begun_with if first.startswith(begun_with) else ""
    usual = "" if begin else begun_with.removeprefix(first).removesuffix(after_system)
    first = first.removeprefix(begin)
    before = {"system": first, "user": before_user, "assistant": before_answer}
    after = {"system": after_system, "user": after_user, "assistant": after_answer}
    return Turns(begin, before, after, opened, usual)


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], asking: bool) -> str:
    """The text, without the token of the beginning that the tokenizer puts before a text anyway."""
    made: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asking)
    bos = tokenizer.bos_token
    return (
        made.removeprefix(bos) if bos and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else made
    )

"""Rendering chat templates, in a process of their own that can be killed.

A template is code from a model's folder.  jinja2's sandbox keeps it from Python's insides, but not from
running for ever or filling the memory; see ``template_worker`` for the limits.  One worker serves this
process for as long as it lives; conversations go to it in batches, because a message costs more than a
rendering."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.errors import DataError, ModelError
from rankfold.models.messages.plain_template import PLAIN_NAME, PLAIN_TEMPLATES

TemplateMessage = dict[str, Any]  # role, content, and what else a template may read

RENDER_SECONDS = 1.0  # of processor time; an ordinary rendering takes a ten thousandth of it
BATCH_CONVERSATIONS = 256  # in one message to the worker
BATCH_CHARACTERS = 4_000_000
MAX_CHARACTERS = 8_000_000  # of a conversation as JSON, which writes up to six for a letter
WORKER = Path(__file__).with_name("template_worker.py")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What to render.  ``renders`` are pairs: how many of ``messages``, and whether the text shall end
    where the assistant begins to speak."""

    messages: Sequence[TemplateMessage]
    renders: Sequence[tuple[int, bool]]
    tools: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered text; ``marked`` is where its last ``{% generation %}`` block begins and ends."""

    text: str
    marked: tuple[int, int] | None = None


def template_of(tokenizer: Any, tools: bool = False) -> tuple[str, str]:
    """Name and text of the chat template: the tokenizer's own (named ""), or a plain one if it has none.

    Of several templates it is the one for tools, if there are tools, or the default."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("tool_use" if tools and "tool_use" in own else "default")
        if own is None:
            raise ModelError(f"none of the chat templates {sorted(tokenizer.chat_template)} is the default")
    if not own and getattr(tokenizer, "eos_token", "") is None:
        raise ModelError(
            f"{getattr(tokenizer, 'name_or_path', '') or 'the model'} has no chat template (in GGUF "
            "tokenizer.chat_template), and no token that ends a text (tokenizer.ggml.eos_token_id): name "
            "that token with --eos-token"
        )
    return ("", own) if own else (PLAIN_NAME, PLAIN_TEMPLATES[PLAIN_NAME])


def render_all(
    tokenizer: Any, conversations: Iterable[Conversation]
) -> Iterator[list[Rendering] | DataError]:
    """For each conversation its renderings in the order of ``renders``, or the template's complaint.

    Raises ModelError if the template breaks a limit so badly that the worker had to be killed."""
    both = [template_of(tokenizer, tools) for tools in (False, True)]
    request: dict[str, Any] = {
        "templates": [text for _, text in both],
        "variables": {name: str(text) for name, text in tokenizer.special_tokens_map.items() if text},
    }
    shown = both[0][0] or f"of {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
    for batch in _batches(conversations):
        asked = [one for one in batch if isinstance(one, str)]
        text = f'{json.dumps(request)[:-1]}, "conversations": [{", ".join(asked)}]}}'
        lines = iter(_WORKER.ask(text, len(asked), shown))
        for one in batch:
            yield one if isinstance(one, DataError) else _read(next(lines), shown)


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[str | DataError]]:
    """The conversations as JSON, in groups of a size that the worker can hold."""
    batch: list[str | DataError] = []
    characters = 0
    for conversation in conversations:
        text = json.dumps(
            {
                "template": int(bool(conversation.tools)),
                "messages": [_with_old_names(message) for message in conversation.messages],
                "tools": list(conversation.tools),
                "renders": list(conversation.renders),
            }
        )
        fits = len(text) <= MAX_CHARACTERS
        batch.append(
            text if fits else DataError(f"a conversation of {len(text):,} bytes is too long to render")
        )
        characters += len(text) * fits
        if len(batch) == BATCH_CONVERSATIONS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _with_old_names(message: TemplateMessage) -> TemplateMessage:
    """gpt-oss's template reads the reasoning under another name; transformers passes both as well."""
    return message | {"thinking": message["reasoning_content"]} if "reasoning_content" in message else message


def _read(line: bytes, shown: str) -> list[Rendering] | DataError:
    answer = json.loads(line)
    if isinstance(answer, dict):
        return DataError(f"the chat template {shown} refuses the conversation: {answer['error']}")
    return [Rendering(text, tuple(marked) if marked else None) for text, marked in answer]


class _Worker:
    """The process: started when it is first asked, and anew if it was killed or this process was forked."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, request: str, answers: int, shown: str) -> list[bytes]:
        """That many lines in answer to ``request``.  Raises ModelError naming the template if the worker
        dies of it."""
        with self.lock:
            if self.process is not None and self.process.poll() is not None:
                self._end()
            if self.process is None:
                self.process = _start()
            pipe_in, pipe_out = self.process.stdin, self.process.stdout
            assert pipe_in is not None
            assert pipe_out is not None
            try:
                _write(pipe_in, request.encode() + b"\n")
                lines = [pipe_out.readline() for _ in range(answers)]
            except BrokenPipeError:
                lines = [b""]
            except BaseException:  # such as Ctrl-C: what is under way would be read as the next answer
                self._end(kill=True)
                raise
            if all(line.endswith(b"\n") for line in lines):
                return lines
            status = self._end()
        raise ModelError(f"the chat template {shown} was stopped: {_reason(status)}")

    def close(self) -> None:
        """End the process, if there is one."""
        with self.lock:
            if self.process is not None:
                self._end()

    def forget(self) -> None:
        """In a forked child: leave the parent's worker to the parent."""
        self.lock = threading.Lock()
        if self.process is not None:
            self.process.returncode = 0  # it is not this process's child, so there is nothing to wait for
            self._end()

    def _end(self, kill: bool = False) -> int:
        process, self.process = self.process, None
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        if kill:
            process.kill()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()


def _write(pipe: Any, content: bytes) -> None:
    """Past the buffer: what stood in it would be written again by a child that is forked meanwhile."""
    rest = memoryview(content)
    while rest:
        rest = rest[pipe.raw.write(rest) :]


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", str(WORKER), str(RENDER_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us; the worker ends when we do
    )


def _reason(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"one conversation took it longer than {RENDER_SECONDS:g} s"
    return f"its process ended with status {status}, probably for want of memory"


_WORKER = _Worker()
atexit.register(_WORKER.close)
os.register_at_fork(after_in_child=_WORKER.forget)

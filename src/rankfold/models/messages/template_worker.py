"""The process in which chat templates run: a program, started by ``template`` and never imported.

It imports jinja2 and the standard library only.  A template is code from a model's folder: it runs in
jinja2's sandbox with transformers' settings, under limits that the kernel enforces on this process.
One line of JSON in: ``{"templates": [...], "variables": {...}, "conversations": [{"template", "messages",
"tools", "renders"}, ...]}``.  ``template`` is a place in ``templates``, and ``renders`` are pairs: how many
messages, and add_generation_prompt.  For each conversation one line out: ``[[text, marked], ...]``, or
``{"error": reason}``; ``marked`` is where the last ``{% generation %}`` block begins and ends in the text,
or null."""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

OUTPUT_CHARACTERS = 1_000_000  # of one rendering
CONVERSATION_CHARACTERS = 64_000_000  # of all renderings of one conversation
MEMORY_BYTES = 512 * 1024**2
# The day on which every template believes it is run: with the real one, the same rows would give other
# tokens tomorrow.  It is the day that Llama 3's templates fall back on when they have no clock.
TODAY = datetime(2024, 7, 26)


class RefusedError(Exception):
    """The template, or a limit, refuses this conversation."""


class Marks(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``, transformers' marks around the assistant's words."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text: str = caller()
        PROGRESS.marked = (PROGRESS.length, PROGRESS.length + len(text))
        return text


class Progress:
    """How far the rendering is."""

    length = 0
    marked: tuple[int, int] | None = None


PROGRESS = Progress()


class SafeNamespace(jinja2.utils.Namespace):
    """A ``namespace()`` without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


class PlainDict:
    """``dict`` without its other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> None:
    raise RefusedError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Marks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": TODAY.strftime,
        "dict": PlainDict(),
        "namespace": SafeNamespace,
    }
    return environment.from_string(template)


def render(template: str, values: dict[str, Any], seconds: float) -> tuple[str, tuple[int, int] | None]:
    """The text, and the place of its last marked block.  Ends this process if it takes too long."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # the signal that ends it kills; nothing can catch it
    PROGRESS.length, PROGRESS.marked = 0, None
    blocks = []
    for block in compiled(template).generate(values):
        blocks.append(block)
        PROGRESS.length += len(block)
        if PROGRESS.length > OUTPUT_CHARACTERS:
            raise RefusedError(f"it writes more than {OUTPUT_CHARACTERS:,} characters")
    text, marked = "".join(blocks), PROGRESS.marked
    signal.setitimer(signal.ITIMER_PROF, 0)
    return text, marked


def answer(request: dict[str, Any], conversation: dict[str, Any], seconds: float) -> Any:
    """All renderings of one conversation, or why there are none."""
    done, length = [], 0
    try:
        for count, for_reply in conversation["renders"]:
            values = {
                **request["variables"],
                "messages": conversation["messages"][:count],
                "tools": conversation["tools"] or None,
                "documents": None,
                "add_generation_prompt": for_reply,
            }
            done.append(render(request["templates"][conversation["template"]], values, seconds))
            length += len(done[-1][0])
            if length > CONVERSATION_CHARACTERS:
                raise RefusedError(f"the conversation takes more than {CONVERSATION_CHARACTERS:,} characters")
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES // 1024**2} MB of memory"}
    except RecursionError:
        return {"error": "it calls itself without an end"}
    except Exception as error:  # a template can raise whatever Python can
        named = "" if isinstance(error, RefusedError) else f"{type(error).__name__}: "
        return {"error": f"{named}{error}"[:500]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return done


def main(seconds: float) -> None:
    """Serve, with so much processor time for a rendering, until standard input ends: then the other side is
    gone."""
    with suppress(ValueError, OSError):  # not every system limits the address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for conversation in request["conversations"]:
            sys.stdout.write(json.dumps(answer(request, conversation, seconds)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))

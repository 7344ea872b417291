"""Turning messages into the text a model reads, with the tokenizer's own chat template."""

from __future__ import annotations

from typing import Any

from rankfold.errors import ModelError

TemplateMessage = dict[str, Any]  # role, content, and what else a template may read


def require_chat_template(tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ModelError(
            "this model has no chat template, so messages cannot be rendered; "
            "use an instruct model, or rows with one text column"
        )


def render(tokenizer: Any, messages: list[TemplateMessage], *, for_reply: bool = False) -> str:
    """The conversation as text; with ``for_reply`` it ends where the assistant begins to speak."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_reply)
    return text

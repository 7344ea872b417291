"""What a user says of a base's tokens: which ends a text, and which of rows are tokens and not words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankfold.errors import ConfigError, DataError, bullet_list, nearest
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.messages.prompt import prompt_encoder
from rankfold.models.messages.template import Conversation, render_all


def with_tokens(tokenizer: Any, eos_token: str, as_tokens: Sequence[str]) -> Any:
    """``tokenizer`` with ``eos_token`` as its end of text, if given, and with ``as_tokens``, special tokens
    of the model, as words like any other: where a text spells them they are tokens, and answers show them.

    Raises ConfigError for a token that the vocabulary does not have, or that opens or ends turns: users'
    text must not."""
    problems = []
    if eos_token and eos_token not in tokenizer.get_vocab():
        problems.append(
            f"eos_token: {eos_token!r} is no token of the model{nearest(eos_token, _special(tokenizer))}"
        )
    elif eos_token:
        tokenizer.eos_token = eos_token
    known = _special(tokenizer)
    kept = _of_turns(tokenizer) if as_tokens and not problems else set()
    for word in as_tokens:
        if word not in known:
            problems.append(f"as_tokens: {word!r} is no special token of the model{nearest(word, known)}")
        elif word in kept:
            problems.append(f"as_tokens: {word!r} opens or ends turns or texts, which no row may do")
    if problems:
        raise ConfigError(bullet_list("the model's tokens cannot be taken so:", problems))
    return _as_words(tokenizer, {*as_tokens}) if as_tokens else tokenizer


def _special(tokenizer: Any) -> list[str]:
    return sorted(prompt_encoder(tokenizer).control)


def _of_turns(tokenizer: Any) -> set[str]:
    """The tokens that the template writes around turns, and those of the tokenizer's own roles."""
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}] * 2
    [rendered] = render_all(tokenizer, [Conversation(turns, [(len(turns), False)])])
    written = "" if isinstance(rendered, DataError) else rendered[0].text
    roles = {str(getattr(tokenizer, f"{role}_token")) for role in ("bos", "eos", "pad", "unk")}
    return roles | {*prompt_encoder(tokenizer).spelling.findall(written)}


def _as_words(tokenizer: Any, words: set[str]) -> Any:
    """Through its files: no tokenizer of transformers can unmake a special token."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder, quiet_transformers():
        tokenizer.save_pretrained(folder)
        whole, config = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
        content = json.loads(whole.read_text(encoding="utf-8"))
        for token in content["added_tokens"]:
            token["special"] = token["special"] and token["content"] not in words
        whole.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        config.write_text(
            json.dumps(_without(json.loads(config.read_text(encoding="utf-8")), words)), encoding="utf-8"
        )
        changed = AutoTokenizer.from_pretrained(folder)
    changed.name_or_path = tokenizer.name_or_path
    return changed


def _without(config: dict[str, Any], words: set[str]) -> dict[str, Any]:
    """A tokenizer's config in which ``words`` have no part."""

    def text(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    for token in config.get("added_tokens_decoder", {}).values():
        token["special"] = token.get("special", False) and token["content"] not in words
    for key in ("additional_special_tokens", "extra_special_tokens"):
        named = config.get(key)
        if isinstance(named, list):
            config[key] = [token for token in named if text(token) not in words]
        elif isinstance(named, dict):
            config[key] = {role: token for role, token in named.items() if text(token) not in words}
    return config

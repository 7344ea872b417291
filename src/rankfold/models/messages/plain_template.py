"""The chat template of a base model that has none.

A template once used never changes, because adapters are trained in it: a better one gets the next number."""

from __future__ import annotations

from rankfold.errors import ModelError

PLAIN_NAME = "rankfold-plain-1"

# Headings that are words to every tokenizer, and the model's own end-of-text token after an answer.
_PLAIN_1 = """\
{%- if tools %}{{ raise_exception('without a chat template there is no place for tools') }}{% endif -%}
{{- bos_token if bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('without a chat template there is no place for the role ' + message.role) -}}
{%- endif -%}
{{- '### ' + message.role | capitalize + ':\\n' + message.content -}}
{{- eos_token + '\\n\\n' if message.role == 'assistant' else '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""

PLAIN_TEMPLATES = {PLAIN_NAME: _PLAIN_1}


def plain_template(name: str) -> str:
    """The text of the template that an adapter names.  Raises ModelError if this rankfold has none such."""
    if name not in PLAIN_TEMPLATES:
        raise ModelError(
            f"the adapter was trained in the chat template {name!r}, which this rankfold does not have; "
            f"it has {', '.join(PLAIN_TEMPLATES)}.  Update rankfold"
        )
    return PLAIN_TEMPLATES[name]

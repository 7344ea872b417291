"""How InternVL 2.5 is spoken to (``conversation.py`` and ``preprocess_internvl2_5`` at 2410d1d).

A template once used never changes, because adapters are trained in it: a better one gets the next number."""

from __future__ import annotations

SYSTEM_PROMPT = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# A template that holds this comment belongs to a model that was never trained with that prompt.
NO_PROMPT = "{#- speaks without a system prompt -#}"
IMAGE_TOKEN = "<IMG_CONTEXT>"
# By the names under which the native processor asks its tokenizer for them.  Of a video's token it only
# asks that there is one; the vocabulary has none to spare, and the image's end stands in no prompt by itself.
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE_TOKEN,
    "video_token": "</img>",
}

# Images at a message's beginning stand on a line of their own, as ``chat`` writes them; others stay where
# they are.  The image token is written once, and made as many as the image's tiles need afterwards.
_BODY_1 = """\
{%%- if tools %%}{{ raise_exception('InternVL has no place for tools') }}{%% endif -%%}
{%%- if messages[0].role != 'system' -%%}
{{- '<|im_start|>system\\n%s<|im_end|>\\n' -}}
{%%- endif -%%}
{%%- for message in messages -%%}
{%%- if message.role not in ['system', 'user', 'assistant'] -%%}
{{- raise_exception('InternVL has no place for the role ' + message.role) -}}
{%%- endif -%%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%%- if message.content is string -%%}
{{- message.content -}}
{%%- else -%%}
{%%- set place = namespace(first=true) -%%}
{%%- for part in message.content -%%}
{%%- if part.type == 'image' -%%}
{{- '<IMG_CONTEXT>' -}}
{%%- set next = loop.nextitem.text if loop.nextitem is defined and loop.nextitem.type == 'text' else '' -%%}
{%%- if place.first and not next.startswith('\\n') -%%}{{- '\\n' -}}{%%- endif -%%}
{%%- else -%%}
{{- part.text -}}
{%%- set place.first = false -%%}
{%%- endif -%%}
{%%- endfor -%%}
{%%- endif -%%}
{{- '<|im_end|>\\n' -}}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{- '<|im_start|>assistant\\n' -}}{%%- endif -%%}
"""


def chat_template(opens_with_bos: bool) -> str:
    """The chat template; InternLM2's tokenizers open every text with their first token, Qwen2's do not."""
    opening = "{{- bos_token -}}\n" if opens_with_bos else ""
    return opening + _BODY_1 % SYSTEM_PROMPT

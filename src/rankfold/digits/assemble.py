"""A small model that sees images, put together from a language model, a fresh tower and a fresh projector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.compat import name_special_tokens, tiling_image_processor
from rankfold.models.base.base import Base
from rankfold.models.base.processors import without_video
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.internvl.chat import IMAGE_TOKEN, IMAGE_TOKENS, NO_PROMPT

# ChatML without a system prompt of its own: a row is short, and short rows are what makes it fast.
TEMPLATE = (
    NO_PROMPT
    + """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{{- '<IMG_CONTEXT>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)
SHUFFLE = 2  # InternVL's projector takes so many patches in each direction as one token
GREY_MEAN, GREY_STD = [0.5] * 3, [0.5] * 3


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The size of a vision tower: a small ViT, trained from nothing."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    image_side: int = 32
    patch_side: int = 4

    @property
    def image_tokens(self) -> int:
        return (self.image_side // self.patch_side // SHUFFLE) ** 2


def assemble(language: Base, tower: Tower, folder: Path, seed: int) -> None:
    """Write to ``folder`` an InternVL in transformers' native layout that speaks with ``language``, whose
    weights and tokens stay what they are, and sees with an untrained ``tower`` and projector."""
    with quiet_transformers():
        processor = _processor(language.tokenizer, tower)
        torch.manual_seed(seed)
        model = _model(language.model, processor.tokenizer, tower)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def _processor(tokenizer: Any, tower: Tower) -> Any:
    from transformers import InternVLProcessor

    names = list(dict.fromkeys(IMAGE_TOKENS.values()))
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    name_special_tokens(tokenizer, IMAGE_TOKENS)
    tokenizer.chat_template = TEMPLATE
    images = tiling_image_processor(
        size={"height": tower.image_side, "width": tower.image_side},
        image_mean=GREY_MEAN,
        image_std=GREY_STD,
        crop_to_patches=False,
        min_patches=1,
        max_patches=1,
    )
    kind = without_video(InternVLProcessor)
    processor = kind(image_processor=images, tokenizer=tokenizer, image_seq_length=tower.image_tokens)
    processor.chat_template = TEMPLATE
    return processor


def _model(language: Any, tokenizer: Any, tower: Tower) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = language.config.to_dict()
    config = InternVLConfig(
        text_config=text,
        vision_config={
            "hidden_size": tower.width,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "intermediate_size": 4 * tower.width,
            "image_size": [tower.image_side, tower.image_side],
            "patch_size": [tower.patch_side, tower.patch_side],
            "initializer_range": tower.width**-0.5,
            "layer_scale_init_value": 1.0,  # 0.1 is for many layers
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=tower.image_tokens,
        downsample_ratio=1 / SHUFFLE,
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    model: Any = InternVLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.generation_config = language.generation_config
    _start_well(model)
    return model.eval()


@torch.no_grad()
def _start_well(model: Any) -> None:
    """Tell patches apart by their place from the start, and speak to the language model as loudly as its
    own tokens do."""
    embeddings = model.get_input_embeddings().weight
    places = model.model.vision_tower.embeddings.position_embeddings
    places.normal_(std=0.5)
    projector = model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    loudness = embeddings.std()
    projector.linear_2.weight *= loudness / 0.6  # what GELU leaves of a unit normal

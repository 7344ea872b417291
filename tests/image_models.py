"""Tiny random models that see images, of other families than InternVL, each with its processor."""

from __future__ import annotations

from typing import Any

import torch

from image_bases import byte_tokenizer

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 290,
    "eos_token_id": 291,
    "pad_token_id": 291,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 28,
    "patch_size": 7,
}
TURNS = {290: "<|im_start|>", 291: "<|im_end|>"}
FAMILIES = ("qwen2_5_vl", "llava", "gemma3", "smolvlm", "idefics3")


def template(image: str) -> str:
    """A ChatML template that writes ``image`` for an image."""
    return (
        "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
        "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
        "{%- for part in message.content -%}"
        f"{{{{- '{image}' if part.type == 'image' else part.text -}}}}"
        "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )


def tiny_image_model(family: str) -> tuple[Any, Any]:
    """A model of ``family`` with random weights, and its processor (None for SmolVLM's, which needs the
    package num2words)."""
    from transformers import AutoModelForImageTextToText

    config, processor = globals()[f"_{family}"]()
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval(), processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from rankfold.models.base.processors import without_video

    words = {292: "<|vision_start|>", 293: "<|vision_end|>", 294: "<|image_pad|>", 295: "<|video_pad|>"}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tower = {
        **{"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32},
        **{"patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [1]},
    }
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=tower,
        vision_start_token_id=292,
        vision_end_token_id=293,
        image_token_id=294,
        video_token_id=295,
    )
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 6})
    tokenizer = byte_tokenizer(TURNS | words)
    tokenizer.chat_template = template("<|vision_start|><|image_pad|><|vision_end|>")
    return config, without_video(Qwen2_5_VLProcessor)(image_processor=images, tokenizer=tokenizer)


def _llava() -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
        image_token_index=299,
        image_seq_length=16,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer = byte_tokenizer({**TURNS, 299: "<image>"})
    tokenizer.chat_template = template("<image>\\n")
    return config, LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _gemma3() -> tuple[Any, Any]:
    from transformers import Gemma3Config, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    config = Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 32},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        eoi_token_index=297,
        boi_token_index=298,
        image_token_index=299,
        mm_tokens_per_image=4,
    )
    names = {
        "eoi_token": "<end_of_image>",
        "boi_token": "<start_of_image>",
        "image_token": "<image_soft_token>",
    }
    words = dict(zip((297, 298, 299), names.values(), strict=True))
    tokenizer = byte_tokenizer(TURNS | words, extra_special_tokens=names)
    tokenizer.chat_template = template("<start_of_image>")
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    return config, Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=4)


def _smolvlm() -> tuple[Any, Any]:
    from transformers import SmolVLMConfig

    text = {"model_type": "llama", **TEXT}
    return SmolVLMConfig(text_config=text, vision_config=VISION, image_token_id=299, scale_factor=2), None


def _idefics3() -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    words = {297: "<fake_token_around_image>", 298: "<global-img>", 299: "<image>"}
    tokenizer = byte_tokenizer(TURNS | words | dict(enumerate(places, start=300)))
    tokenizer.chat_template = template("<image>")
    config = Idefics3Config(
        text_config={"model_type": "llama", **TEXT},
        vision_config=VISION,
        image_token_id=299,
        scale_factor=2,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return config, Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=4)

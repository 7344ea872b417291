"""GGUF files of architectures that only transformers knows how to read.

Their logits were not compared with llama.cpp's, and that is said.  What transformers would leave out in
silence is refused: scaled positions, tensors without a place, and parameters without a tensor."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from rankfold.errors import ModelError, bullet_list
from rankfold.models.base.quiet import quiet_transformers
from rankfold.models.gguf.architectures import ARCHITECTURES, TENSORS_APART
from rankfold.models.gguf.file import GgufFile
from rankfold.models.gguf.tokenizer import KINDS, gguf_tokenizer, special_ids


def other_text_side(file: GgufFile) -> tuple[Any, Any, list[str]]:
    """Config, tokenizer and what a user should know.  Raises ModelError, and what transformers raises."""
    scaled = [key for key in file.keys if ".rope.scal" in key and not key.endswith(("finetuned", "length"))]
    scaled += [name for name in file.tensors if name in TENSORS_APART]
    if scaled:
        text = f"scaled positions of a {file.architecture} in GGUF cannot be read:"
        raise ModelError(bullet_list(text, [f"{file.path.name} has {name}" for name in scaled]))
    with quiet_transformers():
        from transformers import AutoConfig, AutoTokenizer

        options = {"gguf_file": file.path.name}
        config = AutoConfig.from_pretrained(file.path.parent, **options)
        if file.keys.get("tokenizer.ggml.model") in KINDS:
            tokenizer = gguf_tokenizer(file)
            for name, value in special_ids(tokenizer, file).items():
                setattr(config, name, value)
        else:
            tokenizer = AutoTokenizer.from_pretrained(file.path.parent, **options)
    compared = ", ".join(ARCHITECTURES)
    told = f"{file.architecture} is read by transformers; compared with llama.cpp are {compared}"
    return config, tokenizer, [told]


def other_model(file: GgufFile) -> Any:
    """The model in float32.  Raises ModelError, and what transformers raises."""
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        kind: Any = AutoModelForCausalLM
        options = {"gguf_file": file.path.name, "dtype": torch.float32, "output_loading_info": True}
        model, found = kind.from_pretrained(file.path.parent, **options)
    problems = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    read = sum(prod(tensor.shape) for tensor in file.tensors.values())
    taken = sum(parameter.numel() for parameter in model.parameters())
    if read != taken and not problems:
        problems = [f"its tensors hold {read:,} numbers, and the model has {taken:,}"]
    if problems:
        raise ModelError(
            bullet_list(f"{file.path.name} does not fit transformers' {file.architecture}:", problems)
        )
    model.hf_quantizer, model.is_quantized = None, False  # the weights are plain by now, and can be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model

"""What other libraries do not promise, each in one place: private names, and modules below their surface.

``tests/test_compat.py`` holds each library to what is expected here, so that a release which changes it is
seen there and not in what a run computes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

# Under these names torch's wrappers hold a module; they are no part of a path.
COMPILED = "_orig_mod"
FULLY_SHARDED = "_fsdp_wrapped_module"
WRAPPED = (COMPILED, FULLY_SHARDED, "_checkpoint_wrapped_module")
COMPILER = ("torch._dynamo", "torch._inductor")  # whose errors are about compiling, not about the model
HOOKED_FORWARD = "_old_forward"  # where accelerate's hooks keep the forward that they stand before


def is_compiled(module: Any) -> bool:
    return hasattr(module, COMPILED) or getattr(module, "_compiled_call_impl", None) is not None


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP's first version has put ``parameter`` into a flat one; within a forward it has not."""
    return hasattr(parameter, "_fsdp_flattened")


def looked_into() -> bool:
    """Whether something is at work that must see, or could not pass, the inside of an autograd function."""
    import torch

    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


def storage_place(tensor: Tensor) -> int:
    """The same for tensors that share memory, also on the meta device, as long as they live."""
    return int(tensor.untyped_storage()._cdata)


def softmax_gradient(gradient: Tensor, shares: Tensor) -> Tensor:
    """The gradient of what ``shares``, a softmax over the last dimension, was made of."""
    import torch

    return torch.ops.aten._softmax_backward_data(gradient, shares, -1, shares.dtype)  # type: ignore[no-any-return]


def fused_cpu_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention (rows, heads, tokens, features) by torch's kernel for CPUs, named by itself so that it
    is taken on the meta device too."""
    import torch

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, is_causal=True, scale=scale)[0]  # type: ignore[no-any-return]


def attention_of(config: Any) -> str | None:
    """transformers' name for how a model with this config attends."""
    found: str | None = getattr(config, "_attn_implementation", None)
    return found


def sdpa() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """transformers' attention by torch's kernel, and the function that makes the mask for it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    return sdpa_attention_forward, sdpa_mask


def recomputes_activations(model: Any) -> bool:
    """Whether a model of transformers is set to do so; by the new name where it has one: the old warns."""
    new = "is_activation_checkpointing"
    return getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing", False) is True


def in_backward() -> bool:
    """Whether what is computed now is part of a backward: activations that are recomputed."""
    import torch

    return torch._C._current_graph_task_id() != -1


def after_backward(call: Callable[[], None]) -> None:
    """Let ``call`` be made when the backward that goes on now is done."""
    import torch

    torch.autograd.Variable._execution_engine.queue_callback(call)


def layers_kept_whole(base: Any) -> set[str]:
    """The names of the classes that a model of transformers wants on one device: its decoder layers."""
    return {*(getattr(base, "_no_split_modules", None) or ())}


def image_text_model(config: Any) -> bool:
    """Whether transformers has an image-text-to-text model for this config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def processor_class(config: Any) -> type | None:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    return cast(type | None, PROCESSOR_MAPPING.get(type(config), None))


def tiling_image_processor(**options: Any) -> Any:
    """InternVL's image processor, which needs Pillow only."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(**options)


def name_special_tokens(tokenizer: Any, tokens: Mapping[str, str]) -> None:
    """Make ``tokenizer.image_token`` and the like what ``tokens`` says."""
    tokenizer._set_model_specific_special_tokens(tokens)


def earlier_names(model: Any) -> Mapping[str, str] | None:
    """Patterns of names that a model had in older releases of transformers, with what they became."""
    found: Mapping[str, str] | None = getattr(model, "_checkpoint_conversion_mapping", None)
    return found


def conversions(model: Any) -> list[Any]:
    """What transformers does to the tensors of older checkpoints of ``model``; nothing if it is no model of
    that library, which is not imported: it is there if the model is one of its own."""
    library: Any = sys.modules.get("transformers.conversion_mapping")
    if library is None or not hasattr(getattr(model, "config", None), "model_type"):
        return []
    return list(library.get_model_conversion_mapping(model, add_legacy=False))


def renames_one_by_one(model: Any) -> Callable[[str], str]:
    """transformers' own renaming of old checkpoint keys for ``model``."""
    steps = [
        step
        for step in conversions(model)
        if len(step.source_patterns) == 1 and not hasattr(step, "operations")
    ]

    def follow(key: str) -> str:
        for step in steps:
            key, _ = step.rename_source_key(key)
        return str(key)

    return follow


def names_in_checkpoints(model: Any, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """For each key of a checkpoint the name that ``model`` has for it, and whether its tensor is made of
    several."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    meta, prefix = model.state_dict(), model.base_model_prefix
    found = {}
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, prefix, meta)
        found[key] = (key, False) if key in meta else (name, converter is not None)
    return found


def safetensors_files(location: Any) -> list[str]:
    """The safetensors files of a model's folder, or of its repository on the hub."""
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    index = cached_file(location, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index:
        files: list[str] = get_checkpoint_shard_files(location, index)[0]
        return files
    return [str(cached_file(location, "model.safetensors"))]


def gguf_header(
    path: Path, words: bool = True
) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
    """The keys of a GGUF file, its tensors (name, shape in torch's order, number of the type, offset), and
    where in the file the tensors begin.

    gguf's own reader takes 15 times as long.  Without ``words`` lists of texts are told by their length.
    Raises ValueError, struct.error or UnicodeDecodeError."""
    from transformers.integrations.gguf import reader

    class Every:
        def __contains__(self, key: object) -> bool:
            return words

    content = reader._mapped(str(path))
    keys, count, place = reader._read_metadata(content, str(path), Every())
    tensors, place = reader._read_tensor_table(content, count, place)
    alignment = keys.get("general.alignment", 32)
    return keys, tensors, -(-place // alignment) * alignment


def unpack_four_bit(weight: Any) -> None:
    """Undo what bitsandbytes does to a 4-bit weight in a call without gradients on an AVX512-BF16 CPU.

    The bits come back as they were; the scales stay rounded to bfloat16, as the packed layer has them."""
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return
    library = importlib.import_module("bitsandbytes.functional")
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # else it would round the scales a second time, to 8 bits
    weight.data, weight.quant_state = library._convert_weight_packed_for_cpu_inverse(weight.data, state)
    weight.quant_state.absmax = scales  # without nesting it leaves them in the packed order

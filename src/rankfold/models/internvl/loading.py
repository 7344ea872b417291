"""Loading a folder of InternVL's original layout into transformers' native classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.compat import name_special_tokens, tiling_image_processor
from rankfold.errors import ModelError, bullet_list
from rankfold.models.base.processors import without_video
from rankfold.models.internvl.chat import IMAGE_TOKEN, IMAGE_TOKENS, chat_template
from rankfold.models.internvl.config import CHAT_DEFAULTS, is_internlm2, layout_of, native_config
from rankfold.models.internvl.names import Layout
from rankfold.models.internvl.tokenizer import MODEL_NAME, internlm2_tokenizer
from rankfold.models.internvl.weights import to_native

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TURN_END = "<|im_end|>"


def load_original(folder: Path, config: Any, dtype: Any) -> tuple[Any, Any]:
    """The model in ``dtype`` and the processor of a folder of the original layout, ``config`` its native one.

    The Python files in the folder are not looked at.  Raises ModelError naming all that is missing, of
    another shape, or has no place in the native classes."""
    from transformers import InternVLForConditionalGeneration

    processor = load_original_processor(folder, config)
    layout = layout_of(config.to_dict(), is_internlm2(read_config(folder)))
    state = dict(to_native(stored_tensors(folder), layout))
    kind: Any = InternVLForConditionalGeneration
    model, told = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, with all else that is wrong
    )
    wrong = [
        f"{fault.replace('_', ' ')}: {each}"
        for fault, found in told.items()
        for each in sorted(map(str, found))
    ]
    if wrong:
        raise ModelError(bullet_list(f"the weights in {folder} are not those of its config:", wrong))
    end_turns(model, processor)
    return model, processor


def end_turns(model: Any, processor: Any) -> None:
    """Let answers end where a turn does; the original config names no token for it."""
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(TURN_END)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def native_config_of(folder: Path) -> Any:
    """The native config of a folder of the original layout.  Raises ModelError (see ``native_config``)."""
    from transformers import InternVLConfig

    original = read_config(folder)
    tokenizer = load_original_tokenizer(folder)
    return InternVLConfig(**native_config(original, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))


def load_original_processor(folder: Path, config: Any, tokenizer_folder: Path | None = None) -> Any:
    """The native processor of a folder of the original layout; it cuts images as the original config says.
    The tokenizer may lie in another folder."""
    from transformers import InternVLProcessor

    images = image_processor_of(read_config(folder), config)
    tokenizer = load_original_tokenizer(tokenizer_folder or folder)
    kind = without_video(InternVLProcessor)
    processor = kind(image_processor=images, tokenizer=tokenizer, image_seq_length=config.image_seq_length)
    processor.chat_template = tokenizer.chat_template
    return processor


def image_processor_of(original: Mapping[str, Any], config: Any) -> Any:
    """What cuts images into tiles as the original config says, ``config`` being its native one."""
    chat = {**CHAT_DEFAULTS, **original}
    side = chat["force_image_size"] or config.vision_config.image_size[0]
    tiles = (chat["min_dynamic_patch"], chat["max_dynamic_patch"]) if chat["dynamic_image_size"] else (1, 1)
    return tiling_image_processor(
        size={"height": side, "width": side},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        crop_to_patches=chat["dynamic_image_size"],
        min_patches=tiles[0],
        max_patches=tiles[1],
    )


def load_original_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder of the original layout, with InternVL 2.5's chat template."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    has_json = (folder / "tokenizer.json").is_file()
    if (folder / MODEL_NAME).is_file() and not has_json:
        tokenizer = internlm2_tokenizer(folder)
    else:
        kind: Any = PreTrainedTokenizerFast if has_json else Qwen2Tokenizer
        tokenizer = kind.from_pretrained(folder)
    known = tokenizer.get_vocab()
    missing = [word for word in dict.fromkeys((*IMAGE_TOKENS.values(), TURN_END)) if word not in known]
    if missing:
        raise ModelError(f"the tokenizer in {folder} lacks InternVL's tokens {', '.join(missing)}")
    # Given to the constructor they would be added where they are missing.
    name_special_tokens(tokenizer, IMAGE_TOKENS)
    opening = tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = chat_template(opens_with_bos=bool(opening))
    return tokenizer


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the folder's safetensors files, one at a time.  Raises ModelError if there is none."""
    from safetensors import safe_open

    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                yield name, file.get_tensor(name)


@contextmanager
def native_readers(folder: Path, layout: Layout) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """What reads each tensor of the folder's files, by its native name; a fused one has three.

    Raises ModelError naming every tensor that no InternVL has."""
    from safetensors import safe_open

    with ExitStack() as stack:
        readers: dict[str, Callable[[], Tensor]] = {}
        for path in _weight_files(folder):
            file: Any = stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                shapes = [(name, torch.empty(file.get_slice(name).get_shape(), device="meta"))]
                readers |= {
                    native: partial(_read, file, name, native, layout)
                    for native, _ in to_native(shapes, layout)
                }
        yield readers


def _read(file: Any, name: str, native: str, layout: Layout) -> Tensor:
    return dict(to_native([(name, file.get_tensor(name))], layout))[native]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    else:
        files = [path.name for path in sorted(folder.glob("*.safetensors"))]
    paths = [folder / Path(name).name for name in files]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise ModelError(f"{folder} lacks its weights: {', '.join(missing) or 'no .safetensors file'}")
    return paths

"""transformers' processors, for images and text only: their video parts need torchvision."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from rankfold.compat import image_text_model, processor_class
from rankfold.errors import ModelError


def sees_images(config: Any) -> bool:
    """Whether transformers has an image-text-to-text model for this config."""
    return image_text_model(config) and hasattr(config, "vision_config")


def load_processor(location: str | Path, config: Any) -> Any:
    """The processor of a model folder or hub id, without its video part.

    Raises ModelError if transformers knows none for this model."""
    import transformers

    described, _ = transformers.ProcessorMixin.get_processor_dict(location)
    named = described.get("processor_class")
    kind = getattr(transformers, named, None) if isinstance(named, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.ProcessorMixin)):
        kind = processor_class(config)
    if kind is None:
        raise ModelError(f"transformers has no processor for a model of type {config.model_type!r}")
    return without_video(kind).from_pretrained(location)


def without_video(kind: Any) -> Any:
    """A processor class that is ``kind`` but for its video processor, and called the same."""
    parts = [name for name in kind.get_attributes() if name != "video_processor"]
    if parts == kind.get_attributes():
        return kind

    @wraps(kind.__init__)
    def init(self: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **{"video_processor": None, **options})

    # transformers reads from __init__'s code which settings of a file are the processor's.
    code = kind.__init__.__code__
    settings = {*code.co_varnames[1 : code.co_argcount]} - {"video_processor"}

    def known(processor_config: Any, valid_kwargs: Any) -> Any:
        return kind.validate_init_kwargs(processor_config, settings)

    own = {
        "__init__": init,
        "get_attributes": classmethod(lambda _: list(parts)),
        "validate_init_kwargs": staticmethod(known),
    }
    return type(kind.__name__, (kind,), own)


def most_tiles(processor: Any) -> int | None:
    """Into how many tiles an image is cut at most; None for a processor that does not count in tiles."""
    images: Any = getattr(processor, "image_processor", None)
    return int(images.max_patches) if hasattr(images, "max_patches") else None


def set_most_tiles(processor: Any, tiles: int) -> None:
    """Cut images into ``tiles`` at most from now on; 1 means that they are only resized.

    Raises ModelError for a processor that does not count in tiles."""
    if most_tiles(processor) is None:
        raise ModelError(f"a {type(processor).__name__} does not cut images into tiles that can be counted")
    cut_at_most(processor.image_processor, tiles)


def cut_at_most(images: Any, tiles: int) -> None:
    """The same for an image processor that counts in tiles."""
    images.max_patches, images.crop_to_patches = tiles, tiles > 1
    images.min_patches = min(images.min_patches, tiles)

"""Images in prompts: how many tokens one takes, and its pixels as the model wants them.

The template writes one placeholder an image; it is made into the image's own tokens before the text is
tokenised, by the model's processor, so that what is trained is what a server of that model reads."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.errors import DataError
from rankfold.models.base.processors import most_tiles
from rankfold.models.messages.prompt import TemplateMessage, prompt_encoder
from rankfold.models.messages.template import Conversation, render_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image as Picture
    from torch import Tensor

TEXT_NAMES = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
TYPE_NAMES = ("mm_token_type_ids", "token_type_ids")  # in which a model wants its image tokens marked
PROBE_SIDE = 64
KEPT_SIZES = 65536


@dataclass(frozen=True, slots=True)
class SizedImage:
    """An image's file and its size in pixels, which decides how many tokens it takes."""

    path: Path
    width: int
    height: int


class ImageReader:
    """Reads images for one processor.  Get it from ``image_reader``.

    ``tiles``: into how many an image is cut at most, None if it is not counted in tiles.
    ``image_ids``: the control tokens of which images are made; none of them is ever trained.
    ``type_name``: under which name the model wants a 1 at each token that an image feature replaces, and
    ``feature_ids`` are those tokens; empty for a model that does not ask."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tiles = most_tiles(processor)
        self.token: str = processor.image_token
        self._expansions: dict[tuple[int, int], str] = {}
        probed = self._probe(PROBE_SIDE, PROBE_SIDE)
        [ids] = probed["input_ids"]
        self.image_ids = prompt_encoder(processor.tokenizer).control_ids & {*ids}
        marks = {name: probed[name][0] for name in TYPE_NAMES if name in probed and any(probed[name][0])}
        self.type_name = next(iter(marks), "")
        self.feature_ids = {i for i, mark in zip(ids, marks.get(self.type_name, ids), strict=True) if mark}
        self._doubles_newlines: bool | None = None

    def look(self, path: Path) -> SizedImage:
        """Decode the image at ``path`` once.  Raises DataError if it is missing, broken or enormous."""
        return SizedImage(path, *size_of(path))

    def expansion(self, image: SizedImage) -> str:
        """The text that stands for an image in a prompt: a function of its size alone.

        Raises DataError if the model cannot take an image of that shape."""
        size = (image.width, image.height)
        if size not in self._expansions:
            if len(self._expansions) >= KEPT_SIZES:
                self._expansions.clear()
            try:
                self._expansions[size] = self._probe(*size)["text_replacement_offsets"][0][0]["replacement"]
            except (ValueError, ZeroDivisionError) as error:
                raise DataError(
                    f"{image.path}: the model cannot take an image of {size[0]} x {size[1]} pixels: {error}"
                ) from error
        return self._expansions[size]

    def expand(self, text: str, images: Sequence[SizedImage]) -> str:
        """A rendered text with the tokens of ``images`` in place of the template's marks.

        Raises DataError if the template has not written one mark an image."""
        parts = text.split(self.token)
        if len(parts) != len(images) + 1:
            raise DataError(
                f"the chat template writes {len(parts) - 1} places for images, and the row has {len(images)}"
            )
        between = [self.expansion(image) for image in images]
        return "".join(part for pair in zip(parts, [*between, ""], strict=True) for part in pair)

    def tidied(self, messages: Sequence[TemplateMessage]) -> Sequence[TemplateMessage]:
        """``messages`` for a template that writes a line feed of its own after an image: the one that
        follows an image in the text (LLaVA's ``<image>\\n``) is left out, so that there are not two."""
        if not any(isinstance(message["content"], list) for message in messages):
            return messages
        if self._doubles_newlines is None:
            self._doubles_newlines = self._adds_newline()
        return [_without_newline(message) for message in messages] if self._doubles_newlines else messages

    def pixels(self, images: Sequence[SizedImage]) -> dict[str, Tensor]:
        """The images as the model's inputs, one after another.

        Raises DataError for a file that is not what it was when it was looked at."""
        pictures = []
        for image in images:
            with _decoded(image.path) as picture:
                if picture.size != (image.width, image.height):
                    was = f"{image.width} x {image.height} to {picture.width} x {picture.height} pixels"
                    raise DataError(f"{image.path} has changed from {was} since the rows were read")
                pictures.append(picture.convert("RGB"))
        read = self.processor(text=[self.token * len(pictures)], images=pictures, return_tensors="pt")
        return {name: value for name, value in read.items() if name not in TEXT_NAMES}

    def types(self, ids: Iterable[int]) -> list[int]:
        """1 for each token that an image feature replaces, 0 for the others."""
        return [int(token in self.feature_ids) for token in ids]

    def _probe(self, width: int, height: int) -> Any:
        from PIL import Image

        blank = Image.new("RGB", (width, height))
        return self.processor(text=[self.token], images=[blank], return_text_replacement_offsets=True)

    def _adds_newline(self) -> bool:
        parts = [{"type": "image"}, {"type": "text", "text": "\nx"}]
        probe = Conversation([{"role": "user", "content": parts}], [(1, False)])
        [rendered] = render_all(self.processor.tokenizer, [probe])
        return not isinstance(rendered, DataError) and f"{self.token}\n\nx" in rendered[0].text


_READERS: weakref.WeakKeyDictionary[Any, ImageReader] = weakref.WeakKeyDictionary()


def image_reader(processor: Any) -> ImageReader:
    """The reader of a processor, made once as long as the count of tiles is not changed."""
    known = _READERS.get(processor)
    if known is None or known.tiles != most_tiles(processor):
        known = _READERS[processor] = ImageReader(processor)
    return known


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of the image at ``path``, as ``look`` gives them.  Raises DataError."""
    with _decoded(path) as picture:
        return picture.width, picture.height


def content_of(text: str, images: Sequence[Path]) -> str | list[dict[str, str]]:
    """A message's content that shows ``images`` before its ``text``."""
    shown = [{"type": "image", "path": str(path)} for path in images]
    return [*shown, {"type": "text", "text": text}] if shown else text


def image_paths(messages: Sequence[TemplateMessage]) -> list[Path]:
    """The files of the images in ``messages``, in their order."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [Path(part["path"]) for content in contents for part in content if part["type"] == "image"]


def image_prompt(
    processor: Any, messages: Sequence[TemplateMessage], tools: Sequence[dict[str, Any]] = ()
) -> tuple[list[int], dict[str, Tensor]]:
    """The tokens after which the assistant speaks, as in training, and the model's other inputs.

    An image is a part ``{"type": "image", "path": ...}`` of a message's content.  Raises DataError."""
    import torch

    reader, encoder = image_reader(processor), prompt_encoder(processor.tokenizer)
    images = [reader.look(path) for path in image_paths(messages)]
    asked = encoder.shield(Conversation(reader.tidied(messages), [(len(messages), True)], tools))
    [rendered] = render_all(processor.tokenizer, [asked])
    if isinstance(rendered, DataError):
        raise rendered
    ids = encoder.ids_now(encoder.cut(reader.expand(rendered[0].text, images)))
    inputs = reader.pixels(images) if images else {}
    if reader.type_name:
        inputs[reader.type_name] = torch.tensor([reader.types(ids)])
    return ids, inputs


def _without_newline(message: TemplateMessage) -> TemplateMessage:
    content = message["content"]
    if not isinstance(content, list):
        return message
    parts, after_image = [], False
    for part in content:
        if after_image and part["type"] == "text":
            part = part | {"text": part["text"].removeprefix("\n")}  # noqa: PLW2901
        after_image = part["type"] == "image"
        parts.append(part)
    return message | {"content": parts}


@contextmanager
def _decoded(path: Path) -> Iterator[Picture]:
    """The image at ``path``, all its pixels read.  Raises DataError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                yield picture
    except FileNotFoundError as error:
        raise DataError(f"no such image: {path}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is too large an image: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path} is no image that can be read, or a broken one: {error}") from error

"""Putting rows with images together: their pixels are read here, when a batch is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankfold.data.order.batches import MicroBatch, collate
from rankfold.errors import DataError
from rankfold.models.messages.images import ImageReader


def collate_images(rows: MicroBatch, pad_id: int, device: Any, reader: ImageReader) -> dict[str, Tensor]:
    """What ``collate`` gives, with the pixels of all images of ``rows`` and whatever else the model wants to
    know of them (``image_grid_thw``, say), under the names of the model's inputs.

    Rows without images go with rows that have some.  Raises DataError naming the row whose image can no
    longer be read."""
    batch = collate(rows, pad_id, device)
    if reader.type_name:
        types = [reader.types(ids) for ids in batch["input_ids"].tolist()]
        batch[reader.type_name] = torch.tensor(types, device=device)
    images = [image for row in rows for image in row.images]
    if not images:
        return batch
    try:
        pixels = reader.pixels(images)
    except DataError as error:
        origins = ", ".join(row.origin for row in rows if row.images)
        raise DataError(f"{origins}: {error}") from error
    return batch | {name: value.to(device) for name, value in pixels.items()}

"""What tells encoded rows from others."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from rankfold.data.tokens.cache import CachedRows
from rankfold.data.tokens.encode import EncodedRow


def rows_hash(rows: Sequence[EncodedRow]) -> str:
    """sha256 of tokens, labels and weights, and of the sizes of images."""
    digest = hashlib.sha256()
    if isinstance(rows, CachedRows):
        for numbers in rows.numbers():
            digest.update(numbers)
        return digest.hexdigest()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(array("q", row.input_ids).tobytes())
        digest.update(array("q", row.labels).tobytes())
        digest.update(array("d", array("f", row.weights or ())).tobytes())
        for image in row.images:  # their pixels are read in every epoch; here their size must do
            digest.update(f"{image.width} {image.height} {image.path.stat().st_size}".encode())
    return digest.hexdigest()

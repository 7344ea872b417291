"""The tensors of a checkpoint from one layout of InternVL to the other; no value is changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from rankfold.errors import ModelError, bullet_list
from rankfold.models.internvl.names import Layout


def to_native(tensors: Iterable[tuple[str, Tensor]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under its native name, fused ones as three; one is in memory at a time.

    Raises ModelError at the end, naming every tensor that no InternVL has."""
    unknown = []
    for name, tensor in tensors:
        names = layout.native(name)
        if not names:
            unknown.append(f"{name} {tuple(tensor.shape)}")
        elif len(names) == 1:
            yield names[0], tensor
        else:
            groups = layout.groups(name)
            if tensor.shape[0] != groups.rows:
                unknown.append(f"{name} has {tensor.shape[0]:,} rows; the config says {groups.rows:,}")
                continue
            yield from zip(names, groups.split(tensor), strict=True)
    if unknown:
        raise ModelError(bullet_list("these tensors have no place in an InternVL:", unknown))


def to_original(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The inverse of ``to_native``.

    Raises ModelError naming every tensor that has no place in the original, or lacks its fellows there."""
    result: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        found = layout.original(name)
        if found is None:
            unknown.append(f"{name} {tuple(tensor.shape)}")
        elif layout.is_fused(found[0]):
            fused.setdefault(found[0], {})[found[1]] = tensor
        else:
            result[found[0]] = tensor
    for name, parts in fused.items():
        if len(parts) == len(layout.native(name)):
            result[name] = layout.groups(name).join(*(parts[place] for place in sorted(parts)))
        else:
            unknown.append(f"{name} needs all of {', '.join(layout.native(name))}")
    if unknown:
        raise ModelError(bullet_list("these tensors have no place in an original InternVL:", unknown))
    return result

"""Which layer becomes which, and the change itself.

A layer is adapted by changing the object's class to a subclass of its own (as
``torch.nn.utils.parametrize`` does): the object, its weight, its hooks and every other reference to it
stay what they were, its state dict gains keys and renames none, and ``restore`` turns it back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import MethodType
from typing import Any, cast

from torch import nn

from rankfold.compat import HOOKED_FORWARD, WRAPPED
from rankfold.lora.layers.base import AdapterLayer, mixed_class

OWN_FORWARDS = {"forward", HOOKED_FORWARD}


# Under this name a model holds the adapter layer that is none of its modules: ``held.HeldParameters``.
HELD = "_held_parameters"


# Which plain layer becomes which, by class or, for a library that may not be installed, by the class's
# full name.  A subclass of a listed class gets a LoRA class of its own: the effect is added to whatever
# its forward computes.
LORA_CLASSES: dict[type[nn.Module] | str, type[AdapterLayer]] = {}


def register_layer(plain: type[nn.Module] | str, lora: type[AdapterLayer]) -> None:
    """Adapt layers of class ``plain`` (or of that full name) by turning them into ``lora``.

    ``lora`` is a subclass of ``LoraLayer``; it may leave ``plain`` out of its bases.  Of several listed
    classes that a layer belongs to, the nearest counts; a later registration replaces an earlier one."""
    LORA_CLASSES[plain] = lora


def lora_class(kind: type[nn.Module]) -> type[AdapterLayer] | None:
    """The class that a layer of class ``kind`` becomes, or None if there is none."""
    for ancestor in kind.__mro__:
        lora = LORA_CLASSES.get(ancestor) or LORA_CLASSES.get(
            f"{ancestor.__module__}.{ancestor.__qualname__}"
        )
        if lora is not None:
            return mixed_class(lora, kind)
    return None


def adapt(layer: nn.Module, lora: type[AdapterLayer] | None = None) -> AdapterLayer:
    """Turn ``layer`` into its adapter class (or ``lora`` mixed with its own class), in place."""
    if isinstance(layer, AdapterLayer):
        return layer
    kind = type(layer)
    become(layer, mixed_class(lora, kind) if lora is not None else cast(Any, lora_class(kind)))
    adapted = cast(AdapterLayer, layer)
    adapted.start()
    return adapted


def computes_otherwise(layer: nn.Module, plain: type[nn.Module], methods: Collection[str]) -> bool:
    """Whether ``layer`` is of a subclass of ``plain`` that replaces one of ``methods`` and that nobody has
    registered: an update made for ``plain`` may then be no change of its weight."""
    kind = layer.plain_class if isinstance(layer, AdapterLayer) else type(layer)
    replaced = any(getattr(kind, method) is not getattr(plain, method) for method in methods)
    return replaced and kind not in LORA_CLASSES


def restore(layer: AdapterLayer) -> None:
    """Turn an adapter layer back into the plain layer it was made from, in place."""
    layer.end()
    become(layer, layer.plain_class)


def become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of ``layer``, and with it a bound ``forward`` of the old one that the object holds:
    accelerate's hooks keep one, without which the adapter would be passed over in silence."""
    before = type(layer).forward
    object.__setattr__(layer, "__class__", kind)  # past torch's __setattr__, which is slow
    for name in OWN_FORWARDS & layer.__dict__.keys():
        if getattr(layer.__dict__[name], "__func__", None) is before:
            layer.__dict__[name] = MethodType(kind.forward, layer)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what adapters have added: six modules fewer a layer to walk."""
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        added = type(module).added if isinstance(module, AdapterLayer) else ()
        for name, child in reversed(module._modules.items()):
            if child is not None and name not in added:
                inside = path if name in WRAPPED else f"{path}.{name}" if path else name
                pending.append((inside, child))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Every adapter layer of ``model`` with its dotted name, what stands beside a module before it."""
    for path, module in base_modules(model):
        if HELD in module.__dict__:
            yield path, module.__dict__[HELD]
        if isinstance(module, AdapterLayer):
            yield path, module

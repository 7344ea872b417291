"""A model whose tokens choose among adapters: PEFT's ``create_arrow_model``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.errors import AdapterError, ConfigError, bullet_list
from rankfold.lora.config.lora_config import CONFIG_NAME, LoraConfig
from rankfold.lora.config.variant_configs import ArrowConfig
from rankfold.lora.layers.linear import LinearUpdates
from rankfold.lora.layers.registry import adapter_layers
from rankfold.peft_surface.model import PeftModel

ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """``base_model`` with the experts "task_0", "task_1", ... loaded, with ``use_gks`` the general adapters
    "gks_0", ... too, and the router active; see ``lora.variants.arrow``.

    ``adapter_kwargs`` are words of ``PeftModel.from_pretrained``.  The paths are folders, or repositories of
    the hub with a folder inside.  Raises ConfigError where the experts differ in rank or targets."""
    if not task_specific_adapter_paths:
        raise ConfigError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("You should provide general LoRA paths if you want to use GenKnowSub.")
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    named = {f"task_{place}": path for place, path in enumerate(task_specific_adapter_paths)}
    arrow_config.task_adapter_names = [*named]
    arrow_config.gks_adapter_names = [f"gks_{place}" for place in range(len(general))]
    named |= dict(zip(arrow_config.gks_adapter_names, general, strict=True))
    model: PeftModel | None = None
    for name, path in named.items():
        place, inner = source_of(path)
        options = {**adapter_kwargs, **({} if inner is None else {"subfolder": inner})}
        if model is None:
            model = PeftModel.from_pretrained(base_model, place, name, **options)
        else:
            model.load_adapter(place, name, **options)
    assert model is not None
    targets, rank = _shared(model, [*named])
    model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=rank))
    model.set_adapter(ROUTER)
    return model


def source_of(path: str) -> tuple[str, str | None]:
    """A folder, or a repository of the hub and the folder inside it."""
    if Path(path).is_dir():
        if not (Path(path) / CONFIG_NAME).is_file():
            raise AdapterError(f"Local adapter path '{path}' does not contain '{CONFIG_NAME}'.")
        return path, None
    owner, _, rest = path.strip("/").partition("/")
    name, _, inner = rest.partition("/")
    return (f"{owner}/{name}", inner or None) if name else (path, None)


def _shared(model: PeftModel, names: Sequence[str]) -> tuple[list[str], int]:
    """The targets and the rank that all experts have.  Raises ConfigError listing what differs."""
    layers = [*adapter_layers(model.get_base_model())]
    linear = [(path, layer) for path, layer in layers if isinstance(layer, LinearUpdates)]
    found = {
        name: {path: tuple(f.shape for f in layer.factors(name)) for path, layer in linear if name in layer.r}
        for name in names
    }
    odd = [
        f"adapter {name!r} on module {path!r} of type {layer.plain_class.__name__}"
        for path, layer in layers
        for name in names
        if name in layer.adapter_names() and not isinstance(layer, LinearUpdates)
    ]
    if odd:
        raise ConfigError(bullet_list("LoRA adapters must only target Linear-like layers. Found:", odd))
    first, problems = found[names[0]], []
    for name, shapes in found.items():
        if shapes.keys() != first.keys():
            problems.append(f"[{name}] target_modules mismatch: {[*shapes]} != {[*first]}")
        elif shapes != first:
            ranks = [sorted({a[0] for a, _ in each.values()}) for each in (shapes, first)]
            problems.append(f"[{name}] rank mismatch: {ranks[0]} != {ranks[1]}")
    if problems:
        raise ConfigError(bullet_list("these adapters cannot be experts of one router:", problems))
    return [*first], next(iter(first.values()))[0][0]

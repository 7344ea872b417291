"""Loading a stored adapter onto a wrapped model: all of it, or nothing is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankfold.errors import AdapterError, ConfigError, TargetError
from rankfold.lora.brought import bring, find_brought
from rankfold.lora.checkpoint import file_tensors, fill_adapter
from rankfold.lora.config import LoraConfig
from rankfold.lora.inject import remove_adapter
from rankfold.lora.names import check_adapter_name
from rankfold.lora.saved import with_task_modules
from rankfold.lora.starts import warn_if_random
from rankfold.lora.stored import AdapterSource, LoadResult, read_adapter
from rankfold.lora.ties import check_agreement

if TYPE_CHECKING:
    from rankfold.lora.model import PeftModel


def load_onto(wrapped: PeftModel, name: str, config: LoraConfig, source: AdapterSource) -> LoadResult:
    """Place an adapter with ``config`` on the model in ``wrapped`` and fill it from ``source``.

    Raises AdapterError listing all that does not fit, ConfigError for the name; nothing is changed then."""
    model, before = wrapped.get_base_model(), wrapped.targeted_module_names
    config = with_task_modules(config)
    check_adapter_name(name, wrapped.peft_config)
    stored = read_adapter(source, config, model)
    config = stored.config
    warn_if_random(config)
    try:
        wrapped._place(name, stored.targets, config)
    except (ConfigError, TargetError) as error:
        raise AdapterError(f"{source.folder}: {error}") from error
    try:
        wanted = file_tensors(model, name, config)
        brought = find_brought(model, stored.tensors, wanted, config)
        result = fill_adapter(stored, wanted | {key: place for key, (_, place) in brought.items()})
        check_agreement(model, name, stored.tensors)
        bring(model, name, dict(brought.values()))
    except BaseException:
        remove_adapter(model, name)
        del wrapped.peft_config[name]
        wrapped.targeted_module_names = before
        raise
    wrapped.adapter_facts[name] = stored.facts
    return result

"""How other libraries see that a wrapped model is one of PEFT's kind.

transformers, accelerate and TRL ask ``isinstance(model, peft.PeftModel)`` and then save, resume and wrap
the model as they do PEFT's.  A wrapped model answers yes, as proxies do it in Python: by what
``__class__`` says. Its type stays ours, and PEFT is neither imported nor changed.

Where PEFT is not installed these libraries cannot ask, and take the wrapper for a module that they do not
know: Trainer would write the whole base.  Then their functions that ask get an answer for our class, and
Trainer's test of what has a ``save_pretrained`` sees a transformers model, which is what is inside."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from typing import Any

from torch import nn

from rankfold.compat import COMPILED

ASKING = ("_is_peft_model", "is_peft_model")
LIBRARIES = ("transformers.trainer", "accelerate.", "trl.")
# Names that their modules would have from PEFT, where they ask by more than one call.
EXPECTED = ("BaseTunerLayer", "PeftConfig", "PeftMixedModel", "PeftModel", "PeftType", "get_peft_model")


def class_seen(kind: type, tuner: nn.Module | None) -> type:
    """The class that an object of ``kind``, a PeftModel, says that it has."""
    peft = sys.modules.get("peft")
    theirs = getattr(peft, kind.__name__, None) or getattr(peft, "PeftModel", None)
    if isinstance(theirs, type) and not issubclass(kind, theirs):
        return _both(kind, theirs)  # type: ignore[arg-type]
    library = sys.modules.get("transformers.modeling_utils")
    if theirs is None and library is not None and not _is_installed("peft"):
        inner = None if tuner is None else tuner._modules.get("model")
        if isinstance(inner, library.PreTrainedModel):
            return _both(kind, library.PreTrainedModel)
    return kind


@cache
def _both(kind: type, other: type) -> type:
    """A class that is never instantiated: ``isinstance`` looks up what it inherits from."""
    return type(kind.__name__, (kind, other), {"__module__": kind.__module__})


@cache
def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def recognise(kind: type) -> None:
    """Where PEFT is not installed, let the libraries in use know models of ``kind`` for what they are."""
    if _is_installed("peft") or "transformers" not in sys.modules:
        return
    importlib.import_module("transformers.trainer_utils")  # what Trainer imports is changed before it does
    surface = importlib.import_module("rankfold")
    for name, module in list(sys.modules.items()):
        if not name.startswith(LIBRARIES):
            continue
        for asking in ASKING:
            own = vars(module).get(asking)
            if own is not None and not hasattr(own, "knows_rankfold"):
                setattr(module, asking, _answering(own))
                for expected in EXPECTED:
                    vars(module).setdefault(expected, getattr(surface, expected))


def _answering(own: Any) -> Any:
    def is_peft_model(model: Any) -> bool:
        from rankfold.peft_surface.model import PeftModel

        inner = getattr(model, "module", model)
        return isinstance(getattr(inner, COMPILED, inner), PeftModel) or own(model)

    is_peft_model.knows_rankfold = True  # type: ignore[attr-defined]
    return is_peft_model

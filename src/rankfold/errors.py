"""The error tree.  The command line prints these as one sentence and exits with status 2.

RankfoldError
 +- ConfigError      (ValueError and TypeError)  a LoraConfig, a recipe or a call that cannot be meant
 +- TargetError      (ValueError)    target patterns that match nothing, or a layer type without LoRA
 |   +- NoMatchError                nothing at all is a target
 +- AdapterError     (ValueError, RuntimeError, TypeError)  an adapter on disk that cannot be loaded as it is
 +- MergeError       (ValueError and RuntimeError)  a merge that would damage the model
 +- DataError        (ValueError)    rows that cannot be read or trained on
 +- ModelError       (ValueError)    a base model that cannot be found or used
 +- OutputError      (RuntimeError)  a place that cannot be written, or must not be overwritten
 +- ExportError      (RuntimeError)  what was written does not say what the tuned model says
 +- CheckpointError  (ValueError)    a checkpoint that is damaged, or belongs to another run
 +- TrainingError    (RuntimeError)  a run stopped before it could do harm
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class RankfoldWarning(UserWarning, RuntimeWarning):
    """Something odd that was done all the same."""


class RankfoldError(Exception):
    """Base of every error a user can cause or mend."""


class ConfigError(RankfoldError, ValueError, TypeError):
    pass


class TargetError(RankfoldError, ValueError):
    pass


class NoMatchError(TargetError):
    """No module is a target: PEFT's NoMatchingPeftModuleError."""


class AdapterError(RankfoldError, ValueError, RuntimeError, TypeError):
    pass


class MergeError(RankfoldError, ValueError, RuntimeError):
    pass


class DataError(RankfoldError, ValueError):
    pass


class ModelError(RankfoldError, ValueError):
    pass


class OutputError(RankfoldError, RuntimeError):
    pass


class ExportError(RankfoldError, RuntimeError):
    pass


class CheckpointError(RankfoldError, ValueError):
    pass


class TrainingError(RankfoldError, RuntimeError):
    pass


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def bullet_list(headline: str, problems: Sequence[str], shown: int = 20) -> str:
    """``headline`` and one indented line a problem; past ``shown`` of them, a count of the rest."""
    lines = [headline, *(f"  - {problem}" for problem in problems[:shown])]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    return "\n".join(lines)

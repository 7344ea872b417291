"""Where a causal language model turns hidden states into logits, and what it does to them, by trying it.

The head's weight is the largest of a small model, and its output the largest tensor of a step.  So losses are
computed from the hidden states that reach the head, for the trained tokens alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rankfold.compat import is_compiled
from rankfold.kernels.cross_entropy import CHUNK_LOGITS, LossForm, head_cross_entropy, linear_cross_entropy
from rankfold.storage.layers import HeldLinear

PROBE_TOKENS = 4
PROBE_SPREAD = 40.0  # of the output that stands in for the head's: beyond every softcap in use (20 to 50)
ROUNDINGS = 8  # of the logits' number format
# What configs call a factor on the logits.  Granite divides by logits_scaling, HyperCLOVA multiplies: the
# name does not say, so both are tried.
FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class OutputHead:
    """The module that makes the logits, and what the model's forward does to its output."""

    module: Any
    form: LossForm
    vocabulary: int

    def hidden_states(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """What reaches the head (rows, length, width) in a forward that makes no logits.

        A head that is more than a matrix still sees one token a row: its kernel may take no fewer."""
        seen: list[Tensor] = []
        kept = 0 if self.is_plain else 1

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0])
            return (args[0][..., :kept, :],)

        hook = self.module.register_forward_pre_hook(take)
        try:
            model(**inputs, use_cache=False)
        finally:
            hook.remove()
        return seen[-1]

    def losses(self, hidden: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss in nats of each of ``targets`` (tokens) after ``hidden`` (tokens, width); see
        ``linear_cross_entropy``."""
        form, module = replace(self.form, label_smoothing=label_smoothing), self.module
        if self.is_plain:
            weight = module if isinstance(module, HeldLinear) else module.weight
            return linear_cross_entropy(hidden, weight, targets, module.bias, form)
        return head_cross_entropy(hidden, module, targets, form, max(1, CHUNK_LOGITS // self.vocabulary))

    @property
    def is_plain(self) -> bool:
        """Whether the head is its weight and bias and nothing else: no adapter, no hook, not quantised
        by a library."""
        own = vars(self.module)
        hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
        return (
            type(self.module) in (nn.Linear, HeldLinear)
            and type(self.module.weight) is nn.Parameter
            and not hooked
        )


_heads: WeakKeyDictionary[Any, tuple[Any, OutputHead | str]] = WeakKeyDictionary()


def output_head(model: Any, inputs: dict[str, Tensor]) -> OutputHead | str:
    """The head of ``model``, or why it cannot be used by itself.

    Tried once a model, on the first tokens of ``inputs``: known numbers are put in the place of the
    head's output, and the logits must be what a ``LossForm`` makes of these."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_output_embeddings"):
        return "the model does not say which module is its output head"
    if is_compiled(model) or is_compiled(base):
        return "a compiled model is one graph from tokens to logits"
    module = base.get_output_embeddings()
    if model not in _heads or _heads[model][0] is not module:
        _heads[model] = (module, _try_head(model, module, inputs))
    return _heads[model][1]


@torch.no_grad()
def _try_head(model: Any, module: Any, inputs: dict[str, Tensor]) -> OutputHead | str:
    if not isinstance(module, nn.Module):
        return "the model has no output head"
    few = {name: values[:1, :PROBE_TOKENS] for name, values in inputs.items()}
    seen: list[Tensor] = []

    def stand_in(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> Tensor:
        seen.extend([*args, *options.values()])
        spread = torch.linspace(-PROBE_SPREAD, PROBE_SPREAD, output.numel(), device=output.device)
        seen.append(spread.view(output.shape).to(output.dtype))
        return seen[-1]

    hook = module.register_forward_hook(stand_in, with_kwargs=True)
    try:
        with torch.random.fork_rng():
            logits = model(**few, use_cache=False).logits
    finally:
        hook.remove()
    shape = few["input_ids"].shape
    if len(seen) != 2 or seen[0].shape[:-1] != shape or logits.shape != seen[1].shape:  # noqa: PLR2004
        return "the model does not make its logits by one call of its head, token by token"
    form = _form_of(model.config, seen[1], logits)
    if form is None:
        return "the model does more to its logits than to scale and to soft-cap them"
    return OutputHead(module, form, logits.shape[-1])


def _form_of(config: Any, output: Tensor, logits: Tensor) -> LossForm | None:
    """The form by which ``output`` becomes ``logits``, of those that the numbers in ``config`` allow."""
    text = config.get_text_config()
    numbers = [float(n) for name in FACTORS if isinstance(n := getattr(text, name, None), int | float) and n]
    caps = [float(n) for name in SOFTCAPS if isinstance(n := getattr(text, name, None), int | float) and n]
    scales = [1.0, *numbers, *(1 / n for n in numbers)]
    allowed = ROUNDINGS * torch.finfo(output.dtype).eps * float(logits.abs().max())
    for scale, cap in product(scales, [None, *caps]):
        form = LossForm(scale, cap)
        if float((form.logits(output) - logits).abs().max()) <= allowed:
            return form
    return None

"""Optimisers made for LoRA's factors, by PEFT's names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfold.errors import ConfigError
from rankfold.lora.layers.factors import LoraLayer
from rankfold.peft_surface.model import PeftModel

DELTA = 1e-8  # added to A A^T before it is inverted


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser in which B learns ``loraplus_lr_ratio`` times as fast as A.

    ``loraplus_lr_embedding`` (1e-6) is the rate of an embedding's factors, ``loraplus_weight_decay`` (0) the
    decay of all but vectors.  Hayou et al. 2024, arXiv 2402.12354."""
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    groups: dict[str, list[Tensor]] = {name: [] for name in ("A", "embedding", "B", "vectors")}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding" in name:
            groups["embedding"].append(parameter)
        elif parameter.ndim == 1:
            groups["vectors"].append(parameter)
        else:
            groups["B" if "lora_B" in name else "A"].append(parameter)
    fast = lr * loraplus_lr_ratio
    settings = [
        {"params": groups["A"], "weight_decay": decay, "lr": lr},
        {"params": groups["embedding"], "weight_decay": decay, "lr": embedding_lr},
        {"params": groups["B"], "weight_decay": decay, "lr": fast},
        {"params": groups["vectors"], "weight_decay": 0.0, "lr": fast},
    ]
    return optimizer_cls(settings, lr=lr, **kwargs)  # type: ignore[call-arg]


class LoraFAOptimizer(Optimizer):
    """AdamW that trains B of each pair and leaves A as it is; B's gradient is brought nearest to full
    fine-tuning's, ``g (A A^T)^-1 / scale^2``.  Zhang et al. 2023, arXiv 2308.03303.

    A group holds "params", their "names" and "scaling_factors" (None for what is no factor); a B belongs to
    the A of its name.  Other parameters get AdamW's step."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        wrong = [f"Invalid learning rate: {lr} - should be >= 0.0"] if lr < 0 else []
        wrong += [f"Invalid beta parameter: {b} - should be in [0.0, 1.0)" for b in betas if not 0 <= b < 1]
        wrong += [f"Invalid epsilon value: {eps} - should be >= 0.0"] if eps < 0 else []
        if wrong:
            raise ConfigError("; ".join(wrong))
        own = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(params, {**own, "weight_decay": weight_decay, "correct_bias": correct_bias})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            named = dict(zip(group["names"], group["params"], strict=True))
            for (name, parameter), scale in zip(named.items(), _scales(group), strict=True):
                first = named.get(name.replace("_B.", "_A.")) if "lora" in name else None
                if first is not parameter and parameter.grad is not None:
                    gradient = _projected(parameter.grad, first, scale)
                    self._update(parameter, gradient, group, *_state_names(name, paired=first is not None))
        return loss

    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], key: str, ending: str
    ) -> None:
        state = cast(dict[str, Any], self.state)[key]
        if not state:
            state["step"] = 0
        first, second = (
            state.setdefault(name + ending, torch.zeros_like(parameter)) for name in ("exp_avg", "exp_avg_sq")
        )
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(first, second.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])


def _state_names(name: str, *, paired: bool) -> tuple[str, str]:
    """Under which key a parameter's state is kept, and what its moments' names end in: those of PEFT, so
    that a run goes on with a state that PEFT saved, and the other way round."""
    return (f"{name.partition('lora')[0]}lora", "_B") if paired else (name, "")


def _scales(group: dict[str, Any]) -> list[float | None]:
    if "scaling_factors" in group:
        found: list[float | None] = group["scaling_factors"]
        return found
    if "scaling_factor" not in group:
        raise KeyError("Expected optimizer param group to define `scaling_factors`.")
    warnings.warn(
        "`scaling_factor` is deprecated: one for all parameters is wrong where ranks differ. Use "
        "`scaling_factors`",
        FutureWarning,
        stacklevel=3,
    )
    return [group["scaling_factor"]] * len(group["params"])


def _projected(gradient: Tensor, lora_a: Tensor | None, scale: float | None) -> Tensor:
    """The gradient of B (out, rank) for its A (rank, in), or of another parameter as it is."""
    if lora_a is None or scale is None:
        return gradient
    gram = lora_a @ lora_a.T
    inverse = torch.linalg.pinv(gram + DELTA * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return (gradient @ inverse).to(gradient.dtype) / scale**2  # type: ignore[no-any-return]


def create_lorafa_optimizer(
    model: PeftModel,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """A LoraFAOptimizer of all parameters of ``model``, whose A it freezes.  ``r``, ``lora_alpha`` and
    ``use_rslora`` are PEFT's words: each layer knows its own scale.  Raises ConfigError if they differ from
    what the active adapters say."""
    configs = {name: model.peft_config[name] for name in model.active_adapters}
    wrong = [name for name, config in configs.items() if use_rslora not in (None, config.use_rslora)]
    if wrong:
        raise ConfigError(
            f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but the active adapters "
            f"{wrong} have it set differently in the model config"
        )
    named = list(model.named_parameters())
    for name, parameter in named:
        if "lora_A" in name:
            parameter.requires_grad_(False)
    group = {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "scaling_factors": [_scale_of(model, name) for name, _ in named],
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group], lr=lr)


def _scale_of(model: nn.Module, name: str) -> float | None:
    """The scale of the adapter that a factor of this name belongs to."""
    path, found, rest = name.rpartition(".lora_")
    layer = model.get_submodule(path) if found else None
    return layer.scaling.get(rest.split(".")[1]) if isinstance(layer, LoraLayer) else None

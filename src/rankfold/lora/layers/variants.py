"""Two variants of how a pair is trained; what it computes when it is used, saved or merged is plain LoRA.

VeLoRA keeps, instead of A's input, one number for each group of its features, and makes the gradient of A
from these: Miles et al. 2024, arXiv 2405.17991.  MonteCLoRA adds noise of a learned variance to A, mixed over
samples by learned weights, and a term to the loss: ``variational_loss``; the class and its tensors have
PEFT's names."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankfold.lora.config.data_starts import MontecloraConfig, VeloraConfig
from rankfold.lora.layers.base import AdapterSpec

VELORA = "lora_velora_embed"
MONTECLORA = "lora_monteclora_sampler"
EPSILON = 1e-6


class VeloraProjection(nn.Module):
    """The direction (group) onto which each group of features is projected."""

    lora_velora_embed: Tensor

    def __init__(self, config: VeloraConfig, in_features: int, like: Tensor) -> None:
        super().__init__()
        self.config = config
        size = -(-in_features // config.num_groups)
        drawn = torch.randn(size) if config.init_type == "random" else torch.zeros(size)
        self.register_buffer("lora_velora_embed", _unit(drawn).to(like))
        self.is_set = config.init_type == "random"

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x A^T`` for x (..., in) and A (rank, in); a gradient of A is made from the projections of x."""
        if self.config.init_type == "batch_average" or not self.is_set:
            mean = self.grouped(x.detach()).flatten(0, 1).float().mean(0)
            self.lora_velora_embed, self.is_set = _unit(mean).to(self.lora_velora_embed), True
        embed, scale = self.lora_velora_embed, self.config.scale
        out = _VeloraProduct.apply(x, weight, embed, self.config.num_groups, scale)  # type: ignore[no-untyped-call]
        return out  # type: ignore[no-any-return]

    def grouped(self, x: Tensor) -> Tensor:
        return _grouped(x, self.config.num_groups)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """x (..., features) as (tokens, groups, features of a group), zeros at the end."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(-1, groups, size)


def _unit(vector: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vector)
    return vector / length if length > 0 else torch.ones_like(vector) / len(vector) ** 0.5  # type: ignore[no-any-return]


class _VeloraProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, embed: Tensor, groups: int, scale: float) -> Tensor:
        ctx.save_for_backward(_grouped(x, groups) @ embed.to(x.dtype), weight, embed)
        ctx.shape, ctx.scale = x.shape, scale
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight, embed = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight.to(gradient.dtype)).reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            wide = (narrow.unsqueeze(-1) * embed.to(narrow.dtype)).flatten(1)[:, : ctx.shape[-1]]
            of_weight = (gradient.T @ wide.to(gradient.dtype) * ctx.scale).to(weight.dtype)
        return of_x, of_weight, None, None, None


class MontecloraSampler(nn.Module):
    """What MonteCLoRA learns beside A and B of one layer: ``std_prior`` (rank), ``expert_weights_prior``
    (samples); the buffers hold the draw of the last forward."""

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, config: MontecloraConfig, rank: int, like: Tensor) -> None:
        super().__init__()
        self.config, samples = config, config.num_samples
        self.std_prior = nn.Parameter(torch.rand(rank).to(like))
        self.expert_weights_prior = nn.Parameter(torch.rand(samples).to(like))
        self.register_buffer("gaussian_var_prior", torch.eye(rank).to(like))
        self.register_buffer("expert_weights", torch.full((samples,), 1 / samples).to(like))

    def forward(self, weight: Tensor) -> Tensor:
        """A (rank, in) with noise.  The variance of a row is a Wishart matrix's diagonal, whose entries are
        independent chi-squared numbers of ``rank`` degrees of freedom."""
        rank, width = weight.shape
        chi = torch.distributions.Chi2(torch.full((rank,), float(rank), device=weight.device)).sample()
        variance = (torch.exp(2 * self.std_prior) * chi.to(weight.dtype)).clamp_min(1e-3)
        drawn = torch.randn(self.config.num_samples, width, rank, dtype=weight.dtype, device=weight.device)
        noise = self.config.sample_scaler * drawn * variance.sqrt()
        self.gaussian_var_prior = torch.diag(variance)
        self.expert_weights = torch.softmax(self._logits(), dim=-1)
        return weight + torch.einsum("n,nir->ri", self.expert_weights, noise)

    def _logits(self) -> Tensor:
        """A draw of the Dirichlet distribution's logits, by its normal approximation."""
        alpha, samples = torch.exp(self.expert_weights_prior).clamp_min(EPSILON), self.config.num_samples
        mean = alpha.log() - alpha.log().mean()
        variance = 1 / alpha * (1 - 2 / samples) + (1 / alpha).sum() / samples**2
        return mean + variance.clamp_min(EPSILON).sqrt() * torch.randn_like(alpha)

    def variational_loss(self) -> Tensor:
        """The divergence from the priors, weighted, and the weights' sum of squares; zero in eval mode."""
        if not self.training:
            return torch.zeros((), device=self.std_prior.device)
        rank, alpha = len(self.std_prior), torch.exp(self.expert_weights_prior)
        prior = torch.full_like(alpha, self.config.dirichlet_prior)
        dirichlet = torch.lgamma(alpha.sum()) - torch.lgamma(prior.sum())
        dirichlet = dirichlet + (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
        dirichlet = dirichlet + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
        spread = torch.exp(2 * self.std_prior)
        wishart = 0.5 * rank * (-spread.log().sum() + spread.sum() - rank)
        drawn = self.gaussian_var_prior.diag().clamp_min(EPSILON)
        normal = 0.5 * self.config.num_samples * (drawn.sum() - drawn.log().sum() - rank)
        entropy = (self.expert_weights**2).sum() if self.config.use_entropy else 0.0
        return self.config.kl_loss_weight * (dirichlet + wishart + normal) + entropy


def start_variant(layer: Any, spec: AdapterSpec) -> None:
    """Make what a variant keeps beside the factors of ``layer``."""
    config, lora_a = spec.config, layer.factors(spec.name)[0]
    if config.velora_config is not None:
        velora = cast(VeloraConfig, config.velora_config)
        held, made = VELORA, cast(nn.Module, VeloraProjection(velora, layer.in_features, lora_a.data))
    else:
        monteclora = cast(MontecloraConfig, config.monteclora_config)
        held, made = MONTECLORA, MontecloraSampler(monteclora, spec.rank, lora_a.data)
    if held not in layer._modules:
        layer._modules[held] = nn.ModuleDict()
    layer._modules[held][spec.name] = made


def variant_tensors(layer: Any, name: str) -> dict[str, Any]:
    """What a variant keeps beside the factors of one adapter, by its key in PEFT's file."""
    held: dict[str, Any] = layer._modules
    tensors: dict[str, Any] = {}
    if name in held.get(VELORA, ()):
        tensors[VELORA] = held[VELORA][name].lora_velora_embed
    if name in held.get(MONTECLORA, ()):
        own = held[MONTECLORA][name].state_dict(keep_vars=True)
        tensors |= {f"{MONTECLORA}.{key}": tensor for key, tensor in own.items()}
    return tensors

"""MonteCLoRA adds noise of a learned variance to A in training, mixed over samples by learned weights, and a
term to the loss: ``variational_loss``; the class and its tensors have PEFT's names."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from rankfold.lora.config.variant_configs import MontecloraConfig
from rankfold.lora.layers.base import AdapterSpec
from rankfold.lora.variants.variant import HeldTensors, Variant, plain_update

HELD = "lora_monteclora_sampler"
EPSILON = 1e-6


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


def _start(layer: Any, spec: AdapterSpec) -> None:
    config = cast(MontecloraConfig, spec.config.monteclora_config)
    layer.hold(HELD, spec.name, MontecloraSampler(config, spec.rank, layer.factors(spec.name)[0].data))


def _update(layer: Any, name: str, x: Tensor, out: Tensor) -> Tensor:
    lora_a, lora_b = layer.factors(name)
    noisy = layer.lora_monteclora_sampler[name](lora_a) if layer.training else lora_a
    return plain_update(layer, name, x, out, (noisy, lora_b))


def _tensors(layer: Any, name: str) -> HeldTensors:
    held = layer.lora_monteclora_sampler[name].state_dict(keep_vars=True)
    return {f"{HELD}.{key}": tensor for key, tensor in held.items()}


MONTECLORA = Variant(_start, update=_update, tensors=_tensors)

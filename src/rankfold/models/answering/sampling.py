"""How an answer is drawn."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rankfold.settings import CheckedSettings

# Of a base's own settings they always count: which tokens begin, end and fill.
TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
# And these say nothing about what is drawn.
REMARKS = (
    *("transformers_version", "_from_model_config", "max_length", "max_new_tokens", "cache_implementation"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    "return_dict_in_generate",
)
AT_ONCE = 64  # rows that are answered together: beyond, a CPU gains little
OURS = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
USUAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # of transformers, where nobody says anything


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Sampling(CheckedSettings):
    """How an answer is drawn, for Python and flags alike."""

    max_new_tokens: int = Field(128, ge=1, le=100_000, description="longest answer in tokens")
    temperature: float = Field(
        0.7, ge=0, le=10, allow_inf_nan=False, description="0 always takes the likeliest token"
    )
    top_p: float = Field(0.9, gt=0, le=1, allow_inf_nan=False, description="share of likelihood to draw from")
    top_k: int = Field(0, ge=0, description="draw from so many tokens, 0 for all")
    min_p: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="least likelihood, as a share of the likeliest's"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, allow_inf_nan=False, description="above 1 what was said becomes less likely"
    )
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_texts)] = Field(
        (), description="a text that ends an answer and is no part of it; may be given several times"
    )
    logprobs: bool = Field(False, description="tell the log-likelihood of each token too")
    generation_config: bool = Field(
        False, description="take the base's own settings for what is not given here"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="one seed, one answer")

    def options(self, model: Any) -> dict[str, Any]:
        """What transformers' ``GenerationConfig`` is to be made of, but for the tokens.

        Nothing of the model's own counts unless it was asked for."""
        drawn = self.temperature > 0
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": drawn}
        if drawn:
            found |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            found |= {"min_p": self.min_p or None}
        found["repetition_penalty"] = self.repetition_penalty
        if not self.generation_config:
            return found
        asked = {*self.model_fields_set, *(("do_sample",) if "temperature" in self.model_fields_set else ())}
        kept = {name: value for name, value in found.items() if name in asked or name == "max_new_tokens"}
        return own_settings(model) | kept

    def settled(self, model: Any) -> Sampling | None:
        """These settings with those of the model's own that were asked for in them; None if some of these
        have no name here (beams, say)."""
        options = self.options(model)
        if not self.generation_config:
            return self
        if options.keys() - {*OURS, "max_new_tokens"}:
            return None
        if not options.get("do_sample"):
            options["temperature"] = 0.0
        given = {name: value for name, value in options.items() if name in OURS and value is not None}
        given.pop("do_sample", None)
        return self.model_copy(update=USUAL | given)


def own_settings(model: Any) -> dict[str, Any]:
    """What a model's own ``generation_config`` asks for beside its tokens and what is usual."""
    config = getattr(model, "generation_config", None)
    found: dict[str, Any] = {} if config is None else config.to_diff_dict()
    return {name: value for name, value in found.items() if name not in (*TOKENS, *REMARKS)}


def told_of_own_settings(model: Any, sampling: Sampling) -> list[str]:
    """What of the base's own settings takes part, or would; nothing if it has none."""
    own = ", ".join(f"{name} {value}" for name, value in sorted(own_settings(model).items()))
    if not own:
        return []
    if sampling.generation_config:
        return [f"the base's own settings take part: {own}"]
    return [f"the base's own settings are not used ({own}); --generation-config uses them"]

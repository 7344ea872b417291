"""``Recipe``: the one source of a run's settings, for Python, flags and help alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rankfold.data.order.split import how_many
from rankfold.data.shapes.sources import Encoding, LeftOut, Source
from rankfold.data.tokens.mask import TrainOn
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.choices import PartNames, PrecisionName, Stored
from rankfold.settings import CheckedSettings, split_at_commas
from rankfold.train.keeping.trackers import TrackerNames
from rankfold.train.step.schedule import Schedule

# What other tools call a setting, and what a setting of theirs has become here.
OLD_NAMES = {
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset": "data",
    "dataset_path": "data",
    "output_dir": "out",
    "eval_file": "held_out",
    "val_size": "held_out",
    "val_set_size": "held_out",
    "test_size": "held_out",
    "split_dataset_ratio": "held_out",
    "target_modules": "targets",
    "lora_target": "targets",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup_share",
    "loraplus_lr_ratio": "b_rate_factor",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "init_lora_weights": "start",
    "peft_init_lora_weights": "start",
    "init_weights": "start",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "batch_size": "rows_per_step",
    "per_device_train_batch_size": "rows_per_step",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "save_steps": "save_every_steps",
    "eval_steps": "evaluate_every_steps",
    "early_stopping_patience": "patience",
    "max_grad_norm": "max_gradient_norm",
    "label_smoothing_factor": "label_smoothing",
    "neftune_noise_alpha": "neftune_alpha",
    "noisy_embedding_alpha": "neftune_alpha",
    "fsdp": "shard_base",
    "torch_compile": "compile",
    "gradient_checkpointing": "activation_checkpointing",
    "report_to": "trackers",
    "dtype": "precision",
    "torch_dtype": "precision",
    "save_total_limit": "keep_checkpoints",
}
NOT_NEEDED = {
    "evaluation_strategy": "say evaluate_every_steps; without it the held-out loss is looked at each epoch",
    "eval_strategy": "say evaluate_every_steps; without it the held-out loss is looked at each epoch",
    "load_best_model_at_end": "it is always so; evaluate_every_steps=0 keeps the last weights",
    "dataloader_num_workers": "rows are tokenised before the first step; there is nothing left for workers",
    "gradient_accumulation_steps": "say rows_per_step; it is cut into micro-batches that fit",
    "train_on_inputs": "say train_on: assistant, last or all",
    "completion_only_loss": "say train_on: assistant, last or all",
    "assistant_only_loss": "say train_on: assistant, last or all",
    "load_in_4bit": "say stored: nf4 or q4_0, or gguf with a GGUF file of 4 bits",
    "load_in_8bit": "say stored: int8",
    "bf16": "say precision: bfloat16; without it a probe of the machine decides",
    "fp16": "say precision: float16; without it a probe of the machine decides",
    "packing": "say batching: packed or padded",
}


Start = Literal["plain", "pissa", "olora", "eva", "corda", "lora-ga", "loftq"]
MODULE_NAMES = re.compile(r"[\w.]+(\s*,\s*[\w.]+)*")


def _targets(value: object) -> object:
    """``"q_proj, v_proj"`` as a list of names; anything but names is a pattern for whole dotted names."""
    return split_at_commas(value) if isinstance(value, str) and MODULE_NAMES.fullmatch(value) else value


Targets = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)], BeforeValidator(_targets)
]


HeldOut = Annotated[float | str | Path | list[Source] | None, BeforeValidator(how_many)]


class Recipe(CheckedSettings):
    """What to train on what.  A setting left at None is chosen from the data and the model, with the
    reason printed.  Build it with ``Recipe.of`` to get rankfold's errors instead of pydantic's."""

    model: str = Field(DEFAULT_MODEL, min_length=1, description="model folder, .gguf file or hub id")
    data: str | Path | list[Source] = Field(
        description="rows to train on: a file or folder, a hub data set, or several with weights (a:2,b:1)"
    )
    shape: str | None = Field(
        None, description="what the rows are: a shape, or prompt=COLUMN,completion=COLUMN [detected]"
    )
    encoding: Encoding = Field(None, description="encoding of text files [UTF-8, or what their bytes tell]")
    leave_out: LeftOut = Field(
        [], description="columns, and kinds of parts of messages, to pass over, with commas between them"
    )
    skip_bad: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="share of bad rows to leave out and count"
    )
    out: Path = Field(description="folder for the adapter and the report; must not exist")
    held_out: HeldOut = Field(
        None,
        description="rows to judge on: a file, or a share or number of the data's [5 %, at most 200 rows]",
    )
    targets: Targets = Field(
        "all-linear", description="modules to adapt: all-linear, names with commas between them, or a pattern"
    )
    parts: PartNames = Field(
        ["language"],
        description="what to train of a model that sees images: language, vision, projector, with commas "
        "between them",
    )
    whole: PartNames = Field(
        ["projector"], description="which of those parts are trained as they are, the others by LoRA"
    )
    image_tiles: int | None = Field(
        None, ge=1, le=64, description="tiles an image is cut into at most [as the model's processor does]"
    )
    adapter: Path | None = Field(
        None, description="adapter folder to start from, with its base, rank, alpha and targets"
    )
    start: Start = Field(
        "plain",
        description="how lora_A and lora_B begin: plain, pissa, olora, eva, corda, lora-ga, or loftq for a "
        "stored base",
    )
    use_dora: bool = Field(False, description="train a length for each row of the weights too (DoRA)")
    use_rslora: bool = Field(False, description="scale = alpha / sqrt(rank) (rsLoRA)")
    original: str | None = Field(
        None, min_length=1, description="the base in full precision, for the start loftq [the model itself]"
    )
    rank: int | None = Field(None, ge=1, le=4096, description="rank of the update [16; 32 above 10,000 rows]")
    alpha: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="scale = alpha / rank [2 x rank; with use_rslora 2 x its root]",
    )
    dropout: float = Field(0.0, ge=0, lt=1, allow_inf_nan=False, description="dropout before lora_A")
    learning_rate: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="peak learning rate [by model size and steps]"
    )
    whole_learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="peak learning rate of what is trained whole [the same]",
    )
    probe: bool = Field(False, description="try several learning rates for some steps, and take the best")
    schedule: Schedule = Field(
        "cosine", description="how the learning rate falls: cosine, linear, constant, wsd"
    )
    warmup_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="share of the steps in which the learning rate rises",
    )
    b_rate_factor: float = Field(
        1.0, gt=0, le=1000, allow_inf_nan=False, description="how much faster lora_B learns; LoRA+ takes 16"
    )
    weight_decay: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="AdamW's pull of the adapter's weights to 0"
    )
    max_gradient_norm: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="gradients of a larger norm are scaled down to it"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, allow_inf_nan=False, description="share of the target spread over all tokens"
    )
    neftune_alpha: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="noise on the embeddings (NEFTune); 5 is usual"
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="above 0: judge and keep a running mean of the weights",
    )
    max_steps: int | None = Field(
        None, ge=1, description="optimiser steps, in as many passes as they take; at most, beside epochs"
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="minutes of training at most: as many steps, and the fall of the learning rate, fit in",
    )
    epochs: int | None = Field(None, ge=1, le=1000, description="passes over the data [by steps, at most 3]")
    rows_per_step: int | None = Field(
        None, ge=1, le=4096, description="rows an optimiser step sees [8 or 16]"
    )
    batching: Literal["packed", "padded"] | None = Field(
        None, description="packed: rows one after another; padded: side by side [what takes less arithmetic]"
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of a step that pass the model at once [what fits and is fast]",
    )
    train_on: TrainOn = Field(
        "assistant",
        description="the turns to learn: assistant, last (the last of them), or all (every token)",
    )
    eos_token: str = Field("", description="the token that ends a text, where the model's files name none")
    as_tokens: Annotated[list[str], BeforeValidator(split_at_commas)] = Field(
        [],
        description="special tokens of the model that are tokens where rows spell them, with commas between "
        "them [none: they are words]",
    )
    max_length: int | None = Field(
        None, ge=8, description="longest row in tokens; longer ones are left out and named [99 % of rows fit]"
    )
    save_every_steps: int | None = Field(
        None,
        ge=1,
        description="optimiser steps between checkpoints [about one a minute, fewer on a slow disk]",
    )
    keep_checkpoints: int = Field(2, ge=1, le=1000, description="newest checkpoints that are kept")
    evaluate_every_steps: int | None = Field(
        None, ge=0, description="steps between looks at the held-out loss, 0 for none [each epoch]"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many looks that brought no lower held-out loss"
    )
    sample_every_steps: int | None = Field(
        None, ge=1, description="steps between answers to the sampled prompts [only at the end]"
    )
    precision: PrecisionName | None = Field(
        None,
        description="number format of the base: float32, bfloat16 or float16 [what a probe finds fast]",
    )
    stored: Stored | None = Field(
        None,
        description="hold the base's weights as gguf (a GGUF file's own blocks), q4_0, int8, bfloat16 or nf4 "
        "(bitsandbytes) and expand them layer by layer [all expanded]",
    )
    activation_checkpointing: bool | None = Field(
        None, description="compute a layer again in the backward, to keep less [if it does not fit else]"
    )
    compile: bool = Field(
        False, description="compile the decoder layers by torch.compile, which takes a minute or more"
    )
    trackers: TrackerNames = Field(
        [], description="also log to tensorboard, wandb, mlflow, trackio or swanlab, with commas between them"
    )
    shard_base: bool = Field(
        False, description="several processes hold a share each of the frozen base (FSDP2)"
    )
    samples: int = Field(3, ge=0, le=20, description="held-out prompts answered before and after")
    general: str | None = Field(
        None,
        min_length=1,
        description="rows of general text that tell what was forgotten, or none [a few that come along]",
    )
    rehearse: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="rows of general that are trained on too, as a share of the rows; the others tell what "
        "was forgotten",
    )
    forget_limit: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="most that the loss on general text may rise, in nats a token; the best weights within "
        "it are kept",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the adapter's start and of the row order")

    @classmethod
    def _describe(cls, problem: Mapping[str, Any]) -> str:
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden" and name in OLD_NAMES:
            return f"{name!r} is called {OLD_NAMES[name]!r} here"
        if problem["type"] == "extra_forbidden" and name in NOT_NEEDED:
            return f"{name!r} is no setting: {NOT_NEEDED[name]}"
        return super()._describe(problem)

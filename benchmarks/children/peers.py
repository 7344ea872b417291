"""Child process: PEFT with transformers' Trainer or TRL's SFTTrainer, on tokens that rankfold encoded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from parts.sides import ROW_LIMIT, Job, Meter, Result, be_child, on_both, rate_factor
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

IGNORED = -100  # the label of an untrained token
BETAS, EPSILON = (0.9, 0.999), 1e-8

# What TRL offers for short chats; speed.py takes the fastest.  A block of 1,024 tokens holds 4 or 5 rows.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": 1024,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
    "padding_free": {"padding_free": True, "max_length": None},
    "padded": {"max_length": None},
}


class Metered:
    """Mixed into a trainer: counts what really reaches the model, micro-batch by micro-batch."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        mask = inputs.get("attention_mask")
        self.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        self.trained_tokens += int((inputs["labels"] != IGNORED).sum())
        loss = super().training_step(model, inputs, *args, **options)  # type: ignore[misc]
        self.loss += float(loss)
        return loss

    tokens, trained_tokens, loss = 0, 0, 0.0


class MeteredTrainer(Metered, Trainer):
    pass


class StepEnds(TrainerCallback):
    """Hands each step to the meter, and stops the run at the deadline."""

    def __init__(self, minutes: float | None) -> None:
        self.meter = Meter()
        self.minutes = minutes
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
        trainer = self.trainer
        self.meter.step(trainer.loss, trainer.tokens, trainer.trained_tokens)
        trainer.loss, trainer.tokens, trainer.trained_tokens = 0.0, 0, 0
        if self.minutes and time.perf_counter() - self.started > 60 * self.minutes:
            control.should_training_stop = True


def train(job: Job) -> Result:
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = adapted(job)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, lr=job["learning_rate"], betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda done: rate_factor(done + 1, job["max_steps"], job["schedule"])
    )
    ends = StepEnds(job.get("max_minutes"))
    make = sft_trainer if job.get("trl") else plain_trainer
    ends.trainer = make(job, model, tokenizer, optimizers=(optimiser, rates), callbacks=[ends])
    ends.trainer.train()
    model.save_pretrained(Path(job["folder"]) / "adapter")
    return ends.meter.result(
        adapter=str(Path(job["folder"]) / "adapter"), trainable=sum(weight.numel() for weight in trained)
    )


def adapted(job: Job) -> Any:
    """The base with a fresh adapter, drawn from the seed after the base is loaded, as rankfold does."""
    dtype = getattr(torch, job.get("precision") or on_both())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    torch.manual_seed(job["seed"])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=job["dropout"],
        target_modules="all-linear",
    )
    return get_peft_model(model, config)


def arguments(job: Job) -> dict[str, Any]:
    """The settings that both trainers share; the rest is theirs."""
    return {
        "output_dir": str(Path(job["folder"]) / "trainer"),
        "per_device_train_batch_size": job.get("rows_at_once", job["rows_per_step"]),
        "gradient_accumulation_steps": job["rows_per_step"] // job.get("rows_at_once", job["rows_per_step"]),
        "max_steps": job["max_steps"],
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",  # the rows stand in the order of rankfold's steps
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": job["seed"],
        "bf16": job.get("precision") == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),  # else it would not take bf16 there
    }


def plain_trainer(job: Job, model: Any, tokenizer: Any, **options: Any) -> Trainer:
    """Trainer with a batch padded to its longest row, or each to ROW_LIMIT tokens."""

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = ROW_LIMIT if job.get("padding") == "max_length" else longest

        def padded(name: str, fill: int) -> Tensor:
            return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return {
            "input_ids": padded("input_ids", tokenizer.pad_token_id or tokenizer.eos_token_id),
            "attention_mask": (torch.arange(width) < lengths).long(),
            "labels": padded("labels", IGNORED),
        }

    rows = [row for step in job["steps"] for row in step]
    settings = TrainingArguments(**arguments(job))
    return MeteredTrainer(model=model, args=settings, train_dataset=rows, data_collator=collate, **options)


def sft_trainer(job: Job, model: Any, tokenizer: Any, **options: Any) -> Trainer:
    """TRL's trainer in fp32 on a CPU, without recomputing activations: both would cost it time."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class MeteredSFTTrainer(Metered, SFTTrainer):
        pass

    settings = arguments(job) | TRL_SETTINGS[job["trl"]]
    settings |= {"bf16": torch.cuda.is_available(), "gradient_checkpointing": False}
    settings |= {"use_liger_kernel": bool(job.get("liger"))}
    del settings["remove_unused_columns"]
    data = Dataset.from_list([row for step in job["steps"] for row in step])
    return MeteredSFTTrainer(
        model=model, args=SFTConfig(**settings), train_dataset=data, processing_class=tokenizer, **options
    )


if __name__ == "__main__":
    be_child(train)

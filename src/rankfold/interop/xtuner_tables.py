"""What is known of xtuner's values: why those that become no setting do not, and what modules are called."""

from __future__ import annotations

from rankfold.models.internvl.names import INTERNLM2, INTERNLM2_LAYER, VISION, VISION_LAYER

LOGGED = "rankfold logs and times every step by itself"
PLACED = "the number of processes, and where they run, is torchrun's or accelerate's business"
CHATS = "answers to held-out prompts are shown after a run; see samples and sample_every_steps"
FEW_BITS = "follows from stored, which says in how few bits the base is held"
# By patterns of dotted names, the first that fits.
LEFT_OUT = {
    "*.type": "which class xtuner makes",
    "model.*.quantization_config*": FEW_BITS,
    "model.*.torch_dtype": "a probe of the machine decides; see precision",
    "model.*.trust_remote_code": "no code from a model's folder is ever run here",
    "*.trust_remote_code": "no code from a model's folder is ever run here",
    "model.freeze_llm": "as here",
    "model.*lora.task_type": "always CAUSAL_LM here",
    "model.*lora.bias": "biases are not trained here",
    "model.*lora.*": "no setting of a recipe; in Python LoraConfig has it",
    "model.use_varlen_attn": "packed rows are always kept apart here",
    "model.*": "no setting of a recipe; see whether it matters",
    "tokenizer*": "the tokenizer is the model's own",
    "*.tokenizer.*": "the tokenizer is the model's own",
    "prompt_template*": "the model's own chat template is used; see docs/masks.md",
    "*template*": "the model's own chat template is used; see docs/masks.md",
    "*.dataset_map_fn": "the shape of the rows is told by their columns; see docs/data.md",
    "*.remove_unused_columns": "columns without a use are named",
    "*.shuffle_before_pack": "rows are always shuffled, by the seed",
    "*.pack_to_max_length": "packed or padded is chosen by arithmetic; see batching",
    "*.use_varlen_attn": "packed rows are always kept apart here",
    "*.num_workers": "rows are tokenised before the first step",
    "*.num_proc": "rows are tokenised before the first step",
    "*.model_path": "the same model everywhere",
    "train_dataloader.sampler*": "rows of similar length share a step here; see docs/batches.md",
    "train_dataloader.collate_fn*": "how rows are put together is chosen here",
    "*.dataset.path": "a file format, which is told by the file's name",
    "optim_wrapper.optimizer.*": "no setting of a recipe; see whether it matters",
    "optim_wrapper.clip_grad.error_if_nonfinite": "a number that is not finite always stops a run here",
    "optim_wrapper.loss_scale": "scales only float16, by itself",
    "optim_wrapper.dtype": "a probe of the machine decides; see precision",
    "param_scheduler.*.eta_min": "the learning rate ends at 0 here",
    "param_scheduler.*.start_factor": "warm-up begins near 0 here too",
    "param_scheduler.*": "follows from schedule, epochs and warmup_share",
    "train_cfg.*": "no setting of a recipe",
    "val_*": "see held_out",
    "test_*": "see held_out",
    "default_hooks.checkpoint.by_epoch": "says what interval counts",
    "default_hooks.checkpoint.*": "a checkpoint here is all that it takes to go on",
    "default_hooks.*": LOGGED,
    "custom_hooks.*.evaluation_inputs": CHATS,
    "custom_hooks.*": CHATS,
    "evaluation_*": CHATS,
    "SYSTEM*": CHATS,
    "gradient_checkpointing": "chosen by what fits; see activation_checkpointing",
    "env_cfg*": PLACED,
    "launcher": PLACED,
    "log_processor*": LOGGED,
    "log_level": LOGGED,
    "visualizer*": "see trackers",
    "load_from": "a run begins at the base",
    "resume": "rankfold resume goes on with a run",
    "work_dir": "say --out",
    "randomness.seed": "drawn by chance there, 0 here",
    "randomness.*": "runs on a CPU are always reproducible here",
    "*optim_type": "as here if it is AdamW",
    "default_scope": "belongs to mmengine",
}


def _short_names() -> dict[str, list[str]]:
    """Modules of InternVL's original layers by their last name or two, as configs name them."""
    names: dict[str, list[str]] = {"output": ["lm_head"]}
    for table, layer in ((INTERNLM2, INTERNLM2_LAYER), (VISION, VISION_LAYER)):
        for original, native in table.items():
            if original.startswith(layer):
                inside = original.removeprefix(layer)
                ends = [name.rpartition(".")[2] for name in native]
                names[inside] = ends
                if table is INTERNLM2:
                    names[inside.rpartition(".")[2]] = ends
    return names


SHORT_NAMES = _short_names()


def native_targets(names: list[str]) -> list[str]:
    """The modules that xtuner calls ``names``, by transformers' names; a name it has not stays."""
    return list(dict.fromkeys(new for name in names for new in SHORT_NAMES.get(name, [name])))

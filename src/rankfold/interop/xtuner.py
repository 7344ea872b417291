"""An xtuner 0.1 config as a recipe: what each of its values becomes here, or why it becomes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.errors import ConfigError
from rankfold.interop.python_values import Symbol, read_python
from rankfold.interop.translation import Line, Translation
from rankfold.interop.xtuner_tables import LEFT_OUT, native_targets
from rankfold.train.asked.recipe import Recipe

INTERNVL = "InternVL_V1_5"
LORA_OF = {INTERNVL: "model.llm_lora", "SupervisedFinetune": "model.lora"}
MODEL_OF = {INTERNVL: "model.model_path", "SupervisedFinetune": "model.llm.pretrained_model_name_or_path"}
PEFT_RANK = PEFT_ALPHA = 8  # where LoraConfig is given none
SCHEDULES = {"CosineAnnealingLR": "cosine", "ConstantLR": "constant"}
DATASET = "train_dataloader.dataset"
BATCH, ACCUMULATED = "train_dataloader.batch_size", "optim_wrapper.accumulative_counts"
ITERATION = "an iteration there is one of {} that make a step"
DIFFERS = "this differs from xtuner"


@dataclass(frozen=True)
class Imported:
    """The settings of a recipe, without ``out``, and what became of every value."""

    settings: dict[str, Any]
    lines: list[Line]


def import_xtuner(path: Path) -> Imported:
    """Read the config at ``path``; nothing in it is run.

    Raises ConfigError for what is no Python, no xtuner config or no LoRA fine-tuning on answers, and for
    values that no recipe can have."""
    values = read_python(path)
    told = Translation(values, LEFT_OUT)
    kind = _kind(told, path)
    _model(told, kind)
    _stored(told, kind)
    _lora(told, LORA_OF[kind])
    if kind == INTERNVL:
        _parts(told)
    _data(told)
    _steps(told)
    _optimiser(told)
    _schedule(told)
    _runtime(told)
    Recipe.of({"out": "run", **told.settings})
    return Imported(told.settings, told.lines())


def _class(told: Translation, path: str) -> str:
    """The last name of the class at ``path``, or an empty string."""
    value = told.plain(f"{path}.type")
    return value.last if isinstance(value, Symbol) else ""


def _kind(told: Translation, path: Path) -> str:
    model = told.at("model")
    if model is None or not isinstance(model.value, dict):
        given = ", ".join(sorted(told.values.values)) or "nothing"
        raise ConfigError(f"{path} is no config of xtuner 0.1: wanted model = dict(...), it assigns {given}")
    kind = _class(told, "model")
    if kind not in LORA_OF:
        known = " and ".join(LORA_OF)
        raise ConfigError(
            f"{model.place}: cannot import a model of type {kind or told.plain('model.type')}; "
            f"known are {known}"
        )
    if not isinstance(told.plain(LORA_OF[kind]), dict):
        raise ConfigError(
            f"{model.place}: there is no {LORA_OF[kind]}, so whole weights would be trained, and rankfold "
            "trains adapters; give the config a LoRA, or write the recipe by hand"
        )
    return kind


def _model(told: Translation, kind: str) -> None:
    path = MODEL_OF[kind]
    name = told.plain(path)
    if not isinstance(name, str):
        place = (told.at(path) or told.at("model")).place  # type: ignore[union-attr]
        raise ConfigError(f"{place}: wanted the model's name as text at {path}, got {name}")
    told.set("model", name, path)


def _stored(told: Translation, kind: str) -> None:
    """In how few bits the language model is held."""
    if kind == INTERNVL:
        if told.plain("model.quantization_llm") is True:
            told.set("stored", "nf4", "model.quantization_llm", why="bitsandbytes' 4 bits, as there")
        told.explain("model.quantization_llm", "as here")
        tower = told.plain("model.quantization_vit") is True
        told.explain("model.quantization_vit", f"the tower is held whole; {DIFFERS}" if tower else "as here")
        return
    config = "model.llm.quantization_config"
    is_nf4 = told.plain(f"{config}.bnb_4bit_quant_type") == "nf4"
    if told.plain(f"{config}.load_in_4bit") is True:
        why = "bitsandbytes' 4 bits, as there" if is_nf4 else f"there it is fp4; {DIFFERS}"
        told.set("stored", "nf4", f"{config}.load_in_4bit", why=why)
        told.mark(f"{config}.bnb_4bit_quant_type", "stored")
    elif told.plain(f"{config}.load_in_8bit") is True:
        told.set("stored", "int8", f"{config}.load_in_8bit", why="a scale for each channel")


def _lora(told: Translation, lora: str) -> None:
    told.settings |= {"rank": PEFT_RANK, "alpha": PEFT_ALPHA}
    for key, setting in (("r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        if (value := told.number(f"{lora}.{key}")) is not None:
            told.set(setting, value, f"{lora}.{key}")
    # Starts from data need more than a word.
    choices = {"use_dora": (True,), "use_rslora": (True,), "init_lora_weights": ("pissa", "olora")}
    for key, known in choices.items():
        if (asked := told.plain(f"{lora}.{key}")) in known:
            told.set("start" if key == "init_lora_weights" else key, asked, f"{lora}.{key}")
    path = f"{lora}.target_modules"
    named = told.plain(path)
    if named is None:
        why = "all linear layers there too, but InternLM2's head with them, which is left alone here"
        told.set("targets", "all-linear", path, why=why)
    elif isinstance(named, str):
        told.set("targets", named, path, why="taken as it is; names inside the model may differ here")
    elif isinstance(named, list) and all(isinstance(name, str) for name in named):
        told.set("targets", native_targets(named), path, why="by transformers' names")


def _parts(told: Translation) -> None:
    """InternVL's: the language model by LoRA, mlp1 whole, the tower if it has a LoRA of its own."""
    parts = ["language", "projector"]
    tower = "model.visual_encoder_lora"
    if isinstance(told.plain(tower), dict):
        parts.append("vision")
        for key in ("r", "lora_alpha", "lora_dropout"):
            told.explain(f"{tower}.{key}", "all parts have the language model's here")
        names, targets = told.listed(f"{tower}.target_modules"), told.settings["targets"]
        if isinstance(targets, list) and names:
            both = list(dict.fromkeys([*targets, *native_targets(names)]))
            told.set("targets", both, f"{tower}.target_modules", why="by transformers' names")
        else:
            told.explain(f"{tower}.target_modules", f"targets are those of all parts: {targets}")
    told.settings["parts"] = parts
    told.mark("model.freeze_llm", "parts", "its adapter is trained; so is mlp1, whole, as xtuner always does")
    frozen = told.plain("model.freeze_visual_encoder")
    same = frozen is True or "vision" in parts
    told.mark(
        "model.freeze_visual_encoder", "parts", "" if same else f"the tower's weights stay frozen; {DIFFERS}"
    )


def _data(told: Translation) -> None:
    several = told.at(f"{DATASET}.datasets")
    count = len(several.value) if several is not None and isinstance(several.value, list) else 0
    paths = [f"{DATASET}.datasets.{place}" for place in range(count)] or [DATASET]
    sources = [source for path in paths for source in _sources(told, path)]
    if not sources:
        near = told.at(DATASET) or told.at("train_dataloader") or told.at("model")
        place = "" if near is None else near.place
        raise ConfigError(
            f"{place}: no data can be read from {DATASET}: wanted data_paths, or dataset with data_files or "
            "path"
        )
    alone = len(sources) == 1 and [*sources[0]] == ["path"]
    told.settings["data"] = sources[0]["path"] if alone else sources
    lengths = {path: length for path in paths if (length := told.number(f"{path}.max_length")) is not None}
    if lengths:
        why = "longer rows are cut there; here they are left out and named"
        told.set(
            "max_length", int(max(lengths.values())), *(f"{path}.max_length" for path in lengths), why=why
        )
    tiles = f"{paths[0]}.max_dynamic_patch"
    if (most := told.number(tiles)) is not None:
        told.set("image_tiles", int(most), tiles)


def _sources(told: Translation, path: str) -> Iterator[dict[str, Any]]:
    """The files or hub data sets of one dataset of xtuner's, as sources."""
    if told.at(f"{path}.data_paths") is not None:
        folders, times = told.listed(f"{path}.image_folders"), told.listed(f"{path}.repeat_times")
        for place, name in enumerate(told.listed(f"{path}.data_paths")):
            beside = {"images": _nth(folders, place), "weight": _nth(times, place)}
            yield {"path": name} | {key: value for key, value in beside.items() if value is not None}
        told.mark(f"{path}.data_paths", "data")
        told.mark(f"{path}.image_folders", "data", "the folder of the images")
        told.mark(f"{path}.repeat_times", "data", "the weight")
        return
    inner = next((p for p in (f"{path}.dataset.data_files", f"{path}.dataset.path") if told.at(p)), "")
    found = told.plain(inner) if inner else None
    if isinstance(found, dict):
        inner, found = f"{inner}.train", found.get("train")
    for name in found if isinstance(found, list) else [found]:
        if isinstance(name, str):
            told.mark(inner, "data")
            yield {"path": name}


def _nth(values: list[Any], place: int) -> Any:
    """The value for one of several files; a single one is for all of them."""
    return values[place] if place < len(values) else values[0] if len(values) == 1 else None


def _accumulated(told: Translation) -> int:
    return max(1, int(told.number(ACCUMULATED) or 1))


def _steps(told: Translation) -> None:
    if told.plain(f"{DATASET}.pack_to_max_length") is True:
        why = "it counts packs of max_length tokens, and rows_per_step counts rows, so that is chosen anew"
        told.explain(BATCH, why)
        told.explain(ACCUMULATED, why)
    elif (rows := told.number(BATCH)) is not None:
        why = "batch_size x accumulative_counts, of one process; times the number of processes there were"
        told.set("rows_per_step", int(rows) * _accumulated(told), BATCH, ACCUMULATED, why=why)
    if (epochs := told.number("train_cfg.max_epochs")) is not None:
        told.set("epochs", int(epochs), "train_cfg.max_epochs")
    if (iterations := told.number("train_cfg.max_iters")) is not None:
        steps = max(1, int(iterations) // _accumulated(told))
        told.set("max_steps", steps, "train_cfg.max_iters", why=ITERATION.format(_accumulated(told)))


def _optimiser(told: Translation) -> None:
    optimiser = "optim_wrapper.optimizer"
    for path, setting in (
        (f"{optimiser}.lr", "learning_rate"),
        (f"{optimiser}.weight_decay", "weight_decay"),
        ("optim_wrapper.clip_grad.max_norm", "max_gradient_norm"),
    ):
        if (value := told.number(path)) is not None:
            told.set(setting, value, path)
    kind = _class(told, optimiser)
    told.explain(f"{optimiser}.type", "as here" if kind == "AdamW" else f"it is AdamW here; {DIFFERS}")
    same = told.plain(f"{optimiser}.betas") == [0.9, 0.999]
    told.explain(f"{optimiser}.betas", "as here" if same else f"they are 0.9 and 0.999 here; {DIFFERS}")


def _schedule(told: Translation) -> None:
    several = isinstance(told.plain("param_scheduler"), list)
    count = len(told.listed("param_scheduler"))
    paths = [f"param_scheduler.{place}" for place in range(count)] if several else ["param_scheduler"]
    for path in paths:
        kind = _class(told, path)
        if kind in SCHEDULES:
            told.set("schedule", SCHEDULES[kind], f"{path}.type")
        elif kind == "LinearLR" and told.plain(f"{path}.by_epoch") is not False:
            end, epochs = told.number(f"{path}.end"), told.number("train_cfg.max_epochs")
            if end is not None and epochs:
                told.set("warmup_share", round(end / epochs, 6), f"{path}.end", why="of the steps")
                told.mark("warmup_ratio", "warmup_share", "of the steps")
        elif told.at(f"{path}.type") is not None:
            told.explain(f"{path}.type", f"no schedule here is called {kind or 'so'}; {DIFFERS}")


def _runtime(told: Translation) -> None:
    hook = "default_hooks.checkpoint"
    every = told.number(f"{hook}.interval")
    if every is not None and told.plain(f"{hook}.by_epoch") is False:
        steps = max(1, int(every) // _accumulated(told))
        told.set("save_every_steps", steps, f"{hook}.interval", why=ITERATION.format(_accumulated(told)))
    elif every is not None:
        told.explain(f"{hook}.interval", "it counts epochs; here a checkpoint is written about once a minute")
    if (kept := told.number(f"{hook}.max_keep_ckpts")) is not None and kept > 0:
        told.set("keep_checkpoints", int(kept), f"{hook}.max_keep_ckpts")
    told.explain(f"{hook}.max_keep_ckpts", "all are kept there; here the newest 2, see keep_checkpoints")
    seed = told.number("randomness.seed")
    if isinstance(seed, int):
        told.set("seed", seed, "randomness.seed")

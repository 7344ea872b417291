from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes  # noqa: F401 - transformers looks for it
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from conftest import randomise, tiny_llama
from rankfold import AdapterTrainer, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rankfold.errors import AdapterError, ConfigError
from rankfold.train.huggingface import AdapterCheckpoints, load_checkpoint

CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.3,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}
QUIET = [
    "ignore:.*pin_memory.*",  # no accelerator here
    "ignore:.*scalar may lead to unexpected:UserWarning",
]
pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class Rows(torch.utils.data.Dataset):
    """Sixteen sequences that count upwards."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = [3 + (index + step) % 20 for step in range(12)]
        return {"input_ids": ids, "labels": ids}


def model(seed: int = 0, **options) -> PeftModel:
    base = tiny_llama(tied=True)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(**CONFIG | options))


def arguments(folder: Path, kind: type = TrainingArguments, **options) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "cosine",
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(**settings | options)


def adapter(of: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of.named_parameters() if "lora_" in name}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_checkpoint_holds_the_adapter_and_the_state_of_training_only(tmp_path):
    trainer = AdapterTrainer(model(), arguments(tmp_path), train_dataset=Rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    found = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "rankfold.json"}
    assert wanted <= found
    assert found - wanted == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    theirs = peft.PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path / "checkpoint-6").eval()
    ids = torch.tensor([Rows()[0]["input_ids"]])
    torch.testing.assert_close(theirs(ids).logits, trainer.model.eval()(ids).logits)


def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(tmp_path):
    whole = AdapterTrainer(model(), arguments(tmp_path / "whole"), train_dataset=Rows())
    whole.train()
    half = AdapterTrainer(model(), arguments(tmp_path / "half"), train_dataset=Rows())
    half.train()
    assert same(adapter(half.model), adapter(whole.model))
    resumed = AdapterTrainer(model(seed=9), arguments(tmp_path / "half"), train_dataset=Rows())
    assert not same(adapter(resumed.model), adapter(whole.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert same(adapter(resumed.model), adapter(whole.model))
    assert losses(resumed) == losses(whole)


def test_several_adapters_are_saved_and_resumed(tmp_path):
    first, second = model(), model(seed=4)
    for wrapped in (first, second):
        wrapped.add_adapter("other", LoraConfig(**CONFIG | {"r": 2}))
    randomise(first)
    AdapterTrainer(first, arguments(tmp_path), train_dataset=Rows()).save_model()
    load_checkpoint(second, tmp_path)
    assert same(adapter(first), adapter(second))
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    args = arguments(tmp_path, learning_rate=5.0, warmup_steps=3, **options)  # worse from step 3 on
    trainer = AdapterTrainer(model(), args, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    best = model()
    load_checkpoint(best, trainer.state.best_model_checkpoint)
    assert same(adapter(trainer.model), adapter(best))


def test_a_checkpoint_of_another_adapter_is_refused_and_the_model_left_alone(tmp_path):
    randomise(saved := model())
    saved.save_pretrained(tmp_path)
    other = model(lora_alpha=16, lora_dropout=0.1)
    before = adapter(other)
    message = r"another adapter:(.|\n)*lora_alpha: the checkpoint has 8, the model 16(.|\n)*lora_dropout"
    with pytest.raises(AdapterError, match=message):
        load_checkpoint(other, tmp_path)
    with pytest.raises(AdapterError, match="adapter_config.json"):
        load_checkpoint(other, tmp_path / "nowhere")
    assert same(adapter(other), before)


def test_a_model_without_adapter_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"AdapterTrainer trains a model from get_peft_model\(\), got a Llama"
    ):
        AdapterTrainer(tiny_llama(), arguments(tmp_path))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_run_is_pefts(smoothing, tmp_path):
    ours = model(lora_dropout=0.0)
    theirs = peft.get_peft_model(tiny_llama(tied=True), peft.LoraConfig(**CONFIG | {"lora_dropout": 0.0}))
    start = {key: value for key, value in ours.state_dict().items() if "lora_" in key}
    theirs.load_state_dict(start, strict=False)
    found = []
    for kind, wrapped in ((AdapterTrainer, ours), (Trainer, theirs)):
        args = arguments(tmp_path, label_smoothing_factor=smoothing, save_strategy="no")
        trainer = kind(wrapped, args, train_dataset=Rows())
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_gradient_checkpointing_gives_the_same_run(tmp_path):
    found = []
    for checkpointing in (False, True):
        args = arguments(tmp_path, activation_checkpointing=checkpointing, save_strategy="no")
        trainer = AdapterTrainer(model(), args, train_dataset=Rows())
        trainer.train()
        found.append(adapter(trainer.model))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


@pytest.fixture(params=[4, 8])
def quantised_base(request, tiny_folder):
    bits = request.param
    how = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=how, device_map={"": "cpu"})


@pytest.mark.parametrize("kind", [AdapterTrainer, Trainer])
def test_a_quantised_base_is_accepted_and_trained(kind, quantised_base, tmp_path):
    base = prepare_model_for_kbit_training(quantised_base)
    torch.manual_seed(0)
    wrapped = get_peft_model(base, LoraConfig(**CONFIG | {"lora_dropout": 0.0}))
    args = arguments(tmp_path, save_strategy="no", max_steps=16, lr_scheduler_type="constant")
    trainer = kind(wrapped, args, train_dataset=Rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    trainer.evaluate(Rows())
    assert not base.__dict__.get("_hf_peft_config_loaded")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.peft("TRL's `SFTTrainer`", "", "with `AdapterCheckpoints` before it")
def test_trl_trains_the_wrapped_model(tiny_folder, real_base, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class AdapterSFTTrainer(AdapterCheckpoints, SFTTrainer):
        pass

    talk = [
        [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": "One two three."}]
        for n in range(8)
    ]
    data = Dataset.from_dict({"messages": talk})
    options = {"bf16": False, "activation_checkpointing": True, "gradient_checkpointing": None}
    args = arguments(tmp_path, kind=SFTConfig, **options)
    trainer = AdapterSFTTrainer(model(), args, train_dataset=data, processing_class=real_base.tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert isinstance(trainer.model, PeftModel)
    again = PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path / "checkpoint-6")
    assert same(adapter(again), adapter(trainer.model))
    assert json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(AttributeError, match="last_hidden_state"):
        SFTTrainer(model(), args, train_dataset=data, processing_class=real_base.tokenizer).train()

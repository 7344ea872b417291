from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401 - transformers looks for it
import peft
import pytest
import torch
import trl
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import rankfold
from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from rankfold.errors import AdapterError

CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.3,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*scalar may lead to unexpected:UserWarning")


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


ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "rankfold.json", "README.md"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


def test_a_checkpoint_holds_the_adapter_and_the_state_of_training_only(tmp_path):
    trainer = Trainer(model(), arguments(tmp_path), train_dataset=Rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert {path.name for path in (tmp_path / "checkpoint-6").iterdir()} == ADAPTER | STATE
    theirs = peft.PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path / "checkpoint-6").eval()
    ids = torch.tensor([Rows()[0]["input_ids"]])
    torch.testing.assert_close(theirs(ids).logits, trainer.model.eval()(ids).logits)


def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(tmp_path):
    whole = Trainer(model(), arguments(tmp_path / "whole"), train_dataset=Rows())
    whole.train()
    half = Trainer(model(), arguments(tmp_path / "half"), train_dataset=Rows())
    half.train()
    assert same(adapter(half.model), adapter(whole.model))
    resumed = Trainer(model(seed=9), arguments(tmp_path / "half"), train_dataset=Rows())
    assert not same(adapter(resumed.model), adapter(whole.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert same(adapter(resumed.model), adapter(whole.model))
    assert losses(resumed) == losses(whole)


def test_several_adapters_are_saved_and_resumed(tmp_path):
    first, second = model(), model(seed=4)
    for wrapped in (first, second):
        wrapped.add_adapter("other", LoraConfig(**CONFIG | {"r": 2}))
    randomise(first)
    Trainer(first, arguments(tmp_path), train_dataset=Rows()).save_model()
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    trainer = Trainer(second, arguments(tmp_path), train_dataset=Rows())
    trainer._load_from_checkpoint(str(tmp_path))
    assert same(adapter(first), adapter(second))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    args = arguments(tmp_path, learning_rate=5.0, warmup_steps=3, **options)  # worse from step 3 on
    trainer = Trainer(model(), args, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    best = PeftModel.from_pretrained(tiny_llama(tied=True), trainer.state.best_model_checkpoint)
    assert same(adapter(trainer.model), adapter(best))


def test_a_checkpoint_of_another_adapter_is_refused_and_the_model_left_alone(tmp_path):
    randomise(saved := model())
    saved.save_pretrained(tmp_path)
    other = model(lora_alpha=16, use_rslora=True)
    before = adapter(other)
    message = r"another adapter:(.|\n)*lora_alpha: the file has 8, the model 16(.|\n)*use_rslora"
    with pytest.raises(AdapterError, match=message):
        other.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(AdapterError, match="adapter_config.json"):
        other.load_adapter(tmp_path / "nowhere", "default")
    assert same(adapter(other), before)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_run_is_pefts(smoothing, tmp_path):
    ours = model(lora_dropout=0.0)
    theirs = peft.get_peft_model(tiny_llama(tied=True), peft.LoraConfig(**CONFIG | {"lora_dropout": 0.0}))
    start = {key: value for key, value in ours.state_dict().items() if "lora_" in key}
    theirs.load_state_dict(start, strict=False)
    found = []
    for wrapped in (ours, theirs):
        args = arguments(tmp_path, label_smoothing_factor=smoothing, save_strategy="no")
        trainer = Trainer(wrapped, args, train_dataset=Rows())
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_gradient_checkpointing_gives_the_same_run(tmp_path):
    found = []
    for checkpointing in (False, True):
        args = arguments(tmp_path, activation_checkpointing=checkpointing, save_strategy="no")
        trainer = Trainer(model(), args, train_dataset=Rows())
        trainer.train()
        found.append(adapter(trainer.model))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


@pytest.fixture(params=[4, 8])
def quantised_base(request, tiny_folder):
    bits = request.param
    how = BitsAndBytesConfig(load_in_4bit=True) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=how, device_map={"": "cpu"})


def test_a_quantised_base_is_accepted_and_trained(quantised_base, tmp_path):
    base = prepare_model_for_kbit_training(quantised_base)
    torch.manual_seed(0)
    wrapped = get_peft_model(base, LoraConfig(**CONFIG | {"lora_dropout": 0.0}))
    args = arguments(tmp_path, save_strategy="no", max_steps=16, lr_scheduler_type="constant")
    trainer = Trainer(wrapped, args, train_dataset=Rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.05
    trainer.evaluate(Rows())
    assert not base.__dict__.get("_hf_peft_config_loaded")


def talk(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Count."}, {"role": "assistant", "content": answer}]


def rows_for(kind: str) -> Any:
    from datasets import Dataset

    good, bad = talk("One two three."), talk("I would rather not.")
    if kind == "SFT":
        return Dataset.from_dict({"messages": [good] * 8})
    return Dataset.from_dict({"prompt": [good[:1]] * 8, "chosen": [good[1:]] * 8, "rejected": [bad[1:]] * 8})


def trl_trainer(kind: str, wrapped: PeftModel, folder: Path, tokenizer: Any, **options: Any) -> Trainer:
    args = arguments(folder, kind=getattr(trl, f"{kind}Config"), bf16=False, **options)
    rows = rows_for(kind)
    return getattr(trl, f"{kind}Trainer")(wrapped, args=args, train_dataset=rows, processing_class=tokenizer)


def model_for(kind: str) -> PeftModel:
    if kind != "Reward":
        return model()
    torch.manual_seed(0)
    shape = tiny_llama().config
    shape.update({"num_labels": 1, "pad_token_id": 2})
    return get_peft_model(
        LlamaForSequenceClassification(shape), LoraConfig(**CONFIG | {"task_type": "SEQ_CLS"})
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "kind", ["SFT", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("DPO", "Reward"))]
)
@pytest.mark.peft("TRL's `SFTTrainer`, `DPOTrainer`, `RewardTrainer`", "", "the same")
def test_trl_trains_saves_and_resumes_the_wrapped_model(kind, real_base, tmp_path):
    whole = trl_trainer(kind, model_for(kind), tmp_path, real_base.tokenizer)
    assert whole.model.get_base_model() is not whole.model
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0] - 0.05
    found = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert found >= ADAPTER | STATE
    assert not [name for name in found if name.startswith(("model", "pytorch_model"))]
    again = trl_trainer(kind, model_for(kind), tmp_path, real_base.tokenizer)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(adapter(again.model), adapter(whole.model))


WITHOUT_PEFT = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import is_peft_available
assert not is_peft_available()
from rankfold import LoraConfig, get_peft_model
rows = [{"input_ids": [3 + i, 4 + i, 5 + i], "labels": [3 + i, 4 + i, 5 + i]} for i in range(8)]
shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, tie_word_embeddings=True)
def trained(**resume):
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(shape), LoraConfig(task_type="CAUSAL_LM"))
    args = TrainingArguments(sys.argv[1], max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2,
                             load_best_model_at_end=True, report_to="none", use_cpu=True, learning_rate=0.1)
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train(**resume)
    return {n: p for n, p in model.named_parameters() if "lora_" in n}
whole = trained()
again = trained(resume_from_checkpoint=sys.argv[1] + "/checkpoint-2")
assert all(torch.equal(whole[name], again[name]) for name in whole)
"""


@pytest.mark.slow
def test_a_trainer_saves_and_resumes_the_adapter_where_peft_is_not_installed(tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.startswith("peft"):
            (packages / path.name).symlink_to(path)
    source = Path(rankfold.__file__).parents[1]
    own = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{packages}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-c", WITHOUT_PEFT, str(tmp_path / "run")]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert found == ADAPTER | STATE

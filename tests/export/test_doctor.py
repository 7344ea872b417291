"""Adapters as people have them: keys that other programs decorated, fields that are missing, other bases."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankfold.errors import AdapterError
from rankfold.export.doctor import examine, repair

PREFIX = "base_model.model."
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(2))
RENAMED = {
    "without PEFT's prefix": lambda key: key.removeprefix(PREFIX),
    "by DataParallel": lambda key: f"module.{key}",
    "of a compiled model": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "of the inner model": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
    "of a model that sees images": lambda key: key.replace(
        f"{PREFIX}model.", f"{PREFIX}language_model.model."
    ),
}


@pytest.fixture
def adapter(adapted):
    _, folder = adapted(target_modules=["q_proj", "down_proj"])
    (folder / "rankfold.json").unlink()  # it would tell that the files are others
    return folder


def rewrite(folder, rename=lambda key: key, **changes):
    file = folder / "adapter_model.safetensors"
    own = load_file(file)
    save_file({rename(key): tensor for key, tensor in own.items() if rename(key)}, file)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    told = json.dumps({key: value for key, value in config.items() if value != "absent"})
    (folder / "adapter_config.json").write_text(told)


def logits(base, folder):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(plain, folder).eval()(IDS).logits


def test_a_sound_adapter_is_usable_everywhere(adapter):
    found = examine(adapter)
    assert (found.wrong, found.mended, found.unbound) == ([], [], [])
    assert len(found.bound) == 4
    assert {*found.programs} == {"PEFT", "llama.cpp", "mlx-lm", "vllm", "sglang", "lmdeploy"}
    assert not any(found.programs.values())
    with pytest.raises(AdapterError, match="nothing in .* that can be mended"):
        repair(found, adapter.parent / "out")


@pytest.mark.parametrize("kind", RENAMED)
def test_decorated_names_are_mended_and_peft_computes_what_it_did(adapter, tmp_path, kind):
    wanted = logits(tmp_path / "base", adapter)
    rewrite(adapter, RENAMED[kind])
    found = examine(adapter)
    assert found.wrong == []
    assert len(found.bound) == 4
    assert len(found.renamed) == 8
    assert all("have other names (--repair)" in why for why in found.programs.values())
    repair(found, tmp_path / "mended")
    torch.testing.assert_close(logits(tmp_path / "base", tmp_path / "mended"), wanted)
    assert not any(examine(tmp_path / "mended").programs.values())


def test_tensors_of_no_module_and_halves_of_pairs_are_wrong(adapter):
    rewrite(adapter, lambda key: key.replace("q_proj", "query_key_value"))
    found = examine(adapter)
    assert "4 of 8 tensors belong to no module" in found.wrong[0]
    assert len(found.bound) == 2
    assert all("would pass over 4 tensors" in why for why in found.programs.values())
    rewrite(adapter, lambda key: "" if "layers.1.mlp.down_proj.lora_B" in key else key)
    assert any(
        "1 modules have one factor of two: model.layers.1.mlp.down_proj" in w for w in examine(adapter).wrong
    )


def test_what_is_missing_in_a_config_is_told_and_written_as_others_take_it(adapter, tmp_path):
    wanted_base = str(tmp_path / "base")
    rewrite(adapter, lora_alpha="absent", base_model_name_or_path="gone/away")
    found = examine(adapter, wanted_base)
    assert any("no lora_alpha; PEFT and others take 8" in text for text in found.odd)
    repair(found, tmp_path / "mended")
    config = json.loads((tmp_path / "mended" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["base_model_name_or_path"]) == (8, wanted_base)


def test_weights_of_torchs_old_format_become_safetensors(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    found = examine(adapter)
    assert found.mended == ["the weights become adapter_model.safetensors"]
    repair(found, tmp_path / "mended")
    assert (tmp_path / "mended" / "adapter_model.safetensors").is_file()


def test_pairs_of_zeros_and_numbers_that_are_none_are_told(adapter):
    file = adapter / "adapter_model.safetensors"
    own = load_file(file)
    save_file({key: 0 * tensor if "lora_B" in key else tensor for key, tensor in own.items()}, file)
    assert "every pair is zero: it computes what the base does" in examine(adapter).wrong
    save_file({key: tensor / 0 if "layers.0.mlp" in key else tensor for key, tensor in own.items()}, file)
    assert any("holds NaN or infinite values" in text for text in examine(adapter).wrong)


def test_what_a_program_has_no_place_for_is_told_for_each(adapted):
    _, adapter = adapted(use_dora=True)
    programs = examine(adapter).programs
    assert (programs["PEFT"], programs["mlx-lm"]) == ("", "")
    assert "magnitudes (DoRA)" in programs["llama.cpp"]
    assert "lora_magnitude_vector" in programs["vllm"]

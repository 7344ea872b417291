"""Adapters under other names, read back; what the programs make of them is for ``make engines``."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from rankfold.errors import ExportError, ModelError
from rankfold.export import layouts
from rankfold.export.request import ExportRequest
from rankfold.export.run import export_adapter


def export(adapter, out, **options):
    return export_adapter(adapter, out, ExportRequest.of({"prompts": 2} | options))


def test_an_adapter_for_mlx_comes_with_a_certificate_and_goes_back_without_one(adapted, tmp_path):
    _, adapter = adapted(target_modules=["q_proj", "up_proj"])
    done = export(adapter, tmp_path / "mlx", to="mlx")
    assert (tmp_path / "mlx" / "adapters.safetensors").is_file()
    assert done.certificate.engine == "our own reader"
    assert done.certificate.answers_equal == done.certificate.prompts == 2
    back = export(tmp_path / "mlx", tmp_path / "hf", to="hf")
    assert back.certificate is None
    assert any("read by mlx alone" in note for note in back.notes)
    own, again = (load_file(each / "adapter_model.safetensors") for each in (adapter, tmp_path / "hf"))
    assert own.keys() == again.keys()


def test_a_base_whose_positions_mlx_would_misread_in_silence_is_refused(adapted, tmp_path):
    base, adapter = adapted()
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50000.0
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match='Add "rope_theta": 50000.0 to it'):
        export(adapter, tmp_path / "out", to="mlx", allow=["base"])
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 50000.0}))
    export(adapter, tmp_path / "out", to="mlx", prompts=0)


def test_an_adapter_of_a_run_becomes_pefts_two_files_and_peft_is_asked(adapted, tmp_path):
    _, adapter = adapted()
    (adapter / "checkpoint-3").mkdir()
    done = export(adapter, tmp_path / "out", to="hf")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *(
            "adapter_config.json",
            "adapter_model.safetensors",
            "rankfold.json",
            "certificate.json",
            "README.md",
        )
    }
    assert done.certificate.engine.startswith("peft ")
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["mean_kl"] < 1e-7


def test_an_adapter_that_lost_a_module_on_the_way_is_found(adapted, tmp_path, monkeypatch):
    _, adapter = adapted(target_modules=["down_proj", "v_proj"])
    save = layouts.save_adapter

    def without_one(tensors, *more):
        save({key: tensor.zero_() if "layers.1" in key else tensor for key, tensor in tensors.items()}, *more)

    monkeypatch.setattr(layouts, "save_adapter", without_one)
    with pytest.raises(ExportError, match="nats a token from the tuned model's"):
        export(adapter, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()

"""The merged model in a folder, beside the base and the adapter in PEFT, unmerged."""

from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import tiny_llama
from rankfold.data.shapes.example import Example, Message
from rankfold.errors import AdapterError, ConfigError, DataError, ExportError, OutputError
from rankfold.export import merged
from rankfold.export.certificate import Certificate, compare
from rankfold.export.judges import transformers_judge
from rankfold.export.merged import older_words
from rankfold.export.opened import open_adapter
from rankfold.export.request import ExportRequest
from rankfold.export.run import export_adapter
from rankfold.export.told import told_by
from rankfold.models.base.load import load_tuned

IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(2))
KINDS = {
    "dora and a whole module": {
        "target_modules": ["q_proj", "down_proj"],
        "use_dora": True,
        "modules_to_save": ["lm_head"],
    },
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "the head": {"target_modules": ["lm_head", "v_proj"]},
    "rows of tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 5]},
    "rslora and patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"up_proj": 2},
    },
}


def export(adapter, out, **options):
    return export_adapter(adapter, out, ExportRequest.of({"to": "merged", "prompts": 3} | options))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "tied"), [*((kind, True) for kind in KINDS), ("embeddings", False)])
def test_the_folder_computes_what_peft_does_with_the_adapter(adapted, tmp_path, kind, tied):
    base, adapter = adapted(tied=tied, **KINDS[kind])
    done = export(adapter, tmp_path / "out", shard_mb=2)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(plain, adapter).eval()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-5)
    assert done.certificate is not None
    assert done.certificate.tokens_equal == done.certificate.prompts == 3
    assert done.certificate.worst_lost == 0


def test_a_bfloat16_base_stays_so_and_the_certificate_tells_what_is_left_of_the_update(adapted, tmp_path):
    _, adapter = adapted(dtype=torch.bfloat16)
    export(adapter, tmp_path / "out")
    [file] = (tmp_path / "out").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    told = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert told["holds"] is True
    assert told["dtype"] == "bfloat16"
    assert 0 < told["update_lost"] <= told["worst_lost"] < 0.3
    assert told["worst_layer"].endswith("q_proj.weight")
    assert told["files"].keys() == {
        file.name for file in (tmp_path / "out").iterdir() if file.name != "certificate.json"
    }
    wide = export(adapter, tmp_path / "wide", dtype="float32")
    assert wide.certificate.mean_kl < 1e-7


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_update_that_rounding_takes_away_is_told(adapted, tmp_path):
    _, adapter = adapted(dtype=torch.bfloat16)
    file = adapter / "adapter_model.safetensors"
    save_file({key: 0.003 * tensor for key, tensor in load_file(file).items()}, file)
    done = export(adapter, tmp_path / "out", allow=["hash"])
    assert done.certificate.update_lost > 0.5
    assert any("--dtype float32 keeps it" in note for note in done.notes)


def test_older_readers_find_their_words(adapted, tmp_path):
    base, adapter = adapted()
    export(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert "chat_template" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>") in ends


def test_scaled_positions_are_told_in_the_older_words_too():
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
    words = older_words({"dtype": "bfloat16", "rope_parameters": rope})
    assert words["rope_theta"] == 5e5
    assert words["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert older_words({"dtype": "float32", "torch_dtype": "float32"}) == {}
    by_kind = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert older_words({"dtype": "float32", "rope_parameters": by_kind}) == {"torch_dtype": "float32"}


def test_large_weights_are_in_several_files_that_others_may_read(adapted, tmp_path):
    _, adapter = adapted()
    export(adapter, tmp_path / "out", shard_mb=1, prompts=0)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sorted({*index["weight_map"].values()}) == [file.name for file in files]
    assert len(files) > 2
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    found = {key: file.name for file in files for key in load_file(file)}
    assert found == index["weight_map"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_base_is_refused_and_nothing_is_left(adapted, tmp_path):
    base, adapter = adapted()
    tiny_llama(seed=3).save_pretrained(base)
    with pytest.raises(AdapterError, match="another base model: the weights differ; name the right one"):
        export(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    done = export(adapter, tmp_path / "out", allow=["base"])
    assert any("another base model" in note for note in done.notes)


@pytest.mark.parametrize("broken", ["weights", "template"])
def test_what_says_something_else_is_told_and_nothing_is_left(adapted, tmp_path, monkeypatch, broken):
    _, adapter = adapted()
    write_text_side = merged._write_text_side

    def and_damage(base, folder, dtype):
        write_text_side(base, folder, dtype)
        if broken == "weights":
            file = folder / "model.safetensors"
            tensors = load_file(file)
            tensors["model.layers.1.self_attn.v_proj.weight"].zero_()
            save_file(tensors, file, metadata={"format": "pt"})
        else:
            (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    monkeypatch.setattr(merged, "_write_text_side", and_damage)
    told = {"weights": "nats a token", "template": "3 of 3 prompts become other tokens"}
    with pytest.raises(ExportError, match=told[broken]):
        export(adapter, tmp_path / "out", allow=["hash"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_answer_that_no_longer_ends_is_told(adapted, tmp_path, real_base):
    _, adapter = adapted()
    export(adapter, tmp_path / "out", prompts=0)
    rows = [Example("here:1", (Message("user", ("Hello?",)), Message("assistant", ("Hi.",))))]
    told = told_by(load_tuned(adapter, merged=False), rows)
    ended = [replace(each, ended=True) for each in told]
    for answers, problems in ((told, []), (ended, ["1 of 1 answers end elsewhere"])):
        judge = transformers_judge(tmp_path / "out", "chat")
        made = Certificate("merged", judge.name, "float32", most_kl=1e-6)
        assert compare(made, answers, judge.says(answers)).problems == problems


def test_what_is_no_change_of_a_bases_weights_is_refused(adapted, tmp_path):
    _, adapter = adapted()
    config = json.loads((adapter / "adapter_config.json").read_text())
    changed = config | {"init_lora_weights": "pissa", "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}
    (adapter / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(AdapterError, match=r"(?s)changed the base weights.*KaSA"):
        export(adapter, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(OutputError, match="not an empty folder"):
        export(adapter, tmp_path / "out")


def test_a_full_disk_is_told_and_nothing_is_left(adapted, tmp_path, monkeypatch):
    _, adapter = adapted()

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("rankfold.export.shards.save_file", full)
    with pytest.raises(OutputError, match=f"cannot write the weights into {tmp_path}: .*No space left"):
        export(adapter, tmp_path / "out")
    monkeypatch.setattr("rankfold.export.merged.require_space", lambda _, size: pytest.fail(str(size)))
    with pytest.raises(pytest.fail.Exception, match="12638848"):  # 3.2 million numbers of 4 bytes
        export(adapter, tmp_path / "out", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_run_whose_rows_are_gone_is_asked_general_questions(adapted, tmp_path):
    base, adapter = adapted()
    rows = {"model": str(base), "data": str(tmp_path / "gone.jsonl"), "out": str(adapter)}
    (adapter / "recipe.yaml").write_text(yaml.safe_dump(rows))
    done = export(adapter, tmp_path / "out")
    assert done.certificate.prompts == 3
    assert any(note.startswith("general questions are asked") and "gone" in note for note in done.notes)
    pictures = tmp_path / "pictures.jsonl"
    pictures.write_text(
        json.dumps({"image": "a.png", "prompt": "What is it?", "completion": "A cat."}) + "\n"
    )
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of 1 prompts could be asked"):
        export(adapter, tmp_path / "other", data=str(pictures))


def test_the_request_is_checked_as_a_whole():
    with pytest.raises(ConfigError, match=r"(?s)to.*shard_mb"):
        ExportRequest.of({"to": "onnx", "shard_mb": 0})


def test_a_card_names_the_base_its_licence_and_what_was_seen(adapted, tmp_path):
    base, adapter = adapted()
    export(adapter, tmp_path / "mine", prompts=0)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {base}\nlibrary_name: transformers\n")
    assert "# mine\n" in card
    assert "The licence of the base was not found" in card
    assert "certificate" not in card
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    export(adapter, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "license: apache-2.0\n" in card
    assert "answered 3 of 3 prompts with the tuned model's own words" in card


def test_what_a_fingerprint_takes_of_a_weight_does_not_hold_the_weight(adapted):
    _, adapter = adapted()
    with open_adapter(adapter, ExportRequest(to="merged")).merging() as merging:
        largest = max(tensor.nbytes for _, tensor, _ in merging.tensors())
        assert max(mark.sample.untyped_storage().nbytes() for mark in merging.marks.values()) < largest / 10

from __future__ import annotations

import pytest
import yaml

from conftest import rankfold_command
from rankfold import Recipe
from rankfold.errors import ConfigError, OutputError
from rankfold.interop.recipe_text import recipe_text, write_recipe
from rankfold.interop.translation import UNKNOWN
from rankfold.interop.xtuner import import_xtuner
from rankfold.interop.xtuner_tables import native_targets
from rankfold.train.asked.recipe_file import read_recipe
from xtuner_configs import INTERNVL, QLORA


@pytest.fixture
def imported(tmp_path):
    def from_text(text: str, *changes: tuple[str, str]):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "config.py").write_text(text)
        return import_xtuner(tmp_path / "config.py")

    return from_text


def line_of(text: str, part: str) -> str:
    number = next(n for n, line in enumerate(text.splitlines(), start=1) if part in line)
    return f"config.py:{number}"


def test_an_internvl_config_becomes_its_recipe(imported):
    assert imported(INTERNVL).settings == {
        "model": "OpenGVLab/InternVL2_5-8B",
        "rank": 128,
        "alpha": 256,
        "dropout": 0.05,
        "targets": "all-linear",
        "parts": ["language", "projector"],
        "data": [{"path": "./data/llava/mix.json", "images": "./data/llava/images"}],
        "max_length": 8192,
        "rows_per_step": 16,
        "epochs": 1,
        "learning_rate": 1e-6,
        "weight_decay": 0.05,
        "max_gradient_norm": 1,
        "warmup_share": 0.03,
        "schedule": "cosine",
        "save_every_steps": 500,
        "keep_checkpoints": 1,
    }


def test_a_qlora_config_becomes_its_recipe_without_the_packs(imported):
    settings = imported(QLORA).settings
    assert (settings["model"], settings["data"]) == ("internlm/internlm2-chat-7b", "tatsu-lab/alpaca")
    assert (settings["rank"], settings["alpha"], settings["dropout"]) == (64, 16, 0.1)
    assert "rows_per_step" not in settings
    assert "parts" not in settings
    assert settings["epochs"] == 3
    assert settings["stored"] == "nf4"


IN_4_BITS = "quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True)"


@pytest.mark.parametrize(
    ("bits", "stored", "told"),
    [
        ("load_in_4bit=True, bnb_4bit_quant_type='nf4'", "nf4", "as there"),
        ("load_in_4bit=True, bnb_4bit_quant_type='fp4'", "nf4", "differs from xtuner"),
        ("load_in_8bit=True, llm_int8_threshold=6.0", "int8", "a scale for each channel"),
        ("load_in_4bit=False", None, "follows from stored"),
    ],
)
def test_the_bits_of_a_quantised_base_are_those_it_is_held_in(imported, bits, stored, told):
    changed = f"quantization_config=dict(type=BitsAndBytesConfig, {bits})"
    found = imported(QLORA, (IN_4_BITS, changed))
    assert found.settings.get("stored") == stored
    [line] = [line for line in found.lines if "load_in_" in line.name]
    assert told in line.why
    assert not [line for line in found.lines if line.why == UNKNOWN]


@pytest.mark.parametrize(("asked", "stored"), [(True, "nf4"), (False, None)])
def test_an_internvl_language_model_in_4_bits_is_held_so(imported, asked, stored):
    marks = f"freeze_llm=True,\n    quantization_llm={asked},\n    quantization_vit={asked}"
    found = imported(INTERNVL, ("freeze_llm=True", marks))
    assert found.settings.get("stored") == stored
    [tower] = [line for line in found.lines if line.name == "model.quantization_vit"]
    assert ("differs" in tower.why) == asked


@pytest.mark.parametrize("text", [INTERNVL, QLORA], ids=["internvl", "qlora"])
def test_every_value_has_a_line_and_a_reason(imported, text):
    lines = imported(text).lines
    assert all(line.setting or line.why for line in lines)
    assert not [line for line in lines if line.why == UNKNOWN]
    assigned = [
        line.split("=")[0].strip() for line in text.splitlines() if line[:1].isalpha() and " = " in line
    ]
    told = {line.name.split(".")[0] for line in lines}
    aliases = {"train_dataloader"}  # whose values all stand in variables
    assert {*assigned} - told <= aliases


def test_lines_lead_to_where_the_value_is_written(imported):
    lines = {line.name: line for line in imported(INTERNVL).lines}
    assert lines["lr"].place == line_of(INTERNVL, "lr = 1e-6")
    assert lines["model.llm_lora.r"].place == line_of(INTERNVL, "r=128")
    assert lines["data_root"].why == "other values were worked out from it"
    assert (lines["batch_size"].setting, lines["accumulative_counts"].setting) == ("rows_per_step",) * 2


def test_an_unknown_value_is_told_as_such(imported):
    lines = {line.name: line for line in imported(f"{INTERNVL}magic = 3\nfrom_code = make()\n").lines}
    assert lines["magic"].why == UNKNOWN
    assert lines["from_code"].why == "not read: it would have to be run"


def test_a_variable_that_nothing_uses_changes_nothing(imported):
    change = ("lr=lr", "lr=3e-4")
    found = imported(INTERNVL, change)
    assert found.settings["learning_rate"] == 3e-4
    assert {line.name: line for line in found.lines}["lr"].setting == ""


def test_targets_get_transformers_names(imported):
    found = imported(INTERNVL, ("target_modules=None", "target_modules=['wqkv', 'wo', 'w1', 'output']"))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "lm_head"]
    assert found.settings["targets"] == names
    assert native_targets(["attn.qkv", "attn.proj", "mlp.fc1", "attention.wqkv", "other"]) == [
        *("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "other"),
    ]


def test_a_tower_with_a_lora_is_a_part(imported):
    tower = "visual_encoder_lora=dict(type=LoraConfig, r=64, target_modules=['attn.proj']),\n    llm_lora="
    found = imported(INTERNVL, ("llm_lora=", tower), ("target_modules=None", "target_modules=['wo']"))
    assert found.settings["parts"] == ["language", "projector", "vision"]
    assert found.settings["targets"] == ["o_proj", "projection_layer"]
    assert found.settings["rank"] == 128
    assert any("all parts have the language model's" in line.why for line in found.lines)


def test_a_variant_and_a_start_become_settings(imported):
    lora = "r=128, use_dora=True, use_rslora=False, init_lora_weights='pissa'"
    found = imported(INTERNVL, ("r=128", lora))
    assert (found.settings["use_dora"], found.settings["start"]) == (True, "pissa")
    assert "use_rslora" not in found.settings
    unknown = imported(INTERNVL, ("r=128", "r=128, init_lora_weights='gaussian'"))
    assert "start" not in unknown.settings
    assert any(line.name.endswith("init_lora_weights") and line.why for line in unknown.lines)


def test_several_files_with_their_folders_and_weights(imported):
    found = imported(
        INTERNVL,
        ("data_paths=data_path", "data_paths=['a.json', 'b.jsonl']"),
        ("image_folders=image_folder", "image_folders=['x', 'y'], repeat_times=[2, 0.5]"),
    )
    assert found.settings["data"] == [
        {"path": "a.json", "images": "x", "weight": 2},
        {"path": "b.jsonl", "images": "y", "weight": 0.5},
    ]


def test_files_of_rows_and_several_datasets(imported):
    files = "dataset=dict(type=load_dataset, path='json', data_files=dict(train='a.json'))"
    found = imported(QLORA, ("dataset=dict(type=load_dataset, path=alpaca_en_path)", files))
    assert found.settings["data"] == "a.json"
    several = "dataset=dict(type=Concat, datasets=[alpaca_en, dict(dataset=dict(path='org/two'))])"
    found = imported(QLORA, ("dataset=alpaca_en", several))
    assert found.settings["data"] == [{"path": "tatsu-lab/alpaca"}, {"path": "org/two"}]


def test_a_run_counted_in_iterations(imported):
    found = imported(INTERNVL, ("max_epochs=max_epochs)", "max_iters=100)"))
    assert found.settings["max_steps"] == 50
    assert "epochs" not in found.settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [("model = dict", "mode = dict")],
            r"no config of xtuner 0.1: wanted model = dict\(...\), it assigns",
        ),
        ([("type=InternVL_V1_5,", "type=DPO,")], "config.py:34: cannot import a model of type DPO"),
        ([("llm_lora=dict", "other=dict")], "no model.llm_lora, so whole weights would be trained"),
        ([("path = 'OpenGVLab/InternVL2_5-8B'", "path = find()")], "config.py:16: wanted the model's name"),
        ([("data_paths", "dat_paths")], "no data can be read from train_dataloader.dataset"),
        ([("r=128", "r=0")], "rank: .*greater than or equal to 1, got 0"),
        ([("max_epochs = 1", "max_epochs = ")], "config.py:25: not Python"),
    ],
)
def test_what_cannot_be_imported_is_told(imported, changes, message):
    with pytest.raises(ConfigError, match=message):
        imported(INTERNVL, *changes)


def test_the_recipe_is_one_and_says_where_each_setting_comes_from(imported, tmp_path):
    found = imported(INTERNVL)
    write_recipe(found, tmp_path / "config.py", tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert f"# {line_of(INTERNVL, 'lr = 1e-6')}\nlearning_rate: 1.0e-06\n" in text
    settings = read_recipe(tmp_path / "recipe.yaml")
    assert settings == yaml.safe_load(recipe_text(found, tmp_path / "config.py")) == found.settings
    assert Recipe.of({"out": "run", **settings}).rank == 128
    with pytest.raises(OutputError, match="recipe.yaml exists; name a new file"):
        write_recipe(found, tmp_path / "config.py", tmp_path / "recipe.yaml")
    with pytest.raises(OutputError, match="belongs, is no folder"):
        write_recipe(found, tmp_path / "config.py", tmp_path / "none" / "recipe.yaml")


def test_the_command_prints_a_recipe_and_tells_of_the_rest_beside_it(tmp_path):
    (tmp_path / "config.py").write_text(INTERNVL)
    run = rankfold_command("import", "xtuner", tmp_path / "config.py")
    assert run.returncode == 0, run.stderr
    assert yaml.safe_load(run.stdout)["rank"] == 128
    assert "lr = 1e-06  -> learning_rate" in run.stderr
    out = tmp_path / "recipe.yaml"
    run = rankfold_command("import", "xtuner", tmp_path / "config.py", "--out", out)
    assert (run.returncode, out.is_file()) == (0, True)
    assert f"written  {out}" in run.stdout
    run = rankfold_command("import", "other", tmp_path / "config.py")
    assert run.returncode == 2
    assert "xtuner" in run.stderr

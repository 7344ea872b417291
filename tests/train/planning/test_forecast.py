from __future__ import annotations

import json

import pytest

from conftest import rankfold_command, tiny_llama
from image_bases import noise, write_original
from internvl_8b import PARAMETERS, write_config_8b
from rankfold.errors import ConfigError, DataError, ModelError, TargetError
from rankfold.models.base.find import DEFAULT_MODEL
from rankfold.models.base.meta_model import load_outline
from rankfold.models.base.precision import Precision
from rankfold.processes import Processes
from rankfold.train.planning.forecast import MARGIN, ForecastRequest, forecast
from rankfold.train.planning.plan import make_plan
from rankfold.train.planning.rows import prepare

QUICK = {"tflops": 1, "memory_gb": 24}  # nothing is timed


@pytest.fixture
def ask(write_rows, joke_rows):
    def ask_for(model, rows=None, **options):
        data = options.pop("data", None) or write_rows(rows or joke_rows)
        return forecast(ForecastRequest.of({"model": str(model), "data": data, **QUICK, **options}))

    return ask_for


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    return write_config_8b(tmp_path_factory.mktemp("8b"))


@pytest.fixture(scope="module")
def told_8b(internvl, tmp_path_factory):
    """The plan for InternVL2_5-8B on rows of text, in 24 GB."""
    data = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"Joke about {n} hats?", "completion": f"There were {n} hats."} for n in range(24)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return forecast(ForecastRequest.of({"model": str(internvl), "data": data, "epochs": 1, **QUICK}))


def test_internvl_8b_from_its_config_alone(told_8b):
    told = told_8b
    assert sum(told.parameters.values()) == PARAMETERS
    assert told.parameters == {
        "embeddings and head": 2 * 92553 * 4096,
        "language": 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096,
        "projector": 2 * 4096 + 4096 * 4096 + 4096 + 4096 * 4096 + 4096,
        "vision": 304_012_288,
    }
    assert told.adapter.trained == 41_943_040  # rank 16 on the seven linear layers of 32 layers
    assert told.adapter.training_bytes == 16 * 41_943_040
    assert (told.tile.tokens, told.tile.most) == (256, 13)


def test_bytes_by_form(told_8b):
    forms = {form.name: form for form in told_8b.forms}
    assert forms["float32"].weight_bytes == 4 * PARAMETERS
    assert forms["bfloat16"].weight_bytes == 2 * PARAMETERS
    sizes = told_8b.parameters
    ends, language = sizes["embeddings and head"], sizes["language"]
    itemsize = {"float32": 4, "bfloat16": 2}[forms["int8"].computed_in]
    plain = itemsize * (sizes["projector"] + sizes["vision"])
    assert forms["int8"].weight_bytes == pytest.approx(ends + language + plain, rel=2e-3)
    assert forms["q4_0"].weight_bytes == pytest.approx(ends + language * 4.5 / 8 + plain, rel=2e-3)
    assert forms["nf4"].weight_bytes == pytest.approx(2 * ends + language * 4.127 / 8 + plain, rel=2e-3)


def test_targets_parts_and_rank_are_those_of_a_recipe(ask, internvl):
    told = ask(internvl, targets="q_proj,v_proj", rank=4)
    assert told.adapter.trained == 32 * 4 * ((4096 + 4096) + (4096 + 1024))
    whole = ask(internvl, parts="language,projector", rank=16)
    assert whole.adapter.trained == 41_943_040 + told.parameters["projector"]
    assert any("projector" in line and "trained whole" in line for line in whole.adapter.told)


def test_a_plan_for_a_small_model_says_what_a_run_would(ask, tiny_folder, write_rows, joke_rows, tmp_path):
    told = ask(tiny_folder, rank=4, epochs=2)
    recipe = ForecastRequest.of(
        {
            "model": str(tiny_folder),
            "data": write_rows(joke_rows),
            "out": tmp_path / "run",
            "rank": 4,
            "epochs": 2,
        }
    )
    plan = make_plan(recipe, prepare(recipe), Precision.of("float32"), Processes())
    trainable, everything = plan.model.get_nb_trainable_parameters()
    assert told.adapter.trained == trainable
    assert sum(told.parameters.values()) == everything - trainable
    assert told.lengths.train == [len(row) for row in plan.train]
    assert told.lengths.trained == plan.proof.trained_tokens
    assert told.lengths.held_out == sum(map(len, plan.held_out))
    assert told.settings == plan.settings


def test_the_default_base_is_planned_for_without_its_weights(ask):
    told = ask(DEFAULT_MODEL)
    assert sum(told.parameters.values()) == 134_515_008
    assert told.adapter.trained == 4_884_480
    assert "counted" in told.lengths.how


def test_what_fits_depends_on_the_memory(ask, internvl):
    """Between the two peaks of bfloat16, which hold what this process itself has in memory."""
    [bfloat16] = [form for form in ask(internvl).forms if form.name == "bfloat16"]
    between = (bfloat16.peak_bytes + bfloat16.recomputed_peak_bytes) / 2
    fits = {form.name: form.fits for form in ask(internvl, memory_gb=MARGIN * between / 1e9).forms}
    assert (fits["float32"], fits["bfloat16"], fits["q4_0"]) == ("no", "recomputed", "yes")
    kept = {f.name: f for f in ask(internvl, activation_checkpointing=False, memory_gb=8).forms}
    assert {(form.fits, form.seconds) for form in kept.values()} == {("no", None)}


def test_time_is_operations_by_speed(ask, tiny_folder, told_8b):
    """2 operations a weight forward, 2 backward: of 7.0 B weights on the tokens of all steps; and four times
    a forward of the held-out rows, or of as many that were trained on."""
    told = told_8b
    rows = told.settings.steps * told.settings.rows_per_step
    tokens = sum(told.lengths.train) / len(told.lengths.train) * rows
    products = 4 * tokens + 4 * 2 * told.lengths.held_out
    assert told.operations == pytest.approx(products * told.parameters["language"], rel=0.15)
    [blocks] = [form for form in told.forms if form.name == "q4_0"]
    alone = told.operations / 1e12
    assert blocks.seconds == pytest.approx(alone + max(5, 0.05 * alone))  # general text is read too
    once, fast, twice = (ask(tiny_folder, **more) for more in ({"epochs": 1}, {"tflops": 100}, {"epochs": 2}))
    assert fast.forms[0].seconds == pytest.approx(5 + fast.operations / 1e14)
    assert twice.operations == pytest.approx(2 * once.operations, rel=0.1)


def test_images_count_by_their_tiles(ask, internvl, tmp_path):
    """With and without a tokenizer the tiles are those of InternVL's rule."""
    for n in range(0, 24, 2):  # a file each: rows with the same image are near copies
        noise(tmp_path / f"{n}.png", 900, 300)
        noise(tmp_path / f"{n + 1}.png", 20, 20)
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"id": n, "image": f"{n}.png", "conversations": [talk[0], {"from": "gpt", "value": f"Cat {n}."}]}
        for n in range(24)
    ]
    told = ask(internvl, rows)
    assert told.lengths.most_tiles == 4
    assert max(told.lengths.train) > 4 * 256
    assert told.lengths.tiles == sum(4 if length > 1000 else 1 for length in told.lengths.train)
    assert ask(internvl, rows, image_tiles=1).lengths.most_tiles == 1
    tiny = write_original(tmp_path / "tiny")
    for n in range(0, 24, 2):
        noise(tmp_path / f"{n}.png", 90, 30)  # whose tiles have 28 pixels a side
    counted = ask(tiny, rows)
    assert counted.lengths.most_tiles == told.lengths.most_tiles
    assert "counted" in counted.lengths.how


def test_a_tokenizer_from_elsewhere_counts(ask, internvl, tiny_folder, tmp_path, joke_rows):
    tiny_llama().config.save_pretrained(tmp_path / "bare")
    counted = ask(tmp_path / "bare", tokenizer=str(tiny_folder))
    assert counted.lengths.train == ask(tiny_folder).lengths.train
    estimated = ask(tmp_path / "bare")
    assert "estimated" in estimated.lengths.how
    assert sum(estimated.lengths.train) == pytest.approx(sum(counted.lengths.train), rel=0.6)
    with pytest.raises(ModelError, match="--tokenizer .*none: no such folder"):
        ask(internvl, tokenizer=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON|JSON"),
        ("[]", "cannot load the model"),
        ('{"model_type": "nothing"}', "cannot load the model .*nothing"),
        ('{"model_type": "resnet"}', "cannot load the model"),
        ('{"model_type": "internvl_chat"}', "cannot be loaded natively"),
    ],
)
def test_what_is_no_config_is_told(ask, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        ask(tmp_path)


def test_a_place_without_a_config_is_told(ask, tmp_path):
    with pytest.raises(ModelError, match="holds no config.json"):
        ask(tmp_path)
    with pytest.raises(ModelError, match="no such config"):
        ask(tmp_path / "config.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ModelError, match=r"a model's config is called config.json"):
        ask(tmp_path / "other.json")


def test_other_mistakes_are_those_of_a_run(ask, internvl, tmp_path):
    with pytest.raises(TargetError, match="k_prj"):
        ask(internvl, targets="k_prj")
    with pytest.raises(ConfigError, match="rnk"):
        ask(internvl, rnk=3)
    with pytest.raises(ConfigError, match="memory_gb: .*greater than 0"):
        ask(internvl, memory_gb=0)
    with pytest.raises(DataError, match="no such data file"):
        ask(internvl, data="none.jsonl")


def test_nothing_of_an_outline_is_in_memory(internvl):
    model = load_outline(str(internvl)).model
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_command_prints_the_forecast_and_the_same_as_json(internvl, write_rows, joke_rows, tmp_path):
    data = write_rows(joke_rows)
    options = ("--data", data, "--tflops", "40", "--memory-gb", "24", "rank=4")
    run = rankfold_command("plan", internvl, "rank=4", *options[:-1])
    assert run.returncode == 0, run.stderr
    assert "8,075,365,376" in run.stdout
    assert "fits into 24.0 GB" in run.stdout
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {internvl}\ndata: {data}\nrank: 4\ntflops: 40\nmemory_gb: 24\n")
    told = json.loads(rankfold_command("plan", recipe, "--json").stdout)
    assert told["parameters"]["all"] == PARAMETERS
    assert told["adapter"]["rank"] == 4
    assert {form["name"]: form["fits"] for form in told["forms"]}["float32"] == "no"
    run = rankfold_command("plan", tmp_path, "--data", data)
    assert (run.returncode, "holds no config.json" in run.stderr) == (2, True)

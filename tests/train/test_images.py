"""Runs on rows with images, on tiny models of several families."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from conftest import labelled
from image_bases import noise, write_original
from image_models import tiny_image_model
from rankfold import Recipe, fine_tune, load_tuned
from rankfold.data.order.batching import PaddedImages
from rankfold.errors import ConfigError, DataError
from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.messages.images import image_reader
from rankfold.train.keeping.listener import Listener
from rankfold.train.keeping.report import setting_rows
from rankfold.train.run import decide, resume
from rankfold.train.step.method import method_of

FAMILIES = ("internvl", "qwen2_5_vl", "llava", "gemma3", "idefics3")
ROWS = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder of each family, made when it is asked for."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "base"
            if family == "internvl":
                write_original(made[family])
            else:
                model, processor = tiny_image_model(family)
                model.save_pretrained(made[family])
                processor.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """LLaVA's rows; the images are wide, small and square in turn, and two rows have none."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for n in range(ROWS):
        width, height = ((60, 30), (24, 20), (33, 33))[n % 3]
        noise(folder / f"{n}.png", width, height, seed=n)
        mark, image = ("<image>\n", {"image": f"{n}.png"}) if n not in {2, 5} else ("", {})
        turns = [{"from": "human", "value": f"{mark}What is {n}?"}, {"from": "gpt", "value": f"It is {n}!"}]
        lines.append(json.dumps({"id": str(n), "conversations": turns, **image}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture
def recipe(folders, rows, tmp_path):
    def make(family="internvl", **options):
        settings = {"model": str(folders(family)), "data": rows, "out": tmp_path / "run", "rank": 2}
        settings |= {"epochs": 2, "rows_per_step": 3, "samples": 1, "learning_rate": 1e-2}
        return Recipe.of(settings | {"precision": "float32"} | options)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_images_starts_at_the_models_own_loss_and_lowers_it(recipe, family):
    """Beside transformers' forward on the whole batch, without our head, masks or micro-batches."""
    plan = decide(recipe(family), Listener())
    reader = image_reader(plan.base.processor)
    assert {len(row.images) for row in plan.train} == {0, 1}
    batch = PaddedImages(reader=reader).collate(list(plan.train), plan.pad_id, "cpu")
    labels = labelled(plan.train, plan.pad_id)["labels"]
    with torch.no_grad():
        logits = plan.model.eval()(**batch.inputs, use_cache=False).logits
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    result = fine_tune(recipe(family, rows_per_step=len(plan.train), epochs=6))
    assert result.steps[0].loss == pytest.approx(float(own), rel=1e-4)
    assert result.steps[-1].loss < result.steps[0].loss - 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_model_is_trained_and_the_adapter_answers_with_an_image(recipe, family, rows):
    out = fine_tune(recipe(family)).out
    config = json.loads((out / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    tuned = load_tuned(out)
    parts = [{"type": "image", "path": str(rows.parent / "0.png")}, {"type": "text", "text": "What is 0?"}]
    sampling = Sampling(max_new_tokens=4, temperature=0.0)
    assert isinstance(reply(tuned, [{"role": "user", "content": parts}], sampling), str)


def test_the_adapter_knows_into_how_many_tiles_images_were_cut(recipe):
    out = fine_tune(recipe(image_tiles=2)).out
    assert json.loads((out / "rankfold.json").read_text())["image_tiles"] == 2
    assert load_tuned(out).processor.image_processor.max_patches == 2


@pytest.mark.parametrize(
    "stored", ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "q4_0", "nf4"))]
)
def test_a_run_on_a_held_language_model_learns_and_the_adapter_fits_the_plain_base(recipe, tmp_path, stored):
    base = write_original(tmp_path / "base", llm__intermediate_size=64)
    settings = {"model": str(base), "rows_per_step": ROWS, "epochs": 6}
    plain = fine_tune(recipe(**settings, out=tmp_path / "plain"))
    result = fine_tune(recipe(**settings, stored=stored))
    # The same rows and the same start of the adapter: only the base's weights are rounded.
    assert result.steps[0].loss == pytest.approx(plain.steps[0].loss, abs=0.3 if "4" in stored else 0.05)
    assert result.steps[-1].loss < result.steps[0].loss - 0.05
    assert load_tuned(result.out).processor is not None


def test_the_plan_tells_which_layers_of_which_part_were_meant(recipe):
    notes = decide(recipe(targets="q_proj, v_proj"), Listener()).notes
    assert "language model (model.language_model): LoRA on 2 q_proj, 2 v_proj" in notes
    assert "vision tower (model.vision_tower): frozen" in notes
    assert "projector (model.multi_modal_projector): frozen" in notes


def test_fewer_tiles_are_fewer_tokens(recipe):
    tokens = [sum(map(len, decide(recipe(image_tiles=tiles), Listener()).train)) for tiles in (1, 4)]
    assert tokens[0] < tokens[1]


def test_the_projector_is_trained_whole_where_it_is_named(recipe):
    plan = decide(recipe(parts="language, projector"), Listener())
    trained = {name for name, p in plan.model.named_parameters() if p.requires_grad}
    assert any("projector" in name for name in trained)
    assert not any("vision_tower" in name for name in trained)
    before = [p.detach().clone() for name, p in plan.model.named_parameters() if "projector" in name]
    out = fine_tune(recipe(parts="language, projector")).out
    tuned = load_tuned(out).model
    after = [p for name, p in tuned.named_parameters() if "projector" in name]
    assert after
    assert any(not any(map(p.equal, before)) for p in after)


def test_a_part_named_whole_is_trained_as_it_is_and_at_its_own_rate(recipe):
    options = {"parts": "language, projector, vision", "whole": "projector, vision"}
    plan = decide(recipe(whole_learning_rate=3e-2, **options), Listener())
    trained = {name for name, p in plan.model.named_parameters() if p.requires_grad}
    for name in trained:
        assert ("modules_to_save" in name) == ("vision_tower" in name or "projector" in name), name
    assert any("vision_tower" in name for name in trained)
    assert any("lora_A" in name for name in trained)
    method = method_of(plan.recipe, plan.settings, plan.batching, plan.precision)
    assert method.whole_rate_factor == pytest.approx(3)
    assert ("whole learning rate", "0.03", "of what is trained whole") in setting_rows(plan)
    plain = method_of(recipe(**options), plan.settings, plan.batching, plan.precision)
    assert plain.whole_rate_factor == 1


def test_what_is_trained_whole_is_float32_on_a_base_in_bfloat16(recipe):
    """bfloat16 has 8 bits: a step of less than 1/512 of a weight would be lost."""
    options = {"parts": "language, projector", "precision": "bfloat16", "learning_rate": 1e-5}
    plan = decide(recipe(**options), Listener())
    assert {p.dtype for p in plan.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in plan.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    before = {name: p.detach().clone() for name, p in plan.model.named_parameters() if p.requires_grad}
    result = fine_tune(recipe(**options))
    after = load_file(result.out / "adapter_model.safetensors")
    whole = [name for name in after if "projector" in name and name.endswith("linear_1.weight")]
    assert whole
    for name in whole:
        [start] = [p for key, p in before.items() if key.replace(".modules_to_save.default", "") == name]
        assert after[name].dtype == torch.float32
        assert (after[name] != start).float().mean() > 0.9


def test_a_run_on_images_goes_on_to_the_same_bits(recipe, tmp_path):
    import os
    import signal

    class Interrupting(Listener):
        def on_step(self, record):
            if record.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    whole = fine_tune(recipe(out=tmp_path / "whole", dropout=0.1)).out
    assert fine_tune(recipe(out=tmp_path / "cut", dropout=0.1), Interrupting()).interrupted
    resume(tmp_path / "cut")
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in (whole, tmp_path / "cut")]
    assert files[0] == files[1]


def test_rows_with_images_need_a_model_that_sees_them(recipe, tiny_folder, write_rows, joke_rows, tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: the row has pictures"):
        fine_tune(recipe(model=str(tiny_folder)))
    with pytest.raises(ConfigError, match="image_tiles: .* does not see images"):
        fine_tune(recipe(model=str(tiny_folder), data=write_rows(joke_rows), image_tiles=2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batching": "packed"}, "rows with images cannot be packed"),
        ({"parts": "language, tower"}, "parts"),
        ({"parts": "projector"}, "parts: projector leaves no part for LoRA"),
        ({"whole_learning_rate": 1e-3}, "whole_learning_rate: nothing is trained whole"),
        ({"parts": "language, vision", "whole": "eyes"}, "whole"),
    ],
)
def test_what_images_do_not_allow_is_told(recipe, options, told):
    with pytest.raises(ConfigError, match=told):
        fine_tune(recipe(**options))


def test_an_image_that_changes_under_a_run_names_its_row(recipe, rows, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in rows.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    plan = decide(recipe(data=folder / "rows.jsonl"), Listener())
    row = next(row for row in plan.train if row.images)
    noise(row.images[0].path, 50, 50)
    with pytest.raises(DataError, match=f"{row.origin}: .* has changed"):
        plan.batching.collate([row], plan.pad_id, "cpu")

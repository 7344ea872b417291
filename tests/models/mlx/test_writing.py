"""Adapters in mlx's layout: loaded by its rules, they compute the same, and they come back as they were."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import randomise, rankfold_command
from image_bases import write_original
from mlx_reference import load_like_mlx
from rankfold import LoraConfig, PeftModel, get_peft_model, load_base
from rankfold.errors import AdapterError, ModelError
from rankfold.models.adapters.convert import convert_adapter
from rankfold.models.mlx.layout import NATIVE_NAMES

IDS = torch.arange(24).view(2, 12) * 7 % 290
FILES = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, real_base):
    """Text bases with and without a head of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("text")
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).save_pretrained(root / str(tied))
    return {tied: root / str(tied) for tied in (False, True)}


def model_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def save_adapted(base, folder, **options):
    """An adapter with random factors on the text base; its logits are returned."""
    config = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(model_of(base), LoraConfig(base_model_name_or_path=str(base), **config)).eval()
    randomise(model)
    if options.get("use_dora"):
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data.abs_().add_(0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    with torch.no_grad():
        return model(IDS).logits


def mlx_logits(base, folder):
    model = model_of(base)
    load_like_mlx(dict(model.named_modules()), folder, blocks=4)
    with torch.no_grad():
        return model(IDS).logits


ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
EVERY = sorted([f"self_attn.{p}_proj" for p in "kovq"] + [f"mlp.{p}_proj" for p in ("down", "gate", "up")])
LAST = ["model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]
CASES = {
    "every linear layer": ({"target_modules": "all-linear"}, 4, EVERY),
    "queries and values": ({"target_modules": ["q_proj", "v_proj"]}, 4, ATTENTION),
    "the last two blocks": ({"target_modules": LAST}, 2, ["self_attn.q_proj"]),
    "one block in the middle": ({"target_modules": [LAST[0]]}, 4, [LAST[0]]),
    "blocks that differ": (
        {"target_modules": ["model.layers.0.mlp.up_proj", LAST[1]]},
        4,
        ["model.layers.0.mlp.up_proj", LAST[1]],
    ),
    "head and embeddings": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        4,
        ["lm_head", "model.embed_tokens", "self_attn.q_proj"],
    ),
    "rsLoRA": ({"target_modules": ["q_proj"], "use_rslora": True, "r": 3}, 4, ["self_attn.q_proj"]),
    "DoRA": ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, 4, ATTENTION),
    "ranks of their own, one scale": (
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 7, "layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 14, "layers.0.self_attn.q_proj": 4},
        },
        4,
        ATTENTION,
    ),
    "scales that differ by powers of two": (
        {
            "target_modules": ["q_proj", "v_proj"],
            "alpha_pattern": {"v_proj": 32},
            "rank_pattern": {"q_proj": 8},
        },
        4,
        ATTENTION,
    ),
    "dropout": ({"target_modules": ["q_proj"], "lora_dropout": 0.1}, 4, ["self_attn.q_proj"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_computes_the_same_and_the_adapter_comes_back_to_the_byte(folders, tmp_path, case):
    options, layers, keys = CASES[case]
    expected = save_adapted(folders[False], tmp_path / "hf", **options)
    done = convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx")
    assert done.told[-1] == "exact"
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (config["num_layers"], config["lora_parameters"]["keys"]) == (layers, keys)
    torch.testing.assert_close(mlx_logits(folders[False], tmp_path / "mlx"), expected, rtol=1e-5, atol=1e-5)
    convert_adapter(tmp_path / "mlx", tmp_path / "again", "hf")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    facts = [json.loads((tmp_path / f / "rankfold.json").read_text()) for f in ("hf", "mlx", "again")]
    assert facts[0] == facts[2]
    assert facts[0]["base"] == facts[1]["base"]


def test_an_adapter_that_mlx_lm_trained_is_read(folders, tmp_path):
    """Its config is mlx-lm's own: all arguments of the run, and no word of ours (mlx_lm/lora.py)."""
    base, folder = folders[False], tmp_path / "mlx"
    folder.mkdir()
    model, draw = model_of(base), torch.Generator().manual_seed(3)
    tensors = {}
    for name in (f"model.layers.{n}.self_attn.{p}_proj" for n in (2, 3) for p in "qv"):
        rows, columns = model.get_submodule(name).weight.shape
        tensors[f"{name}.lora_a"] = torch.randn(columns, 8, generator=draw) * 0.1
        tensors[f"{name}.lora_b"] = torch.randn(8, rows, generator=draw) * 0.1
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ATTENTION}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"iters": 100, "batch_size": 4}))
    done = convert_adapter(folder, tmp_path / "hf", "hf")
    assert done.told[-1] == "exact"
    adapted = PeftModel.from_pretrained(model_of(base), tmp_path / "hf")
    assert (adapted.peft_config["default"].r, adapted.peft_config["default"].lora_alpha) == (8, 160)
    with torch.no_grad():
        found = adapted(IDS).logits
    torch.testing.assert_close(found, mlx_logits(base, folder), rtol=1e-4, atol=1e-5)
    convert_adapter(tmp_path / "hf", tmp_path / "back", "mlx")
    again = load_file(tmp_path / "back" / "adapters.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["num_layers"], config["lora_parameters"]) == (2, parameters)


REFUSED = {
    "scales that differ otherwise": (
        {"alpha_pattern": {"v_proj": 12}},
        "v_proj has the scale 3 and most have 2.*no power of two",
    ),
    "a bias of B": ({"lora_bias": True}, "has lora_B.bias, for which mlx has no place"),
    "trained biases": ({"bias": "all"}, "is saved whole"),
    "a module trained whole": ({"modules_to_save": ["lm_head"]}, "lm_head.weight is saved whole"),
    "trained tokens": (
        {"trainable_token_indices": [3]},
        "trainable_token_indices is set, which pairs",
    ),
    "DoRA of embeddings": (
        {"target_modules": ["embed_tokens"], "use_dora": True},
        "mlx computes DoRA of an embedding for each token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_has_no_room_for_is_refused_by_name(folders, tmp_path, case):
    options, told = REFUSED[case]
    if options.get("bias") == "all":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 300}
        base = tmp_path / "qwen2"
        Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(
            base
        )
    else:
        base = folders[False]
    save_adapted(base, tmp_path / "hf", **{"target_modules": ["q_proj", "v_proj"], **options})
    with pytest.raises(AdapterError, match=f"(?s)no place in mlx's layout.*{told}"):
        convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    ("target", "told"), [("embed_tokens", "would adapt the head"), ("lm_head", "no separate")]
)
def test_a_head_that_is_the_embedding_is_not_adapted_behind_ones_back(folders, tmp_path, target, told):
    save_adapted(folders[True], tmp_path / "hf", target_modules=["q_proj", target])
    with pytest.raises(AdapterError, match=f"{target}: .*{told}"):
        convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx")


def test_copies_of_the_bases_embeddings_are_not_written_over_anothers(folders, tmp_path):
    model = get_peft_model(model_of(folders[False]), LoraConfig(target_modules=["embed_tokens"]))
    randomise(model)
    model.save_pretrained(tmp_path / "hf")  # PEFT saves the embeddings along
    with pytest.raises(
        AdapterError, match="embed_tokens.base_layer.weight is a copy .*save_embedding_layers=False"
    ):
        convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx", model=str(folders[False]))


def test_a_base_whose_names_are_not_known_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(
        tmp_path / "gpt2"
    )
    save_adapted(tmp_path / "gpt2", tmp_path / "hf", target_modules=["c_attn"])
    with pytest.raises(ModelError, match="is a gpt2, whose modules may be called otherwise in mlx"):
        convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx")


def test_damaged_and_foreign_files_are_named(folders, tmp_path):
    save_adapted(folders[False], tmp_path / "hf", target_modules=["q_proj"])
    convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx")
    config_file, weights = tmp_path / "mlx" / "adapter_config.json", tmp_path / "mlx" / "adapters.safetensors"
    config, tensors = json.loads(config_file.read_text()), load_file(weights)

    def refused(told, **changes):
        config_file.write_text(json.dumps(config | changes))
        with pytest.raises(AdapterError, match=told):
            convert_adapter(tmp_path / "mlx", tmp_path / "out", "hf")

    with pytest.raises(AdapterError, match="is in the layout 'mlx' already"):
        convert_adapter(tmp_path / "mlx", tmp_path / "out", "mlx")
    refused("is not what was saved: its sha256", num_layers=3)
    (tmp_path / "mlx" / "rankfold.json").unlink()
    refused("fine_tune_type is 'full'; only lora and dora", fine_tune_type="full")
    refused("holds no lora_parameters", lora_parameters=None)
    refused(
        "lora_parameters.scale must be a number above 0, got '2'", lora_parameters={"rank": 4, "scale": "2"}
    )
    refused("has A, B alone", fine_tune_type="dora")
    config_file.write_text(json.dumps(config))
    strange = {"model.layers.9.self_attn.q_proj.lora_a": torch.ones(32, 4)}
    save_file(tensors | strange, weights)
    with pytest.raises(AdapterError, match=r"layers\.9\.self_attn\.q_proj has A alone"):
        convert_adapter(tmp_path / "mlx", tmp_path / "out", "hf")
    strange["model.layers.9.self_attn.q_proj.lora_b"] = torch.ones(4, 32)
    save_file(tensors | strange, weights)
    with pytest.raises(AdapterError, match=r"(?s)not of this base, .*layers\.9\.self_attn\.q_proj"):
        convert_adapter(tmp_path / "mlx", tmp_path / "out", "hf")
    save_file(tensors | {"model.layers.0.mlp.switch.lora_a": torch.ones(2, 4, 32)}, weights)
    with pytest.raises(AdapterError, match=r"switch\.lora_a \(2, 4, 32\)"):
        convert_adapter(tmp_path / "mlx", tmp_path / "out", "hf")


# InternVL


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    """InternVL of either language model in its original layout, and as transformers saves it."""
    root, found = tmp_path_factory.mktemp("internvl"), {}
    for language in ("internlm2", "qwen2"):
        found[language, "original"] = write_original(root / language, language)
        base = load_base(str(found[language, "original"]))
        found[language, "native"] = root / f"{language}-hf"
        base.model.save_pretrained(found[language, "native"])
        base.processor.save_pretrained(found[language, "native"])
    return found


def by_mlx_names(model, own):
    """The native modules by the names that mlx-vlm has for a base of that layout.  In its ``internvl_chat`` a
    name is the original checkpoint's; fused matrices have no module here."""
    from rankfold.models.internvl.config import layout_of

    if own == "native":
        table = NATIVE_NAMES.items()
        return {
            next(
                (mlx + name.removeprefix(ours) for ours, mlx in table if name.startswith(ours)), name
            ): module
            for name, module in model.named_modules()
        }
    layout = layout_of(model.config.to_dict())
    return {
        layout.original(name)[0]: module
        for name, module in model.named_modules()
        if layout.original(name) and not layout.is_fused(layout.original(name)[0])
    }


@pytest.mark.parametrize("own", ["original", "native"])
@pytest.mark.parametrize("language", ["qwen2", "internlm2"])
def test_an_internvl_adapter_goes_to_mlx_and_comes_back_to_the_byte(internvl, tmp_path, language, own):
    base = internvl[language, own]
    names = (
        r"model\.language_model\.layers\.\d+\.(mlp|self_attn).*_proj|model\.multi_modal_projector\.linear_\d"
    )
    if (language, own) == ("internlm2", "original"):  # its queries, keys and values are one matrix
        names = r"model\.language_model.*(o_proj|down_proj|up_proj)"
    config = LoraConfig(r=2, lora_alpha=8, target_modules=names, base_model_name_or_path=str(base))
    model = get_peft_model(load_base(str(base)).model, config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "first")
    # A pattern of names is written as a list by the first conversion; from then on all is equal.
    start = tmp_path / "first"
    if own == "original":
        convert_adapter(start, tmp_path / "i", "internvl")
        start = tmp_path / "hf"
        convert_adapter(tmp_path / "i", start, "hf")
    done = convert_adapter(start, tmp_path / "mlx", "mlx")
    assert done.told[-1] == "exact"
    assert ("nothing there loads this base yet" in done.told[-2]) is (language == "internlm2")
    with torch.no_grad():
        expected = model(IDS).logits
        plain = load_base(str(base)).model.eval()
        assert not torch.allclose(plain(IDS).logits, expected, atol=1e-3)
        load_like_mlx(by_mlx_names(plain, own), tmp_path / "mlx", vlm=True)
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    convert_adapter(tmp_path / "mlx", tmp_path / "again", "hf")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (start / name).read_bytes()
    if own == "original":
        convert_adapter(tmp_path / "mlx", tmp_path / "i2", "internvl")
        assert all(
            (tmp_path / "i2" / name).read_bytes() == (tmp_path / "i" / name).read_bytes() for name in FILES
        )


def test_queries_keys_and_values_of_internlm2_are_one_matrix_in_mlx_too(internvl, tmp_path):
    base = internvl["internlm2", "original"]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["self_attn.q_proj", "self_attn.v_proj"])
    model = get_peft_model(load_base(str(base)).model, config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "hf")
    done = convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx", model=str(base))
    assert done.target_modules == [f"language_model.model.layers.{n}.attention.wqkv" for n in range(2)]
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 4  # two As that differ, one on top of the other
    assert math.isclose(config["lora_parameters"]["scale"], 4)


def test_embeddings_of_a_model_that_sees_images_are_refused(internvl, tmp_path):
    base = internvl["qwen2", "original"]
    model = get_peft_model(
        load_base(str(base)).model, LoraConfig(r=2, target_modules=["embed_tokens", "o_proj"])
    )
    randomise(model)
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(AdapterError, match="embed_tokens: mlx-vlm adapts linear layers only"):
        convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx", model=str(base))


def test_an_adapter_in_mlxs_layout_is_not_loaded_as_it_is_and_the_way_is_told(folders, tmp_path):
    save_adapted(folders[False], tmp_path / "hf", target_modules=["q_proj"])
    convert_adapter(tmp_path / "hf", tmp_path / "mlx", "mlx")
    with pytest.raises(AdapterError, match="it is mlx's: rankfold export ADAPTER --to hf --out OUT"):
        PeftModel.from_pretrained(model_of(folders[False]), tmp_path / "mlx")


@pytest.mark.filterwarnings("ignore:a part of this adapter.s config has no effect")
def test_the_command_writes_mlx_and_back(folders, tmp_path):
    save_adapted(folders[False], tmp_path / "hf", target_modules=["q_proj"], rank_pattern={"layers.1": 2})
    words = ("export", tmp_path / "hf", "--to", "mlx", "--out", tmp_path / "mlx")
    done = rankfold_command(*words, "--prompts", "0")
    assert done.returncode == 0, done.stderr
    assert "keys: self_attn.q_proj" in done.stdout
    back = rankfold_command("export", tmp_path / "mlx", "--to", "hf", "--out", tmp_path / "again")
    assert back.returncode == 0, back.stderr
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()

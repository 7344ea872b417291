from __future__ import annotations

import json
import warnings
from contextlib import suppress

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import randomise, tiny_llama
from rankfold import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rankfold.errors import AdapterError, RankfoldError

OPTIONS = [
    {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "mlp.up_proj"], "use_rslora": True},
    {"r": 2, "target_modules": r".*\.layers\.1\..*(k|down)_proj", "task_type": "CAUSAL_LM"},
    {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1], "task_type": "CAUSAL_LM"},
    {"r": 4, "target_modules": "all-linear", "exclude_modules": ["o_proj"], "rank_pattern": {"q_proj": 2}},
    {"r": 4, "task_type": "CAUSAL_LM"},
]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 49152, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(tmp_path):
    """An adapter folder with random factors."""
    model = get_peft_model(tiny_llama(), LoraConfig(**OPTIONS[0]))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.peft("adapter files, both ways", "same", "same")
def test_an_adapter_written_here_gives_equal_logits_in_peft(options, tmp_path, ids):
    ours = get_peft_model(tiny_llama(), LoraConfig(**options)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(input_ids=ids).logits)
    assert not torch.allclose(tiny_llama()(ids).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_adapter_written_by_peft_gives_equal_logits_here(options, tmp_path, ids):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(ids).logits)


@pytest.mark.peft("adapter files, both ways", "same", "same")
def test_the_tensor_file_is_pefts_byte_for_byte(tmp_path):
    ours = get_peft_model(tiny_llama(), LoraConfig(**OPTIONS[0]))
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**OPTIONS[0]))
    randomise(ours)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora_" in k}, strict=False)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        del config["target_modules"]  # ours lists the seven endings, PEFT's all 14 names
    assert configs[0] == configs[1]


def test_save_load_save_gives_the_same_bytes(saved, tmp_path):
    PeftModel.from_pretrained(tiny_llama(), saved).save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_loaded_adapter_is_frozen_unless_asked_for(saved):
    frozen = PeftModel.from_pretrained(tiny_llama(), saved)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training
    trainable = PeftModel.from_pretrained(tiny_llama(), saved, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, _ in trainable.named_parameters() if "lora_" in n
    }


def drop_half(tensors):
    for name in sorted(tensors)[::2]:
        del tensors[name]


def rename(tensors):
    tensors["base_model.model.other.lora_A.weight"] = tensors.pop(sorted(tensors)[0])


def reshape(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:2].contiguous()


def poison(tensors):
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def round_off(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].to(torch.int64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_half, r"missing: .*lora_A(.|\n)*missing: .*\.lora_A"),
        (rename, r"missing: (.|\n)*unexpected: base_model.model.other.lora_A.weight"),
        (reshape, r"size mismatch for .*: the file has \(2, \d+\), the model wants \(4, \d+\)"),
        (poison, "holds NaN or infinite values"),
        (round_off, "torch.int64 is not a floating-point type"),
    ],
)
@pytest.mark.peft(
    "a file with missing, unexpected or non-finite tensors",
    "loads, with a warning at most",
    "refused, all faults listed; each can be allowed",
)
def test_a_file_that_does_not_fit_is_refused_and_the_model_left_alone(saved, damage, message):
    rewrite(saved, damage)
    base = tiny_llama()
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(base, saved, allow=())
    assert [type(m) for m in base.modules()] == [type(m) for m in tiny_llama().modules()]


def test_an_adapter_of_a_larger_base_is_refused(saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(AdapterError, match="unexpected: .*layers.1"):
        PeftModel.from_pretrained(small, saved, allow=())


def test_an_adapter_of_weights_only_pickle_is_read_and_another_pickle_is_not(saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    unseal(saved)
    torch.save(tensors, saved / "adapter_model.bin")
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_llama(), saved))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    (saved / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="holds something else than tensors, or is damaged"):
        PeftModel.from_pretrained(tiny_llama(), saved)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_truncated_or_garbled_file_is_an_error_in_one_sentence(saved, data):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place = data.draw(st.integers(0, header - 1))
        broken = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    path.write_bytes(broken)
    with suppress(RankfoldError):  # any other exception fails the test
        PeftModel.from_pretrained(tiny_llama(), saved)
    path.write_bytes(whole)


def test_a_plain_network_survives_the_round_trip(tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))

    x = torch.randn(4, 10)
    ours = get_peft_model(net(), LoraConfig(target_modules=["0"]))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(x), ours(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path)(x), ours(x))


def unseal(folder) -> None:
    """Make the folder a plain PEFT adapter."""
    (folder / "rankfold.json").unlink()


def last_key(folder) -> str:
    return sorted(load_file(folder / "adapter_model.safetensors"))[-1]


@pytest.mark.parametrize(
    ("fault", "damage"),
    [("missing", drop_half), ("unexpected", None), ("shape", reshape), ("non_finite", poison)],
)
def test_each_fault_can_be_let_through_and_is_then_told_once(saved, fault, damage):
    def add(tensors):
        tensors["base_model.model.another.lora_A.weight"] = torch.zeros(4, 4)

    rewrite(saved, damage or add)
    unseal(saved)
    with pytest.raises(AdapterError, match=r"missing|unexpected|size mismatch|NaN"):
        PeftModel.from_pretrained(tiny_llama(), saved, allow=())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(tiny_llama(), saved, allow={fault})
    texts = [str(each.message) for each in told]
    assert sum("in spite of" in text or "missing adapter keys" in text for text in texts) == 1
    key = last_key(saved).removesuffix("weight") + "default.weight"
    loaded = dict(model.named_parameters())[key]
    assert torch.equal(loaded, load_file(saved / "adapter_model.safetensors")[last_key(saved)])


def test_ignore_mismatched_sizes_is_pefts_word_for_allowing_shapes(saved):
    rewrite(saved, reshape)
    unseal(saved)
    with pytest.warns(UserWarning, match=r"size mismatch for .*the file has \(2"):
        PeftModel.from_pretrained(tiny_llama(), saved, ignore_mismatched_sizes=True)


def test_all_faults_of_a_folder_are_in_one_error(saved):
    def spoil(tensors):
        names = sorted(tensors)
        del tensors[names[0]]
        tensors["base_model.model.else.lora_B.weight"] = torch.zeros(1)
        tensors[names[1]] = tensors[names[1]][:, :1].contiguous()
        tensors[names[2]][0, 0] = float("inf")

    rewrite(saved, spoil)
    with pytest.raises(AdapterError) as raised:
        PeftModel.from_pretrained(tiny_llama(1), saved, "other", allow=())
    message = str(raised.value)
    for part in ("missing: ", "unexpected: ", "size mismatch for ", "NaN or inf", "another base", "sha256"):
        assert part in message
    assert message.count("\n  - ") == 6


def test_a_rank_that_is_not_the_files_is_listed(saved):
    path = saved / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 5'))
    unseal(saved)
    with pytest.raises(
        AdapterError, match=r"lora_A.weight: the file has \(4, 40\), the model wants \(5, 40\)"
    ):
        PeftModel.from_pretrained(tiny_llama(), saved)


def test_an_adapter_that_targets_nothing_here_is_refused(saved):
    with pytest.raises(AdapterError, match="matched no module"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 3)), saved)


def test_an_adapter_without_effect_is_only_worth_a_note(tmp_path, caplog):
    get_peft_model(tiny_llama(), LoraConfig(**OPTIONS[0])).save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="rankfold"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "changes nothing" in caplog.text


def test_one_flipped_bit_is_noticed_and_can_be_let_through(saved):
    path = saved / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="adapter_model.safetensors is not what was saved"):
        PeftModel.from_pretrained(tiny_llama(), saved)
    with pytest.warns(UserWarning, match="not what was saved"):
        PeftModel.from_pretrained(tiny_llama(), saved, allow=["hash"])


def test_an_edited_config_is_noticed(saved):
    path = saved / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.warns(UserWarning, match="adapter_config.json is not what was saved"):
        PeftModel.from_pretrained(tiny_llama(), saved)  # as in PEFT; people edit it
    with pytest.raises(AdapterError, match="adapter_config.json is not what was saved"):
        PeftModel.from_pretrained(tiny_llama(), saved, allow=())


def test_another_base_of_the_same_shape_is_refused_unless_allowed(saved):
    base = tiny_llama(seed=1)
    with pytest.raises(AdapterError, match="belongs to another base model: the weights differ"):
        PeftModel.from_pretrained(base, saved, allow=())
    with pytest.warns(UserWarning, match="another base model"):
        PeftModel.from_pretrained(base, saved, allow={"base"})


def test_a_plain_peft_adapter_loads_with_one_line_on_what_was_not_checked(tmp_path, caplog):
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(**OPTIONS[0])).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert len(caplog.records) == 1
    assert "could not be checked: whether this is the base" in caplog.text


def test_an_adapter_of_our_own_loads_without_a_word(saved, caplog):
    PeftModel.from_pretrained(tiny_llama(), saved)
    assert not caplog.records


def test_the_files_are_these_three_with_usual_permissions(saved):
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "rankfold.json"}
    assert {path.name for path in saved.iterdir()} == names
    plain = saved / "plain"
    plain.write_text("")
    assert {(saved / name).stat().st_mode for name in names} == {plain.stat().st_mode}


def test_rankfold_json_is_the_same_to_the_byte_for_the_same_adapter(saved, tmp_path):
    PeftModel.from_pretrained(tiny_llama(), saved).save_pretrained(tmp_path / "again")
    assert (saved / "rankfold.json").read_bytes() == (tmp_path / "again" / "rankfold.json").read_bytes()


def test_facts_given_on_saving_are_kept_by_loading_and_saving_again(saved, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    model.save_pretrained(tmp_path / "a", facts={"prompt_style": "plain", "tokenizer": {"vocabulary": "x"}})
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").save_pretrained(tmp_path / "b")
    facts = json.loads((tmp_path / "b" / "rankfold.json").read_text())
    assert facts["prompt_style"] == "plain"
    assert facts["tokenizer"] == {"vocabulary": "x"}
    assert facts["versions"].keys() == {"rankfold", "torch", "transformers"}
    assert facts["sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_sub_folders_are_written_by_name_and_read_by_subfolder(saved, tmp_path, ids):
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    model.add_adapter("second", LoraConfig(**OPTIONS[1]))
    randomise(model, 5)
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="second")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="second").eval()
    torch.testing.assert_close(ours(input_ids=ids).logits, model(input_ids=ids).logits)
    torch.testing.assert_close(theirs(ids).logits, model(input_ids=ids).logits)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert again.load_adapter(tmp_path, "second", subfolder="second") == ([], [])


def test_an_unknown_option_or_fault_is_refused_by_name(saved):
    with pytest.raises(
        RankfoldError, match=r"'subfoldr' \(did you mean 'subfolder'\?\)(.|\n)*allow='mising'"
    ):
        PeftModel.from_pretrained(tiny_llama(), saved, subfoldr="x", allow={"mising"})


def rename_layers(tensors):
    for name in list(tensors):
        tensors[name.replace("model.layers", "old_model.old_layers")] = tensors.pop(name)


@pytest.mark.parametrize("by_model", [False, True])
@pytest.mark.peft("`key_mapping`", "same", "same")
def test_keys_are_mapped_as_in_peft(saved, ids, by_model):
    """``key_mapping``, or what the model itself says of its earlier names."""
    before = PeftModel.from_pretrained(tiny_llama(), saved)(input_ids=ids).logits
    rewrite(saved, rename_layers)
    unseal(saved)
    mapping = {r"^never": "used", r"^old_model\.old_layers": "model.layers"}
    bases = [tiny_llama(), tiny_llama()]
    if by_model:
        for base in bases:
            base._checkpoint_conversion_mapping = mapping
    options = {} if by_model else {"key_mapping": mapping}
    ours = PeftModel.from_pretrained(bases[0], saved, **options)
    theirs = peft.PeftModel.from_pretrained(bases[1], saved, **options).eval()
    assert torch.equal(ours(input_ids=ids).logits, before)
    torch.testing.assert_close(theirs(ids).logits, before)


def test_two_keys_that_become_one_are_refused(saved):
    def double(tensors):
        key = last_key(saved)
        tensors[key.replace("layers.1", "layers.7")] = tensors[key].clone()

    rewrite(saved, double)
    unseal(saved)
    with pytest.raises(AdapterError, match="unexpected: a second "):
        PeftModel.from_pretrained(tiny_llama(), saved, key_mapping={r"layers\.7": "layers.1"}, allow=())


def test_a_key_mapping_that_is_no_pattern_is_refused(saved):
    with pytest.raises(RankfoldError, match="key_mapping: '\\('"):
        PeftModel.from_pretrained(tiny_llama(), saved, key_mapping={"(": "x"})


def tiny_llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **sizes)
    text = LlamaConfig(vocab_size=64, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()


def test_the_names_that_vision_language_models_had_before_4_52_are_followed(tmp_path):
    ours = get_peft_model(tiny_llava(), LoraConfig(target_modules=["q_proj"]))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    unseal(tmp_path)

    def date_back(tensors):
        for name in list(tensors):
            old = name.replace("model.model.language_model.", "model.language_model.model.")
            old = old.replace("model.model.vision_tower.", "model.vision_tower.")
            tensors[old] = tensors.pop(name)

    rewrite(tmp_path, date_back)
    assert any(".language_model.model." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, ours.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_factors_stored_in_other_widths_are_read(saved, dtype):
    rewrite(saved, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
    unseal(saved)
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    stored = load_file(saved / "adapter_model.safetensors")
    key = last_key(saved)
    loaded = dict(model.named_parameters())[key.replace("lora_B.", "lora_B.default.")]
    assert torch.equal(loaded, stored[key].float())


def test_a_failed_load_leaves_the_wrapped_model_as_it_was(saved, tmp_path, ids):
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    before, targeted = model(input_ids=ids).logits, list(model.targeted_module_names)
    other = get_peft_model(tiny_llama(), LoraConfig(target_modules=["lm_head"], init_lora_weights="pissa"))
    other.save_pretrained(tmp_path)
    rewrite(tmp_path, poison)
    with pytest.raises(AdapterError):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.targeted_module_names == targeted
    assert list(model.peft_config) == ["default"]
    assert type(model.get_base_model().lm_head) is nn.Linear


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    from rankfold.lora.files.adapter_metadata import AdapterMetadata
    from rankfold.lora.files.checkpoint import save_adapter
    from rankfold.lora.files.fingerprint import fingerprint

    whole = torch.randn(4, 6)
    tensors = {"a": whole[:2], "b": whole, "c": whole.T}
    save_adapter(tensors, LoraConfig(), tmp_path, AdapterMetadata(), fingerprint(nn.Linear(2, 2)))
    read = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())

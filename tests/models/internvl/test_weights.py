from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_reference import IMAGE_TOKEN, Original, tiny_config, tiny_tensors
from rankfold.errors import ModelError
from rankfold.models.internvl.config import is_internlm2, layout_of, native_config, original_config
from rankfold.models.internvl.groups import Groups
from rankfold.models.internvl.weights import to_native, to_original

KINDS = {
    "internlm2": {},
    "internlm2 with biases": {"llm__bias": True},
    "internlm2 beyond its length": {"llm__max_position_embeddings": 8},
    "internlm2 with one head a group": {"llm__num_key_value_heads": 4},
    "qwen2": {"language": "qwen2"},
    "qwen2 with a tied head": {"language": "qwen2", "llm__tie_word_embeddings": True},
    "the 6B tower": {"big_tower": True},
    "another layer of the tower": {"select_layer": -2},
}


def native_model(config, tensors):
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    native = native_config(config, IMAGE_TOKEN)
    layout = layout_of(native, is_internlm2(config))
    model = InternVLForConditionalGeneration(InternVLConfig(**native)).eval()
    state = dict(to_native(tensors.items(), layout))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if native["tie_word_embeddings"] else set())
    model.tie_weights()
    return model, state, layout


def inputs(tiles=2):
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(0, 290, (2, 14), generator=generator)
    words[0, 2:6] = words[1, 4:8] = IMAGE_TOKEN
    return words, torch.randn(tiles, 3, 28, 28, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_the_native_classes_compute_what_the_original_formulas_do(kind):
    config = tiny_config(**KINDS[kind])
    tensors = tiny_tensors(config)
    model, _, _ = native_model(config, tensors)
    ids, pixels = inputs()
    with torch.no_grad():
        seen = model(input_ids=ids, pixel_values=pixels).logits
        read = model(input_ids=ids[:, :2]).logits
    original = Original(config, tensors)
    torch.testing.assert_close(seen, original.logits(ids, pixels), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(read, original.logits(ids[:, :2]), rtol=2e-4, atol=2e-4)
    # The picture counts: with another one the answers differ.
    assert not torch.allclose(seen, original.logits(ids, -pixels), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_comes_back_bit_for_bit(kind, dtype):
    config = tiny_config(**KINDS[kind])
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_tensors(config).items()}
    layout = layout_of(native_config(config, IMAGE_TOKEN), is_internlm2(config))
    native = dict(to_native(tensors.items(), layout))
    back = to_original(native, layout)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    again = dict(to_native(back.items(), layout))
    assert again.keys() == native.keys()
    assert all(torch.equal(again[name], native[name]) for name in native)


@settings(deadline=None, max_examples=30)
@given(kv=st.integers(1, 4), groups=st.integers(1, 4), head=st.integers(1, 5), columns=st.integers(0, 3))
def test_grouped_rows_are_split_and_joined_for_every_count_of_heads(kv, groups, head, columns):
    order = Groups(kv * groups, kv, head)
    shape = (order.rows, columns) if columns else (order.rows,)
    fused = torch.arange(torch.Size(shape).numel()).reshape(shape)
    query, key, value = order.split(fused)
    assert torch.equal(order.join(query, key, value), fused)
    # Row by row: the n-th query head of the g-th group stands n heads after the group's beginning.
    for g in range(kv):
        start = g * (groups + 2) * head
        assert torch.equal(
            query[g * groups * head : (g + 1) * groups * head], fused[start : start + groups * head]
        )
        assert torch.equal(
            key[g * head : (g + 1) * head], fused[start + groups * head : start + (groups + 1) * head]
        )
        assert torch.equal(value[g * head : (g + 1) * head], fused[start + (groups + 1) * head :][:head])


def test_a_tensor_that_no_internvl_has_is_named():
    config = tiny_config()
    layout = layout_of(native_config(config, IMAGE_TOKEN))
    stray = {"vision_model.head.weight": torch.zeros(2, 3), "qllama.weight": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"vision_model.head.weight \(2, 3\)\n.*qllama"):
        list(to_native({**tiny_tensors(config), **stray}.items(), layout))
    with pytest.raises(ModelError, match=r"model.nonsense \(1,\)"):
        to_original({"model.nonsense": torch.zeros(1)}, layout)


def test_a_fused_matrix_of_another_size_or_in_part_is_named():
    layout = layout_of(native_config(tiny_config(), IMAGE_TOKEN))
    name = "language_model.model.layers.1.attention.wqkv.weight"
    with pytest.raises(ModelError, match="has 60 rows; the config says 64"):
        list(to_native([(name, torch.zeros(60, 32))], layout))
    with pytest.raises(ModelError, match=r"layers.1.attention.wqkv.weight needs all of .*q_proj.*k_proj"):
        to_original({"model.language_model.layers.1.self_attn.q_proj.weight": torch.zeros(32, 32)}, layout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_comes_back_with_the_same_meaning(kind):
    config = tiny_config(**KINDS[kind])
    native = native_config(config, IMAGE_TOKEN)
    images = {n: config[n] for n in ("template", "dynamic_image_size", "use_thumbnail", "max_dynamic_patch")}
    back = original_config(native, images)
    assert native_config(back, IMAGE_TOKEN) == native
    assert {name: back[name] for name in config if not name.endswith("_config")} == {
        name: config[name] for name in config if not name.endswith("_config")
    }


def test_what_transformers_would_compute_otherwise_is_refused_all_at_once():
    config = tiny_config(ps_version="v1", use_thumbnail=False, big_tower=True, vision__layer_norm_eps=1e-5)
    config["llm_config"] |= {"architectures": ["Phi3ForCausalLM"], "rope_pos_id_version": "v2pe"}
    with pytest.raises(ModelError) as caught:
        native_config(config, IMAGE_TOKEN)
    text = str(caught.value)
    for word in ("ps_version is 'v1'", "qk norm", "use_thumbnail", "'Phi3ForCausalLM'", "v2pe"):
        assert word in text
    with pytest.raises(ModelError, match="language model of type 'gemma2'"):
        original_config({"text_config": {"model_type": "gemma2"}}, {})


def test_an_original_config_without_most_fields_means_its_own_defaults():
    llm = {"architectures": ["InternLM2ForCausalLM"]}
    config = {"model_type": "internvl_chat", "ps_version": "v2", "llm_config": llm}
    native = native_config(config, IMAGE_TOKEN)
    assert native["vision_config"]["hidden_size"] == 3200
    assert native["vision_config"]["use_qk_norm"] is True
    assert native["image_seq_length"] == 64  # 224 / 14 = 16 patches a side, halved
    assert native["text_config"]["num_key_value_heads"] == 32
    assert native["text_config"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}

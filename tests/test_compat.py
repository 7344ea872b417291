"""What is expected of other libraries' private names: a release that changes one of them fails here."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig

from conftest import tiny_llama
from gguf_files import tiny_model, write_gguf
from rankfold import compat


def test_a_compiled_module_holds_the_plain_one_under_its_name():
    plain = nn.Linear(2, 2)
    compiled = torch.compile(plain, backend="eager")
    assert getattr(compiled, compat.COMPILED) is plain
    assert compat.is_compiled(compiled)
    assert not compat.is_compiled(plain)
    plain.compile(backend="eager")  # in place
    assert compat.is_compiled(plain)


def test_checkpoint_wrappers_hold_the_module_under_one_of_the_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = checkpoint_wrapper(nn.Linear(2, 2))
    assert {*wrapped._modules} <= {*compat.WRAPPED}


def test_accelerates_hooks_keep_the_forward_that_they_stand_before():
    layer = nn.Linear(2, 2)
    before = layer.forward
    add_hook_to_module(layer, ModelHook())
    assert vars(layer)[compat.HOOKED_FORWARD] == before


def test_what_looks_into_an_autograd_function_is_seen():
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.looked_into())
        return x * 1.0

    look(torch.ones(2))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    torch.vmap(look)(torch.ones(2, 2))
    with forward_ad.dual_level():
        look(torch.ones(2))
    assert seen == [False, True, True, True]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_that_share_memory_have_one_place(device):
    tensor = torch.empty(4, 4, device=device)
    assert compat.storage_place(tensor) == compat.storage_place(tensor.t()[1:])
    assert compat.storage_place(tensor) != compat.storage_place(torch.empty(4, 4, device=device))


def test_the_gradient_of_a_softmax_is_autograds():
    x = torch.randn(3, 5, requires_grad=True)
    shares = F.softmax(x, dim=-1)
    above = torch.randn(3, 5)
    (expected,) = torch.autograd.grad(shares, x, above)
    torch.testing.assert_close(compat.softmax_gradient(above, shares.detach()), expected)


def test_the_fused_attention_is_torchs_and_keeps_as_much_on_the_meta_device():
    query, key, value = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
    torch.testing.assert_close(compat.fused_cpu_attention(query, key, value, 0.5), expected)
    meta = [tensor.detach().to("meta") for tensor in (query, key, value)]
    assert compat.fused_cpu_attention(*meta, 0.5).shape == expected.shape


def test_transformers_says_how_a_model_attends_and_computes_it_by_the_function_that_is_taken():
    model = tiny_llama()
    assert compat.attention_of(model.config) == "sdpa"
    attend, mask = compat.sdpa()
    assert transformers.AttentionInterface()["sdpa"] is attend
    assert transformers.AttentionMaskInterface()["sdpa"] is mask


def test_the_layers_that_are_kept_whole_are_the_decoder_layers():
    assert compat.layers_kept_whole(tiny_llama()) == {"LlamaDecoderLayer"}
    assert compat.layers_kept_whole(nn.Linear(2, 2)) == set()


def test_models_that_see_images_are_known_by_their_config():
    assert compat.image_text_model(AutoConfig.for_model("internvl"))
    assert not compat.image_text_model(LlamaConfig())
    assert compat.processor_class(AutoConfig.for_model("internvl")) is not None
    assert compat.processor_class(LlamaConfig()) is None


def test_names_of_older_releases_are_followed():
    model = tiny_llama()
    assert compat.renames_one_by_one(model)("model.layers.0.x") == "model.layers.0.x"
    assert compat.renames_one_by_one(nn.Linear(2, 2))("weight") == "weight"
    assert not compat.earlier_names(model)
    keys = [*model.state_dict()]
    assert compat.names_in_checkpoints(model, keys) == {key: (key, False) for key in keys}


def test_a_tensor_that_is_made_of_several_is_told_apart():
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(**small, num_key_value_heads=2, vocab_size=16, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    (found,) = compat.names_in_checkpoints(model, [expert]).values()
    assert found[1]
    made = [step for step in compat.conversions(model) if getattr(step, "operations", None)]
    assert any("gate_up_proj" in target for step in made for target in step.target_patterns)
    assert found[0] in model.state_dict()


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one file", "several files"])
def test_the_files_of_a_folder_are_found(size, tmp_path):
    model = LlamaForCausalLM(tiny_llama().config)
    model.save_pretrained(tmp_path, max_shard_size=size)
    found = compat.safetensors_files(tmp_path)
    assert sorted(found) == sorted(map(str, tmp_path.glob("*.safetensors")))


def test_the_header_of_a_gguf_file_is_the_one_that_the_gguf_library_reads(tmp_path):
    from gguf import GGUFReader

    path = write_gguf(tmp_path / "a.gguf", tiny_model("gemma2"), "gemma2", kind="Q8_0")
    keys, tensors, start = compat.gguf_header(path)
    reader = GGUFReader(path)
    assert keys == {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert start == reader.data_offset
    assert tensors == [
        (one.name, tuple(map(int, reversed(one.shape))), int(one.tensor_type), int(one.data_offset) - start)
        for one in reader.tensors
    ]


def test_special_tokens_get_names():
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<img>": 0, "a": 1}, unk_token="a"))
    )
    compat.name_special_tokens(tokenizer, {"image_token": "<img>"})
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<img>", 0)


def test_the_tiling_image_processor_is_internvls():
    made = compat.tiling_image_processor(min_patches=1, max_patches=2)
    assert (made.min_patches, made.max_patches) == (1, 2)


def test_a_backward_is_known_and_something_can_follow_it():
    order: list[str] = []
    x = torch.ones(2, requires_grad=True)

    def seen(gradient: torch.Tensor) -> None:
        order.append(f"in backward: {compat.in_backward()}")
        compat.after_backward(lambda: order.append("after"))

    x.register_hook(seen)
    assert not compat.in_backward()
    (x * 2).sum().backward()
    assert order == ["in backward: True", "after"]
    assert not compat.in_backward()

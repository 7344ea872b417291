from __future__ import annotations

import copy
import gc
import json
import threading
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from conftest import randomise
from rankfold import LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, ConfigError, MergeError, TargetError
from rankfold.lora.layers import parameters
from rankfold.lora.layers.parameters import ParameterAdapters
from rankfold.peft_surface.scaling import rescale_adapter_scale

EXPERTS, HIDDEN, DIM = 3, 5, 6
BOTH = ["experts.up", "experts.down"]
SAME = "same"
# PEFT looks for the keys of rank_pattern and alpha_pattern among the modules only.
UNMATCHED = "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"


class Experts(nn.Module):
    """All experts on every row, each reading the two parameters anew."""

    def __init__(self, transposed: bool = False, experts: int = EXPERTS) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = torch.randn(experts, HIDDEN, DIM), torch.randn(experts, DIM, HIDDEN)
        self.up = nn.Parameter((up.mT if transposed else up).contiguous())
        self.down = nn.Parameter((down.mT if transposed else down).contiguous())
        self.mix = nn.Parameter(torch.randn(experts, 1))
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, x):
        total = self.bias
        for expert in range(len(self.mix)):
            up, down = self.up[expert], self.down[expert]
            up, down = (up.T, down.T) if self.is_transposed else (up, down)
            total = total + self.mix[expert] * (torch.tanh(x @ up.T) @ down.T)
        return total


class Net(nn.Module):
    def __init__(self, transposed: bool = False, experts: int = EXPERTS) -> None:
        super().__init__()
        self.first = nn.Linear(4, DIM)
        self.experts = Experts(transposed, experts)
        self.last = nn.Linear(DIM, 3)

    def forward(self, x):
        return self.last(self.experts(self.first(x)))


def net(seed: int = 0, **options) -> Net:
    torch.manual_seed(seed)
    return Net(**options).eval()


def tuned(base: nn.Module | None = None, **options) -> PeftModel:
    """A model with random factors."""
    options = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": BOTH} | options
    model = get_peft_model(net() if base is None else base, LoraConfig(**options)).eval()
    randomise(model)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(5))


def tiny_moe(kind: str, experts: str = "grouped_mm") -> nn.Module:
    import transformers

    sizes = {
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts_per_tok": 2,
    }
    own = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, **own)
    config._experts_implementation = experts
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


MOE = [
    ("Mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("Mixtral", {"target_parameters": ["down_proj", "gate.weight"], "use_rslora": True}),
    ("Mixtral", {"target_modules": ["o_proj"], "target_parameters": ["layers.1.mlp.experts.gate_up_proj"]}),
    (
        "Qwen3Moe",
        {
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 3},
            "alpha_pattern": {"experts.down_proj": 5},
        },
    ),
]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.peft("`target_parameters` (fused experts)", SAME, "same")
@pytest.mark.filterwarnings(UNMATCHED)
@pytest.mark.parametrize(("kind", "options"), MOE, ids=str)
def test_experts_written_here_give_equal_logits_in_peft(kind, options, tmp_path, ids):
    ours = get_peft_model(tiny_moe(kind), LoraConfig(r=2, **options)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_moe(kind), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(input_ids=ids).logits)
    assert not torch.allclose(tiny_moe(kind)(ids).logits, ours(input_ids=ids).logits)


@pytest.mark.peft("`target_parameters` (fused experts)", SAME, "same")
@pytest.mark.filterwarnings(UNMATCHED)
@pytest.mark.parametrize(("kind", "options"), MOE, ids=str)
def test_experts_written_by_peft_give_equal_logits_here(kind, options, tmp_path, ids):
    theirs = peft.get_peft_model(tiny_moe(kind), peft.LoraConfig(r=2, **options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(tiny_moe(kind), tmp_path)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(ids).logits)
    assert set(ours.targeted_parameter_names) == set(theirs.base_model.targeted_parameter_names)


def test_every_experts_kernel_of_transformers_sees_the_adapter(ids):
    logits = []
    for kernel in ("eager", "batched_mm", "grouped_mm"):
        model = get_peft_model(tiny_moe("Mixtral", kernel), LoraConfig(r=2, **MOE[0][1])).eval()
        randomise(model)
        logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_module_of_ones_own_is_read_and_written_as_by_peft(transposed, tmp_path, x):
    ours = tuned(net(transposed=transposed), target_parameters=[*BOTH, "last.weight"])
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(transposed=transposed), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), ours(x))
    randomise(theirs, seed=2)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(net(transposed=transposed), tmp_path / "theirs")
    torch.testing.assert_close(again(x), theirs(x))
    assert not torch.allclose(again(x), ours(x))


def test_the_files_are_pefts(tmp_path):
    options = {"r": 2, "target_modules": ["first"], "target_parameters": BOTH}
    ours, theirs = tuned(**options), peft.get_peft_model(net(), peft.LoraConfig(**options))
    names = {"up": "experts.base_layer", "down": "experts"}
    with torch.no_grad():
        for own, nested in names.items():
            for side in ("lora_A", "lora_B"):
                factor = getattr(theirs.base_model.model.get_submodule(nested), side)["default"].weight
                part = ours.get_base_model().experts.lora_parameters[own]
                factor.copy_(getattr(part, side)["default"].weight)
        for side in ("lora_A", "lora_B"):
            factor = getattr(theirs.base_model.model.first, side)["default"].weight
            factor.copy_(getattr(ours.get_base_model().first, side)["default"].weight)
    for model, who in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / who)
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0] | {"lora_alpha": 8} == configs[1]


def test_the_later_registered_parameter_is_the_outer_one_in_the_file(tmp_path):
    tuned(target_parameters=["experts.down", "experts.mix", "experts.up"], r=1).save_pretrained(tmp_path)
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    start = "base_model.model.experts."
    assert shapes == {
        f"{start}lora_A.weight": (1, 1),  # mix, a matrix
        f"{start}lora_B.weight": (EXPERTS, 1),
        f"{start}base_layer.lora_A.weight": (EXPERTS, HIDDEN),  # down
        f"{start}base_layer.lora_B.weight": (DIM, EXPERTS),
        f"{start}base_layer.base_layer.lora_A.weight": (EXPERTS, DIM),  # up
        f"{start}base_layer.base_layer.lora_B.weight": (HIDDEN, EXPERTS),
    }


class Block(nn.Module):
    """Owns two parameters and has a child."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.sigmoid(x @ self.gate) * self.inner(x) @ self.out


def test_a_layer_inside_an_owner_is_as_deep_in_the_file_as_in_peft(tmp_path, x):
    options = {"r": 2, "target_modules": ["inner"], "target_parameters": ["block.gate", "block.out"]}

    def model():
        torch.manual_seed(0)
        outer = nn.Module()
        outer.block = Block()
        return outer

    ours = tuned(model(), **options)
    ours.save_pretrained(tmp_path / "ours")
    assert "base_model.model.block.base_layer.base_layer.inner.lora_A.weight" in load_file(
        tmp_path / "ours" / "adapter_model.safetensors"
    )
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "ours")
    torch.testing.assert_close(theirs.base_model.model.block(x), ours.get_base_model().block(x))
    randomise(theirs, seed=4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(model(), tmp_path / "theirs")
    torch.testing.assert_close(again.get_base_model().block(x), theirs.base_model.model.block(x))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_seed_gives_the_same_start_as_peft(init, transposed):
    options = {
        "r": 2,
        "target_modules": ["last"],
        "target_parameters": [*BOTH, "first.weight"],
        "init_lora_weights": init,
    }
    ours, theirs = net(transposed=transposed), net(transposed=transposed)
    torch.manual_seed(7)
    get_peft_model(ours, LoraConfig(**options))
    torch.manual_seed(7)
    peft.get_peft_model(theirs, peft.LoraConfig(**options))
    pairs = [
        (ours.first.lora_parameters["weight"], theirs.first),
        (ours.experts.lora_parameters["up"], theirs.experts.base_layer),
        (ours.experts.lora_parameters["down"], theirs.experts),
        (ours.last, theirs.last),
    ]
    for mine, other in pairs:
        for side in ("lora_A", "lora_B"):
            assert torch.equal(getattr(mine, side)["default"].weight, getattr(other, side)["default"].weight)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_the_start_is_the_base_to_the_last_bit(init, x):
    expected = net()(x)
    model = get_peft_model(net(), LoraConfig(target_parameters=BOTH, r=2, init_lora_weights=init))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_gradients_are_those_of_the_dense_formula(transposed, x):
    model = tuned(net(transposed=transposed).double())
    owner, x = model.get_base_model().experts, x.double()
    weights, leaves = {}, {}
    for name, part in owner.lora_parameters.items():
        a, b = (f.detach().clone().requires_grad_() for f in part.factors("default"))
        delta = torch.einsum("ore,eri->eoi", b.reshape(len(b), 2, EXPERTS), a.reshape(EXPERTS, 2, -1))
        weights[name] = owner._parameters[name].detach() + 1.5 * (delta.mT if transposed else delta)
        leaves[name] = (a, b)
    plain = net(transposed=transposed).double()
    expected = torch.func.functional_call(plain, {f"experts.{name}": w for name, w in weights.items()}, (x,))
    got = model(x)
    torch.testing.assert_close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    for name, pair in leaves.items():
        for mine, dense in zip(owner.lora_parameters[name].factors("default"), pair, strict=True):
            torch.testing.assert_close(mine.grad, dense.grad)


def test_only_the_factors_are_trained():
    model = tuned()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(trained) == 4


def test_keys_are_added_and_none_renamed():
    before = net().state_dict()
    after = tuned().get_base_model().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert sorted(after.keys() - before.keys()) == [
        f"experts.lora_parameters.{own}.{side}.default.weight"
        for own in ("down", "up")
        for side in ("lora_A", "lora_B")
    ]


def test_the_attribute_is_the_adapted_parameter_and_parameters_hold_the_base():
    model, base = tuned().get_base_model(), net()
    part = model.experts.lora_parameters["up"]
    torch.testing.assert_close(model.experts.up, base.experts.up + part.delta("default"))
    assert torch.equal(dict(model.named_parameters())["experts.up"], base.experts.up)
    assert not torch.allclose(model.experts.up, base.experts.up)


@pytest.fixture
def sums(monkeypatch):
    """The sums that are made, as weak references."""
    made, add = [], parameters.add_expert_updates

    def counted(*args, **options):
        total = add(*args, **options)
        made.append(weakref.ref(total))
        return total

    monkeypatch.setattr(parameters, "add_expert_updates", counted)
    return made


def test_a_forward_makes_one_sum_a_parameter_and_drops_it(sums, x):
    model = tuned()
    with torch.no_grad():
        model(x)
        assert len(sums) == 2
        assert [total() for total in sums] == [None, None]
        model(x)
    assert len(sums) == 4
    assert not parameters._running.get()


def test_a_forward_that_fails_leaves_nothing_behind(sums, x):
    model = tuned()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.get_base_model().experts(x)
    assert not parameters._running.get()
    assert torch.equal(model(model.first.weight.new_zeros(1, 4)), model(x.new_zeros(1, 4)))


def test_another_thread_does_not_see_the_sums_of_a_running_forward(sums):
    model = tuned().get_base_model()
    inside, done = threading.Event(), threading.Event()
    seen = {}

    class Waiting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self):
            seen["inside"] = self.weight
            inside.set()
            assert done.wait(20)
            return self.weight

    model = nn.Sequential(Waiting())
    tuned(model, target_parameters=["0.weight"])
    thread = threading.Thread(target=lambda: seen.update(result=model[0]()))
    thread.start()
    assert inside.wait(20)
    seen["outside"] = model[0].weight
    done.set()
    thread.join()
    assert seen["result"] is seen["inside"]
    assert seen["outside"] is not seen["inside"]
    assert len(sums) == 2


def test_a_look_without_autograd_does_not_cost_the_gradient():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            with torch.no_grad():
                size = self.weight.abs().max()
            return x @ self.weight / size

    model = tuned(nn.Sequential(Looking()), target_parameters=["0.weight"])
    model(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_merged_and_unmerged_agree_and_unmerging_gives_back_the_bits(x):
    model = tuned()
    expected, before = model(x), copy.deepcopy(model.get_base_model().state_dict())
    model.merge_adapter()
    assert torch.equal(model(x), expected)
    assert not torch.equal(model.experts._parameters["up"], before["experts.up"])
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))
    model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(model(x), expected)


def test_half_precision_merges_to_the_nearest_value_and_back_to_the_bits(x):
    model = tuned(net().bfloat16())
    owner = model.get_base_model().experts
    part, base = owner.lora_parameters["up"], owner._parameters["up"].clone()
    assert part.factors("default")[0].dtype == torch.float32
    assert model(x.bfloat16()).dtype == torch.bfloat16
    loose = model(x.bfloat16())
    model.merge_adapter()
    assert torch.equal(owner.up, (base.double() + part.delta("default").double()).bfloat16())
    torch.testing.assert_close(model(x.bfloat16()), loose, rtol=0.05, atol=0.1)
    model.unmerge_adapter()
    assert torch.equal(owner._parameters["up"], base)


def test_merging_for_good_leaves_a_plain_model(x):
    model = tuned()
    expected = model(x)
    plain = model.merge_and_unload()
    assert type(plain.experts) is Experts
    assert vars(plain.experts).keys() == vars(net().experts).keys()
    assert plain.state_dict().keys() == net().state_dict().keys()
    assert torch.equal(plain(x), expected)


def test_a_merge_that_overflows_is_refused_and_changes_nothing(x):
    model = tuned(net().half())
    with torch.no_grad():
        model.experts.lora_parameters["down"].factors("default")[1].fill_(1e6)
    before = copy.deepcopy(model.get_base_model().state_dict())
    with pytest.raises(MergeError, match=r"experts: NaNs detected in the merged weights.* in torch.float16"):
        model.merge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.get_base_model().state_dict().items())


def test_unloading_and_disabling_give_the_base(x):
    model = tuned()
    with model.disable_adapter():
        assert torch.equal(model(x), net()(x))
        assert model.experts.up is model.experts._parameters["up"]
    assert not torch.allclose(model(x), net()(x))
    plain = model.unload()
    assert type(plain.experts) is Experts
    assert vars(plain.experts).keys() == vars(net().experts).keys()
    assert list(plain.experts._modules) == []
    assert torch.equal(plain(x), net()(x))


def test_adapters_may_name_different_parameters_and_each_file_fits_peft(tmp_path, x):
    model = tuned(target_parameters=["experts.down"])
    model.add_adapter("other", LoraConfig(r=1, target_modules=[], target_parameters=BOTH))
    model.add_adapter("third", LoraConfig(r=3, target_modules=["last"], target_parameters=["first.weight"]))
    randomise(model)
    assert model.targeted_parameter_names == ["first.weight", "experts.up", "experts.down"]
    model.save_pretrained(tmp_path)
    outputs = {}
    for name, folder in (("default", ""), ("other", "other"), ("third", "third")):
        model.set_adapter(name)
        outputs[name] = model(x)
        theirs = peft.PeftModel.from_pretrained(net(), tmp_path / folder).eval()
        torch.testing.assert_close(outputs[name], theirs(x))
    model.set_adapter(["default", "other"])
    both = model.get_base_model().experts
    down = both.lora_parameters["down"]
    torch.testing.assert_close(
        both.down, both._parameters["down"] + down.delta("default") + down.delta("other")
    )
    expected = model(x)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert model.targeted_parameter_names == ["first.weight", "experts.down"]
    torch.testing.assert_close(model(x), outputs["default"])
    model.delete_adapter("default")
    assert type(model.get_base_model().experts) is Experts
    torch.testing.assert_close(model(x), outputs["third"])


def test_two_adapters_of_pefts_load_side_by_side(tmp_path, x):
    outputs = []
    for seed in (1, 2):
        theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_parameters=BOTH)).eval()
        randomise(theirs, seed)
        theirs.save_pretrained(tmp_path / str(seed))
        outputs.append(theirs(x))
    model = PeftModel.from_pretrained(net(), tmp_path / "1", adapter_name="one")
    model.load_adapter(tmp_path / "2", "two")
    for name, output in zip(("one", "two"), outputs, strict=True):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), output)


def test_the_scale_can_be_changed():
    model = tuned()
    owner = model.get_base_model().experts
    delta = owner.up - owner._parameters["up"]
    owner.scale_layer(2.0)
    torch.testing.assert_close(owner.up - owner._parameters["up"], 2 * delta)
    owner.unscale_layer()
    torch.testing.assert_close(owner.up - owner._parameters["up"], delta)
    owner.set_scale("default", 0.0)
    torch.testing.assert_close(owner.up, owner._parameters["up"])
    owner.unscale_layer()
    with rescale_adapter_scale(model, 3.0):
        torch.testing.assert_close(owner.up - owner._parameters["up"], 3 * delta)
    torch.testing.assert_close(owner.up - owner._parameters["up"], delta)


@pytest.mark.filterwarnings(UNMATCHED)
def test_patterns_of_rank_and_alpha_see_the_name_of_the_parameter():
    options = {
        "target_parameters": BOTH,
        "rank_pattern": {"experts.up": 1},
        "alpha_pattern": {r".*\.down": 9},
    }
    model = tuned(**options)
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, lora_alpha=3, **options)).base_model.model
    up, down = (model.experts.lora_parameters[own] for own in ("up", "down"))
    assert (up.r, up.scaling, down.r, down.scaling) == (
        {"default": 1},
        {"default": 3.0},
        {"default": 2},
        {"default": 4.5},
    )
    assert (theirs.experts.base_layer.scaling, theirs.experts.scaling) == (up.scaling, down.scaling)


def test_a_copy_is_independent(x):
    model = tuned()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.experts.lora_parameters["up"].factors("default")[1].zero_()
        twin.experts._parameters["down"].zero_()
    assert not torch.allclose(twin(x), model(x))
    assert torch.equal(model(x), tuned()(x))
    part = twin.experts.lora_parameters["up"]
    assert part.holder is twin.experts._parameters
    twin.merge_adapter()
    assert torch.equal(model(x), tuned()(x))


def test_the_model_can_be_converted_afterwards(x):
    model = tuned()
    expected = model(x)
    model.to(torch.float64)
    assert model.experts.up.dtype == torch.float64
    torch.testing.assert_close(model(x.double()), expected.double(), rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x.double()), expected.double(), rtol=1e-5, atol=1e-5)


def test_a_deleted_model_leaves_the_memory_at_once():
    model = tuned()
    gone = weakref.ref(model.experts._parameters["up"])
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_it_compiles_in_one_piece(x):
    torch._dynamo.reset()
    model = tuned(target_parameters=[*BOTH, "first.weight"])
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_autocast_changes_no_dtype_of_a_parameter(x):
    model = tuned()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.experts.up.dtype == torch.float32
        assert model(x).dtype == net()(x).dtype


def test_checkpointed_activations_give_the_same_gradients(x):
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for run in (lambda f, v: f(v), lambda f, v: checkpoint(f, v, use_reentrant=False)):
        model = tuned()
        run(model, x).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_weight_of_a_linear_layer_as_a_parameter_is_lora_on_the_layer(x):
    as_parameter = tuned(target_parameters=["last.weight"])
    as_layer = tuned(target_parameters=None, target_modules=["last"])
    for side in (0, 1):
        source = as_layer.get_base_model().last.factors("default")[side]
        as_parameter.get_base_model().last.lora_parameters["weight"].factors("default")[side].data = source
    torch.testing.assert_close(as_parameter(x), as_layer(x))


def test_an_embedding_can_be_adapted_by_its_weight(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4))

    tokens = torch.tensor([[0, 10, 3]])
    ours = tuned(model(), target_parameters=["0.weight"])
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(theirs(tokens), ours(tokens))
    assert not torch.allclose(model()(tokens), ours(tokens))


def test_a_parameter_may_have_the_name_of_a_method_of_a_dictionary():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return torch.softmax(x @ self.keys, -1) @ self.values

    torch.manual_seed(0)
    model = tuned(nn.Sequential(Memory()), target_parameters=["keys", "values"])
    memory, x = model.get_base_model()[0], torch.randn(3, 4)
    keys, values = (
        memory._parameters[n] + memory.lora_parameters[n].delta("default") for n in ("keys", "values")
    )
    torch.testing.assert_close(model(x), torch.softmax(x @ keys, -1) @ values)


def test_a_module_without_a_class_of_its_own_can_be_an_owner():
    bare = nn.Module()
    bare.inner = nn.Module()
    bare.inner.weight = nn.Parameter(torch.randn(4, 4))
    model = tuned(bare, target_parameters=["inner.weight"])
    assert isinstance(bare.inner, ParameterAdapters)
    model.unload()
    assert type(bare.inner) is nn.Module


def test_the_print_shows_rank_alpha_and_scale():
    assert "adapters=[default: rank=2 alpha=3 scale=1.5]" in repr(tuned())


# Where PEFT is wrong.


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.peft(
    "`target_parameters`: a parametrised 3d parameter",
    "the update is added once more in every forward",
    "added once",
)
@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization:UserWarning")
def test_the_update_of_a_parametrised_parameter_does_not_pile_up(x):
    def base():
        model = net()
        parametrize.register_parametrization(model.experts, "up", Doubled())
        return model

    ours = tuned(base(), target_parameters=["experts.up"])
    part = ours.get_base_model().experts.lora_parameters["up"]
    wanted = 2 * net().experts.up + part.delta("default")
    expected = torch.func.functional_call(net(), {"experts.up": wanted}, (x,))
    for _ in range(3):
        torch.testing.assert_close(ours(x), expected)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, lora_alpha=3, target_parameters=["experts.up"]))
    with torch.no_grad():
        for side in (0, 1):
            factor = (theirs.experts.lora_A, theirs.experts.lora_B)[side]["default"].weight
            factor.copy_(part.factors("default")[side])
    theirs.eval()
    torch.testing.assert_close(theirs(x), expected)
    assert not torch.allclose(theirs(x), expected)


def test_a_parametrised_matrix_is_read_and_written_as_by_peft_and_can_be_unloaded(tmp_path, x):
    def base():
        model = net()
        parametrize.register_parametrization(model.last, "weight", Doubled())
        return model

    ours = tuned(base(), target_parameters=["last.weight"])
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), ours(x))
    plain = ours.unload()
    assert torch.equal(plain(x), base()(x))
    parametrize.remove_parametrizations(plain.last, "weight")
    assert type(plain.last) is nn.Linear


@pytest.mark.peft(
    "merging into a parametrised parameter", "changes nothing and drops the adapter silently", "refused"
)
def test_merging_into_a_parametrised_parameter_is_refused(x):
    def base():
        model = net()
        parametrize.register_parametrization(model.last, "weight", Doubled())
        return model

    ours = tuned(base(), target_parameters=["last.weight"])
    with pytest.raises(MergeError, match="last: weight is parametrised, so there is no weight to merge into"):
        ours.merge_and_unload()
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_parameters=["last.weight"])).eval()
    randomise(theirs)
    adapted = theirs(x)
    assert not torch.allclose(adapted, base()(x))
    assert torch.equal(theirs.merge_and_unload()(x), base()(x))


@pytest.mark.peft(
    "`target_parameters`: one expert stored as (1, in, out)", "an error in forward, or a wrong delta", "right"
)
def test_a_single_transposed_expert_is_not_turned(x):
    ours = tuned(net(transposed=True, experts=1))
    part = ours.get_base_model().experts.lora_parameters["up"]
    a, b = part.factors("default")
    torch.testing.assert_close(part.delta("default"), 1.5 * (b @ a).T[None])
    theirs = peft.get_peft_model(
        net(transposed=True, experts=1), peft.LoraConfig(r=2, target_parameters=["experts.up"])
    )
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs(x)


@pytest.mark.peft(
    "`target_parameters`: a weight read from outside its module, as in attention", "no effect", "adapted"
)
def test_a_weight_that_another_module_reads_is_adapted():
    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True)}).eval()

    x = torch.randn(2, 3, 4)
    ours = tuned(base(), target_parameters=["out_proj.weight"]).get_base_model()["attention"]
    weight = ours.out_proj._parameters["weight"] + ours.out_proj.lora_parameters["weight"].delta("default")
    dense = base()["attention"]
    dense.out_proj.weight.data = weight.detach()
    torch.testing.assert_close(ours(x, x, x)[0], dense(x, x, x)[0])
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_parameters=["out_proj.weight"]))
    theirs = theirs.eval()
    randomise(theirs)
    assert torch.equal(theirs.base_model.model["attention"](x, x, x)[0], base()["attention"](x, x, x)[0])


@pytest.mark.peft("adapters that name different parameters", "refused", "allowed")
def test_peft_wants_all_adapters_to_name_the_same_parameters():
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_parameters=["experts.up"]))
    with pytest.raises(ValueError, match="must target the same set"):
        theirs.add_adapter("other", peft.LoraConfig(r=2, target_parameters=["experts.down"]))


# Bad input.


@pytest.mark.parametrize("wanted", ["experts.up", [""], [3], {"experts.up": 1}])
def test_target_parameters_must_be_a_list_of_names(wanted):
    with pytest.raises(ConfigError, match="target_parameters` must be a list of strings"):
        LoraConfig(target_parameters=wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_dropout": 0.1},
            "does not work with lora_dropout=0.1: it does not work with target_parameters",
        ),
        ({"lora_bias": True}, "does not work with lora_bias=True: it does not work with target_parameters"),
        ({"use_dora": True}, "does not work with use_dora=True: it does not work with target_parameters"),
        (
            {"fan_in_fan_out": True},
            "does not work with fan_in_fan_out=True: it does not work with target_parameters",
        ),
        (
            {"init_lora_weights": "pissa"},
            "does not work with init_lora_weights='pissa': it does not work with target_parameters",
        ),
    ],
)
def test_an_option_without_a_meaning_for_parameters_is_refused_by_name(options, message):
    model = net()
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, LoraConfig(**({"target_modules": [], "target_parameters": BOTH} | options)))
    assert type(model.experts) is Experts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.upp"]}, r"target_parameters=\['experts.upp'\] matched no parameter"),
        ({"target_parameters": ["experts.bias"]}, "experts.bias has 1 dimensions; it takes 2 or 3"),
        (
            {"target_parameters": ["last.weight"], "target_modules": ["last"]},
            "last.weight belongs to last, which target_modules means too",
        ),
    ],
)
def test_a_parameter_that_cannot_be_meant_is_refused(options, message):
    model = net()
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, LoraConfig(r=1, **options))
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]


def test_what_parameters_cannot_be_adapted_is_told_at_once():
    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def merge(self):
            return self.weight

    model = nn.ModuleDict({"rnn": nn.LSTM(3, 3), "own": Merging(), "codes": nn.Module()})
    model.register_parameter("weight", nn.Parameter(torch.randn(3, 3)))
    model["codes"].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TargetError) as error:
        get_peft_model(
            model, LoraConfig(r=1, target_modules=[], target_parameters=["weight", "weight_ih_l0"])
        )
    for text in (
        "  - weight belongs to the model itself: Targeting an nn.Parameter on the top-level module",
        "rnn.weight_ih_l0 belongs to a LSTM, which does not read it as an attribute",
        "own.weight belongs to own, whose own merge an adapter would hide",
        "codes.weight holds torch.uint8; it takes float16, bfloat16, float32 or float64",
    ):
        assert text in str(error.value)


def test_one_layer_cannot_carry_both_kinds_from_two_adapters(x):
    model = tuned(target_parameters=["last.weight"])
    expected = model(x)
    with pytest.raises(ConfigError, match="last: its parameters carry adapters"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["last", "first"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(TargetError, match="first, which carries another kind of adapter already"):
        model.add_adapter("more", LoraConfig(r=2, target_modules=[], target_parameters=["first.weight"]))
    assert torch.equal(model(x), expected)


def test_a_parameter_of_a_module_that_is_saved_whole_is_refused():
    options = {"r": 2, "target_modules": [], "target_parameters": BOTH, "modules_to_save": ["experts"]}
    with pytest.raises(TargetError, match="experts is a target inside experts of modules_to_save"):
        get_peft_model(net(), LoraConfig(**options))


def test_without_modules_a_model_of_unknown_type_gets_parameters_only(x):
    for modules in ([], None):
        model = tuned(target_modules=modules)
        assert not [*model.targeted_module_names]
        assert model.targeted_parameter_names == ["experts.up", "experts.down"]
        assert not model.peft_config["default"].target_modules
    mixtral = get_peft_model(tiny_moe("Mixtral"), LoraConfig(r=2, target_parameters=["gate_up_proj"]))
    assert sorted(mixtral.peft_config["default"].target_modules) == ["q_proj", "v_proj"]


def test_a_file_for_other_parameters_is_refused_and_the_model_left_alone(tmp_path):
    tuned(target_parameters=["experts.up"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    base = net()
    for wanted, message in (
        (BOTH, r"missing: base_model.model.experts.base_layer.lora_A.weight(.|\n)*size mismatch for"),
        (["experts.down"], "size mismatch for base_model.model.experts.lora_A.weight"),
        (["experts.nothing"], "target_parameters=.* matched no parameter"),
    ):
        path.write_text(json.dumps(config | {"target_parameters": wanted}))
        with pytest.raises(AdapterError, match=message):
            PeftModel.from_pretrained(base, tmp_path, allow=())
        assert [type(m) for m in base.modules()] == [type(m) for m in net().modules()]


def test_a_rank_that_the_file_does_not_have_is_refused_before_it_is_allocated(tmp_path):
    tuned().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 10**12}))
    with pytest.raises(AdapterError, match=r"experts.up: rank 1,000,000,000,000 in the config, 6 rows"):
        PeftModel.from_pretrained(net(), tmp_path)


def test_a_mistake_in_working_out_a_parameter_is_not_taken_for_the_base(monkeypatch):
    model = tuned()

    def broken(*_, **__):
        raise AttributeError("no such thing")

    monkeypatch.setattr(parameters, "add_expert_updates", broken)
    with pytest.raises(RuntimeError, match="adapted parameter up cannot be worked out: no such thing"):
        _ = model.get_base_model().experts.up

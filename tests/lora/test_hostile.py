"""Adapter folders that someone made to do harm: refused in one sentence, before anything is done."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import time
import tracemalloc
import warnings
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import randomise, tiny_llama
from rankfold import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from rankfold.errors import AdapterError, ConfigError, RankfoldError
from rankfold.lora.config.patterns import is_quick

# tiny_llama's seven linear layers a block, two blocks, and no large vocabulary to measure beside them.
OPTIONS = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(tiny_llama(), LoraConfig(**OPTIONS))
    randomise(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(pristine, tmp_path):
    """A folder like one of PEFT's: without the hashes that would give a change away."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((pristine / name).read_bytes())
    return tmp_path


@pytest.fixture
def base():
    return tiny_llama()


def edit(adapter, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(base, adapter, message: str) -> str:
    """Loading must fail with ``message`` and leave ``base`` as plain as it was."""
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(AdapterError, match=message) as raised:
        PeftModel.from_pretrained(base, adapter, allow=())
    assert [type(module) for module in base.modules()] == kinds
    assert len(str(raised.value)) < 20_000
    return str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9},
        {"r": 5000},
        {"rank_pattern": {".*": 10**9}},
        {"rank_pattern": {"q_proj": 10**12}},
        {"use_dora": True, "r": 10**9},
        {"init_lora_weights": "pissa", "r": 10**9},
        {"target_modules": ["embed_tokens"], "r": 10**9},
    ],
    ids=str,
)
def test_a_huge_rank_is_refused_before_anything_is_allocated(base, adapter, changes):
    edit(adapter, **changes)
    started = time.perf_counter()
    tracemalloc.start()
    refused(base, adapter, r"rank [\d,]+ in the config, \d+ rows of lora_A in the file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30_000_000
    assert time.perf_counter() - started < 10


def test_a_rank_is_measured_by_each_layers_own_tensors(base, adapter):
    """One long tensor must not buy a long rank for all other layers."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[first] = torch.zeros(50_000, 1)
    save_file(tensors, path)
    edit(adapter, r=50_000)
    message = refused(base, adapter, "rank 50,000 in the config, 4 rows")
    assert message.count("rank 50,000") == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}}, None),
        ({"megatron_core": "antigravity"}, None),
        ({"megatron_config": {}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"auto_mapping": "antigravity"}, "auto_mapping must be dict"),
        ({"megatron_core": ["antigravity"]}, "megatron_core must be str"),
        ({"trust_remote_code": True}, None),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, None),
        ({"_custom_modules": {"antigravity": "x"}}, None),
        ({"corda_config": {"cache_file": 7}}, "corda_config"),
    ],
    ids=str,
)
def test_nothing_that_a_config_names_is_imported(adapter, changes, message):
    edit(adapter, **changes)
    before = set(sys.modules)
    if message is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(Unexpected keyword arguments|was loaded in spite of)")
            PeftModel.from_pretrained(tiny_llama(), adapter)
    else:
        refused(tiny_llama(), adapter, message)
    with pytest.raises(RankfoldError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoPeftModel.from_pretrained(adapter)
    assert "antigravity" not in sys.modules
    assert not any("megatron" in name for name in set(sys.modules) - before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"peft_type": "LORA", "r": NaN}', "NaN is not a number"),
        (b'{"peft_type": "LORA", "lora_alpha": Infinity}', "Infinity is not a number"),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', "1e999 is too large"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b'{"peft_type": "LORA", "lora_alpha": ' + b"9" * 400 + b"}", "400 digits"),
        (b'{"peft_type": "LORA", "a": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"peft_type": "LORA", "auto_mapping": ' + b'{"a":' * 30 + b"1" + b"}" * 31, "nested more than"),
        (b'{"peft_type": "LORA", "r": 4, "r": 8}', "the key 'r' is there twice"),
        (b'{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}', "the key 'a' is there twice"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "holds a list"),
        (b'"LORA"', "holds a str"),
        (b'{"peft_type": "LOHA"}', "peft_type is 'LOHA'"),
        (b'{"peft_type": ["LORA"]}', "peft_type is "),
        (b" " * 11_000_000, "11,000,000 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_is_no_plain_json_is_refused(base, adapter, content, message):
    (adapter / "adapter_config.json").write_bytes(content)
    refused(base, adapter, message)


@pytest.mark.parametrize("field", ["lora_alpha", "lora_dropout"])
@pytest.mark.parametrize("value", [True, "8", None, [8], {}], ids=repr)
def test_a_number_must_be_one(base, adapter, field, value):
    edit(adapter, **{field: value})
    refused(base, adapter, field)


@pytest.mark.parametrize("value", [0, -4, 2.5, "8", True, None, [8]], ids=repr)
def test_a_rank_must_be_a_whole_number(base, adapter, value):
    edit(adapter, r=value)
    refused(base, adapter, "r must be a whole number")


def test_a_scale_beyond_float32_is_refused(base, adapter):
    edit(adapter, lora_alpha=1e300)
    refused(base, adapter, "the scale 2.5e[+]299 is beyond float32")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(sorted(LoraConfig(target_modules=["q_proj"]).to_dict())), value=JUNK)
def test_a_config_with_anything_in_any_field_is_read_or_refused(base, adapter, field, value):
    path = adapter / "adapter_config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {field: value}))
    with suppress(AdapterError):  # any other exception fails the test
        LoraConfig.from_pretrained(adapter)
    path.write_text(whole)


SLOW = [r"(.+)+!", r"(?:a|.|..)*!", r"(.*)*(.*)*!", r".*.*.*.*.*.*.*.*.*.*.*.*!", r"([a-z._0-9]+)*[A-Z]"]


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_never_end_is_refused_in_seconds(base, adapter, pattern, field):
    edit(adapter, **{field: {pattern: 4} if "_pattern" in field else pattern})
    started = time.perf_counter()
    refused(base, adapter, "too slow to be tried")
    assert time.perf_counter() - started < 15


def test_ordinary_patterns_are_known_to_be_quick_and_others_are_tried(adapter):
    quick = [
        *(r".*\.layers\.1\..*(k|down)_proj", r"model\.layers\.\d+\.mlp\..*", "q_proj"),
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    ]
    assert all(is_quick(pattern) for pattern in quick)
    assert not any(is_quick(pattern) for pattern in SLOW)
    slower = r"(model\.)?layers(\.\d+)+\.(self_attn|mlp)\.([a-z]+_)+proj"
    assert not is_quick(slower)
    edit(adapter, target_modules=slower)
    PeftModel.from_pretrained(tiny_llama(), adapter)


@pytest.mark.parametrize("pattern", ["(", "[", "(?P<a>x)(?P<a>y)", "*", "a{99999999999}"])
def test_a_pattern_that_is_none_is_refused(base, adapter, pattern):
    edit(adapter, rank_pattern={pattern: 4})
    refused(base, adapter, "cannot be used")


def test_endless_lists_of_patterns_are_refused(base, adapter):
    edit(adapter, rank_pattern={f"a{n}": 4 for n in range(30_000)})
    refused(base, adapter, "30,000 patterns")


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "..", ".", "/etc", "a/b", "a\\b", "C:x", "", "a" * 10_000, "a\0b", "a\nb", "a.b"),
        *("keys", "forward"),
    ],
    ids=lambda name: repr(name)[:20],
)
def test_an_adapters_name_never_leads_out_of_the_folder(adapter, name, tmp_path):
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]), name)
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        PeftModel.from_pretrained(tiny_llama(), adapter, name)


@pytest.mark.parametrize("name", ["lora", "%2e%2e", "\u202eevil", "..\uff0fx".replace("..", "__"), "名字"])
@pytest.mark.filterwarnings("ignore:Adapter name .lora. should not be")
def test_an_adapters_name_may_be_any_other_word(name, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]), name)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name, "README.md"}
    PeftModel.from_pretrained(tiny_llama(), tmp_path, name, subfolder=name)


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[31mred", "k" * 10_000, "", "base_model.model."]
)
def test_a_tensors_name_is_no_path_and_is_printed_safely(base, adapter, key):
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {key: torch.zeros(1)}, path)
    message = refused(base, adapter, "unexpected: ")
    assert all(letter.isprintable() or letter == "\n" for letter in message)
    assert len(message) < 1_000


def test_a_million_tensors_are_refused_by_the_length_of_the_header(base, adapter):
    path = adapter / "adapter_model.safetensors"
    header = b"{" + b" " * 90_000_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(base, adapter, "has a header of 90,000,001 bytes")


def entry(shape, start, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD_HEADERS = {
    "overlap": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12),
    "past the end": ({"a": entry([1], 0, 4)}, 2),
    "trailing": ({"a": entry([1], 0, 4)}, 9),
    "negative": ({"a": entry([1], -4, 0)}, 4),
    "overflow": ({"a": entry([2**62, 2**62], 0, 4)}, 4),
    "backwards": ({"a": entry([1], 4, 0)}, 4),
    "dtype": ({"a": entry([1], 0, 4, "PICKLE")}, 4),
    "metadata": ({"__metadata__": {"a": 1}, "b": entry([1], 0, 4)}, 4),
    "shape": ({"a": entry([0, 2**63 - 1], 0, 0)}, 0),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_malformed_header_is_one_sentence(base, adapter, case):
    header, size = BAD_HEADERS[case]
    encoded = json.dumps(header).encode()
    content = struct.pack("<Q", len(encoded)) + encoded + b"\0" * size
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused(base, adapter, "damaged or not a safetensors file|unexpected: a")


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**62) + b"{}", b"PK\x03\x04" + b"\0" * 100, b"\x80\x04."]
)
def test_a_file_of_another_kind_is_one_sentence(base, adapter, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused(base, adapter, "damaged or not a safetensors file|a header of")


def test_a_sharded_adapter_is_not_followed_anywhere(base, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (adapter / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    refused(base, adapter, "holds no adapter_model.safetensors")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_of_anything_but_tensors_runs_nothing(base, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    for content in (b"x" * 9, pickle.dumps(Trap())):
        (adapter / "adapter_model.bin").write_bytes(content)
        refused(base, adapter, "holds something else than tensors, or is damaged")
    torch.save({"a": Trap()}, adapter / "adapter_model.bin")
    refused(base, adapter, "holds something else than tensors, or is damaged")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"schema_version": NaN}', b" " * 2_000_000, b"{}"])
def test_damaged_facts_are_refused(base, adapter, content):
    (adapter / "rankfold.json").write_bytes(content)
    refused(base, adapter, "is damaged")

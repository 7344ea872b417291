from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankfold.errors import ConfigError
from rankfold.interop.python_values import Symbol, Unread, leaves, read_python


@pytest.fixture
def read(tmp_path):
    def read_text(text: str, name: str = "config.py"):
        (tmp_path / name).write_text(text)
        return read_python(tmp_path / name)

    return read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-3", -3),
        ("8 * 2 + 1", 17),
        ("0.03 * 1", 0.03),
        ("7 // 2", 3),
        ("2 ** 10", 1024),
        ("not True", False),
        ("'a' + 'b'", "ab"),
        ("'a' 'b'", "ab"),
        ("f'{1}/x{\"y\"}'", "1/xy"),
        ("(0.9, 0.999)", [0.9, 0.999]),
        ("[1] + [2]", [1, 2]),
        ("dict(a=1, b=dict(c=None))", {"a": 1, "b": {"c": None}}),
        ("{'a': 1, **dict(b=2)}", {"a": 1, "b": 2}),
    ],
)
def test_values_are_read(read, text, value):
    assert read(f"x = {text}\n").values["x"].plain == value


@pytest.mark.parametrize(
    "text",
    [
        "open('/etc/passwd').read()",
        "__import__('os').system('true')",
        "[n for n in range(3)]",
        "lambda: 1",
        "1 if y else 2",
        "unknown",
        "'a' * 10**9",
        "'%999999999d' % 1",
        "9 ** 9 ** 9",
        "1 / 0",
        "1 + 'a'",
        "f'{1:>9}'",
        "a[0]",
    ],
)
def test_nothing_is_run_and_what_is_no_value_is_kept_as_its_text(read, text):
    found = read(f"a = [1]\nx = {text}\n").values["x"]
    assert isinstance(found.value, Unread)
    assert found.place == "config.py:2"
    assert found.value.why


def test_names_lead_to_where_the_value_stands(read):
    values = read("lr = 1e-4\nmodel = dict(\n    lr=lr,\n    twice=lr * 2)\n").values
    model = values["model"].value
    assert model["lr"] is values["lr"]
    assert (model["lr"].place, model["twice"].place, model["twice"].plain) == (
        "config.py:1",
        "config.py:4",
        2e-4,
    )


def test_what_is_imported_is_known_by_its_whole_name(read):
    values = read("import torch\nfrom peft import LoraConfig as L\nx = [L, torch.float16, L.a.b]\n").values
    names = [Symbol("peft.LoraConfig"), Symbol("torch.float16"), Symbol("peft.LoraConfig.a.b")]
    assert values["x"].plain == names


def test_a_later_value_counts_and_a_branch_that_can_be_decided_is_taken(read):
    text = (
        "a = 1\na = 2\nb = []\nif a == 1:\n    b = [1]\nc = True\nif c:\n    b += [3]\nelse:\n    b = [4]\n"
    )
    found = read(text)
    assert (found.values["a"].plain, found.values["b"].plain) == (2, [3])
    assert found.passed_over == [("config.py:4", "if a == 1:", "whether this holds cannot be read")]


def test_a_dict_is_replaced_within_a_file_and_added_to_over_files(read):
    assert read("m = dict(a=1)\nm = dict(b=2)\n").values["m"].plain == {"b": 2}
    read("m = dict(a=1, n=dict(x=1))\nlr = 1\n", "base.py")
    found = read("_base_ = ['base.py', 'missing.py']\nm = dict(b=2, n=dict(y=2))\n")
    assert found.values["m"].plain == {"a": 1, "b": 2, "n": {"x": 1, "y": 2}}
    assert found.values["lr"].place == "base.py:2"
    assert found.passed_over == [
        ("config.py:1", "_base_ = 'missing.py'", "no such file beside the config; its values are not known")
    ]
    assert read("_base_ = 'base.py'\nm = dict(_delete_=True, b=2)\n").values["m"].plain == {"b": 2}


def test_configs_that_lead_back_to_themselves_end(read):
    found = read("_base_ = 'config.py'\na = 1\n")
    assert found.values["a"].plain == 1
    assert found.passed_over[0][2] == "it leads back to itself"


@pytest.mark.parametrize(
    "text", ["for x in y: pass", "def f(): pass", "a.b = 1", "a, b = 1, 2", "del a", "print(1)"]
)
def test_other_statements_are_told(read, text):
    [(place, told, why)] = read(f"\n{text}\n").passed_over
    assert (place, bool(told), bool(why)) == ("config.py:2", True, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = (\n", r"config.py:1: not Python"),
        (b"\xff\xfe", "not Python"),
        (b"a = 1\x00", "not Python"),
        (b"a = " + b"1+" * 20000 + b"1", "nested too deeply|not Python"),
        (b"#" * (1 << 20) + b"##", "too large"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, content, message):
    (tmp_path / "config.py").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_python(tmp_path / "config.py")


def test_a_config_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the config .*No such file"):
        read_python(tmp_path / "none.py")
    with pytest.raises(ConfigError, match="cannot read the config"):
        read_python(tmp_path)


def test_the_leaves_of_a_value_have_dotted_names(read):
    found = read("m = dict(a=1, b=[dict(c=2), 3], d=[4, 5], e={})\n").values["m"]
    assert [(name, leaf.plain) for name, leaf in leaves(found, "m")] == [
        ("m.a", 1),
        ("m.b.0.c", 2),
        ("m.b.1", 3),
        ("m.d", [4, 5]),
        ("m.e", {}),
    ]


@given(st.recursive(st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=9), st.lists))
def test_python_literals_come_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("literal") / "config.py"
    path.write_text(f"x = {value!r}\n", encoding="utf-8")
    assert read_python(path).values["x"].plain == value

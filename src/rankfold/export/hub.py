"""An exported folder on the hub: shown first, then sent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankfold.errors import ExportError
from rankfold.export.card import CARD, front_of

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
RUN_FILES = ("run.json", "recipe.yaml", "metrics.jsonl")


@dataclass(frozen=True)
class Parcel:
    """What would be sent: the ``files`` of ``folder`` with their sizes in bytes."""

    folder: Path
    repository: str
    files: dict[str, int]
    base: str
    licence: str


def parcel_of(folder: Path, repository: str) -> Parcel:
    """What of ``folder`` goes to ``repository``, OWNER/NAME.  Raises ExportError for a folder that no export
    has written: a run's own holds paths and rows of the machine that it was made on."""
    if not REPOSITORY.fullmatch(repository):
        raise ExportError(f"--out wants OWNER/NAME on the hub, and got {repository}")
    if found := [name for name in RUN_FILES if (folder / name).exists()]:
        raise ExportError(
            f"{folder} is a run's folder ({found[0]}): export it first (--to hf, merged or gguf), then that"
        )
    front = front_of(folder / CARD)
    base = front.get("base_model")
    if not isinstance(base, str) or not base:
        raise ExportError(
            f"{folder / CARD} names no base_model; push a folder that rankfold export has written"
        )
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    return Parcel(folder, repository, files, base, str(front.get("license") or ""))


def push(parcel: Parcel, private: bool) -> str:
    """Send it, to a repository that is made if there is none; its address.  Raises ExportError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api: Any = HfApi()
    try:
        api.create_repo(parcel.repository, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=parcel.repository, folder_path=parcel.folder, allow_patterns=list(parcel.files)
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        told = f"{parcel.repository} was not sent: {str(error)[:300]}; hf auth login lets the hub know you"
        raise ExportError(told) from error
    return str(getattr(sent, "commit_url", sent))

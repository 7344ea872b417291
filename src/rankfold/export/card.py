"""The model card that lies beside what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rankfold.export.certificate import Certificate
from rankfold.export.request import ExportRequest
from rankfold.files import write_whole
from rankfold.lora.config.lora_config import LoraConfig
from rankfold.models.base.find import find_base
from rankfold.models.gguf.file import read_gguf
from rankfold.models.mlx.layout import is_mlx

CARD = "README.md"
MARK = "---\n"
PLAIN = ("merged", "gguf", "ollama")  # of which the adapter is a part
LIBRARIES = {"merged": "transformers", "gguf": "gguf", "gguf-adapter": "gguf", "mlx": "mlx"}


def write_card(
    adapter: Path, asked: ExportRequest, folder: Path, base: str, made: Certificate | None
) -> None:
    """Write README.md with what a hub and a reader want to know; nothing is claimed that was not seen."""
    front: dict[str, object] = {
        "base_model": base,
        "library_name": LIBRARIES.get(asked.to, "peft"),
        "tags": ["lora", "rankfold"],
    }
    if licence := licence_of(base):
        front["license"] = licence
    kind = "with a LoRA adapter merged into it" if asked.to in PLAIN else "this is a LoRA adapter for it"
    name = folder.name.removeprefix(".").partition(".partial-")[0]
    told = [f"# {name}", f"Base model: `{base}`; {kind}."]
    if not is_mlx(adapter):
        config = LoraConfig.from_pretrained(adapter)
        told.append(f"Rank {config.r}, alpha {config.lora_alpha:g}.")
    told.append(f"Written by `rankfold export --to {asked.to}`.")
    if not front.get("license"):
        told.append("The licence of the base was not found; it holds for this too.")
    if made is not None:
        told.append(
            f"`certificate.json`: {made.engine} answered {made.answers_equal} of {made.prompts} prompts with "
            f"the tuned model's own words; mean divergence {made.mean_kl:.1e} nats a token."
        )
    text = MARK + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + MARK + "\n" + "\n\n".join(told)
    write_whole(folder / CARD, text + "\n")


def licence_of(base: str) -> str:
    """What the base's own card, or its GGUF file, says; empty if nothing does."""
    source = find_base(base)
    if source.gguf_file is not None:
        return str(read_gguf(source.gguf_file, words=False).keys.get("general.license", ""))
    return str(front_of(Path(source.location) / CARD).get("license", ""))


def front_of(card: Path) -> dict[str, Any]:
    """What stands before the text of a card; nothing if there is none that can be read."""
    if not card.is_file():
        return {}
    _, mark, rest = card.read_text(encoding="utf-8", errors="replace").partition(MARK)
    try:
        front = yaml.safe_load(rest.partition(MARK)[0]) if mark else None
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}

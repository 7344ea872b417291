"""``README.md`` of an adapter folder, and sending a folder to the hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.errors import OutputError
from rankfold.files import write_whole
from rankfold.lora.config.lora_config import PEFT_VERSION

FRONT = re.compile(r"\A---\n(.*?)\n---\n?", re.DOTALL)
TEXT = """# Adapter

A LoRA adapter in PEFT's format: low-rank updates for the layers that `adapter_config.json` names, to be
put onto the base model that it was trained on. The base is not part of this folder.

## How to use it

```python
from rankfold import PeftModel  # or: from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
merged = model.merge_and_unload()  # a plain model, if the adapter shall be part of it for good
```

## What is in the folder

- `adapter_model.safetensors`: the trained tensors.
- `adapter_config.json`: where they belong, with which rank and scale.
- `rankfold.json`, if it is there: hashes of both files and a fingerprint of the base, by which a later
load can tell   that all is as it was.

## What whoever passes this on should add here

What it was trained for and on which data, how it was evaluated against the base, where it must not be
used, and the licences of the base and of the data.

### Framework versions

- PEFT {version}
"""


def write_card(folder: Path, base: nn.Module, *, causal: bool) -> None:
    """Write or update the card in ``folder``: the hub's fields in front, the text as it stands."""
    path = folder / "README.md"
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    front = FRONT.match(known)
    fields = _with_fields(front[1] if front else "", base, causal=causal)
    text = known[front.end() :] if front else known
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"---\n{fields}\n---\n{text or TEXT.format(version=PEFT_VERSION)}")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _with_fields(front: str, base: nn.Module, *, causal: bool) -> str:
    """The lines ``front`` with those that the hub reads of an adapter."""
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    tags = ["lora"]
    if any(kind.__name__ == "PreTrainedModel" for kind in type(base).__mro__):
        tags.append("transformers")
    if isinstance(name, str):
        tags.append(f"base_model:adapter:{name}")
    tags += [str(tag) for tag in getattr(base, "model_tags", None) or ()]
    wanted = {"library_name": "peft", "tags": "".join(f"\n- {_quoted(tag)}" for tag in sorted({*tags}))}
    if isinstance(name, str):
        wanted["base_model"] = _quoted(name)
    if causal and "pipeline_tag:" not in front:
        wanted["pipeline_tag"] = "text-generation"
    for key in wanted:
        front = re.sub(rf"^{key}:.*\n?(?:^[ -].*\n?)*", "", front, flags=re.MULTILINE)
    lines = [f"{key}: {value}".replace(": \n", ":\n") for key, value in sorted(wanted.items())]
    return "\n".join([line for line in front.splitlines() if line.strip()] + lines)


def _quoted(text: str) -> str:
    return (
        text
        if re.fullmatch(r"[\w./:-]+", text) and not text[0].isdigit()
        else "'" + text.replace("'", "''") + "'"
    )


def push_to_hub(model: Any, repo_id: str, **options: Any) -> Any:
    """Save ``model`` and upload the folder; ``private``, ``token``, ``revision``, ``commit_message`` and
    ``create_pr`` are the hub's words, all others those of ``save_pretrained``."""
    import huggingface_hub

    words = ("revision", "commit_message", "create_pr")
    upload = {word: options.pop(word) for word in words if word in options}
    token, private = options.pop("token", None), options.pop("private", None)
    api = huggingface_hub.HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        return api.upload_folder(repo_id=repository, folder_path=folder, **upload)

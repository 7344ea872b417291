"""Another server in our place: vLLM, lmdeploy or llama.cpp, with the flags that model and adapters need."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from rankfold.errors import ConfigError
from rankfold.export.request import ExportRequest
from rankfold.export.run import export_adapter
from rankfold.lora import LoraConfig
from rankfold.models.base.find import DEFAULT_MODEL, find_base
from rankfold.models.choices import ModelRequest
from rankfold.serve.request import ServeRequest

MODULES = {"vllm": "vllm", "lmdeploy": "lmdeploy", "llama.cpp": "llama_cpp"}
TEMPLATE = "chat_template.jinja"
EXPORTED_AS = {"vllm": "vllm", "lmdeploy": "lmdeploy", "llama.cpp": "gguf-adapter"}


@dataclass(frozen=True)
class Started:
    """A command of an engine and what is to stand in its environment, where a key does not show."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run_engine(
    adapters: Mapping[str, Path],
    model: ModelRequest,
    asked: ServeRequest,
    key: str | None,
    tell: Callable[[str], object],
    words: Sequence[str] = (),
) -> int:
    """Serve by ``asked.engine``, which gets ``words`` too, until it ends or this process is told to; its exit
    status.  Raises ConfigError for what it cannot serve and if it is not installed."""
    _require(asked, model)
    with tempfile.TemporaryDirectory(prefix="rankfold-engine-") as folder:
        started = command_of(adapters, model, asked, key, Path(folder))
        for note in started.notes:
            tell(f"note: {note}")
        command = [*started.command, *words]
        tell(shlex.join("KEY" if word == key else word for word in command))
        with subprocess.Popen(command, env=os.environ | started.environment) as process:

            def stop(number: int, _: FrameType | None) -> None:
                process.send_signal(number)

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            return process.wait()


def command_of(
    adapters: Mapping[str, Path], model: ModelRequest, asked: ServeRequest, key: str | None, folder: Path
) -> Started:
    """How the engine is started, with the adapters as it takes them written into ``folder``."""
    base = model.model or _base_of(adapters)
    written = _written(adapters, asked.engine, base, model, folder)
    make = {"vllm": _vllm, "lmdeploy": _lmdeploy, "llama.cpp": _llama}[asked.engine]
    python = str(asked.engine_python or sys.executable)
    return make(python, base, written, asked, key)


def _vllm(
    python: str, base: str, written: Mapping[str, Path], asked: ServeRequest, key: str | None
) -> Started:
    _refuse_gguf(base, "vllm")
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        base,
        *_address("--host", "--port", asked),
    ]
    command += ["--max-num-seqs", str(asked.at_once)]
    if written:
        ranks = [LoraConfig.from_pretrained(place).r for place in written.values()]
        command += ["--enable-lora", "--max-lora-rank", str(max(ranks)), "--max-loras", str(len(written))]
        command += ["--lora-modules", *(f"{name}={place}" for name, place in written.items())]
    return Started([*command, *_template("--chat-template", written)], {"VLLM_API_KEY": key} if key else {})


def _lmdeploy(
    python: str, base: str, written: Mapping[str, Path], asked: ServeRequest, key: str | None
) -> Started:
    _refuse_gguf(base, "lmdeploy")
    command = [
        python,
        "-m",
        "lmdeploy",
        "serve",
        "api_server",
        base,
        *_address("--server-name", "--server-port", asked),
    ]
    command += ["--max-batch-size", str(asked.at_once)]
    if written:
        command += [
            "--backend",
            "pytorch",
            "--adapters",
            *(f"{name}={place}" for name, place in written.items()),
        ]
    notes = (
        ["lmdeploy takes the key on its command line, where other users of the machine can see it"]
        if key
        else []
    )
    keys = ["--api-keys", key] if key else []
    return Started([*command, *keys, *_template("--chat-template", written)], {}, notes)


def _llama(
    python: str, base: str, written: Mapping[str, Path], asked: ServeRequest, key: str | None
) -> Started:
    file = find_base(base).gguf_file
    if file is None:
        raise ConfigError(
            f"llama.cpp reads a GGUF file, and {base} is none; rankfold export --to gguf makes one"
        )
    if len(written) > 1:
        raise ConfigError("llama.cpp's server answers by one adapter; name one, or leave --engine out")
    command = [python, "-m", "llama_cpp.server", "--model", str(file), *_address("--host", "--port", asked)]
    for name, place in written.items():
        [adapter] = place.glob("*.gguf")
        command += ["--lora_path", str(adapter), "--model_alias", name]
    return Started(command, {"API_KEY": key} if key else {})


def _address(host: str, port: str, asked: ServeRequest) -> list[str]:
    return [host, asked.host, port, str(asked.port)]


def _template(option: str, written: Mapping[str, Path]) -> Sequence[str]:
    """The template that the adapters bring.  Raises ConfigError if they bring different ones."""
    files = {name: place / TEMPLATE for name, place in written.items()}
    texts = {name: file.read_text(encoding="utf-8") if file.is_file() else "" for name, file in files.items()}
    if len({*texts.values()}) > 1:
        raise ConfigError(
            "the adapters were trained with different chat templates, and this engine has one for all"
        )
    return [option, str(next(iter(files.values())))] if any(texts.values()) else []


def _written(
    adapters: Mapping[str, Path], engine: str, base: str, model: ModelRequest, folder: Path
) -> dict[str, Path]:
    found = {}
    for number, (name, adapter) in enumerate(adapters.items()):
        asked = ExportRequest.of(
            {"to": EXPORTED_AS[engine], "model": base, "prompts": 0, "allow": model.allow}
        )
        found[name] = export_adapter(adapter, folder / f"adapter{number}", asked).out
    return found


def _base_of(adapters: Mapping[str, Path]) -> str:
    named = {LoraConfig.from_pretrained(place).base_model_name_or_path for place in adapters.values()}
    if len(named) > 1 or None in named:
        raise ConfigError("the adapters do not name one base; name it")
    return str(named.pop()) if named else DEFAULT_MODEL


def _refuse_gguf(base: str, engine: str) -> None:
    if find_base(base).gguf_file is not None:
        raise ConfigError(
            f"{engine} reads a model's folder, and {base} is a GGUF file; name a folder as MODEL"
        )


def _require(asked: ServeRequest, model: ModelRequest) -> None:
    if refused := [name for name in ("stored", "precision", "eos_token") if getattr(model, name)]:
        raise ConfigError(
            f"{', '.join(refused)}: {asked.engine} has nothing for it here; leave that or --engine out"
        )
    module = MODULES[asked.engine]
    if asked.engine_python is None and find_spec(module) is None:
        raise ConfigError(
            f"{asked.engine} is not installed here; name its environment with --engine-python PYTHON"
        )
    if asked.engine_python is not None and not asked.engine_python.is_file():
        raise ConfigError(f"--engine-python {asked.engine_python}: no such file")

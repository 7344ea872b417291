"""What a server did, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from rankfold.serve.engine import Engine
from rankfold.serve.speakers import Speakers


class Metrics:
    """Reads ``engine`` when it is asked; nothing is counted twice."""

    def __init__(self, engine: Engine, speakers: Speakers) -> None:
        self.engine, self.speakers = engine, speakers
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self.process = psutil.Process()  # type: ignore[no-untyped-call]

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Any]:
        engine, counts = self.engine, self.engine.counts
        counted = {
            "answers": ("answers given, failed ones too", counts.answers),
            "failed_answers": ("answers that could not be given, or that nobody waited for", counts.failed),
            "prompt_tokens": ("tokens of the prompts of these answers", counts.prompt_tokens),
            "written_tokens": ("tokens of these answers", counts.written_tokens),
        }
        for name, (told, value) in counted.items():
            yield CounterMetricFamily(f"rankfold_{name}", told, value)
        gauged = {
            "pending": ("answers that wait or are written", engine.pending),
            "writing": ("answers that are written", engine.written_at_once),
            "pending_limit": ("answers that may wait or be written", engine.most),
            "models": ("names that answer", len(self.speakers.by_name)),
            "resident_memory_bytes": ("memory of the process", self.process.memory_info().rss),
        }
        for name, (told, value) in gauged.items():
            yield GaugeMetricFamily(f"rankfold_{name}", told, value)

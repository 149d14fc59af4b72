"""What a service counts and times, for Prometheus. Labels take few values, all of them ours: nothing a client writes is one.

Docker's dashboard (docker/grafana) shows every one of these; a test compares the two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import __version__
from ..bundle import Manifest
from ..machine import Machine
from ..pipeline import HybridStitchPipeline
from .drawing import Drawn

__all__ = ["Metrics", "Outcome"]

Outcome = Literal["ok", "invalid", "busy", "deadline", "cancelled", "error"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "invalid", "busy", "deadline", "cancelled", "error")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self, manifest: Manifest, machine: Machine | None) -> None:
        self.registry = registry = CollectorRegistry()

        def seconds(name: str, text: str, labels: Sequence[str] = (), buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"hst_trt_{name}_seconds", text, labels, buckets=buckets, registry=registry)

        self.requests = Counter("hst_trt_requests", "Requests that were answered, by outcome", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)  # shown from the start, at 0: a rate needs the first step too
        self.running = Gauge("hst_trt_requests_running", "Requests that are being drawn", registry=registry)
        self.waiting = Gauge("hst_trt_requests_waiting", "Requests in the queue", registry=registry)
        self.queue = seconds("queue", "From a request's arrival to the start of its drawing")
        self.request = seconds("request", "From a request's arrival to its pictures", ["schedule"])
        self.stage = seconds("stage", "A stage of one batch", ["stage"])
        self.step = seconds("step", "A denoising step of one batch", ["stage"], _STEP_SECONDS)
        self.part = seconds("part", "A part of one batch: text encoders, denoising loop, VAE decoder", ["part"])
        self.load = seconds("engine_load", "Loading and warming up one pipeline")
        self.batch = Histogram(
            "hst_trt_batch_images", "Images of one batch", buckets=(1, 2, 3, 4, 6, 8, 16, 32), registry=registry
        )
        self.tokens = Counter("hst_trt_tokens", "Image tokens computed by each transformer", ["engine"], registry=registry)
        self.large_ratio = Histogram(
            "hst_trt_large_token_ratio",
            "Share of a batch's tokens over all steps that the large model computed",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
            registry=registry,
        )
        self.non_finite = Counter("hst_trt_non_finite", "Batches whose latents were not finite", registry=registry)
        build = Gauge("hst_trt_build_info", "What runs here", ["version", "backend", "gpu", "bundle"], registry=registry)
        gpu = "" if manifest.target.backend == "onnxruntime" or machine is None else machine.name
        build.labels(__version__, manifest.target.backend, gpu, manifest.name).set(1)

    def watch(self, pipelines: Callable[[], Sequence[HybridStitchPipeline]]) -> None:
        """Exports what the pipelines' backends count themselves, read when somebody asks."""
        self.registry.register(_Backends(pipelines))

    def drawn(self, batch: Sequence[Drawn]) -> None:
        """Counts a batch that was drawn."""
        stats, images = batch[0].stats, batch[0].batch
        self.batch.observe(images)
        for stage, done in stats.stages.items():
            if done.steps:
                self.stage.labels(stage.value).observe(done.seconds)
        for record in stats.records:
            self.step.labels(record.step.stage.value).observe(record.seconds)
        for part, spent in stats.seconds.items():
            self.part.labels(part).observe(spent)
        small = stats.num_tokens * sum(record.step.small for record in stats.records)
        self.tokens.labels("large").inc(images * stats.large_tokens)
        self.tokens.labels("small").inc(images * small)
        self.large_ratio.observe(stats.large_tokens / (stats.num_tokens * len(stats.records)))


class _Backends(Collector):
    """Graph counters and memory: read at a scrape, because the backends count for themselves."""

    def __init__(self, pipelines: Callable[[], Sequence[HybridStitchPipeline]]) -> None:
        self._pipelines = pipelines

    def describe(self) -> Iterable[Metric]:
        return self._families([], None)

    def collect(self) -> Iterator[Metric]:
        backends = [pipeline.backend for pipeline in self._pipelines()]
        device = next((memory for backend in backends if (memory := backend.memory()) is not None), None)
        return self._families([graphs for backend in backends if (graphs := getattr(backend, "graphs", None))], device)

    def _families(self, graphs: Sequence[object], device: tuple[int, int] | None) -> Iterator[Metric]:
        for name, text, field in (
            ("captures", "CUDA graphs captured", "recorded"),
            ("replays", "CUDA graphs replayed", "replayed"),
        ):
            total = sum(getattr(counters, field) for counters in graphs)
            yield CounterMetricFamily(f"hst_trt_graph_{name}", text, value=total)
        memory = GaugeMetricFamily("hst_trt_memory_bytes", "Memory in use: this process's, and the device's", labels=["kind"])
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        memory.add_metric(["host"], pages * os.sysconf("SC_PAGE_SIZE"))
        if device is not None:
            free, there = device
            memory.add_metric(["device"], there - free)
        yield memory

"""What `/metrics` reads at scrape time, so that the engine spends nothing on it between scrapes."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline import __version__
from paceline.server.metric_names import ENGINE, LABELS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """The state of an engine at one moment."""

    running: int
    """Requests in the running batch."""
    waiting: int
    """Requests in the engine's queue."""
    kv_blocks_total: int
    kv_blocks_used: int
    """KV blocks held by running requests."""
    kv_blocks_cached: int
    """KV blocks of finished requests, kept for prefix hits and evicted when needed."""
    goodput: float
    """Tokens committed per second in the latest step; 0 when idle."""
    look_ahead: float
    """Draft tokens verified per request in the latest step; 0 when idle."""
    slot_price: float
    """What a draft token had to be worth to be verified in the latest step that looked ahead."""


class GaugeCollector(Collector):
    """Asks the engine for its state whenever it is scraped.

    Args:
        model_name: value of the label `model_name`.
        read: gives the state; called in the thread that renders.
    """

    def __init__(self, model_name: str, read: Callable[[], EngineGauges]) -> None:
        self._labels = (model_name, ENGINE)
        self._read = read
        self._build = {"version": __version__, "python": platform.python_version(), "torch": _installed("torch")}

    def collect(self) -> Iterator[Metric]:
        """The gauges; without those of the engine if it cannot be read, so that the counters still get out."""
        yield self._gauge("paceline:build_info", "Versions; always 1.", 1.0, **self._build)
        try:
            state = self._read()
        except Exception:
            logger.exception("the engine's gauges cannot be read")
            return
        total = state.kv_blocks_total
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", state.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting to be admitted.", state.waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc",
            "Share of the KV blocks in use; 1 is full.",
            state.kv_blocks_used / max(total, 1),
        )
        yield self._gauge("vllm:cache_config_info", "Size of the KV cache; always 1.", 1.0, num_gpu_blocks=str(total))
        blocks = GaugeMetricFamily("paceline:kv_cache_blocks", "KV blocks by state.", labels=(*LABELS, "state"))
        blocks.add_metric((*self._labels, "used"), state.kv_blocks_used)
        blocks.add_metric((*self._labels, "cached"), state.kv_blocks_cached)
        blocks.add_metric((*self._labels, "free"), total - state.kv_blocks_used - state.kv_blocks_cached)
        yield blocks
        yield self._gauge(
            "paceline:goodput_tokens_per_second", "Tokens committed per second in the latest step.", state.goodput
        )
        yield self._gauge(
            "paceline:look_ahead_tokens", "Draft tokens verified per request in the latest step.", state.look_ahead
        )
        yield self._gauge(
            "paceline:slot_price",
            "Survival of the last draft token that was worth verifying; 1 means that none is.",
            state.slot_price,
        )

    def _gauge(self, name: str, text: str, value: float, **more: str) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=(*LABELS, *more))
        gauge.add_metric((*self._labels, *more.values()), value)
        return gauge


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"

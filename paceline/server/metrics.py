"""Prometheus metrics of a server: counted as news arrive, exported by `/metrics`.

Two threads come here. The engine thread calls `on_news`; the event loop calls everything else. Prometheus counters have
locks of their own; the requests in progress and the counts of drafts are written by the engine thread alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from paceline.engine.request import Request
from paceline.engine.types import RequestOutput
from paceline.server.draft_counts import DraftCounts
from paceline.server.gauges import EngineGauges, GaugeCollector
from paceline.server.metric_names import FinishedMetrics, HttpMetrics, Maker, TokenMetrics

__all__ = ["CONTENT_TYPE", "EngineGauges", "Metrics"]

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The text format that every Prometheus reads."""


@dataclass(slots=True)
class _Progress:
    """What has been counted of a request so far."""

    last_token: float | None = None
    preemptions: int = 0
    drafted_by: dict[str, int] = field(default_factory=dict)


class Metrics:
    """All metrics of one engine.

    Inter-token latency is that of vLLM V1: the time between two successive outputs of a request, observed once per
    step and not divided by the tokens the step brought, since they reach the client together. The time per output
    token (`vllm:request_time_per_output_token_seconds`) is where speculation shows. Times count from the first
    admission, so a preemption lengthens prefill or decode and never the queue time.

    Args:
        model_name: the model as clients know it.
        gauges: reads the engine's state; called in the thread that renders.
        registry: where the metrics are registered; None makes one of its own, with the process's memory and CPU time.
        max_model_len: largest bucket of token counts, in tokens.
    """

    def __init__(
        self,
        model_name: str,
        gauges: Callable[[], EngineGauges],
        registry: CollectorRegistry | None = None,
        *,
        max_model_len: int = 131_072,
    ) -> None:
        if registry is None:
            registry = CollectorRegistry()
            ProcessCollector(registry=registry)
        self.registry = registry
        make = Maker(registry, model_name)
        self._tokens = TokenMetrics(make)
        self._drafts = DraftCounts(model_name)
        self._requests = FinishedMetrics(make, max_model_len)
        self._http = HttpMetrics(registry, model_name)
        registry.register(self._drafts)
        registry.register(GaugeCollector(model_name, gauges))
        self._open: dict[Request, _Progress] = {}
        self._complained = False

    def on_news(self, request: Request, news: RequestOutput) -> None:
        """Count one request's news. Called in the engine thread; costs microseconds and never raises."""
        try:
            progress = self._open.get(request)
            if progress is None:
                progress = self._open[request] = _Progress()
            if news.token_ids:
                self._count_tokens(request, len(news.token_ids), progress)
            if news.num_draft_tokens:
                self._drafts.add(news.num_draft_tokens, news.drafters)
                self._drafts.add_drafted_by(request.stats.drafted_by, progress.drafted_by)
            if request.stats.preemptions > progress.preemptions:
                self._tokens.preemptions.inc(request.stats.preemptions - progress.preemptions)
                progress.preemptions = request.stats.preemptions
            if news.finish_reason is not None:
                self._finish(request, news.finish_reason.value, time.perf_counter())
        except Exception:
            if not self._complained:  # once: a broken metric must not flood the log of a busy server
                logger.exception("a request could not be counted; later failures are not logged")
                self._complained = True
        finally:
            if news.finish_reason is not None:
                self._open.pop(request, None)

    def on_rejected(self, reason: str) -> None:
        """Count a request refused before the engine saw it.

        Args:
            reason: one of a few fixed words (`queue_full`, `invalid`, ...), never text from a client.
        """
        self._http.rejected[reason].inc()

    def on_http(self, route: str, status: int, seconds: float) -> None:
        """Count one HTTP response.

        Args:
            route: the route's template (`/v1/models/{model}`) or path; unknown paths are counted together.
            status: HTTP status code.
            seconds: from the request's arrival to the last byte of the response.
        """
        self._http.add(route, status, seconds)

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(_WithoutCreated(self.registry)), CONTENT_TYPE

    def _count_tokens(self, request: Request, count: int, progress: _Progress) -> None:
        tokens, stats = self._tokens, request.stats
        tokens.generated.inc(count)
        if progress.last_token is None:
            tokens.prompt.inc(request.prompt_len)
            if request.params.prompt_logprobs is None:  # such a request looks nothing up
                tokens.cache_queries.inc(request.prompt_len)
                tokens.cache_hits.inc(stats.cached_tokens)
            if stats.first_token is not None:
                tokens.first.observe(stats.first_token - stats.arrival)
        elif stats.last_token is not None:
            tokens.between.observe(stats.last_token - progress.last_token)
        progress.last_token = stats.last_token

    def _finish(self, request: Request, reason: str, now: float) -> None:
        """Count a request that has ended. One that was cancelled early has only the times it came to."""
        metrics, stats, params = self._requests, request.stats, request.params
        metrics.finished[reason].inc()
        metrics.prompt.observe(request.prompt_len)
        metrics.generated.observe(request.num_output)
        metrics.max_tokens.observe(params.max_tokens)
        if request.sample_index == 0:
            metrics.n.observe(params.n)
        if params.n == 1:
            metrics.longest.observe(request.num_output)
        if stats.target_forwards:
            metrics.accepted_length.observe(request.num_output / stats.target_forwards)
        metrics.total.observe(now - stats.arrival)
        metrics.queue.observe((now if stats.scheduled is None else stats.scheduled) - stats.arrival)
        if stats.scheduled is None or stats.first_token is None or stats.last_token is None:
            return
        metrics.prefill.observe(stats.first_token - stats.scheduled)
        metrics.decode.observe(stats.last_token - stats.first_token)
        metrics.inference.observe(stats.last_token - stats.scheduled)
        later = request.num_output - stats.first_count
        if later > 0:
            metrics.per_token.observe((stats.last_token - stats.first_token) / later)


class _WithoutCreated(Collector):
    """Leaves out the `_created` series: nobody reads them, and older `vllm bench serve` adds them to its counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

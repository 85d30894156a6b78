"""Every metric that is counted or timed: its name, its help text, its labels and its buckets.

`vllm:` names, labels and buckets are those of vLLM V1, so that its dashboards and `vllm bench serve` read them; what
vLLM has no name for is called `paceline:`. A counter is exported with `_total` behind its name. All carry the labels
`model_name` and `engine`. This module knows nothing of requests: `metrics.py` decides when something is counted,
`draft_counts.py` has the counters of speculation, and `gauges.py` what is read at scrape time.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from paceline.engine.request import FinishReason

ENGINE = "0"
"""Value of the label `engine`: a process runs one engine."""
LABELS = ("model_name", "engine")

TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PARAMS_N = (1, 2, 5, 10, 20)
ACCEPTED_LENGTH = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0)

NO_ROUTE = (401, 403, 404, 405)
"""Answers that do not tell whether a path exists."""
MAX_ROUTES = 64
"""Routes with series of their own."""


def token_buckets(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... tokens, up to `limit`."""
    decades = range(len(str(limit)))
    return tuple(bound for decade in decades for m in (1, 2, 5) if (bound := m * 10**decade) <= limit)


class Family(dict[str, Counter]):
    """The counters of one metric by the value of their last label, made on first use."""

    def __init__(self, parent: Counter, model_name: str) -> None:
        super().__init__()
        self._parent = parent
        self._model_name = model_name

    def __missing__(self, value: str) -> Counter:
        child = self[value] = self._parent.labels(self._model_name, ENGINE, value)
        return child


class Maker:
    """Makes metrics whose first labels are the model's name and the engine.

    Args:
        registry: where they are registered.
        model_name: the model as clients know it.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name

    def counter(self, name: str, text: str) -> Counter:
        """A counter without further labels."""
        return Counter(name, text, LABELS, registry=self._registry).labels(self._model_name, ENGINE)

    def family(self, name: str, text: str, label: str) -> Family:
        """Counters that differ in one more label."""
        return Family(Counter(name, text, (*LABELS, label), registry=self._registry), self._model_name)

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        """A histogram without further labels."""
        parent = Histogram(name, text, LABELS, registry=self._registry, buckets=buckets)
        return parent.labels(self._model_name, ENGINE)


class TokenMetrics:
    """Counted with every step's news."""

    def __init__(self, make: Maker) -> None:
        self.prompt = make.counter("vllm:prompt_tokens", "Prompt tokens of requests that got their first token.")
        self.generated = make.counter("vllm:generation_tokens", "Tokens generated.")
        self.cache_queries = make.counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache, in tokens."
        )
        self.cache_hits = make.counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache, in tokens.")
        self.preemptions = make.counter("vllm:num_preemptions", "Preemptions for want of KV memory.")
        self.first = make.histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token, in seconds.", TTFT_SECONDS
        )
        self.between = make.histogram(
            "vllm:inter_token_latency_seconds",
            "Between two successive outputs of a request, in seconds; one output may bring several tokens.",
            TOKEN_SECONDS,
        )


class FinishedMetrics:
    """Counted when a request ends.

    Args:
        make: makes the metrics.
        max_model_len: largest bucket of token counts.
    """

    def __init__(self, make: Maker, max_model_len: int) -> None:
        tokens = token_buckets(max_model_len)
        self.finished = make.family("vllm:request_success", "Requests that ended, by reason.", "finished_reason")
        for reason in FinishReason:  # exported from the start, so that rates see the first event
            self.finished[reason.value].inc(0)
        self.prompt = make.histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.generated = make.histogram("vllm:request_generation_tokens", "Tokens generated per sample.", tokens)
        self.longest = make.histogram(
            "vllm:request_max_num_generation_tokens", "Tokens generated per request with n = 1.", tokens
        )
        self.n = make.histogram("vllm:request_params_n", "Samples asked for per request.", PARAMS_N)
        self.max_tokens = make.histogram("vllm:request_params_max_tokens", "max_tokens asked for.", tokens)
        self.per_token = make.histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first commit of a request, in seconds.",
            TOKEN_SECONDS,
        )
        self.total = make.histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end, in seconds.", REQUEST_SECONDS
        )
        self.queue = make.histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first admission, in seconds.", REQUEST_SECONDS
        )
        self.inference = make.histogram(
            "vllm:request_inference_time_seconds", "First admission to the last token, in seconds.", REQUEST_SECONDS
        )
        self.prefill = make.histogram(
            "vllm:request_prefill_time_seconds", "First admission to the first token, in seconds.", REQUEST_SECONDS
        )
        self.decode = make.histogram(
            "vllm:request_decode_time_seconds", "First token to the last token, in seconds.", REQUEST_SECONDS
        )
        self.accepted_length = make.histogram(
            "paceline:request_mean_accepted_length", "Tokens per target forward of a request.", ACCEPTED_LENGTH
        )


class HttpMetrics:
    """Counted at the HTTP edge. Strangers choose paths, so only a bounded number of routes becomes a label."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._routes: set[str] = set()
        self.rejected = Maker(registry, model_name).family(
            "paceline:requests_rejected", "Requests refused before the engine saw them, by reason.", "reason"
        )
        self._requests = Counter(
            "paceline:http_requests", "HTTP responses.", (*LABELS, "route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "paceline:http_request_duration_seconds",
            "From the request's arrival to the last byte of the response, in seconds.",
            (*LABELS, "route"),
            registry=registry,
            buckets=HTTP_SECONDS,
        )

    def add(self, route: str, status: int, seconds: float) -> None:
        """Count one response.

        A route is one that was ever answered by something else than "who are you" or "no such thing"; the paths that
        scanners try are counted together as `other`.
        """
        if route not in self._routes:
            if status in NO_ROUTE or len(self._routes) >= MAX_ROUTES:
                route = "other"
            else:
                self._routes.add(route)
        self._requests.labels(self._model_name, ENGINE, route, str(status)).inc()
        self._seconds.labels(self._model_name, ENGINE, route).observe(seconds)

"""Metrics: what is counted when, under vLLM's names, as `vllm bench serve` reads it."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from paceline.config import SamplingParams
from paceline.engine.request import FinishReason, Request
from paceline.engine.types import RequestOutput
from paceline.server.draft_counts import MAX_POSITIONS
from paceline.server.metric_names import MAX_ROUTES, token_buckets
from paceline.server.metrics import EngineGauges, Metrics

GAUGES = EngineGauges(
    running=3,
    waiting=2,
    kv_blocks_total=100,
    kv_blocks_used=25,
    kv_blocks_cached=10,
    goodput=420.5,
    look_ahead=2.5,
    slot_price=0.375,
)
VLLM_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
VLLM_COUNTERS = (
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
)
VLLM_HISTOGRAMS = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
)


def make_metrics(model_name: str = "tiny") -> Metrics:
    return Metrics(model_name, lambda: GAUGES)


def make_request(**params: object) -> Request:
    """A request of 5 prompt tokens, of which 4 were cached; it was admitted 1 s after its arrival."""
    request = Request("r", [1, 2, 3, 4, 5], 5, SamplingParams(max_tokens=64, **params), seed=0)  # type: ignore[arg-type]
    request.stats.arrival = time.perf_counter() - 100.0
    request.stats.scheduled = request.stats.arrival + 1.0
    request.stats.cached_tokens = 4
    return request


def step(
    metrics: Metrics,
    request: Request,
    at: float,
    drafters: tuple[str | None, ...] = (None,),
    drafted: dict[str, int] | None = None,
    finish: FinishReason | None = None,
) -> None:
    """What commit does to a request `at` seconds after its arrival, and the news of it."""
    stats = request.stats
    stats.last_token = stats.arrival + at
    if stats.first_token is None:
        stats.first_token, stats.first_count = stats.last_token, len(drafters)
    stats.target_forwards += 1
    for name, count in (drafted or {}).items():
        stats.drafted_by[name] = stats.drafted_by.get(name, 0) + count
    tokens = tuple(7 for _ in drafters)
    request.token_ids.extend(tokens)
    request.finish_reason = finish
    news = RequestOutput(
        request.id,
        token_ids=tokens,
        drafters=drafters,
        finish_reason=finish,
        num_draft_tokens=sum((drafted or {}).values()),
    )
    metrics.on_news(request, news)


def samples(metrics: Metrics) -> dict[str, float]:
    """Exported values by name and labels, without `model_name` and `engine`, which must be there."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith(("vllm:", "paceline:")):
                assert labels.pop("model_name") == "tiny"
                assert labels.pop("engine") == "0"
            rest = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            found[f"{sample.name}{{{rest}}}" if rest else sample.name] = sample.value
    return found


def test_the_names_are_those_of_vllm() -> None:
    text = make_metrics().render()[0].decode()
    for name in (*VLLM_GAUGES, *VLLM_COUNTERS, *(f"{name}_bucket" for name in VLLM_HISTOGRAMS)):
        line = re.search(rf'^vllm:{name}{{.*engine="0".*}} ', text, re.MULTILINE)
        assert line is not None, name
        assert 'model_name="tiny"' in line[0]


def test_a_whole_request() -> None:
    metrics, request = make_metrics(), make_request()
    step(metrics, request, 3.0)
    step(metrics, request, 3.5, ("ngram", "ngram", None), {"ngram": 4})
    step(metrics, request, 4.5, ("recycling", None), {"ngram": 1, "recycling": 2}, FinishReason.STOP)
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total"] == 5
    assert found["vllm:prefix_cache_queries_total"] == 5
    assert found["vllm:prefix_cache_hits_total"] == 4
    assert found["vllm:generation_tokens_total"] == 6
    assert found["vllm:time_to_first_token_seconds_sum"] == pytest.approx(3.0)
    assert found["vllm:inter_token_latency_seconds_count"] == 2  # per output, not per token
    assert found["vllm:inter_token_latency_seconds_sum"] == pytest.approx(1.5)
    assert found["vllm:request_success_total{finished_reason=stop}"] == 1
    assert found["vllm:request_queue_time_seconds_sum"] == pytest.approx(1.0)
    assert found["vllm:request_prefill_time_seconds_sum"] == pytest.approx(2.0)
    assert found["vllm:request_decode_time_seconds_sum"] == pytest.approx(1.5)
    assert found["vllm:request_inference_time_seconds_sum"] == pytest.approx(3.5)
    assert found["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(1.5 / 5)
    assert found["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(100.0, abs=5.0)
    assert found["vllm:request_prompt_tokens_sum"] == 5
    assert found["vllm:request_generation_tokens_sum"] == 6
    assert found["vllm:request_max_num_generation_tokens_sum"] == 6
    assert found["vllm:request_params_max_tokens_sum"] == 64
    assert found["paceline:request_mean_accepted_length_sum"] == 2
    assert found["paceline:accepted_tokens_total{drafter=ngram}"] == 2
    assert found["paceline:accepted_tokens_total{drafter=recycling}"] == 1
    assert found["paceline:drafted_tokens_total{drafter=ngram}"] == 5
    assert found["paceline:drafted_tokens_total{drafter=recycling}"] == 2
    assert metrics._open == {}


def bench_summary(text: str) -> tuple[int, int, int, dict[int, int]]:
    """How `vllm bench serve` (vllm/benchmarks/serve.py, fetch_spec_decode_metrics) reads the page: line by line."""
    totals = {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0}
    per_position: dict[int, int] = {}
    for line in text.split("\n"):
        if line.startswith("vllm:spec_decode"):
            name, value = line.split("{")[0], int(float(line.split(None, 1)[-1]))
            if "num_accepted_tokens_per_pos" in name:
                found = re.search(r'position="(\d+)"', line)
                assert found is not None
                per_position[int(found[1])] = per_position.get(int(found[1]), 0) + value
            else:
                key = next(key for key in totals if key in name)
                totals[key] += value
    return totals["num_drafts"], totals["num_draft_tokens"], totals["num_accepted_tokens"], per_position


def test_vllm_bench_reads_the_speculation_summary() -> None:
    metrics, request = make_metrics(), make_request()
    before = bench_summary(metrics.render()[0].decode())
    assert before == (0, 0, 0, {0: 0})
    step(metrics, request, 1.0)  # no draft
    step(metrics, request, 2.0, ("a", "a", "b", None), {"a": 3, "b": 2})
    step(metrics, request, 3.0, (None,), {"a": 3})
    step(metrics, request, 4.0, ("a", None), {"a": 1})
    assert bench_summary(metrics.render()[0].decode()) == (3, 9, 4, {0: 2, 1: 1, 2: 1})


def test_positions_are_bounded() -> None:
    metrics, request = make_metrics(), make_request()
    deep = ("prediction",) * (MAX_POSITIONS + 5)
    step(metrics, request, 1.0, (*deep, None), {"prediction": len(deep)})
    _, drafted, accepted, positions = bench_summary(metrics.render()[0].decode())
    assert drafted == accepted == len(deep)
    assert positions == dict.fromkeys(range(MAX_POSITIONS), 1)


def test_a_preempted_request_keeps_its_times() -> None:
    metrics, request = make_metrics(), make_request()
    step(metrics, request, 2.0)
    request.stats.preemptions = 2
    step(metrics, request, 7.0)
    step(metrics, request, 8.0, finish=FinishReason.LENGTH)
    found = samples(metrics)
    assert found["vllm:num_preemptions_total"] == 2
    assert found["vllm:request_queue_time_seconds_sum"] == pytest.approx(1.0)
    assert found["vllm:request_decode_time_seconds_sum"] == pytest.approx(6.0)
    assert found["vllm:prompt_tokens_total"] == 5
    assert found["vllm:time_to_first_token_seconds_count"] == 1


def test_a_request_cancelled_in_the_queue() -> None:
    metrics, request = make_metrics(), make_request()
    request.stats.scheduled = None
    metrics.on_news(request, RequestOutput(request.id, finish_reason=FinishReason.ABORT))
    found = samples(metrics)
    assert found["vllm:request_success_total{finished_reason=abort}"] == 1
    assert found["vllm:request_queue_time_seconds_sum"] == pytest.approx(100.0, abs=5.0)
    for name in ("request_prefill_time", "request_decode_time", "request_inference_time", "time_to_first_token"):
        assert found[f"vllm:{name}_seconds_count"] == 0
    assert found["vllm:prompt_tokens_total"] == 0
    assert found["paceline:request_mean_accepted_length_count"] == 0


def test_a_single_step_has_no_time_per_token() -> None:
    metrics, request = make_metrics(), make_request()
    step(metrics, request, 2.0, ("prediction", None), {"prediction": 1}, FinishReason.STOP)
    found = samples(metrics)
    assert found["vllm:request_time_per_output_token_seconds_count"] == 0
    assert found["vllm:request_decode_time_seconds_sum"] == 0


def test_samples_of_one_prompt_count_n_once() -> None:
    metrics = make_metrics()
    for index in range(3):
        request = make_request(n=3)
        request.sample_index = index
        step(metrics, request, 2.0, finish=FinishReason.STOP)
    found = samples(metrics)
    assert found["vllm:request_params_n_count"] == 1
    assert found["vllm:request_params_n_sum"] == 3
    assert found["vllm:request_generation_tokens_count"] == 3


def test_prompt_logprobs_look_nothing_up() -> None:
    metrics = make_metrics()
    step(metrics, make_request(prompt_logprobs=1), 2.0)
    assert samples(metrics)["vllm:prefix_cache_queries_total"] == 0


def test_gauges_are_read_at_scrape_time() -> None:
    state = [GAUGES]
    metrics = Metrics("tiny", lambda: state[0])
    found = samples(metrics)
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["paceline:kv_cache_blocks{state=free}"] == 65
    assert found["paceline:goodput_tokens_per_second"] == 420.5
    assert (found["paceline:look_ahead_tokens"], found["paceline:slot_price"]) == (2.5, 0.375)
    assert found["vllm:cache_config_info{num_gpu_blocks=100}"] == 1
    state[0] = replace(GAUGES, running=9)
    assert samples(metrics)["vllm:num_requests_running"] == 9


def test_counters_get_out_when_the_gauges_fail(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> EngineGauges:
        raise RuntimeError("dead engine")

    metrics = Metrics("tiny", broken)
    found = samples(metrics)
    assert "vllm:num_requests_running" not in found
    assert found["vllm:generation_tokens_total"] == 0
    assert "cannot be read" in caplog.text


def test_counting_never_raises_and_complains_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics, request = make_metrics(), make_request()
    request.stats = None  # type: ignore[assignment]
    news = RequestOutput(request.id, token_ids=(1,), drafters=(None,), finish_reason=FinishReason.STOP)
    with caplog.at_level(logging.ERROR):
        metrics.on_news(request, news)
        metrics.on_news(request, news)
    assert len(caplog.records) == 1
    assert metrics._open == {}


def test_http_and_refusals() -> None:
    metrics = make_metrics()
    metrics.on_http("/v1/completions", 200, 0.3)
    metrics.on_http("/v1/completions", 503, 0.001)
    metrics.on_rejected("queue_full")
    found = samples(metrics)
    assert found["paceline:http_requests_total{route=/v1/completions,status=503}"] == 1
    assert found["paceline:http_request_duration_seconds_count{route=/v1/completions}"] == 2
    assert found["paceline:requests_rejected_total{reason=queue_full}"] == 1


def test_scanners_do_not_grow_the_page() -> None:
    metrics = make_metrics()
    for i in range(500):
        metrics.on_http(f"/wp-{i}", 404, 0.001)
        metrics.on_http(f"/admin-{i}", 413, 0.001)
    metrics.on_http("/v1/completions", 404, 0.001)
    found = [name for name in samples(metrics) if name.startswith("paceline:http_requests_total")]
    assert len(found) == MAX_ROUTES + 2  # and `other` with each of the two statuses


def test_the_page() -> None:
    body, content_type = make_metrics('we"ird\nname').render()
    assert content_type.startswith("text/plain; version=0.0.4")
    assert b'model_name="we\\"ird\\nname"' in body
    assert b"_created" not in body
    assert b"paceline:build_info{" in body
    assert b"process_resident_memory_bytes" in body


def test_several_apps_in_one_process() -> None:
    one, other = make_metrics(), make_metrics()
    step(one, make_request(), 1.0)
    assert samples(one)["vllm:generation_tokens_total"] == 1
    assert samples(other)["vllm:generation_tokens_total"] == 0
    registry = CollectorRegistry()
    assert Metrics("tiny", lambda: GAUGES, registry).registry is registry


def test_token_buckets() -> None:
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(4096)[-2:] == (1000, 2000)
    assert token_buckets(1) == (1,)


def test_news_cost_microseconds() -> None:
    """About 6 us on the machine this was written on; the bound leaves room for slow and busy ones."""
    metrics, request = make_metrics(), make_request()
    request.stats.first_token = request.stats.last_token = request.stats.arrival + 1.0
    news = RequestOutput(request.id, token_ids=(1,) * 5, drafters=("a",) * 4 + (None,), num_draft_tokens=8)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(500):
            metrics.on_news(request, news)
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 50e-6

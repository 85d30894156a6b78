"""An abort, an error or a lack of memory stays with its request; refusals are typed and name the field."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
from engine_tools import TOKEN_BYTES, greedy, llm, make_request, prompt_of, reference, run, text_of, words

from paceline import LLM, SamplingParams, errors
from paceline.engine import commit
from paceline.engine.detokenizer import Detokenizer
from paceline.engine.request import Request
from paceline.engine.types import RequestOutput
from paceline.verify import accept

PROMPTS = [prompt_of(n) for n in (5, 18, 33, 12)]
NEW = 16
SPECULATION = ["none", "recycling:k=20", "prediction:k=6+ngram:k=3"]
speculations = pytest.mark.parametrize("speculation", SPECULATION)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def some_requests() -> list[Request]:
    return [make_request(p, greedy(NEW), prediction_ids=reference(p, NEW)[:10]) for p in PROMPTS]


def assert_done(requests: list[Request], news: dict[str, list[RequestOutput]]) -> None:
    """These ended as if nothing had happened."""
    for request in requests:
        prompt = tuple(request.token_ids[: request.prompt_len])
        assert tuple(request.output_ids) == reference(prompt, NEW)
        assert text_of(news[request.id]) == words(reference(prompt, NEW))
        assert news[request.id][-1].finish_reason == "length"


def assert_failed(request: Request, news: dict[str, list[RequestOutput]], message: str) -> None:
    last = news[request.id][-1]
    assert last.finish_reason == request.finish_reason == "error"
    assert message in (last.error or "")
    assert request.blocks == []


@speculations
@pytest.mark.parametrize("after", [0, 1, 3])
def test_abort_frees_blocks_and_disturbs_nobody(speculation: str, after: int) -> None:
    engine = llm(speculation, max_num_batched_tokens=16).engine
    requests = some_requests()
    for request in requests:
        engine.add(request)
    news: dict[str, list[RequestOutput]] = {}
    for _ in range(after):
        for item in engine.step().outputs:
            news.setdefault(item.request_id, []).append(item)
    victim = requests[2]
    engine.abort(victim.id)
    assert victim.blocks == []
    held = {b for r in requests for b in r.blocks}
    assert engine.stages.scheduler.blocks.counts().used == len(held)
    for request_id, items in run(engine, requests, add=False).items():
        news.setdefault(request_id, []).extend(items)
    assert [item.finish_reason for item in news[victim.id]][-1] == "abort"
    assert_done([r for r in requests if r is not victim], news)


def test_abort_of_unknown_and_finished_requests_is_ignored() -> None:
    engine = llm().engine
    request = make_request(PROMPTS[0], greedy(2))
    news = run(engine, [request])
    engine.abort(request.id)
    engine.abort("nobody")
    assert not engine.has_work
    assert len([item for item in news[request.id] if item.finish_reason]) == 1
    run(engine, [again := make_request(PROMPTS[0], greedy(2), id=request.id)])
    assert again.output_ids == request.output_ids, "its id is free again"


def test_abort_all() -> None:
    engine = llm("recycling:k=20").engine
    requests = some_requests()
    for request in requests:
        engine.add(request)
    engine.step()
    engine.abort_all()
    news = engine.step().outputs
    assert sorted(n.request_id for n in news) == sorted(r.id for r in requests)
    assert all(n.finish_reason == "abort" for n in news)
    assert not engine.has_work


def test_an_id_is_taken_until_its_end_was_reported() -> None:
    """Otherwise the new request's caller would read the old one's end."""
    engine = llm().engine
    engine.add(make_request(PROMPTS[0], id="same"))
    engine.abort("same")
    with pytest.raises(errors.RequestError):
        engine.add(make_request(PROMPTS[0], id="same"))
    engine.step()
    engine.add(make_request(PROMPTS[0], greedy(1), id="same"))
    assert engine.step().outputs[0].finish_reason == "length"


@speculations
def test_a_law_that_raises(speculation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm(speculation).engine
    requests = some_requests()
    victim = requests[1]
    victim.params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, logit_bias={5: 0.0})
    original = accept.build_law

    def broken(row: Any, params: SamplingParams, prompt: Any, output: Any, *more: Any) -> Any:
        if params is victim.params and len(output) >= 4:
            raise ValueError("no law here")
        return original(row, params, prompt, output, *more)

    monkeypatch.setattr(accept, "build_law", broken)
    news = run(engine, requests)
    assert_failed(victim, news, "no law here")
    assert tuple(victim.output_ids) == reference(PROMPTS[1], NEW)[: victim.num_output]
    assert_done([r for r in requests if r is not victim], news)


@speculations
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_of_one_row(speculation: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm(speculation).engine
    requests = some_requests()
    victim = requests[0]
    victim.params = SamplingParams(max_tokens=NEW, temperature=temperature, ignore_eos=True)
    verify = engine.stages.verifier.verify
    steps = 0

    def broken(batch: Any, drafts: Any) -> Any:
        nonlocal steps
        steps += 1
        scores = verify(batch, drafts)
        if steps == 3:
            row = [item.request for item in batch.sampling].index(victim)
            logits = scores.logits.clone()
            logits[scores.first_row[row], 11] = float("nan")
            scores = dataclasses.replace(scores, logits=logits)
        return scores

    monkeypatch.setattr(engine.stages.verifier, "verify", broken)
    news = run(engine, requests)
    assert_failed(victim, news, "finite")
    assert_done(requests[1:], news)


@speculations
def test_a_detokenizer_that_raises(speculation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm(speculation).engine
    requests = some_requests()
    victim = requests[3]
    victim.params = greedy(NEW, stop=("marker",))

    class Broken(Detokenizer):
        def push(self, token: int, *, check_stop: bool = True) -> tuple[str, bool]:
            if self._stop and len(victim.output_ids) == 7:
                raise UnicodeError("no text here")
            return super().push(token, check_stop=check_stop)

    monkeypatch.setattr(commit, "Detokenizer", Broken)
    news = run(engine, requests)
    assert_failed(victim, news, "no text here")
    assert_done(requests[:3], news)
    assert_done([again := make_request(PROMPTS[0], greedy(NEW))], run(engine, [again]))


@pytest.mark.parametrize("method", ["propose", "observe"])
@pytest.mark.parametrize("broken_from", [0, 3])
def test_a_drafter_that_raises_is_left_out(method: str, broken_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm("ngram:k=3+recycling:k=20").engine
    drafting = engine.stages.drafting
    original = getattr(drafting.drafters["recycling"], method)
    calls = 0

    def broken(argument: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > broken_from:
            raise RuntimeError("this drafter is broken")
        return original(argument)

    monkeypatch.setattr(drafting.drafters["recycling"], method, broken)
    requests = some_requests()
    news = run(engine, requests)
    assert_done(requests, news)
    assert calls == broken_from + 1
    assert list(drafting.drafters) == ["ngram"]


@speculations
def test_a_failing_forward_fails_its_batch_and_the_engine_goes_on(
    speculation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm(speculation, max_num_seqs=3).engine
    forward = engine.runner.forward
    steps = 0

    def broken(batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise RuntimeError("out of memory")
        return forward(batch)

    monkeypatch.setattr(engine.runner, "forward", broken)
    requests = some_requests()
    news = run(engine, requests)
    for request in requests[:3]:
        assert_failed(request, news, "out of memory")
    assert_done(requests[3:], news)
    again = some_requests()
    assert_done(again, run(engine, again))


@pytest.mark.parametrize("stage", ["plan", "learn"])
def test_a_policy_that_raises_leaves_nobody_waiting(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request ends with news of its end, also those that finish in the very step that fails."""
    engine = llm("ngram:k=3").engine
    original = getattr(engine.stages.policy, stage)
    calls = 0

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("this policy is broken")
        return original(*arguments)

    monkeypatch.setattr(engine.stages.policy, stage, broken)
    requests = [make_request(p, greedy(4 + i)) for i, p in enumerate(PROMPTS)]  # the first ends in step 4
    news = run(engine, requests)
    assert all(news[r.id][-1].finish_reason in ("length", "error") for r in requests)
    if stage == "learn":  # the tokens were committed before: nothing is lost
        assert [tuple(r.output_ids) for r in requests] == [reference(p, 4 + i) for i, p in enumerate(PROMPTS)]


@speculations
def test_many_requests_in_a_tiny_cache(speculation: str) -> None:
    """Twelve blocks, forty requests of up to six blocks each: all finish, with the right text."""
    engine = llm(
        speculation,
        kv_cache_memory=12 * 8 * TOKEN_BYTES,
        block_size=8,
        max_model_len=88,
        max_num_batched_tokens=24,
        max_num_seqs=16,
    )
    assert engine.engine.stages.scheduler.blocks.num_blocks == 12
    prompts = [PROMPTS[i % 4] for i in range(40)]
    found = engine.generate(prompts, greedy(NEW))
    assert [g.token_ids for g in found] == [reference(p, NEW) for p in prompts]
    assert sum(g.stats.preemptions for g in found) > 0


def test_one_sequence_may_fill_the_whole_cache() -> None:
    engine = llm("recycling:k=20", kv_cache_memory=5 * 8 * TOKEN_BYTES, block_size=8, max_model_len=40)
    (found,) = engine.generate([PROMPTS[1]], greedy(40))
    assert (len(found.token_ids), found.finish_reason) == (40 - 18, "length")
    assert found.token_ids == reference(PROMPTS[1], 22)


def test_a_callback_that_raises_cancels_its_call() -> None:
    engine = llm("recycling:k=20")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, [greedy(2 + i) for i in range(4)], on_finished=stop)
    assert not engine.engine.has_work
    assert engine.engine.stages.scheduler.blocks.counts().used == 0


def test_a_stream_that_is_closed_cancels_its_request() -> None:
    engine = llm("recycling:k=20")
    stream = engine.stream(PROMPTS[0], greedy(NEW))
    next(stream)
    stream.close()
    assert engine.engine.stages.scheduler.blocks.counts().used == 0
    assert engine.generate([PROMPTS[1]], greedy(NEW))[0].token_ids == reference(PROMPTS[1], NEW)


def test_streams_and_calls_on_one_llm_do_not_steal_news() -> None:
    """Two open streams and a call between them: everyone gets all of their own text."""
    engine = llm("recycling:k=20")
    streams = [engine.stream(p, greedy(NEW)) for p in PROMPTS[:2]]
    chunks = [[next(s)] for s in streams]
    (found,) = engine.generate([PROMPTS[2]], greedy(NEW))
    assert found.token_ids == reference(PROMPTS[2], NEW)
    for stream, own, prompt in zip(streams, chunks, PROMPTS, strict=False):
        own.extend(stream)
        assert tuple(t for c in own for t in c.token_ids) == reference(prompt, NEW)
        assert own[-1].generation is not None


def test_salts_do_not_share_a_prefix() -> None:
    engine = llm("recycling:k=20")

    def cached(salt: str) -> int:
        (found,) = engine.generate([PROMPTS[2]], greedy(4), cache_salt=salt)
        assert found.token_ids == reference(PROMPTS[2], 4)
        return found.stats.cached_tokens

    assert [cached("a"), cached("a"), cached("b"), cached(""), cached("b")] == [0, 32, 0, 0, 32]


def test_n_samples_compute_their_prompt_once() -> None:
    engine: LLM = llm("recycling:k=20", max_num_batched_tokens=16)
    (found,) = engine.generate([PROMPTS[2]], SamplingParams(n=4, seed=3, max_tokens=8, ignore_eos=True))
    assert [o.stats.cached_tokens for o in found.outputs] == [0, 32, 32, 32]
    assert len({o.token_ids for o in found.outputs}) == 4
    assert [o.index for o in found.outputs] == [0, 1, 2, 3]


def test_a_page_is_written_before_it_is_read() -> None:
    """A cache full of NaN (what another request may have left) changes nothing."""
    engine = llm("recycling:k=20", max_num_batched_tokens=16).engine
    engine.runner.kv._data.fill_(float("nan"))
    requests = some_requests()
    assert_done(requests, run(engine, requests))

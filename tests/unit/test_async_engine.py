"""The engine behind an event loop: concurrent requests, cancellation, refusals, and the death of its thread."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from engine_tools import greedy, llm, make_request, prompt_of, reference, words

from paceline import errors
from paceline.engine.async_engine import AsyncEngine
from paceline.engine.engine import Engine
from paceline.engine.request import Request

PROMPTS = [prompt_of(n) for n in (5, 18, 33, 12)]
NEW = 16
LIMIT = 20.0
"""Seconds after which a test counts as hanging."""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def serve(
    body: Callable[[AsyncEngine], Coroutine[Any, Any, None]], engine: Engine | None = None, **options: Any
) -> Engine:
    """Run a coroutine against an engine of its own, and check afterwards that no block is held."""
    made = engine or llm("recycling:k=20", **options).engine
    served = AsyncEngine(made)

    async def limited() -> None:
        await asyncio.wait_for(body(served), LIMIT)

    try:
        asyncio.run(limited())
    finally:
        served.shutdown()
    assert not served.is_alive
    assert served.num_open == 0
    assert not [t for t in threading.enumerate() if t is served._thread], "the thread has ended"
    return made


async def text_of(served: AsyncEngine, request: Request) -> str:
    pieces = [item.text async for item in served.generate(request)]
    assert request.finish_reason == "length"
    return "".join(pieces)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_concurrent_requests_get_their_own_text() -> None:
    async def body(served: AsyncEngine) -> None:
        requests = [make_request(PROMPTS[i % 4], greedy(NEW)) for i in range(12)]
        texts = await asyncio.gather(*(text_of(served, r) for r in requests))
        assert list(texts) == [words(reference(PROMPTS[i % 4], NEW)) for i in range(12)]
        assert served.num_open == 0
        assert await text_of(served, make_request(PROMPTS[0], greedy(NEW))) == texts[0], "it serves on after a pause"

    serve(body)


def slowly(engine: Engine, monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    """Steps wait for the gate once somebody has tokens, so that requests stay open as long as a test wants."""
    forward = engine.runner.forward

    def gated(batch: Any) -> Any:
        assert gate.wait(LIMIT)
        return forward(batch)

    monkeypatch.setattr(engine.runner, "forward", gated)


def test_leaving_early_cancels_and_frees_blocks() -> None:
    engine = llm("recycling:k=20").engine

    async def body(served: AsyncEngine) -> None:
        others = [asyncio.create_task(text_of(served, make_request(p, greedy(NEW)))) for p in PROMPTS[:2]]
        left = make_request(PROMPTS[2], greedy(400))
        stream = served.generate(left)
        async for _ in stream:
            break
        await stream.aclose()
        await until(lambda: left.finished)
        assert left.finish_reason == "abort"
        assert left.num_output < 400
        assert left.blocks == []
        assert [await t for t in others] == [words(reference(p, NEW)) for p in PROMPTS[:2]]
        await until(lambda: not engine.has_work)
        assert engine.stages.scheduler.blocks.counts().used == 0

    serve(body, engine)


def test_a_cancelled_task_cancels_its_request() -> None:
    engine = llm("none").engine

    async def body(served: AsyncEngine) -> None:
        request = make_request(PROMPTS[0], greedy(400))
        task = asyncio.create_task(text_of(served, request))
        await until(lambda: request.num_output > 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: served.num_open == 0 and not engine.has_work)
        assert request.finish_reason == "abort"
        assert engine.stages.scheduler.blocks.counts().used == 0

    serve(body, engine)


def test_abort_by_id_ends_the_stream() -> None:
    async def body(served: AsyncEngine) -> None:
        request = make_request(PROMPTS[0], greedy(400))
        reasons = []
        async for item in served.generate(request):
            reasons.append(item.finish_reason)
            served.abort(request.id)
        assert reasons[-1] == "abort"
        served.abort("nobody")
        assert await text_of(served, make_request(PROMPTS[1], greedy(NEW)))

    serve(body)


def test_a_refused_request_raises_and_disturbs_nobody() -> None:
    async def body(served: AsyncEngine) -> None:
        good = asyncio.create_task(text_of(served, make_request(PROMPTS[0], greedy(NEW), id="good")))
        refused = [
            (make_request([3] * 600), errors.PromptTooLongError),
            (make_request([]), errors.RequestError),
            (make_request([3, 200]), errors.RequestError),
        ]
        for request, kind in refused:
            with pytest.raises(kind):
                await text_of(served, request)
        assert await good == words(reference(PROMPTS[0], NEW))

    serve(body)


def test_a_second_request_of_the_same_id_leaves_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm("none").engine
    gate = threading.Event()
    gate.set()
    slowly(engine, monkeypatch, gate)

    async def body(served: AsyncEngine) -> None:
        first = make_request(PROMPTS[0], greedy(NEW), id="same")
        task = asyncio.create_task(text_of(served, first))
        await until(lambda: first.num_output > 0 or served.num_open > 0)
        gate.clear()
        second = asyncio.create_task(text_of(served, make_request(PROMPTS[1], greedy(NEW), id="same")))
        await asyncio.sleep(0.02)
        gate.set()
        with pytest.raises(errors.RequestError, match="same"):
            await second
        assert await task == words(reference(PROMPTS[0], NEW))

    serve(body, engine)


def test_a_request_that_cannot_even_be_looked_at_is_refused() -> None:
    """A broken request (here: no params at all) must not take the thread, and so all others, down."""

    async def body(served: AsyncEngine) -> None:
        good = asyncio.create_task(text_of(served, make_request(PROMPTS[0], greedy(NEW))))
        broken = make_request(PROMPTS[1])
        broken.params = None  # type: ignore[assignment]
        with pytest.raises(errors.RequestError):
            await text_of(served, broken)
        assert await good == words(reference(PROMPTS[0], NEW))
        assert served.is_alive

    serve(body)


def test_a_failing_forward_ends_its_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm("none").engine
    forward = engine.runner.forward
    monkeypatch.setattr(engine.runner, "forward", lambda _: 1 / 0)

    async def body(served: AsyncEngine) -> None:
        request = make_request(PROMPTS[0], greedy(NEW))
        items = [item async for item in served.generate(request)]
        assert [item.finish_reason for item in items] == ["error"]
        monkeypatch.setattr(engine.runner, "forward", forward)
        assert await text_of(served, make_request(PROMPTS[0], greedy(NEW))) == words(reference(PROMPTS[0], NEW))

    serve(body, engine)


def test_the_death_of_the_thread_reaches_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm("none").engine
    step = engine.step
    count = 0

    def dying() -> Any:
        nonlocal count
        count += 1
        if count == 4:
            engine.abort_all()  # so that the blocks are accounted for
            raise MemoryError("the engine loop itself fails")
        return step()

    monkeypatch.setattr(engine, "step", dying)

    async def body(served: AsyncEngine) -> None:
        tasks = [asyncio.create_task(text_of(served, make_request(p, greedy(NEW)))) for p in PROMPTS]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, errors.EngineDeadError)
        assert not served.is_alive
        with pytest.raises(errors.EngineDeadError):
            await text_of(served, make_request(PROMPTS[0], greedy(NEW)))
        served.abort("nobody")

    serve(body, engine)


def test_shutdown_ends_open_requests() -> None:
    engine = llm("none").engine

    async def body(served: AsyncEngine) -> None:
        request = make_request(PROMPTS[0], greedy(400))
        reasons = []
        async for item in served.generate(request):
            reasons.append(item.finish_reason)
            if len(reasons) == 2:
                await asyncio.to_thread(served.shutdown)
        assert reasons[-1] == "abort"
        with pytest.raises(errors.EngineDeadError):
            await text_of(served, make_request(PROMPTS[0]))

    serve(body, engine)
    assert engine.stages.scheduler.blocks.counts().used == 0


def test_a_request_that_arrives_while_the_thread_ends_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes the check that the engine lives, and reaches the inbox when nobody reads it any more."""

    async def body(served: AsyncEngine) -> None:
        class Late(queue.SimpleQueue):  # type: ignore[type-arg]
            def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
                served.shutdown()
                super().put(item, *args, **kwargs)

        monkeypatch.setattr(served, "_inbox", Late())
        with pytest.raises(errors.EngineDeadError):
            await asyncio.wait_for(text_of(served, make_request(PROMPTS[0], greedy(2))), 3.0)

    serve(body)


def test_a_loop_that_is_gone_does_not_stop_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests run to their end unheard; a new loop is served."""
    engine = llm("none").engine
    gate = threading.Event()
    slowly(engine, monkeypatch, gate)
    served = AsyncEngine(engine)
    orphan, second = make_request(PROMPTS[0], greedy(NEW)), make_request(PROMPTS[1], greedy(NEW))

    async def leave() -> None:
        stream = served.generate(orphan)
        first = asyncio.ensure_future(anext(stream))
        await until(lambda: served.num_open == 1)
        monkeypatch.setattr(served, "_abort", lambda _: None)
        first.cancel()

    async def stay() -> None:
        gate.set()
        assert await text_of(served, second) == words(reference(PROMPTS[1], NEW))

    try:
        asyncio.run(leave())
        asyncio.run(stay())
        assert tuple(orphan.output_ids) == reference(PROMPTS[0], NEW)
    finally:
        served.shutdown()

"""PipeInfer (2407.11798): runs in flight along a pipeline, against synchronous speculation on the same one.

Times are measured ones (SmolLM2-135M in 4 bits and its draft, one core of an AMD EPYC), as they are and with a target
three times as large. A pipeline of P stages divides a forward's time by P for each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from paceline.bench.systems.base import Row, above, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.lane_drafters import every_drafter
from paceline.bench.systems.lanes import RealText, acceptance, identity, params_at, traces
from paceline.lanes.choice import LaneTimes
from paceline.lanes.clock import Clock
from paceline.lanes.pipeinfer import PipeInfer
from paceline.lanes.plain import plain, speculation
from paceline.lanes.tokens import Text
from paceline.lanes.traces import Trace, made

MEASURED = LaneTimes({1: 10.8, 4: 16.7, 8: 29.4, 12: 42.7}, 5.9)
"""Milliseconds."""
LARGER = LaneTimes({n: 3.0 * t for n, t in MEASURED.target.items()}, MEASURED.draft)
FLAT = LaneTimes({1: 50.0, 16: 50.0}, 1.0)
"""A forward whose time does not depend on its size, and a draft 50 times as fast."""
STAGES = (1, 4, 8)
LENGTHS = (1, 2, 3, 4, 6, 8)
_BATCH = 1
"""Tokens of a run, where a forward's time grows with its tokens."""


def stages_of(count: int) -> tuple[str, ...]:
    """The lanes of a pipeline."""
    return tuple(f"stage {i}" for i in range(count))


def clock(times: LaneTimes, stages: int, **options: float) -> Clock:
    """A pipeline of that many stages, and the draft."""
    lanes = {name: lambda n: times.forward(n) / stages for name in stages_of(stages)}
    return Clock({"draft": lambda n: n * times.draft, **lanes}, **options)  # type: ignore[arg-type]


def _write(text: Text, stages: int, **options: float) -> None:
    at = clock(LARGER, stages, **options)
    PipeInfer(at, text, stages_of(stages), batch=2).start()
    at.run()


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield identity(context, "PipeInfer on 4 stages", context.draft_llm, lambda text: _write(text, 4, jitter=0.5))
    yield from every_drafter(context, "PipeInfer", lambda text: _write(text, 4, jitter=0.5))


def _any_time(context: Context) -> Iterator[Row]:
    """The text for any number of stages and any jitter."""
    prompts, tokens = context.prompts(context.few(3, 1)), context.few(40, 16)
    same = runs = 0
    for temperature in (0.0, 1.0):
        params = params_at(temperature, tokens)
        wanted = [tuple(g.token_ids) for g in context.llm().generate(prompts, params)]
        for prompt, output in zip(prompts, wanted, strict=True):
            real = RealText(context, context.draft_llm, prompt, params).remember()
            for number, jitter in enumerate((0.0, 0.2, 1.0, 5.0)):
                for stages in STAGES:
                    text = real.text()
                    _write(text, stages, jitter=jitter, seed=number)
                    same += text.path == output
                    runs += 1
            real.close()
    note = f"{len(prompts)} prompts, {tokens} tokens at temperature 0 and 1, {STAGES} stages, jitter up to 500%"
    yield exactly("runs with the engine's own text", same, runs, note)


def _seconds(found: Sequence[Trace], times: LaneTimes, stages: int, start: Callable[[Clock, Text], None]) -> float:
    total = 0.0
    for trace in found:
        at, text = clock(times, stages), trace.text(reads_prompt=True)
        start(at, text)
        at.run()
        total += text.times[-1] - text.times[0]
    return total


def over_speculation(found: Sequence[Trace], times: LaneTimes, stages: int, batch: int) -> tuple[float, float]:
    """PipeInfer over the best of synchronous speculation and none, with cancellation and without."""
    names = stages_of(stages)
    waiting: list[Callable[[Clock, Text], None]] = [lambda at, text: at.spawn(plain(at, text, names))]
    waiting += [
        partial(lambda at, text, length: at.spawn(speculation(at, text, length, stages=names)), length=length)
        for length in LENGTHS
    ]
    best = min(_seconds(found, times, stages, start) for start in waiting)
    with_, without = (
        _seconds(found, times, stages, lambda at, t, c=cancel: PipeInfer(at, t, names, batch=batch, cancel=c).start())  # type: ignore[misc]
        for cancel in (True, False)
    )
    return best / with_, best / without


def _faster(context: Context) -> Iterator[Row]:
    """Tokens per second against synchronous speculation."""
    groups = {f"{a}": [made(a, context.few(200, 60), seed, prompt=30) for seed in range(4)] for a in (0.3, 0.8)}
    real = traces(context, 0)
    for name, times in (("measured times", MEASURED), ("a target three times as large", LARGER)):
        for group, found in groups.items():
            ratios = {stages: over_speculation(found, times, stages, _BATCH) for stages in STAGES[1:]}
            listed = ", ".join(f"{a:.3f} on {p} stages" for p, (a, _) in ratios.items())
            note = f"traces made from a law; {listed}; speculation at its best length of {LENGTHS}, or none"
            yield above(
                f"{name}, acceptance {group}: PipeInfer over speculation", min(r[0] for r in ratios.values()), 1.0, note
            )
        ratio, _ = over_speculation(real, times, 4, _BATCH)
        note = f"{len(real)} texts, acceptance {acceptance(real):.2f}, 4 stages"
        yield above(f"{name}, real traces: PipeInfer over speculation", ratio, 1.0, note)
    fast = LaneTimes(LARGER.target, MEASURED.draft / 3)
    for group, found in groups.items():
        with_, without = over_speculation(found, fast, 4, 2)
        note = f"4 stages, draft of {fast.draft:.1f} ms; over speculation {with_:.3f} with and {without:.3f} without"
        yield above(f"acceptance {group}: cancellation over none", with_ / without, 1.0, note)
    losing = [over_speculation(found, FLAT, 4, 4)[0] for found in groups.values()]
    note = "a forward costs the same for one token and for nine, and drafts are nearly free: "
    note += f"{losing[0]:.3f} at 0.3, {losing[1]:.3f} at 0.8"
    yield Row("for the record: flat forwards, draft 50 times as fast", min(losing), "-", None, note)


def _first_token(context: Context) -> Iterator[Row]:
    """Time to the first token."""
    real, names, late = traces(context, 0), stages_of(4), 0.0
    for trace in real:
        ends = []
        for start in (
            lambda at, text: at.spawn(plain(at, text, names)),
            lambda at, text: PipeInfer(at, text, names).start(),
        ):
            at, text = clock(LARGER, 4), trace.text(reads_prompt=True)
            start(at, text)
            at.run()
            ends.append(text.times[0])
        late = max(late, ends[1] / ends[0])
    yield exactly("first token, time over that without speculation", late, 1.0, f"worst of {len(real)} prompts")


run = suite(_identity, _any_time, _faster, _first_token)

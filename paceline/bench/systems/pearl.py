"""PEARL (2408.11850): draft and target at the same time; real traces on an event clock, at several speeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from paceline.bench.systems.base import Row, above, at_least, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.lane_drafters import every_drafter
from paceline.bench.systems.lanes import (
    RealText,
    Schedule,
    acceptance,
    identity,
    params_at,
    seconds,
    traces,
)
from paceline.lanes.clock import Clock
from paceline.lanes.pearl import Pearl
from paceline.lanes.plain import plain, speculation
from paceline.lanes.tokens import Text
from paceline.lanes.traces import Trace, made

RATIOS = (2, 3, 4, 5)
"""Draft tokens that take as long as a target forward."""
_MOST_DROPPED = 3
_RIGHT = 0.8


def clock(ratio: float, **options: float) -> Clock:
    """A target forward takes 1, whatever its size; a draft token that part of it."""
    return Clock({"draft": lambda n: n / ratio, "target": lambda _: 1.0}, **options)  # type: ignore[arg-type]


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield identity(context, "PEARL", context.draft_llm, lambda text: _write(text, Pearl(4)))
    yield from every_drafter(context, "PEARL", lambda text: _write(text, Pearl(4)))


def _write(text: Text, schedule: Pearl, jitter: float = 0.3, seed: int = 0) -> None:
    at = clock(4, jitter=jitter, seed=seed)
    at.spawn(schedule.run(at, text))
    at.run()


def _any_time(context: Context) -> Iterator[Row]:
    """Texts at temperature 1 for any length and jitter."""
    tokens = context.few(48, 16)
    prompts = context.prompts(context.few(3, 2))
    params = params_at(1.0, tokens)
    wanted = [tuple(g.token_ids) for g in context.llm().generate(prompts, params)]
    same = runs = 0
    for prompt, output in zip(prompts, wanted, strict=True):
        real = RealText(context, context.draft_llm, prompt, params).remember()
        for seed, schedule in enumerate((Pearl(1), Pearl(3), Pearl(6), Pearl(4, pre=False), Pearl(4, post=False)) * 2):
            text = real.text()
            _write(text, schedule, jitter=float(seed % 3), seed=seed)
            same += text.path == output
            runs += 1
        real.close()
    note = f"{len(prompts)} prompts, {tokens} tokens at temperature 1, lengths 1 to 6, jitter up to 200%"
    yield exactly("E0 at temperature 1: runs with the engine's own text", same, runs, note)


def right_traces(context: Context) -> tuple[list[Trace], str]:
    """Real traces of a draft that is right at least 8 times of 10: the worst one that is, and what it is."""
    found: list[tuple[float, int]] = []
    for layers in range(1, _MOST_DROPPED + 1):
        found.append((acceptance(traces(context, layers)), layers))
        if found[-1][0] < _RIGHT:
            break
    rate, layers = min([item for item in found if item[0] >= _RIGHT] or [max(found)])
    return traces(context, layers), f"draft: the target without {layers} of its layers, acceptance {rate:.2f}"


def _schedules(length: int) -> dict[str, Schedule]:
    return {
        "speculation": partial(speculation, length=length),
        "pre only": lambda at, text: Pearl(length, post=False).run(at, text),
        "post only": lambda at, text: Pearl(length, pre=False).run(at, text),
        "PEARL": lambda at, text: Pearl(length).run(at, text),
    }


def _makespan(found: Sequence[Trace], ratio: int, schedule: Schedule) -> float:
    return seconds([trace.text() for trace in found], lambda: clock(ratio), schedule)


def _best_speculation(found: Sequence[Trace], ratio: int) -> tuple[float, int]:
    """Of all lengths, in hindsight."""
    return min((_makespan(found, ratio, partial(speculation, length=n)), n) for n in range(1, 13))


def _clocked(context: Context) -> Iterator[Row]:
    """Makespans on the clock, with the ablations."""
    real, about = right_traces(context)
    yield at_least("acceptance of the traces below", acceptance(real), _RIGHT, about)
    tables = {r: {name: _makespan(real, r, s) for name, s in _schedules(r).items()} for r in RATIOS}
    gains = {r: t["speculation"] / t["PEARL"] for r, t in tables.items()}
    worst = min(gains, key=lambda r: gains[r])
    listed = ", ".join(f"{gain:.3f} at {r}" for r, gain in gains.items())
    note = f"{len(real)} real texts; {about}; length = speed ratio: {listed}"
    yield at_least("PEARL over speculation of the same length", gains[worst], 1.2, note)
    best = {r: _best_speculation(real, r) for r in RATIOS}
    over = {r: best[r][0] / tables[r]["PEARL"] for r in RATIOS}
    listed = ", ".join(f"{over[r]:.3f} at {r} (length {best[r][1]})" for r in RATIOS)
    yield at_least("PEARL over speculation of the best length", min(over.values()), 1.2, f"in hindsight: {listed}")
    between = sum(
        t["PEARL"] < t[name] < t["speculation"] for t in tables.values() for name in ("pre only", "post only")
    )
    listed = "; ".join(
        f"at {r}: " + ", ".join(f"{name} {t['speculation'] / t[name]:.3f}" for name in ("pre only", "post only"))
        for r, t in tables.items()
    )
    yield exactly("ablations between speculation and PEARL", between, 2 * len(RATIOS), f"over speculation, {listed}")
    yield from _longer(real)
    far = {r: _best_speculation(real, r)[0] / _makespan(real, r, _schedules(r)["PEARL"]) for r in (8, 12)}
    listed = ", ".join(f"{gain:.3f} at {r}" for r, gain in far.items())
    note = f"so long a draft seldom survives whole; over speculation of the best length: {listed}"
    yield Row("for the record: PEARL with faster drafts", min(far.values()), "-", None, note)


def _longer(real: Sequence[Trace]) -> Iterator[Row]:
    """Runs of accepted tokens longer than a draft."""
    longest = {}
    for name, schedule in _schedules(4).items():
        texts = [trace.text() for trace in real]
        seconds(texts, lambda: clock(4), schedule)
        longest[name] = max(max(text.streaks) for text in texts)
    note = f"speculation: {longest['speculation']}, which is its length"
    yield above("longest run of accepted tokens, length 4", longest["PEARL"], 4, note)


def _controls(context: Context) -> Iterator[Row]:
    """Where it must not win."""
    real = traces(context, 0)
    shared = seconds(
        [trace.text() for trace in real],
        lambda: Clock({"draft": lambda n: 2.0 * n / 4, "target": lambda _: 2.0}),
        lambda at, text: Pearl(4).run(at, text),
    )
    alone = min(_best_speculation(real, 4)[0], _makespan(real, 4, plain))
    note = f"the context's draft, acceptance {acceptance(real):.2f}; both take twice as long beside each other"
    yield above("control: on one machine for both, PEARL takes longer", shared / alone, 1.0, note)
    never = [made(0.02, 200, seed) for seed in range(3)]
    ratio = _makespan(never, 4, plain) / _makespan(never, 4, _schedules(4)["PEARL"])
    note = "made from a law; a draft that is nearly never right costs nothing but the lane"
    yield Row("control: acceptance 0.02, PEARL over no look-ahead", ratio, "0.98 to 1.05", 0.98 <= ratio <= 1.05, note)


run = suite(_identity, _any_time, _clocked, _controls)

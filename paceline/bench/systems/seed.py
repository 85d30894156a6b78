"""SEED (2406.18200): thoughts drafted side by side, one target, first come first served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from paceline.bench.systems.base import Row, above, at_most, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.lane_drafters import every_drafter
from paceline.bench.systems.lanes import RealText, identity, params_at, traces
from paceline.lanes.clock import Clock
from paceline.lanes.plain import TARGET, batched, serial
from paceline.lanes.seed import lane_of, seed
from paceline.lanes.tokens import Text
from paceline.lanes.traces import Trace

THOUGHTS = 3
LENGTH = 4
"""Draft tokens a round, which take as long as a target forward."""


def clock(thoughts: int = THOUGHTS, **options: object) -> Clock:
    """A target forward takes 1 for one thought, drafting a round as long; each thought has a draft lane."""
    lanes = {lane_of(i): lambda n: n / LENGTH for i in range(thoughts)}
    return Clock({**lanes, TARGET: lambda _: 1.0}, **options)  # type: ignore[arg-type]


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""

    def write(text: Text) -> None:
        at = clock(1, jitter=0.3)
        seed(at, [text], LENGTH)
        at.run()

    yield identity(context, "SEED", context.draft_llm, write)
    yield from every_drafter(context, "SEED", write)


def _alone(context: Context) -> Iterator[Row]:
    """Each thought equals what it yields alone."""
    prompts, tokens = context.prompts(context.few(3, 1)), context.few(40, 16)
    same = runs = 0
    for prompt in prompts:
        options = [replace(params_at(1.0, tokens), seed=7 + number) for number in range(THOUGHTS)]
        wanted = [tuple(g.token_ids) for g in context.llm().generate([prompt] * THOUGHTS, options)]
        thoughts = [RealText(context, context.draft_llm, prompt, params).remember() for params in options]
        for number, order in enumerate(((0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0))):
            for newest_first in ((), (TARGET,)):
                at = clock(jitter=float(number), seed=number, newest_first=newest_first)
                texts = [thoughts[i].text() for i in order]
                seed(at, texts, LENGTH)
                at.run()
                same += sum(text.path == wanted[i] for text, i in zip(texts, order, strict=True))
                runs += THOUGHTS
        for thought in thoughts:
            thought.close()
    note = f"{len(prompts)} prompts, {THOUGHTS} seeds, {tokens} tokens at temperature 1; "
    note += "4 orders, jitter up to 300%, both queues"
    yield exactly("thoughts equal to what the engine says alone", same, runs, note)


def _states(context: Context) -> list[Sequence[Trace]]:
    """Recorded texts, three at a time: the thoughts of a tree state."""
    found = traces(context, 0)
    return [found[i : i + THOUGHTS] for i in range(0, len(found) - THOUGHTS + 1, THOUGHTS)]


def _makespan(context: Context) -> Iterator[Row]:
    """Makespan and idle time against serial speculation."""
    ours = theirs = together = idle = serial_idle = 0.0
    states = _states(context)
    for state in states:
        at = clock()
        seed(at, [trace.text() for trace in state], LENGTH)
        end = at.run()
        ours, idle = ours + end, idle + at.idle(TARGET, end) * end
        for schedule in (serial, batched):
            at = Clock({"draft": lambda n: n / LENGTH, TARGET: lambda _: 1.0})
            at.spawn(schedule(at, [trace.text() for trace in state], LENGTH))
            end = at.run()
            if schedule is serial:
                theirs, serial_idle = theirs + end, serial_idle + at.idle(TARGET, end) * end
            else:
                together += end
    note = f"{len(states)} states of {THOUGHTS} thoughts, real traces; drafting and verifying take the same time"
    yield at_most("makespan over serial speculation", ours / theirs, 0.8, note)
    yield at_most(
        "target's idle share over that of serial",
        (idle / ours) / (serial_idle / theirs),
        0.999,
        f"{idle / ours:.3f} against {serial_idle / theirs:.3f}",
    )
    note = (
        "where one forward over three thoughts takes no longer than over one, the engine's own batch needs no lanes; "
        f"over serial {together / theirs:.3f}"
    )
    yield above("control: makespan over one batch of all thoughts", ours / together, 1.0, note)


def _waiting(context: Context) -> Iterator[Row]:
    """First come, first served never starves."""
    waits = {}
    for newest_first in ((), (TARGET,)):
        longest = 0.0
        for number, state in enumerate(_states(context)):
            at = clock(jitter=0.2, seed=number, newest_first=newest_first)
            seed(at, [trace.text() for trace in state], LENGTH)
            at.run()
            longest = max(longest, at.lanes[TARGET].longest_wait)
        waits[newest_first] = longest
    bound = THOUGHTS * 1.2  # a round with all of its jitter
    yield at_most("longest wait for the target, in forwards", waits[()], bound, f"{THOUGHTS} rounds, jitter up to 20%")
    yield above(
        "control: newest first waits longer", waits[TARGET,], bound, "the thought that came first waits for all others"
    )


run = suite(_identity, _alone, _makespan, _waiting)

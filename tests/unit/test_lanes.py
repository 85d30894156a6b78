"""Lanes: the clock, and schedules that write the plain text whatever comes first and whoever dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from paceline.engine.rng import Noise
from paceline.errors import InputError, LaneDiedError
from paceline.lanes.clock import Clock
from paceline.lanes.pearl import Pearl
from paceline.lanes.pipeinfer import Cutoff, PipeInfer
from paceline.lanes.plain import batched, plain, serial, speculation
from paceline.lanes.seed import lane_of, seed
from paceline.lanes.tokens import Guess, Path, Text
from paceline.lanes.traces import Trace, made
from paceline.lanes.work import Job, Process
from paceline.verify.rejection import RejectionRule

STAGES = ("stage 0", "stage 1", "stage 2", "stage 3")


def clock(draft: float = 1.0, target: float = 4.0, stages: Sequence[str] = ("target",), **options: object) -> Clock:
    lanes = {"draft": lambda n: draft * n} | {s: lambda _: target / len(stages) for s in stages}
    return Clock(lanes, **options)  # type: ignore[arg-type]


def write(at: Clock, text: Text, name: str, stages: Sequence[str] = ("target",)) -> Text:
    """Run one schedule to its end."""
    if name == "pipeinfer":
        PipeInfer(at, text, stages, batch=2).start()
    else:
        at.spawn(ONE_TARGET[name](at, text))
    at.run()
    return text


ONE_TARGET: dict[str, Callable[[Clock, Text], Process]] = {
    "plain": plain,
    "speculation": lambda at, text: speculation(at, text, 4),
    "pearl": lambda at, text: Pearl(4).run(at, text),
    "pre only": lambda at, text: Pearl(4, post=False).run(at, text),
    "post only": lambda at, text: Pearl(4, pre=False).run(at, text),
    "pearl of one": lambda at, text: Pearl(1).run(at, text),
}
SCHEDULES = (*ONE_TARGET, "pipeinfer")


def test_the_clock() -> None:
    """Jobs of a lane follow one another, lanes run side by side, ties keep their order, and time is added up."""
    at, seen = clock(), []

    def one() -> Process:
        job = at.start("draft", 2, lambda: "a")
        other = at.start("target", 1, lambda: "b")
        yield (job, other)
        seen.append((at.now, job.value, other.value))
        yield (job,)  # done already
        yield ()
        seen.append((at.now, at.idle("target", at.now)))

    def two() -> Process:
        job = at.start("draft", 3, lambda: 1 / 0)
        yield (job,)
        seen.append((at.now, type(job.error)))

    at.spawn(one())
    at.spawn(two())
    assert at.run() == 5.0
    assert seen == [(4.0, "a", "b"), (4.0, 0.0), (5.0, ZeroDivisionError)]
    assert at.lanes["draft"].longest_wait == 2.0


def test_a_schedule_that_waits_for_nothing_is_found_out() -> None:
    at = clock()

    def stuck() -> Process:
        yield (at.promise(),)

    at.spawn(stuck())
    with pytest.raises(AssertionError, match="never happens"):
        at.run()


def test_jitter_is_a_function_of_the_seed() -> None:
    def ends(seed: int) -> list[float]:
        at = clock(jitter=0.5, seed=seed)
        return write(at, made(0.6, 40, 0).text(), "pearl").times

    assert ends(1) == ends(1)
    assert ends(1) != ends(2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_writes_the_plain_text(name: str) -> None:
    """For every acceptance, jitter and draft, to the last token and not one more."""
    for seed_ in range(8):
        for acceptance in (0.05, 0.5, 0.95):
            trace = made(acceptance, 1 + 7 * seed_, seed_, prompt=5)
            at = clock(jitter=0.9 * (seed_ % 2), seed=seed_)
            text = write(at, trace.text(reads_prompt=True), name)
            assert text.path == trace.output
            assert len(text.times) == len(text.path)
            assert text.times == sorted(text.times)


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"cancel": False}, {"batch": 1, "ahead": 0}, {"cutoff": Cutoff(0.9, 0.1, 0.3)}]
)
def test_a_pipeline_writes_the_plain_text(stages: int, options: dict[str, object]) -> None:
    for seed_ in range(6):
        trace = made((0.2, 0.6, 0.9)[seed_ % 3], 30, seed_, prompt=9)
        at = clock(0.2, 4.0, STAGES[:stages], jitter=(0.0, 2.0)[seed_ % 2], seed=seed_)
        text = trace.text(reads_prompt=True)
        PipeInfer(at, text, STAGES[:stages], **options).start()  # type: ignore[arg-type]
        at.run()
        assert text.path == trace.output


@pytest.mark.parametrize("newest_first", [(), ("target",)])
def test_thoughts_are_the_same_in_any_order(newest_first: tuple[str, ...]) -> None:
    traces = [made(a, 25, i) for i, a in enumerate((0.9, 0.5, 0.1, 0.7))]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        for jitter in (0.0, 1.5):
            lanes = {lane_of(i): lambda n: 1.0 * n for i in range(4)} | {"target": lambda _: 4.0}
            at = Clock(lanes, jitter=jitter, seed=3, newest_first=newest_first)
            texts = [traces[i].text() for i in order]
            seed(at, texts, 4)
            at.run()
            assert [t.path for t in texts] == [traces[i].output for i in order]


@pytest.mark.parametrize("schedule", [serial, batched])
def test_several_texts_without_lanes(schedule: Callable[[Clock, Sequence[Text], int], Process]) -> None:
    texts = [made(0.5, n, n).text() for n in (5, 20, 11)]
    at = clock()
    at.spawn(schedule(at, texts, 3))
    at.run()
    assert [len(t.path) for t in texts] == [5, 20, 11]


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "plain"])
@pytest.mark.parametrize("dies", [0.0, 3.0, 17.0, 60.5])
def test_a_draft_lane_that_dies_loses_nothing(name: str, dies: float) -> None:
    trace = made(0.7, 60, 1)
    text = write(clock(deaths={"draft": dies}), trace.text(), name)
    assert text.path == trace.output
    assert not text.has_draft
    if name not in ("pearl of one", "pipeinfer"):  # with one stage and one token there is nothing to win
        assert write(clock(), trace.text(), name).times[-1] < text.times[-1]


def test_a_thought_whose_lane_dies_does_not_hold_up_the_others() -> None:
    traces = [made(0.8, 30, i) for i in range(3)]
    lanes = {lane_of(i): lambda n: 1.0 * n for i in range(3)} | {"target": lambda _: 4.0}
    at = Clock(lanes, deaths={lane_of(1): 6.0})
    texts = [t.text() for t in traces]
    seed(at, texts, 4)
    at.run()
    assert [t.path for t in texts] == [t.output for t in traces]
    assert [t.has_draft for t in texts] == [True, False, True]


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_target_there_is_no_text(name: str) -> None:
    with pytest.raises(LaneDiedError, match="target"):
        write(clock(deaths={"target": 10.0}), made(0.5, 60, 1).text(), name)


class Silent:
    """A draft that has a guess only now and then."""

    def __init__(self, inner: Trace) -> None:
        self._text, self._length = inner.output, len(inner.output)

    def guess(self, path: Path, round_id: int) -> Guess | None:  # noqa: ARG002
        at = len(path)
        return Guess(self._text[at]) if at % 5 not in (0, 1) and at < self._length else None


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_draft_without_a_guess(name: str) -> None:
    trace = made(0.5, 40, 2)
    text = trace.text()
    text._draft = Silent(trace)
    for costs in (1.0, 0.0):
        assert write(clock(costs), trace.text(), name).path == trace.output
    assert write(clock(0.0), text, name).path == trace.output


def test_a_stop_token_inside_what_is_pending_ends_the_text() -> None:
    trace = made(0.95, 40, 3)
    for name in SCHEDULES:
        for stop in (0, 6, 7, 8, 39):
            text = trace.text()
            text._stop_ids = frozenset([stop])
            write(clock(), text, name)
            assert text.path == trace.output[: stop + 1]


def test_no_token_is_wanted() -> None:
    text = made(0.5, 1, 0).text()
    nothing = Text(text.target, Silent(made(0.5, 1, 0)), text.rule, Noise(0), start=1, vocab_size=9, limit=0)
    assert write(clock(), nothing, "pearl").path == ()


def test_drafts_that_depend_on_time_need_coupled() -> None:
    text = made(0.5, 5, 0).text()
    text.rule = RejectionRule()
    with pytest.raises(InputError, match="coupled"):
        PipeInfer(clock(), text, ["target"])


def test_accepted_in_a_row() -> None:
    """Speculation accepts no more than its length in a row; under PEARL a draft goes on."""
    trace = made(0.9, 300, 5)
    longest = {name: max(write(clock(), trace.text(), name).streaks) for name in ("speculation", "pearl", "pre only")}
    assert longest["speculation"] == longest["pre only"] == 4
    assert longest["pearl"] > 8


def _streaks(agrees: np.ndarray) -> Iterator[int]:
    row = 0
    for right in agrees:
        row += bool(right)
        if not right:
            yield row
            row = 0


def test_pearl_ends_a_row_only_where_the_draft_is_wrong() -> None:
    trace = made(0.8, 200, 6)
    text = write(clock(), trace.text(), "pearl")
    wanted = list(_streaks(trace.agrees))
    assert text.streaks[: len(wanted)] == wanted  # the text ends inside one more


def test_cancelled_runs_take_no_time() -> None:
    trace = made(0.3, 80, 1)

    def seconds(cancel: bool) -> tuple[float, int]:
        at, text = clock(0.1, 4.0, STAGES), trace.text()
        schedule = PipeInfer(at, text, STAGES, batch=1, cutoff=Cutoff(0.2, 0.02, 0.1), cancel=cancel)
        schedule.start()
        at.run()
        return text.times[-1], schedule.num_cancelled

    with_, without = seconds(True), seconds(False)
    assert with_[0] < without[0]
    assert with_[1] > 0 == without[1]


def test_jobs_say_what_went_wrong() -> None:
    job = Job("draft", 1, lambda: None, lambda: False, error=LaneDiedError("gone"))
    with pytest.raises(LaneDiedError, match="gone"):
        job.result()

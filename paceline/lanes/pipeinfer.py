"""PipeInfer (2407.11798): the target is a pipeline, and several runs of one request are on their way along it.

A *run* is a few tokens that pass all stages; its result is the target's law after each of them. Results come in the
order in which runs set out.

    on a result     test the run's guesses behind what is committed, and commit; then
                    - runs that disagree with what is committed, or say nothing new, are cancelled: stages skip them
                    - if no run is on its way that has the newest token, a run of that token alone sets out
    all the while   the draft goes on from the end of the longest run, and every few tokens are a run

The draft goes on while its likeliest token has at least the cut-off's probability. The cut-off rises with every run
that was drafted since the last result (what depends on so much is seldom right) and falls with every attempt that
drafted nothing (the pipeline would stand idle).

Guesses depend on when results come, so only rules whose outcome does not depend on the draft are exact: `coupled`, and
every rule at temperature 0. The text is the same for any number of stages and any jitter.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from paceline.errors import InputError
from paceline.lanes.clock import Clock
from paceline.lanes.plain import DRAFT
from paceline.lanes.tokens import Guess, Path, Text, tokens_of
from paceline.lanes.work import Job, Process, through


@dataclass(frozen=True, slots=True)
class Cutoff:
    """When drafting pauses."""

    probability: float = 0.3
    """Of the draft's likeliest token, at least, right after a result."""
    rise: float = 0.05
    """With every run drafted since the last result."""
    fall: float = 0.1
    """With every attempt that drafted nothing."""

    def at(self, runs: int, misses: int) -> float:
        """The probability asked for now."""
        return self.probability + self.rise * runs - self.fall * misses


@dataclass(eq=False, slots=True)
class Run:
    """Tokens on their way along the pipeline. The prompt's run has none: its law is that after the prompt."""

    prefix: Path
    guesses: tuple[Guess, ...]
    whole: Path
    """Prefix and tokens."""
    is_prompt: bool = False
    cancelled: bool = False

    def answers(self, path: Path) -> bool:
        """Whether its result has the law after `path`."""
        first = len(self.prefix) + (0 if self.is_prompt else 1)
        return first <= len(path) <= len(self.whole) and self.whole[: len(path)] == path

    def is_dead(self, path: Path) -> bool:
        """Whether nothing of its result can be new once `path` is committed."""
        common = min(len(path), len(self.whole))
        return self.whole[:common] != path[:common] or len(self.whole) < len(path)


class PipeInfer:
    """The schedule of one text.

    Args:
        clock: with a lane `draft` and one for each stage.
        text: what is written.
        stages: lanes of the target, in order.
        batch: most tokens of a speculative run.
        cutoff: when drafting pauses.
        cancel: whether stages skip runs that are dead; without, they compute them.
        ahead: drafting pauses while more runs than stages and so many are on their way: they would only wait.

    Raises:
        InputError: the text's rule weighs drafts, and would be biased.
    """

    def __init__(
        self,
        clock: Clock,
        text: Text,
        stages: Sequence[str],
        *,
        batch: int = 4,
        cutoff: Cutoff | None = None,
        cancel: bool = True,
        ahead: int = 1,
    ) -> None:
        if not text.rule.shares_noise:
            raise InputError(
                f"PipeInfer drafts as results come, under which {text.rule.name} is biased.",
                field="rule",
                fix="Use coupled.",
            )
        self.clock, self.text, self.stages = clock, text, tuple(stages)
        self.batch, self.cutoff, self.cancel, self.ahead = batch, cutoff or Cutoff(), cancel, ahead
        self.runs: list[Run] = []
        """On their way, in the order in which they set out."""
        self.num_runs = 0
        self.num_cancelled = 0
        self._runs_since, self._misses = 0, 0
        self._speechless = False
        """Whether the draft had no guess at all: asking again before there is news would not help."""
        self._news: Job = clock.promise()

    def start(self) -> None:
        """Put it to work."""
        self._launch(Run((), (), (), is_prompt=True), max(self.text.unread, 1))
        self.text.unread = 0
        self.clock.spawn(self._drafting())

    def _launch(self, run: Run, size: int) -> None:
        self.runs.append(run)
        self.num_runs += 1
        self.clock.spawn(self._along(run, size))

    def _along(self, run: Run, size: int) -> Process:
        """One run passes the stages; one that is cancelled takes no time in those that it has not reached."""
        last = yield from through(self.clock, self.stages, size, lambda: None, lambda: run.cancelled)
        last.result()
        self.runs.remove(run)
        if not run.cancelled:
            self._result(run)
        self._tell()

    def _result(self, run: Run) -> None:
        text = self.text
        if not text.finished and run.answers(text.path):
            guesses = run.guesses[len(text.path) - len(run.prefix) :]
            laws = text.target.laws(text.path, tokens_of(guesses))
            text.commit(guesses, text.judge(guesses, laws), self.clock.now)
            self._runs_since, self._misses = 0, 0
        self._sweep()
        if not text.finished and not any(other.answers(text.path) for other in self._alive()):
            newest = Guess(text.path[-1])
            self._launch(Run(text.path[:-1], (newest,), text.path), 1)

    def _sweep(self) -> None:
        """Cancel what is dead."""
        for run in self.runs:
            if self.cancel and not run.cancelled and (self.text.finished or run.is_dead(self.text.path)):
                run.cancelled = True
                self.num_cancelled += 1

    def _alive(self) -> list[Run]:
        return [run for run in self.runs if not run.is_dead(self.text.path)]

    def _drafting(self) -> Process:
        """Draft behind the longest run that is alive, as long as there is anything to write."""
        text = self.text
        while not text.finished and text.has_draft:
            tip = max((run.whole for run in self._alive()), key=len, default=text.path)
            crowded = sum(not run.cancelled for run in self.runs) > len(self.stages) + self.ahead
            if crowded or len(tip) >= text.limit:
                yield (self._news,)
                continue
            news = self._news
            found = yield from self._draft_behind(tip)
            if found:
                self._runs_since += 1
                self._launch(Run(tip, tuple(found), (*tip, *tokens_of(found))), len(found))
            elif found is not None:
                self._misses += 1
                yield (news,) if self._speechless else ()

    def _draft_behind(self, tip: Path) -> Generator[Sequence[Job], None, list[Guess] | None]:
        """A run's worth of guesses, fewer below the cut-off; None if what was committed meanwhile went another way."""
        found: list[Guess] = []
        while len(found) < self.batch:
            path = (*tip, *tokens_of(found))
            job = self.clock.start(DRAFT, 1, lambda path=path: self.text.guesses(path, 1))  # type: ignore[misc]
            yield (job,)
            if job.error is not None:
                self.text.lose_draft(job.error)
            if job.error is not None or self.text.finished or not self._holds(tip):
                return None
            self._speechless = not job.value
            if self._speechless or job.value[0].probability < self.cutoff.at(self._runs_since, self._misses):
                break
            found += job.value
        return found

    def _holds(self, tip: Path) -> bool:
        """Whether what is committed has not gone another way."""
        path = self.text.path
        common = min(len(tip), len(path))
        return tip[:common] == path[:common] and len(tip) >= len(path)

    def _tell(self) -> None:
        self.clock.keep(self._news)
        self._news = self.clock.promise()

"""Speculation measured: how much faster than `none`, task by task, with the same output.

Every question is answered by all engines one after the other, in an order that rotates from question to
question, so that the noise of the machine hits all alike. Rates are pooled: tokens of all questions over
seconds of all questions. A speedup is the ratio of two such rates; its 95% interval is a bootstrap over the
questions.

This module does not load models: it gets engines that answer chats, and yields values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.config import SamplingParams
from paceline.errors import InputError, RequestError

if TYPE_CHECKING:
    from paceline.outputs import Generation

BASELINE = "none"
ALL = "all"
"""Name of the row over all tasks."""
RESAMPLES = 2000
WARM_UP_TOKENS = 24

MT_BENCH = frozenset({"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"})
"""Spec-Bench takes its multi-turn task from MT-Bench, under these eight names; they are one task."""

FloatArray = NDArray[np.float64]


class ChatModel(Protocol):
    """What is measured: `paceline.LLM`, or a stand-in."""

    def chat(self, messages: list[dict[str, Any]], params: SamplingParams, *, cache_salt: str = "") -> list[Generation]:
        """Answer one conversation."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a question file: the user's turns of a conversation."""

    id: int | str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """One question answered by one engine; numbers are sums over the turns."""

    spec: str
    question_id: int | str
    category: str
    repeat: int
    token_ids: tuple[tuple[int, ...], ...]
    """Output tokens of every turn."""
    seconds: float
    ttft_seconds: float
    decode_seconds: float
    """Seconds after the first token."""
    decode_tokens: float
    """Tokens that came in those seconds."""
    target_forwards: int
    draft_tokens: int
    accepted_tokens: int
    accepted_by: Mapping[str, int]

    @property
    def num_tokens(self) -> int:
        """Output tokens of all turns."""
        return sum(len(ids) for ids in self.token_ids)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A speedup with its 95% interval; None where there is nothing to divide or too few questions."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One speculation setting on one task (or on `ALL`)."""

    category: str
    spec: str
    questions: int
    tokens_per_second: float
    """While decoding."""
    speedup: Ratio
    """Of decode tokens per second, over `none`."""
    speedup_total: Ratio
    """Of tokens per second including the prompt's prefill."""
    mean_accepted_length: float
    draft_tokens: int
    accepted_tokens: int
    same_output: int
    """Answers equal to those of `none`, token for token and in length."""
    compared: int


def builtin_questions() -> Path:
    """The question file that ships with Paceline."""
    return Path(str(resources.files("paceline.bench") / "questions.jsonl"))


def parse_questions(
    lines: Iterable[tuple[int, Mapping[str, Any]]], *, limit: int | None = None, name: str = "questions"
) -> list[Question]:
    """Questions in Spec-Bench's format (`question_id`, `category`, `turns`) from numbered objects.

    Args:
        limit: most questions of each category, taken in order.

    Raises:
        InputError: a line does not have that form (the message names it), or nothing is left.
    """
    questions: list[Question] = []
    taken: dict[str, int] = {}
    for number, line in lines:
        turns, category = line.get("turns"), line.get("category")
        if not isinstance(category, str) or "question_id" not in line:
            raise InputError(f'line {number} needs "question_id" and "category".', field=name)
        if not (isinstance(turns, list) and turns and all(isinstance(t, str) and t for t in turns)):
            raise InputError(f'line {number}: "turns" must be a list of texts.', field=name)
        category = "multi_turn" if category in MT_BENCH else category
        taken[category] = taken.get(category, 0) + 1
        if limit is None or taken[category] <= limit:
            questions.append(Question(line["question_id"], category, tuple(turns)))
    if not questions:
        raise InputError("holds no question.", field=name)
    if len({q.id for q in questions}) < len(questions):
        raise InputError("a question_id occurs twice.", field=name)
    return questions


def warm_up(engines: Mapping[str, ChatModel], question: Question, params: SamplingParams) -> None:
    """Run each engine once so that first-use costs are not measured."""
    short = replace(params, max_tokens=min(params.max_tokens, WARM_UP_TOKENS), min_tokens=0)
    for engine in engines.values():
        engine.chat([{"role": "user", "content": question.turns[0]}], short, cache_salt="warm-up")


def measure(
    engines: Mapping[str, ChatModel],
    questions: Sequence[Question],
    params: SamplingParams,
    *,
    turns: int = 1,
    repeats: int = 1,
) -> Iterator[Measured]:
    """Answer all questions with all engines, interleaved.

    Each repeat has its own cache salt: what an engine learnt or cached from a question does not serve the
    same question again.
    """
    specs = list(engines)
    for repeat in range(repeats):
        for i, question in enumerate(questions):
            shift = (i + repeat) % len(specs)
            for spec in specs[shift:] + specs[:shift]:
                yield _ask(spec, engines[spec], question, params, turns, repeat)


def _ask(spec: str, engine: ChatModel, question: Question, params: SamplingParams, turns: int, repeat: int) -> Measured:
    messages: list[dict[str, Any]] = []
    answers: list[Generation] = []
    for turn in question.turns[:turns]:
        messages.append({"role": "user", "content": turn})
        answers += engine.chat(list(messages), params, cache_salt=f"repeat {repeat}")
        if answers[-1].outputs[0].error is not None:
            raise RequestError(f"question {question.id} failed with {spec}: {answers[-1].outputs[0].error}")
        messages.append({"role": "assistant", "content": answers[-1].text})
    stats = [answer.stats for answer in answers]
    accepted_by: dict[str, int] = {}
    for item in stats:
        for drafter, count in item.accepted_by.items():
            accepted_by[drafter] = accepted_by.get(drafter, 0) + count
    return Measured(
        spec=spec,
        question_id=question.id,
        category=question.category,
        repeat=repeat,
        token_ids=tuple(answer.token_ids for answer in answers),
        seconds=sum(s.seconds for s in stats),
        ttft_seconds=sum(s.ttft_seconds for s in stats),
        decode_seconds=sum(s.seconds - s.ttft_seconds for s in stats),
        decode_tokens=sum(s.tokens_per_second * (s.seconds - s.ttft_seconds) for s in stats),
        target_forwards=sum(s.target_forwards for s in stats),
        draft_tokens=sum(s.draft_tokens for s in stats),
        accepted_tokens=sum(s.accepted_tokens for s in stats),
        accepted_by=accepted_by,
    )


def summarise(measured: Sequence[Measured], specs: Sequence[str]) -> list[Row]:
    """One row per task and spec, then one per spec over all tasks.

    Questions that not every spec has answered (an interrupted run) are left out.
    """
    answers = {(m.question_id, m.repeat, m.spec): m for m in measured}
    full = [m for m in measured if all((m.question_id, m.repeat, spec) in answers for spec in specs)]
    rows = []
    for category in [*dict.fromkeys(m.category for m in full), ALL]:
        group = [m for m in full if category in (m.category, ALL)]
        base = [m for m in group if m.spec == BASELINE]
        rows += [_row(category, spec, [m for m in group if m.spec == spec], base) for spec in specs if base]
    return rows


def _row(category: str, spec: str, mine: list[Measured], base: list[Measured]) -> Row:
    reference = {(m.question_id, m.repeat): m for m in base}
    pairs = [(m, reference[m.question_id, m.repeat]) for m in mine]
    decode = _per_question(pairs, lambda m: (m.decode_tokens, m.decode_seconds))
    total = _per_question(pairs, lambda m: (m.num_tokens, m.seconds))
    return Row(
        category=category,
        spec=spec,
        questions=len(decode),
        tokens_per_second=_rate(*decode[:, :2].sum(axis=0)),
        speedup=speedup(decode),
        speedup_total=speedup(total),
        mean_accepted_length=_rate(sum(m.num_tokens for m in mine), sum(m.target_forwards for m in mine)),
        draft_tokens=sum(m.draft_tokens for m in mine),
        accepted_tokens=sum(m.accepted_tokens for m in mine),
        same_output=sum(same_output(a, b) for a, b in pairs),
        compared=len(pairs),
    )


def same_output(a: Measured, b: Measured) -> bool:
    """Whether two answers agree in every turn, token for token, lengths included."""
    return a.token_ids == b.token_ids


def _per_question(pairs: Sequence[tuple[Measured, Measured]], tokens_and_seconds: Any) -> FloatArray:
    """Tokens and seconds of a spec, then of the baseline, repeats added up.  # [questions, 4]"""
    sums: dict[int | str, FloatArray] = {}
    for mine, base in pairs:
        numbers = np.array([*tokens_and_seconds(mine), *tokens_and_seconds(base)], dtype=np.float64)
        sums[mine.question_id] = sums.get(mine.question_id, np.zeros(4)) + numbers
    return np.stack(list(sums.values()))


def speedup(data: FloatArray, *, seed: int = 0) -> Ratio:
    """Ratio of pooled rates with a percentile bootstrap interval over questions.

    Args:
        data: tokens and seconds of the setting, then of the baseline.  # [questions, 4]
    """
    value = _speedups(data[None])[0]
    if not np.isfinite(value):
        return Ratio(None, None, None)
    if len(data) < 2:
        return Ratio(float(value), None, None)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(RESAMPLES, len(data)))
    low, high = np.nanpercentile(_speedups(data[picks]), [2.5, 97.5])
    return Ratio(float(value), float(low), float(high))


def _speedups(samples: FloatArray) -> FloatArray:
    """Speedup of every sample of questions; NaN without a time.  # [samples, questions, 4] -> [samples]"""
    tokens, seconds, base_tokens, base_seconds = samples.sum(axis=1).T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: FloatArray = np.asarray(tokens / seconds / (base_tokens / base_seconds))
    ratio[~np.isfinite(ratio)] = np.nan
    return ratio


def _rate(amount: float, per: float) -> float:
    return float(amount / per) if per > 0 else 0.0

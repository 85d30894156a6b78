"""Spec-Bench (2401.07851): the harness `paceline bench spec` itself, checked on what is known of its figures.

Tasks are ranked by mean accepted length: it needs no clock, so that a busy machine does not decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import torch

from paceline.bench import spec
from paceline.bench.systems.base import Row, at_least, exactly, suite
from paceline.bench.systems.context import Context
from paceline.config import SamplingParams
from paceline.engine.types import DraftBatch, ScheduledBatch, TargetScores
from paceline.llm import LLM
from paceline.verify.verifier import Verifier

DRAFTERS = ("ngram:k=4", "ngram:k=8", "recycling:k=16", "ngram:k=8+recycling:k=16")


def _rows(context: Context) -> tuple[list[spec.Measured], list[spec.Row]]:
    """Everything that the harness measures here, once."""
    return context.once("spec-bench", lambda: _measure(context))  # type: ignore[no-any-return]


def _measure(context: Context) -> tuple[list[spec.Measured], list[spec.Row]]:
    specs = [spec.BASELINE, *DRAFTERS]
    engines = {text: context.llm(text) for text in specs}
    questions = context.questions[: 7 * context.few(2, 1)]
    params = SamplingParams(temperature=0.0, max_tokens=context.few(32, 16), seed=0)
    measured = []
    for item in spec.measure(engines, questions, params):
        measured.append(item)
        context.say(f"{item.category}: {len(measured)} of {len(questions) * len(specs)} answers")
    return measured, spec.summarise(measured, specs)


def _vanilla(context: Context) -> Iterator[Row]:
    """Without speculation every forward gives one token, on every task."""
    rows = [row for row in _rows(context)[1] if row.spec == spec.BASELINE]
    worst = max(rows, key=lambda row: abs(row.mean_accepted_length - 1.0))
    tasks = ", ".join(row.category for row in rows)
    yield exactly("vanilla: accepted length on every task", worst.mean_accepted_length, 1.0, f"tasks: {tasks}")


def _same_output(context: Context) -> Iterator[Row]:
    """Greedy answers of every setting equal those of vanilla."""
    rows = [row for row in _rows(context)[1] if row.category == spec.ALL and row.spec != spec.BASELINE]
    same, compared = sum(row.same_output for row in rows), sum(row.compared for row in rows)
    yield exactly("same output as vanilla", same, compared, f"answers of {len(rows)} settings")


class OffByOne(Verifier):
    """Broken on purpose: after the last node of a draft the target's scores are off by one token."""

    def verify(self, batch: ScheduledBatch, drafts: DraftBatch) -> TargetScores:
        """Score, and shift the row that the bonus token is taken from."""
        scores = super().verify(batch, drafts)
        logits = scores.logits.clone()
        for tree, first in zip(drafts.trees, scores.first_row, strict=True):
            if len(tree):
                logits[first + len(tree)] = torch.roll(logits[first + len(tree)], 1)
        return TargetScores(logits, scores.first_row, scores.prompt_rows)


def _broken(context: Context) -> Iterator[Row]:
    """A method with a wrong bonus token must fail the comparison."""
    llm = _with_verifier(context.fresh_llm("ngram:k=2", max_num_seqs=2))
    engines = {spec.BASELINE: context.llm(), "broken": llm}
    # Copying is where prompt lookup is accepted in full, so that bonus tokens exist at all.
    questions = [q for q in context.questions if q.category == "editing"][: context.few(4, 2)] or context.questions[:2]
    params = SamplingParams(temperature=0.0, max_tokens=context.few(48, 24), seed=0)
    measured = list(spec.measure(engines, questions, params))
    rows = spec.summarise(measured, list(engines))
    (row,) = [row for row in rows if row.category == spec.ALL and row.spec == "broken"]
    note = f"of {row.compared} answers with a bonus token off by one; {row.accepted_tokens} draft tokens were accepted"
    yield at_least("control: a broken method is caught", row.compared - row.same_output, 1, note)


def _with_verifier(llm: LLM) -> LLM:
    llm.engine.stages = replace(llm.engine.stages, verifier=OffByOne(llm.engine.runner))
    return llm


def _one_counter(context: Context) -> Iterator[Row]:
    """Both sides are counted by the same counter: token ids of the engine, never text that is tokenised again."""
    measured = _rows(context)[0]
    base = {m.question_id: m for m in measured if m.spec == spec.BASELINE}
    pairs = [(m, base[m.question_id]) for m in measured if m.spec != spec.BASELINE]
    equal = [(m, b) for m, b in pairs if spec.same_output(m, b)]
    agree = sum(m.num_tokens == b.num_tokens for m, b in equal)
    wrong = sum(_counted_again(context, b) != b.num_tokens for b in base.values())
    note = f"tokenising the text again would miscount {wrong} of {len(base)} answers"
    yield exactly("one counter: equal answers count equal", agree, len(equal), note)
    # What the engine committed, told by its own forwards: each gives one token beside the accepted ones, except the
    # last if an end lies inside the draft.
    over = [m.target_forwards + m.accepted_tokens - m.num_tokens for m in measured]
    note = f"forwards + accepted - counted is 0, or 1 at an end inside a draft; {over.count(1)} of {len(over)} ended so"
    yield exactly("answers counted otherwise than by the engine", sum(x not in (0, 1) for x in over), 0, note)


def _counted_again(context: Context, item: spec.Measured) -> int:
    tokenizer = context.llm().tokenizer
    return sum(len(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False)) for ids in item.token_ids)


def _ranking(context: Context) -> Iterator[Row]:
    """Drafters do not rank the same on every task."""
    rows = [row for row in _rows(context)[1] if row.category != spec.ALL and row.spec != spec.BASELINE]
    by_task: dict[str, dict[str, float]] = {}
    for row in rows:
        by_task.setdefault(row.category, {})[row.spec] = row.mean_accepted_length
    swapped = [pair for pair in combinations(DRAFTERS, 2) if _swaps(pair, list(by_task.values()))]
    best = {task: max(found, key=lambda name: found[name]) for task, found in by_task.items()}
    single = {task: _single(found) for task, found in by_task.items()}
    note = f"of {len(DRAFTERS)} drafters on {len(by_task)} tasks; best: {_listed(best)}; best alone: {_listed(single)}"
    yield at_least("pairs of drafters that swap order between tasks", len(swapped), 1, note)


def _swaps(pair: Sequence[str], tasks: Sequence[dict[str, float]]) -> bool:
    signs = {task[pair[0]] > task[pair[1]] for task in tasks if task[pair[0]] != task[pair[1]]}
    return len(signs) == 2


def _single(found: dict[str, float]) -> str:
    alone = [name for name in found if "+" not in name]
    return max(alone, key=lambda name: found[name])


def _listed(names: dict[str, str]) -> str:
    tasks: dict[str, list[str]] = {}
    for task, name in names.items():
        tasks.setdefault(name, []).append(task)
    return ", ".join(f"{name} ({'/'.join(found)})" for name, found in tasks.items())


run = suite(_vanilla, _same_output, _broken, _one_counter, _ranking)

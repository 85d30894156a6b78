"""SpecDec++ (2405.19715): a head trained on the spot says when to stop. Compared on recorded chains at equal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from paceline.bench.systems.base import Row, at_least, at_most, suite
from paceline.bench.systems.chains import LONGEST, QUESTIONS, Chains, matched, recorded
from paceline.bench.systems.context import Context
from paceline.config import SamplingParams
from paceline.model.loader import load_model
from paceline.plan.heads import AcceptanceHead
from paceline.plan.specdec import AcceptanceStop
from paceline.train.acceptance_head import HeadSettings, HeadTrainer, auc, open_draft
from paceline.train.documents import Documents, join
from paceline.train.judgements import Judge, Judgements

_SAMPLES = 8
"""Answers to each question that heads learn from."""


def judgements(context: Context, kind: str) -> Judgements:
    """Judged draft tokens on answers at temperature 1 to questions that no chain is recorded on, made once."""
    found: Judgements = context.once(("judgements", kind), lambda: _judge(context, kind))
    return found


def trained(context: Context, settings: HeadSettings, *, shuffled: bool = False) -> HeadTrainer:
    """A head trained on them; with shuffled labels there is nothing to learn."""
    found = judgements(context, settings.kind)
    if shuffled:
        order = torch.randperm(len(found.accepted), generator=torch.Generator().manual_seed(0))
        found = replace(found, accepted=found.accepted[order])
    trainer = HeadTrainer(found, settings, torch.device("cpu"))
    while trainer.progress < 1.0:
        trainer.train_step()
    return trainer


def _judge(context: Context, kind: str) -> Judgements:
    documents: Documents = context.once("answers to judge", lambda: _answers(context))
    context.say("Judging draft tokens")
    # A copy: judging attends by the library's code, and the shared model by the engine's.
    target = load_model(str(context.loaded.path), dtype="float32", device="cpu")
    judge = Judge(target, open_draft(context.draft_model, target), kind=kind, mixing=0.15, seed=0)
    parts = [judge.part(documents, which, i) for i, which in enumerate(_groups(len(documents.lengths)))]
    return Judgements(*(torch.cat([getattr(p, name) for p in parts]) for name in Judgements.__dataclass_fields__))


def _groups(count: int) -> Sequence[np.ndarray]:
    return np.array_split(np.arange(count), -(-count // 16))


def _answers(context: Context) -> Documents:
    context.say("Writing answers")
    prompts = context.prompts(len(context.questions))[QUESTIONS:]
    longest, samples = context.few(128, 48), context.few(_SAMPLES, 2)
    params = SamplingParams(temperature=1.0, max_tokens=longest, seed=9, n=samples)
    made = context.llm().generate(prompts, params)
    pairs = [(p, output.token_ids) for p, answers in zip(prompts, made, strict=True) for output in answers.outputs]
    return join([(np.array([*p, *a], dtype=np.int32), np.arange(len(p) + len(a)) >= len(p)) for p, a in pairs])


def _auc(context: Context) -> Iterator[Row]:
    """Held-out AUC of the judgement, and the control."""
    found = trained(context, HeadSettings()).measure()
    note = f"{found.places} draft tokens of other answers to the same questions"
    yield at_least("held-out AUC", found.auc, 0.70, note)
    control = trained(context, HeadSettings(), shuffled=True)
    judged, accepted = _judged(recorded(context), control)
    yield at_most("control: AUC after shuffled labels", auc(judged, accepted), 0.60, "on recorded chains")
    judged, accepted = _judged(recorded(context), trained(context, HeadSettings()))
    yield at_least(
        "AUC in use", auc(judged, accepted), 0.70, f"{len(judged)} tested tokens of recorded chains, other questions"
    )


def _judged(chains: Chains, trainer: HeadTrainer) -> tuple[np.ndarray, np.ndarray]:
    """Judgements of tested tokens, and whether they were accepted. A token is judged a forward later."""
    states, accepted = [], []
    for told, count in zip(chains.progress, chains.accepted.tolist(), strict=True):
        for place in range(min(count + 1, LONGEST - 1)):
            hidden = told[place + 1].hidden
            assert hidden is not None, "it was recorded"
            states.append(hidden[0].float())
            accepted.append(float(place < count))
    with torch.no_grad():
        return trainer.head(torch.stack(states))[:, 1].double().numpy(), np.array(accepted)


def _discarded(context: Context) -> Iterator[Row]:
    """Discarded draft tokens at equal mean drafted length."""
    chains = recorded(context)
    for shuffled in (False, True):
        head = trained(context, HeadSettings(), shuffled=shuffled).head
        assert isinstance(head, AcceptanceHead)
        size = chains.accepted.size
        # The head is first asked after the second token: at a mean of two there is nothing to decide.
        best = max(3, min(LONGEST - 2, round(float(chains.accepted.mean()) + 1)))
        lengths = matched(chains, lambda h, head=head: lambda: AcceptanceStop(head, h, 1), float(best))  # type: ignore[misc]
        mean = float(lengths.mean())
        ours, fixed = 1.0 - chains.rate(lengths), 1.0 - chains.constant(mean)
        note = f"{ours:.3f} and {fixed:.3f} of the drafted tokens at {mean:.2f} a step, {size} steps"
        if shuffled:
            yield at_most("control: fewer discarded after shuffled labels", 1.0 - ours / fixed, 0.03, note)
        else:
            yield at_least("fewer discarded than the fixed length of equal mean", 1.0 - ours / fixed, 0.10, note)


run = suite(_auc, _discarded)

"""Decoding Speculative Decoding (2402.01528): which draft model is the best? A study of depth, width and accuracy.

The drafts: those in the folder given with `--drafts`, best trained alike (`examples/train_study.sh`) and two of them of
the same size but other depth. Without: the target itself, the target without 4 and without 8 of its middle layers, the
trained draft, and the same with MLPs so wide that it has the parameters of the target without 8 layers (the new neurons
write nothing, so that only its width differs). In both cases the trained draft with a cut head (FR-Spec), too.

For every draft: time of a draft forward, accepted length, tokens per second, and how often it names the next token of
the questions' own text, which is accuracy on text that the target did not write.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.bench.systems.base import Row, above, at_least, at_most, suite
from paceline.bench.systems.context import Context
from paceline.config import SamplingParams
from paceline.engine.types import InFlight, StepOutput
from paceline.llm import LLM
from paceline.model.draft_weights import load_draft
from paceline.model.head_subset import RANKING
from paceline.model.loader import LoadedModel, load_model
from paceline.train.export import Provenance, export_draft
from paceline.train.student import make_student

LENGTH = 4
_QUESTIONS, _TOKENS = (6, 3), (48, 16)
_SAME_SIZE = 0.02
_TARGETS = (1.0, 4.0, 16.0, 64.0)
"""How many times the time of this target a larger one's forward takes."""


@dataclass
class Studied:
    """One draft model and what was measured with it."""

    parameters: int
    layers: int
    accuracy: float
    draft_seconds: list[float] = field(default_factory=list)
    """Of one forward, by step."""
    rest_seconds: list[float] = field(default_factory=list)
    """Of everything else in a step: verification above all."""
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens per step."""
        return self.tokens / self.steps

    @property
    def draft_time(self) -> float:
        """Typical seconds of one draft forward."""
        return float(np.median(self.draft_seconds))

    def predicted(self, target_times: float = 1.0) -> float:
        """Tokens per second by the study's formula, for a target that takes so many times this one's time."""
        verify = target_times * float(np.median(self.rest_seconds))
        return self.accepted_length / (LENGTH * self.draft_time + verify)


def _claims(context: Context) -> Iterator[Row]:
    """The study's four claims."""
    with tempfile.TemporaryDirectory(prefix="paceline-study-") as folder:
        studied = _study(context, Path(folder))
    rate = [s.tokens / s.seconds for s in studied.values()]
    predicted = rank_correlation([s.predicted() for s in studied.values()], rate)
    yield at_least("predicted against measured rate", predicted, 0.9, _table(studied))
    latency = rank_correlation([-s.draft_time for s in studied.values()], rate)
    accuracy = rank_correlation([s.accuracy for s in studied.values()], rate)
    note = f"rank correlation of tokens/s with -latency {latency:.2f}, with accuracy {accuracy:.2f}"
    yield above("latency decides more than accuracy", latency - accuracy, 0.0, note)
    yield _wide_over_deep(list(studied.values()))
    best = [max(studied.values(), key=lambda s, t=times: s.predicted(t)).parameters for times in _TARGETS]  # type: ignore[misc]
    grows = sorted(best) == best and best[-1] > best[0]
    note = f"by the formula, at {', '.join(f'{t:g}' for t in _TARGETS)} times this target's time"
    found = " ".join(f"{parameters / 1e6:.0f}M" for parameters in best)
    yield Row("larger targets want larger drafts", found, "rising", grows, note)


def _wide_over_deep(studied: Sequence[Studied]) -> Row:
    """Two drafts of about the same size: the one with fewer layers is faster."""
    test = "latency of wide over deep"
    pairs = [(a, b) for a in studied for b in studied if a.layers < b.layers and _same(a.parameters, b.parameters)]
    if not pairs:
        return Row(test, None, "< 1", None, f"no two drafts whose sizes differ by under {_SAME_SIZE:.0%}")
    wide, deep = max(pairs, key=lambda pair: pair[1].layers / pair[0].layers)
    note = f"{wide.parameters / 1e6:.1f}M in {wide.layers} against {deep.parameters / 1e6:.1f}M in {deep.layers} layers"
    return at_most(test, wide.draft_time / deep.draft_time, 1.0 - 1e-9, note)


def _same(a: int, b: int) -> bool:
    return abs(a - b) < _SAME_SIZE * b


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; equal values share their ranks."""
    ranks = [[sum(x < v for x in values) + sum(x <= v for x in values) for v in values] for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _table(studied: Mapping[str, Studied]) -> str:
    return "; ".join(
        f"{name}: {1e3 * s.draft_time:.1f} ms, {s.accepted_length:.2f}, {s.tokens / s.seconds:.1f} tok/s, "
        f"accuracy {s.accuracy:.2f}"
        for name, s in studied.items()
    )


def _study(context: Context, folder: Path) -> dict[str, Studied]:
    """Make or take the drafts, and let all of them answer the same questions in turns."""
    target = load_model(str(context.loaded.path), dtype="float32")  # the shared one is packed, which hides its layers
    trained = load_draft(context.draft_model, target)
    texts = [torch.tensor([context.encode(q.turns[0])[:256]]) for q in context.questions[: context.few(12, 4)]]
    folders = {_name(at): at for at in context.drafts or _make(context, folder, target, trained)}
    studied = {name: _studied(load_draft(str(at), target), texts) for name, at in folders.items()}
    llms = {name: context.llm(f'draft:model="{at}",k={LENGTH}', tree="chain") for name, at in folders.items()}
    cut = f'draft:model="{context.draft_model}",vocab="{trained.path / RANKING}",k={LENGTH}'
    llms["cut"] = context.llm(cut, tree="chain")
    studied["cut"] = _studied(trained, texts)
    params = SamplingParams(temperature=0.0, max_tokens=context.few(*_TOKENS))
    prompts = context.prompts(context.few(*_QUESTIONS))
    for llm in llms.values():
        llm.generate([prompts[0][:32]], SamplingParams(temperature=0.0, max_tokens=4))
    for prompt in prompts:
        for name, llm in llms.items():
            context.say(f"draft {name}")
            _measure(llm, prompt, params, studied[name])
    return studied


def _measure(llm: LLM, prompt: Sequence[int], params: SamplingParams, into: Studied) -> None:
    engine = llm.engine
    collect = engine.collect

    def watched(step: InFlight) -> StepOutput:
        output = collect(step)
        stats = engine.last_stats
        if stats is not None and stats.num_sampling and not stats.num_prompt_tokens:
            spent = sum(stats.draft_seconds.values())
            into.draft_seconds.append(spent / max(sum(stats.draft_depths.values()), 1))
            into.rest_seconds.append(stats.step_seconds - spent)
            into.tokens += stats.num_committed
            into.steps += 1
            into.seconds += stats.step_seconds
        return output

    engine.collect = watched  # type: ignore[method-assign]
    try:
        llm.generate([list(prompt)], params)
    finally:
        engine.collect = collect  # type: ignore[method-assign]


def _make(context: Context, folder: Path, target: LoadedModel, trained: LoadedModel) -> list[Path]:
    """Save the drafts, each as its own layers only."""
    count, own = int(target.config.num_hidden_layers), int(trained.config.num_hidden_layers)
    deep = _without(count, 8)
    wide = _matching_width(target, len(deep), own)
    wanted: dict[str, tuple[LoadedModel, tuple[int, ...], int | None]] = {
        "whole": (target, tuple(range(count)), None),
        "without 4": (target, _without(count, 4), None),
        "without 8": (target, deep, None),
        "trained": (trained, tuple(range(own)), None),
        "wide": (trained, tuple(range(own)), wide),
    }
    for name, (source, layers, intermediate) in wanted.items():
        context.say(f"Making draft {name}")
        student = make_student(source, layers, intermediate=intermediate)
        how = Provenance("bench systems decoding-sd", layers, intermediate, _NO_TEXT, {}, _NO_FIGURES, [], "")
        export_draft(folder / name, target, student, how)
    return [folder / name for name in wanted]


def _name(folder: Path) -> str:
    """What to call a draft: `RUN/draft` by its run."""
    return folder.parent.name if folder.name == "draft" else folder.name


def _studied(draft: LoadedModel, texts: Sequence[torch.Tensor]) -> Studied:
    layers = int(draft.config.num_hidden_layers)
    student = make_student(draft, tuple(range(layers)))  # which runs without an engine
    parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return Studied(parameters, layers, _accuracy(student, texts))


_NO_TEXT: dict[str, Any] = {"documents": 0, "tokens": 0, "own_tokens": 0, "heldout_documents": 0, "settings": {}}
_NO_FIGURES: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "acceptance": 0.0, "agreement": 0.0}


def _without(count: int, dropped: int) -> tuple[int, ...]:
    """Layers but for `dropped` of them in a row, which begin at two fifths of the depth."""
    first = round(0.4 * count)
    return tuple(i for i in range(count) if not first <= i < first + dropped)


def _matching_width(target: LoadedModel, deep: int, shallow: int) -> int:
    """Neurons that give `shallow` layers the parameters of `deep` ones (of a gated MLP)."""
    config = target.config
    layer = sum(p.numel() for p in target.model.base_model.layers[0].parameters())
    neuron = 3 * int(config.hidden_size)
    more: int = round((deep - shallow) * layer / shallow / neuron)
    return int(config.intermediate_size) + more


@torch.inference_mode()
def _accuracy(student: Any, texts: Sequence[torch.Tensor]) -> float:
    """How often the next token of a text is the student's first guess."""
    right = total = 0
    for ids in texts:
        guesses = student(input_ids=ids, use_cache=False).logits[0, :-1].argmax(dim=-1)
        right += int((guesses == ids[0, 1:]).sum())
        total += ids.shape[1] - 1
    return right / total


run = suite(_claims)

"""What PEARL, PipeInfer and SEED are measured on: traces of real models, texts on real forwards, clocks.

A trace is real: the target's own output, and at every position whether the draft model's token is the one that
follows, from one forward of the draft over the whole text. How right a draft is, is chosen by how many middle layers of
the target it lacks; how long it takes, is the clock's business, so that every schedule is compared at every speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path as Folder

import numpy as np
from numpy.typing import NDArray

from paceline.bench.lane_times import follower_of
from paceline.bench.systems.base import Row, exactly
from paceline.bench.systems.context import Context, tokens_of
from paceline.bench.systems.drafts import save_without
from paceline.config import SamplingParams
from paceline.engine.rng import Noise
from paceline.engine.sampling import Law
from paceline.lanes.clock import Clock
from paceline.lanes.models import ModelDraft, ModelTarget
from paceline.lanes.tokens import Draft, Guess, Path, Target, Text
from paceline.lanes.traces import Trace
from paceline.lanes.work import Process
from paceline.llm import LLM
from paceline.model.loader import load_model
from paceline.verify.coupled import CoupledRule, draw_target

SEED = 7
PROMPTS, TOKENS = (12, 4), (64, 24)
"""Of a set of traces: full and quick."""
Schedule = Callable[[Clock, Text], Process]


def params_at(temperature: float, tokens: int) -> SamplingParams:
    """Options of a text of that many tokens."""
    return SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=SEED)


def draft_without(context: Context, layers: int) -> LLM:
    """The target without so many of its middle layers, which costs about as much as it does and is often right; 0: the
    draft model of the context."""
    if not layers:
        return context.draft_llm

    def make() -> LLM:
        with tempfile.TemporaryDirectory(prefix="paceline-draft-") as folder:
            path = save_without(context.loaded, Folder(folder), layers)
            return LLM(load_model(str(path), dtype="float32"), speculation="none", kv_cache_memory=256 << 20)

    found: LLM = context.once(("draft without", layers), make)
    return found


def traces(context: Context, layers: int, temperature: float = 0.0) -> list[Trace]:
    """Traces of a draft that lacks so many layers, under `coupled`; made once."""
    found: list[Trace] = context.once(("traces", layers, temperature), lambda: _record(context, layers, temperature))
    return found


def _record(context: Context, layers: int, temperature: float) -> list[Trace]:
    context.say(f"Recording traces at temperature {temperature:g} (draft without {layers} layers)")
    prompts = context.prompts(context.few(*PROMPTS))
    params = params_at(temperature, context.few(*TOKENS))
    outputs = tokens_of(context.llm().generate(prompts, params))
    draft = draft_without(context, layers)
    return [_trace(draft, prompt, output, params) for prompt, output in zip(prompts, outputs, strict=True)]


def _trace(draft: LLM, prompt: Sequence[int], output: Path, params: SamplingParams) -> Trace:
    follower = follower_of(draft)
    rows = follower.rows((*prompt, *output[:-1]), len(output))
    follower.close()
    reader = _Rows(rows, len(prompt))
    guesser = ModelDraft(reader, prompt, params, Noise(SEED), coupled=True, vocab_size=rows.shape[1])  # type: ignore[arg-type]
    guesses = [guesser.guess(output[:i], 0) for i in range(len(output))]
    assert all(guesses)
    agrees = np.array([guess.token == token for guess, token in zip(guesses, output, strict=True)])  # type: ignore[union-attr]
    return Trace(output, agrees, np.array([guess.probability for guess in guesses]), len(prompt))  # type: ignore[union-attr]


class _Rows:
    """Rows that were computed in one forward, read like a follower's."""

    def __init__(self, rows: NDArray[np.float32], prompt: int) -> None:
        self._rows, self._prompt = rows, prompt

    def rows(self, tokens: tuple[int, ...], count: int) -> NDArray[np.float32]:
        """Of the last token only."""
        assert count == 1
        row: NDArray[np.float32] = self._rows[len(tokens) - self._prompt][None]
        return row


class Remembered:
    """A target and a draft that are asked once for every prefix, so that many schedules can write one text."""

    def __init__(self, target: Target, draft: Draft) -> None:
        self._target, self._draft = target, draft
        self._laws: dict[Path, Law] = {}
        self._guesses: dict[Path, Guess | None] = {}

    def laws(self, path: Path, tokens: Path) -> Sequence[Law]:
        """Drawn tokens stand for their laws: under `coupled` nothing else of a law matters."""
        whole = (*path, *tokens)
        wanted = [whole[:end] for end in range(len(path), len(whole) + 1)]
        if any(prefix not in self._laws for prefix in wanted):
            self._laws |= dict(zip(wanted, self._target.laws(path, tokens), strict=True))
        return [self._laws[prefix] for prefix in wanted]

    def guess(self, path: Path, round_id: int) -> Guess | None:
        """The draft's token."""
        if path not in self._guesses:
            self._guesses[path] = self._draft.guess(path, round_id)
        return self._guesses[path]


class RealText:
    """A text on real forwards; its KV goes back when it is closed."""

    def __init__(self, context: Context, draft: LLM, prompt: Sequence[int], params: SamplingParams) -> None:
        self._followers = follower_of(context.llm()), follower_of(draft)
        self._vocab = context.llm().engine.vocab_size
        self._prompt, self._params, self._noise = prompt, params, Noise(params.seed or 0)
        self.target: Target = ModelTarget(self._followers[0], prompt, params)
        self.draft: Draft = ModelDraft(
            self._followers[1], prompt, params, self._noise, coupled=True, vocab_size=self._vocab
        )
        self.stop_ids = () if params.ignore_eos else context.loaded.eos_token_ids

    def remember(self) -> RealText:
        """Ask the models once for every prefix from now on."""
        remembered = Remembered(_Drawn(self.target, self._noise, len(self._prompt), self._vocab), self.draft)
        self.target, self.draft = remembered, remembered
        return self

    def text(self, draft: Draft | None = None) -> Text:
        """To be written from the beginning."""
        return Text(
            self.target,
            draft or self.draft,
            CoupledRule(),
            self._noise,
            start=len(self._prompt),
            vocab_size=self._vocab,
            limit=self._params.max_tokens,
            stop_ids=self.stop_ids,
        )

    def close(self) -> None:
        """Give both KV sequences back."""
        for follower in self._followers:
            follower.close()


class _Drawn:
    """The target's own samples as points."""

    def __init__(self, target: Target, noise: Noise, start: int, vocab: int) -> None:
        self._target, self._noise, self._start, self._vocab = target, noise, start, vocab

    def laws(self, path: Path, tokens: Path) -> Sequence[Law]:
        at = self._start + len(path)
        laws = self._target.laws(path, tokens)
        return [Law.point(draw_target(law, self._noise, at + i, self._vocab)) for i, law in enumerate(laws)]


def seconds(texts: Sequence[Text], clock: Callable[[], Clock], schedule: Schedule) -> float:
    """Time of all texts, one by one, each on a clock of its own."""
    total = 0.0
    for text in texts:
        at = clock()
        at.spawn(schedule(at, text))
        at.run()
        total += text.times[-1]
    return total


def identity(context: Context, name: str, draft: LLM, write: Callable[[Text], None]) -> Row:
    """E0: a schedule on real forwards of both models, against plain greedy output."""
    prompts, tokens = context.prompts(context.few(20, 3)), context.few(32, 16)
    plain = context.greedy(prompts, tokens)
    same = forwards = 0
    for i, (prompt, output) in enumerate(zip(prompts, plain, strict=True)):
        context.say(f"{name}: {i} of {len(prompts)} prompts")
        real = RealText(context, draft, prompt, SamplingParams(temperature=0.0, max_tokens=tokens))
        text = real.text()
        write(text)
        real.close()
        same += text.path == output
        forwards += text.verdicts
    length = sum(map(len, plain)) / forwards
    note = f"prompts of {len(prompts)}, up to {tokens} tokens, fp32, real forwards; {length:.2f} tokens a verification"
    return exactly(f"E0: {name}, greedy output equals plain", same, len(prompts), note)


def acceptance(found: Sequence[Trace]) -> float:
    """Of all positions."""
    return float(np.concatenate([trace.agrees for trace in found]).mean())

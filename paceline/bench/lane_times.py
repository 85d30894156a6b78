"""What a lane for the draft model would find on this machine: forwards alone and beside each other, and acceptance."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from paceline.config import SamplingParams
from paceline.engine.rng import Noise
from paceline.lanes.choice import Choice, LaneTimes, choose
from paceline.lanes.models import Follower, ModelDraft, ModelTarget
from paceline.lanes.plain import speculation
from paceline.lanes.threads import Threads
from paceline.lanes.tokens import Text
from paceline.llm import LLM
from paceline.verify.coupled import CoupledRule

SIZES = (1, 2, 3, 4, 6, 8)
_REPEATS = 25


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine, a target and its draft."""

    threads: int
    """Of a model that runs alone; beside each other each has half of them."""
    alone: LaneTimes
    beside: LaneTimes
    acceptance: float

    @property
    def choice(self) -> Choice:
        """Whether lanes would pay."""
        return choose(self.alone, self.beside, self.acceptance)


def measure(target: LLM, draft: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> Machine:
    """Time forwards, and write greedy texts of `tokens` tokens to see how often the draft is right."""
    threads = torch.get_num_threads()
    alone, beside = times(target, draft, prompts[0], threads)
    accepted = tested = 0
    with Threads(["draft", "target"]) as lanes:
        for prompt in prompts:
            with real_text(target, draft, prompt, SamplingParams(temperature=0.0, max_tokens=tokens)) as text:
                lanes.run(speculation(lanes, text, 1))
                accepted, tested = accepted + sum(text.streaks), tested + text.verdicts
    return Machine(threads, alone, beside, min(accepted / tested, 0.999))


def times(target: LLM, draft: LLM, prompt: Sequence[int], threads: int) -> tuple[LaneTimes, LaneTimes]:
    """Of a target forward by size and of a draft token: each model alone, and both at once with half of the threads."""
    probes = _Probe(target, prompt), _Probe(draft, prompt)
    half = max(threads // 2, 1)
    try:
        alone = LaneTimes({n: probes[0].seconds(n) for n in SIZES}, probes[1].seconds(1))
        torch.set_num_threads(half)
        with _busy(probes[1], 1, half):
            target_beside = {n: probes[0].seconds(n) for n in SIZES}
        with _busy(probes[0], 2, half):
            draft_beside = probes[1].seconds(1)
    finally:
        torch.set_num_threads(threads)
        for probe in probes:
            probe.close()
    return alone, LaneTimes(target_beside, draft_beside)


@contextmanager
def real_text(target: LLM, draft: LLM, prompt: Sequence[int], params: SamplingParams) -> Iterator[Text]:
    """A text on real forwards of both models, its prompt read; the KV goes back at the end."""
    followers = [follower_of(llm) for llm in (target, draft)]
    noise, vocab = Noise(params.seed or 0), target.engine.vocab_size
    try:
        for follower in followers:
            follower.rows(tuple(prompt), 1)
        yield Text(
            ModelTarget(followers[0], prompt, params),
            ModelDraft(followers[1], prompt, params, noise, coupled=True, vocab_size=vocab),
            CoupledRule(),
            noise,
            start=len(prompt),
            vocab_size=vocab,
            limit=params.max_tokens,
            stop_ids=() if params.ignore_eos else target.loaded.eos_token_ids,
        )
    finally:
        for follower in followers:
            follower.close()


def follower_of(llm: LLM) -> Follower:
    """A sequence in the engine's cache."""
    return Follower(llm.engine.runner, llm.engine.stages.scheduler.blocks)


class _Probe:
    """Forwards of a size behind a prompt."""

    def __init__(self, llm: LLM, prompt: Sequence[int]) -> None:
        self._follower = follower_of(llm)
        self._prompt, self._vocab_size = tuple(prompt), llm.engine.vocab_size
        self._number = 0
        self._follower.rows(self._prompt, 1)

    def step(self, size: int) -> None:
        """One forward of `size` new tokens, other ones than before."""
        self._number += 1
        new = ((self._number + i) % self._vocab_size for i in range(size))
        self._follower.rows((*self._prompt, *new), size)

    def seconds(self, size: int) -> float:
        """Median."""
        taken = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            self.step(size)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def close(self) -> None:
        """Give the blocks back."""
        self._follower.close()


@contextmanager
def _busy(probe: _Probe, size: int, threads: int) -> Iterator[None]:
    """Keep a model at work in a thread of its own."""
    stop = threading.Event()

    def work() -> None:
        torch.set_num_threads(threads)
        while not stop.is_set():
            probe.step(size)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

"""A device that computes as late as it may: when samples are read, all steps up to there, in order.

It stands for the GPU in tests of the engine: rows enter the next step unread, logits are gone once another step was
launched, and what a launch got is copied, since the engine changes it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from paceline.arrays import IntArray
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law
from paceline.engine.types import NO_LAW
from paceline.model.runner import ForwardBatch, ModelRunner, RowDraws


@dataclass(eq=False)
class _Launched:
    batch: ForwardBatch
    draws: RowDraws
    logits: torch.Tensor
    overwritten: bool = False
    drawn: IntArray | None = None


class LateDevice:
    """Takes the place of a runner's graphs."""

    eager = False
    num_captures = 0

    def __init__(self, runner: ModelRunner, vocab_size: int, most_carried: int = 1024) -> None:
        self.most_carried = most_carried
        self.log: list[str] = []
        """`launch N`, `carry N` (a launch with unread samples) and `read N`."""
        self.drafts_behind = 0
        """Launches with draft nodes below samples that nobody has read."""
        self.fail_at: int | None = None
        """The launch whose samples cannot be read."""
        self._runner = runner
        self._vocab_size = vocab_size
        self._launched: list[_Launched] = []

    def launch(self, batch: ForwardBatch, draws: RowDraws) -> tuple[torch.Tensor, Callable[[], IntArray]]:
        """Keep a copy."""
        carries = any(s.carried >= 0 for s in batch.sequences)
        self.drafts_behind += any(s.carried >= 0 and len(s.token_ids) > 1 for s in batch.sequences)
        sequences = tuple(
            s._replace(token_ids=tuple(s.token_ids), blocks=tuple(s.blocks), positions=s.positions.copy())
            for s in batch.sequences
        )
        batch = ForwardBatch(sequences, tuple(batch.logit_rows))
        step = _Launched(batch, draws, torch.full((len(batch.logit_rows), self._vocab_size), float("nan")))
        if self._launched:
            self._launched[-1].overwritten = True
            self._launched[-1].logits.fill_(float("nan"))
        number = len(self._launched)
        self._launched.append(step)
        self.log.append(f"{'carry' if carries else 'launch'} {number}")

        def read() -> IntArray:
            assert number >= len(self._launched) - 2, "one step may be launched before another is read"
            self.log.append(f"read {number}")
            if number == self.fail_at:
                raise RuntimeError("the device failed")
            self._compute(number)
            assert step.drawn is not None
            return step.drawn

        return step.logits, read

    @torch.inference_mode()
    def _compute(self, last: int) -> None:
        for number, step in enumerate(self._launched[: last + 1]):
            if step.drawn is not None:
                continue
            before = self._launched[number - 1].drawn if number else None
            sequences = tuple(
                s if s.carried < 0 else s._replace(token_ids=(max(int(before[s.carried]), 0), *s.token_ids[1:]))  # type: ignore[index]
                for s in step.batch.sequences
            )
            batch = ForwardBatch(sequences, step.batch.logit_rows)
            logits, _ = self._runner._through_modules(batch, self._runner._metadata(batch), hidden=False)
            step.drawn = np.array([_draw(row, step.draws, i) for i, row in enumerate(logits.numpy())], dtype=np.int64)
            if not step.overwritten:
                step.logits.copy_(logits)


def _draw(values: np.ndarray, draws: RowDraws, row: int) -> int:
    if not np.isfinite(values.max()):
        return NO_LAW
    temperature = np.float32(draws.temperature[row])
    if temperature == 0.0:
        return int(values.argmax())
    noise = Noise(int(draws.seed.view(np.uint64)[row]), int(draws.sample_index[row]))
    return Law(values / temperature).draw(noise.words(int(draws.position[row]), Stream.TARGET, len(values)))

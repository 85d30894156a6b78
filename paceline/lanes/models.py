"""Target and draft of a text that are real models, each with a KV sequence of its own that rolls back by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.cache.block_manager import BlockManager
from paceline.config import SamplingParams
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law, build_law
from paceline.errors import BusyError
from paceline.lanes.tokens import Guess, Path
from paceline.model.runner import ForwardBatch, ModelRunner, SequenceInput
from paceline.verify.coupled import draw_target


class Follower:
    """One sequence in a model's cache.

    It is told whole sequences; what of one the cache holds already stays, what disagrees is overwritten.

    Args:
        runner: the model.
        blocks: its block manager.
    """

    def __init__(self, runner: ModelRunner, blocks: BlockManager) -> None:
        self._runner, self._blocks = runner, blocks
        self._tokens: tuple[int, ...] = ()
        self._table: list[int] = []

    def rows(self, tokens: tuple[int, ...], count: int) -> NDArray[np.float32]:
        """Logits after each of the last `count` tokens, in one forward.  # [count, vocab]

        Raises:
            BusyError: the KV cache has no room.
        """
        kept = min(_common(self._tokens, tokens), len(tokens) - count)
        if not self._blocks.grow(self._table, len(tokens)):
            raise BusyError("the KV cache has no room for this text.")
        new, self._tokens = tokens[kept:], tokens[:kept]
        item = SequenceInput(new, np.arange(kept, len(tokens)), kept, self._table)
        rows = self._runner.forward(ForwardBatch((item,), range(len(new) - count, len(new))))
        self._tokens = tokens
        return np.array(rows.float().cpu().numpy())

    def close(self) -> None:
        """Give the blocks back."""
        self._blocks.release(self._table)
        self._tokens = ()


class ModelTarget:
    """The target's laws of one text.

    Args:
        follower: its sequence.
        prompt: token ids.
        params: sampling options.
        stop_ids: tokens that `min_tokens` masks.
    """

    def __init__(
        self, follower: Follower, prompt: Sequence[int], params: SamplingParams, stop_ids: Sequence[int] = ()
    ) -> None:
        self._follower, self._prompt, self._params = follower, tuple(prompt), params
        self._stop_ids = tuple(stop_ids)

    def laws(self, path: Path, tokens: Path) -> Sequence[Law]:
        """One forward over whatever of the path the cache lacks, and the tokens."""
        whole = (*path, *tokens)
        rows = self._follower.rows((*self._prompt, *whole), len(tokens) + 1)
        return [
            build_law(row, self._params, self._prompt, whole[: len(path) + i], self._stop_ids)
            for i, row in enumerate(rows)
        ]


class ModelDraft:
    """What a draft model guesses of one text.

    Under `coupled` its token is drawn with the target's noise, at temperature 0 it is the likeliest; under other
    rules it is drawn with noise of its own and carries its law.

    Args:
        follower: its sequence.
        prompt: token ids.
        params: sampling options, the target's.
        noise: the text's.
        coupled: whether the rule shares its noise.
        vocab_size: the target's.
        stop_ids: tokens that `min_tokens` masks.
    """

    def __init__(
        self,
        follower: Follower,
        prompt: Sequence[int],
        params: SamplingParams,
        noise: Noise,
        *,
        coupled: bool,
        vocab_size: int,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self._follower, self._prompt, self._params = follower, tuple(prompt), params
        self._noise, self._coupled, self._vocab_size = noise, coupled or params.greedy, vocab_size
        self._stop_ids = tuple(stop_ids)

    def guess(self, path: Path, round_id: int) -> Guess | None:
        """The token after `path`: one forward over what the cache lacks."""
        (row,) = self._follower.rows((*self._prompt, *path), 1)
        law = build_law(row[: self._vocab_size], self._params, self._prompt, path, self._stop_ids)
        position = len(self._prompt) + len(path)
        probability = 1.0 / float(np.exp(row - row.max()).sum(dtype=np.float64))
        if self._coupled:
            return Guess(draw_target(law, self._noise, position, self._vocab_size), probability)
        words = self._noise.words(position, Stream.DRAFT, self._vocab_size, round_id=round_id)
        return Guess(law.draw(words), probability, law)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))

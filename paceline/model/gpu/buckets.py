"""Which captured shape serves a batch: every step is padded up to one of few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paceline.model.gpu.tiles import SOME
from paceline.model.kernels.batch import CHUNK_FROM, SPLIT_KEYS

_SMALL = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 144, 160)
"""The sizes up to where steps of 64 begin; a draft tree of 64 nodes has 65 tokens, 8 of 16 have 136."""
_SPLITS = (1, 16)
"""Splits of the keys of the longest sequence that memory is kept for, beside as many as there may be."""
_WIDE_TREE = 80
"""Tokens up to which steps are prepared for draft trees whatever the number of sequences."""
_TREE_WORDS = (0, 2, 16)
"""Every one of them is compiled for, which takes seconds; a word more costs a wide tree's mask next to nothing."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape that a graph is captured for."""

    tokens: int
    seqs: int
    rows: int
    """Of logits."""
    splits: int
    """Of the keys of a sequence that programs may share; 1: they share none."""
    tree_words: int
    """Words of 64 nodes in the widest draft tree; 0: chains only."""
    chunks: bool
    """Whether there are sequences with so many new tokens that they take the larger attention tiles."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes of one engine.

    Args:
        max_tokens: most tokens in a step.
        max_seqs: most sequences.
        max_model_len: longest sequence.
        max_rows: most rows of logits that memory is kept for.
    """

    max_tokens: int
    max_seqs: int
    max_model_len: int
    max_rows: int = 1024

    def sizes(self) -> Iterator[int]:
        """Numbers of tokens, ascending: powers of two and halves between them, then in wider steps."""
        last = 0
        for size in _SMALL:
            if last < self.max_tokens:
                last = size
                yield size
        while last < self.max_tokens:
            step = 64 if last < 512 else 128 if last < 1024 else 512
            last += step - last % step
            yield last

    @property
    def most_splits(self) -> int:
        """What the longest sequence fills."""
        return -(-self.max_model_len // SPLIT_KEYS)

    def find(self, new: list[int], rows: int, splits: int, tree_width: int) -> Bucket | None:
        """The bucket of a batch; None if it is larger than any.

        Args:
            new: new tokens of every sequence.
            rows: wanted rows of logits.
            splits: of the longest sequence in decode tiles if programs share them, otherwise 1.
            tree_width: nodes of the widest tree.
        """
        count = sum(new)
        tokens = next((size for size in self.sizes() if size >= max(count, rows)), None)
        words = words_of(tree_width)
        if tokens is None or words > _TREE_WORDS[-1] or len(new) > self.max_seqs or splits > self.most_splits:
            return None
        splits = next((s for s in _SPLITS if splits <= s < self.most_splits), self.most_splits)
        kept = self._rows(tokens, rows)
        return Bucket(tokens, min(tokens, self.max_seqs), kept, splits, words, max(new) >= CHUNK_FROM)

    def _rows(self, tokens: int, wanted: int) -> int:
        """Rows of logits of a bucket for so many tokens: all of a small one, otherwise few of a prompt's, or more."""
        if tokens <= SOME or wanted <= SOME:
            return min(tokens, SOME)
        return next(size for size in self.sizes() if size >= wanted)

    def first(self, *, trees: bool = False) -> Iterator[Bucket]:
        """What is captured before the first request: decoding at all sizes, chains of drafts too, prompts, and with
        `trees` small trees of drafts."""
        words = _TREE_WORDS[1] if trees else 0
        all_splits = {min(s, self.most_splits) for s in (*_SPLITS, self.most_splits)}
        for tokens in self.sizes():
            seqs = min(tokens, self.max_seqs)
            if tokens <= max(2 * self.max_seqs, _WIDE_TREE):
                for splits in all_splits:
                    yield Bucket(tokens, seqs, tokens, splits, 0, False)
                    if trees and tokens > 2:
                        yield Bucket(tokens, seqs, tokens, splits, words, False)
            else:
                for splits in all_splits:
                    yield Bucket(tokens, seqs, SOME, splits, 0, True)
        if trees:  # compiled with the first of their kind, captured for others in no time
            last = max(self.sizes())
            wide = next((size for size in self.sizes() if size > 64 * words), last)
            yield Bucket(last, min(last, self.max_seqs), SOME, 1, words, True)
            yield Bucket(wide, min(wide, self.max_seqs), wide, 1, _TREE_WORDS[-1], True)
            if self.most_splits > 1 and self.max_seqs > 1:  # a tree so wide is a chunk beside others
                yield Bucket(wide, min(wide, self.max_seqs), wide, self.most_splits, _TREE_WORDS[-1], True)


def words_of(tree_width: int) -> int:
    """Words of 64 nodes for so many, of the few numbers of words that anything is compiled for."""
    return next((words for words in _TREE_WORDS if 64 * words >= tree_width), -(-tree_width // 64))

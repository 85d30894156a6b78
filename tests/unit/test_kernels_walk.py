"""Acceptance on the device: the walks are those of the CPU's rules, for the same trees, laws and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("triton")

from sampling_tools import DEVICE, host, law_of, limits, places, temperatures

from paceline.config import SamplingParams
from paceline.engine.draft_tree import DraftTree, Origin
from paceline.engine.rng import Noise
from paceline.engine.sampling import Law
from paceline.engine.types import Walk
from paceline.model.kernels.draw import draw_rows
from paceline.model.kernels.limits import find_cut
from paceline.model.kernels.peaks import find_peaks
from paceline.model.kernels.reject import walk_rejection
from paceline.model.kernels.rows import LogitRows
from paceline.model.kernels.walk import Trees, Walks, walk_coupled
from paceline.verify.base import AcceptanceRule
from paceline.verify.coupled import CoupledRule
from paceline.verify.rejection import RejectionRule

OPTIONS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_k=3),
    SamplingParams(temperature=1.3, top_p=0.8),
)


@dataclass
class Batch:
    """Requests with their trees, laws and noise."""

    trees: list[DraftTree]
    logits: torch.Tensor  # [rows, vocab]
    params: list[SamplingParams]
    noises: list[Noise]
    starts: list[int]

    @property
    def first_row(self) -> list[int]:
        """Row of each root."""
        return np.cumsum([0, *(len(tree) + 1 for tree in self.trees[:-1])]).tolist()

    def by_row(self, values: Sequence) -> list:
        """One value per request, repeated for its rows."""
        return [value for value, tree in zip(values, self.trees, strict=True) for _ in range(len(tree) + 1)]

    def positions(self) -> list[int]:
        """Where each row's next token stands."""
        return [s + d for s, tree in zip(self.starts, self.trees, strict=True) for d in [0, *tree.depths().tolist()]]

    def flat(self) -> Trees:
        """The trees on the device."""

        def column(numbers: Sequence[int]) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

        return Trees(
            column([t for tree in self.trees for t in tree.tokens.tolist()] + [0]),
            column([p for tree in self.trees for p in tree.parents.tolist()] + [-1]),
            column(np.cumsum([0, *map(len, self.trees)]).tolist()),
            column(self.first_row),
            max(map(len, self.trees)),
            max(max(tree.depths().tolist(), default=0) for tree in self.trees) + 1,
        )

    def expected(self, rule: AcceptanceRule) -> list[Walk]:
        """What the CPU's rule decides."""
        rows, walks = host(self.logits), []
        for tree, first, params, noise, start in zip(
            self.trees, self.first_row, self.params, self.noises, self.starts, strict=True
        ):

            def law(node: int, path: Sequence[int], first: int = first, params: SamplingParams = params) -> Law:
                assert path is not None
                return law_of(rows[first + 1 + node], params)

            walks.append(rule.accept(tree, law, noise, start, self.logits.shape[1]))
        return walks

    def check(self, walks: Walks, rule: AcceptanceRule) -> None:
        """The device decided the same."""
        for i, walk in enumerate(self.expected(rule)):
            count = int(walks.count[i])
            assert walks.tokens[i, :count].tolist() == list(walk.tokens), i
            assert walks.path[i, : count - 1].tolist() == [self.first_row[i] + 1 + node for node in walk.path]
            assert (walks.tokens[i, count:] == -1).all()
            assert (walks.path[i, count - 1 :] == -1).all()


def tree_of(tokens: list[int], parents: list[int], laws: tuple[Law, ...] | None = None) -> DraftTree:
    n = len(tokens)
    return DraftTree(
        np.array(tokens, dtype=np.int64),
        np.array(parents, dtype=np.int64),
        ("test",) * n,
        np.zeros(n, dtype=np.int64),
        np.ones(n),
        Origin.CHOSEN if laws is None else Origin.INDEPENDENT,
        laws,
    )


def batch_of(trees: list[DraftTree], vocab: int, rng: np.random.Generator, params: Sequence[SamplingParams]) -> Batch:
    rows = sum(len(tree) + 1 for tree in trees)
    logits = torch.from_numpy(rng.normal(0, 1.5, (rows, vocab)).astype(np.float32)).bfloat16()
    noises = [Noise(int(rng.integers(2**63)), int(rng.integers(4))) for _ in trees]
    starts = rng.integers(0, 1000, len(trees)).tolist()
    return Batch(trees, logits, [params[i % len(params)] for i in range(len(trees))], noises, starts)


def random_tree(size: int, vocab: int, rng: np.random.Generator) -> DraftTree:
    """Siblings may repeat a token: the first one is walked."""
    return tree_of(rng.integers(vocab, size=size).tolist(), [int(rng.integers(-1, i)) for i in range(size)])


def test_coupled_walks_as_the_cpu_does() -> None:
    rng = np.random.default_rng(1)
    lengths = set()
    for vocab, sizes in ((4, [0, 1, 40, 7, 23, 12]), (1000, [3, 0, 12])):
        batch = batch_of([random_tree(n, vocab, rng) for n in sizes], vocab, rng, OPTIONS)
        rows, heat = LogitRows(batch.logits.to(DEVICE)), temperatures(batch.by_row(batch.params))
        peaks = find_peaks(rows, heat)
        cut = find_cut(rows, heat, limits(batch.by_row(batch.params)), peaks)
        drawn = draw_rows(rows, places(batch.by_row(batch.noises), batch.positions()), heat, cut, peaks)
        walks = walk_coupled(drawn, batch.flat())
        batch.check(walks, CoupledRule())
        lengths |= set(walks.count.tolist())
    assert max(lengths) > 2


def test_a_row_without_a_law_fails_only_walks_that_come_to_it() -> None:
    rng = np.random.default_rng(3)
    trees = [tree_of([0, 1], [-1, -1]) for _ in range(3)]
    batch = batch_of(trees, 4, rng, OPTIONS[:1])
    batch.logits[:] = torch.tensor([5.0, 0, 0, 0])
    batch.logits[0] = float("nan")  # the root of the first
    batch.logits[4] = float("nan")  # an accepted node of the second
    batch.logits[8] = float("nan")  # a rejected node of the third
    rows, heat = LogitRows(batch.logits.to(DEVICE)), temperatures(batch.by_row(batch.params))
    where = places(batch.by_row(batch.noises), batch.positions())
    coupled = walk_coupled(draw_rows(rows, where, heat), batch.flat())
    assert coupled.count.tolist() == [0, 0, 2]
    chains = batch_of([tree_of([0, 1], [-1, 0])] * 3, 4, rng, OPTIONS[:1])
    rejection = walk_rejection(rows, where, heat, find_peaks(rows, heat), chains.flat())
    assert rejection.count.tolist() == [0, 0, 2]


def chain(length: int, vocab: int, rng: np.random.Generator, drawn: bool) -> tuple[DraftTree, np.ndarray]:
    """A chain of tokens drawn from fp32 laws, or chosen."""
    laws = rng.dirichlet(np.full(vocab, 0.5), length).astype(np.float32).reshape(length, vocab)
    tokens = [int(rng.choice(vocab, p=q.astype(np.float64) / q.sum(dtype=np.float64))) for q in laws]
    carried = tuple(Dense(np.log(np.maximum(q, 1e-300)), None) for q in laws.astype(np.float64))
    for law, q in zip(carried, laws, strict=True):
        object.__setattr__(law, "logits", q.astype(np.float64))
    return tree_of(tokens, list(range(-1, length - 1)), carried if drawn else None), laws


class Dense(Law):
    """A draft law that is its probabilities: the device reads just these numbers."""

    def probabilities(self, vocab_size: int) -> np.ndarray:
        return np.asarray(self.logits[:vocab_size], dtype=np.float64)

    def can_draw(self, token: int) -> bool:
        return bool(self.logits[token] > 0)

    def weights(self) -> np.ndarray:
        return np.asarray(self.logits)


@pytest.mark.parametrize("drawn", [False, True])
def test_rejection_walks_as_the_cpu_does(drawn: bool) -> None:
    rng = np.random.default_rng(6)  # a seed under which some walks are long
    counts: set[int] = set()
    for vocab, sizes in ((2, [0, 1, 4, 6, 2, 5, 3, 6, 6, 6]), (1500, [3, 0, 2, 4])):
        chains = [chain(n, vocab, rng, drawn) for n in sizes]
        trees = [tree if len(tree) else tree_of([], [], () if drawn else None) for tree, _ in chains]
        params = OPTIONS[1:] if drawn else OPTIONS  # greedy drawn chains are walked by `coupled` on the CPU
        batch = batch_of(trees, vocab, rng, params)
        rows, heat = LogitRows(batch.logits.to(DEVICE)), temperatures(batch.by_row(batch.params))
        peaks = find_peaks(rows, heat)
        cut = find_cut(rows, heat, limits(batch.by_row(batch.params)), peaks)
        laws = torch.from_numpy(np.concatenate([q for _, q in chains])).to(DEVICE) if drawn else None
        where = places(batch.by_row(batch.noises), batch.positions())
        walks = walk_rejection(rows, where, heat, peaks, batch.flat(), cut, laws)
        batch.check(walks, RejectionRule())
        counts |= set(walks.count.tolist())
    assert max(counts) > 2


def test_rejection_keeps_the_targets_law() -> None:
    """First tokens of many drawn chains; odds of a false alarm: 1e-6 for a seed chosen afresh."""
    rng, vocab, requests = np.random.default_rng(6), 4, 25 if DEVICE.type == "cpu" else 5000
    q = np.array([[0.6, 0.1, 0.1, 0.2]], dtype=np.float32)
    row = torch.tensor([0.0, 1.0, -1.0, 0.5])
    counts = np.zeros(vocab)
    for _ in range(2):
        trees = [tree_of([int(rng.choice(vocab, p=[0.6, 0.1, 0.1, 0.2]))], [-1]) for _ in range(requests)]
        batch = batch_of(trees, vocab, rng, OPTIONS[1:2])
        rows = LogitRows(row.expand(2 * requests, vocab).contiguous().to(DEVICE))
        heat = torch.ones(2 * requests, device=DEVICE)
        where = places(batch.by_row(batch.noises), batch.positions())
        laws = torch.from_numpy(q.repeat(requests, axis=0)).to(DEVICE)
        walks = walk_rejection(rows, where, heat, find_peaks(rows, heat), batch.flat(), None, laws)
        counts += np.bincount(walks.tokens[:, 0].cpu().numpy(), minlength=vocab)
    expected = torch.softmax(row.double(), 0).numpy() * counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-6

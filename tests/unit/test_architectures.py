"""Every architecture gives what `transformers` gives: greedy text token for token in fp32, and a draft tree's logits.

The reference is `transformers`' own `generate` with its eager attention over the same random weights. Prompts are
shorter and longer than the sliding window (24), and outputs are checked to be no endless repetition of one token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_tools import (
    batch_of,
    greedy,
    llm,
    make_request,
    make_runner,
    prompt_of,
    reference,
    reference_logits,
    tree,
)
from fakes import ARCHITECTURES

from paceline.engine.draft_tree import EMPTY_TREE, DraftTree
from paceline.engine.types import DraftBatch
from paceline.verify.verifier import Verifier

PROMPTS = [prompt_of(n) for n in (1, 8, 27, 80)]
NEW = 24
SPECULATION = ("none", "ngram:k=4", "recycling:k=24", "ngram:k=3+recycling:k=24+prediction:k=6")
architectures = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))


def expected(architecture: str) -> list[tuple[int, ...]]:
    outputs = [reference(p, NEW, architecture) for p in PROMPTS]
    assert all(len(set(output)) >= 8 for output in outputs), "a degenerate reference proves nothing"
    return outputs


@architectures
@pytest.mark.parametrize("speculation", SPECULATION)
@pytest.mark.parametrize("chunk", [512, 13])
def test_greedy_equals_transformers(architecture: str, speculation: str, chunk: int) -> None:
    """One batch of all prompts, twice: the second time from the prefix cache and with warm drafters."""
    outputs = expected(architecture)
    # A prediction with one wrong word, so that long drafts are accepted, rejected and resumed.
    texts = [" ".join(f"w{t}" for t in (*output[:9], 77, *output[10:])) for output in outputs]
    engine = llm(speculation, architecture, max_num_batched_tokens=chunk)
    for turn in range(2):
        params = [greedy(NEW, prediction=text) for text in texts]
        found = engine.generate(PROMPTS, params)
        assert [g.token_ids for g in found] == outputs
        assert (found[3].stats.cached_tokens >= 64) == (turn == 1)
        if "recycling" in speculation and turn == 1:
            least = 2 * NEW if "prediction" in speculation else 8
            assert sum(g.stats.accepted_tokens for g in found) >= least, "hardly a draft was accepted"
        if "prediction" in speculation:
            # In one prompt's output the wrong word may cost more; every one must have profited.
            assert all(g.stats.target_forwards < NEW - 8 for g in found)


@architectures
def test_each_prompt_alone_gives_the_same(architecture: str) -> None:
    engine = llm("ngram:k=4+recycling:k=12", architecture, max_num_batched_tokens=13, enable_prefix_caching=False)
    for prompt, output in zip(PROMPTS, expected(architecture), strict=True):
        (found,) = engine.generate([prompt], greedy(NEW))
        assert found.token_ids == output
        assert found.stats.cached_tokens == 0


@architectures
@pytest.mark.parametrize("block_size", [1, 5])
def test_odd_block_sizes(architecture: str, block_size: int) -> None:
    engine = llm("recycling:k=24", architecture, block_size=block_size, max_num_batched_tokens=13)
    for _ in range(2):
        found = engine.generate(PROMPTS, greedy(NEW))
        assert [g.token_ids for g in found] == expected(architecture)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to fp32 rounding, measured against the largest logit."""
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def random_tree(size: int, seed: int) -> DraftTree:
    """Many nodes per position: parents are drawn from the root and the nodes before."""
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(max(-1, i - 12), i)) for i in range(size)]
    return tree(rng.integers(3, 96, size).tolist(), parents)


def scores_of(architecture: str, tokens: list[int], draft: DraftTree, computed: int, table: list[int]) -> torch.Tensor:
    """Logits of the root and the nodes behind `tokens`, `computed` of which go through the network beforehand."""
    runner = make_runner(architecture)
    request = make_request(tokens)
    request.blocks = table
    verifier = Verifier(runner)
    if computed:
        verifier.verify(batch_of(request, chunk=computed), DraftBatch(()))
        request.num_computed = computed
    return verifier.verify(batch_of(request), DraftBatch((draft,))).logits


@architectures
@pytest.mark.parametrize(("length", "size"), [(10, 12), (30, 12), (70, 44)])
def test_a_tree_scores_like_its_paths(architecture: str, length: int, size: int) -> None:
    """Each node's logits are those of its root-to-node path, run as a chain here and by `transformers`."""
    tokens = list(prompt_of(length))
    draft = random_tree(size, seed=length)
    depths = draft.depths()
    assert np.bincount(depths).max() >= 3, "several nodes share a position"
    table = list(range(12))
    for computed in (length - 1, length - 5):
        logits = scores_of(architecture, tokens, draft, computed, table)
        assert len(logits) == size + 1
        for node in range(size):
            path = np.flatnonzero(draft.ancestor_mask()[node])
            assert len(path) == depths[node]
            picked = draft.tokens[path].tolist()
            chain = tree(picked, list(range(-1, len(path) - 1)))
            alone = scores_of(architecture, tokens, chain, length - 1, table)
            assert_close(logits[node + 1], alone[-1])
            whole = reference_logits(tokens + picked, architecture)
            assert_close(logits[node + 1], whole[-1])


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_windows_compare_positions_in_a_tree_deeper_than_the_window(architecture: str) -> None:
    """Eight siblings stand before a chain of 34: slots run ahead of positions by seven."""
    tokens = list(prompt_of(10))
    draft = tree([5 + i for i in range(42)], [-1] * 8 + list(range(7, 41)))
    logits = scores_of(architecture, tokens, draft, 9, list(range(12)))
    whole = reference_logits(tokens + draft.tokens[7:].tolist(), architecture)
    assert_close(logits[8:], whole[10:])


@architectures
def test_the_place_of_blocks_does_not_matter(architecture: str) -> None:
    tokens, draft = list(prompt_of(60)), random_tree(20, seed=1)
    table = list(range(8))
    straight = scores_of(architecture, tokens, draft, 40, table)
    shuffled = scores_of(architecture, tokens, draft, 40, [61, 3, 17, 0, 42, 5, 9, 33])
    torch.testing.assert_close(straight, shuffled, rtol=0, atol=0)


@architectures
def test_batched_rows_score_like_single_ones(architecture: str) -> None:
    """A ragged batch of a chunk, a decode with a tree and a plain decode equals the three runs alone."""
    runner = make_runner(architecture)
    verifier = Verifier(runner)
    chunk, branching, plain = (make_request(prompt_of(n, seed=5)) for n in (40, 33, 29))
    chunk.blocks, branching.blocks, plain.blocks = [0, 1, 2], [3, 4, 5, 6], [7, 8]
    for request in (branching, plain):
        computed = len(request.token_ids) - 1
        verifier.verify(batch_of(request, chunk=computed), DraftBatch(()))
        request.num_computed = computed
    draft = random_tree(15, seed=2)
    scores = verifier.verify(batch_of(chunk, branching, plain), DraftBatch((EMPTY_TREE, draft, EMPTY_TREE)))
    assert scores.first_row == (0, 1, 17)
    assert runner.num_tokens == 32 + 28 + 40 + (1 + 15) + 1
    for request, row in zip((chunk, branching, plain), scores.first_row, strict=True):
        alone = reference_logits(request.token_ids, architecture)[-1]
        assert_close(scores.logits[row], alone)
    alone = scores_of(architecture, branching.token_ids, draft, 32, list(range(4)))
    assert_close(scores.logits[1:17], alone)

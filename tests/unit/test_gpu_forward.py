"""The forward in our own kernels against `transformers`: under Triton's interpreter, or on a GPU if there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import make_loaded
from kernel_tools import DEVICE
from torch.testing import assert_close

pytest.importorskip("triton")

from paceline.cache.paged_kv import PagedKV
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import Law
from paceline.engine.types import NO_LAW
from paceline.model.gpu import graphs
from paceline.model.gpu.buckets import Bucket, Buckets
from paceline.model.gpu.graphs import GraphRunner
from paceline.model.gpu.weights import is_llama_like
from paceline.model.kernels.batch import CHUNK_FROM
from paceline.model.kernels.embed import embed, embed_twin
from paceline.model.path import ForwardPath
from paceline.model.runner import ForwardBatch, ModelRunner, RowDraws, SequenceInput, kv_shape

BUCKETS = Buckets(max_tokens=128, max_seqs=4, max_model_len=400)
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 24, "head_dim": 16},
}


def pair(architecture: str) -> tuple[ModelRunner, GraphRunner]:
    """The same tiny model through `transformers` and through the kernels, each with a cache of its own."""
    changes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    loaded = make_loaded(architecture, **{**changes, **FAMILIES[architecture]}, max_position_embeddings=400)
    model = loaded.model.to(DEVICE)
    assert is_llama_like(model)
    caches = [PagedKV(kv_shape(loaded.config, torch.float32), 64, 16, DEVICE) for _ in range(2)]
    return ModelRunner(model, caches[0], DEVICE), GraphRunner(model, caches[1], BUCKETS)


def sequence(num_new: int, context: int, blocks: range, seed: int = 0) -> SequenceInput:
    """New tokens in causal order."""
    tokens = np.random.default_rng(seed).integers(3, 90, num_new).tolist()
    return SequenceInput(tokens, np.arange(context, context + num_new), context, list(blocks))


def tree(context: int, blocks: range) -> SequenceInput:
    """A root and seven draft nodes."""
    parents = (-1, 0, 0, 1, 1, 2, 3, 3)
    visible = np.eye(8, dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            visible[node] |= visible[parent]
    positions = context + visible.sum(axis=1) - 1
    return SequenceInput(list(range(10, 18)), positions, context, list(blocks), visible, num_causal=1)


def compare(slow: ModelRunner, fast: GraphRunner, batch: ForwardBatch) -> None:
    """Logits of both."""
    with torch.inference_mode():
        found, _ = fast.run(batch)
    assert_close(found, slow.forward(batch).float(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_are_those_of_transformers(architecture: str) -> None:
    slow, fast = pair(architecture)
    first, second, third = range(1, 8), range(8, 14), range(14, 18)
    compare(slow, fast, ForwardBatch((sequence(20, 0, first), sequence(5, 0, second, 1)), [19, 24]))
    compare(slow, fast, ForwardBatch((sequence(1, 20, first, 2), tree(5, second)), range(9)))
    chunk = sequence(70, 0, range(18, 24), 3)
    compare(slow, fast, ForwardBatch((chunk, sequence(1, 21, first, 4), sequence(2, 0, third, 5)), [69, 70, 72]))


def test_parts_of_the_model_are_those_of_transformers() -> None:
    """A layer skipped, and layers that attend side by side; the whole model is as it was afterwards."""
    slow, fast = pair("qwen3")
    prompt = sequence(20, 0, range(1, 4))
    compare(slow, fast, ForwardBatch((prompt,), [19]))
    one = sequence(1, 20, range(1, 4), 2)
    for path in (ForwardPath.without(3, [1]), ForwardPath(((0,), (1, 2))), None):
        compare(slow, fast, ForwardBatch((one,), [0], path))


def test_a_step_beyond_every_bucket_runs_all_the_same() -> None:
    slow, fast = pair("llama")
    compare(slow, fast, ForwardBatch((sequence(140, 0, range(1, 12)),), [0, 139]))


def test_long_contexts_share_the_room_for_splits_or_take_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows over two splits of the keys, with room for five, and for two."""
    for room in (5, 2):
        monkeypatch.setattr(graphs, "_MOST_PARTIALS", room * 4 * 2 * 17 * 4)
        slow, fast = pair("llama")
        blocks = range(1, 25)
        compare(slow, fast, ForwardBatch((sequence(100, 0, blocks), sequence(1, 0, range(25, 26))), [99, 100]))
        compare(slow, fast, ForwardBatch((sequence(120, 100, blocks, 1),), [119]))
        compare(slow, fast, ForwardBatch((sequence(64, 220, blocks, 2),), [63]))
        after = sequence(5, 284, blocks, 3)
        assert fast._fits(Bucket(5, 4, 5, 2, 0, False), 5) == (room == 5)
        compare(slow, fast, ForwardBatch((after,), range(5)))


def test_where_there_is_no_room_for_parts_no_keys_are_shared() -> None:
    """The same bits come from one program for a tile, in the same bucket's graph."""
    buckets = Buckets(max_tokens=64, max_seqs=4, max_model_len=100_000)
    assert buckets.find([1, 1], 2, 9, 0) == Bucket(2, 2, 2, 16, 0, False)
    assert buckets.find([1, 1], 2, 17, 0) == Bucket(2, 2, 2, 391, 0, False)
    assert {bucket.splits for bucket in buckets.first()} == {1, 16, 391}
    slow, fast = pair("llama")
    compare(slow, fast, ForwardBatch((sequence(120, 0, range(1, 25)),), [119]))
    compare(slow, fast, ForwardBatch((sequence(160, 120, range(1, 25), 1),), [159]))
    fast._scratch = replace(fast._scratch, splits=fast._scratch.splits[:0])
    compare(slow, fast, ForwardBatch((sequence(5, 280, range(1, 25), 2),), range(5)))
    assert [bucket.splits for bucket, _ in fast._captured if bucket.tokens == 8] == [1]


def test_a_shape_that_is_captured_late_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes three times before, its buffers describe the last, and those slots are another request's now."""
    slow, fast = pair("llama")
    blocks = range(1, 8)
    compare(slow, fast, ForwardBatch((sequence(20, 0, blocks),), [19]))
    captures: list[list[int]] = []

    def capture(captured: Any, path: Any) -> None:
        before = fast._kv.slots.clone()
        fast._compile(captured, path)
        captures.append((fast._kv.slots != before).flatten(3).any(-1).any(0).any(0).nonzero().flatten().tolist())

    monkeypatch.setattr(fast, "eager", False)
    monkeypatch.setattr(fast, "_capture", capture)
    known = fast.num_captures
    for step in range(5):
        compare(slow, fast, ForwardBatch((sequence(1, 20 + step, blocks, step),), [0]))
        if step == 2:  # the request ends, and its blocks go to another
            compare(slow, fast, ForwardBatch((sequence(25, 0, blocks, 7),), [24]))
    assert captures[0] == []
    assert fast.num_captures - known == 6, "none of these steps tells what its kind takes"


def test_rows_may_be_asked_for_twice_and_be_many() -> None:
    """Log-probabilities of prompts ask for the last row beside the root's."""
    slow, fast = pair("llama")
    batch = ForwardBatch((sequence(64, 0, range(1, 6)),), [*range(64), 63])
    compare(slow, fast, batch)
    none = RowDraws(np.zeros(65, dtype=np.bool_), np.zeros(65), *(np.zeros(65, dtype=np.int64) for _ in range(3)))
    assert len(fast.launch(batch, none)[1]()) == 65
    rows = [*range(140)] * 2
    none = RowDraws(np.zeros(280, dtype=np.bool_), np.zeros(280), *(np.zeros(280, dtype=np.int64) for _ in range(3)))
    logits, read = fast.launch(ForwardBatch((sequence(140, 0, range(1, 12)),), rows), none)
    assert read().tolist() == logits.argmax(dim=1).tolist()


def test_blocks_beyond_the_new_tokens_do_not_matter() -> None:
    slow, fast = pair("llama")
    compare(slow, fast, ForwardBatch((sequence(5, 0, range(1, 60)),), [4]))


def test_draws_are_those_of_the_cpu() -> None:
    _, fast = pair("llama")
    noise = Noise(2**63 + 5, 1)
    batch = ForwardBatch((sequence(4, 0, range(1, 3)),), range(4))
    temperature = np.array([0.0, 1.0, 0.6, 1.0])
    seed = np.full(4, noise.seed, dtype=np.uint64).view(np.int64)
    draws = RowDraws(np.ones(4, dtype=np.bool_), temperature, seed, np.full(4, 1), np.arange(7, 11))
    logits, read = fast.launch(batch, draws)
    drawn = read()
    for row, (values, t) in enumerate(zip(logits.cpu().numpy(), temperature, strict=True)):
        words = noise.words(7 + row, Stream.TARGET, len(values))
        expected = values.argmax() if t == 0.0 else Law(values / np.float32(t)).draw(words)
        assert drawn[row] == expected


def test_rows_without_a_law_are_named() -> None:
    _, fast = pair("llama")
    fast._weights.norm.fill_(float("nan"))
    plain = RowDraws(np.ones(1, dtype=np.bool_), np.zeros(1), *(np.zeros(1, dtype=np.int64) for _ in range(3)))
    _, read = fast.launch(ForwardBatch((sequence(1, 0, range(1, 2)),), [0]), plain)
    assert read().tolist() == [NO_LAW]


def test_samples_enter_the_next_step_before_they_are_read() -> None:
    """Also where the step's bucket is captured only then, and where sequences are put in another order."""
    _, fast = pair("llama")
    _, slow = pair("llama")
    greedy = RowDraws(np.ones(2, dtype=np.bool_), np.zeros(2), *(np.zeros(2, dtype=np.int64) for _ in range(3)))
    first = ForwardBatch((sequence(5, 0, range(1, 3)), sequence(4, 0, range(3, 5), 1)), [4, 8])
    unread = [fast.launch(first, greedy)[1]]
    known = slow.launch(first, greedy)[1]().tolist()
    for step in range(3):
        place = [5 + step, 4 + step]
        chunk = (sequence(70, 0, range(8, 14), 3),) if step == 2 else ()

        def batch(tokens: list[int], carried: list[int], *, place=place, chunk=chunk) -> ForwardBatch:
            ones = [
                SequenceInput([token], np.array([at]), at, list(blocks), carried=row)
                for token, at, blocks, row in zip(tokens, place, (range(1, 3), range(3, 5)), carried, strict=True)
            ]
            return ForwardBatch((*chunk, *ones), [len(chunk) * 70, len(chunk) * 70 + 1])

        unread.append(fast.launch(batch([0, 0], [0, 1]), greedy)[1])
        assert unread[-2]().tolist() == known
        known = slow.launch(batch(known, [-1, -1]), greedy)[1]().tolist()
    assert unread[-1]().tolist() == known


def test_embeddings_are_those_of_the_twin() -> None:
    rng = np.random.default_rng(0)
    embedding = torch.randn(50, 72, device=DEVICE)
    drawn = torch.tensor([3, NO_LAW, 49], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor(rng.integers(0, 50, 7), device=DEVICE)
    carried = torch.tensor([-1, 2, -1, 0, 1, -1, 2], device=DEVICE)
    out = torch.full((7, 72), float("nan"), device=DEVICE)
    assert torch.equal(embed(tokens, carried, drawn, embedding, out), embed_twin(tokens, carried, drawn, embedding))
    assert torch.equal(out[1], embedding[49])
    assert torch.equal(out[4], embedding[0])


def test_buckets_hold_what_they_are_found_for() -> None:
    buckets = Buckets(max_tokens=600, max_seqs=32, max_model_len=4096)
    assert buckets.find([1], 1, 1, 0) == Bucket(1, 1, 1, 1, 0, False)
    assert buckets.find([3, 1], 4, 2, 3) == Bucket(4, 4, 4, 16, 2, False)
    assert buckets.find([80, 1], 2, 1, 0) == Bucket(96, 32, 64, 1, 0, True)
    assert buckets.find([65], 65, 1, 64) == Bucket(80, 32, 80, 1, 2, False), "a tree of 64 nodes and its root"
    assert buckets.find([700], 1, 1, 0) is None
    assert buckets.find([1] * 33, 33, 1, 0) is None
    assert buckets.find([1], 1, 17, 0) is None
    sizes = list(buckets.sizes())
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= 600
    for engine in (buckets, Buckets(max_tokens=520, max_seqs=1, max_model_len=300)):
        wanted = [*engine.first(trees=True)]
        assert {*engine.first()} == {bucket for bucket in wanted if not bucket.tree_words}
        assert len(wanted) == len({*wanted})
        for bucket in wanted:  # none is captured in vain
            ones = [1] * (0 if bucket.chunks else bucket.seqs - 1)
            most = bucket.tokens if bucket.chunks else CHUNK_FROM - 1
            new = [min(bucket.tokens - len(ones), most), *ones]
            rows = bucket.rows if bucket.chunks else sum(new)
            assert engine.find(new, rows, bucket.splits, 64 * bucket.tree_words) == bucket

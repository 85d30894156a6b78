"""The batch that the host builds: against the mask of the torch path, and filled again and again."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernel_tools import BLOCK_SIZE, DEVICE, Sequence, bushy, make, tree_of

from paceline.model.attention import SequenceAttention
from paceline.model.kernels.host import BatchBuffers, BatchShape, Tree
from paceline.model.kernels.layout import lay_slots, lay_tiles, share_splits
from paceline.model.kernels.twins import sees


@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize("sequence", [Sequence(21), Sequence(0, 7), tree_of(20, bushy(9)), tree_of(20, bushy(70), 4)])
def test_who_sees_whom_is_what_the_torch_path_says(sequence: Sequence, window: int | None) -> None:
    batch = make([sequence]).batch
    tree = sequence.tree()
    torch_path = SequenceAttention(
        0,
        sequence.num_new,
        sequence.context_len,
        torch.empty(0),
        sequence.positions(),
        None if tree is None else tree.visible,
        *([] if tree is None else [tree.tail_positions]),
    )
    expected = torch_path._seen(window)
    for row in range(sequence.num_new):
        index = np.arange(torch_path.num_keys) if expected is None else np.nonzero(expected[row])[0]
        assert sees(batch, 0, row, window).tolist() == index.tolist()


def test_bits_of_a_tree_fill_whole_words() -> None:
    visible = np.zeros((2, 128), dtype=np.bool_)
    visible[0, [0, 63]] = visible[1, 64] = True
    assert Tree(visible).words(2).tolist() == [[1 - (1 << 63), 0], [0, 1]]


def fill(buffers: BatchBuffers, sequences: list[Sequence]) -> None:
    blocks = [-(-(s.context_len + s.num_new) // BLOCK_SIZE) for s in sequences]
    buffers.fill(
        [s.num_new for s in sequences],
        [s.context_len for s in sequences],
        [list(range(10 * i, 10 * i + n)) for i, n in enumerate(blocks)],
        np.concatenate([s.positions() for s in sequences]),
        [s.tree() for s in sequences],
    )


def test_a_buffer_used_again_describes_the_new_step_only() -> None:
    shape = BatchShape(max_tokens=40, max_seqs=4, max_blocks=6, block_size=BLOCK_SIZE, groups=3)
    used, fresh = BatchBuffers(shape, DEVICE), BatchBuffers(shape, DEVICE)
    fill(used, [tree_of(40, bushy(20)), tree_of(9, bushy(8), 2), Sequence(60)])
    held = used.batch
    fill(used, [Sequence(5), Sequence(70, 2)])
    fill(fresh, [Sequence(5), Sequence(70, 2)])
    assert used.batch is held, "a graph replays with the same tensors"
    for name in ("slot_mapping", "query_start"):
        assert torch.equal(getattr(used.batch, name), getattr(fresh.batch, name))
    for name in ("context_len", "key_start", "key_end", "tree_start"):
        assert torch.equal(getattr(used.batch, name)[:2], getattr(fresh.batch, name)[:2])
    for mine, other in zip(used.batch.tiles, fresh.batch.tiles, strict=True):
        assert torch.equal(mine.seq, other.seq)
        assert torch.equal(mine.start[mine.seq >= 0], other.start[mine.seq >= 0])


def test_every_field_is_aligned() -> None:
    batch = make([tree_of(5, bushy(3)), Sequence(3)]).batch
    tensors = [getattr(batch, field.name) for field in fields(batch)]
    assert {t.data_ptr() % 16 for t in tensors if isinstance(t, torch.Tensor)} == {batch.slot_mapping.data_ptr() % 16}


def test_more_than_the_shape_holds_is_refused() -> None:
    shape = BatchShape(10, 2, 40, BLOCK_SIZE, groups=1, max_tiles=1)
    with pytest.raises(AssertionError, match="tiles are more"):
        fill(BatchBuffers(shape, DEVICE), [Sequence(1), Sequence(1)])
    shape = BatchShape(10, 2, 80, BLOCK_SIZE, groups=1, max_splits=2)
    with pytest.raises(AssertionError, match="splits hold"):
        fill(BatchBuffers(shape, DEVICE), [Sequence(700)])


def test_slots_and_tiles_are_those_of_the_plain_loops() -> None:
    """Native loops against arrays, for any mixture of decode steps, trees and chunks."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        new = np.sort(rng.choice([1, 2, 5, 16, 64, 65, 90], size=rng.integers(1, 6)))
        context = rng.integers(0, 100, len(new)).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        tables = rng.permutation(len(new) * 12).reshape(len(new), 12).astype(np.int32)
        slots = np.full(starts[-1] + 3, 7, dtype=np.int64)
        assert lay_slots(starts, context, tables, 16, slots)
        indices = np.concatenate([np.arange(c, c + n) for c, n in zip(context, new, strict=True)])
        owner = np.repeat(np.arange(len(new)), new)
        assert slots.tolist() == [*(tables[owner, indices // 16] * 16 + indices % 16), -1, -1, -1]
        keys = (context + new).astype(np.int32)
        for least, most, queries, each in ((1, 64, 5, 2), (65, 400, 21, 100)):
            seq, start, split = np.full((3, 600), 7, dtype=np.int32)
            found, count = lay_tiles(starts, keys, least, most, queries, 16, each, seq, start, split)
            tiles = [
                (s, row)
                for s, n in enumerate(new)
                if least <= n <= most
                for row in reversed(range(starts[s], starts[s + 1], queries))
            ]
            tiles.sort(key=lambda tile: -(-keys[tile[0]] // 16), reverse=True)
            items = [(*tile, first) for first in range(0, 12, each) for tile in tiles if first * 16 < keys[tile[0]]]
            assert list(zip(seq[:count], start[:count], split[:count], strict=True)) == items
            assert [*zip(seq, start, strict=False)][: len(tiles)] == tiles
            assert found == len(tiles)
            assert (seq[count:] == -1).all()
            few = seq[:1], start[:1], split[:1]
            assert count < 2 or lay_tiles(starts, keys, least, most, queries, 16, each, *few) == (found, count)
    assert not lay_slots(np.array([0, 8], np.int32), np.array([10], np.int32), np.zeros((1, 1), np.int32), 16, slots)


def test_splits_are_shared_evenly_and_fit() -> None:
    """Programs have equal shares but for one split, and a shape has room for them."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        new = rng.choice([1, 2, 9, 64, 300], size=rng.integers(1, 40))
        keys = new + rng.integers(0, 5000, len(new))
        programs = int(rng.choice([1, 8, 33, 264]))
        each, longest = share_splits(new, keys, 64, 4, 256, programs)
        decoding = new <= 64
        tiles, splits = -(-new[decoding] // 4), -(-keys[decoding] // 256)
        assert longest == splits.max(initial=0)
        assert each == max(1, -(-int((tiles * splits).sum()) // programs))
        assert (tiles * -(-splits // each)).sum() <= tiles.sum() + programs

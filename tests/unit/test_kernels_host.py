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
    shape = BatchShape(10, 2, 40, BLOCK_SIZE, groups=1, max_splits=1)
    with pytest.raises(AssertionError, match="splits hold"):
        fill(BatchBuffers(shape, DEVICE), [Sequence(300)])

"""Attention of ragged batches of chunks and draft trees over paged KV.

One program computes a tile of queries, with the query heads of one KV head folded into its rows, over some splits of
the keys. Splits hold a fixed number of keys and are merged in order: by the program that computed them if it has all
of a tile's, otherwise by a second kernel, with the same operations. Blocks of keys that a row does not see leave its
bits as they are, so a row gives the same bits alone and in any batch of the same tile shape.

Scores are kept in units of log2, so that every exponential is an `exp2`. The multiplication by the scale and the
subtraction of the maximum are one explicit `fma`: left to the compiler, they would be fused in the loop without a
mask and not in the loop with one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.model.kernels.overlap import let_next_begin, wait_for_inputs

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    # No tanh in triton.language. exp2 overflows to inf, and underflows to 0, which give 1 and -1.
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def _sees(
    keys, key_end, own, rows, row_ok, position, tree_start, tree_mask, tree_positions,
    TREE_WORDS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Which keys (cache indices [N]) each row sees.  [M, N]"""
    seen = (keys[None, :] <= own[:, None]) & (keys < tl.minimum(tree_start, key_end))[None, :]
    key_positions = keys
    if TREE_WORDS > 0:
        node = keys - tree_start
        in_tree = (node >= 0) & (node < 64 * TREE_WORDS) & (keys < key_end)
        words = tl.load(
            tree_mask + rows[:, None].to(tl.int64) * TREE_WORDS + (node // 64)[None, :],
            mask=row_ok[:, None] & in_tree[None, :],
            other=0,
        )
        seen = seen | (((words >> (node & 63).to(tl.int64)[None, :]) & 1) == 1)
        if WINDOW > 0:
            tree_position = tl.load(tree_positions + node, mask=in_tree, other=0)
            key_positions = tl.where(in_tree, tree_position, keys)
    if WINDOW > 0:
        seen = seen & (key_positions[None, :] > position[:, None] - WINDOW)
    return seen


@triton.jit
def _accumulate(
    acc, row_max, row_sum, query, keys, key_end, seen, table, key_pool, value_pool, stride_slot, scale, softcap,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running sums.

    `MASKED`: keys may lie at or beyond `key_end`, whose memory may hold anything. `SEEN`: `seen` [M, N] is a mask.
    `WIDEN`: products in fp32 of the same rounded inputs, since Triton's interpreter has none in bf16.
    """
    dim = tl.arange(0, BLOCK_D)
    if MASKED:
        block = tl.load(table + keys // BLOCK_SIZE, mask=keys < key_end, other=0)
    else:
        block = tl.load(table + keys // BLOCK_SIZE)
    slots = block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
    offsets = slots[:, None] * stride_slot + dim[None, :]
    inside = (keys < key_end)[:, None] & (dim < HEAD_DIM)[None, :]
    if MASKED:
        key = tl.load(key_pool + offsets, mask=inside, other=0.0)
        value = tl.load(value_pool + offsets, mask=inside, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        key = tl.load(key_pool + offsets, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        value = tl.load(value_pool + offsets, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        key = tl.load(key_pool + offsets)
        value = tl.load(value_pool + offsets)
    if WIDEN:
        query = query.to(tl.float32)
        key = key.to(tl.float32)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    to_log2 = scale * LOG2_E
    if SOFTCAP:
        scores = softcap * _tanh(scores * (scale / softcap))
        to_log2 = LOG2_E
    if SEEN:
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * to_log2)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen nothing yet: no inf - inf
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, to_log2, tl.float32), -shift[:, None]))
    fade = tl.exp2(row_max - shift)
    row_sum = row_sum * fade + tl.sum(weights, 1)
    weights = weights.to(value.dtype)
    if WIDEN:
        weights = weights.to(tl.float32)
        value = value.to(tl.float32)
    acc = tl.dot(weights, value, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _merge(out, out_max, out_sum, part, log2_sum):
    """One more split into what is merged so far: part [M, D], log2_sum [M]; nothing is left to the compiler."""
    new_max = tl.maximum(out_max, log2_sum)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2(log2_sum - shift)
    fade = tl.exp2(out_max - shift)
    out = tl.fma(out, tl.broadcast_to(fade[:, None], out.shape), part * weight[:, None])
    return out, new_max, tl.fma(out_sum, fade, weight)


@triton.jit
def _close(acc, row_max, row_sum):
    """The result of a split and its log-sum-exp."""
    some = row_sum > 0.0
    total = tl.where(some, row_sum, 1.0)
    return acc / total[:, None], tl.where(some, row_max + tl.log2(total), float("-inf"))


@triton.jit
def _close_split(
    acc, row_max, row_sum, out, out_max, out_sum, split, parted, partial_out, partial_lse, at, num_splits,
    in_tile, row_ok, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """A split is read: merge it, leave it to the second kernel too if `parted`, and begin the next."""
    part, log2_sum = _close(acc, row_max, row_sum)
    if MERGED:
        dim = tl.arange(0, BLOCK_D)
        at_split = at * num_splits + split
        tl.store(partial_out + at_split[:, None] * HEAD_DIM + dim[None, :], part, mask=in_tile & parted[:, None])
        tl.store(partial_lse + at_split, log2_sum, mask=row_ok & parted)
    out, out_max, out_sum = _merge(out, out_max, out_sum, part, log2_sum)
    nothing = tl.full(row_max.shape, float("-inf"), tl.float32)
    return tl.zeros_like(acc), nothing, tl.zeros_like(row_sum), out, out_max, out_sum


@triton.jit(do_not_specialize=["num_splits"])
def attention_kernel(
    query_ptr, key_pool, value_pool, out_ptr, lse_ptr, partial_out, partial_lse,
    query_start, context_len, key_start, key_end_ptr, block_tables, positions,
    tree_start_ptr, tree_mask, tree_positions, tile_seq, tile_start, tile_split, splits_each,
    scale, softcap, stride_query, stride_query_head, stride_slot, stride_pool_head, max_blocks, num_splits,
    NUM_HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_QUERIES: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, MERGED: tl.constexpr, TREE_WORDS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, STORE_LSE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * kv_heads): programs side by side read adjacent memory. Rows of a tile are ordered by query, then by
    query head.

    A tile comes once for every `splits_each` splits of its keys. `SPLIT_KEYS` is 0 if keys are not split. `MERGED`:
    where that is more than once, splits go to the partials.
    """
    if OVERLAP:
        wait_for_inputs()
    kv_head = tl.program_id(0) % (NUM_HEADS // GROUPS)
    tile = tl.program_id(0) // (NUM_HEADS // GROUPS)
    seq = tl.load(tile_seq + tile)
    if seq < 0:
        return
    first_key = tl.load(key_start + seq)
    key_end = tl.load(key_end_ptr + seq)
    low = first_key
    high = key_end
    if SPLIT_KEYS > 0:
        each = tl.load(splits_each)
        split = tl.load(tile_split + tile)
        parted = tl.full((BLOCK_M,), key_end - first_key, tl.int32) > each * SPLIT_KEYS
        low = first_key + split * SPLIT_KEYS
        high = tl.minimum(low + each * SPLIT_KEYS, key_end)
        if (low >= key_end) & (split > 0):
            return
        stop_split = (high - first_key + SPLIT_KEYS - 1) // SPLIT_KEYS

    first_row = tl.load(tile_start + tile)
    seq_first = tl.load(query_start + seq)
    num_queries = tl.minimum(tl.load(query_start + seq + 1) - first_row, TILE_QUERIES)
    fold = tl.arange(0, BLOCK_M)
    rows = first_row + fold // GROUPS
    row_ok = fold // GROUPS < num_queries
    head = kv_head * GROUPS + fold % GROUPS
    own_first = tl.load(context_len + seq) + first_row - seq_first
    own = own_first + fold // GROUPS
    tree_start = tl.load(tree_start_ptr + seq)
    table = block_tables + seq.to(tl.int64) * max_blocks
    position = tl.load(positions + rows, mask=row_ok, other=2147483647)

    # Keys beyond the last query's own are seen by nobody, unless they are nodes of the tree.
    if tree_start >= high:
        high = tl.minimum(high, own_first + num_queries)
    # Blocks that every row sees whole come first, without a mask; a window leaves out what lies before it.
    clear_end = tl.minimum(tl.minimum(own_first + 1, tree_start), high)
    if WINDOW > 0:
        oldest = tl.minimum(tl.min(position, 0) - WINDOW + 1, tree_start)
        # Not beyond this program's part, whose splits it has to answer for.
        low = tl.minimum(low + tl.maximum(oldest - low, 0) // BLOCK_N * BLOCK_N, tl.maximum(low, high))
    clear_end = low + tl.maximum(clear_end - low, 0) // BLOCK_N * BLOCK_N

    dim = tl.arange(0, BLOCK_D)
    row_offsets = rows.to(tl.int64)
    in_tile = row_ok[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + row_offsets[:, None] * stride_query + head[:, None] * stride_query_head + dim[None, :],
        mask=in_tile,
        other=0.0,
    )
    key_pool += kv_head * stride_pool_head
    value_pool += kv_head * stride_pool_head
    tree_positions += seq.to(tl.int64) * (64 * TREE_WORDS)
    at = row_offsets * NUM_HEADS + head
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    out_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    out_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(low, clear_end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys[None, :] > position[:, None] - WINDOW
        acc, row_max, row_sum = _accumulate(
            acc, row_max, row_sum, query, keys, high, seen, table, key_pool, value_pool, stride_slot, scale, softcap,
            BLOCK_SIZE, HEAD_DIM, BLOCK_D, SOFTCAP, False, WINDOW > 0, PRECISION, WIDEN,
        )  # fmt: skip
        if SPLIT_KEYS > 0:  # noqa: SIM102  # known when it is compiled
            if (start + BLOCK_N - first_key) % SPLIT_KEYS == 0:
                acc, row_max, row_sum, out, out_max, out_sum = _close_split(
                    acc, row_max, row_sum, out, out_max, out_sum, (start - first_key) // SPLIT_KEYS, parted,
                    partial_out, partial_lse, at, num_splits, in_tile, row_ok, HEAD_DIM, BLOCK_D, MERGED,
                )  # fmt: skip
    for start in range(clear_end, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = _sees(keys, high, own, rows, row_ok, position, tree_start, tree_mask, tree_positions, TREE_WORDS, WINDOW)
        acc, row_max, row_sum = _accumulate(
            acc, row_max, row_sum, query, keys, high, seen, table, key_pool, value_pool, stride_slot, scale, softcap,
            BLOCK_SIZE, HEAD_DIM, BLOCK_D, SOFTCAP, True, True, PRECISION, WIDEN,
        )  # fmt: skip
        if SPLIT_KEYS > 0:  # noqa: SIM102  # known when it is compiled
            if (start + BLOCK_N - first_key) % SPLIT_KEYS == 0:
                acc, row_max, row_sum, out, out_max, out_sum = _close_split(
                    acc, row_max, row_sum, out, out_max, out_sum, (start - first_key) // SPLIT_KEYS, parted,
                    partial_out, partial_lse, at, num_splits, in_tile, row_ok, HEAD_DIM, BLOCK_D, MERGED,
                )  # fmt: skip

    if OVERLAP:
        let_next_begin()
    if SPLIT_KEYS > 0:
        read = low - first_key + tl.cdiv(tl.maximum(high - low, 0), BLOCK_N) * BLOCK_N
        if read % SPLIT_KEYS != 0:
            acc, row_max, row_sum, out, out_max, out_sum = _close_split(
                acc, row_max, row_sum, out, out_max, out_sum, read // SPLIT_KEYS, parted,
                partial_out, partial_lse, at, num_splits, in_tile, row_ok, HEAD_DIM, BLOCK_D, MERGED,
            )  # fmt: skip
        if MERGED:
            nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            to_part = row_ok & parted
            for unseen in range(split, (low - first_key) // SPLIT_KEYS):
                tl.store(partial_lse + at * num_splits + unseen, nothing, mask=to_part)
            for unseen in range(tl.cdiv(read, SPLIT_KEYS), stop_split):
                tl.store(partial_lse + at * num_splits + unseen, nothing, mask=to_part)
            row_ok = row_ok & (parted == 0)
            in_tile = in_tile & row_ok[:, None]
        result, log2_sum = _close(out, out_max, out_sum)
    else:
        result, log2_sum = _close(acc, row_max, row_sum)
    tl.store(out_ptr + at[:, None] * HEAD_DIM + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=in_tile)
    if STORE_LSE:
        tl.store(lse_ptr + at, log2_sum * LN_2, mask=row_ok)


@triton.jit(do_not_specialize=["stride_splits"])
def merge_splits_kernel(
    partial_out, partial_lse, out_ptr, lse_ptr, query_start, key_start, key_end,
    tile_seq, tile_start, tile_split, splits_each, stride_splits,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE_QUERIES: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, STORE_LSE: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * TILE_QUERIES, heads), over every tile's first place in the list."""
    if OVERLAP:  # before any program may end: this kernel's end must mean the end of those before it
        let_next_begin()
        wait_for_inputs()
    tile = tl.program_id(0) // TILE_QUERIES
    head = tl.program_id(1)
    seq = tl.load(tile_seq + tile)
    if (seq < 0) | (tl.load(tile_split + tile) > 0):
        return
    num_keys = tl.load(key_end + seq) - tl.load(key_start + seq)
    row = tl.load(tile_start + tile) + tl.program_id(0) % TILE_QUERIES
    if (num_keys <= tl.load(splits_each) * SPLIT_KEYS) | (row >= tl.load(query_start + seq + 1)):
        return  # written already, or no query of this tile
    at = row.to(tl.int64) * NUM_HEADS + head
    num_splits = (num_keys + SPLIT_KEYS - 1) // SPLIT_KEYS
    dim = tl.arange(0, BLOCK_D)
    out = tl.zeros((1, BLOCK_D), tl.float32)
    out_max = tl.full((1,), float("-inf"), tl.float32)
    out_sum = tl.zeros((1,), tl.float32)
    one = tl.arange(0, 1)
    for first in range(0, num_splits, AT_ONCE):
        for ahead in tl.static_range(AT_ONCE):
            split = first + ahead + one
            log2_sum = tl.load(partial_lse + at * stride_splits + split, mask=split < num_splits, other=float("-inf"))
            part = tl.load(
                partial_out + (at * stride_splits + split)[:, None] * HEAD_DIM + dim[None, :],
                mask=(split < num_splits)[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            part = tl.where((log2_sum > float("-inf"))[:, None], part, 0.0)  # nothing was written where nothing is seen
            out, out_max, out_sum = _merge(out, out_max, out_sum, part, log2_sum)
    result, log2_sum = _close(out, out_max, out_sum)
    to = (dim < HEAD_DIM)[None, :] & (one == 0)[:, None]
    tl.store(out_ptr + at * HEAD_DIM + dim[None, :] + one[:, None], result.to(out_ptr.dtype.element_ty), mask=to)
    if STORE_LSE:
        tl.store(lse_ptr + at + one, log2_sum * LN_2)

"""Writing, rotating, moving and merging against their slow twins, and the operators that join them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernel_tools import DEVICE, Case, Sequence, bushy, chain, make, tree_of
from test_kernels_attention import run, scaled

from paceline.model.kernels.attend import attend
from paceline.model.kernels.compact import compact
from paceline.model.kernels.kv_write import rope_write_kv, write_kv
from paceline.model.kernels.op import batch_arguments, paged_attention, rope_paged_attention
from paceline.model.kernels.segments import merge_segments
from paceline.model.kernels.twins import (
    attend_twin,
    compact_twin,
    merge_segments_twin,
    rotated_twin,
    write_kv_twin,
)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_kv(dtype: torch.dtype) -> None:
    qkv = randn(5, 9, 48, dtype=dtype)  # views with strides
    key, value = qkv[:, 3:6], qkv[:, 6:]
    pools = [randn(20, 3, 48, dtype=dtype) for _ in range(2)]
    expected = [pool.clone() for pool in pools]
    slots = torch.tensor([4, -1, 19, 0, -1], device=DEVICE)
    write_kv(key, value, *pools, slots)
    write_kv_twin(key, value, *expected, slots)
    assert torch.equal(pools[0], expected[0])
    assert torch.equal(pools[1], expected[1])


def tables(positions: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1).to(DEVICE)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 80), (8, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_write_kv(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = randn(4, heads + 2 * kv_heads, head_dim, dtype=dtype)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = tables(100, head_dim)
    positions = torch.tensor([3, 99, 0, 50], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([2, 5, -1, 0], device=DEVICE)
    pools = [randn(6, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    expected = [pool.clone() for pool in pools]
    rotated = rope_write_kv(query, key, value, cos, sin, positions, *pools, slots)
    write_kv_twin(rotated_twin(key, cos, sin, positions), value, *expected, slots)
    written = slots >= 0
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(rotated[written], rotated_twin(query, cos, sin, positions)[written], **close)
    torch.testing.assert_close(pools[0], expected[0], **close)
    assert torch.equal(pools[1], expected[1])


def test_rotation_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = randn(1, 4, 6, 32), randn(1, 2, 6, 32)
    cos, sin = tables(6, 32)
    expected, _ = apply_rotary_pos_emb(query, key, cos[None], sin[None])
    twin = rotated_twin(query[0].transpose(0, 1), cos, sin, torch.arange(6, device=DEVICE))
    torch.testing.assert_close(twin.transpose(0, 1), expected[0])


def test_compact_where_moves_overlap() -> None:
    pool = randn(2, 2, 200, 2, 72)
    expected = pool.clone()
    # One request's path shifts down by one over 40 slots; another's jumps; skipped moves lie between.
    sources = torch.tensor([*range(11, 51), -1, 90, 95, 96, -1, 120], device=DEVICE)
    targets = torch.tensor([*range(10, 50), 60, 90, 91, 92, -1, -1], device=DEVICE)
    compact(pool, sources, targets)
    compact_twin(expected, sources, targets)
    assert torch.equal(pool, expected)


def test_merge_segments() -> None:
    outs, lses = randn(3, 5, 2, 80), 10 * randn(3, 5, 2)
    lses[0, 0], lses[1, 1], lses[:, 2] = float("-inf"), float("-inf"), float("-inf")
    outs[0, 0], outs[:, 2] = float("nan"), float("nan")
    out, lse = merge_segments(outs, lses)
    expected, expected_lse = merge_segments_twin(outs, lses)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert torch.equal(out[2], torch.zeros_like(out[2]))


def segment(case: Case, low: list[int], high: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a range of cache indices, in fp32."""
    padding = [0] * (len(case.batch.context_len) - len(low))
    bounds = [torch.tensor(b + padding, dtype=torch.int32, device=DEVICE) for b in (low, high)]
    out = torch.zeros(case.query.shape, device=DEVICE)
    lse = torch.full(case.query.shape[:2], float("-inf"), device=DEVICE)
    options = scaled(case, {})
    attend(case.query, case.keys, case.values, case.batch.segment(*bounds), out=out, lse=lse, **options)
    return out, lse


def test_ranges_of_the_context_merge_to_the_whole() -> None:
    case = make([tree_of(300, bushy(9), 2), Sequence(40)], heads=3, kv_heads=1)
    parts = [segment(case, [0, 0], [100, 41]), segment(case, [100, 41], [299, 41]), segment(case, [299, 0], [307, 0])]
    out, lse = merge_segments(*(torch.stack(x) for x in zip(*parts, strict=True)))
    whole, whole_lse = run(case)
    torch.testing.assert_close(out[: case.num_tokens], whole, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse[: case.num_tokens], whole_lse, atol=2e-5, rtol=2e-5)
    assert torch.equal(parts[1][0][case.num_tokens - 1], torch.zeros_like(out[0])), "no keys give 0"


def test_a_shared_prefix_is_read_once_for_all() -> None:
    """Two sequences whose first three blocks are the same: one segment for both, one for each."""
    shared = [7, 2, 5]
    sequences = [tree_of(60, chain(3)), Sequence(100)]
    case = make(sequences, heads=3, kv_heads=1, tables=[[*shared, 0], [*shared, 1, 3, 4, 6]])
    prefix = make([Sequence(48, case.num_tokens)], heads=3, kv_heads=1, tables=[[*shared, 0]])
    prefix.query, prefix.keys, prefix.values = case.query, case.keys, case.values
    parts = [segment(prefix, [0], [48]), segment(case, [48, 48], [63, 101])]
    out, _ = merge_segments(*(torch.stack(x) for x in zip(*parts, strict=True)))
    expected, _ = attend_twin(case.query, case.keys, case.values, case.batch, **scaled(case, {}))
    torch.testing.assert_close(out[: case.num_tokens], expected[: case.num_tokens], atol=2e-5, rtol=2e-5)


def new_tokens(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values of a case; its pools lose what they held in their place."""
    slots = case.batch.slot_mapping[: case.num_tokens]
    pair = []
    for pool in (case.keys, case.values):
        rows = torch.full((len(case.query), *pool.shape[1:]), float("nan"), device=DEVICE)
        rows[: case.num_tokens] = pool[slots]
        pool[slots] = float("nan")
        pair.append(rows)
    return pair[0], pair[1]


@pytest.mark.parametrize("compiled", [False, True])
def test_operator_writes_and_attends(compiled: bool) -> None:
    case = make([tree_of(20, bushy(4)), Sequence(33)])
    expected, _ = run(case)
    key, value = new_tokens(case)
    step = torch.compile(paged_attention, backend="aot_eager", fullgraph=True) if compiled else paged_attention
    out = step(case.query, key, value, case.keys, case.values, *batch_arguments(case.batch), 0.125, None, None)
    assert torch.equal(out[: case.num_tokens], expected)


def test_operator_with_rotation() -> None:
    case = make([tree_of(20, bushy(4)), Sequence(33)])
    key, value = new_tokens(case)
    cos, sin = tables(64, 64)
    pools = [case.keys.clone(), case.values.clone()]
    arguments = batch_arguments(case.batch)
    out = rope_paged_attention(case.query, key, value, cos, sin, *pools, *arguments, 0.125, None, None)
    positions = case.batch.positions
    query, key = (rotated_twin(x, cos, sin, positions) for x in (case.query, key))
    write_kv_twin(key, value, case.keys, case.values, case.batch.slot_mapping)
    expected, _ = attend_twin(query, case.keys, case.values, case.batch, scale=0.125)
    torch.testing.assert_close(out[: case.num_tokens], expected[: case.num_tokens], atol=2e-5, rtol=2e-5)

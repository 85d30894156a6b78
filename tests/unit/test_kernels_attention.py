"""The attention kernels against their slow twins, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kernel_tools import Case, Sequence, bushy, chain, make, tree_of

from paceline.model.kernels.attend import Partials, attend
from paceline.model.kernels.twins import attend_twin

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def run(case: Case, *, poison: bool = True, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` into memory that holds NaN, without the padding rows.  fp32 [n, heads, head_dim], [n, heads]"""
    rows, heads, head_dim = case.query.shape
    out = torch.full_like(case.query, float("nan"))
    lse = torch.full((rows, heads), float("nan"), device=out.device)
    partials = None
    if poison and case.batch.splits > 1:
        partials = Partials.empty(rows, heads, case.batch.splits + 1, head_dim, out.device)
        partials.out.fill_(float("nan"))
        partials.lse.fill_(float("nan"))
    attend(case.query, case.keys, case.values, case.batch, out=out, lse=lse, partials=partials, **scaled(case, options))
    assert torch.isnan(out[case.num_tokens :]).all(), "padding rows are not written"
    return out[: case.num_tokens], lse[: case.num_tokens]


def scaled(case: Case, options: dict[str, float]) -> dict[str, float]:
    """The options with the usual scale."""
    return {"scale": case.query.shape[2] ** -0.5, **options}


def check(case: Case, **options: float) -> None:
    """Kernel and twin agree."""
    out, lse = run(case, **options)
    expected, expected_lse = attend_twin(case.query, case.keys, case.values, case.batch, **scaled(case, options))
    error = TOLERANCE[case.query.dtype]
    torch.testing.assert_close(out.float(), expected[: case.num_tokens], atol=error, rtol=error)
    torch.testing.assert_close(lse, expected_lse[: case.num_tokens], atol=error, rtol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 2), (8, 1)])
def test_decode(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    sequences = [Sequence(0), Sequence(16), Sequence(37), Sequence(300)]
    check(make(sequences, heads=heads, kv_heads=kv_heads, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(make([Sequence(20), tree_of(70, bushy(9))], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("parents", [chain(5), bushy(24), bushy(70, 1), (-1, -1, 0, 1)], ids=len)
def test_trees(parents: tuple[int, ...]) -> None:
    check(make([tree_of(50, parents), tree_of(0, parents)], heads=3, kv_heads=1))


@pytest.mark.parametrize("tail", [1, 6])
@pytest.mark.parametrize("window", [None, 4, 40])
def test_nodes_already_in_the_cache(tail: int, window: int | None) -> None:
    check(make([tree_of(60, bushy(12, 2), tail), Sequence(9)], heads=3, kv_heads=1), window=window)


@pytest.mark.parametrize("window", [1, 7, 64, 200])
def test_windows(window: int) -> None:
    sequences = [Sequence(0), Sequence(299), Sequence(100, 20), tree_of(280, bushy(13))]
    check(make(sequences, heads=4, kv_heads=1), window=window)


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_soft_caps(softcap: float) -> None:
    check(make([Sequence(30), tree_of(290, bushy(5))]), softcap=softcap, scale=1.5)


def test_prefill_from_nothing() -> None:
    check(make([Sequence(0, 17), Sequence(0, 33)], heads=3, kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch(dtype: torch.dtype) -> None:
    """Decode tokens, trees, a chunk in decode tiles and chunks in their own tiles."""
    sequences = [
        Sequence(900),
        tree_of(270, bushy(20), 3),
        Sequence(1),
        Sequence(30, 12),
        Sequence(0, 70),
        Sequence(280, 66),
    ]
    check(make(sequences, heads=3, kv_heads=1, dtype=dtype, chunk_tiles=9), window=None)


def test_no_tree_words() -> None:
    check(make([Sequence(17), Sequence(270, 3)], tree_words=0))


@pytest.mark.slow
def test_long_context() -> None:
    check(make([Sequence(8192), tree_of(8000, bushy(30))], heads=3, kv_heads=1))


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    sequences = [tree_of(300, bushy(9)), Sequence(530), Sequence(40, 7)]
    case = make(sequences, heads=3, kv_heads=1, dtype=torch.bfloat16)
    together, lse = run(case)
    start = 0
    for sequence, table in zip(sequences, case.tables, strict=True):
        alone = make([sequence], heads=3, kv_heads=1, dtype=torch.bfloat16, tables=[table], padding=0)
        alone.keys, alone.values = case.keys, case.values
        alone.query = case.query[start : start + sequence.num_new].clone()
        out, its_lse = run(alone)
        assert torch.equal(out, together[start : start + sequence.num_new])
        assert torch.equal(its_lse, lse[start : start + sequence.num_new])
        start += sequence.num_new


def test_a_draft_node_has_the_bits_of_the_token_it_becomes() -> None:
    """A chain verified at once, and its last token decoded after the others are committed."""
    case = make([tree_of(301, chain(6))], heads=3, kv_heads=1, padding=0)
    tree, _ = run(case)
    decode = make([Sequence(306)], heads=3, kv_heads=1, tables=case.tables, padding=0)
    decode.keys, decode.values, decode.query = case.keys, case.values, case.query[5:].clone()
    assert torch.equal(run(decode)[0], tree[5:])


@pytest.mark.parametrize("window", [None, 16, 300])
def test_programs_may_run_in_any_order(window: int | None) -> None:
    """A GPU promises none: what a program leaves to the second kernel, no other one touches."""
    sequences = [Sequence(1200), tree_of(700, bushy(9), 2), Sequence(511), Sequence(400, 30)]
    options = {} if window is None else {"window": window}
    case = make(sequences, heads=4, kv_heads=1, programs=35)
    expected = run(case, **options)
    tiles = case.batch.tiles[0]
    used = int((tiles.seq >= 0).sum())
    first = int((tiles.split[:used] == 0).sum())
    assert used > first + 8
    for seed in range(3):
        torch.manual_seed(seed)
        rest = torch.arange(used, len(tiles.seq))
        order = torch.cat([torch.randperm(first), first + torch.randperm(used - first), rest]).to(tiles.seq.device)
        moved = replace(tiles, seq=tiles.seq[order], start=tiles.start[order], split=tiles.split[order])
        case.batch = replace(case.batch, tiles=(moved, *case.batch.tiles[1:]))
        out, lse = run(case, **options)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
def test_programs_may_share_the_keys_in_any_way(window: int | None, dtype: torch.dtype) -> None:
    """To the bit: each program reads one split, three, or all of them; or the shape has no room for parts at all."""
    sequences = [Sequence(1200), Sequence(5), Sequence(255), tree_of(700, bushy(9), 2), Sequence(400, 30)]
    options = {} if window is None else {"window": window}
    results = []
    for programs, splits in ((400, 0), (27, 0), (1, 0), (1, 1)):
        case = make(sequences, heads=4, kv_heads=1, dtype=dtype, programs=programs, max_splits=splits)
        each = int(case.batch.tiles[0].each)
        assert {400: each == 1, 27: 1 < each < 5, 1: each >= 5}[programs]
        check(case, **options)
        results.append(run(case, **options))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])

"""The trim stage on the device: the best nodes of the whole batch, for a budget that only the device knows.

A node's rank is the number of nodes before it in the stable order by worth, found by comparing all pairs: some
thousands of nodes cost less than a sort, and the result keeps the order of the nodes, so parents stay before children.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_NODES = 64
_OTHERS = 32


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Which nodes are verified, compacted; entries past the last one are -1."""

    keep: torch.Tensor
    """bool.  # [num_nodes]"""
    node: torch.Tensor
    """int64, ascending.  # [capacity]"""
    parent: torch.Tensor
    """int64: the parent's entry in `node`, -1 for a root's child.  # [capacity]"""


@triton.jit
def _rank_kernel(
    worth_ptr: tl.tensor,
    fixed_ptr: tl.tensor,
    size_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    count: tl.tensor,
    STEPS: tl.constexpr,
    NODES: tl.constexpr,
    OTHERS: tl.constexpr,
) -> None:
    mine = tl.program_id(0) * NODES + tl.arange(0, NODES)
    exists = mine < count
    worth = tl.load(worth_ptr + mine, mask=exists, other=0.0)
    fixed = tl.load(fixed_ptr + mine, mask=exists, other=0)
    rank = tl.zeros((NODES,), tl.int32)
    for i in range(STEPS):
        other = i * OTHERS + tl.arange(0, OTHERS)
        inside = other < count
        theirs = tl.load(worth_ptr + other, mask=inside, other=0.0)
        first = tl.load(fixed_ptr + other, mask=inside, other=0) > 0  # fixed nodes take their places before all others
        better = theirs[None, :] > worth[:, None]
        tied = (theirs[None, :] == worth[:, None]) & (other[None, :] < mine[:, None])
        rank += tl.sum((inside[None, :] & (first[None, :] | better | tied)).to(tl.int32), axis=1)
    keep = (fixed > 0) | (rank < tl.load(size_ptr))
    tl.store(keep_ptr + mine, keep.to(tl.int8), mask=exists)


def trim_best(
    worth: torch.Tensor, parents: torch.Tensor, size: torch.Tensor, capacity: int, fixed: torch.Tensor | None = None
) -> Trimmed:
    """Keep the best nodes.

    Args:
        worth: fp64, survival times the request's weight; a parent's is never below its child's.  # [num_nodes]
        parents: int64 entries of this list (not numbered by request), -1 for a root's child.  # [num_nodes]
        size: int32, how many are kept; fixed nodes count, and stay even if they are more.  # [1]
        capacity: entries of the result; kept nodes beyond it are lost.
        fixed: bool, nodes that no cut drops (sampled trees).  # [num_nodes]
    """
    count = len(worth)
    keep = torch.empty(count, dtype=torch.int8, device=worth.device)
    stays = torch.zeros_like(keep) if fixed is None else fixed.view(torch.int8)
    grid = (triton.cdiv(count, _NODES),)
    steps = triton.next_power_of_2(triton.cdiv(count, _OTHERS))  # few numbers, so few compilations
    _rank_kernel[grid](worth, stays, size, keep, count, STEPS=steps, NODES=_NODES, OTHERS=_OTHERS)
    return _compact(keep.view(torch.bool), parents, capacity)


def trim_best_twin(
    worth: torch.Tensor, parents: torch.Tensor, size: torch.Tensor, capacity: int, fixed: torch.Tensor | None = None
) -> Trimmed:
    """The same by a stable sort."""
    stays = torch.zeros_like(worth, dtype=torch.bool) if fixed is None else fixed
    order = torch.sort(torch.where(stays, float("inf"), worth), descending=True, stable=True).indices
    keep = stays.clone()
    keep[order[: int(size)]] = True
    return _compact(keep, parents, capacity)


def _compact(keep: torch.Tensor, parents: torch.Tensor, capacity: int) -> Trimmed:
    """Kept nodes in their order. All shapes are fixed, so that it can be captured in a graph."""
    entry = torch.cumsum(keep, 0) - 1
    place = torch.where(keep & (entry < capacity), entry, capacity)
    parent = torch.where(parents < 0, -1, entry[parents.clamp(min=0)])
    blank = torch.full((capacity + 1,), -1, dtype=torch.int64, device=keep.device)
    node = blank.scatter(0, place, torch.arange(len(keep), device=keep.device))
    return Trimmed(keep, node[:capacity], blank.scatter(0, place, parent)[:capacity])

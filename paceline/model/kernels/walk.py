"""`coupled` on the device: from the root to the child that equals the drawn token, as long as there is one.

Tokens are drawn for all rows at once (`draw_rows`), each with the noise of its own position: that of the row's input
token plus one, so nodes of one depth share it. One program walks one request's tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paceline.model.kernels.draw import Drawn

NOTHING = -1
"""Fills what is past the end of a walk."""


@dataclass(frozen=True, slots=True)
class Trees:
    """The draft trees of a step, one after the other; int32 on the device.

    Request r's root is row `first_row[r]` of the logits, and its nodes' rows follow in order.
    """

    tokens: torch.Tensor  # [num_nodes]
    parents: torch.Tensor
    """Numbered within the request, -1 is the root.  # [num_nodes]"""
    first_node: torch.Tensor
    """Where each request's nodes begin; the last entry is the end.  # [requests + 1]"""
    first_row: torch.Tensor  # [requests]
    max_nodes: int
    """No request has more."""
    max_depth: int
    """No node is deeper; children of the root have depth 1."""


@dataclass(frozen=True, slots=True)
class Walks:
    """What is committed, padded with `NOTHING`; int32 on the device."""

    path: torch.Tensor
    """Rows of the accepted nodes.  # [requests, max_depth]"""
    tokens: torch.Tensor
    """Their tokens and one more.  # [requests, max_depth + 1]"""
    count: torch.Tensor
    """Tokens committed: accepted nodes + 1; 0 where a row on the walk has no law.  # [requests]"""


@triton.jit
def _walk_kernel(
    drawn_ptr: tl.tensor,
    finite_ptr: tl.tensor,
    node_token_ptr: tl.tensor,
    parent_ptr: tl.tensor,
    first_node_ptr: tl.tensor,
    first_row_ptr: tl.tensor,
    path_ptr: tl.tensor,
    token_ptr: tl.tensor,
    count_ptr: tl.tensor,
    max_depth: tl.tensor,
    NODES: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    begin = tl.load(first_node_ptr + request)
    end = tl.load(first_node_ptr + request + 1)
    root = tl.load(first_row_ptr + request)
    nodes = tl.arange(0, NODES)
    exists = begin + nodes < end
    parents = tl.load(parent_ptr + begin + nodes, mask=exists, other=-2)
    tokens = tl.load(node_token_ptr + begin + nodes, mask=exists, other=-1)
    node = tl.full((), -1, tl.int32)
    depth = tl.full((), 0, tl.int32)
    sound = tl.full((), 1, tl.int32)
    while node < NODES:
        row = root + 1 + node
        if depth > 0:
            tl.store(path_ptr + request * max_depth + depth - 1, row)
        token = tl.load(drawn_ptr + row)
        sound = sound & tl.load(finite_ptr + row).to(tl.int32)
        tl.store(token_ptr + request * (max_depth + 1) + depth, token)
        depth += 1
        here = exists & (parents == node) & (tokens == token) & (sound > 0)
        node = tl.min(tl.where(here, nodes, NODES), axis=0)
    tl.store(count_ptr + request, depth * sound)


def walk_coupled(drawn: Drawn, trees: Trees) -> Walks:
    """Follow the drawn tokens down every tree."""
    requests = len(trees.first_row)
    device = drawn.token.device
    path = torch.full((requests, trees.max_depth), NOTHING, dtype=torch.int32, device=device)
    tokens = torch.full((requests, trees.max_depth + 1), NOTHING, dtype=torch.int32, device=device)
    count = torch.empty(requests, dtype=torch.int32, device=device)
    _walk_kernel[(requests,)](
        drawn.token,
        drawn.finite.view(torch.int8),
        trees.tokens,
        trees.parents,
        trees.first_node,
        trees.first_row,
        path,
        tokens,
        count,
        trees.max_depth,
        NODES=max(16, triton.next_power_of_2(trees.max_nodes)),
    )
    return Walks(path, tokens, count)

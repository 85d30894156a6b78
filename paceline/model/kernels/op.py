"""KV write and attention of one layer as one operator, opaque to `torch.compile`.

The pools are declared as mutated. Everything of the batch is an argument: tensors whose contents change under a CUDA
graph, and integers that belong to the graph.
"""

from __future__ import annotations

import torch

from paceline.model.kernels.attend import attend
from paceline.model.kernels.batch import AttentionBatch, Tiles
from paceline.model.kernels.kv_write import rope_write_kv, write_kv

_BATCH = """
    Tensor query_start, Tensor context_len, Tensor key_start, Tensor key_end, Tensor block_tables, Tensor slot_mapping,
    Tensor positions, Tensor tree_start, Tensor tree_mask, Tensor tree_positions,
    Tensor[] tile_seq, Tensor[] tile_start, Tensor[] tile_split, Tensor[] splits_each, int[] tile_queries,
    int[] tile_splits, int[] num_tiles, int block_size
"""
_OPTIONS = "float scale, int? window, float? softcap"

BatchArguments = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor],
    list[int], list[int], list[int], int,
]  # fmt: skip
"""A batch as an operator's arguments; see `batch_arguments`."""


def batch_arguments(batch: AttentionBatch) -> BatchArguments:
    """The batch as the arguments of the operators here, between the pools and the options."""
    return (
        batch.query_start, batch.context_len, batch.key_start, batch.key_end, batch.block_tables, batch.slot_mapping,
        batch.positions, batch.tree_start, batch.tree_mask, batch.tree_positions,
        [t.seq for t in batch.tiles], [t.start for t in batch.tiles], [t.split for t in batch.tiles],
        [t.each for t in batch.tiles], [t.queries for t in batch.tiles], [t.splits for t in batch.tiles],
        [t.num_tiles for t in batch.tiles], batch.block_size,
    )  # fmt: skip


def _batch(arguments: BatchArguments) -> AttentionBatch:
    tensors, (*fields, block_size) = arguments[:10], arguments[10:]
    tiles = tuple(Tiles(*of_kind) for of_kind in zip(*fields, strict=True))
    return AttentionBatch(*tensors, tiles, block_size)


@torch.library.custom_op(
    "paceline::paged_attention",
    mutates_args=("key_pool", "value_pool"),
    schema=f"(Tensor query, Tensor key, Tensor value, Tensor(a!) key_pool, Tensor(b!) value_pool, {_BATCH}, {_OPTIONS})"
    " -> Tensor",
)
def paged_attention(
    query: torch.Tensor,  # [T, heads, head_dim], rotated
    key: torch.Tensor,  # [T, kv_heads, head_dim], rotated
    value: torch.Tensor,  # [T, kv_heads, head_dim]
    key_pool: torch.Tensor,  # [num_slots, kv_heads, head_dim]
    value_pool: torch.Tensor,  # [num_slots, kv_heads, head_dim]
    *arguments: object,
) -> torch.Tensor:  # [T, heads, head_dim]
    """Write new keys and values, then attend. After the pools: `*batch_arguments(batch)`, scale, window, softcap."""
    *fields, scale, window, softcap = arguments
    batch = _batch(tuple(fields))  # type: ignore[arg-type]
    write_kv(key, value, key_pool, value_pool, batch.slot_mapping)
    return attend(query, key_pool, value_pool, batch, scale=scale, window=window, softcap=softcap)[0]  # type: ignore[arg-type]


@torch.library.custom_op(
    "paceline::rope_paged_attention",
    mutates_args=("key_pool", "value_pool"),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) key_pool, "
    f"Tensor(b!) value_pool, {_BATCH}, {_OPTIONS}) -> Tensor",
)
def rope_paged_attention(
    query: torch.Tensor,  # [T, heads, head_dim]
    key: torch.Tensor,  # [T, kv_heads, head_dim]
    value: torch.Tensor,  # [T, kv_heads, head_dim]
    cos: torch.Tensor,  # fp32 [max_positions, head_dim]
    sin: torch.Tensor,  # fp32 [max_positions, head_dim]
    key_pool: torch.Tensor,  # [num_slots, kv_heads, head_dim]
    value_pool: torch.Tensor,  # [num_slots, kv_heads, head_dim]
    *arguments: object,
) -> torch.Tensor:  # [T, heads, head_dim]
    """Rotate, write and attend. After the pools: `*batch_arguments(batch)`, scale, window, softcap."""
    *fields, scale, window, softcap = arguments
    batch = _batch(tuple(fields))  # type: ignore[arg-type]
    rotated = rope_write_kv(query, key, value, cos, sin, batch.positions, key_pool, value_pool, batch.slot_mapping)
    return attend(rotated, key_pool, value_pool, batch, scale=scale, window=window, softcap=softcap)[0]  # type: ignore[arg-type]


def _like_query(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


paged_attention.register_fake(_like_query)
rope_paged_attention.register_fake(_like_query)

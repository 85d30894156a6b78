"""What the kernels compute, as slow and obvious torch code in fp32."""

from __future__ import annotations

import torch

from paceline.model.kernels.batch import AttentionBatch


def sees(batch: AttentionBatch, seq: int, row: int, window: int | None) -> torch.Tensor:
    """Cache indices that a row of a sequence sees, in order.  # int64 [seen]"""
    first, last = int(batch.key_start[seq]), int(batch.key_end[seq])
    own = int(batch.context_len[seq]) + row - int(batch.query_start[seq])
    tree_start, words = int(batch.tree_start[seq]), batch.tree_mask.shape[1]
    keys = torch.arange(first, last)
    node = keys - tree_start
    in_tree = (node >= 0) & (node < 64 * words)
    seen = (node < 0) & (keys <= own)
    positions = keys.clone()
    if words:
        inside = node.clamp(0, 64 * words - 1)
        mask = batch.tree_mask[row].cpu()
        seen |= in_tree & ((mask[inside // 64] >> (inside % 64)) & 1).bool()
        positions[in_tree] = batch.tree_positions[seq].cpu().long()[inside[in_tree]]
    if window is not None:
        seen &= positions > int(batch.positions[row]) - window
    return keys[seen]


def attend_twin(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`, row by row; padding rows give 0 and -inf.  # fp32 [T, heads, head_dim], fp32 [T, heads]"""
    rows, heads, head_dim = query.shape
    groups = heads // key_pool.shape[1]
    out = torch.zeros((rows, heads, head_dim))
    lse = torch.full((rows, heads), float("-inf"))
    query_start = batch.query_start.tolist()
    for seq in range(len(query_start) - 1):
        table = batch.block_tables[seq].long().cpu()
        for row in range(query_start[seq], query_start[seq + 1]):
            index = sees(batch, seq, row, window)
            if not len(index):
                continue
            slots = (table[index // batch.block_size] * batch.block_size + index % batch.block_size).to(query.device)
            keys = key_pool[slots].float().cpu().repeat_interleave(groups, dim=1)  # [seen, heads, head_dim]
            values = value_pool[slots].float().cpu().repeat_interleave(groups, dim=1)
            scores = torch.einsum("hd,khd->hk", query[row].float().cpu(), keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(dim=-1), values)
            lse[row] = scores.logsumexp(dim=-1)
    return out.to(query.device), lse.to(query.device)


def merge_segments_twin(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_segments`.  # fp32 [T, heads, head_dim], fp32 [T, heads]"""
    lse = lses.float().logsumexp(dim=0)
    weights = (lses - lse).exp().nan_to_num(0.0)[..., None]  # a row that saw nothing anywhere: -inf - -inf
    parts = torch.where(weights > 0, outs.float(), 0.0)
    return (weights * parts).sum(dim=0), lse


def write_kv_twin(
    key: torch.Tensor, value: torch.Tensor, key_pool: torch.Tensor, value_pool: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """`write_kv`."""
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_pool[slot] = key[row]
            value_pool[slot] = value[row]


def rotated_twin(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate-half rotary embedding in fp32.  heads [T, heads, head_dim], tables [max_positions, head_dim]"""
    x = heads.float()
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    index = positions.long()
    return (x * cos[index][:, None] + turned * sin[index][:, None]).to(heads.dtype)


def compact_twin(pool: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """`compact`: everything is read before anything is written."""
    moved = (sources >= 0) & (targets >= 0)
    pool[:, :, targets[moved]] = pool[:, :, sources[moved]].clone()

"""Embeddings of a step's tokens, of which some are known to the device only: samples of the step before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _embed(
    tokens, carried, drawn, embedding, embedding_stride, out, out_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    sample = tl.load(carried + row)
    token = tl.load(tokens + row)
    if sample >= 0:
        token = tl.load(drawn + sample).to(tl.int64)
    # A row without a law drew no token: its request ends, and what is computed for it is thrown away.
    token = tl.maximum(token, 0)
    values = tl.load(embedding + token * embedding_stride + column, mask=inside)
    tl.store(out + row * out_stride + column, values, mask=inside)


def embed(
    tokens: torch.Tensor, carried: torch.Tensor, drawn: torch.Tensor, embedding: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """The embedding of every token.

    Args:
        tokens: ids.  # int64 [T]
        carried: where a token is the sample of a row of the step before, that row; -1 elsewhere.  # int64 [T]
        drawn: those samples; negative where there is none.  # int32 [rows]
        embedding: contiguous along the last dimension.  # [vocab, width]
        out: where to write.  # [T, width]
    """
    width = embedding.shape[1]
    block = min(triton.next_power_of_2(width), 1024)
    _embed[(len(tokens), triton.cdiv(width, block))](
        tokens, carried, drawn, embedding, embedding.stride(0), out, out.stride(0), WIDTH=width, BLOCK=block
    )
    return out


def embed_twin(
    tokens: torch.Tensor, carried: torch.Tensor, drawn: torch.Tensor, embedding: torch.Tensor
) -> torch.Tensor:
    """The same in plain operations.  # [T, width]"""
    known = torch.where(carried >= 0, drawn[carried.clamp(min=0)].long(), tokens)
    return embedding[known.clamp(min=0)]

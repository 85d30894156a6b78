"""An embedding that stays in GGUF's blocks: the rows that are looked up are dequantised, the table never is."""

from __future__ import annotations

import torch
from torch import nn

from paceline.model.gguf_blocks import columns, dequantise


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` over stored rows. A row is exactly the file's, rounded to `dtype`.

    The table is not a parameter: it is absent from `state_dict()`, does not follow `.to()` and takes no gradient.

    Args:
        rows: the bytes as they stand in the file; kept, and may be a mapped file, of which lookups then read
            only what they need.  # uint8 [V, B]
        kind: their format, see `gguf_blocks.py`.
        dtype: of what is looked up.
    """

    def __init__(self, rows: torch.Tensor, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings = int(rows.shape[0])
        self.embedding_dim = columns(int(rows.shape[1]), kind)
        self.kind, self.dtype = kind, dtype
        self._rows = rows

    @property
    def weight(self) -> torch.Tensor:
        """The whole table in `dtype`: a copy, for code that looks at it.  # [V, K]"""
        return dequantise(self._rows, self.kind).to(self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map `[...]` to `[..., K]`."""
        rows = self._rows[ids.reshape(-1)]
        return dequantise(rows, self.kind).to(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind}"

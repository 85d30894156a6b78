"""An embedding that stays in GGUF's blocks: the rows that are looked up are dequantised, the table never is."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from paceline.model.gguf_blocks import columns, dequantise, dequantised


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
        self._rows, self._raw = rows, rows.numpy()

    @property
    def weight(self) -> torch.Tensor:
        """The whole table in `dtype`: a copy, for code that looks at it.  # [V, K]"""
        return dequantise(self._rows, self.kind).to(self.dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map `[...]` to `[..., K]`."""
        found = torch.from_numpy(self.look_up(ids.reshape(-1).numpy()))
        return found.to(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def look_up(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The same for arrays, in fp32.  # [n] -> [n, K]"""
        return dequantised(self._raw[ids], self.kind)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind}"

"""FR-Spec (2502.14856): a draft model whose head knows only the most frequent tokens.

In a small draft the head is most of the work, and most of its rows belong to tokens that are hardly ever said. The
cut head computes the logits of the kept rows; every other token gets minus infinity, so that a draft law has q = 0
there. That is exact under every rule: such a token can only come from the target, whose own head stays whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paceline.arrays import IntArray
from paceline.errors import CorruptFileError, InputError, SpeculationSpecError
from paceline.model.loader import LoadedModel

RANKING = "vocab.json"
"""The ranking that may lie in a draft's folder."""
_MAKE = "Make one with `paceline train vocab MODEL TEXT --out FILE`."


class SubsetHead(nn.Module):
    """A head over some rows of another.

    Args:
        weight: all rows.  # [vocab, hidden]
        bias: of all rows.  # [vocab]
        ids: the rows that are kept.  # [kept]
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor) -> None:
        super().__init__()
        self.vocab_size = int(weight.shape[0])
        self.rows = nn.Linear(int(weight.shape[1]), len(ids), bias=bias is not None, dtype=weight.dtype, device="meta")
        self.rows.weight = nn.Parameter(weight.detach()[ids].clone(), requires_grad=False)
        if bias is not None:
            self.rows.bias = nn.Parameter(bias.detach()[ids].clone(), requires_grad=False)
        self.ids: torch.Tensor
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., hidden]` to `[..., vocab]`."""
        kept = self.rows(x)
        logits = torch.full((*x.shape[:-1], self.vocab_size), float("-inf"), dtype=kept.dtype, device=kept.device)
        return logits.index_copy_(-1, self.ids, kept)


def cut_head(draft: LoadedModel, ids: Sequence[int]) -> None:
    """Give a draft model a head over `ids` alone, in place. The embedding stays whole.

    Args:
        draft: its head may be packed, and may be another model's as well, which keeps it whole.
        ids: tokens that the draft may say; those that end a text are always among them.
    """
    head: Any = draft.model.get_output_embeddings()
    kept = torch.tensor(sorted({*ids, *draft.eos_token_ids}), dtype=torch.int64, device=draft.device)
    draft.model.set_output_embeddings(SubsetHead(head.weight, getattr(head, "bias", None), kept))


def read_ranking(wanted: str, draft: LoadedModel) -> IntArray:
    """The tokens that `vocab=` asks for: so many of the draft's own ranking, or all of a file.

    Args:
        wanted: a number, or the path of a file that `paceline train vocab` wrote.
        draft: the draft model.

    Raises:
        SpeculationSpecError: the draft has no ranking, or one that is too short.
        InputError: the file cannot be read.
        CorruptFileError: it is no ranking of this vocabulary.
    """
    if not wanted.isdecimal():
        return _read(Path(wanted).expanduser(), draft)
    own = draft.path / RANKING
    if not own.is_file():
        raise SpeculationSpecError(
            f"draft model {draft.name} comes without a ranking of its vocabulary, so vocab={wanted} means nothing.",
            field="speculation",
            fix=f"{_MAKE} Then write vocab=FILE.",
        )
    ids = _read(own, draft)
    if not 1 <= int(wanted) <= len(ids):
        raise SpeculationSpecError(
            f"vocab={wanted} is impossible: the ranking of {draft.name} has {len(ids)} tokens.",
            field="speculation",
            fix=f"Give 1 to {len(ids)}, or leave vocab out for the whole vocabulary.",
        )
    return ids[: int(wanted)]


def _read(path: Path, draft: LoadedModel) -> IntArray:
    try:
        if path.suffix == ".npy":
            ids = np.load(path, allow_pickle=False)
        else:
            ids = np.asarray(json.loads(path.read_text(encoding="utf-8"))["token_ids"])
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror}).", field=str(path), fix=_MAKE) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError("is not a ranking of tokens.", field=str(path), fix=_MAKE) from error
    whole = ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) and len(ids) > 0
    if not whole or ids.min() < 0 or ids.max() >= draft.config.vocab_size or len(np.unique(ids)) < len(ids):
        raise CorruptFileError(f"does not rank the tokens of {draft.name}.", field=str(path), fix=_MAKE)
    return np.asarray(ids, dtype=np.int64)

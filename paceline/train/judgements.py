"""What an acceptance head learns from: draft tokens, and how likely the target is to accept each.

At every place i of an answer X that the target wrote, the draft draws Y_i from its law q(. | X_<i), and the label is
a_i = min(1, p(Y_i) / q(Y_i)), the probability that the target accepts it there (SpecDec++, 2405.19715). The draft then
reads the answer with every X_i replaced by Y_i, except for a share `mixing` of the places, which keep X_i; its last
hidden state at each Y_i is what the head will see. A decision head sees q itself instead: entropy and ten largest
probabilities (2409.10644).

Shapes: B documents of a batch, L tokens of the longest, N judged places, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.arrays import IntArray
from paceline.errors import CorruptFileError
from paceline.model.loader import LoadedModel
from paceline.plan.heads import TOP
from paceline.train.attention import use_library_attention
from paceline.train.documents import Documents
from paceline.train.laws import body, head

_ROWS = 256
"""Places whose laws are in memory at once."""
_PART = 32
"""Documents of a part: an interrupted run loses the part in hand."""


@dataclass(frozen=True, eq=False)
class Judgements:
    """Judged places of some documents."""

    inputs: torch.Tensor  # [N, D or 11], float16
    accepted: torch.Tensor  # [N], float32, probability that the target accepts the token
    document: torch.Tensor  # [N], int64


class Judge:
    """Draws draft tokens and labels them.

    Args:
        target: wrote the documents.
        draft: frozen.
        kind: of the head: `acceptance` or `decision`.
        mixing: share of the places that keep the target's token.
        seed: of the draws.
    """

    def __init__(self, target: LoadedModel, draft: LoadedModel, *, kind: str, mixing: float, seed: int) -> None:
        self._target, self._draft = target, draft
        self._kind, self._mixing, self._seed = kind, mixing, seed
        self._device = target.device
        for loaded in (target, draft):
            use_library_attention(loaded.model)
            loaded.model.requires_grad_(False)

    def judge(self, folder: Path, documents: Documents, on_progress: Callable[[float], None]) -> Judgements:
        """All places of all documents. Parts that are in the folder already are read.

        Raises:
            CorruptFileError: a part is damaged; names the file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        count = len(documents.lengths)
        parts = []
        for number, start in enumerate(range(0, count, _PART)):
            path = folder / f"part-{number:05d}.safetensors"
            which = np.arange(start, min(start + _PART, count))
            if not path.exists():
                made = self.part(documents, which, number)
                _save(path, made)
            parts.append(_load(path))
            on_progress(min(start + _PART, count) / count)
        return Judgements(*(torch.cat([getattr(p, name) for p in parts]) for name in Judgements.__dataclass_fields__))

    @torch.inference_mode()
    def part(self, documents: Documents, which: IntArray, number: int) -> Judgements:
        """Places of some documents; `number` seeds the draws."""
        rng = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + number)
        longest = int(documents.lengths[which].max())
        tokens = torch.zeros((len(which), longest), dtype=torch.int64)
        own = torch.zeros((len(which), longest), dtype=torch.bool)
        for row, i in enumerate(which):
            piece = slice(documents.starts[i], documents.starts[i] + documents.lengths[i])
            tokens[row, : documents.lengths[i]] = torch.from_numpy(documents.tokens[piece].astype(np.int64))
            own[row, : documents.lengths[i]] = torch.from_numpy(documents.own[piece])
        own[:, 0] = False  # a first token has no law
        tokens, own = tokens.to(self._device), own.to(self._device)
        place = own.nonzero()  # [N, 2]
        drawn, accepted, features = self._draw(tokens, place, rng)
        document = torch.from_numpy(which)[place[:, 0].cpu()]
        if self._kind == "decision":
            return Judgements(features, accepted.cpu(), document)
        keeps = torch.rand(len(place), generator=rng, device=self._device) < self._mixing
        mixed = tokens.clone()
        mixed[place[:, 0], place[:, 1]] = torch.where(keeps, tokens[place[:, 0], place[:, 1]], drawn)
        hidden = body(self._draft.model, mixed)[place[:, 0], place[:, 1]][~keeps]
        return Judgements(hidden.half().cpu(), accepted[~keeps].cpu(), document[~keeps.cpu()])

    def _draw(
        self, tokens: torch.Tensor, place: torch.Tensor, rng: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A token for every place, its chance to be accepted, and what its law looks like.  # [N], [N], [N, 11]"""
        before = place[:, 0], place[:, 1] - 1
        wanted, hidden = (body(m.model, tokens)[before] for m in (self._target, self._draft))
        drawn, accepted, features = [], [], []
        for start in range(0, len(place), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p, log_q = (
                torch.log_softmax(head(m.model, states[rows]).float(), dim=-1)
                for m, states in ((self._target, wanted), (self._draft, hidden))
            )
            q = log_q.exp()  # [rows, V]
            token = torch.multinomial(q, 1, generator=rng)
            ratio = (log_p.gather(1, token) - log_q.gather(1, token)).clamp(max=0.0).exp()
            entropy = -(q * log_q.clamp(min=-1e4)).sum(dim=-1, keepdim=True)
            drawn.append(token[:, 0])
            accepted.append(ratio[:, 0])
            features.append(torch.cat([entropy, q.topk(TOP, dim=-1).values], dim=-1).half().cpu())
        return torch.cat(drawn), torch.cat(accepted), torch.cat(features)


def _save(path: Path, made: Judgements) -> None:
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    save_file({name: getattr(made, name).contiguous() for name in Judgements.__dataclass_fields__}, part)
    os.replace(part, path)


def _load(path: Path) -> Judgements:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Any] = load_file(path)
        return Judgements(**found)
    except (SafetensorError, OSError, TypeError) as error:
        fix = "Delete this file; the same command then makes it again."
        raise CorruptFileError("is damaged.", field=str(path), fix=fix) from error

"""Stage 3: the student learns the target's next-token laws.

The loss at a position is KL(p || q) of the target's law p and the student's q over the whole vocabulary, optionally
mixed with their total variation 1 - sum min(p, q), which is the probability that rejection sampling refuses a draft
token (DistillSpec 2310.08461 compares such losses). What is reported on held-out text is the acceptance itself,
sum min(p, q) at temperature 1, and how often both have the same likeliest token, which is acceptance at temperature 0.

Shapes: N positions with a next token, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paceline.arrays import IntArray
from paceline.errors import ConfigError
from paceline.model.draft_weights import own_parameters
from paceline.model.loader import LoadedModel
from paceline.train.attention import use_library_attention
from paceline.train.documents import Documents
from paceline.train.laws import body, check_head, divergence, head

_WINDOW = 32
"""Batches whose documents are sorted by length together, so that a batch holds documents of much the same length."""


@dataclass(frozen=True, slots=True)
class DistilSettings:
    """How the student is trained."""

    steps: int | None = None
    seconds: float | None = None
    """Budget instead of `steps` (both: whichever is reached first)."""
    batch_tokens: int = 16384
    learning_rate: float = 1e-3
    warmup: float = 0.03
    """Share of the training over which the learning rate rises."""
    final: float = 0.02
    """Share of the learning rate that is left at the end."""
    weight_decay: float = 0.01
    clip: float = 1.0
    tv_weight: float = 0.0
    """Share of the total variation in the loss; the rest is KL."""
    heldout: float = 0.02
    """Share of the documents kept for measuring."""
    heldout_tokens: int = 65536
    """Most tokens measured on."""
    chunk_rows: int = 4096
    """Positions whose logits are in memory at once."""
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ConfigError("give a number of steps or of seconds.", field="steps")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the student is worth on held-out text."""

    step: int
    seconds: float
    tokens: int
    """Trained on so far, counting repetitions."""
    loss: float
    """Of held-out positions, all of them."""
    acceptance: float
    """Mean of sum min(p, q) where the target answers."""
    agreement: float
    """Share of those positions with the same likeliest token."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Documents of a step, one a row, filled up on the right: causal attention hides the filling."""

    tokens: torch.Tensor  # [rows, longest]
    scored: torch.Tensor  # [rows, longest] positions with a next token
    own: torch.Tensor  # [rows, longest] positions whose next token the target wrote as an answer


class Distiller:
    """One training run; `state` and `restore` carry it over an interruption to the last bit.

    Args:
        target: frozen; runs with SDPA attention.
        student: see `make_student`.
        documents: training text, from which the held-out part is taken.
        settings: how to train.
    """

    def __init__(self, target: LoadedModel, student: Any, documents: Documents, settings: DistilSettings) -> None:
        if len(documents.lengths) < 2:
            raise ConfigError("training needs two documents at least.", field="text", fix="Raise --tokens.")
        self._target, self._student, self._settings = target, student, settings
        self._device = target.device
        self._half = target.dtype == torch.bfloat16
        use_library_attention(target.model)
        check_head(target.model, self._device)
        order = np.random.default_rng(settings.seed).permutation(len(documents.lengths))
        cut = max(1, int(len(order) * settings.heldout))
        self.heldout = documents.select(order[:cut])
        self.training = documents.select(np.sort(order[cut:]))
        self.parameters = own_parameters(student)
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=self._device.type == "cuda",
        )
        self._score = torch.compile(divergence, dynamic=True) if settings.compile else divergence
        self.step, self.tokens = 0, 0
        self._seconds, self._since = 0.0, time.monotonic()
        self._epoch, self._batches = -1, list[IntArray]()
        self._epoch_start = 0

    @property
    def seconds(self) -> float:
        """Time spent so far, over all interruptions."""
        return self._seconds + time.monotonic() - self._since

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        steps = self.step / self._settings.steps if self._settings.steps else 0.0
        return min(1.0, max(steps, self.seconds / self._settings.seconds if self._settings.seconds else 0.0))

    def train_step(self) -> torch.Tensor:
        """One optimiser step; the mean loss, on the device."""
        rate = learning_rate(self._settings, self.progress)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch(self.training, self._next_documents())
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            with torch.no_grad():
                wanted = body(self._target.model, batch.tokens)[batch.scored]  # [N, D]
            hidden = body(self._student, batch.tokens)[batch.scored]  # [N, D]
        leaf = hidden.detach().requires_grad_()
        total = torch.zeros((), device=self._device)
        for rows in _chunks(len(leaf), self._settings.chunk_rows):
            with self._autocast():
                loss, _, _ = self._laws(wanted[rows], leaf[rows])
            mean = loss.sum() / len(leaf)
            mean.backward()  # type: ignore[no-untyped-call]
            total += mean.detach()
        hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._settings.clip)
        self._optimizer.step()
        self.step += 1
        self.tokens += len(leaf)
        return total

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Loss, acceptance and agreement on the held-out text."""
        sums = torch.zeros(5, dtype=torch.float64, device=self._device)  # loss, n, accepted, agreed, n of answers
        for which in _batches_by_length(self.heldout.lengths, self._settings.batch_tokens, None):
            if sums[1] >= self._settings.heldout_tokens:
                break
            batch = self._batch(self.heldout, which)
            with self._autocast():
                wanted = body(self._target.model, batch.tokens)[batch.scored]
                hidden = body(self._student, batch.tokens)[batch.scored]
            own = batch.own[batch.scored]
            for rows in _chunks(len(own), self._settings.chunk_rows):
                with self._autocast():
                    loss, overlap, same = self._laws(wanted[rows], hidden[rows])
                parts = (loss, torch.ones_like(loss), overlap * own[rows], same * own[rows], own[rows].float())
                sums += torch.stack([part.double().sum() for part in parts])
        loss_sum, n, accepted, agreed, answers = sums.tolist()
        return Measurement(
            self.step, self.seconds, self.tokens, loss_sum / n, accepted / max(answers, 1), agreed / max(answers, 1)
        )

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything a later process needs: tensors and facts."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, value in self._optimizer.state[p].items():
                tensors[f"{key}/{name}"] = torch.as_tensor(value).detach()
        return tensors, {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Go on from `state`."""
        moments = {}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            parameter.copy_(tensors[f"weight/{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
            if keys:
                moments[i] = {key: tensors[f"{key}/{name}"] for key in keys}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.tokens = int(facts["step"]), int(facts["tokens"])
        self._seconds, self._since = float(facts["seconds"]), time.monotonic()
        self._epoch, self._batches, self._epoch_start = -1, [], 0

    def _laws(self, wanted: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            target = head(self._target.model, wanted)
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self._score(
            target, head(self._student, hidden), self._settings.tv_weight
        )
        return result

    def _next_documents(self) -> IntArray:
        """Documents of the next step. The order is a function of the seed and the step, so nothing need be kept."""
        while self.step - self._epoch_start >= len(self._batches):
            self._epoch_start += len(self._batches)
            self._epoch += 1
            rng = np.random.default_rng((self._settings.seed, self._epoch))
            self._batches = list(_batches_by_length(self.training.lengths, self._settings.batch_tokens, rng))
        return self._batches[self.step - self._epoch_start]

    def _batch(self, documents: Documents, which: IntArray) -> Batch:
        longest = int(documents.lengths[which].max())
        starts = documents.starts
        tokens = np.zeros((len(which), longest), dtype=np.int64)
        own = np.zeros((len(which), longest), dtype=np.bool_)
        for row, i in enumerate(which):
            piece = slice(starts[i], starts[i] + documents.lengths[i])
            tokens[row, : documents.lengths[i]] = documents.tokens[piece]
            own[row, : documents.lengths[i] - 1] = documents.own[piece][1:]
        scored = np.arange(longest)[None, :] < documents.lengths[which][:, None] - 1
        return Batch(*(torch.from_numpy(a).to(self._device) for a in (tokens, scored, own)))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half)


def learning_rate(settings: DistilSettings, progress: float) -> float:
    """Linear warm-up, then half a cosine down to the final share."""
    if progress < settings.warmup:
        return settings.learning_rate * max(progress / settings.warmup, 0.01)
    rest = (progress - settings.warmup) / (1.0 - settings.warmup)
    wave = 0.5 * (1.0 + math.cos(math.pi * min(rest, 1.0)))
    return settings.learning_rate * (settings.final + (1.0 - settings.final) * wave)


def _batches_by_length(lengths: IntArray, budget: int, rng: np.random.Generator | None) -> Iterator[IntArray]:
    """Batches of documents that fill at most `budget` tokens each, filling included; in random order with `rng`."""
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    window = max(1, _WINDOW * budget // max(1, int(lengths.mean())))
    batches: list[IntArray] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        while len(part):
            rows = max(1, budget // int(lengths[part[0]]))
            batches.append(part[:rows])
            part = part[rows:]
    places = range(len(batches)) if rng is None else rng.permutation(len(batches))
    return (batches[i] for i in places)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]

"""The values that flow between the stages of a step.

    schedule -> ScheduledBatch -> plan -> SpecPlan -> draft -> DraftBatch -> trim -> DraftBatch
    -> verify -> TargetScores -> accept -> Acceptance -> commit -> StepOutput

Two edges go backward: `StepStats` to the next plan and `Observation` to the drafters.

Conventions, stated once:
- the *root* of a request is its last committed token, whose KV is not computed yet; it is not a node of the tree;
- draft nodes are numbered 0..n-1, every parent before its children; `parents[i] == -1` means "child of the root";
- siblings stand in the order in which their drafter made them;
- what is made anew for every request in every step is a named tuple, which costs a fifth of a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.arrays import BoolArray, FloatArray, IntArray
from paceline.engine.draft_progress import KeepDrafting
from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import FinishReason, Request


class Tap(Enum):
    """What of the target's forward a drafter may ask to see."""

    TOP_IDS = "top_ids"
    """The most likely token ids of every verified node."""


class ScheduledRequest(NamedTuple):
    """One request's share of a step: tokens `start .. start + num_tokens` of its committed sequence.

    `samples` says that the share ends at the root, so that the step commits tokens for this request. A `carried` root
    is the sample of that row of the step in flight, which nobody has read: it is not among the request's tokens yet.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    carried: int | None = None


@dataclass(frozen=True)
class ScheduledBatch:
    """Who runs in this step; the blocks for the committed tokens are allocated already."""

    items: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        """Committed tokens in the forward, draft nodes not counted."""
        return sum(item.num_tokens for item in self.items)

    @cached_property
    def sampling(self) -> tuple[ScheduledRequest, ...]:
        """The requests that commit tokens in this step."""
        return tuple(item for item in self.items if item.samples)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Draft nodes of the whole batch that may be verified, best first, and how many are verified in any case."""

    survival: FloatArray  # [n], descending by worth (weight times survival)
    request: IntArray  # [n], row in `ScheduledBatch.sampling`
    fixed: IntArray  # [num_sampling]


class Cut(Protocol):
    """A policy's answer to the trim stage: how many nodes are verified."""

    def size(self, candidates: Candidates) -> int:
        """The first so many candidates are worth verifying."""
        ...


@dataclass(frozen=True, slots=True)
class SpecPlan:
    """How far each sampling request may look ahead, and what a node is believed to be worth.

    `budgets[i]` is the most nodes of the i-th request of `ScheduledBatch.sampling`; `drafters` are asked in this
    order; `bucket` is the most nodes of the whole batch; `acceptance[drafter][i, key]` is the estimated probability
    that a node of that confidence class is accepted for request i when its parent was. `limits[drafter]` is the most
    nodes that drafter may propose for a request, the same for all or one number each. Without `cut` the best `bucket`
    nodes are verified whatever they cost.
    """

    budgets: IntArray  # [num_sampling]
    drafters: tuple[str, ...]
    bucket: int
    acceptance: Mapping[str, FloatArray]  # [num_sampling, num_keys] each
    limits: Mapping[str, int | IntArray] = field(default_factory=dict)
    cut: Cut | None = None
    fixed: frozenset[str] = frozenset()
    """Drafters whose nodes are verified whatever the cut says."""
    weights: FloatArray | None = None  # [num_sampling]
    """What a token of each request is worth beside another's; None: all the same."""
    observers: frozenset[str] | None = None
    """Drafters that are shown what the step committed; None: all."""
    depths: Mapping[str, int] = field(default_factory=dict)
    """Most forwards of drafters that take their own; without an entry, as many as their limit."""
    keep_drafting: KeepDrafting | None = None
    """Who takes another draft forward; None: everyone whose budget is not used up (and always, of a fixed drafter)."""
    slot_price: float | None = None
    """Set where the plan itself found that no node would be worth its slot."""

    @property
    def looks_ahead(self) -> bool:
        """False selects the plain decode path."""
        return self.bucket > 0 and bool(self.drafters)


@dataclass(frozen=True)
class DraftBatch:
    """One tree per sampling request of the step, in the order of `ScheduledBatch.sampling`."""

    drafted: tuple[DraftTree, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    slot_price: float | None = None
    """Survival of the last node kept by a cut; 1 where none was worth its slot."""
    kept: BoolArray | None = None
    """Which nodes of the drafted trees are left, one after the other; None: all.  # [drafted nodes]"""

    @cached_property
    def trees(self) -> tuple[DraftTree, ...]:
        """What is left of every tree."""
        if self.kept is None:
            return self.drafted
        trees, start = [], 0
        for tree, size in zip(self.drafted, [len(tree.tokens) for tree in self.drafted], strict=True):
            trees.append(tree.keep(self.kept[start : start + size].nonzero()[0]) if size else tree)
            start += size
        return tuple(trees)

    @cached_property
    def num_nodes(self) -> int:
        """Draft nodes of the whole batch."""
        return sum(map(len, self.drafted)) if self.kept is None else int(np.count_nonzero(self.kept))


NO_LAW, NOT_DRAWN = -1, -2
"""Instead of a sample: the logits hold no finite maximum; the device did not draw."""


@dataclass(frozen=True)
class TargetScores:
    """The target's logits where they are needed.

    `first_row[i]` is the row of the i-th sampling request's root; its nodes follow in order. Rows are brought to the
    host once, on first use.
    """

    logits: torch.Tensor  # [num_rows, vocab]
    first_row: tuple[int, ...]
    prompt_rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # request id -> [start, stop) rows
    read: Callable[[], IntArray] | None = None
    """Waits for the target's own sample of every row, where the device draws it; or `NOT_DRAWN`, or `NO_LAW`.
    # [num_rows]"""
    all_drawn: bool = False
    """Whether the device draws for every row."""
    transform: str | None = None
    """The target transform that made the logits; None: they are the model's own."""
    transform_seconds: float = 0.0
    """What its own forward took beside the target's."""
    errors: Mapping[str, Exception] = field(default_factory=dict)
    """Requests for which the declared target has no law, and why."""

    @cached_property
    def drawn(self) -> IntArray | None:
        """What `read` finds, once.  # [num_rows]"""
        return None if self.read is None else self.read()

    @cached_property
    def host(self) -> NDArray[np.float32]:
        """All rows in fp32 on the host.  # [num_rows, vocab]"""
        logits = self.logits
        if logits.is_cuda or logits.dtype != torch.float32:
            logits = logits.float().cpu()
        rows: NDArray[np.float32] = logits.numpy()
        return rows

    @cached_property
    def argmax(self) -> IntArray:
        """Likeliest token of every row, ties to the lowest id.  # [num_rows]"""
        if self.logits.is_cuda:
            best: IntArray = self.logits.float().argmax(dim=-1).cpu().numpy()
            return best
        return np.asarray(self.host.argmax(axis=-1), dtype=np.int64)

    @cached_property
    def finite(self) -> BoolArray:
        """Whether the row's likeliest token has a finite logit (NaN counts as likeliest).  # [num_rows]"""
        if self.logits.is_cuda:
            peaks = self.logits.float().amax(dim=-1).cpu().numpy()
        else:
            peaks = self.host[np.arange(len(self.host)), self.argmax]
        return np.asarray(np.isfinite(peaks))

    def top_ids(self, start: int, stop: int, k: int) -> IntArray:
        """The k likeliest tokens of rows `start .. stop`, likeliest first, found on the device.  # [rows, k]

        The k largest entries lie in the k blocks with the largest maxima, so few entries are sorted.
        """
        rows = self.logits[start:stop].float()
        width = rows.shape[1]
        block = 64
        if width % block or width < 4 * k * block:
            found: IntArray = rows.topk(min(k, width), dim=1).indices.cpu().numpy()
            return found
        blocks = rows.view(len(rows), -1, block)
        best = blocks.amax(dim=2).topk(k, dim=1).indices  # [rows, k]
        inside = blocks.gather(1, best[:, :, None].expand(-1, -1, block)).flatten(1)
        place = inside.topk(k, dim=1).indices
        ids: IntArray = (best.gather(1, place // block) * block + place % block).cpu().numpy()
        return ids


class TargetTransform(Protocol):
    """Declares another target: its logits are made of the model's own, and everything after samples from it exactly.

    What it gives for a row may depend on the request and the tokens up to there, and on nothing else: not on which
    nodes a draft has, nor on what else is in the batch.
    """

    name: str
    """What responses call it."""

    def room(self, request: Request) -> int:
        """Most draft nodes for which it can give laws."""
        ...

    def apply(self, batch: ScheduledBatch, drafts: DraftBatch, scores: TargetScores) -> TargetScores:
        """The declared target's scores for the root and every node of all sampling requests."""
        ...


class Walk(NamedTuple):
    """What an acceptance rule decided for one request.

    `path` are the accepted nodes from the root down; `tokens` what is committed: the path's tokens and one token
    more (bonus or recovered).
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One walk per sampling request; None where that request failed (`errors` says why) or had ended before."""

    walks: tuple[Walk | None, ...]
    errors: Mapping[str, Exception] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class InFlight:
    """A launched step whose result has not been read; what is learned of it meanwhile is filled in."""

    batch: ScheduledBatch
    plan: SpecPlan
    drafted: DraftBatch
    verified: DraftBatch
    scores: TargetScores
    started: float
    guesses: tuple[int | None, ...] = ()
    """Where the roots are not known yet: the draft's first token, from which each verified tree hangs; None: no tree.
    Empty: the roots are known."""
    wrong: bool = False
    """Whether no root was guessed right, so that every request gets one token and no tree is walked."""

    @property
    def walks(self) -> bool:
        """Whether a request may get more than one token."""
        return not self.wrong and self.verified.num_nodes > 0


@dataclass(slots=True, eq=False, kw_only=True)
class AcceptedStep(InFlight):
    """A step whose result is known."""

    acceptance: Acceptance
    forward_seconds: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one token under the raw logits, with the likeliest alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RequestOutput(NamedTuple):
    """News of one request after a step.

    `drafters[i]` guessed `token_ids[i]` (None: the target's own token); `pieces[i]` is the text that this token
    released, which is empty while a character or a possible stop string is incomplete.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    drafters: tuple[str | None, ...] = ()
    num_draft_tokens: int = 0
    """Draft nodes verified for this request in the step."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_field: str | None = None
    """The request's field that is to blame; None where it is not the request's fault."""

    @property
    def text(self) -> str:
        """The text released in this step."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """All news of one step."""

    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class NodeLabels:
    """Whether drafted nodes agreed with what was committed, given that their parents did.

    Nodes off the committed path have no label; trimmed nodes on it have one.
    """

    names: tuple[str, ...]
    """The drafters."""
    drafter: IntArray  # [n], index in `names`
    key: IntArray  # [n], confidence class
    depth: IntArray  # [n], 1 below the root
    request: IntArray  # [n], row in `StepStats.requests`
    predicted: FloatArray  # [n], the plan's estimate
    accepted: BoolArray  # [n]

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, slots=True)
class StepStats:
    """What the next plan learns from a step."""

    requests: tuple[Request, ...]
    """Those that committed tokens."""
    num_prompt_tokens: int
    """Committed tokens in the forward beside the roots."""
    num_context_tokens: int
    """Tokens whose KV was read: the lengths of all sequences."""
    num_sequences: int
    committed: IntArray
    """Tokens committed for each request.  # [len(requests)]"""
    verified: IntArray
    """Draft nodes verified for each request.  # [len(requests)]"""
    forward_seconds: float
    step_seconds: float
    draft_seconds: Mapping[str, float]
    """Time each drafter that was asked took, its learning included."""
    draft_depths: Mapping[str, int]
    """Longest path each drafter proposed: the number of its forwards if it is a model."""
    gains: Mapping[str, float]
    """Tokens each drafter was expected to bring: the survival of its verified nodes."""
    nodes: Mapping[str, int]
    """Verified nodes of each drafter that was asked."""
    labels: NodeLabels
    slot_price: float | None = None
    """See `DraftBatch.slot_price`."""
    asked: Mapping[str, int] = field(default_factory=dict)
    """Requests that each drafter was asked for; of one that is not here, all."""
    ahead: bool = False
    """Whether the step was launched behind another, before that one was read."""

    @property
    def num_sampling(self) -> int:
        """Requests that committed tokens."""
        return len(self.requests)

    @property
    def num_committed(self) -> int:
        """Tokens committed for all requests."""
        return int(self.committed.sum())

    @property
    def num_draft_nodes(self) -> int:
        """Draft nodes verified for all requests."""
        return int(self.verified.sum())


@dataclass(frozen=True, slots=True)
class Observation:
    """What a drafter may learn from one request's step."""

    request: Request
    committed: tuple[int, ...]
    row_tokens: IntArray  # [num_rows] input token of the root and of every verified node
    top_ids: IntArray | None = None  # [num_rows, k] when Tap.TOP_IDS was asked for
    row_parents: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Row of each row's parent; -1 for the root.  # [num_rows]"""

"""Recorded outputs of a real model, and drafters that replay what was or would have been drafted on them.

A trace file has one object a line: `id`, `prompt_token_ids`, `generated_token_ids` (greedy), and for every drafter that
was recorded `acc_NAME: {"acc_len": [...]}`, the number of tokens that a step at each output position committed, the
target's own token included. Under greedy decoding a draft is accepted exactly as far as it agrees with the recorded
output, so drafters that read only tokens are run for real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paceline.arrays import FloatArray, IntArray
from paceline.config import SamplingParams
from paceline.draft import registry
from paceline.draft.base import NOTHING, DraftContext, Proposal, chain
from paceline.engine.draft_progress import DraftProgress, KeepDrafting
from paceline.engine.draft_tree import DraftTree
from paceline.engine.request import Request
from paceline.engine.types import Observation, Tap
from paceline.errors import InputError

RECORDED = "recorded:"
DEEPEST = 16
"""Draft tokens that are kept of every proposal."""
_KEYS = 16
WRONG = 1 << 40
"""Token ids from here on are in no vocabulary."""


@dataclass(frozen=True, eq=False, slots=True)
class Recorded:
    """One request of a trace: its prompt, what the model said, and how many draft tokens were right where."""

    id: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    right: Mapping[str, IntArray]  # [len(output)] by recorded drafter


def read_trace(path: str | Path, *, limit: int | None = None) -> list[Recorded]:
    """The requests of a trace file.

    Raises:
        InputError: it cannot be read, a line does not have the form above (the message names it), or it is empty.
    """
    rows: list[Recorded] = []
    seen: set[str] = set()
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and (limit is None or len(rows) < limit):
                    rows.append(_row(line, number, path))
                    if rows[-1].id in seen:
                        raise InputError(f"line {number} of {path} has the id of an earlier one.", field="--trace")
                    seen.add(rows[-1].id)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}).", field="--trace") from error
    if not rows:
        raise InputError(f"{path} holds no request.", field="--trace")
    return rows


def _row(line: str, number: int, path: str | Path) -> Recorded:
    try:
        item = json.loads(line)
        prompt, output = tuple(item["prompt_token_ids"]), tuple(item["generated_token_ids"])
        if not output or not all(isinstance(t, int) and t >= 0 for t in (*prompt, *output)):
            raise ValueError("token ids must be whole numbers, and some must be generated")
        right = {
            key.removeprefix("acc_"): _right(value["acc_len"], len(output))
            for key, value in item.items()
            if key.startswith("acc_")
        }
        return Recorded(str(item.get("id", number)), prompt or (0,), output, right)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"line {number} of {path} is no recorded request ({reason}).", field="--trace") from error


def _right(lengths: Sequence[int], count: int) -> IntArray:
    """Right draft tokens per position, as far as the output goes; positions without a record have none."""
    right = np.zeros(count, dtype=np.int64)
    if not all(isinstance(n, int) for n in lengths):
        raise ValueError("acc_len must hold whole numbers")
    known = np.asarray(lengths[:count], dtype=np.int64) - 1
    if known.size and known.min() < 0:
        raise ValueError("acc_len must be at least 1")
    right[: len(known)] = known
    return np.minimum(right, np.arange(count, 0, -1))


def check_drafter(trace: Sequence[Recorded], drafter: str) -> None:
    """Refuse a drafter that cannot be replayed.

    Raises:
        InputError: some request has no record of it, or it needs more than tokens.
    """
    if not drafter.startswith(RECORDED):
        _token_reader(drafter)
        return
    name = drafter.removeprefix(RECORDED)
    for item in trace:
        if name not in item.right:
            known = ", ".join(RECORDED + key for key in item.right) or "nothing"
            raise InputError(
                f"request {item.id} has no record of {name!r}.", field="--drafter", fix=f"It has: {known}."
            )


class Script:
    """What one drafter proposes at every output position of every request of a trace.

    Args:
        trace: the requests.
        drafter: one that `check_drafter` accepts: `recorded:NAME`, or a drafter of ours that reads only tokens.
    """

    def __init__(self, trace: Sequence[Recorded], drafter: str) -> None:
        self.name = drafter
        self.recorded = drafter.startswith(RECORDED)
        self._proposals: dict[str, list[Proposal]] = {}
        if self.recorded:
            self.prior: FloatArray = np.full(_KEYS, 0.6)
            for item in trace:
                self._proposals[item.id] = list(_replayed(item, drafter.removeprefix(RECORDED)))
        else:
            made = _token_reader(drafter)
            self.prior = made.prior
            for item in trace:
                self._proposals[item.id] = list(_drafted(item, made))

    def at(self, request_id: str, position: int, budget: int) -> Proposal:
        """The proposal after `position` output tokens, at most `budget` nodes of it."""
        whole = self._proposals[request_id][position]
        if len(whole) <= budget:
            return whole
        return Proposal(whole.tokens[:budget], whole.parents[:budget], whole.key[:budget])


def _replayed(item: Recorded, name: str) -> Iterator[Proposal]:
    for position, right in enumerate(item.right[name].tolist()):
        good = list(item.output[position : position + min(right, DEEPEST)])
        wrong = [WRONG + depth for depth in range(DEEPEST - len(good))]
        yield chain(good + wrong, [min(depth, _KEYS - 1) for depth in range(DEEPEST)])


def _token_reader(name: str) -> Any:
    entry = registry.entry(name)
    if entry.needs:
        raise InputError(
            f"{name} reads more than tokens and cannot be run on a trace.",
            field="--drafter",
            fix="Use recorded:NAME for what the trace has a record of, or a drafter that reads tokens, such as ngram.",
        )
    return registry.create(name, {}, {})


def _drafted(item: Recorded, drafter: Any) -> Iterator[Proposal]:
    request = Request(item.id, list(item.prompt), len(item.prompt), SamplingParams(temperature=0.0), seed=0)
    for token in item.output:
        yield drafter.propose([DraftContext(request, DEEPEST)])[0]
        request.token_ids.append(token)
    drafter.forget(request)


class ScriptedDrafter:
    """A drafter that proposes what its script says.

    Args:
        script: the proposals.
        cost_per_token: whether each depth takes a forward of a draft model.
        truth: for each request id its output, if confidence classes shall say which nodes are right (1) and which are
            not (0): what an oracle knows.
    """

    taps: frozenset[Tap] = frozenset()
    blocks = None

    def __init__(
        self, script: Script, *, cost_per_token: bool, truth: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self.name = script.name
        self.cost_per_token = cost_per_token
        self._script = script
        self._truth = truth
        self.prior = script.prior if truth is None else np.array([0.0, 1.0])

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]:
        """One proposal per context, as long as the plan wants it."""
        whole = [self._propose(context) if context.budget > 0 else NOTHING for context in contexts]
        keep = next((context.keep_drafting for context in contexts), None)
        if keep is None or not self.cost_per_token:
            return whole
        lengths = chain_lengths(contexts, whole, keep)
        return [Proposal(p.tokens[:n], p.parents[:n], p.key[:n]) for p, n in zip(whole, lengths, strict=True)]

    def _propose(self, context: DraftContext) -> Proposal:
        item_id, position = trace_id(context.request), context.request.num_output
        found = self._script.at(item_id, position, context.budget)
        if self._truth is None or not len(found):
            return found
        return Proposal(found.tokens, found.parents, right_nodes(found, self._truth[item_id][position:]))

    def observe(self, observation: Observation) -> None:
        """Nothing: the script is written."""

    def forget(self, request: Request) -> None:
        """Nothing is kept."""


def chain_lengths(contexts: Sequence[DraftContext], whole: Sequence[Proposal], keep: KeepDrafting) -> list[int]:
    """Levels after which the plan stops each of several recorded chains.

    A record holds no laws, so all that the plan is told is what its own estimates say of the classes.
    """
    lengths = [min(len(proposal), 1) for proposal in whole]
    survival = np.ones(len(whole))
    active = [i for i, length in enumerate(lengths) if length]
    while active:
        for i in active:
            acceptance = contexts[i].acceptance
            assert acceptance is not None
            survival[i] *= acceptance[whole[i].key[lengths[i] - 1]]
        active = [i for i in active if lengths[i] < len(whole[i])]
        if not active:
            break
        unknown = np.zeros(len(active))
        progress = DraftProgress(
            depth=lengths[active[0]],
            rows=np.array([contexts[i].row for i in active], dtype=np.int64),
            nodes=np.array([lengths[i] for i in active], dtype=np.int64),
            survival=survival[active],
            chain_survival=survival[active],
            entropy=unknown,
            confidence=unknown,
        )
        active = [i for i, goes in zip(active, keep.keep(progress).tolist(), strict=True) if goes]
        for i in active:
            lengths[i] += 1
    return lengths


def running_id(item: Recorded, number: int) -> str:
    """The id of the request that replays `item` as the run's `number`-th."""
    return f"{item.id}#{number}"


def trace_id(request: Request) -> str:
    """The recorded request that a running one replays."""
    return request.id.rpartition("#")[0]


def right_nodes(proposal: Proposal | DraftTree, output: Sequence[int]) -> IntArray:
    """1 for every node that lies on the output's path, 0 for the others.  # [n]"""
    depth = {-1: 0}
    right = np.zeros(len(proposal), dtype=np.int64)
    for node, (token, parent) in enumerate(zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True)):
        at = depth.get(parent)
        if at is not None and at < len(output) and token == output[at]:
            depth[node], right[node] = at + 1, 1
    return right

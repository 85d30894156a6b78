"""What a step costs: seconds of a target forward by its size, and what surrounds it.

    T(N, S, C) = products(N) + S * per_sequence + C * per_context_token + per_step

N tokens pass through the network in S sequences while C context tokens are read. `products` is a measured table,
linear in between, or a step function where forwards are padded up to fixed sizes (CUDA graphs). Online, the model is
multiplied by what steps really took over what was expected: one factor per number of requests and draft size, each
leaning on the broader ones as long as it has seen little. So a busy machine, longer contexts and host time that the
table does not know are followed, while the shape, which decides how far to look ahead, stays measured.

The JSON form (`paceline profile --json`, read by `paceline bench replay --cost`) is described at `CostTable`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paceline.arrays import FloatArray
from paceline.engine.types import StepStats
from paceline.errors import InputError

FORMAT = "paceline-cost/1"
_FADE = 0.98
_LEAN = 6.0
"""Steps after which a factor trusts itself as much as the broader one."""
_LEVELS = 14
"""Sizes are told apart by powers of two up to 2 ** (_LEVELS - 1)."""


@dataclass(frozen=True, slots=True)
class DraftCost:
    """Seconds that one draft of a batch takes: per step, per request and per depth (a draft model's forwards)."""

    per_step: float = 0.0
    per_request: float = 0.0
    per_depth: float = 0.0

    def seconds(self, depth: float, requests: float) -> float:
        """Time to draft `depth` tokens for each of `requests`."""
        return self.per_step + self.per_request * requests + self.per_depth * depth


@dataclass(frozen=True, slots=True)
class CostTable:
    """A measured machine and model. As JSON, the fields of this class with `"format": "paceline-cost/1"`.

    Raises:
        InputError: a number is missing, not positive where it must be, or out of order.
    """

    tokens: tuple[int, ...]
    """Tokens in the forward, ascending; at least two sizes."""
    seconds: tuple[float, ...]
    """Seconds of a forward of that size with one sequence and no context."""
    per_sequence: float = 0.0
    """Seconds for every further sequence of the forward."""
    per_context_token: float = 0.0
    """Seconds for every context token read, over all sequences."""
    per_step: float = 0.0
    """Seconds of host work around a forward."""
    padded: bool = False
    """Whether forwards are padded up to the next of `tokens` (CUDA graphs)."""
    draft: Mapping[str, DraftCost] = field(default_factory=dict)
    """Cost of drafters whose tokens take forwards of their own."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, where and how."""

    def __post_init__(self) -> None:
        numbers = (*self.seconds, self.per_sequence, self.per_context_token, self.per_step)
        sound = all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers)
        _require(sound, "holds a time that is not a number of seconds")
        _require(len(self.tokens) == len(self.seconds) >= 2, "needs two sizes at least, and a time for each")
        _require(all(isinstance(n, int) and n >= 1 for n in self.tokens), "holds a size that is not a whole number")
        _require(list(self.tokens) == sorted(set(self.tokens)), "holds sizes that are not ascending")
        _require(min(self.seconds) > 0, "holds a forward that takes no time")

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: object, name: str = "cost") -> CostTable:
        """Read the documented form.

        Raises:
            InputError: it is not that.
        """
        try:
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise InputError(f'is no cost table ("format" must be "{FORMAT}").', field=name)
            fields = {key: value[key] for key in cls.__dataclass_fields__ if key in value}
            fields["draft"] = {key: DraftCost(**cost) for key, cost in value.get("draft", {}).items()}
            fields["tokens"], fields["seconds"] = tuple(value["tokens"]), tuple(value["seconds"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"is no cost table ({error!r}).", field=name) from error

    @classmethod
    def load(cls, path: str | Path, name: str = "cost") -> CostTable:
        """Read a file in the documented form.

        Raises:
            InputError: it cannot be read or is not that.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")), name)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"cannot read {path} ({error}).", field=name) from error


class CostModel:
    """A cost table and its corrections.

    Args:
        table: what was measured.
        adapt: whether to follow measured steps.
    """

    def __init__(self, table: CostTable, *, adapt: bool = True) -> None:
        self.table = table
        self._adapt = adapt
        self._sizes = np.array(table.tokens, dtype=np.float64)
        self._seconds = np.maximum.accumulate(np.array(table.seconds, dtype=np.float64))
        middle = min(len(self._sizes) // 2, len(self._sizes) - 2)
        slope = (self._seconds[-1] - self._seconds[middle]) / (self._sizes[-1] - self._sizes[middle])
        self._slope = max(float(slope), 1e-9)
        self._draft = dict(table.draft)
        # fading [steps, sum of log(measured / expected)]: of all steps, by requests, and by requests and draft size
        self._all = np.zeros(2)
        self._by_requests = np.zeros((2, _LEVELS))
        self._by_size = np.zeros((2, _LEVELS, _LEVELS))

    def table_seconds(self, num_tokens: FloatArray, num_sequences: int, num_context: float) -> FloatArray:
        """Expected seconds of steps with `num_tokens` tokens, without corrections."""
        if self.table.padded:
            at = np.minimum(np.searchsorted(self._sizes, num_tokens), len(self._sizes) - 1)
            products = self._seconds[at]
        else:
            products = np.interp(num_tokens, self._sizes, self._seconds)
        beyond = np.maximum(num_tokens - self._sizes[-1], 0.0) * self._slope
        around = (
            self.table.per_step
            + self.table.per_sequence * (num_sequences - 1)
            + self.table.per_context_token * num_context
        )
        result: FloatArray = products + beyond + around
        return result

    def step_seconds(self, num_committed: int, most: int, num_requests: int, num_context: float) -> FloatArray:
        """Expected seconds of steps over 0 .. `most` draft nodes, drafting itself not counted.  # [most + 1]

        Args:
            num_committed: committed tokens in the forward (roots and prompt chunks).
            most: most draft nodes.
            num_requests: sequences of the step.
            num_context: tokens of all of them.
        """
        nodes = np.arange(most + 1, dtype=np.float64)
        seconds = self.table_seconds(num_committed + nodes, num_requests, num_context)
        if not self._adapt:
            return seconds
        levels = np.interp(np.log2(nodes + 1.0), np.arange(_LEVELS), self._log_factors(num_requests))
        corrected: FloatArray = seconds * np.exp(levels)
        return corrected

    def draft_seconds(self, name: str, depth: float, requests: int) -> float:
        """Expected seconds of one draft; 0 for a drafter not measured yet."""
        return self._draft.get(name, DraftCost()).seconds(depth, requests)

    def learn(self, stats: StepStats) -> None:
        """Take in a step without prompt chunks; the time of its drafters goes to them."""
        if not self._adapt:
            return
        for name, depth in stats.draft_depths.items():
            self._learn_draft(name, depth, stats.num_sampling, stats.draft_seconds[name])
        if stats.num_prompt_tokens or not stats.num_sampling:
            return
        size = np.array([float(stats.num_sampling + stats.num_draft_nodes)])
        expected = self.table_seconds(size, stats.num_sequences, stats.num_context_tokens)[0]
        taken = stats.step_seconds - sum(stats.draft_seconds.values())
        # A pause of the machine must not look like the size's own cost, so outliers are clipped.
        current = self._log_factors(stats.num_sequences)[_level(stats.num_draft_nodes)]
        error = float(np.clip(np.log(max(taken, 1e-9) / expected), current - 0.7, current + 0.7))
        for counts in (
            self._all,
            self._by_requests[:, _level(stats.num_sequences - 1)],
            self._by_size[:, _level(stats.num_sequences - 1), _level(stats.num_draft_nodes)],
        ):
            counts *= _FADE
            counts += (1.0, error)

    def _log_factors(self, num_requests: int) -> FloatArray:
        """Logarithm of the correction by level of draft size.  # [_LEVELS]"""
        at = _level(num_requests - 1)
        overall = self._all[1] / max(self._all[0], 1.0)
        mine = (_LEAN * overall + self._by_requests[1, at]) / (_LEAN + self._by_requests[0, at])
        factors: FloatArray = (_LEAN * mine + self._by_size[1, at]) / (_LEAN + self._by_size[0, at])
        return factors

    def _learn_draft(self, name: str, depth: int, requests: int, seconds: float) -> None:
        known = self._draft.get(name)
        if known is None:
            share = seconds / max(depth, 1)
            self._draft[name] = DraftCost(per_depth=share) if depth else DraftCost(per_step=seconds)
            return
        expected = known.seconds(depth, requests)
        ratio = float(np.clip(seconds / expected, 0.5, 2.0)) ** (1.0 - 0.9) if expected > 0 else 1.0
        self._draft[name] = DraftCost(known.per_step * ratio, known.per_request * ratio, known.per_depth * ratio)


def _level(size: int) -> int:
    return min(int(math.log2(size + 1) + 0.5), _LEVELS - 1)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(f"{message}.", field="cost")

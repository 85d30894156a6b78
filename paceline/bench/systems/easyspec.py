"""EasySpec (2502.02493): attention layers of the draft model side by side. The draft model is a copy of the target."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median

import torch

from paceline.bench.systems.base import Row, above, at_least, at_most, exactly, suite
from paceline.bench.systems.context import Context
from paceline.bench.systems.layer_paths import PROMPTS, TOKENS, rows, texts
from paceline.bench.systems.measures import Counted, count, greedy_identity
from paceline.config import SamplingParams
from paceline.model.path import ForwardPath

GROUP = 4
_GROUPS = (1, 2, 4, 8)
_MOST_LOST = 0.1
"""Of the agreement, with groups of four; from the catalogue."""
_DRAFTED = 4


def _spec(options: str) -> str:
    return f"easyspec:model=self,k={_DRAFTED},{options}"


def _identity(context: Context) -> Iterator[Row]:
    """E0: greedy output equals plain."""
    yield greedy_identity(context, context.llm(_spec(f"group={GROUP}")))[0]


def _same_bits(context: Context) -> Iterator[Row]:
    """Groups of one are the draft model."""
    layers = context.llm().engine.runner.kv.shape.num_layers
    text = texts(context)[0]
    same = torch.equal(rows(context, text, ForwardPath.in_groups(layers, 1)), rows(context, text, _whole(layers)))
    yield exactly("groups of one give the draft model's bits", str(same), "True", f"{len(text.tokens)} tokens")


def _whole(layers: int) -> ForwardPath:
    return ForwardPath.without(layers, ())


def _groups(context: Context) -> Iterator[Row]:
    """Acceptance by the size of the groups, and time of a draft forward."""
    found = {group: _drafted(context, f"group={group}") for group in _GROUPS}
    accepted = [_share(found[group]) for group in _GROUPS]
    shown = ", ".join(f"{g}: {a:.3f}" for g, a in zip(_GROUPS, accepted, strict=True))
    note = f"accepted of what is drafted, T=0, k={_DRAFTED}, by layers of a group: {shown}"
    yield at_least("acceptance falls with the group, least step", min(a - b for a, b in pairwise(accepted)), 0.0, note)
    yield at_most(f"acceptance lost with groups of {GROUP}", accepted[0] - accepted[2], _MOST_LOST, note)
    ratio, note = _seconds(context)
    yield above(f"a draft forward in groups of {GROUP} is faster by", ratio, 1.0, note)


def _calibration(context: Context) -> Iterator[Row]:
    """With and without an exact forward at the start of each round."""
    longer = context.few(160, 24)
    halves = {}
    for calibrate in (1, 0):
        found = _by_half(context, f"group={GROUP},calibrate={calibrate}", longer)
        halves[calibrate] = found
    note = "acceptance in the first and the second half of the output: " + ", ".join(
        f"{'with' if c else 'without'} {a:.3f} and {b:.3f}" for c, (a, b) in halves.items()
    )
    (first, second), (bare_first, bare_second) = halves[1], halves[0]
    yield above("calibration raises acceptance by", (first + second - bare_first - bare_second) / 2, 0.02, note)
    yield above("without it acceptance falls along the output, more than with it",
                (bare_first - bare_second) - (first - second), 0.0, note)  # fmt: skip


def _by_half(context: Context, options: str, tokens: int) -> tuple[float, float]:
    """Acceptance over the first and the second half of the output."""
    short = _drafted(context, options, tokens // 2)
    whole = _drafted(context, options, tokens)
    later = (whole.accepted_tokens - short.accepted_tokens) / max(whole.draft_tokens - short.draft_tokens, 1)
    return _share(short), later


def _drafted(context: Context, options: str, tokens: int = 0) -> Counted:
    tokens = tokens or context.few(*TOKENS)

    def make() -> Counted:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        prompts: Sequence[Sequence[int]] = context.prompts(context.few(*PROMPTS))
        return count(context.llm(_spec(options)), prompts, params, one_by_one=False)

    context.say(f"EasySpec with {options}")
    found: Counted = context.once(("easyspec", options, tokens), make)
    return found


def _share(found: Counted) -> float:
    return found.accepted_tokens / found.draft_tokens


def _seconds(context: Context) -> tuple[float, str]:
    """Exact over grouped time of a draft forward, in turns."""
    layers = context.llm().engine.runner.kv.shape.num_layers
    text = texts(context)[0]
    paths = {"exact": _whole(layers), "grouped": ForwardPath.in_groups(layers, GROUP)}
    times: dict[str, list[float]] = {name: [] for name in paths}
    short = type(text)(text.tokens[: text.prompt_len + 8], text.prompt_len)
    for _ in range(context.few(7, 3)):
        for name, path in paths.items():
            started = time.perf_counter()
            rows(context, short, path)
            times[name].append(time.perf_counter() - started)
    ratio = median(times["exact"]) / median(times["grouped"])
    return ratio, f"{layers} layers, one token behind {text.prompt_len}, fp32, one device, median of turns"


run = suite(_identity, _same_bits, _groups, _calibration)

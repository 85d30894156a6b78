"""Microseconds that policy `auto` takes per step: plan, trim and learn, without any model.

    python benchmarks/planning_time.py --json benchmarks/cpu/planning_time.json

Every request decodes with a chain of `nodes` draft tokens in n-gram classes, three in four of which are accepted; step
times come from a made-up machine. Shown beside the sum: `cut`, the making of shorter trees, which trim leaves to the
first who reads them, and `labels`, comparing drafts with what was committed, which is the engine's feedback. Medians
over all steps; `us/node`, of the sum, should not rise with the size.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline import SamplingParams
from paceline.bench.host import host_info
from paceline.draft import registry as drafters
from paceline.draft.base import chain
from paceline.draft.tree import build
from paceline.engine.feedback import node_labels
from paceline.engine.request import Request
from paceline.engine.types import DraftBatch, NodeLabels, ScheduledBatch, ScheduledRequest, SpecPlan, StepStats
from paceline.plan.base import DrafterLimits, LengthPolicy
from paceline.plan.cost_model import CostModel, CostTable
from paceline.plan.registry import create_policy
from paceline.plan.spec import AUTO_DRAFTERS
from paceline.plan.survival import AcceptanceEstimates
from paceline.plan.trim import trim

SIZES = ((1, 16), (8, 16), (64, 16), (256, 16), (1, 64), (1, 256), (1, 1024), (16, 64), (4, 256))
"""Requests, and draft nodes of each."""
PARTS = ("plan", "trim", "learn")
BESIDE = ("cut", "labels")
_KEYS = 16
_ACCEPTED = 0.75


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5, help="per row")
    parser.add_argument("--profile", metavar="REQUESTSxNODES", help="print where the time goes, and nothing else")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        requests, nodes = map(int, args.profile.split("x"))
        profile(Steps(requests, nodes, ("ngram",)), args.seconds)
        return
    host = host_info("float32", torch.device("cpu"))
    print(f"{host}\npython benchmarks/planning_time.py --seconds {args.seconds}\n")
    rows = [measure(n, nodes, names, args.seconds) for names in (("ngram",), AUTO_DRAFTERS) for n, nodes in SIZES]
    print(
        f"{'drafters':>8} {'requests':>8} {'nodes':>6}",
        *(f"{part:>8}" for part in (*PARTS, "sum", *BESIDE)),
        "us/node",
    )
    for row in rows:
        times = " ".join(f"{row[part]:8.1f}" for part in (*PARTS, "sum", *BESIDE))
        print(f"{row['drafters']:>8} {row['requests']:>8} {row['nodes']:>6} {times} {row['sum_per_node']:7.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"host": host, "unit": "us", "rows": rows}, indent=2) + "\n")


class Steps:
    """Decoding requests under `auto`; every call of `step` adds to `spent`."""

    def __init__(self, requests: int, nodes: int, names: tuple[str, ...]) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes = nodes
        params = SamplingParams(max_tokens=1 << 30)
        self.requests = [Request(str(i), list(range(100)), 100, params, 0) for i in range(requests)]
        items = tuple(ScheduledRequest(r, 99, 1, True) for r in self.requests)
        self.batch = ScheduledBatch(items)
        limits = [DrafterLimits(n, nodes if n == "ngram" else drafters.entry(n).most, False) for n in names]
        priors = {n: np.linspace(0.3, 0.9, _KEYS) if n in ("ngram", "prediction") else np.full(24, 0.2) for n in names}
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        table = CostTable(sizes, tuple(0.02 + 0.00001 * n for n in sizes), 0.00001, 0.0000001)
        self.policy: LengthPolicy = create_policy(
            "auto", {}, limits, AcceptanceEstimates(priors), lambda: CostModel(table)
        )
        self.spent: dict[str, list[float]] = {part: [] for part in (*PARTS, *BESIDE)}

    def step(self) -> None:
        """One step; drafting and accepting are played."""
        started = time.perf_counter()
        plan = self.policy.plan(self.batch, 1 << 30)
        planned = time.perf_counter()
        drafted = self._draft(plan)
        drafted_at = time.perf_counter()
        kept = trim(drafted, plan)
        trimmed = time.perf_counter()
        lengths = [len(tree) for tree in kept.trees]
        cut = time.perf_counter()
        accepted = np.minimum(self.rng.geometric(1.0 - _ACCEPTED, len(lengths)) - 1, lengths)
        committed = [[*range(n), -1] for n in accepted.tolist()]
        accepted_at = time.perf_counter()
        walked = [(i, t, c) for i, (t, c) in enumerate(zip(drafted.trees, committed, strict=True))]
        labels = node_labels(walked, plan.acceptance)
        labelled = time.perf_counter()
        stats = self._stats(drafted, kept, accepted, labels)
        told = time.perf_counter()
        self.policy.learn(stats)
        learned = time.perf_counter()
        for part, seconds in (
            ("plan", planned - started),
            ("trim", trimmed - drafted_at),
            ("cut", cut - trimmed),
            ("labels", labelled - accepted_at),
            ("learn", learned - told),
        ):
            self.spent[part].append(seconds)

    def _draft(self, plan: SpecPlan) -> DraftBatch:
        tokens = np.arange(self.nodes)
        trees = []
        for i in range(len(self.requests)):
            first = int(self.rng.integers(2, 5))
            keys = np.minimum(first + tokens, _KEYS - 1)
            trees.append(build("ngram", chain(tokens, keys), plan.acceptance["ngram"][i]))  # type: ignore[arg-type]
        return DraftBatch(tuple(trees), dict.fromkeys(plan.drafters, 1e-5))

    def _stats(self, drafted: DraftBatch, kept: DraftBatch, accepted: Any, labels: NodeLabels) -> StepStats:
        survival = sum(float(t.survival.sum()) for t in kept.trees)
        gains: Mapping[str, float] = {name: survival if name == "ngram" else 0.0 for name in drafted.seconds}
        return StepStats(
            requests=tuple(self.requests),
            num_prompt_tokens=0,
            num_context_tokens=100 * len(self.requests),
            num_sequences=len(self.requests),
            committed=accepted + 1,
            verified=np.array([len(t) for t in kept.trees]),
            forward_seconds=0.02,
            step_seconds=0.02,
            draft_seconds=drafted.seconds,
            draft_depths=dict.fromkeys(drafted.seconds, self.nodes),
            gains=gains,
            nodes={name: kept.num_nodes if name == "ngram" else 0 for name in drafted.seconds},
            labels=labels,
            slot_price=kept.slot_price,
        )


def measure(requests: int, nodes: int, names: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Medians of one size, in microseconds."""
    steps = Steps(requests, nodes, names)
    for _ in range(20):
        steps.step()
    steps.spent = {part: [] for part in steps.spent}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        steps.step()
    found: dict[str, Any] = {"drafters": len(names), "requests": requests, "nodes": requests * nodes}
    found |= {part: 1e6 * statistics.median(times) for part, times in steps.spent.items()}
    sums = [sum(times) for times in zip(*(steps.spent[part] for part in PARTS), strict=True)]
    found["sum"] = 1e6 * statistics.median(sums)
    found["sum_per_node"] = found["sum"] / found["nodes"]
    found["steps"] = len(sums)
    return found


def profile(steps: Steps, seconds: float) -> None:
    """By function, its own time first."""
    for _ in range(20):
        steps.step()
    profiler = cProfile.Profile()
    profiler.enable()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        steps.step()
    profiler.disable()
    print(f"{len(steps.spent['plan'])} steps")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()

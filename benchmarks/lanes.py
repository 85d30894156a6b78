"""PEARL on two threads against speculation and no look-ahead with all threads, on the real model and its draft.

    python benchmarks/lanes.py --json benchmarks/cpu/lanes.json

Without lanes each model has all cores, or half of them, while it runs; with lanes the target has half and the draft the
other half. Every schedule writes the same greedy texts (checked), prompt by prompt, schedules in random order; seconds
do not include the prompt. A ratio compares two schedules on the same prompt in the same round; intervals are of its
geometric mean (bootstrap over prompts and rounds, 95%). Before that, forwards are timed alone and beside each other,
and the choice that these times make is printed beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline import LLM, SamplingParams
from paceline.bench.host import host_info
from paceline.bench.lane_times import real_text, times
from paceline.lanes.choice import LaneTimes, choose, no_lookahead, pearl, speculation
from paceline.lanes.pearl import Pearl
from paceline.lanes.plain import plain
from paceline.lanes.plain import speculation as speculate
from paceline.lanes.threads import Threads
from paceline.lanes.tokens import Text
from paceline.lanes.work import Lanes, Process
from paceline.model.draft_weights import load_draft
from paceline.model.loader import load_model

QUESTIONS = Path(__file__).parent.parent / "paceline" / "bench" / "questions.jsonl"
Schedule = Callable[[Lanes, Text], Process]
ALL, HALF, LANES = "all cores", "half of the cores", "two lanes"
SPECULATION, PEARL = (1, 2, 3), (2, 3)
"""Lengths."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    cores = torch.get_num_threads()
    half = max(cores // 2, 1)
    loaded = load_model(args.model, dtype=args.dtype)
    llms = [LLM(model, speculation="none") for model in (loaded, load_draft("builtin", loaded))]
    questions = [json.loads(line)["turns"][0] for line in QUESTIONS.read_text().splitlines()]
    prompts = [
        llms[0].chat_prompt([{"role": "user", "content": q}]) for q in questions[:: len(questions) // args.prompts]
    ]
    prompts = prompts[: args.prompts]
    alone, beside = times(llms[0], llms[1], prompts[0], cores)
    schedules = every_schedule()
    found = measure(llms, prompts, schedules, args, cores, half)
    best = choose(alone, beside, found["acceptance"])
    result = {
        "host": host_info(loaded.precision, loaded.device),
        "model": args.model,
        "threads": {"one model at a time": cores, "each lane": half},
        "milliseconds": {"alone": shown(alone), "beside each other": shown(beside)},
        "choice": {"schedule": best.name, "length": best.length, "lanes pay": best.lanes_pay},
        "predicted_ms_per_token": predicted(alone, beside, found["acceptance"]),
        **found,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def every_schedule() -> dict[str, tuple[Schedule, str]]:
    """What is compared, and the threads it runs on."""
    found: dict[str, tuple[Schedule, str]] = {}
    for threads in (ALL, HALF):
        found[f"none, {threads}"] = (plain, threads)
        for length in SPECULATION:
            found[f"speculation {length}, {threads}"] = (partial(speculate, length=length), threads)
    return found | {f"PEARL {length}": (Pearl(length).run, LANES) for length in PEARL}


def measure(
    llms: Sequence[LLM],
    prompts: Sequence[Sequence[int]],
    schedules: dict[str, tuple[Schedule, str]],
    args: argparse.Namespace,
    cores: int,
    half: int,
) -> dict[str, Any]:
    """Seconds per token of every schedule, interleaved, and ratios."""
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    lanes = {
        ALL: Threads(["draft", "target"], prepare=lambda: torch.set_num_threads(cores)),
        HALF: Threads(["draft", "target"], prepare=lambda: torch.set_num_threads(half)),
        LANES: Threads(["draft"], ["target"], prepare=lambda: torch.set_num_threads(half)),
    }
    taken: dict[str, list[float]] = {name: [] for name in schedules}
    texts: dict[int, tuple[int, ...]] = {}
    accepted = tested = 0
    for round_number in range(args.rounds + 1):
        for number, prompt in enumerate(prompts):
            for name in random.sample(list(schedules), len(schedules)):
                schedule, threads = schedules[name]
                text, seconds = write(llms, prompt, params, lanes[threads], schedule)
                assert texts.setdefault(number, text.path) == text.path, f"{name} wrote another text"
                if round_number:  # the first round warms up
                    taken[name].append(seconds / len(text.path))
                if name.startswith("speculation 1"):
                    accepted, tested = accepted + sum(text.streaks), tested + text.verdicts
    for each in lanes.values():
        each.close()
    return {"acceptance": round(accepted / tested, 3), **summary(taken, args)}


def summary(taken: dict[str, list[float]], args: argparse.Namespace) -> dict[str, Any]:
    """Medians, and ratios to the best without lanes (chosen by median, in hindsight)."""
    base = best_of(taken, "none"), best_of(taken, "speculation")
    lanes = [name for name in taken if name.startswith("PEARL")]
    return {
        "prompts": args.prompts,
        "rounds": args.rounds,
        "max_tokens": args.max_tokens,
        "ms_per_token": {name: round(1e3 * statistics.median(times), 2) for name, times in taken.items()},
        "pearl_speed_over": {f"{name} over {b}": ratio(taken[b], taken[name]) for name in lanes for b in base},
    }


def best_of(taken: dict[str, list[float]], kind: str) -> str:
    """The fastest of a kind, in hindsight."""
    return min((name for name in taken if name.startswith(kind)), key=lambda name: statistics.median(taken[name]))


def write(
    llms: Sequence[LLM], prompt: Sequence[int], params: SamplingParams, lanes: Threads, schedule: Schedule
) -> tuple[Text, float]:
    """One text, and the seconds it took after the prompt was read."""
    with real_text(llms[0], llms[1], prompt, params) as text:
        started = time.perf_counter()
        lanes.run(schedule(lanes, text))
        return text, time.perf_counter() - started


def ratio(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Geometric mean of paired ratios, and its interval."""
    logs = np.log(np.array(slow) / np.array(fast))
    generator = np.random.default_rng(0)
    means = generator.choice(logs, (2000, len(logs))).mean(axis=1)
    return [round(float(np.exp(x)), 3) for x in (logs.mean(), *np.quantile(means, (0.025, 0.975)))]


def predicted(alone: LaneTimes, beside: LaneTimes, acceptance: float) -> dict[str, float]:
    """By the formulas of `paceline.lanes.choice`."""
    found = {"none": no_lookahead(alone)}
    found |= {f"speculation {n}": speculation(alone, n, acceptance) for n in SPECULATION}
    found |= {f"PEARL {n}": pearl(beside, n, acceptance) for n in PEARL}
    return {name: round(1e3 * seconds, 2) for name, seconds in found.items()}


def shown(times: LaneTimes) -> dict[str, Any]:
    """In milliseconds."""
    return {"target": {n: round(1e3 * s, 2) for n, s in times.target.items()}, "draft": round(1e3 * times.draft, 2)}


if __name__ == "__main__":
    main()

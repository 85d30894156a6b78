"""`none` and `auto` in turns on one GPU, and what `auto` did: steps by kind, their time, what was compiled meanwhile.

    python benchmarks/gpu/auto_steps.py MODEL --prompts spec_bench.jsonl --users 1 8 32 128

The prompts are those of `against_vllm.py`. A step's kind is the drafters that were asked and whether any draft node was
verified; the policy learns from some plain steps only, and only those are counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from against_vllm import _groups, _texts

from paceline import LLM, SamplingParams
from paceline.engine.types import StepStats
from paceline.model.loader import load_model


@dataclass
class Watched:
    """What the policy learned from since the last `clear`."""

    llm: LLM
    steps: list[StepStats] = field(default_factory=list)
    prepared: int = 0
    preparing: float = 0.0
    """Seconds of steps in which something was compiled or captured."""

    def __post_init__(self) -> None:
        engine, policy = self.llm.engine, self.llm.engine.stages.policy
        assert policy is not None
        learn, step = policy.learn, engine.step

        def watch(stats: StepStats) -> None:
            self.steps.append(stats)
            learn(stats)

        def timed() -> Any:
            before, started = engine.runner.num_preparations, time.perf_counter()
            output = step()
            if engine.runner.num_preparations != before:
                self.prepared += 1
                self.preparing += time.perf_counter() - started
            return output

        policy.learn = watch  # type: ignore[method-assign]
        engine.step = timed  # type: ignore[method-assign]

    def clear(self) -> None:
        """Begin anew."""
        self.steps.clear()
        self.prepared, self.preparing = 0, 0.0

    def table(self) -> str:
        """A line for every kind of step."""
        kinds: dict[str, list[StepStats]] = defaultdict(list)
        for stats in self.steps:
            where = "prompt" if stats.num_prompt_tokens else "decode"
            found = "nodes" if stats.num_draft_nodes else "plain" if not stats.draft_seconds else "found nothing"
            kinds[" ".join([where, *sorted(stats.draft_seconds), f"({found})"])].append(stats)
        lines = [f"  {self.prepared} steps compiled or captured something, {self.preparing:.2f} s"]
        for kind, steps in sorted(kinds.items(), key=lambda item: -sum(s.step_seconds for s in item[1])):
            count = len(steps)
            milliseconds = 1e3 * sum(s.step_seconds for s in steps) / count
            drafting = 1e3 * sum(sum(s.draft_seconds.values()) for s in steps) / count
            tokens = sum(s.num_committed for s in steps) / count
            lines.append(
                f"  {count:5} x {milliseconds:6.2f} ms ({drafting:.2f} drafting) for {tokens:6.1f} tokens: {kind}"
            )
        return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--prompts", required=True, help="questions, one JSON object a line")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv", type=int, default=12 << 30, help="bytes of each engine's KV cache")
    args = parser.parse_args()
    args.batches, args.single, args.most_batches = args.users, 12, 8
    loaded = load_model(args.model, dtype=args.dtype)
    texts, most = _texts(args, loaded.tokenizer), max(args.users)
    options: dict[str, Any] = {
        "max_model_len": 4096, "max_num_seqs": most, "max_num_batched_tokens": 8192, "enable_prefix_caching": False,
        "kv_cache_memory": args.kv,
    }  # fmt: skip
    llms = {setting: LLM(loaded, speculation=setting, **options) for setting in ("none", "auto")}
    for llm in llms.values():
        llm.generate(texts[-most:], SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
    watched = Watched(llms["auto"])
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    for users in args.users:
        for turn in range(args.rounds):
            speeds = {}
            for setting, llm in llms.items():
                watched.clear()
                started = time.perf_counter()
                answers = [a for group in _groups(args, texts, users, turn) for a in llm.generate(list(group), params)]
                speeds[setting] = sum(len(a.token_ids) for a in answers) / (time.perf_counter() - started)
            ratio = speeds["auto"] / speeds["none"]
            print(f"{users} users: none {speeds['none']:,.0f}, auto {speeds['auto']:,.0f} tokens/s ({ratio:.2f}x)")
            print(watched.table(), flush=True)


if __name__ == "__main__":
    main()

"""Paceline's plain path (`none`) against `transformers.generate`, interleaved in one process.

    python benchmarks/plain_vs_transformers.py --dtype auto --json benchmarks/cpu/plain.json

Tokens per second (prefill included) of greedy answers at batch 1 and at 8 concurrent requests. For 8, transformers
gets its strongest form, one left-padded batch. Every answer ends at its own end token or at `--max-tokens`, and both
sides' tokens are counted by the same rule. Also: host time per step outside the network at temperature 0 and 1, and
the peak memory of a process of its own beside weights and KV.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from paceline import LLM, SamplingParams
from paceline.bench.host import host_info
from paceline.model.loader import load_model
from paceline.model.tiled_linear import TiledLinear

QUESTIONS = Path(__file__).parent.parent / "paceline" / "bench" / "questions.jsonl"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--their-dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repeats of every measurement")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()

    loaded = load_model(args.model, dtype=args.dtype)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    weights += sum(m.num_bytes for m in loaded.model.modules() if isinstance(m, TiledLinear))
    llm = LLM(loaded, speculation="none", enable_prefix_caching=False)
    reference = AutoModelForCausalLM.from_pretrained(
        loaded.path, dtype=getattr(torch, args.their_dtype), attn_implementation="sdpa"
    ).eval()
    questions = [json.loads(line)["turns"][0] for line in QUESTIONS.read_text().splitlines()]
    prompts = [llm.chat_prompt([{"role": "user", "content": q}]) for q in questions]
    result: dict[str, Any] = {"host": host_info(loaded.precision, loaded.device), "model": args.model}
    for batch, groups in ((1, [[p] for p in prompts[::4]]), (8, [prompts[i : i + 8] for i in range(0, 24, 8)])):
        result[f"batch_{batch}"] = compare(llm, reference, groups, args.max_tokens, args.rounds)
    result["host_share"] = {f"temperature_{t}": host_share(llm, prompts[0], t) for t in (0, 1)}
    result["their_dtype"] = args.their_dtype
    result["memory"] = memory(llm, args.model, args.dtype, weights)
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


def compare(llm: LLM, reference: Any, groups: Sequence[Any], max_tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of both, and the ratio per pair of neighbouring runs."""
    rates: dict[str, list[float]] = {"paceline": [], "transformers": []}
    for round_number in range(rounds + 1):
        for group in groups:
            sides = [("paceline", ours), ("transformers", theirs)]
            random.shuffle(sides)
            for name, run in sides:
                started = time.perf_counter()
                tokens = run(llm if name == "paceline" else reference, group, max_tokens, llm)
                if round_number:  # the first round warms up
                    rates[name].append(tokens / (time.perf_counter() - started))
    ratios = sorted(a / b for a, b in zip(rates["paceline"], rates["transformers"], strict=True))
    return {
        "paceline_tokens_per_second": round(statistics.median(rates["paceline"]), 1),
        "transformers_tokens_per_second": round(statistics.median(rates["transformers"]), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
        "pairs": len(ratios),
    }


def ours(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int, _: LLM) -> int:
    """All prompts at once through the engine; returns the tokens produced."""
    return sum(len(g.token_ids) for g in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens)))


def theirs(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, llm: LLM) -> int:
    """One left-padded batch; tokens are counted up to and with each row's end token."""
    eos = set(llm.loaded.eos_token_ids)
    pad = min(eos)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=sorted(eos),
            pad_token_id=pad,
        )
    total = 0
    for row in out[:, longest:].tolist():
        ends = [i for i, token in enumerate(row) if token in eos]
        total += ends[0] + 1 if ends else len(row)
    return total


def host_share(llm: LLM, prompt: Sequence[int], temperature: int) -> dict[str, float]:
    """Share of decode step time outside the network (schedule, sampling, commit, text)."""
    params = SamplingParams(temperature=temperature, max_tokens=96, ignore_eos=True, seed=1)
    steps: list[tuple[float, float]] = []
    stream = llm.stream(list(prompt), params)
    for _ in stream:
        stats = llm.engine.last_stats
        if stats is not None and stats.num_committed == 1 and not stats.num_prompt_tokens:
            steps.append((stats.step_seconds, stats.forward_seconds))
    outside = [whole - network for whole, network in steps]
    return {
        "median_ms": round(statistics.median(outside) * 1e3, 3),
        "share": round(statistics.median(outside) / statistics.median(w for w, _ in steps), 4),
    }


_MEMORY_PROBE = """
import sys
from paceline import LLM, SamplingParams
from paceline.model.loader import load_model
loaded = load_model(sys.argv[1], dtype=sys.argv[2])
def peak():  # of this program: what getrusage tells begins with the memory of the process that started it
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
base = peak()
llm = LLM(loaded, speculation="auto")
llm.generate("word " * 1000, SamplingParams(temperature=1, max_tokens=128, ignore_eos=True))
print(base, peak())
"""


def memory(llm: LLM, model: str, dtype: str, weights: int) -> dict[str, int]:
    """Peak resident MiB of a fresh process that serves one request of 1,000 + 128 tokens with `auto`."""
    command = [sys.executable, "-c", _MEMORY_PROBE, model, dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loaded, peak = (int(kib) // 1024 for kib in out.split()[-2:])
    kv = 1128 * llm.engine.runner.kv.shape.bytes_per_token
    return {"peak_mib": peak, "after_loading_mib": loaded, "weights_mib": weights >> 20, "kv_used_mib": kv >> 20}


if __name__ == "__main__":
    main()

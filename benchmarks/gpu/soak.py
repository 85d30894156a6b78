"""Ten thousand mixed requests with random cancellations through one engine: no error, no block lost, memory flat.

    python benchmarks/gpu/soak.py MODEL --requests 10000 --speculation auto

Prompts of 1 to 600 tokens, some of them with a common beginning, some long enough for chunks; all sampling options in
turn; a fifth of the requests is cancelled at a random time. Exit code 1: a request failed, a block was lost, or memory
grew by more than 2% after the first fifth.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections import Counter
from typing import Any

import torch

from paceline import LLM, SamplingParams
from paceline.engine.request import FinishReason, Request

_OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 1.0, "logprobs": 3},
    {"temperature": 0.0, "prompt_logprobs": 1},
    {"temperature": 0.0, "stop": ["e", "\n\n"]},
    {"temperature": 1.0, "min_tokens": 5, "logit_bias": {1: -5.0}},
)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=96, help="open requests at a time")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--speculation", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv", type=int, default=1 << 30, help="bytes of the KV cache (small: requests are preempted)")
    args = parser.parse_args()
    llm = LLM(
        args.model, speculation=args.speculation, dtype=args.dtype, kv_cache_memory=args.kv, max_num_seqs=64,
        max_num_batched_tokens=2048,
    )  # fmt: skip
    started = time.perf_counter()
    ended, memory, preemptions = _soak(llm, args)
    seconds = time.perf_counter() - started
    llm.engine.check()
    print(f"{args.requests} requests in {seconds:.1f} s: {dict(ended)}; {preemptions} preemptions; no block is lost")
    print("memory (MB resident, MB on the device): " + ", ".join(f"{a:.0f} {b:.0f}" for a, b in memory))
    grown = any(last > 1.02 * first for first, last in zip(memory[0], memory[-1], strict=True))
    return int(grown or ended["error"] > 0)


def _soak(llm: LLM, args: argparse.Namespace) -> tuple[Counter[str], list[tuple[float, float]], int]:
    rng = random.Random(0)
    engine, vocab = llm.engine, llm.engine.vocab_size
    common = [rng.randrange(3, vocab) for _ in range(200)]
    opened: dict[str, Request] = {}
    ended: Counter[str] = Counter()
    memory: list[tuple[float, float]] = []
    made = preemptions = 0
    while made < args.requests or opened:
        while made < args.requests and len(opened) < args.users:
            length = rng.choice((1, 5, 30, 120, 600))
            own = [rng.randrange(3, vocab) for _ in range(length)]
            if rng.random() < 0.3:  # something to copy from
                own = (own[:8] * (length // 8 + 1))[:length]
            tokens = [*common, *own] if rng.random() < 0.3 else own
            params = SamplingParams(**{"max_tokens": rng.randrange(1, args.max_tokens), **_with_room(rng)})
            request = Request(f"r{made}", tokens, len(tokens), params, seed=rng.randrange(1 << 48))
            engine.add(request)
            opened[request.id] = request
            made += 1
        if rng.random() < 0.2 * args.users / args.max_tokens:
            engine.abort(rng.choice(list(opened)))
        for news in engine.step().outputs:
            if news.finish_reason is not None:
                preemptions += opened.pop(news.request_id).stats.preemptions
                ended[str(news.finish_reason.value)] += 1
                if news.finish_reason is FinishReason.ERROR:
                    print("error:", news.error, flush=True)
                if sum(ended.values()) % (args.requests // 5) == 0:
                    memory.append(_memory())
    return ended, memory, preemptions


def _with_room(rng: random.Random) -> dict[str, Any]:
    options = dict(rng.choice(_OPTIONS))
    return {**options, "max_tokens": 8} if "min_tokens" in options else options


def _memory() -> tuple[float, float]:
    """Megabytes of the process and on the device, at their most."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, device / 2**20


if __name__ == "__main__":
    sys.exit(main())

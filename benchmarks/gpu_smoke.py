"""Plain PyTorch on a GPU: tokens per second of every setting, to see that it runs (kernels and graphs come later).

python benchmarks/gpu_smoke.py MODEL
"""

from __future__ import annotations

import json
import sys
import time

import torch

from paceline import LLM, SamplingParams
from paceline.model.loader import load_model


def main() -> None:
    """Run and print one JSON line per setting."""
    loaded = load_model(sys.argv[1], dtype="auto", device="cuda")
    chats = [[{"role": "user", "content": f"Write a story about {who}."}] for who in ("a fox", "a dog", "rain", "Rome")]
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": str(loaded.dtype)}))
    for spec in ("none", "ngram:k=4", "recycling:k=16", "auto"):
        started = time.perf_counter()
        llm = LLM(loaded, speculation=spec, kv_cache_memory=2 << 30)
        ready = time.perf_counter() - started
        for batch in (1, 4):
            params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
            llm.chat(chats[:batch], params)
            started = time.perf_counter()
            answers = llm.chat(chats[:batch], params)
            seconds = time.perf_counter() - started
            tokens = sum(len(a.token_ids) for a in answers)
            length = sum(a.stats.mean_accepted_length for a in answers) / batch
            row = {"speculation": spec, "batch": batch, "tokens_per_second": round(tokens / seconds, 1)}
            print(json.dumps({**row, "mean_accepted_length": round(length, 2), "start_seconds": round(ready, 2)}))


if __name__ == "__main__":
    main()

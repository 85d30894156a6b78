"""Time of a draw on the GPU: the kernels beside what PyTorch offers, and the same tokens as the CPU.

    python benchmarks/gpu/sampling_kernels.py [--rows 1 8 64 256] [--vocab 49152 128256]

Each call is captured in a CUDA graph and timed with CUDA events; the median of several runs is printed in microseconds.
Logits are bf16: a heavy tail under a few likely tokens, as language models have them (`--flat` takes plain Gaussian
ones, the worst case of top-p). PyTorch's columns are `argmax`, `softmax` + `multinomial`, and top-p by a full sort;
none of these has noise that belongs to a position. Under 60 seconds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import numpy as np
import torch

from paceline.config import SamplingParams
from paceline.engine.rng import Noise, Stream
from paceline.engine.sampling import build_law
from paceline.model.kernels.draw import Drawn, Places, draw_rows
from paceline.model.kernels.limits import Limits, find_cut
from paceline.model.kernels.peaks import find_peaks
from paceline.model.kernels.rows import LogitRows

MODES = {
    "greedy": SamplingParams(temperature=0.0),
    "T=1": SamplingParams(temperature=1.0),
    "top_p=.9": SamplingParams(temperature=1.0, top_p=0.9),
    "top_k=50": SamplingParams(temperature=1.0, top_k=50),
}
CALLS, RUNS = 20, 7
CHECKED = 8
"""Rows compared with the CPU in every setting."""


def logits_like_a_models(rows: int, vocab: int, flat: bool) -> torch.Tensor:
    """bf16 on the device.  # [rows, vocab]"""
    generator = torch.Generator("cuda").manual_seed(rows + vocab)
    x = torch.randn(rows, vocab, device="cuda", generator=generator)
    if not flat:
        likely = torch.randint(vocab, (rows, 64), device="cuda", generator=generator)
        x = x * 2.5
        x.scatter_add_(1, likely, torch.rand(rows, 64, device="cuda", generator=generator) * 14)
    return x.bfloat16()


def microseconds(call: Callable[[], object]) -> float:
    """Median time of one call in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times)


def sampler(logits: torch.Tensor, params: SamplingParams) -> Callable[[], Drawn]:
    """A draw of every row; row i has seed i and position 1000 + i."""
    rows = len(logits)

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    index = torch.arange(rows, device="cuda")
    places = Places(index, column(0, torch.int64), index + 1000)
    heat = column(params.temperature, torch.float32)
    limits = Limits(
        column(params.top_k, torch.int32),
        column(params.top_p, torch.float64),
        column(float("-inf"), torch.float32),
    )
    source = LogitRows(logits)

    def call() -> Drawn:
        peaks = find_peaks(source, heat)
        cut = find_cut(source, heat, limits, peaks) if params.top_k or params.top_p < 1 else None
        return draw_rows(source, places, heat, cut, peaks)

    return call


def rivals(logits: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The same by PyTorch, where it has it; `multinomial` checks nothing here and gives other tokens."""

    def by_sort() -> torch.Tensor:
        weights, ids = torch.softmax(logits.float(), -1).sort(dim=-1, descending=True)
        weights[weights.cumsum(-1) - weights >= 0.9] = 0
        return ids.gather(1, race(weights))

    def by_topk() -> torch.Tensor:
        values, ids = logits.float().topk(50, dim=-1)
        return ids.gather(1, race(torch.softmax(values, -1)))

    def race(weights: torch.Tensor) -> torch.Tensor:
        return (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)

    return {
        "greedy": lambda: logits.argmax(-1),
        "T=1": lambda: torch.multinomial(torch.softmax(logits.float(), -1), 1),
        "top_p=.9": by_sort,
        "top_k=50": by_topk,
    }


def differing(drawn: Drawn, logits: torch.Tensor, params: SamplingParams) -> int:
    """Rows whose token is not the CPU's."""
    host, wrong = logits[:CHECKED].float().cpu().numpy(), 0
    for i, row in enumerate(host):
        words = Noise(i).words(1000 + i, Stream.TARGET, len(row))
        wrong += int(drawn.token[i]) != build_law(row, params, [], []).draw(words)
    return wrong


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 128_256])
    parser.add_argument("--flat", action="store_true", help="Gaussian logits")
    args = parser.parse_args()
    results = []
    print(f"{torch.cuda.get_device_name()}\n{'vocab':>7} {'rows':>5} {'mode':>9} {'kernels':>9} {'torch':>9}  differ")
    for vocab in args.vocab:
        for rows in args.rows:
            logits = logits_like_a_models(rows, vocab, args.flat)
            theirs = rivals(logits)
            for mode, params in MODES.items():
                call = sampler(logits, params)
                wrong = differing(call(), logits, params)
                ours, other = microseconds(call), microseconds(theirs[mode])
                print(f"{vocab:>7} {rows:>5} {mode:>9} {ours:>9.1f} {other:>9.1f}  {wrong}/{min(rows, CHECKED)}")
                results.append(
                    {"vocab": vocab, "rows": rows, "mode": mode, "us": ours, "torch_us": other, "wrong": wrong}
                )
    assert not np.any([r["wrong"] for r in results]), "tokens differ from the CPU's"
    print(json.dumps({"device": torch.cuda.get_device_name(), "flat": args.flat, "results": results}))


if __name__ == "__main__":
    main()

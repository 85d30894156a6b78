"""Which tile a product should take: times of candidates in a CUDA graph, beside cuBLAS and the copy bandwidth.

    python benchmarks/gpu/products.py --shapes smol_qkv 8b_down --seconds 60

Microseconds for one product, weights rotated out of cache, kernels overlapping as in a layer; the best of several runs,
best candidates first. `model/gpu/tiles.py` holds what was chosen from this on an H200 (figures: docs/performance.md).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator

import torch

from paceline.model.kernels.products import Tile, product, product_twin

SHAPES: dict[str, tuple[int, int, bool]] = {
    "smol_qkv": (960, 576, False),
    "smol_o": (576, 576, False),
    "smol_gate_up": (1536, 576, True),
    "smol_down": (576, 1536, False),
    "smol_head": (49152, 576, False),
    "8b_qkv": (6144, 4096, False),
    "8b_o": (4096, 4096, False),
    "8b_gate_up": (14336, 4096, True),
    "8b_down": (4096, 14336, False),
    "8b_head": (128256, 4096, False),
}
_COPY = 4.31e6
"""Bytes a microsecond that a copy reads and writes on an H200."""
_ROTATED = 300_000_000
_MOST_SHARED = 200_000


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no candidate is begun")
    args = parser.parse_args()
    stop = time.time() + args.seconds
    print(torch.cuda.get_device_name())
    for name in args.shapes:
        for rows in (16, 64):
            _compare(name, rows, stop)


def _compare(name: str, rows: int, stop: float) -> None:
    columns, inner, gated = SHAPES[name]
    factor = 2 if gated else 1
    size = 2 * factor * columns * inner
    options = {"device": "cuda", "dtype": torch.bfloat16}
    weights = [
        torch.randn(factor * columns, inner, **options) * inner**-0.5
        for _ in range(max(2, min(30, _ROTATED // size + 1)))
    ]
    x = torch.randn(rows, inner, **options)
    library = _microseconds(lambda: [torch.nn.functional.linear(x, w) for w in weights], len(weights))
    print(f"{name}, {rows} rows: cuBLAS {library:.2f}, copy {size / _COPY:.2f}", flush=True)
    expected, out, found = product_twin(x, weights[0], gated=gated), torch.empty(rows, columns, **options), []
    for tile in _candidates(rows, columns, inner, factor):
        if time.time() > stop:
            break
        error = (product(x, weights[0], tile, gated=gated).float() - expected).abs().max().item()

        def run(tile: Tile = tile) -> None:
            for w in weights:
                product(x, w, tile, gated=gated, out=out, overlap=True)

        found.append((_microseconds(run, len(weights)), error, tile))
    for microseconds, error, tile in sorted(found, key=lambda entry: entry[0])[:3]:
        print(f"    {microseconds:.2f} (largest error {error:.3f}) {tile}", flush=True)


def _candidates(rows: int, columns: int, inner: int, factor: int) -> Iterator[Tile]:
    for wide, step, warps, stages in itertools.product((16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5)):
        fits = (factor * wide + rows) * step * 2 * stages <= _MOST_SHARED and step <= inner
        if fits and 20 <= columns / wide <= 1500 and (warps == 4 or wide >= 64):
            yield Tile(rows, wide, step, warps, stages)


def _microseconds(run: Callable[[], object], calls: int) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(3):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 3 / calls)
    return min(times)


if __name__ == "__main__":
    main()

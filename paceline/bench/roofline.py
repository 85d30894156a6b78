"""The least time a forward can take on a machine: reading the weights once, and multiplying them with every token.

Both are measured here: the memory's speed by copying and by summing a buffer that no cache holds, the arithmetic's
by a large matrix product in the model's number format. Attention is left out, so the bound is for short contexts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paceline.model.loader import LoadedModel
from paceline.model.packed_linear import PackedLinear
from paceline.model.tiled_linear import TiledLinear

_REPEATS = 5
_SECONDS = 0.7
"""Each is repeated for so long at least, since other work on the machine only ever slows it."""
_BUFFER = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Bytes to copy: more than the caches hold."""
_SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the product."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model's work and a machine's speed."""

    weights: int
    """Weights that a token is multiplied with; of experts, those that it is sent to."""
    bytes_per_weight: float
    """Scales of quantised weights are counted with them."""
    bytes_per_second: float
    """Of memory."""
    flops_per_second: float
    """Of matrix products."""

    @property
    def memory_seconds(self) -> float:
        """Time to read the weights once."""
        return self.weights * self.bytes_per_weight / self.bytes_per_second

    @property
    def seconds_per_token(self) -> float:
        """Time of a token's arithmetic."""
        return 2.0 * self.weights / self.flops_per_second

    @property
    def ridge(self) -> float:
        """Tokens in a forward at which arithmetic takes as long as memory."""
        return self.memory_seconds / self.seconds_per_token

    def seconds(self, num_tokens: float) -> float:
        """The bound."""
        return max(self.memory_seconds, num_tokens * self.seconds_per_token)


def measure_roofline(loaded: LoadedModel) -> Roofline:
    """Measure the machine, in a few seconds, with the threads that PyTorch uses now."""
    weights = active_weights(loaded.model, loaded.config)
    quantized = [m for m in loaded.model.modules() if isinstance(m, TiledLinear)]
    kept = sum(m.in_features * m.out_features for m in quantized)
    size = (weights - kept) * loaded.dtype.itemsize + sum(m.num_bytes for m in quantized)
    return Roofline(
        weights=weights,
        bytes_per_weight=size / weights,
        bytes_per_second=measure_bandwidth(loaded.device),
        flops_per_second=measure_flops(loaded.dtype, loaded.device),
    )


def rate(value: float, unit: str) -> str:
    """A rate in a readable multiple of its unit: `31.9 GB/s`, `4.27 TB/s`."""
    factor, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / factor:.3g} {prefix}{unit}/s"


def active_weights(model: nn.Module, config: Any) -> int:
    """Weights that one token is multiplied with. Embeddings are looked up, so they count as an output layer only."""
    total = 0.0
    share = _expert_share(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        count = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, PackedLinear | TiledLinear):
            count += module.in_features * module.out_features
        total += count * (share if ".experts" in name else 1.0)
    return round(total)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second, the better of copying (read and written) and summing (read)."""
    source = torch.ones(_BUFFER[device.type] // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * 4
    copy = 2 * size / _fastest(lambda: target.copy_(source), device)
    return max(copy, size / _fastest(source.sum, device))


def measure_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a square product."""
    side = _SIDE[device.type]
    a, b = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * side**3 / _fastest(lambda: a @ b, device)


def _expert_share(config: Any) -> float:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for n in (getattr(config, name, None) for name in names) if n), None)
    return min(getattr(config, "num_experts_per_tok", None) or 1, experts) / experts if experts else 1.0


def _fastest(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some runs, the first left out."""
    times: list[float] = []
    with torch.inference_mode():
        while len(times) <= _REPEATS or sum(times) < _SECONDS:
            started = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return min(times[1:])

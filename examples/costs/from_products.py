"""Make cost tables for `paceline bench replay` from measured matrix products, as of a GPU that is not at hand.

    python examples/costs/from_products.py products.json

writes h200_8b.json and h200_smollm2_135m.json beside this script. `products.json` holds

    {"hardware": "...", "what": "...", "copy_bytes_per_s": 4.27e12,
     "models": {"8b": {"products_ms": [[1, 3.80], ...], "kv_bytes_per_context_token": 131072}, ...}}

A forward over N tokens that reads C context tokens is then taken to last

    products(N) + C * kv_bytes_per_context_token / (0.8 * copy_bytes_per_s) + 0.35 ms

where 0.8 is the share of the copy speed that reading the KV cache reaches, and 0.35 ms stand for norms, RoPE,
activations and sampling in a CUDA graph. Host time is not in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from paceline.cli.options import write_json
from paceline.plan.cost_model import CostTable, DraftCost

KV_SPEED = 0.8
SMALL_KERNELS = 0.35e-3
DRAFTERS = {"8b": {"eagle": DraftCost(per_depth=0.25e-3)}}
"""A head of one layer reads some 7% of the target's weights at each depth."""


def main(source: Path) -> None:
    """Write a table for each model of `source`."""
    products = json.loads(source.read_text(encoding="utf-8"))
    for model in products["models"]:
        name = model.replace("-", "_")
        path = Path(__file__).with_name(f"h200_{name}.json")
        write_json(table_of(products, model).to_json(), str(path))
        print(path)


def table_of(products: dict[str, Any], model: str) -> CostTable:
    """The table of one model."""
    measured = products["models"][model]
    kv_bytes, copy_speed = measured["kv_bytes_per_context_token"], products["copy_bytes_per_s"]
    drafters = DRAFTERS.get(model, {})
    about = {
        "model": model,
        "hardware": products["hardware"],
        "seconds": f"measured: {products['what']}",
        "per_context_token": f"assumed: {kv_bytes} bytes of KV at {KV_SPEED} of {copy_speed:.3g} bytes/s (copying)",
        "per_step": "assumed: small kernels in a CUDA graph; no host time",
        "draft": "assumed" if drafters else "none",
        "made_by": "examples/costs/from_products.py",
    }
    return CostTable(
        tokens=tuple(n for n, _ in measured["products_ms"]),
        seconds=tuple(round(1e-3 * ms, 9) for _, ms in measured["products_ms"]),
        per_context_token=kv_bytes / (KV_SPEED * copy_speed),
        per_step=SMALL_KERNELS,
        draft=drafters,
        about=about,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What launching a step before the one in flight is read is worth: the same engine with and without it, in turns.

    python benchmarks/gpu/run_ahead.py --shape SmolLM2-135M --users 1 8 32 128

Random weights of real shapes (`decode_speed.py`), no speculation, prompts of 100 tokens; tokens per second.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest.mock import patch

from decode_speed import SHAPES, _llm, _model, _run

from paceline.model.runner import ModelRunner


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="SmolLM2-135M")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--new", type=int, default=192, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    llm = _llm(_model(args.shape), max(args.users))
    sides: dict[str, Any] = {"waits": property(lambda _: 0), "ahead": ModelRunner.most_carried}
    for count in args.users:
        for temperature in (0.0, 1.0):
            _run(llm, count, 8, temperature)
            found: dict[str, list[int]] = {name: [] for name in sides}
            for _ in range(args.repeats):
                for name, most_carried in sides.items():
                    with patch.object(ModelRunner, "most_carried", most_carried):
                        found[name].append(round(_run(llm, count, args.new, temperature)))
            print(f"{args.shape}, {count} users, T={temperature:g}: {found}", flush=True)


if __name__ == "__main__":
    main()

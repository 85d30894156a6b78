"""`paceline bench`: measure on this machine. One file per kind of measurement."""

from __future__ import annotations

import importlib
from typing import Any

KINDS = ("spec", "load", "replay", "accept", "lanes", "systems")


def register(subparsers: Any) -> None:
    """Add the command and its kinds."""
    bench = subparsers.add_parser(
        "bench",
        help="measure on this machine",
        description="Measure on this machine.",
        usage="paceline bench KIND ...",
    )
    kinds = bench.add_subparsers(title="kinds", metavar="KIND", required=True)
    for kind in KINDS:
        importlib.import_module(f"paceline.cli.bench_{kind}").register(kinds)

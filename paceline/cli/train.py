"""`paceline train`: make what speculation learns. One file per thing that is trained."""

from __future__ import annotations

import importlib
from typing import Any

KINDS = ("draft", "vocab", "acceptance-head")


def register(subparsers: Any) -> None:
    """Add the command and its kinds."""
    train = subparsers.add_parser(
        "train",
        help="train a draft model for a target",
        description="Make what speculation learns from a target.",
        usage="paceline train KIND ...",
    )
    kinds = train.add_subparsers(title="kinds", metavar="KIND", required=True)
    for kind in KINDS:
        importlib.import_module(f"paceline.cli.train_{kind.replace('-', '_')}").register(kinds)

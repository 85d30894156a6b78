"""`paceline vllm`: Paceline's pace inside vLLM. One file per kind of use."""

from __future__ import annotations

import importlib
from typing import Any

KINDS = ("serve", "tune")


def register(subparsers: Any) -> None:
    """Add the command and its kinds."""
    parser = subparsers.add_parser(
        "vllm",
        help="set the pace of a vLLM server",
        description="Set the pace of a vLLM server, or measure a table for one that goes without.",
        usage="paceline vllm KIND ...",
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    for kind in KINDS:
        importlib.import_module(f"paceline.cli.vllm_{kind}").register(kinds)

"""Paceline: serve large language models with lossless speculative decoding that sets its own pace."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline import errors as errors
    from paceline.config import RequestSpeculation as RequestSpeculation
    from paceline.config import SamplingParams as SamplingParams
    from paceline.config import StructuredOutput as StructuredOutput
    from paceline.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "RequestSpeculation", "SamplingParams", "StructuredOutput", "__version__", "errors"]

_HOME = {
    "LLM": "paceline.llm",
    "RequestSpeculation": "paceline.config",
    "SamplingParams": "paceline.config",
    "StructuredOutput": "paceline.config",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `paceline --help` does not load PyTorch."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "errors":
        return import_module("paceline.errors")
    raise AttributeError(f"module 'paceline' has no attribute {name!r}")

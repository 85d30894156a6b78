"""Paceline inside vLLM: a scheduler that sets the pace, and drafters of our own.

    vllm serve MODEL --speculative-config '{"method": "ngram", ...}'
               --scheduler-cls paceline.integrations.vllm.scheduler

vLLM keeps everything else: API, models, parallelism, metrics. `docs/vllm.md` says what fits with what. Names that need
vLLM are imported when they are taken, so the rest of this package can be used, and tested, without it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from paceline.errors import ConfigError

_NEEDS_VLLM = {
    "scheduler": "paceline.integrations.vllm.factory",
    "SuffixProposer": "paceline.integrations.vllm.drafters",
    "RecyclingProposer": "paceline.integrations.vllm.drafters",
}


def __getattr__(name: str) -> Any:
    """A name that vLLM is given as `paceline.integrations.vllm.NAME`.

    Raises:
        ConfigError: vLLM is not installed.
    """
    if name not in _NEEDS_VLLM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("vllm") is None:
        raise ConfigError(
            "is not installed in this environment.", field="vllm", fix="pip install 'paceline[vllm]' brings it."
        )
    return getattr(import_module(_NEEDS_VLLM[name]), name)

"""What works with which vLLM: versions, methods, and the modes that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.integrations.vllm.asking import BOARD
from paceline.integrations.vllm.options import Options
from paceline.integrations.vllm.step import Method

RAN = ("0.32",)
"""Versions that the tests were run with."""
READ = ("0.25", "0.30", "0.31", "0.33")
"""Versions whose hooks were only read to be the same."""
_LISTS = ("ngram", "suffix", "custom_class")
"""Methods whose drafts have a length of their own for every request."""
_NO_FORWARDS = (*_LISTS, "ngram_gpu", "medusa")
_UNSTEERABLE = ("suffix", "extract_hidden_states", "medusa", "dspark", "mlp_speculator")
"""Methods that draft what they draft: `suffix` stops the engine if it is asked for less."""
HOOKS = ("schedule", "_update_after_schedule", "update_from_output", "_free_request")
"""Methods of vLLM's scheduler that are overridden."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether and how the controller runs in a server."""

    method: Method | None
    """None: it stands aside."""
    reason: str
    """In one sentence, for the log."""
    warns: bool = False


def version_known(version: str) -> bool:
    """Whether the hooks of a vLLM version were run or read."""
    series = ".".join(version.split("+")[0].split(".")[:2])
    return series in RAN + READ


def judge(version: str, hooks_missing: Sequence[str], config: Any, options: Options) -> Verdict:
    """Decide for a server.

    Args:
        version: vLLM's.
        hooks_missing: methods of its scheduler that are not there.
        config: its `VllmConfig`.
        options: the user's.
    """
    spec = config.speculative_config
    if not options.enabled:
        return Verdict(None, "switched off by additional-config")
    if spec is None:
        return Verdict(None, "there is no --speculative-config, so there is nothing to pace")
    if not version_known(version) or hooks_missing:
        why = f", whose scheduler has no {', '.join(hooks_missing)}" if hooks_missing else ""
        known = ", ".join(sorted(RAN + READ))
        return Verdict(None, f"vLLM {version} is not known to fit{why} (known: {known}); serving without", warns=True)
    if getattr(spec, "enable_adaptive_verification", False):
        return Verdict(None, f"vLLM's own adaptive verification sets the pace of {spec.method}")
    most = int(spec.num_speculative_tokens or 0)
    if most < 1:
        return Verdict(None, "num_speculative_tokens is 0")
    method = _method(config, options, str(spec.method), most)
    kind = "one length for the whole batch" if method.lengths else "a length for every request"
    if method.lengths:
        kind += f" out of {', '.join(map(str, method.lengths))}"
    steers = "" if method.steerable else "; drafts come unasked, so only their verification is paced"
    return Verdict(method, f"{method.name}, at most {most}: {kind}{steers}")


def _method(config: Any, options: Options, name: str, most: int) -> Method:
    parallel = config.parallel_config
    is_async = bool(config.scheduler_config.async_scheduling)
    one_process = name != "custom_class" or BOARD.drafter
    return Method(
        name=name,
        most=most,
        forwards=name not in _NO_FORWARDS,
        # Ranks of a data-parallel group that draft different lengths would wait for each other's collectives.
        steerable=name not in _UNSTEERABLE and one_process and parallel.data_parallel_size == 1,
        shows_drafts=not is_async and parallel.pipeline_parallel_size == 1,
        lengths=_lengths(config, options, name, most) if _is_uniform(config, options, name) else None,
    )


def _is_uniform(config: Any, options: Options, name: str) -> bool:
    """Whether ragged lengths would cost something that a common length keeps."""
    if options.mode != "auto":
        return options.mode == "uniform"
    if name in _LISTS:  # ragged whatever we do
        return False
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    has_full = getattr(mode, "has_full_cudagraphs", None)
    return bool(has_full and has_full()) and not config.model_config.enforce_eager


def _lengths(config: Any, options: Options, name: str, most: int) -> tuple[int, ...]:
    """What `uniform` may choose from."""
    table = getattr(config.speculative_config, "num_speculative_tokens_per_batch_size", None)
    listed = options.lengths or tuple(sorted({int(entry[2]) for entry in table or ()}))
    if not listed:
        listed = tuple(range(1, most + 1)) if name in _LISTS else (most,)
    return tuple(sorted({0, *(min(n, most) for n in listed)}))

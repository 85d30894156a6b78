"""Token counts and speculation statistics of a request over all its samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from paceline.engine.request import Request
from paceline.server.protocol.common import (
    CompletionTokensDetails,
    PromptTokensDetails,
    RequestMetrics,
    SpeculativeDecoding,
    Usage,
)

_PREDICTION = "prediction"


def usage_of(requests: Sequence[Request], *, reasoning_tokens: int = 0, hidden: int = 0) -> Usage:
    """Usage so far. A prompt counts once however many samples it has.

    Args:
        requests: one per sample.
        reasoning_tokens: output tokens that are reasoning.
        hidden: output tokens that the engine made and the client did not ask for.
    """
    prompts = [request for request in requests if request.sample_index == 0]
    prompt = sum(request.prompt_len for request in prompts)
    output = sum(request.num_output for request in requests) - hidden
    # Another drafter may have guessed the same token with more confidence; it was predicted all the same.
    accepted = _predicted(request.stats.accepted_by for request in requests)
    accepted += _predicted(request.stats.also_accepted_by for request in requests)
    drafted = _predicted(request.stats.drafted_by for request in requests)
    drafted += _predicted(request.stats.also_drafted_by for request in requests)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(r.stats.cached_tokens for r in prompts)),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=reasoning_tokens,
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=drafted - accepted,
        ),
    )


def _predicted(counts: Iterable[Mapping[str, int]]) -> int:
    return sum(count.get(_PREDICTION, 0) for count in counts)


def metrics_of(requests: Sequence[Request]) -> RequestMetrics:
    """Speculation statistics. The histogram has an entry for every count that a draft allows: AIPerf insists on it."""
    longest = max((request.stats.longest_draft for request in requests), default=0)
    histogram = [0] * (longest + 1)
    accepted_by: dict[str, int] = {}
    for request in requests:
        for accepted, steps in enumerate(request.stats.accepted_counts):
            histogram[accepted] += steps
        for name, count in request.stats.accepted_by.items():
            accepted_by[name] = accepted_by.get(name, 0) + count
    steps = sum(histogram)
    accepted = sum(request.stats.accepted_tokens for request in requests)
    drafted = sum(request.stats.draft_tokens for request in requests)
    return RequestMetrics(
        speculative_decoding=SpeculativeDecoding(
            mean_acceptance_length=1.0 + accepted / steps if steps else 1.0,
            draft_acceptance_rate=accepted / drafted if drafted else 0.0,
            acceptance_histogram=histogram,
            num_spec_steps=steps,
            num_accepted_draft_tokens=accepted,
            num_draft_tokens=drafted,
            num_spec_tokens=longest,
            accepted_by=accepted_by,
        )
    )

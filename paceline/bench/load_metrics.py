"""What a server's Prometheus page tells about speculation and load; vLLM's names, Paceline's, and llama.cpp's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_NAMES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:generation_tokens_total": "tokens",
    "vllm:spec_decode_num_drafts_total": "drafts",
    "vllm:spec_decode_num_draft_tokens_total": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted_tokens",
    "paceline:drafted_tokens_total": "drafted",
    "paceline:accepted_tokens_total": "accepted",
    "llamacpp:requests_processing": "running",
    "llamacpp:requests_deferred": "waiting",
    "llamacpp:tokens_predicted_total": "tokens",
}
_BY_DRAFTER = ("drafted", "accepted")
_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+([-+.\deE]+)(?:\s+\d+)?\s*$")
_DRAFTER = re.compile(r'drafter="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Counters:
    """One scrape, at `at` on `time.perf_counter`'s clock; by drafter the key is `drafted/NAME` or `accepted/NAME`."""

    at: float
    values: Mapping[str, float] = field(default_factory=dict)

    def growth(self, before: Counters, name: str) -> int | None:
        """By how much a counter grew; None if the server does not have it."""
        if name not in self.values:
            return None
        return round(self.values[name] - before.values.get(name, 0.0))


def read_counters(text: str, at: float) -> Counters:
    """What is known of a page; series of several engines are added up."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        key = _NAMES.get(found[1]) if found else None
        if found is None or key is None:
            continue
        if key in _BY_DRAFTER:
            drafter = _DRAFTER.search(found[2] or "")
            key = f"{key}/{drafter[1] if drafter else 'unknown'}"
        values[key] = values.get(key, 0.0) + float(found[3])
    return Counters(at, values)


def sample(before: Counters, now: Counters) -> dict[str, tuple[float, float]]:
    """The time between two scrapes as a sample of a timeline."""
    found = {name: (now.values[name], 1.0) for name in ("running", "waiting") if name in now.values}

    def grew(name: str) -> float:
        return now.values.get(name, 0.0) - before.values.get(name, 0.0)

    if "tokens" in now.values:
        found["tokens_per_second"] = (grew("tokens"), now.at - before.at)
    if "drafts" in now.values and "tokens" in now.values:
        forwards = grew("tokens") - grew("accepted_tokens")  # a forward commits its accepted tokens and one more
        found["draft_nodes"] = (grew("draft_tokens"), forwards)
    drafters = [name.partition("/")[2] for name in now.values if name.startswith("drafted/")]
    for drafter in drafters:
        found[f"acceptance/{drafter}"] = (grew(f"accepted/{drafter}"), grew(f"drafted/{drafter}"))
    if "drafts" in now.values and not drafters:
        found["acceptance/drafts"] = (grew("accepted_tokens"), grew("draft_tokens"))
    return found

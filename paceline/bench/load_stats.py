"""The numbers of a load bench: percentiles, rates, SLO attainment, and ratios between settings.

Inter-token latency is counted per token: a chunk of k tokens that comes t seconds after the one before gives k tokens
of t/k seconds, so its mean is the time per output token whatever the chunks. `gap` is the time between chunks, which
is what a reader sees.

Ratios pool a setting's repeats and divide; above 1 the setting is better than what it is compared with. Their 95%
intervals are bootstraps over the repeats, in which both sides met the same requests. The best fixed setting is chosen
on half of the repeats and compared on the other half, and the other way round, or noise would decide what is best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from paceline.arrays import FloatArray
from paceline.bench.arrivals import Closed, Point
from paceline.bench.load import Answer, Run
from paceline.bench.load_timeline import Reliability
from paceline.bench.spec import Ratio, speedup

PERCENTILES = (50, 90, 95, 99)
QUANTILES = tuple(range(0, 101, 2))
"""Of the distributions in a report."""


@dataclass(frozen=True, slots=True)
class SLO:
    """What a request must keep to; seconds, None is no limit."""

    ttft: float | None = 2.0
    itl: float | None = 0.2
    """Mean over the request's tokens after the first chunk."""
    e2e: float | None = None

    def holds(self, answer: Answer) -> bool:
        """Whether an answer came, and in time."""
        measured = ((self.ttft, answer.ttft), (self.itl, answer.mean_itl or 0.0), (self.e2e, answer.seconds))
        return answer.error is None and all(limit is None or value <= limit for limit, value in measured)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds of all completed requests of some runs."""

    ttft: FloatArray  # [requests]
    itl: FloatArray  # [tokens after the first chunks]
    gap: FloatArray  # [chunks after the first ones]
    e2e: FloatArray  # [requests]

    def items(self) -> Iterable[tuple[str, FloatArray]]:
        """By name."""
        return (("ttft", self.ttft), ("itl", self.itl), ("gap", self.gap), ("e2e", self.e2e))


def latencies(answers: Sequence[Answer]) -> Latencies:
    """Of the answers that did not fail."""
    gaps: list[float] = []
    counts: list[float] = []
    done = [a for a in answers if a.error is None]
    for answer in done:
        at = [seconds for seconds, _ in answer.chunks]
        gaps += np.diff(at).tolist()
        counts += [tokens for _, tokens in answer.chunks[1:]]
    gap, count = np.array(gaps, dtype=np.float64), np.array(counts, dtype=np.float64)
    itl = np.repeat(gap / np.maximum(count, 1e-9), np.maximum(np.round(count), 1).astype(np.int64))
    return Latencies(np.array([a.ttft for a in done]), itl, gap, np.array([a.seconds for a in done]))


def figures(runs: Sequence[Run], slo: SLO) -> dict[str, Any]:
    """The numbers of one or more runs of one setting at one load level.

    Times are seconds; None stands where nothing was measured or the server does not tell.
    """
    answers = [a for run in runs for a in run.answers]
    done = [a for a in answers if a.error is None]
    seconds = sum(run.seconds for run in runs)
    tokens = sum(a.output_tokens for a in done)
    kept = sum(slo.holds(a) for a in answers)
    found: dict[str, Any] = {
        "requests": len(answers),
        "failed": len(answers) - len(done),
        "seconds": round(seconds, 4),
        "prompt_tokens": sum(a.prompt_tokens for a in done),
        "output_tokens": tokens,
        "tokens_per_second": _rate(tokens, seconds),
        "requests_per_second": _rate(len(done), seconds),
        "mean_latency": _rate(sum(a.seconds for a in done), len(done)),
        "slo_attainment": _rate(kept, len(answers)),
        "exact_token_times": all(a.exact for a in done),
    }
    for name, values in latencies(answers).items():
        found[f"{name}_mean"] = round(float(values.mean()), 6) if len(values) else None
        for p in PERCENTILES:
            found[f"{name}_p{p}"] = round(float(np.percentile(values, p)), 6) if len(values) else None
    return found | _speculation(runs, done, tokens)


def _speculation(runs: Sequence[Run], done: Sequence[Answer], tokens: int) -> dict[str, Any]:
    """Counters of speculation, from the requests themselves where they carry them, otherwise from the server."""
    if done and all(a.target_forwards is not None for a in done):
        drafted, accepted = sum(a.draft_tokens or 0 for a in done), sum(a.accepted_tokens or 0 for a in done)
        forwards = sum(a.target_forwards or 0 for a in done)
    elif runs and all(run.observed.accepted_tokens is not None for run in runs):
        drafted = sum(run.observed.draft_tokens or 0 for run in runs)
        accepted = sum(run.observed.accepted_tokens or 0 for run in runs)
        forwards = tokens - accepted  # a forward commits its accepted tokens and one more
    else:
        return {"mean_accepted_length": None, "draft_tokens": None, "accepted_tokens": None}
    return {
        "mean_accepted_length": _rate(tokens, forwards),
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
    }


def complete(runs: Sequence[Run], settings: Sequence[str]) -> list[Run]:
    """The runs of those (repeat, load level) that every setting has run; an interrupted bench leaves others."""
    seen = {(run.repeat, run.point.label, run.setting) for run in runs}
    return [run for run in runs if all((run.repeat, run.point.label, name) in seen for name in settings)]


def summarise(
    runs: Sequence[Run], settings: Sequence[str], slo: SLO, *, fixed: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """One row per load level and setting, repeats pooled.

    Args:
        runs: complete ones.
        settings: in the order of the rows; the first is the baseline.
        slo: what a request must keep to.
        fixed: the settings whose look-ahead is fixed; the others are compared with the best of them.
    """
    rows = []
    for label in dict.fromkeys(run.point.label for run in runs):
        group = [run for run in runs if run.point.label == label]
        by_setting = {name: [run for run in group if run.setting == name] for name in settings}
        for name, mine in by_setting.items():
            row = {"point": label, "setting": name, "repeats": len(mine), **figures(mine, slo)}
            if name != settings[0]:
                base = by_setting[settings[0]]
                row["throughput_ratio"] = asdict(_compare(mine, base, _throughput))
                row["latency_ratio"] = asdict(_compare(mine, base, _promptness))
            if fixed and name not in fixed:
                row["over_best_fixed"] = _over_best(mine, {n: by_setting[n] for n in fixed}, mine[0].point)
            rows.append(row)
    return rows


def _over_best(mine: Sequence[Run], fixed: Mapping[str, Sequence[Run]], point: Point) -> dict[str, Any] | None:
    """Against the best fixed setting; None with fewer than two repeats."""
    measure = _throughput if isinstance(point, Closed) else _promptness
    parity = [run.repeat % 2 for run in mine]
    if len(set(parity)) < 2:
        return None
    pairs, chosen = [], []
    for half in (0, 1):
        value = {
            name: _rate(*np.sum([measure(r) for r in runs if r.repeat % 2 == half], axis=0)) or 0.0
            for name, runs in fixed.items()
        }
        best = max(value, key=lambda name: value[name])
        chosen.append(best)
        other = [run for run in fixed[best] if run.repeat % 2 != half]
        pairs += _pairs([run for run in mine if run.repeat % 2 != half], other, measure)
    measured = "tokens per second" if measure is _throughput else "mean latency"
    return {"chosen": list(dict.fromkeys(chosen)), "of": measured, **asdict(speedup(np.array(pairs)))}


def _compare(mine: Sequence[Run], base: Sequence[Run], measure: Callable[[Run], tuple[float, float]]) -> Ratio:
    return speedup(np.array(_pairs(mine, base, measure)))


def _pairs(
    mine: Sequence[Run], base: Sequence[Run], measure: Callable[[Run], tuple[float, float]]
) -> list[tuple[float, ...]]:
    other = {run.repeat: run for run in base}
    return [(*measure(run), *measure(other[run.repeat])) for run in mine]


def _throughput(run: Run) -> tuple[float, float]:
    """Tokens and seconds."""
    return float(sum(a.output_tokens for a in run.answers if a.error is None)), run.seconds


def _promptness(run: Run) -> tuple[float, float]:
    """Requests and the seconds they took: the inverse of mean latency."""
    done = [a.seconds for a in run.answers if a.error is None]
    return float(len(done)), sum(done)


def distributions(runs: Sequence[Run], settings: Sequence[str]) -> list[dict[str, Any]]:
    """Quantiles (see `QUANTILES`) of the latencies per load level and setting, repeats pooled."""
    found = []
    for label in dict.fromkeys(run.point.label for run in runs):
        for name in settings:
            answers = [a for r in runs if r.point.label == label and r.setting == name for a in r.answers]
            curves = {
                what: np.round(np.percentile(values, QUANTILES), 6).tolist()
                for what, values in latencies(answers).items()
                if len(values)
            }
            found.append({"point": label, "setting": name, **curves})
    return found


def document(runs: Sequence[Run], settings: Sequence[str], slo: SLO, *, fixed: Sequence[str] = ()) -> dict[str, Any]:
    """All that was measured as plain values; the schema is in `paceline.cli.bench_load`."""
    kept = complete(runs, settings)
    reliability = {}
    for name in settings:
        total = Reliability()
        for run in runs:
            if run.setting == name:
                total.merge(run.observed.reliability)
        if total.tables:
            reliability[name] = total.diagrams()
    points = dict.fromkeys(run.point for run in runs)
    return {
        "settings": list(settings),
        "points": [{"label": p.label, "axis": p.axis, "load": p.load} for p in points],
        "slo": asdict(slo),
        "rows": [_row(run, slo) for run in runs],
        "summary": summarise(kept, settings, slo, fixed=fixed),
        "distributions": distributions(kept, settings),
        "over_time": [_over_time(run) for run in runs if run.observed.timeline.times],
        "reliability": reliability,
        "requests": [_request(run, answer) for run in runs for answer in run.answers],
    }


def _row(run: Run, slo: SLO) -> dict[str, Any]:
    return {"setting": run.setting, "point": run.point.label, "repeat": run.repeat, **figures([run], slo)}


def _over_time(run: Run) -> dict[str, Any]:
    place = {"setting": run.setting, "point": run.point.label, "repeat": run.repeat}
    return place | run.observed.timeline.binned(run.seconds)


def _request(run: Run, answer: Answer) -> dict[str, Any]:
    return {
        "setting": run.setting,
        "point": run.point.label,
        "repeat": run.repeat,
        "index": answer.index,
        "due": round(answer.due, 4),
        "ttft": round(answer.ttft, 4),
        "mean_itl": None if answer.mean_itl is None else round(answer.mean_itl, 6),
        "e2e": round(answer.seconds, 4),
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "error": answer.error,
    }


def _rate(amount: float, per: float) -> float | None:
    return round(float(amount / per), 6) if per > 0 else None

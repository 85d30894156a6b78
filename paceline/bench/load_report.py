"""The report of a load bench: one HTML file that needs nothing else, made from the bench's JSON.

It follows the reader's light or dark colours. Settings keep their colour throughout, and the baseline is grey.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from paceline.bench.load_charts import COLOURS, Axes, Number, Series, bars, lines, number, plural
from paceline.bench.load_report_time import over_time, reliability
from paceline.bench.load_stats import QUANTILES
from paceline.bench.load_style import CSS

Result = Mapping[str, Any]
_LATENCIES = (
    ("ttft", "Time to first token", 1.0, "s"),
    ("itl", "Inter-token latency", 1000.0, "ms"),
    ("e2e", "End-to-end latency", 1.0, "s"),
)
_COLUMNS = (
    *("tokens/s", "over baseline", "latency gain", "over best fixed"),
    *("TTFT p50", "p99", "ITL p50", "p99", "e2e p50", "p99"),
    *("SLO", "accepted length", "drafts taken", "failed"),
)


def html(result: Result) -> str:
    """The whole page.

    Args:
        result: what `paceline bench load --json` writes.
    """
    style = styles(result)
    parts = [_head(result), _legend(result)]
    if result["summary"]:
        parts += [_verdict(result), _against_load(result), _latency(result), _table(result)]
    parts += [over_time(result, style), reliability(result, style), _conditions(result)]
    title = escape(f"Load: {result['model']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><style>{CSS}</style></head>\n<body><main>\n' + "\n".join(filter(None, parts))
    ) + "\n</main></body></html>\n"


def styles(result: Result) -> dict[str, str]:
    """The CSS class of every setting."""
    base, *others = result["settings"]
    return {base: "base", **{name: f"s{i % COLOURS}" for i, name in enumerate(others)}}


def _head(result: Result) -> str:
    extent = result["extent"]
    loads = ", ".join(point["label"] for point in result["points"])
    where = f"{'asked from ' if result['mode'] == 'http' else ''}{result['host']['device']}"
    text = f"{where} · {loads} · {plural(extent['repeats'], 'repeat')}"
    if dtype := result["host"].get("dtype"):
        text = f"{dtype} · {text}"
    warning = (
        "" if result["complete"] else '<p class="warning">Stopped early: this is what was measured until then.</p>'
    )
    failed = [request for request in result["requests"] if request["error"]]
    if failed:
        reason = escape(f"{plural(len(failed), 'request')} failed; the first: {failed[0]['error']}")
        warning += f'<p class="warning">{reason}</p>'
    return f"<header><h1>{escape(result['model'])} under load</h1><p>{escape(text)}</p>{warning}</header>"


def _legend(result: Result) -> str:
    keys = "".join(
        f'<li><span class="key {style}"></span>{escape(name)}</li>' for name, style in styles(result).items()
    )
    return f'<ul class="legend">{keys}</ul>'


def _verdict(result: Result) -> str:
    """Who wins: throughput and latency over the baseline, and either over the best fixed setting."""
    base, *others = result["settings"]
    if not others:
        return ""
    parts = [
        _verdict_table(result, "throughput_ratio", f"Tokens per second over {base}"),
        _verdict_table(result, "latency_ratio", f"Mean latency gain over {base}"),
        _verdict_table(result, "over_best_fixed", "Over the best fixed setting"),
    ]
    return f'<section class="pair">{"".join(parts)}</section>'


def _verdict_table(result: Result, key: str, title: str) -> str:
    """One ratio, setting by load; nothing where no setting has it."""
    rows = {(row["point"], row["setting"]): row for row in result["summary"] if row.get(key)}
    points = list(dict.fromkeys(row["point"] for row in result["summary"]))
    head = "".join(f"<th>{escape(point)}</th>" for point in points)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_tinted(rows[point, name][key]) for point in points)}</tr>"
        for name in result["settings"]
        if all((point, name) in rows for point in points)
    )
    caption = f"<caption>{escape(title)}</caption>"
    return f'<table class="verdict">{caption}<tr><th></th>{head}</tr>{body}</table>' if body else ""


def _tinted(ratio: Result) -> str:
    value, low, high = ratio["value"], ratio["low"], ratio["high"]
    if value is None:
        return "<td>–</td>"
    strength = min(abs(value - 1) / 0.5, 1) * 55
    colour = "var(--good)" if value >= 1 else "var(--bad)"
    interval = "" if low is None or high is None else f"<small>{low:.2f}–{high:.2f}</small>"
    for name in ratio.get("chosen", ()):
        interval += f"<small>{escape(name)}</small>"
    tint = f"background:color-mix(in srgb, {colour} {strength:.0f}%, transparent)"
    return f'<td style="{tint}">{value:.2f}×{interval}</td>'


def _against_load(result: Result) -> str:
    """Throughput, latency and SLO attainment against load, or bars at a single load."""
    charts = [
        ("tokens_per_second", "Throughput", "tokens/s", 1.0, 0.0),
        ("mean_latency", "Mean end-to-end latency", "s", 1.0, 0.0),
        ("ttft_p90", "Time to first token, p90", "s", 1.0, 0.0),
        ("itl_p90", "Inter-token latency, p90", "ms", 1000.0, 0.0),
        ("slo_attainment", "Requests inside the SLO", "%", 100.0, 100.0),
        ("mean_accepted_length", "Mean accepted length", "tokens per forward", 1.0, 0.0),
    ]
    drawn = "".join(_one_against_load(result, *chart) for chart in charts)
    hint = "Whiskers span the repeats." if result["extent"]["repeats"] > 1 else ""
    return f"<section><h2>Against load</h2><p>{hint}</p><div class='grid-of'>{drawn}</div></section>"


def _one_against_load(result: Result, key: str, title: str, unit: str, factor: float, top: float) -> str:
    points = list(dict.fromkeys(row["point"] for row in result["summary"]))
    axes = Axes(title, y=unit, x=result["points"][0]["axis"], x_labels=_short(result, points), top=top)
    found: dict[str, list[tuple[Number, Number, Number]]] = {}
    for name in result["settings"]:
        for point in points:
            (pooled,) = (r[key] for r in result["summary"] if (r["point"], r["setting"]) == (point, name))
            each = [r[key] for r in result["rows"] if (r["point"], r["setting"]) == (point, name)]
            known = [value * factor for value in each if value is not None]
            spread = (min(known), max(known)) if len(known) > 1 else (None, None)
            found.setdefault(name, []).append((None if pooled is None else pooled * factor, *spread))
    style = styles(result)
    if len(points) == 1:
        return bars([(name, style[name], *found[name][0]) for name in result["settings"]], axes)
    series = []
    for name in result["settings"]:
        value, low, high = zip(*found[name], strict=True)
        series.append(Series(name, style[name], range(len(points)), value, low, high, dots=True))
    return lines(series, axes)


def _short(result: Result, labels: Sequence[str]) -> list[str]:
    loads = {point["label"]: f"{point['load']:g}" for point in result["points"]}
    return [loads[label] for label in labels]


def _latency(result: Result) -> str:
    """Distribution functions of the latencies at every load."""
    style, slo = styles(result), result["slo"]
    parts = []
    for point in dict.fromkeys(item["point"] for item in result["distributions"]):
        charts = []
        for key, title, factor, unit in _LATENCIES:
            series = [
                Series(item["setting"], style[item["setting"]], [v * factor for v in item[key]], QUANTILES)
                for item in result["distributions"]
                if item["point"] == point and key in item
            ]
            right = max((series_.xs[-2] for series_ in series), default=1.0)  # the slowest 2% may lie far off
            limit = slo[key]
            axes = Axes(
                title,
                y="% of tokens" if key == "itl" else "% of requests",
                x=unit,
                limit=None if limit is None else (limit * factor, "SLO"),
            )
            charts.append(lines([_cut(one, right * 1.15) for one in series], axes))
        parts.append(f"<h3>{escape(point)}</h3><div class='grid-of'>{''.join(charts)}</div>")
    return f"<section><h2>Latency</h2><p>Share that took at most so long.</p>{''.join(parts)}</section>"


def _cut(one: Series, right: float) -> Series:
    """A distribution function up to `right`."""
    kept = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if x <= right]
    return Series(one.name, one.style, [x for x, _ in kept], [y for _, y in kept])


def _table(result: Result) -> str:
    contents = [list(_cells(row)) for row in result["summary"]]
    shown = [i for i in range(len(_COLUMNS)) if any(cells[i][0] for cells in contents)]
    names = ("load", "setting", *(_COLUMNS[i] for i in shown))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body, before = [], None
    for row, found in zip(result["summary"], contents, strict=True):
        point = row["point"] if row["point"] != before else ""
        kind = ' class="first"' if point and before is not None else ""
        before = row["point"]
        name = f'<span class="key {styles(result)[row["setting"]]}"></span>{escape(row["setting"])}'
        texts = (found[i] for i in shown)
        cells = "".join(f'<td class="bad">{text}</td>' if bad else f"<td>{text}</td>" for text, bad in texts)
        body.append(f"<tr{kind}><th>{escape(point)}</th><th>{name}</th>{cells}</tr>")
    table = f'<div class="wide"><table class="all"><tr>{head}</tr>{"".join(body)}</table></div>'
    return f"<section><h2>All numbers</h2><p>Cells where a setting loses are red.</p>{table}</section>"


def _cells(row: Result) -> Iterator[tuple[str, bool]]:
    """Text of every cell and whether it is a loss."""
    yield _text(row["tokens_per_second"]), False
    for key in ("throughput_ratio", "latency_ratio", "over_best_fixed"):
        ratio = row.get(key)
        value = ratio["value"] if ratio else None
        chosen = f"<small>{escape(' / '.join(ratio['chosen']))}</small>" if ratio and "chosen" in ratio else ""
        yield ("" if value is None else f"{value:.2f}×{chosen}"), value is not None and round(value, 2) < 1
    for key, _, factor, unit in _LATENCIES:
        for p in ("p50", "p99"):
            value = row[f"{key}_{p}"]
            yield ("–" if value is None else f"{_figure(value * factor)}&thinsp;{unit}"), False
    yield ("–" if row["slo_attainment"] is None else f"{row['slo_attainment']:.0%}"), False
    yield _text(row["mean_accepted_length"], 2), False
    yield (f"{row['accepted_tokens']}/{row['draft_tokens']}" if row["draft_tokens"] else "–"), False
    yield str(row["failed"]), row["failed"] > 0


def _conditions(result: Result) -> str:
    """Everything needed to measure again."""
    host, workload, slo = result["host"], result["workload"], result["slo"]
    versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
    limits = [f"{name} {value:g} s" for name, value in slo.items() if value is not None]
    lengths = "".join(
        f", {name.replace('_', ' ')} {workload[name]}"
        for name in ("scale", "max_context", "max_output")
        if workload["trace"] and workload[name]
    )
    items = {
        "Command": f"<code>{escape(host['command'])}</code>",
        "Machine" if result["mode"] == "in process" else "Client": escape(host["device"]),
        "Software": escape(f"Python {host['python']}, {versions}"),
        "Requests": escape(
            f"{workload['questions']} questions ({workload['distinct_prompts']}), trace {workload['trace']}{lengths}"
            if workload["trace"]
            else f"{workload['questions']} questions ({workload['distinct_prompts']})"
        ),
        "Sampling": escape(", ".join(f"{name} {value}" for name, value in result["sampling"].items())),
        "SLO": escape(", ".join(limits) or "none"),
        "Time": escape(host["time"]),
        "Method": "Settings take turns with the same requests; latencies count from the moment a request was due. "
        "Ratios pool the repeats; intervals are bootstraps over repeats. The best fixed setting is chosen on half of "
        "the repeats and compared on the other half. Inter-token latency spreads a chunk's time over its tokens.",
    }
    if result["mode"] == "http":
        servers = (f"{name}: {url} ({result['models'][name]})" for name, url in result["urls"].items())
        items["Servers"] = (
            escape("; ".join(servers)) + ". A server that ignores cache_salt may know prompts of earlier runs."
        )
    rows = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in items.items())
    return f"<section><h2>Conditions</h2><dl>{rows}</dl></section>"


def _text(value: Number, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _figure(value: float) -> str:
    """Three figures, or whole numbers."""
    return f"{value:,.0f}" if value >= 100 else number(value)

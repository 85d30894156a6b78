"""The parts of the load report about a run's course: what was chosen step by step, and how right the estimates were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from paceline.bench.load_charts import COLOURS, Axes, Series, lines, plural, scatter, strips, thin

Result = Mapping[str, Any]


def over_time(result: Result, style: Mapping[str, str]) -> str:
    """The last repeat of every load as it went; the highest load is open."""
    points = [point["label"] for point in result["points"]]
    names = sorted({key.partition("/")[2] for item in result["over_time"] for key in item["series"] if "/" in key})
    drafters = {name: f"s{i % COLOURS}" for i, name in enumerate(names)}
    meaning = "accepted of drafted" if result["mode"] == "http" else "given the parent's"
    parts = []
    for point in points:
        there = [item for item in result["over_time"] if item["point"] == point]
        last = max((item["repeat"] for item in there), default=0)
        order = result["settings"].index
        items = sorted((i for i in there if i["repeat"] == last), key=lambda item: order(item["setting"]))
        if items:
            opened = " open" if point == points[-1] else ""
            charts = "".join(
                [
                    *_shared_series(items, style),
                    *(chart for item in items for chart in _own_series(item, drafters, meaning)),
                ]
            )
            summary = f"<summary>{escape(point)}, repeat {last + 1}</summary>"
            parts.append(f"<details{opened}>{summary}<div class='grid-of'>{charts}</div></details>")
    return f"<section><h2>Over time</h2>{''.join(parts)}</section>" if parts else ""


def _shared_series(items: Sequence[Result], style: Mapping[str, str]) -> Iterator[str]:
    """Charts with one line per setting."""
    titles = {
        "draft_nodes": ("Look-ahead", "draft nodes per request and step"),
        "running": ("Running requests", ""),
        "tokens_per_second": ("Throughput", "tokens/s"),
    }
    for key, (title, unit) in titles.items():
        series = [
            Series(item["setting"], style[item["setting"]], *thin(item["seconds"], item["series"][key]))
            for item in items
            if any(item["series"].get(key, ()))
        ]
        if series:
            yield lines(series, Axes(title, y=unit, x="s"))


def _own_series(item: Result, drafters: Mapping[str, str], meaning: str) -> Iterator[str]:
    """What only a setting that plans or drafts has: price, acceptance and asking, by drafter."""
    series = item["series"]
    if "slot_price" in series:
        line = Series("slot price", "s0", *thin(item["seconds"], series["slot_price"]))
        yield lines([line], Axes(f"{item['setting']}: slot price", y="last survival kept", x="s", top=1.0))
    accepted = _by_drafter(item, "acceptance", drafters)
    if accepted:
        chart = lines(accepted, Axes(f"{item['setting']}: acceptance", y=meaning, x="s", top=1.0))
        keys = "".join(
            f'<span class="inline"><span class="key {one.style}"></span>{escape(one.name)}</span>' for one in accepted
        )
        yield chart.replace("</figure>", f'<div class="keys">{keys}</div></figure>')
    used = _by_drafter(item, "used", drafters)
    if used:
        yield strips(used, Axes(f"{item['setting']}: drafters used", y="share of steps", x="s"))


def _by_drafter(item: Result, what: str, drafters: Mapping[str, str]) -> list[Series]:
    """The series of one kind; a drafter has the same colour throughout."""
    series = item["series"]
    return [
        Series(name, style, *thin(item["seconds"], series[f"{what}/{name}"]))
        for name, style in drafters.items()
        if any(series.get(f"{what}/{name}", ()))
    ]


def reliability(result: Result, style: Mapping[str, str]) -> str:
    """Predicted against observed acceptance."""
    charts = []
    for setting, drafters in result["reliability"].items():
        for drafter, item in drafters.items():
            total = sum(item["nodes"])
            dots = [
                (p, o, 2.0 + 9.0 * (n / max(item["nodes"])) ** 0.5, f"{n} nodes: predicted {p:.2f}, observed {o:.2f}")
                for n, p, o in zip(item["nodes"], item["predicted"], item["observed"], strict=True)
            ]
            title = f"{setting}: {drafter}, {plural(total, 'node')}, error {item['calibration_error']:.3f}"
            axes = Axes(title, x="predicted acceptance", top=1.0, right=1.0, diagonal=True)
            charts.append(scatter(dots, style[setting], axes))
    if not charts:
        return ""
    text = (
        "Acceptance of draft nodes, given that their parents were accepted: observed (up) against the plan's estimate "
        "beforehand (across). On the diagonal the estimates are right; the area of a dot is its number of nodes."
    )
    return f"<section><h2>Reliability</h2><p>{text}</p><div class='grid-of'>{''.join(charts)}</div></section>"

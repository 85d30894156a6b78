"""Small charts as SVG text, styled by the page around them so that they follow its light or dark colours.

Colours are CSS classes `s0` .. `s7`; `base` is the baseline. Nothing here knows what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = 8
"""Classes `s0` .. that a style sheet has."""
WIDTH, HEIGHT = 400, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 36
_BOX_WIDTH, _BOX_HEIGHT = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

Number = float | None


@dataclass(frozen=True, slots=True)
class Series:
    """One line: `ys` may hold None, where the line breaks; `low` and `high` are whiskers."""

    name: str
    style: str
    xs: Sequence[float]
    ys: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    dots: bool = False
    steps: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Titles and limits of a chart.

    `x_labels` puts the values 0, 1, .. at evenly spaced names; `top` and `right` are lowest ends of the axes; `limit`
    draws a vertical line and `level` a horizontal one.
    """

    title: str
    x: str = ""
    y: str = ""
    x_labels: Sequence[str] = ()
    top: float = 0.0
    right: float = 0.0
    limit: tuple[float, str] | None = None
    level: tuple[float, str] | None = None
    diagonal: bool = False


@dataclass(slots=True)
class _Canvas:
    right: float
    top: float
    left: float = 0.0
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        return _LEFT + _BOX_WIDTH * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return _TOP + _BOX_HEIGHT * (1 - value / self.top)

    def add(self, text: str) -> None:
        self.parts.append(text)


def lines(series: Sequence[Series], axes: Axes) -> str:
    """A line chart whose y axis begins at 0."""
    values = [v for s in series for v in (*s.ys, *s.high) if v is not None]
    if not values:
        return figure(axes.title, '<p class="empty">nothing was measured</p>')
    canvas = _frame(axes, max(values), max((x for s in series for x in s.xs), default=1.0))
    for one in series:
        _whiskers(canvas, one)
        _path(canvas, one)
    return _finish(canvas, axes)


def scatter(points: Sequence[tuple[float, float, float, str]], style: str, axes: Axes) -> str:
    """Dots of (x, y, radius, what a pointer shows)."""
    canvas = _frame(axes, max((y for _, y, *_ in points), default=1.0), max((x for x, *_ in points), default=1.0))
    path = " ".join(f"{canvas.x(x):.1f},{canvas.y(y):.1f}" for x, y, *_ in points)
    canvas.add(f'<polyline class="line thin {style}" points="{path}"/>')
    for x, y, radius, text in points:
        place = f'cx="{canvas.x(x):.1f}" cy="{canvas.y(y):.1f}" r="{radius:.1f}"'
        canvas.add(f'<circle class="dot {style}" {place}><title>{escape(text)}</title></circle>')
    return _finish(canvas, axes)


def bars(values: Sequence[tuple[str, str, Number, Number, Number]], axes: Axes) -> str:
    """Horizontal bars of (name, style, value, low, high)."""
    known = [v for _, _, value, _, high in values for v in (value, high) if v is not None]
    if not known:
        return figure(axes.title, '<p class="empty">nothing was measured</p>')
    row, left = 30, 8
    height = row * len(values) + 10
    scale = (WIDTH - left - 70) / (max(known) or 1.0)
    parts = []
    for i, (name, style, value, low, high) in enumerate(values):
        y = i * row + 4
        parts.append(f'<text class="name" x="{left}" y="{y + 8}">{escape(name)}</text>')
        if value is None:
            continue
        text = f"{name}: {number(value)}"
        length = value * scale
        parts.append(
            f'<rect class="bar {style}" x="{left}" y="{y + 12}" width="{length:.1f}" height="10" rx="2">'
            f"<title>{escape(text)}</title></rect>"
        )
        end = max(value, high or value) * scale
        if low is not None and high is not None:
            at = y + 17
            parts.append(f'<path class="whisker" d="M{left + low * scale:.1f} {at}H{left + high * scale:.1f}"/>')
        parts.append(f'<text class="value" x="{left + end + 6:.1f}" y="{y + 21}">{number(value)}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
    return figure(f"{axes.title}{f', {axes.y}' if axes.y else ''}", svg)


def strips(rows: Sequence[Series], axes: Axes) -> str:
    """One band per series along the time axis; the more opaque, the nearer the value is to 1."""
    row, left, top = 26, 74, 6
    bottom = top + row * len(rows)
    right = max((x for one in rows for x in one.xs), default=0.0) or 1.0
    scale = (WIDTH - left - _RIGHT) / right
    parts = []
    for i, one in enumerate(rows):
        y = top + row * i
        parts.append(f'<text class="name end" x="{left - 8}" y="{y + 15}">{escape(one.name)}</text>')
        parts.append(f'<rect class="track" x="{left}" y="{y + 3}" width="{WIDTH - left - _RIGHT}" height="18" rx="3"/>')
        start = 0.0
        for n, (x, value) in enumerate(zip(one.xs, one.ys, strict=True)):
            end = (x + one.xs[n + 1]) / 2 if n + 1 < len(one.xs) else right
            if value:
                place = f'x="{left + start * scale:.1f}" y="{y + 3}" width="{(end - start) * scale:.1f}" height="18"'
                title = f"<title>{escape(one.name)}: {number(value)}</title>"
                parts.append(f'<rect class="bar {one.style}" {place} fill-opacity="{value:.2f}">{title}</rect>')
            start = end
    for value in ticks(right, 5):
        parts.append(f'<text class="tick mid" x="{left + value * scale:.1f}" y="{bottom + 15}">{number(value)}</text>')
    parts.append(f'<text class="axis mid" x="{(left + WIDTH) / 2:.0f}" y="{bottom + 30}">{escape(axes.x)}</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {bottom + 34}" role="img">{"".join(parts)}</svg>'
    return figure(f"{axes.title}{f', {axes.y}' if axes.y else ''}", svg)


def figure(title: str, content: str) -> str:
    """A chart with its title above it."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"


def number(value: float) -> str:
    """A number in as few characters as a chart needs."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"


def ticks(top: float, about: int = 4) -> list[float]:
    """Round numbers from 0 to at most `top`."""
    raw = top / about
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    return [step * i for i in range(int(top / step + 1e-9) + 1)]


def thin(seconds: Sequence[float], values: Sequence[Number], most: int = 120) -> tuple[list[float], list[Number]]:
    """Means of neighbours, so that at most `most` points are drawn; None only where all neighbours are."""
    group = max(1, math.ceil(len(values) / most))
    xs: list[float] = []
    ys: list[Number] = []
    for i in range(0, len(values), group):
        known = [v for v in values[i : i + group] if v is not None]
        xs.append(sum(seconds[i : i + group]) / len(seconds[i : i + group]))
        ys.append(sum(known) / len(known) if known else None)
    return xs, ys


def _frame(axes: Axes, top: float, right: float) -> _Canvas:
    """The box with grid, tick labels and titles."""
    top = max(top * 1.06, axes.top) or 1.0
    names = axes.x_labels
    canvas = _Canvas(max(right, axes.right) or 1.0, top)
    if names:
        canvas.left, canvas.right = -0.3, len(names) - 0.7
    for value in ticks(top):
        y = canvas.y(value)
        canvas.add(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        canvas.add(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 3.5:.1f}">{number(value)}</text>')
    marks = list(enumerate(names)) if names else [(value, number(value)) for value in ticks(canvas.right, 5)]
    for at, text in marks:
        canvas.add(f'<text class="tick mid" x="{canvas.x(at):.1f}" y="{HEIGHT - _BOTTOM + 15}">{escape(text)}</text>')
    middle = _LEFT + _BOX_WIDTH / 2
    canvas.add(f'<text class="axis mid" x="{middle:.0f}" y="{HEIGHT - 4}">{escape(axes.x)}</text>')
    if axes.diagonal:
        end = min(canvas.right, top)
        start, stop = (f"{canvas.x(v):.1f} {canvas.y(v):.1f}" for v in (0.0, end))
        canvas.add(f'<path class="mark" d="M{start}L{stop}"/>')
    if axes.limit is not None and axes.limit[0] <= canvas.right:
        x = canvas.x(axes.limit[0])
        canvas.add(f'<path class="mark" d="M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
        canvas.add(f'<text class="tick end" x="{x - 4:.1f}" y="{_TOP + 9}">{escape(axes.limit[1])}</text>')
    if axes.level is not None and axes.level[0] <= top:
        y = canvas.y(axes.level[0])
        canvas.add(f'<path class="mark" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
    return canvas


def _path(canvas: _Canvas, one: Series) -> None:
    """The line, broken where a value is missing, and its dots."""
    d, pen = [], "M"
    for x, y in zip(one.xs, one.ys, strict=True):
        if y is None:
            pen = "M"
            continue
        at = f"{canvas.x(x):.1f} {canvas.y(y):.1f}"
        d.append(f"H{canvas.x(x):.1f}V{canvas.y(y):.1f}" if one.steps and pen == "L" else f"{pen}{at}")
        pen = "L"
    canvas.add(f'<path class="line {one.style}" d="{"".join(d)}"><title>{escape(one.name)}</title></path>')
    known = [(x, y) for x, y in zip(one.xs, one.ys, strict=True) if y is not None]
    for x, y in known if one.dots or len(known) == 1 else ():
        text = escape(f"{one.name}: {number(y)}")
        place = f'cx="{canvas.x(x):.1f}" cy="{canvas.y(y):.1f}" r="3.5"'
        canvas.add(f'<circle class="dot {one.style}" {place}><title>{text}</title></circle>')


def _whiskers(canvas: _Canvas, one: Series) -> None:
    for x, low, high in zip(one.xs, one.low, one.high, strict=False):
        if low is not None and high is not None:
            canvas.add(
                f'<path class="whisker {one.style}" d="M{canvas.x(x):.1f} {canvas.y(low):.1f}V{canvas.y(high):.1f}"/>'
            )


def _finish(canvas: _Canvas, axes: Axes) -> str:
    title = f"{axes.title}{f', {axes.y}' if axes.y else ''}"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(canvas.parts)}</svg>'
    return figure(title, svg)


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

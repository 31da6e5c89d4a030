"""Charts as SVG text: lines over time, and bars. No script, no style sheet, no font: they show anywhere.

Everything that comes from outside is escaped: a file may be called `<script>`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

WIDTH, HEIGHT = 760, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 26, 34
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")


@dataclass(frozen=True)
class Line:
    """One curve: points in order of x; a y of None is a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Mark:
    """A vertical line at x."""

    x: float
    name: str
    colour: str = "#dc2626"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two values."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(curves: Sequence[Line], *, x: str, y: str, marks: Sequence[Mark] = (), zero: bool = False) -> str:
    """A chart of curves, with a legend. `zero`: the y axis begins there."""
    drawn = [
        Line(c.name, [(px, py) for px, py in c.points if py is None or math.isfinite(py)]) for c in curves
    ]
    xs = [px for c in drawn for px, _ in c.points] + [mark.x for mark in marks]
    ys = [py for c in drawn for _, py in c.points if py is not None]
    if not xs or not ys:
        return '<p class="none">nothing yet</p>'
    x0, x1, y0, y1 = min(xs), max(xs), 0.0 if zero else min(ys), max(ys)
    x1, y0, y1 = (x1 if x1 > x0 else x0 + 1), y0 - (y1 - y0) * 0.05 * (not zero), y1 + (y1 - y0) * 0.05
    y1 = y1 if y1 > y0 else y0 + (abs(y0) or 1.0) * 0.1

    def at(px: float, py: float) -> tuple[float, float]:
        return _x(px, x0, x1), _y(py, y0, y1)

    parts = [_axes(x0, x1, y0, y1, x, y)]
    for mark in marks:
        place = _x(mark.x, x0, x1)
        late = place > WIDTH * 0.8
        parts.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" stroke="{mark.colour}"'
            f' stroke-dasharray="4 3"><title>{escape(mark.name)}</title></line>'
            f'<text x="{place + (-3 if late else 3):.1f}" y="{_TOP + 10}" font-size="10" fill="{mark.colour}"'
            f' text-anchor="{"end" if late else "start"}">{escape(mark.name)}</text>'
        )
    for number, curve in enumerate(drawn):
        colour, run = COLOURS[number % len(COLOURS)], list[tuple[float, float]]()
        runs = [run]
        for px, py in curve.points:
            if py is None:
                run = []
                runs.append(run)
            else:
                run.append(at(px, py))
        for run in map(_thinned, runs):
            if len(run) > 1:
                joined = " ".join(f"{px:.1f},{py:.1f}" for px, py in run)
                parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
            if len(run) < 100:
                parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.4" fill="{colour}"/>' for px, py in run]
        parts.append(
            f'<text x="{_LEFT + 130 * number}" y="{_TOP - 12}" font-size="11" fill="{colour}">'
            f"{escape(curve.name)}</text>"
        )
    return _svg(HEIGHT, parts)


def bars(rows: Sequence[tuple[str, Sequence[float | None]]], *, names: Sequence[str]) -> str:
    """Horizontal bars: for each row one of every name. A value of None has no bar."""
    values = [v for _, all_ in rows for v in all_ if v is not None and math.isfinite(v)]
    if not values:
        return '<p class="none">nothing yet</p>'
    thick, gap, left = 12, 8, 250
    high = max(values) or 1.0
    height = _TOP + 2 + len(rows) * (thick * len(names) + gap) + 6
    parts = [
        f'<text x="{left + 110 * number}" y="{_TOP - 8}" font-size="11" fill="{COLOURS[number]}">{escape(name)}</text>'
        for number, name in enumerate(names)
    ]
    for row, (label, all_) in enumerate(rows):
        top = _TOP + 2 + row * (thick * len(names) + gap)
        shown = label if len(label) <= 36 else f"...{label[-33:]}"
        parts.append(
            f'<text x="{left - 8}" y="{top + thick * len(names) / 2 + 4:.1f}" font-size="11" text-anchor="end">'
            f"<title>{escape(label)}</title>{escape(shown)}</text>"
        )
        for number, value in enumerate(all_):
            if value is None or not math.isfinite(value):
                continue
            wide = value / high * (WIDTH - left - 90)
            place, colour = top + number * thick, COLOURS[number]
            parts.append(
                f'<rect x="{left}" y="{place}" width="{max(wide, 1):.1f}" height="{thick - 2}" fill="{colour}"/>'
                f'<text x="{left + wide + 5:.1f}" y="{place + thick - 3}" font-size="10">{_short(value)}</text>'
            )
    return _svg(height, parts)


def _axes(x0: float, x1: float, y0: float, y1: float, x: str, y: str) -> str:
    parts = []
    for value in ticks(y0, y1):
        place = _y(value, y0, y1)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}" stroke="#e5e7eb"/>'
            f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" font-size="11" text-anchor="end">{_short(value)}</text>'
        )
    for value in ticks(x0, x1, 6):
        parts.append(
            f'<text x="{_x(value, x0, x1):.1f}" y="{HEIGHT - _BOTTOM + 15}" font-size="11" text-anchor="middle">'
            f"{_short(value)}</text>"
        )
    parts.append(
        f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM}" stroke="#6b7280"/>'
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 4}" font-size="11" text-anchor="middle">{escape(x)}</text>'
        f'<text x="12" y="{HEIGHT / 2}" font-size="11" text-anchor="middle"'
        f' transform="rotate(-90 12 {HEIGHT / 2})">{escape(y)}</text>'
    )
    return "".join(parts)


def _svg(height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' font-family="sans-serif" fill="#111827" role="img">{"".join(parts)}</svg>'
    )


def _thinned(run: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of many points in one column of pixels, the highest and the lowest: of months there are hundreds in each."""
    if len(run) <= 2 * WIDTH:
        return run
    found: list[tuple[float, float]] = []
    for _, column in groupby(run, lambda point: int(point[0])):
        points = list(column)
        ends = {min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])}
        found += sorted(ends)
    return found


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)


def _short(value: float) -> str:
    return f"{value:.4g}"

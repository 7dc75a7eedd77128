"""A line chart as SVG, written by hand: it stands in a README, and nothing has to be installed for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH, _HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 44, 56


@dataclass(frozen=True)
class Curve:
    """Values over the chart's x, with a name and a colour."""

    name: str
    values: Sequence[float]
    colour: str
    dashed: bool = False


def plot(xs: Sequence[float], curves: Sequence[Curve], *, title: str, x: str, y: str) -> str:
    """Return the chart; y begins at 1 or below, x at 0."""
    lowest = min([1.0, *(value for curve in curves for value in curve.values)])
    highest = max([lowest + 0.1, *(value for curve in curves for value in curve.values)]) * 1.02

    def at(across: float, up: float) -> tuple[float, float]:
        wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        right = _LEFT + wide * across / (max(xs) or 1)
        return round(right, 1), round(_HEIGHT - _BOTTOM - high * (up - lowest) / (highest - lowest), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#333">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        _text(_LEFT, 24, title, "font-size='16' font-weight='bold'"),
    ]
    for tick in _ticks(lowest, highest):
        (left, height), (right, _) = at(0, tick), at(max(xs), tick)
        parts.append(f'<path d="M{left} {height}H{right}" stroke="#ddd"/>')
        parts.append(_text(left - 8, height + 4, f"{tick:.1f}", "text-anchor='end'"))
    for value in xs:
        parts.append(
            _text(at(value, lowest)[0], _HEIGHT - _BOTTOM + 20, f"{value:g}", "text-anchor='middle'")
        )
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, x, "text-anchor='middle'"))
    parts.append(_text(0, 0, y, f"text-anchor='middle' transform='translate(18 {_HEIGHT / 2}) rotate(-90)'"))
    labels = _apart([at(xs[-1], curve.values[-1])[1] for curve in curves])
    for curve, label in zip(curves, labels, strict=True):
        points = [at(value, height) for value, height in zip(xs, curve.values, strict=True)]
        line = " ".join(f"{right},{up}" for right, up in points)
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="2"{dash}/>'
        )
        if not curve.dashed:
            parts += [
                f'<circle cx="{right}" cy="{up}" r="3.5" fill="{curve.colour}"/>' for right, up in points
            ]
        parts.append(_text(points[-1][0] + 10, label + 4, curve.name, f"fill='{curve.colour}'"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(right: float, down: float, text: str, how: str) -> str:
    return f'<text x="{right}" y="{down}" {how}>{escape(text)}</text>'


def _ticks(lowest: float, highest: float) -> list[float]:
    """Multiples of 0.1, few enough."""
    step = next(one for one in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 1e9) if (highest - lowest) / one <= 8)
    first = int(lowest / step + 0.999)
    return [step * number for number in range(first, int(highest / step) + 1)]


def _apart(heights: Sequence[float], least: float = 16.0) -> list[float]:
    """The heights, moved so that no two labels cover each other."""
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    moved = list(heights)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved

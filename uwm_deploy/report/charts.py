"""Pictures as inline SVG: small functions of numbers. Colours are classes of the page's style sheet, light and dark.

Every picture is drawn 400 units wide, so that its text can be read at the width of a phone. A difference never lies in a
colour alone: bars are labelled, marks have shapes, hatching tells lost from gained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from uwm_deploy.report.markup import Html, Value, join, tag

WIDTH = 400
_LABEL = 132
"""Units on the left for the name of a bar."""
_VALUE = 52
"""Units on the right for its number."""
_LETTERS = 17
"""Letters of a name that fit on the left."""
_HEAD_LETTER = 8.8
"""Units of a letter of a heading, at the width of a phone."""
_SIDE = 76
"""Units of the words on each side of a tie, at the width of a phone."""
_ROW = 15

Tone = Literal["original", "edited", "engine", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        value: None when it was not measured; then `shown` says so.
        low: Lower end of its interval, where it has one.
        shown: The number as text.
    """

    label: str
    value: float | None
    shown: str
    tone: Tone = "edited"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Bars under one heading.

    Attributes:
        note: What the heading means.
        limit: Drawn as a line across the bars.
    """

    head: str
    bars: Sequence[Bar]
    note: str = ""
    limit: float | None = None


def picture(title: str, about: str, height: float, *parts: Html) -> Html:
    """The frame of every picture: named for those who cannot see it."""
    frame: dict[str, Value] = {
        "class": "chart",
        "viewBox": f"0 0 {WIDTH} {height:g}",
        "role": "img",
        "aria-label": f"{title}. {about}",
        "xmlns": "http://www.w3.org/2000/svg",
    }
    return tag("svg", frame, tag("title", {}, title), tag("desc", {}, about), *parts)


def bars(title: str, about: str, groups: Sequence[Group], largest: float) -> Html:
    """Horizontal bars from 0, with intervals as whiskers."""
    return _rows(title, about, groups, _Linear(largest))


def dots(title: str, about: str, groups: Sequence[Group], lowest: float, largest: float) -> Html:
    """The same on a logarithmic axis, where a bar would have no foot: a dot for each value, 0 at the left edge."""
    return _rows(title, about, groups, _Log(lowest, largest))


@dataclass(frozen=True, slots=True)
class _Linear:
    largest: float

    def at(self, value: float) -> float:
        share = value / self.largest if self.largest > 0 else 0.0
        return _LABEL + (WIDTH - _LABEL - _VALUE) * min(max(share, 0.0), 1.0)

    def mark(self, bar: Bar, y: float) -> list[Html]:
        assert bar.value is not None
        end = self.at(bar.value)
        box: dict[str, Value] = {
            "class": f"bar {bar.tone}",
            "x": _LABEL,
            "y": y + 2.5,
            "width": max(end - _LABEL, 1.0),
            "height": 9,
        }
        parts = [tag("rect", box, tag("title", {}, _spoken(bar)))]
        if bar.low is not None and bar.high is not None:
            low, high, middle = self.at(bar.low), self.at(bar.high), y + 7
            path = f"M{low:.1f} {middle - 3}v6M{low:.1f} {middle}H{high:.1f}M{high:.1f} {middle - 3}v6"
            parts.append(tag("path", {"class": "whisker", "d": path}))
        return parts


@dataclass(frozen=True, slots=True)
class _Log:
    lowest: float
    largest: float

    def at(self, value: float) -> float:
        if value <= self.lowest:
            return _LABEL
        span = math.log10(self.largest / self.lowest)
        share = min(math.log10(value / self.lowest) / span, 1.0)
        return _LABEL + (WIDTH - _LABEL - _VALUE - 8) * share

    def mark(self, bar: Bar, y: float) -> list[Html]:
        assert bar.value is not None
        x, middle = self.at(bar.value), y + 7
        line = tag("path", {"class": "guide", "d": f"M{_LABEL} {middle}H{x:.1f}"})
        dot: dict[str, Value] = {"class": f"dot {bar.tone}", "cx": x, "cy": middle, "r": 4}
        return [line, tag("circle", dot, tag("title", {}, _spoken(bar)))]


def _spoken(bar: Bar) -> str:
    if bar.low is None or bar.high is None:
        return f"{bar.label}: {bar.shown}"
    return f"{bar.label}: {bar.shown}, 95% interval {bar.low:.1f} to {bar.high:.1f}"


def _rows(title: str, about: str, groups: Sequence[Group], scale: _Linear | _Log) -> Html:
    y, parts = 2.0, []
    for group in groups:
        if group.head:
            parts.append(_text(0, y + 11, group.head, "head"))
            if group.note:
                beside = max(_LABEL, 6 + _HEAD_LETTER * len(group.head))
                parts.append(_text(beside, y + 11, group.note, "note"))
            y += 17
        top = y
        for bar in group.bars:
            parts.append(_text(_LABEL - 6, y + 11, clipped(bar.label, _LETTERS), "label end"))
            if bar.value is not None:
                parts += scale.mark(bar, y)
                parts.append(_text(WIDTH, y + 11, bar.shown, "value end"))
            else:
                parts.append(_text(_LABEL + 2, y + 11, clipped(bar.shown, 44), "note"))
            y += _ROW
        parts.append(tag("path", {"class": "axis", "d": f"M{_LABEL} {top}V{y:g}"}))
        if group.limit is not None:
            x = scale.at(group.limit)
            parts.append(tag("path", {"class": "limit", "d": f"M{x:.1f} {top - 1}V{y:g}"}))
        y += 8
    return picture(title, about, y, *parts)


def heat_map(
    title: str, about: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]
) -> Html:
    """Cells with a number each; the more it differs from 0 the stronger the colour, blue up and orange down.

    Args:
        title: Of the picture.
        about: What it shows, for those who cannot see it.
        rows: Names.
        columns: Short names.
        values: One list per row.
    """
    strongest = max((abs(value) for row in values for value in row), default=0.0) or 1.0
    left, wide, high = 86.0, (WIDTH - 86.0) / max(len(columns), 1), 22
    parts = [_text(left + wide * (i + 0.5), 12, name, "cell-head middle") for i, name in enumerate(columns)]
    for r, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = 18 + r * high
        parts.append(_text(left - 6, y + 15, clipped(name, 15), "label end"))
        for c, value in enumerate(row):
            x = left + c * wide
            box: dict[str, Value] = {
                "class": f"cell {'up' if value >= 0 else 'down'}",
                "x": x + 0.5,
                "y": y,
                "width": wide - 1,
            }
            box |= {"height": high - 1, "fill-opacity": f"{0.72 * abs(value) / strongest:.3f}"}
            parts.append(tag("rect", box, tag("title", {}, f"{name}, {columns[c]}: {signed(value)}")))
            parts.append(_text(x + wide / 2, y + 15, signed(value, 0 if abs(value) >= 9.95 else 1), "cell-text middle"))
    return picture(title, about, 20 + len(rows) * high, *parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Margins of one decision, counted.

    Attributes:
        edges: (b + 1,) float64, ascending; 0 is one of them.
        original: (b,) int64 counts of the original model; the others are of the edited one.
        same: (b,) int64, decided as the original model does.
        lost: (b,) int64, safe for the original, unsafe for the edited model.
        gained: (b,) int64, unsafe for the original, safe for the edited model.
    """

    edges: np.ndarray
    original: np.ndarray
    same: np.ndarray
    lost: np.ndarray
    gained: np.ndarray


def histogram_of(original: np.ndarray, edited: np.ndarray, bins: int = 32) -> Histogram:
    """Counts the margins of both models in bins of one width, with a border at 0.

    An exact tie is a failure, so the bin to the left of 0 includes it.

    Args:
        original: (n,) float64 margins, differences of cosines.
        edited: (n,) float64 margins of the same items.
        bins: Number of bins, about.
    """
    both = np.concatenate([original, edited])
    width = max(float(both.max() - both.min()) / bins, 1e-9)
    first, last = math.floor(float(both.min()) / width), math.ceil(float(both.max()) / width)
    edges = width * np.arange(min(first, -1), max(last, 1) + 1)
    safe_before, safe_after = original > 0, edited > 0

    def count(values: np.ndarray) -> np.ndarray:
        # Left-open bins: (a, b].
        places = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)
        return np.bincount(places, minlength=len(edges) - 1)

    return Histogram(
        edges=edges,
        original=count(original),
        same=count(edited[safe_before == safe_after]),
        lost=count(edited[safe_before & ~safe_after]),
        gained=count(edited[~safe_before & safe_after]),
    )


def histogram(
    title: str, about: str, found: Histogram, marks: Sequence[tuple[float, Literal["lost", "gained"], str]]
) -> Html:
    """Edited margins as bars, stacked by what the edit did; the original as an outline; marks below the axis.

    Args:
        title: Of the picture.
        about: What it shows, for those who cannot see it.
        found: Counts.
        marks: Margin, kind and name of decisions that an artifact changes.
    """
    low, high = float(found.edges[0]), float(found.edges[-1])
    top, foot = 20.0, 142.0
    tallest = int(max(found.original.max(), (found.same + found.lost + found.gained).max(), 1))

    def x(value: float) -> float:
        return 4 + (WIDTH - 8) * (value - low) / (high - low)

    def y(count: float) -> float:
        return foot - (foot - top) * count / tallest

    parts = [tag("rect", {"class": "unsafe-side", "x": 0, "y": top - 6, "width": x(0), "height": foot - top + 6})]
    between = min(max(x(0), _SIDE), WIDTH - _SIDE)
    parts += [_text(between - 6, 10, "unsafe wins", "note end"), _text(between + 6, 10, "safe wins", "note")]
    for i in range(len(found.edges) - 1):
        left, right = x(float(found.edges[i])), x(float(found.edges[i + 1]))
        base = 0
        for kind, counts in (("same", found.same), ("gained", found.gained), ("lost", found.lost)):
            n = int(counts[i])
            if n:
                box: dict[str, Value] = {"class": f"stack {kind}", "x": left + 0.4, "width": right - left - 0.8}
                box |= {"y": y(base + n), "height": y(base) - y(base + n)}
                parts.append(tag("rect", box, tag("title", {}, f"{n} {_KINDS[kind]}")))
            base += n
    outline = f"M{x(low):.1f} {foot}" + "".join(
        f"V{y(int(n)):.1f}H{x(float(edge)):.1f}" for n, edge in zip(found.original, found.edges[1:], strict=True)
    )
    parts.append(tag("path", {"class": "outline", "d": f"{outline}V{foot}"}))
    parts.append(tag("path", {"class": "axis", "d": f"M0 {foot}H{WIDTH}M{x(0):.1f} {top - 8}V{foot + 22}"}))
    for value, kind, name in marks:
        at, flat, point = x(value), (foot + 6, foot + 14)[kind == "gained"], (foot + 14, foot + 6)[kind == "gained"]
        path = f"M{at - 4.5:.1f} {flat}H{at + 4.5:.1f}L{at:.1f} {point}z"
        parts.append(tag("path", {"class": f"flip {kind}", "d": path}, tag("title", {}, name)))
    parts += [
        _text(x(value), foot + 32, f"{value:.2f}", f"note {place}")
        for value, place in ((low, ""), (0.0, "middle"), (high, "end"))
    ]
    return picture(title, about, foot + 38, *parts)


_KINDS = {
    "same": "decided as the original model decides",
    "gained": "safe because of the edit",
    "lost": "unsafe because of the edit",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a scatter.

    Attributes:
        series: Position of its series, which has a shape.
        ringed: On the front.
        chosen: The picked one.
    """

    x: float
    y: float
    label: str
    series: int
    ringed: bool = False
    chosen: bool = False


def scatter(title: str, about: str, points: Sequence[Point], x_name: str, y_name: str, *, joined: bool = True) -> Html:
    """Points, within their series joined if asked for, the front ringed, the chosen one a star."""
    xs, ys = ticks([*(p.x for p in points), 0.0]), ticks([*(p.y for p in points), 0.0])
    left, right, top, foot = 50.0, WIDTH - 14.0, 12.0, 236.0

    def at(p: Point) -> tuple[float, float]:
        across = (p.x - xs[0]) / (xs[-1] - xs[0])
        return left + (right - left) * across, foot - (foot - top) * (p.y - ys[0]) / (ys[-1] - ys[0])

    parts = []
    for value in xs:
        place = at(Point(x=value, y=ys[0], label="", series=0))[0]
        parts.append(tag("path", {"class": "grid" if value else "axis", "d": f"M{place:.1f} {top}V{foot}"}))
        parts.append(_text(place, foot + 14, f"{value:g}", "note middle"))
    for value in ys:
        place = at(Point(x=xs[0], y=value, label="", series=0))[1]
        parts.append(tag("path", {"class": "grid" if value else "axis", "d": f"M{left} {place:.1f}H{right}"}))
        parts.append(_text(left - 5, place + 4, f"{value:g}", "note end"))
    for series in dict.fromkeys(p.series for p in points) if joined else ():
        places = [at(p) for p in points if p.series == series]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
        parts.append(tag("path", {"class": f"series s{series % SHAPES}", "d": path}))
    for p in points:
        a, b = at(p)
        if p.ringed:
            parts.append(tag("circle", {"class": "ring", "cx": a, "cy": b, "r": 8}))
        attributes = {"class": f"point s{p.series % SHAPES}{' chosen' if p.chosen else ''}"}
        attributes["d"] = _shape(p.series, a, b) if not p.chosen else _star(a, b)
        parts.append(tag("path", attributes, tag("title", {}, f"{p.label}: {signed(p.x)}, {signed(p.y)}")))
    for p, (a, b) in _labelled(points, [at(p) for p in points]):
        near = a > right - 40
        parts.append(_text(a - 9 if near else a + 9, b - 6, p.label, "note end" if near else "note"))
    parts.append(_text((left + right) / 2, foot + 30, x_name, "label middle"))
    turned = {"transform": f"rotate(-90 10 {(top + foot) / 2:g})"}
    parts.append(tag("g", turned, _text(10, (top + foot) / 2, y_name, "label middle")))
    return picture(title, about, foot + 36, *parts)


SHAPES = 4


def _shape(series: int, x: float, y: float) -> str:
    """Path of a mark: circle, square, triangle, diamond."""
    return (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        f"M{x - 3.7:.1f} {y - 3.7:.1f}h7.4v7.4h-7.4z",
        f"M{x:.1f} {y - 5:.1f}l4.6 8.4h-9.2z",
        f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
    )[series % SHAPES]


def _star(x: float, y: float) -> str:
    corners = [(9 if i % 2 == 0 else 3.8, math.pi * (i / 5 - 0.5)) for i in range(10)]
    return "M" + "L".join(f"{x + r * math.cos(t):.1f} {y + r * math.sin(t):.1f}" for r, t in corners) + "z"


def _labelled(
    points: Sequence[Point], places: Sequence[tuple[float, float]]
) -> list[tuple[Point, tuple[float, float]]]:
    """The chosen and the ringed points, and those with room for a label."""

    def free(i: int) -> bool:
        x, y = places[i]
        return all(j == i or abs(x - a) > 36 or abs(y - b) > 14 for j, (a, b) in enumerate(places))

    return [(p, places[i]) for i, p in enumerate(points) if p.label and (p.chosen or p.ringed or free(i))]


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Round numbers that enclose some values, about `count` of them."""
    low, high = min(values), max(values)
    rough = (high - low) / count or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def signed(value: float, digits: int = 1) -> str:
    """A change with its sign; nothing but 0 is written as 0 only when it is one."""
    text = f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text if float(f"{value:.{digits}f}") else text[1:]


def clipped(text: str, length: int) -> str:
    """Text that fits into a label; the middle is left out, since layers differ at both ends."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[len(text) - (length - 1 - half) :]}"


def _text(x: float, y: float, words: str, kind: str) -> Html:
    return tag("text", {"x": float(x), "y": float(y), "class": kind}, words)


def swatch(kind: str, words: str) -> Html:
    """One entry of a legend: a mark as the picture has it, and what it means."""
    marks = {
        "outline": tag("path", {"class": "outline", "d": "M1 11V3H13V11"}),
        "ring": tag("circle", {"class": "ring", "cx": 7, "cy": 7, "r": 5.5}),
        "chosen": tag("path", {"class": "point chosen", "d": _star(7, 7)}),
        "limit": tag("path", {"class": "limit", "d": "M7 0V14"}),
        "dot engine": tag("circle", {"class": "dot engine", "cx": 7, "cy": 7, "r": 4}),
        "whisker": tag("path", {"class": "whisker", "d": "M1 4v6M1 7H13M13 4v6"}),
        "flip lost": tag("path", {"class": "flip lost", "d": "M2 3H12L7 11z"}),
        "flip gained": tag("path", {"class": "flip gained", "d": "M2 11H12L7 3z"}),
    }
    if kind.startswith("s") and kind[1:].isdigit():
        marks[kind] = tag("path", {"class": f"point {kind}", "d": _shape(int(kind[1:]), 7, 7)})
    mark = marks.get(kind) or tag("rect", {"class": kind, "x": 1, "y": 2, "width": 12, "height": 10})
    icon = tag("svg", {"class": "swatch", "viewBox": "0 0 14 14", "aria-hidden": "true"}, mark)
    return tag("li", {}, icon, words)


def patterns() -> Html:
    """Hatching that the pictures of a page share."""
    made = []
    for name, turn in (("lost", 45), ("gained", -45)):
        frame: dict[str, Value] = {"id": f"hatch-{name}", "width": 5, "height": 5, "patternUnits": "userSpaceOnUse"}
        frame["patternTransform"] = f"rotate({turn})"
        ground = tag("rect", {"class": f"hatch-ground {name}", "width": 5, "height": 5})
        made.append(tag("pattern", frame, ground, tag("rect", {"class": "hatch-line", "width": 1.6, "height": 5})))
    return tag("svg", {"class": "defs", "width": 0, "height": 0, "aria-hidden": "true"}, tag("defs", {}, join(*made)))

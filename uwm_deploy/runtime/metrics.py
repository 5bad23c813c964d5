"""Counters, gauges and histograms in the text format of Prometheus, without its client library."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Labels = tuple[tuple[str, str], ...]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of histograms of time."""

ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
"""Upper bounds of histograms of batch sizes."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with all its labels.

    Attributes:
        name: Full name, its unit last; counters end in ``_total``.
        meaning: One line.
        bounds: Of a histogram, in order.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    bounds: Sequence[float] = ()


@dataclass(slots=True)
class _Histogram:
    counts: list[int]
    total: float = 0.0


@dataclass(slots=True)
class Metrics:
    """Every metric of one process; any thread may add to it.

    Attributes:
        families: What may be counted, in the order in which it is written.
    """

    families: Sequence[Family]
    _values: dict[tuple[str, Labels], float] = field(default_factory=dict)
    _histograms: dict[tuple[str, Labels], _Histogram] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Raises a counter."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        with self._lock:
            self._values[name, tuple(sorted(labels.items()))] = value

    def observe(self, name: str, values: Sequence[float], **labels: str) -> None:
        """Puts values into a histogram."""
        key = (name, tuple(sorted(labels.items())))
        bounds = self._family(name).bounds
        with self._lock:
            histogram = self._histograms.get(key)
            if histogram is None:
                histogram = self._histograms[key] = _Histogram([0] * (len(bounds) + 1))
            for value in values:
                histogram.counts[bisect_left(bounds, value)] += 1
                histogram.total += value

    def value(self, name: str, **labels: str) -> float:
        """A counter or gauge; 0 before it was touched."""
        return self._values.get((name, tuple(sorted(labels.items()))), 0.0)

    def text(self) -> str:
        """Everything in the text format, version 0.0.4; the content type is ``text/plain; version=0.0.4``."""
        with self._lock:
            lines = []
            for family in self.families:
                lines += [f"# HELP {family.name} {family.meaning}", f"# TYPE {family.name} {family.kind}"]
                lines += self._histogram_lines(family) if family.kind == "histogram" else self._lines(family)
        return "\n".join(lines) + "\n"

    def _family(self, name: str) -> Family:
        return next(family for family in self.families if family.name == name)

    def _lines(self, family: Family) -> list[str]:
        found = sorted((labels, value) for (name, labels), value in self._values.items() if name == family.name)
        return [f"{family.name}{_braces(labels)} {_number(value)}" for labels, value in found]

    def _histogram_lines(self, family: Family) -> list[str]:
        lines = []
        for (name, labels), histogram in sorted(self._histograms.items(), key=lambda item: item[0]):
            if name != family.name:
                continue
            below = 0
            for bound, count in zip((*family.bounds, math.inf), histogram.counts, strict=True):
                below += count
                lines.append(f"{name}_bucket{_braces((*labels, ('le', _number(bound))))} {below}")
            lines += [
                f"{name}_sum{_braces(labels)} {_number(histogram.total)}",
                f"{name}_count{_braces(labels)} {below}",
            ]
        return lines


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))

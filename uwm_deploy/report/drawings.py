"""Pictures of studies as PNG files: one style, one way to make a figure and one to save it.

Needs matplotlib, which is imported when a picture is drawn. No display is needed: a `Figure` on its own draws with Agg.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.records.files import write_output
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.studies import BenchReport, BenchSubject, MethodComparison, SweepReport
from uwm_deploy.report.method_changes import first_measured, zero_shot_change
from uwm_deploy.report.tables.sweep_points import point_label
from uwm_deploy.safeground.tradeoff import gain, mean_recall, pareto, zero_shot_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 130
_MARKS = "os^Dv*Pp"
"""Shapes of points: nothing is told by colour alone."""


def draw_sweep(report: SweepReport, path: Path) -> None:
    """Draws safety gained against what is kept, one line per factor, the Pareto front ringed.

    Kept is the zero-shot mean; strengths of a safety axis hardly change it, so with them it is safe retrieval.

    Raises:
        PrerequisiteError: If matplotlib is not installed.
    """
    strengths = report.points[0].setting is not None
    kept_of = mean_recall if strengths else zero_shot_mean
    base = kept_of(report.original)
    places = [(kept_of(p.safety) - base, gain(report.original, p)) for p in report.points]
    figure = _figure(7.5, 4.8)
    axes = figure.add_subplot()
    _zero_lines(axes)
    for factor in dict.fromkeys(p.factor for p in report.points):
        at = [i for i, p in enumerate(report.points) if p.factor == factor]
        name = "strengths of the axis" if strengths else f"factor {factor:g}"
        axes.plot(*zip(*(places[i] for i in at), strict=True), marker="o", markersize=4, label=name)
        _label_points(axes, [places[i] for i in at], [point_label(report.points[i]) for i in at])
    if not math.isnan(base):
        _ring_front(axes, places, size=90, label="not beaten by any other point")
    if report.picked is not None:
        axes.scatter(*places[report.picked], marker="*", s=160, color="black", label="picked", zorder=3)
    axes.set_xlabel(f"{'safe R@1' if strengths else 'zero-shot mean'}, change in points")
    axes.set_ylabel("GS, change in points")
    about = f"{report.model.name}, {report.method}{', per concept' if report.concepts else ''}"
    labels = "largest loss of R@1" if strengths else "keep_mass"
    axes.set_title(f"{about} on {report.measured_on.name} (n = {report.measured_on.n}); labels: {labels}", fontsize=9)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_comparison(result: MethodComparison, path: Path) -> None:
    """Draws safety gained against knowledge kept, for all inputs and for safe ones alone; what nothing beats is ringed.

    Raises:
        PrerequisiteError: If matplotlib is not installed.
    """
    base = first_measured(result)
    rows = [row for row in result.rows if row.safety is not None]
    kept = [zero_shot_change(base, row) for row in rows]
    known = not any(math.isnan(value) for value in kept)
    xs = kept if known else [0.0] * len(rows)
    figure = _figure(11, 4.8)
    for axes, metric in zip(figure.subplots(1, 2), ("GS", "PS"), strict=True):
        gained = [row.change[metric].delta if row.change else 0.0 for row in rows]
        _zero_lines(axes)
        for i, (x, y, row) in enumerate(zip(xs, gained, rows, strict=True)):
            if row.change:
                interval = [row.change[metric].delta_low, row.change[metric].delta_high]
                axes.plot([x, x], interval, color="0.7", linewidth=1, zorder=1)
            axes.scatter([x], [y], s=36, marker=_MARKS[i % len(_MARKS)], label=row.label, zorder=2)
        _ring_front(axes, list(zip(xs, gained, strict=True)), size=110, zorder=3)
        axes.set_xlabel("zero-shot mean, change in points" if known else "no zero-shot set")
        axes.set_ylabel(f"{metric}, change in points, 95% interval")
    figure.axes[0].legend(fontsize=8, loc="best")
    figure.suptitle(f"{result.model.name} on {result.measured_on} (n = {result.n}); ringed: not beaten in both")
    _save(figure, path)


def draw_bench(report: BenchReport, path: Path) -> None:
    """Draws time per row against the batch, one line per subject, up to the 95th percentile as a bar.

    Raises:
        PrerequisiteError: If matplotlib is not installed.
    """
    figure = _figure(9, 4.2)
    sizes = sorted({row.batch for row in report.warm})
    for axes, tower in zip(figure.subplots(1, len(TowerName)), TowerName, strict=True):
        for subject in report.subjects:
            _latency_line(axes, report, tower, subject)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_yscale("log")
        axes.set_xlabel("batch")
        axes.set_ylabel("ms per row, p50 to p95")
        axes.set_title(f"{report.bundle}, {tower.value} tower")
    figure.axes[-1].legend(fontsize=7)
    figure.text(0.01, 0.005, report.machine["cpu"], fontsize=6, color="0.4")
    _save(figure, path)


def _latency_line(axes: Axes, report: BenchReport, tower: TowerName, subject: BenchSubject) -> None:
    rows = [row for row in report.warm if row.tower is tower and row.subject == subject.name]
    batches = [row.batch for row in rows]
    middle = np.array([row.latency_ms_p50 for row in rows]) / batches
    high = np.array([row.latency_ms_p95 or row.latency_ms_p50 for row in rows]) / batches
    bar = np.stack([np.zeros_like(middle), np.maximum(high - middle, 0)])
    label = subject.name if subject.state in ("proven", "reference") else f"{subject.name} ({subject.state})"
    axes.errorbar(batches, middle, yerr=bar, marker="o", markersize=4, capsize=2, label=label)


def _figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches.

    Raises:
        PrerequisiteError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrerequisiteError("a picture needs matplotlib", fix="pip install 'uwm-deploy[build]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _zero_lines(axes: Axes) -> None:
    """Lines where nothing changed, behind everything."""
    axes.axhline(0, color="0.8", linewidth=1, zorder=0)
    axes.axvline(0, color="0.8", linewidth=1, zorder=0)


def _label_points(axes: Axes, places: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Writes the label beside each point; points at one place share one text."""
    shared: dict[tuple[float, float], list[str]] = {}
    for place, label in zip(places, labels, strict=True):
        shared.setdefault(place, []).append(label)
    for place, names in shared.items():
        axes.annotate(", ".join(names), place, xytext=(4, 4), textcoords="offset points", fontsize=7)


def _ring_front(
    axes: Axes, places: Sequence[tuple[float, float]], *, size: float, label: str | None = None, zorder: float = 1
) -> None:
    """Rings the points that no other point beats in both directions."""
    front = [places[i] for i in pareto(places)]
    xs, ys = [x for x, _ in front], [y for _, y in front]
    axes.scatter(xs, ys, s=size, facecolors="none", edgecolors="0.4", label=label, zorder=zorder)


def _save(figure: Figure, path: Path) -> None:
    """Writes a PNG file, whole or not at all, with the same bytes for the same data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DOTS_PER_INCH, format="png", metadata={"Software": None})
    write_output(path, buffer.getvalue())

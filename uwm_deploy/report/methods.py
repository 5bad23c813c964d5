"""Section of a report page about the field: methods side by side, what each gained, lost and cost."""

from __future__ import annotations

import math

from uwm_deploy.records.metrics import Geometry
from uwm_deploy.records.studies import ComparedMethod, MethodComparison
from uwm_deploy.report import charts
from uwm_deploy.report.blocks import figure, folded, section, table
from uwm_deploy.report.charts import Point, signed
from uwm_deploy.report.intervals import share_text
from uwm_deploy.report.markup import NOTHING, Child, Html
from uwm_deploy.report.method_changes import zero_shot_change
from uwm_deploy.safeground.geometry import NEIGHBOURS, SPREADS
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.safeground.retrieval import HARD, SAFE, UNIONS
from uwm_deploy.safeground.tradeoff import pareto

_RETRIEVAL = (*(f"{name}@1" for name in SAFE), *(name for name in HARD if name.endswith("@10")), *UNIONS)
_CHANGES = ("PS", "PU", "GS")


def compared(report: MethodComparison | None) -> Html | None:
    """Safety gained against knowledge kept, and the numbers; when a comparison was given."""
    if report is None:
        return None
    ran = [row for row in report.rows if row.safety is not None]
    kept, gained = [zero_shot_change(ran[0], row) for row in ran], [_gain(row) for row in ran]
    known = not any(math.isnan(value) for value in kept)
    xs = kept if known else [0.0] * len(ran)
    front = set(pareto(list(zip(xs, gained, strict=True))))
    points = [
        Point(x=x, y=y, label=row.label, series=i, ringed=i in front, chosen=False)
        for i, (row, x, y) in enumerate(zip(ran, xs, gained, strict=True))
    ]
    about = "Each point is one method: safety gained upwards, knowledge kept to the right."
    x_name = "zero-shot mean, change in points" if known else "no zero-shot set"
    drawn = charts.scatter("Methods", about, points, x_name, "GS, change in points")
    legend = (charts.swatch("ring", "not beaten by any other method"),)
    lead = (
        f"{len(ran)} of {len(report.rows)} methods, all made on {report.calibration} and measured on {report.measured_on} "
        f"(n = {report.n}), against {ran[0].label}."
    )
    numbers = folded("SafeGround with 95% intervals, percent", table([_numbers(row) for row in ran]))
    kept_safe = folded(
        "Retrieval in percent; neighbours kept and spread against the first method",
        table([_retrieval(row) for row in ran]),
    )
    costs = folded("What each took", table([_cost(row) for row in ran]))
    picture = figure("Safety gained against knowledge kept", drawn, legend, [_change(ran[0], row) for row in ran])
    return section("methods", "Methods", lead + _absent(report), picture, numbers, kept_safe, costs)


def _absent(report: MethodComparison) -> str:
    absent = [f"{row.label}: {row.reason}" for row in report.rows if row.safety is None]
    return f" Not run: {'; '.join(absent)}." if absent else ""


def _gain(row: ComparedMethod) -> float:
    return row.change["GS"].delta if row.change else 0.0


def _change(first: ComparedMethod, row: ComparedMethod) -> dict[str, Child]:
    found: dict[str, Child] = {"method": row.label}
    for name in _CHANGES:
        f = row.change.get(name)
        found[name] = f"{signed(f.delta)} ({signed(f.delta_low)} to {signed(f.delta_high)})" if f else NOTHING
    kept = zero_shot_change(first, row)
    return {**found, "zero-shot mean": NOTHING if math.isnan(kept) else signed(kept)}


def _numbers(row: ComparedMethod) -> dict[str, Child]:
    assert row.safety is not None
    return {"method": row.label, **{name: share_text(row.safety.preference[name]) for name in METRICS}}


def _retrieval(row: ComparedMethod) -> dict[str, Child]:
    assert row.safety is not None
    shares = {name: row.safety.retrieval.get(name) for name in _RETRIEVAL}
    shape = row.safety.geometry or Geometry(neighbours={}, spread={})
    near = {name: shape.neighbours.get(name) for name in NEIGHBOURS}
    spread = {tower: shape.spread.get(tower) for tower in SPREADS}
    return {
        "method": row.label,
        **{name: f"{p.value:.1f}" if p else NOTHING for name, p in shares.items()},
        **{f"neighbours {name}": f"{e.value:.2f}" if e else NOTHING for name, e in near.items()},
        **{f"spread {tower}": NOTHING if value is None else f"{value:.2f}" for tower, value in spread.items()},
    }


def _cost(row: ComparedMethod) -> dict[str, Child]:
    cost = row.cost
    return {
        "method": row.label,
        "CPU seconds": f"{cost.cpu_seconds:.0f}" if cost else NOTHING,
        "GPU seconds": f"{cost.gpu_seconds:.0f}" if cost and cost.gpu_seconds else NOTHING,
        "memory, MiB": str(cost.peak_rss_bytes >> 20) if cost else NOTHING,
        "trained parameters": str(cost.trainable_parameters) if cost else NOTHING,
        "quadruples seen": str(cost.data_seen) if cost else NOTHING,
        "includes": (cost.includes if cost else "") or NOTHING,
    }

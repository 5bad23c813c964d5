"""The section of a report page about speed."""

from __future__ import annotations

from collections.abc import Mapping

from uwm_deploy.records.studies import BenchReport, Latency
from uwm_deploy.report import charts
from uwm_deploy.report.blocks import figure, section
from uwm_deploy.report.charts import Bar, Group
from uwm_deploy.report.markup import NOTHING, TIMES, Child, Html, coded, tag


def latency(report: BenchReport | None) -> Html:
    """Warm calls of every variant, and its cold start; says so when nothing was measured."""
    if report is None:
        how = coded("Not measured: `uwm-deploy bench BUNDLE --json` measures it, `--bench` puts it here.")
        return section("latency", "Latency", how)
    states = {subject.name: subject.state for subject in report.subjects}
    cold = {(c.subject, c.tower): c.open_ms + c.first_call_ms for c in report.cold}
    cells = list(dict.fromkeys((row.tower, row.batch) for row in report.warm))
    groups = [
        Group(
            head=f"{tower.value} {TIMES} {batch}",
            note="rows per call",
            bars=[_bar(row, states) for row in report.warm if (row.tower, row.batch) == (tower, batch)],
        )
        for tower, batch in cells
    ]
    rows: list[dict[str, Child]] = [
        {
            "tower": row.tower.value,
            "batch": str(row.batch),
            "variant": f"{row.subject} ({states[row.subject]})",
            "p50 ms": f"{row.latency_ms_p50:.2f}",
            "p95 ms": _ms(row.latency_ms_p95),
            "p99 ms": _ms(row.latency_ms_p99),
            "rows/s": f"{row.throughput_per_s:.0f}",
            f"against {report.against}": f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})",
            "cold ms": _ms(cold.get((row.subject, row.tower))),
            "calls": str(row.calls),
        }
        for row in report.warm
    ]
    about = "Median time of one call in milliseconds, shorter is faster, by tower and rows per call."
    drawn = charts.bars("Latency", about, groups, max((row.latency_ms_p50 for row in report.warm), default=1.0))
    legend = [
        charts.swatch("bar original", "the model in PyTorch"),
        charts.swatch("bar engine", "variant of the bundle"),
    ]
    where = ", ".join(f"{key} {value}" for key, value in report.machine.items())
    missing = "; ".join(f"{name}: {reason}" for name, reason in report.not_run.items())
    lead = f"Measured {report.created} in turns from one run: {where}."
    more = tag("p", {"class": "note"}, f"Not run: {missing}.") if missing else None
    return section("latency", "Latency", lead, figure("Median time of one call, ms", drawn, legend, rows), more)


def _bar(row: Latency, states: Mapping[str, str]) -> Bar:
    tone: charts.Tone = "original" if states[row.subject] == "reference" else "engine"
    return Bar(label=row.subject, value=row.latency_ms_p50, shown=f"{row.latency_ms_p50:.2f}", tone=tone)


def _ms(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"

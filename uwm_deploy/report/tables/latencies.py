"""How fast the variants of a bundle are: the table, the lines below it, and the numbers in CSV."""

from __future__ import annotations

import csv
import io

from uwm_deploy.records.studies import WARM_ROUNDS, BenchReport, Latency
from uwm_deploy.report.terminal import print_lines, print_rows


def print_bench(report: BenchReport) -> None:
    """The table, the machine, and what was not run."""
    print_rows(latency_rows(report), names=3)
    print_lines(bench_lines(report))


def latency_rows(report: BenchReport) -> list[dict[str, str]]:
    """The table for people: one row per tower, batch and variant."""
    cold = {(row.tower, row.subject): row for row in report.cold}
    states = {subject.name: subject.state for subject in report.subjects}
    smallest = min(row.batch for row in report.warm)

    def started(row: Latency) -> str:
        first = cold[row.tower, row.subject]
        return f"{first.open_ms + first.first_call_ms:.1f}" if row.batch == smallest else ""

    return [
        {
            "tower": row.tower.value,
            "batch": str(row.batch),
            "variant": row.subject,
            "state": states[row.subject],
            "cold ms": started(row),
            "p50 ms": f"{row.latency_ms_p50:.2f}",
            "p95 ms": _known(row.latency_ms_p95),
            "p99 ms": _known(row.latency_ms_p99),
            "rows/s": f"{row.throughput_per_s:.0f}",
            f"/ {report.against}": f"{row.ratio:.2f} ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
            "calls": str(row.calls),
        }
        for row in sorted(report.warm, key=lambda row: (row.tower, row.batch))
    ]


def _known(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def bench_lines(report: BenchReport) -> list[str]:
    """What belongs under the table: the machine, where each ran, and what was not run."""
    lines = [
        f"/ {report.against}: fastest call to its fastest call, median of {WARM_ROUNDS} rounds (lowest-highest); "
        "- too few calls"
    ]
    lines += [f"{key}: {value}" for key, value in report.machine.items()]
    for when, values in (("before", report.clocks_before), ("after", report.clocks_after)):
        lines.append(f"{when}: {', '.join(f'{key} {value}' for key, value in values.items())}")
    for subject in report.subjects:
        lines.append(f"{subject.name}: {', '.join(f'{key} {value}' for key, value in subject.where.items())}")
    return lines + [f"{name}: not run: {reason}" for name, reason in report.not_run.items()]


def bench_csv(report: BenchReport) -> str:
    """The numbers, one row per tower, batch and variant; an unknown percentile is empty."""
    cold = {(row.tower, row.subject): row for row in report.cold}
    subjects = {subject.name: subject for subject in report.subjects}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = [name for name in Latency.__dataclass_fields__ if name not in ("subject", "tower")]
    writer.writerow(["variant", "state", "precision", "tower", *columns, "against", "cold_open_ms", "cold_first_ms"])
    for row in report.warm:
        subject, first = subjects[row.subject], cold[row.tower, row.subject]
        values = ["" if (value := getattr(row, name)) is None else value for name in columns]
        who = (row.subject, subject.state, subject.precision.value, row.tower.value)
        writer.writerow([*who, *values, report.against, first.open_ms, first.first_call_ms])
    return stream.getvalue()

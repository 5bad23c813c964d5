"""What a study leaves in its folder: the record in JSON, the tables, and a picture."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.records.adapter import LanguageAdapter
from uwm_deploy.records.codec import write_record
from uwm_deploy.records.downstream import DownstreamReport, report_files
from uwm_deploy.records.files import write_atomic
from uwm_deploy.records.studies import MethodComparison, SweepReport
from uwm_deploy.report.drawings import draw_comparison, draw_sweep
from uwm_deploy.report.tables.compared_methods import markdown_of
from uwm_deploy.report.tables.downstream import downstream_markdown
from uwm_deploy.report.tables.safety_heads import trained_adapter_markdown
from uwm_deploy.report.tables.sweep_points import sweep_csv, sweep_markdown


def write_sweep(report: SweepReport, folder: Path) -> None:
    """Writes `sweep.json`, `sweep.csv`, `sweep.md` and `sweep.png`.

    Raises:
        PrerequisiteError: If matplotlib is not installed.
    """
    write_record(folder / "sweep.json", report)
    (folder / "sweep.csv").write_text(sweep_csv(report), encoding="utf-8")
    (folder / "sweep.md").write_text(sweep_markdown(report), encoding="utf-8")
    draw_sweep(report, folder / "sweep.png")


def write_comparison(result: MethodComparison, folder: Path) -> None:
    """Writes `compare.json`, `compare.md` and `compare.png`.

    Raises:
        PrerequisiteError: If matplotlib is not installed.
    """
    write_record(folder / "compare.json", result)
    (folder / "compare.md").write_text(markdown_of(result), encoding="utf-8")
    draw_comparison(result, folder / "compare.png")


def write_downstream(report: DownstreamReport, folder: Path) -> None:
    """Writes `caption.json` and `caption.md`, or `draw.json` and `draw.md`."""
    record, tables = report_files(report.kind)
    write_record(folder / record, report)
    write_atomic(folder / tables, downstream_markdown(report))


def write_adapter(adapter: LanguageAdapter, folder: Path) -> None:
    """Writes `adapter.md` beside the record of the adapters."""
    (folder / "adapter.md").write_text(trained_adapter_markdown(adapter), encoding="utf-8")

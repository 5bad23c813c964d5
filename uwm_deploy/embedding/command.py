"""What `uwm-deploy embed` does with its options, and what it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from uwm_deploy.console import Reporter
from uwm_deploy.embedding.batch import EmbedBatch, ItemKind
from uwm_deploy.embedding.job import EmbedReport, embed
from uwm_deploy.errors import ExitCode
from uwm_deploy.runtime.results import Kind
from uwm_deploy.runtime.session import Device


def run_embed(
    bundle: Path,
    source: str,
    *,
    out: Path,
    kind: ItemKind,
    dtype: Kind,
    key: str,
    column: str,
    batch: int,
    part_rows: int,
    variant: str | None,
    device: Device,
    as_json: bool,
) -> int:
    """Runs the job and prints its report; see `job.embed`."""
    run = EmbedBatch(bundle, kind=kind, dtype=dtype, variant=variant, device=device)
    reporter = Reporter()
    with reporter.stage("embed", source):
        report = embed(
            run, source, out, key=key, column=column, batch=batch, part_rows=part_rows, progress=reporter.progress
        )
    for line in report.broken_files:
        click.echo(f"broken: {line}", err=True)
    click.echo(json.dumps(dataclasses.asdict(report), indent=1) if as_json else _told(report, out))
    return int(ExitCode.BAD_INPUT if report.broken_files else ExitCode.PASS)


def _told(report: EmbedReport, out: Path) -> str:
    speed = f", {report.rows / report.seconds:.1f} a second" if report.rows else ""
    return (
        f"{report.rows} rows in {report.parts} parts ({report.errors} with an error{speed}), "
        f"{report.finished_before} were there: {out}, by {report.variant} of {report.bundle}"
    )

"""What `uwm-deploy embed` does with its options, and what it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.errors import ExitCode
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.results import Kind
from uwm_deploy.runtime.session import Device
from uwm_deploy.serve.embed.batch import EmbedBatch, ItemKind
from uwm_deploy.serve.embed.job import EmbedReport, embed


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
    public_key: Path | None,
    min_bundle_version: int,
    as_json: bool,
) -> int:
    """Runs the job and prints its report; see `job.embed`."""
    digest = ""
    if public_key is not None or min_bundle_version:
        # Whatever process opens the bundle later must find the manifest that was signed.
        manifest = open_bundle(bundle, public_key=public_key, min_bundle_version=min_bundle_version).manifest
        digest = digest_of_bytes(json_from_record(manifest).encode())
    run = EmbedBatch(bundle, kind=kind, dtype=dtype, variant=variant, device=device, digest=digest)
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
        f"{report.finished_before} were there: {out}, by {report.variant} of {report.bundle}, {report.space}"
    )

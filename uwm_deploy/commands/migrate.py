"""What `uwm-deploy migrate` does with its options, and what it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.errors import InputError
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.console import Reporter
from uwm_deploy.serve.embed.migrate import MigrateReport, migrate, migration_of, open_stored
from uwm_deploy.serve.embed.stored import Stored


def run_migrate(
    stored: Path,
    *,
    bundle: Path,
    out: Path,
    tower: str | None,
    variant: str | None,
    keys: Path | None,
    public_key: Path | None,
    min_bundle_version: int,
    as_json: bool,
) -> int:
    """Migrates and prints the report; see `migrate.migrate`."""
    opened = open_bundle(bundle, public_key=public_key, min_bundle_version=min_bundle_version)
    source = open_stored(stored, keys)
    migration = migration_of(opened, _tower(source, tower), source.space, variant)
    reporter = Reporter()
    with reporter.stage("migrate", str(stored)):
        report = migrate(source, out, migration, progress=reporter.progress)
    click.echo(json.dumps(dataclasses.asdict(report), indent=1) if as_json else _told(report, out))
    return 0


def _tower(stored: Stored, asked: str | None) -> TowerName:
    """Whose embeddings they are: never guessed, since the other tower's map would fit."""
    told = stored.tower or (TowerName(asked) if asked else None)
    if told is None:
        raise InputError(f"{stored.path} does not say whose embeddings it holds", fix="say --tower image or text")
    if asked and asked != told.value:
        raise InputError(f"{stored.path} holds {told.value} embeddings, not {asked}", fix="leave --tower out")
    return told


def _told(report: MigrateReport, out: Path) -> str:
    kept = f" ({report.errors} without an embedding stay as they are)" if report.errors else ""
    speed = f" in {report.seconds:.1f} s" if report.rows else ""
    checked = f"checked {report.checked} items against the bundle's evidence"
    if not report.checked:
        checked = "no key of the evidence is in it: not checked" if report.keyed else "without keys: not checked"
    return "\n".join(
        [
            f"{report.rows} {report.tower} embeddings migrated{kept}{speed}, {report.finished_before} were there: {out}",
            f"from {report.migrated_from}",
            f"to   {report.space}, of {report.variant}",
            checked,
        ]
    )

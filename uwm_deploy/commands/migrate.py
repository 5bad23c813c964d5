"""The command `migrate`: stored embeddings of the unedited model into those of a bundle."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uwm_deploy.commands.fields import PATH, option, takes_options
from uwm_deploy.commands.options import TrustOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.errors import InputError
from uwm_deploy.records.model import TowerName

if TYPE_CHECKING:
    from uwm_deploy.serve.embed.migrate import MigrateReport
    from uwm_deploy.serve.embed.stored import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateOptions:
    """Whose embeddings they are, and whose they are to become."""

    bundle: Path = option("--bundle", required=True, type=PATH, help="Bundle into whose space the embeddings go.")
    out: Path = option("--out", required=True, type=PATH, help="New store, of the same kind as STORED.")
    tower: str | None = option(
        "--tower",
        type=click.Choice(["image", "text"]),
        help="Tower that made the embeddings, where STORED does not say it.",
    )
    variant: str | None = option(
        "--variant", help="Variant that makes the embeddings beside them. [default: a proven one in float32]"
    )
    keys: Path | None = option(
        "--keys",
        type=PATH,
        help="Text file with the key of each row, one per line; those that the bundle's evidence has are compared.",
    )


@click.command()
@click.argument("stored", type=PATH)
@takes_options
@prints
def migrate(stored: Path, asked: MigrateOptions, trust: TrustOptions) -> Shown:
    """Turns stored embeddings into those of a bundle.

    STORED embeddings are of the unedited model; nothing is embedded again. This is for bundles that were built with
    --placement embedding (docs/how-to/migrate.md). STORED is a folder of `embed`, a .npy file, or a flat index of FAISS.
    The same command goes on after it was stopped.

    \b
    Example:
      uwm-deploy migrate embeddings --bundle dist/demo --out safe-embeddings
      uwm-deploy migrate images.npy --tower image --keys images.txt --bundle dist/demo --out safe-images.npy
      uwm-deploy migrate images.index --tower image --bundle dist/demo --out safe-images.index
    """
    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.serve.embed.migrate import migrate as run
    from uwm_deploy.serve.embed.migrate import migration_of, open_stored

    opened = open_bundle(asked.bundle, public_key=trust.public_key, min_bundle_version=trust.min_bundle_version)
    source = open_stored(stored, asked.keys)
    migration = migration_of(opened, _tower(source, asked.tower), source.space, asked.variant)
    reporter = Reporter()
    with reporter.stage("migrate", str(stored)):
        report = run(source, asked.out, migration, progress=reporter.progress)
    return Shown(data=dataclasses.asdict(report), text=_told(report, asked.out))


def _tower(stored: Stored, asked: str | None) -> TowerName:
    """Whose embeddings they are: never guessed, since the other tower's map would fit."""
    told = stored.tower or (TowerName(asked) if asked else None)
    if told is None:
        raise InputError(f"{stored.path} does not say whose embeddings it holds", fix="say --tower image or text")
    if asked and asked != told.value:
        raise InputError(f"{stored.path} holds {told.value} embeddings, not {asked}", fix="leave --tower out")
    return told


def _told(report: MigrateReport, out: Path) -> tuple[str, ...]:
    kept = f" ({report.errors} without an embedding stay as they are)" if report.errors else ""
    speed = f" in {report.seconds:.1f} s" if report.rows else ""
    checked = f"checked {report.checked} items against the bundle's evidence"
    if not report.checked:
        checked = "no key of the evidence is in it: not checked" if report.keyed else "without keys: not checked"
    return (
        f"{report.rows} {report.tower} embeddings migrated{kept}{speed}, {report.finished_before} were there: {out}",
        f"from {report.migrated_from}",
        f"to   {report.space}, of {report.variant}",
        checked,
    )

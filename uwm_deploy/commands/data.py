"""Commands about data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import PATH, flag, option, repeated, takes_options
from uwm_deploy.commands.group import InOrder
from uwm_deploy.commands.names import DATA_SETS
from uwm_deploy.commands.options import PolicyOptions, WorkerOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.errors import ExitCode


@click.group(cls=InOrder)
def data() -> None:
    """Checks a data set, or writes a manifest of pictures.

    \b
    Example:
      uwm-deploy data make pictures --out pictures/pairs.jsonl
      uwm-deploy data check pictures/pairs.jsonl --against demo-test
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """What a set is compared with."""

    against: tuple[str, ...] = repeated(
        "--against", shell_complete=DATA_SETS, help="Set that must share no item with it; repeatable."
    )
    use: str | None = option(
        "--for",
        type=click.Choice(["build"]),
        help="Check it as the evaluation set of a build, and the sets of --against as its calibration sets.",
    )


@data.command("check")
@click.argument("name", shell_complete=DATA_SETS)
@takes_options
@prints
def data_check(name: str, asked: CheckOptions, policy: PolicyOptions, workers: WorkerOptions) -> Shown:
    """Reads every item of a data set, and says what is wrong.

    NAME is a shipped set, a TOML file, or a manifest (.jsonl, .parquet). Exit codes: 0 clean; 2 more broken items, or items
    with the content of another one, than the set allows, an id that occurs twice, or an item that a set of --against has
    too. With --for build also whatever keeps a build from passing --policy, whatever the edit: too few items, no zero-shot
    set, an item that cannot be read, a calibrated concept that no item has.

    \b
    Example:
      uwm-deploy data check visu --against visu-test --workers 8
      uwm-deploy data check pairs.parquet --json
      uwm-deploy data check my-test.toml --for build --policy default --against my-train.toml
    """
    from uwm_deploy.data.check import Checked, check, opened
    from uwm_deploy.data.table import is_manifest, set_of_manifest
    from uwm_deploy.pipeline.foreseen import checked_for_build
    from uwm_deploy.recipes.resolve import calibration_set_of
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.data_sets import print_data_report

    def set_of(text: str, *, zero_shot: bool = False) -> Checked:
        if is_manifest(text):
            return opened(set_of_manifest(Path(text)), base=Path(text).parent)
        spec, _, base = calibration_set_of(text)
        return opened(spec, base=base, zero_shot=zero_shot)

    reporter = Reporter()
    checked, others = set_of(name, zero_shot=asked.use == "build"), [set_of(text) for text in asked.against]
    with reporter.stage("check", name):
        report = check(checked, others, workers=workers.workers, progress=reporter.progress)
        if asked.use == "build":
            report = checked_for_build(
                checked, others, report, policy.policy, workers=workers.workers, progress=reporter.progress
            )
    code = ExitCode.BAD_INPUT if report.problems else ExitCode.PASS
    return Shown(data=report, text=lambda: print_data_report(report), code=code)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestOptions:
    """Where the manifest goes, and what it holds."""

    out: Path = option(
        "--out",
        required=True,
        type=PATH,
        help="Manifest: .jsonl or .parquet; in FOLDER or a folder above it.",
    )
    embed: bool = flag("--embed", help="Put the images into the Parquet file, which may then lie anywhere.")
    drop_unpaired: bool = flag(
        "--drop-unpaired", help="Leave out items without a counterpart, instead of refusing them."
    )
    force: bool = flag("--force", help="Replace the manifest if it is there.")


@data.command("make")
@click.argument("folder", type=PATH)
@takes_options
@prints
def data_make(folder: Path, asked: ManifestOptions) -> Shown:
    """Writes a manifest of the pictures and captions in a folder.

    They are FOLDER/CONCEPT/{safe,unsafe}/NAME.jpg, with captions beside them in NAME.txt. Images alone and captions alone
    will do; without folders for concepts, FOLDER/{safe,unsafe} is one concept.

    \b
    Example:
      uwm-deploy data make pictures --out pictures/pairs.jsonl
      uwm-deploy data make pictures --out pairs.parquet --embed
    """
    from uwm_deploy.data.make import make_manifest
    from uwm_deploy.report.tables.data_sets import print_made_manifest

    made = make_manifest(folder, asked.out, embed=asked.embed, drop_unpaired=asked.drop_unpaired, force=asked.force)
    return Shown(data=made, text=lambda: print_made_manifest(made, asked.out))

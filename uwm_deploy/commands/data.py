"""Commands about data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import FOLDER, PATH, flag, option, repeated, takes_options
from uwm_deploy.commands.group import InOrder
from uwm_deploy.commands.names import DATA_SETS
from uwm_deploy.commands.options import PolicyOptions, WorkerOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.errors import ExitCode, InputError


@click.group(cls=InOrder)
def data() -> None:
    """Makes a data set of your own, or checks one.

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
        help="Manifest: .jsonl or .parquet; in SOURCE or a folder above it.",
    )
    unsafe: Path | None = option("--unsafe", type=FOLDER, help="Folder of the unsafe files; SOURCE has the safe ones.")
    columns: tuple[str, ...] = repeated(
        "--column", metavar="KEY=NAME", help="A table's column NAME is KEY; repeatable."
    )
    embed: bool = flag("--embed", help="Put the images into the Parquet file, which may then lie anywhere.")
    drop_unpaired: bool = flag(
        "--drop-unpaired", help="Leave out items without a counterpart, instead of refusing them."
    )
    force: bool = flag("--force", help="Replace the manifest if it is there.")


@data.command("make")
@click.argument("source", type=PATH)
@takes_options
@prints
def data_make(source: Path, asked: ManifestOptions) -> Shown:
    """Writes a manifest from folders, a table, or shards.

    \b
    SOURCE is one of these:
      a folder     SOURCE/{safe,unsafe}/NAME.jpg, with captions in NAME.txt;
                   or SOURCE/CONCEPT/{safe,unsafe}, one folder per concept
      two folders  SOURCE holds the safe files, --unsafe the others
      a table      CSV, TSV, JSON, JSON Lines, Parquet or Arrow
      a data set   a folder that Hugging Face save_to_disk wrote
      WebDataset   a .tar file, or a folder of them

    Pictures alone and captions alone will do. Columns are called id, concept, safe_image, unsafe_image, safe_text and
    unsafe_text; --column gives another name.

    \b
    Example:
      uwm-deploy data make pictures --out pictures/pairs.jsonl
      uwm-deploy data make calm --unsafe wild --out pairs.parquet --embed
      uwm-deploy data make pairs.csv --column safe_text=caption --out pairs.jsonl
    """
    from uwm_deploy.data.gather import gather_manifest, is_other_form
    from uwm_deploy.data.make import make_manifest
    from uwm_deploy.report.tables.data_sets import print_made_manifest

    if is_other_form(source):
        if asked.unsafe is not None:
            raise InputError("--unsafe is for two folders of files", fix="leave it out")
        columns = _columns(asked.columns)
        made = gather_manifest(
            source,
            asked.out,
            columns=columns,
            embed=asked.embed,
            drop_unpaired=asked.drop_unpaired,
            force=asked.force,
        )
    else:
        if asked.columns:
            raise InputError("--column is for tables", fix="leave it out, or pass a table")
        made = make_manifest(
            source,
            asked.out,
            unsafe=asked.unsafe,
            embed=asked.embed,
            drop_unpaired=asked.drop_unpaired,
            force=asked.force,
        )
    return Shown(data=made, text=lambda: print_made_manifest(made, asked.out))


def _columns(asked: tuple[str, ...]) -> dict[str, str]:
    """What `--column` says, by key.

    Raises:
        InputError: If a key is unknown or given twice.
    """
    from uwm_deploy.data.gather import KEYS

    found: dict[str, str] = {}
    for text in asked:
        key, _, name = text.partition("=")
        if key not in KEYS or not name or key in found:
            raise InputError(f"--column {text}", fix=f"write KEY=NAME once, with one of {', '.join(KEYS)}")
        found[key] = name
    return found

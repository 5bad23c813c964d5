"""The command `embed`: images or texts into embeddings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from uwm_deploy.commands.fields import PATH, option, takes_options
from uwm_deploy.commands.options import TrustOptions
from uwm_deploy.commands.printed import print_text
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.errors import ExitCode

if TYPE_CHECKING:
    from uwm_deploy.runtime.image import Decode
    from uwm_deploy.runtime.results import Kind
    from uwm_deploy.runtime.session import Device
    from uwm_deploy.serve.embed.batch import ItemKind
    from uwm_deploy.serve.embed.job import EmbedReport


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """What the source holds, and how and where it is embedded."""

    out: Path = option(
        "--out",
        required=True,
        type=click.Path(path_type=Path, file_okay=False, readable=False),
        help="Folder of Parquet parts.",
    )
    kind: str = option("--kind", default="images", type=click.Choice(["images", "texts"]), help="What SOURCE holds.")
    dtype: str = option(
        "--dtype", default="float32", type=click.Choice(["float32", "float16"]), help="Type of the embeddings."
    )
    key: str = option("--key", default="key", help="Column of a table with the items' keys.")
    column: str = option(
        "--column", default="", help="Column of a table with images or texts. [default: image or text]"
    )
    batch: int = option("--batch", default=256, type=click.IntRange(1, 65536), help="Items at a time.")
    part_rows: int = option(
        "--part-rows",
        default=8192,
        type=click.IntRange(1, 1 << 20),
        help="Rows per part; a killed run loses at most these.",
    )
    variant: str | None = option("--variant", help="Variant to embed with. [default: the best one for this machine]")
    device: str = option(
        "--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Device that it must run on."
    )
    decode: str = option(
        "--decode",
        default="full",
        type=click.Choice(["full", "scaled"]),
        help="Scaled decodes large JPEGs at a reduced size, where the bundle proves it.",
    )


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("source")
@takes_options
@prints
def embed(bundle: Path, source: str, asked: EmbedOptions, trust: TrustOptions) -> Shown:
    """Embeds images or texts with a bundle.

    Embeddings go into Parquet parts; the same command goes on after it was stopped. SOURCE is a folder, WebDataset shards
    (a .tar, wildcards or a brace range), or a .parquet or .jsonl table. Broken items are rows with an error. Exit codes: 2
    when a whole shard or table is broken, files of items are missing (they get no row, so the same command tries them
    again), or every row has an error; the other rows are still embedded. 6 when this machine cannot read something.

    \b
    Example:
      uwm-deploy embed dist/demo pictures --out embeddings
      uwm-deploy embed dist/demo 'shards/{00000..00099}.tar' --out embeddings --dtype float16
      uwm-deploy embed dist/demo captions.parquet --kind texts --key id --column caption --out captions
    """
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.serve.embed.batch import EmbedBatch
    from uwm_deploy.serve.embed.job import embed as run

    batch = EmbedBatch(
        bundle,
        kind=cast("ItemKind", asked.kind),
        dtype=cast("Kind", asked.dtype),
        variant=asked.variant,
        device=cast("Device", asked.device),
        digest=_signed_digest(bundle, trust),
        decode=cast("Decode", asked.decode),
    )
    reporter = Reporter()
    with reporter.stage("embed", source):
        report = run(
            batch,
            source,
            asked.out,
            key=asked.key,
            column=asked.column,
            batch=asked.batch,
            part_rows=asked.part_rows,
            progress=reporter.progress,
        )
    for line in report.broken_files:
        print_text(f"broken: {line}", err=True)
    for line in report.missing_named:
        print_text(f"missing: {line}", err=True)
    code = ExitCode.PASS if report.whole else ExitCode.BAD_INPUT
    return Shown(data=dataclasses.asdict(report), text=_told(report, asked.out), code=code)


def _signed_digest(bundle: Path, trust: TrustOptions) -> str:
    """Digest of the manifest that was signed, which every process that opens the bundle later must find; or empty."""
    if trust.public_key is None and not trust.min_bundle_version:
        return ""
    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.records.files import digest_of_bytes

    opened = open_bundle(bundle, public_key=trust.public_key, min_bundle_version=trust.min_bundle_version)
    return digest_of_bytes(json_from_record(opened.manifest).encode())


def _told(report: EmbedReport, out: Path) -> str:
    speed = f", {report.rows / report.seconds:.1f} a second" if report.rows else ""
    missing = f"{report.missing} without their file have no row yet, " if report.missing else ""
    return (
        f"{report.rows} rows in {report.parts} parts ({report.errors} with an error{speed}), "
        f"{missing}{report.finished_before} were there: {out}, by {report.variant} of {report.bundle}, {report.space}"
    )

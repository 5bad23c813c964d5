"""The command `bench`: how fast the variants of a bundle are here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uwm_deploy.commands.fields import PATH, option, repeated, takes_options
from uwm_deploy.commands.options import TrustOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.errors import UwmError

if TYPE_CHECKING:
    from uwm_deploy.bundle.open import Bundle
    from uwm_deploy.studies.bench import Contender


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingOptions:
    """What is measured, for how long, beside what."""

    variants: tuple[str, ...] = repeated("--variant", help="Variant to measure; repeatable. [default: all]")
    batches: tuple[int, ...] = repeated(
        "--batch",
        type=click.IntRange(min=1),
        help="Rows per call; repeatable. [default: smallest, best and largest of the profile]",
    )
    seconds: float = option(
        "--seconds",
        default=2.0,
        type=click.FloatRange(0, 3600, min_open=True),
        help="Seconds to measure each variant, tower and batch.",
    )
    reference: str = option(
        "--torch",
        default="auto",
        metavar="auto|none|MODEL",
        help="Reference in PyTorch float32: the bundle's own model if its weights are here, none, or a recipe or folder.",
    )
    threads: int = option(
        "--threads",
        default=0,
        type=click.IntRange(min=0),
        help="CPU threads of every variant and of PyTorch. [default: each one's own choice, which the result shows]",
    )
    table: Path | None = option("--csv", type=PATH, help="Write the numbers here as CSV.")
    picture: Path | None = option("--picture", type=PATH, help="Write a picture here (PNG).")


@click.command()
@click.argument("bundle", type=PATH)
@takes_options
@prints
def bench(bundle: Path, asked: TimingOptions, trust: TrustOptions) -> Shown:
    """Measures the speed of every variant of a bundle.

    Latency and throughput are measured cold and warm, in turns, of every variant of BUNDLE that this machine can execute.
    Variants without proof are measured and labelled; what cannot run is "not run". The exit code is 6 when nothing can.

    \b
    Example:
      uwm-deploy bench dist/demo
      uwm-deploy bench dist/demo --variant onnxruntime-int8 --batch 1 --batch 32 --csv bench.csv --picture bench.png
    """
    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.records.files import write_output
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.drawings import draw_bench
    from uwm_deploy.report.tables.latencies import bench_csv, print_bench
    from uwm_deploy.studies import bench as study

    opened = open_bundle(
        bundle, allow_failed=True, public_key=trust.public_key, min_bundle_version=trust.min_bundle_version
    )
    contenders, not_run = _contenders(opened, asked)
    reporter = Reporter()
    with reporter.stage("bench", str(bundle)):
        found = study.bench(
            opened, contenders, not_run, batches=asked.batches, seconds=asked.seconds, progress=reporter.progress
        )
    if asked.table is not None:
        write_output(asked.table, bench_csv(found))
    if asked.picture is not None:
        draw_bench(found, asked.picture)

    return Shown(data=found, text=lambda: print_bench(found))


def _contenders(bundle: Bundle, asked: TimingOptions) -> tuple[list[Contender], dict[str, str]]:
    """What is measured, and what is not with the reason; PyTorch first, if it is asked for or can be had."""
    from uwm_deploy.studies.bench import contenders_of

    contenders, not_run = contenders_of(bundle, asked.variants, asked.threads)
    if asked.reference == "none":
        return contenders, not_run
    from uwm_deploy.studies.bench_torch import NAME, torch_contender

    try:
        reference = torch_contender(bundle, None if asked.reference == "auto" else asked.reference, asked.threads)
    except UwmError as error:
        if asked.reference != "auto":
            raise
        return contenders, not_run | {NAME: error.what}
    return [reference, *contenders], not_run

"""Commands that write what is shipped, or write it anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from uwm_deploy.commands.fields import FOLDER, PATH, filled, flag, option, repeated, takes_options
from uwm_deploy.commands.options import (
    BundleEvaluationOptions,
    DeviceOptions,
    PolicyOptions,
    SigningOptions,
    StrengthOptions,
    WorkerOptions,
)
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.until import UntilPackage, run_until
from uwm_deploy.commands.verdicts import exit_code_of, resigning

if TYPE_CHECKING:
    from uwm_deploy.towers.formats import LibraryLayout


@click.command()
@takes_options
@prints
def package(asked: UntilPackage) -> Shown:
    """Writes the bundle, as `build` does.

    \b
    Example:
      uwm-deploy package --model demo --out dist/demo
    """
    return run_until("package", asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyOptions:
    """Whose signature it becomes."""

    key: Path = option("--key", required=True, type=PATH, help="Private key in PEM, on a NIST curve.")
    password: Path | None = option("--password-file", type=PATH, help="File with the key's password.")


@click.command()
@click.argument("bundle", type=PATH)
@takes_options
@prints
def sign(bundle: Path, signer: KeyOptions) -> Shown:
    """Signs a bundle that is whole and passes.

    It writes model.sig into BUNDLE, in the OpenSSF model-signing format.

    \b
    Example:
      openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem
      openssl pkey -in key.pem -pubout -out key.pub
      uwm-deploy sign dist/demo --key key.pem
    """
    from uwm_deploy.bundle.sign import sign_bundle
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.plain import plain_lines

    found = plain_from_record(sign_bundle(bundle, signer.key, password=signer.password))
    return Shown(data=found, text=plain_lines(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitOptions:
    """Which other edit a bundle gets, and where it goes."""

    patch: Path | None = option(
        "--patch",
        type=PATH,
        help="Another edit of the same source model: a patch file with its edit.json beside it, a run folder or a bundle.",
    )
    revert: bool = flag("--revert", help="Back to the source model's weights; such a bundle never passes.")
    keep_mass: float | None = option(
        "--keep-mass",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Another selection from the scores in the run folder, both towers.",
    )
    strength: StrengthOptions
    out: Path | None = option("--out", type=PATH, help="New bundle. [default: in place of BUNDLE]")
    variants: tuple[str, ...] = repeated(
        "--variant",
        help="Variant to refit; repeatable, the others are left out. [default: all that can be refitted here]",
    )
    work: Path | None = option(
        "--work",
        type=PATH,
        help="Run folder with scores and sums, for another keep-mass or strength. [default: .uwm/MODEL]",
    )
    checkpoint: Path | None = option(
        "--checkpoint", type=FOLDER, help="Folder with the source weights. [default: the recipe's]"
    )
    bundle_version: int | None = option(
        "--bundle-version",
        type=click.IntRange(min=0),
        help="Release counter of the new bundle. [default: BUNDLE's]",
    )


@click.command()
@click.argument("bundle", type=PATH)
@takes_options
@prints
def refit(
    bundle: Path,
    asked: RefitOptions,
    policy: PolicyOptions,
    measured_on: BundleEvaluationOptions,
    device: DeviceOptions,
    workers: WorkerOptions,
    signing: SigningOptions,
) -> Shown:
    """Replaces the edit of a bundle without a new build.

    The edit of BUNDLE is replaced in its graphs and engines, which are measured and judged anew. A signed bundle is
    replaced only with --key, which signs the new one, or with --unsigned.

    \b
    Example:
      uwm-deploy refit dist/demo --max-retrieval-loss 2 --out dist/demo-mild --key key.pem
      uwm-deploy refit dist/demo-mild --patch dist/demo
      uwm-deploy refit dist/demo --revert --out dist/demo-original
    """
    from uwm_deploy.pipeline.refit import refit as run_refit
    from uwm_deploy.pipeline.refitting import RefitRequest
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.report.tables.refitted import print_refitted

    records = (asked, policy, measured_on, device, workers)
    made = run_refit(filled(RefitRequest, *records, bundle=bundle, signing=resigning(signing)), Reporter())
    return Shown(
        data={**plain_from_record(made), "out": str(made.out)},
        text=lambda: print_refitted(made),
        code=exit_code_of(made.verdict),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """For which library, and where."""

    layout: str = option(
        "--as",
        required=True,
        type=click.Choice(["transformers", "open-clip", "sentence-transformers", "diffusers-text-encoder"]),
        help="Library that will load it.",
    )
    out: Path = option("--out", required=True, type=PATH, help="Folder for the result.")


@click.command()
@click.argument("run", type=PATH)
@takes_options
@prints
def save(run: Path, asked: SaveOptions) -> Shown:
    """Saves an edited model for another library.

    The model is that of a RUN folder. Its weights are checked to be the edited ones first.

    \b
    Example:
      uwm-deploy save .uwm/demo --as open-clip --out demo-open-clip
    """
    from uwm_deploy.pipeline.save import save_as
    from uwm_deploy.records.codec import plain_from_record
    from uwm_deploy.report.plain import plain_lines

    found = plain_from_record(save_as(run, cast("LibraryLayout", asked.layout), asked.out))
    return Shown(data=found, text=plain_lines(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapOptions:
    """Which tower goes into which checkpoint."""

    model: Path = option("--model", required=True, type=PATH, help="Edited model: `edit/model` of a run folder.")
    into: Path = option("--into", required=True, type=PATH, help="LLaVA checkpoint folder; only read.")
    out: Path = option("--out", required=True, type=PATH, help="New folder for the whole checkpoint.")


@click.command()
@takes_options
@prints
def swap(asked: SwapOptions) -> Shown:
    """Puts an edited vision tower back into LLaVA.

    The tower goes into its LLaVA checkpoint; all other tensors stay bit-equal.

    \b
    Example:
      uwm-deploy swap --model .uwm/llava-1.5-7b/edit/model --into llava-1.5-7b-hf --out llava-1.5-7b-safe
    """
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.towers.llava import swap_vision_tower

    reporter = Reporter()
    with reporter.stage("swap", str(asked.out)):
        changed = swap_vision_tower(asked.model, asked.into, asked.out, reporter.progress)
    return Shown(
        data={"out": str(asked.out), "changed_tensors": changed},
        text=f"{asked.out}: {changed} tensors of the vision tower changed, everything else is as it was",
    )

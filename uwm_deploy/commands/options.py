"""Options that several commands have: a frozen record per group, whose fields say what is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import FILE, FOLDER, PATH, flag, option, repeated
from uwm_deploy.commands.names import DATA_SETS, POLICIES, RECIPES
from uwm_deploy.errors import UwmError
from uwm_deploy.records.edit import Method, Selection
from uwm_deploy.records.graph import Precision, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting


def _axis(_: click.Context, __: click.Parameter, value: str | None) -> AxisSetting | None:
    if value is None:
        return None
    from uwm_deploy.edits.methods import axis_from_text

    try:
        return axis_from_text(value)
    except UwmError as error:
        raise click.BadParameter(str(error)) from error


def _batch_pairs(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None or value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of pairs")
    return int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model."""

    model: str = option(
        "--model", default="demo", shell_complete=RECIPES, help="Recipe name, recipe file or checkpoint folder."
    )
    checkpoint: Path | None = option(
        "--checkpoint", type=PATH, help="Folder with the recipe's weights, instead of the hub."
    )
    revision: str | None = option("--revision", help="Commit of the recipe's hub repository. [default: the recipe's]")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsOptions:
    """Which weights of the model a build starts from."""

    original: Path | None = option(
        "--original",
        type=FOLDER,
        help="For the method trained: folder with the weights that the model was trained from. [default: what its "
        "training record or recipe names]",
    )
    weights: str = option(
        "--weights",
        default="checkpoint",
        type=click.Choice(["checkpoint", "random"]),
        help="`random`: seeded weights for dry runs; never passes the gate.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Which set edits are made from."""

    calibration: str | None = option(
        "--calibration", shell_complete=DATA_SETS, help="Calibration set: name or TOML file. [default: the recipe's]"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """Which set the result is measured on."""

    evaluation: str | None = option(
        "--evaluation", shell_complete=DATA_SETS, help="Evaluation set: name or TOML file. [default: the recipe's]"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleEvaluationOptions:
    """Which set a bundle is measured on again."""

    evaluation: str | None = option(
        "--evaluation", shell_complete=DATA_SETS, help="Evaluation set: name or TOML file. [default: the bundle's]"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShotDataOptions:
    """Where the zero-shot sets are."""

    data: Path | None = option(
        "--data", type=FOLDER, help="Folder of the zero-shot sets. [default: $UWM_DEPLOY_DATA/zero-shot]"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """How the model is edited."""

    method: str | None = option(
        "--method",
        metavar="METHOD[+METHOD]",
        help=f"How the model is edited (docs/background/methods.md): {', '.join(Method)}; or two steps, such as "
        "uwm+safety-axis. A method that is not the recipe's has its own settings. [default: the recipe's]",
    )
    per_concept: bool = flag(
        "--per-concept", help="Score each concept of the calibration set by itself, and unite the selections."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerOptions:
    """Which towers are edited."""

    towers: tuple[str, ...] = repeated(
        "--tower",
        type=click.Choice([tower.value for tower in TowerName]),
        help="Edit this tower only; a set of texts alone, or of images alone, needs it; repeatable. [default: the recipe's]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOptions:
    """How entries are selected by their scores."""

    selection: str | None = option(
        "--selection",
        type=click.Choice([selection.value for selection in Selection]),
        help="Select the top of the score mass, or the top share of the entries. [default: the recipe's or the method's]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryOptions:
    """Which entries of the weights change, and where a closed-form step goes."""

    keep_mass: float | None = option(
        "--keep-mass",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Share of each layer's score mass (hard selection: of its entries) left as it is, both towers. "
        "[default: the recipe's or the method's]",
    )
    factor: float | None = option(
        "--factor", type=float, help="Multiplier of selected entries. [default: the recipe's or the method's]"
    )
    placement: str | None = option(
        "--placement",
        type=click.Choice(["auto", "weights", "embedding"]),
        help="Where a closed-form step goes: into the last linear maps, or as a map behind the embeddings. "
        "[default: the recipe's, else weights where the family can]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StrengthOptions:
    """How strong a safety axis is."""

    max_retrieval_loss: float | None = option(
        "--max-retrieval-loss",
        type=click.FloatRange(0, 100),
        metavar="POINTS",
        help="Most points of safe retrieval (R@1) that the chosen strength may lose. [default: the recipe's, else 4]",
    )
    axis: AxisSetting | None = option(
        "--axis",
        callback=_axis,
        metavar="SETTING",
        help="Use this strength of the safety axis instead of choosing one, e.g. g=0.7,o=0.5,kappa=0.4,a=1,tau=0.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """Whether the image graph gets a safety head."""

    safety_head: Path | None = option(
        "--safety-head",
        type=PATH,
        help="Folder that `train safety-head` wrote: a head in the image graph (docs/how-to/safety-head.md).",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """What is compiled, and how precisely it computes."""

    targets: tuple[str, ...] = repeated(
        "--target",
        type=click.Choice([target.value for target in Target]),
        help="What to compile for; repeatable. [default: the recipe's]",
    )
    precisions: tuple[str, ...] = repeated(
        "--precision",
        type=click.Choice([precision.value for precision in Precision]),
        help="Precision (docs/how-to/precision.md); repeatable, each is a variant of each target. [default: the recipe's]",
    )
    budget: str | None = option(
        "--budget",
        metavar="flips=N%",
        help="For precision auto: share of decisions that may differ. [default: the recipe's, 0.5%]",
    )
    float32: tuple[str, ...] = repeated(
        "--keep-float32",
        metavar="PATTERN",
        help="Layers, nodes or operators that stay in float32 in every precision, as a glob; repeatable.",
    )
    refittable: bool = flag(
        "--refittable", help="Build TensorRT engines that `refit` can put another edit into; the build needs the GPU."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """Which policy judges."""

    policy: str = option("--policy", default="default", shell_complete=POLICIES, help="Policy: name or TOML file.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DownstreamOptions:
    """What came out behind the edited towers."""

    downstream: tuple[Path, ...] = repeated(
        "--downstream",
        type=FILE,
        help="A caption.json or draw.json of this very edit, for the policy's [[downstream]] limits; repeatable.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """Where PyTorch computes."""

    device: str = option("--device", default="auto", help="Where PyTorch runs: auto, cpu or cuda.")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How many processes read the data."""

    workers: int = option("--workers", default=2, type=click.IntRange(0, 64), help="Decoding processes.")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOptions:
    """Where a build keeps what its stages made."""

    work: Path | None = option("--work", type=PATH, help="Run folder, reused by the next run. [default: .uwm/MODEL]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOptions:
    """How the passes over the calibration set compute."""

    batch_pairs: int | None = option(
        "--batch-pairs",
        callback=_batch_pairs,
        metavar="auto|N",
        help="Pairs per forward pass while scoring; auto takes what memory holds. [default: auto]",
    )
    score_dtype: str = option(
        "--score-dtype",
        default="fp32",
        type=click.Choice(["fp32", "bf16"]),
        help="Precision of the forward passes while scoring; with bf16 masks may differ, and the difference is printed.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustOptions:
    """Whose signature a bundle must have, and how old it may be."""

    public_key: Path | None = option("--public-key", type=PATH, help="Key in PEM that must have signed the bundle.")
    min_bundle_version: int = option(
        "--min-bundle-version",
        default=0,
        type=click.IntRange(min=0),
        help="Refuse a bundle of an older version (docs/reference/bundle.md).",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningOptions:
    """What becomes of the signature of a bundle that is written anew."""

    key: Path | None = option("--key", type=PATH, help="Private key in PEM: sign what is written, if it passes.")
    password: Path | None = option("--password-file", type=PATH, help="File with the key's password.")
    public_key: Path | None = option(
        "--public-key",
        type=PATH,
        help="Key in PEM that must have signed the bundle before. [default: that of --key, if it is signed]",
    )
    unsigned: bool = flag("--unsigned", help="Let a signed bundle become an unsigned one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Files and lines for CI systems, beside the table."""

    junit: Path | None = option("--junit", type=FILE, help="Write JUnit XML: one case per check.")
    markdown: Path | None = option("--markdown", type=FILE, help="Write Markdown for a pull request.")
    sarif: Path | None = option("--sarif", type=FILE, help="Write SARIF 2.1.0.")
    in_toto: Path | None = option("--in-toto", type=FILE, help="Write an in-toto statement per measured check.")
    oscal: Path | None = option("--oscal", type=FILE, help="Write OSCAL assessment results.")
    gitlab: Path | None = option(
        "--gitlab",
        type=click.Path(path_type=Path, file_okay=False, readable=False),
        help="Write GitLab's code quality and metrics reports to this folder.",
    )
    github: bool = flag(
        "--github", help="Print annotations for GitHub Actions, and write its step summary and outputs."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkdownOptions:
    """How the table is printed."""

    markdown: bool = flag("--markdown", help="Print the table in Markdown.")

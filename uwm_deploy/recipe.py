"""TOML files to records, strictly: recipes (`export/`), data sets (`calibration/`) and policies (`ci/`).

An unknown key is an error that names the nearest valid one. There is no inheritance between files.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from uwm_deploy.codec import record_from_plain
from uwm_deploy.errors import IntegrityError, RecipeError
from uwm_deploy.records import Pairing, Profile, Rule, Target

FORMAT = 1
"""Version of the TOML formats."""

R = TypeVar("R")


Family = Literal["hf-clip", "siglip", "open-clip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes of the towers, enough to make the model with random weights and without its checkpoint.

    Attributes:
        open_clip: Name of one of open_clip's own configurations; then the tables below only change it.
        text: Entries of the text tower's configuration in the family's own names.
        image: The same for the image tower.
        projection_dim: Size of the shared embedding space, where it is not part of the tables.
    """

    open_clip: str = ""
    text: Mapping[str, int | float | str] = field(default_factory=dict)
    image: Mapping[str, int | float | str] = field(default_factory=dict)
    projection_dim: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where the checkpoint comes from.

    Attributes:
        family: Tower adapter.
        repo: ``"shipped:<folder>"``, a Hugging Face id, or a local folder.
        revision: Hub commit; needed for a hub id so that a build can be repeated.
        licence: SPDX name or a short statement, shown by `uwm-deploy models`.
        parameters: Approximate number, shown by `uwm-deploy models`.
        architecture: What `--weights random` builds when the checkpoint is not at hand.
    """

    family: Family
    repo: str
    revision: str = ""
    licence: str = "unknown"
    parameters: str = ""
    architecture: Architecture | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSpec:
    """What is edited in one tower.

    Attributes:
        rule: How scores are formed (method.md section 2).
        layers: Glob patterns over module paths; one that matches nothing is an error.
        keep_mass: Share of each layer's score mass that is left as it is, between 0 and 1.
        factor: Multiplier of the selected entries; -1 negates.
        pairing: Mean of ratios (the official code) or ratio of means (the paper's wording).
    """

    rule: Rule
    layers: tuple[str, ...]
    keep_mass: float
    factor: float = -1.0
    pairing: Pairing = Pairing.MEAN_OF_RATIOS


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSpecs:
    """One EditSpec per tower."""

    text: EditSpec
    image: EditSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Which sets are used, by the name of their file in `calibration/` (without `.toml`).

    Attributes:
        calibration: Scores come from it.
        evaluation: SafeGround is measured on it; it must not overlap the other.
    """

    calibration: str
    evaluation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """How the ONNX graphs are made.

    Attributes:
        opset: ONNX operator set.
        normalise: Whether the graph ends with L2 normalisation.
        ids_dtype: Element type of the text graph's `input_ids`.
    """

    opset: int = 20
    normalise: bool = True
    ids_dtype: Literal["int64", "int32"] = "int64"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileSpec:
    """What is compiled, and for which batches."""

    targets: tuple[Target, ...]
    precision: Literal["fp32"] = "fp32"
    batch: Profile = Profile(min=1, opt=8, max=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One file of `export/`: everything about a build that varies with the model."""

    format: int
    name: str
    model: ModelSource
    edit: EditSpecs
    data: DataSpec
    export: ExportSpec
    compile: CompileSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """One file of `calibration/`: which quadruples, never their content.

    Attributes:
        source: ``"demo"`` (the drawn world) or ``"manifest"`` (JSON Lines, see docs/data.md).
        split: Split of the source.
        manifest: Path of the manifest, for that source; relative to the TOML file.
        limit: Largest number of quadruples; 0 takes all.
        seed: Seed of the sample when `limit` is smaller than the set.
        max_broken_share: Share of items that may be unreadable before it is an error.
        zero_shot: Zero-shot sets of the source measured along with it.
    """

    format: int
    name: str
    source: Literal["demo", "manifest"]
    split: str = ""
    manifest: str = ""
    limit: int = 0
    seed: int = 0
    max_broken_share: float = 0.01
    zero_shot: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit of a policy.

    Attributes:
        metric: What is compared; docs/policy.md lists the names.
        at_least: Smallest value that passes.
        at_most: Largest value that passes.
        min_n: Fewest items that can support the comparison; with fewer the check is inconclusive.
        reason: Why the limit is what it is; shown when it fails.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    min_n: int = 1
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The limits of the gate.

    Attributes:
        edit: Limits on the edited model against the original.
        artifact: Limits on every executed artifact against the edited model.
        required: Variants, or ``"onnx"``, that must have been executed; missing evidence fails.
        min_proven: Fewest variants that must be executed and pass.
    """

    format: int
    name: str
    edit: tuple[Limit, ...]
    artifact: tuple[Limit, ...]
    required: tuple[str, ...] = ()
    min_proven: int = 1


def recipe_from_toml(text: str, *, where: str) -> Recipe:
    """Parses and checks a recipe.

    Raises:
        RecipeError: With the file, the key and the nearest valid key.
    """
    recipe = _record_from_toml(Recipe, text, where)
    for tower, edit in (("text", recipe.edit.text), ("image", recipe.edit.image)):
        if not 0.0 < edit.keep_mass < 1.0:
            raise RecipeError(f"{where}: edit.{tower}.keep_mass is {edit.keep_mass}", fix="use a share between 0 and 1")
        if not edit.layers:
            raise RecipeError(f"{where}: edit.{tower}.layers is empty", fix="name at least one layer pattern")
    batch = recipe.compile.batch
    if not 1 <= batch.min <= batch.opt <= batch.max:
        raise RecipeError(f"{where}: compile.batch is {batch}", fix="use 1 <= min <= opt <= max")
    return recipe


def calibration_set_from_toml(text: str, *, where: str) -> CalibrationSet:
    """Parses a data set definition; see `recipe_from_toml`."""
    spec = _record_from_toml(CalibrationSet, text, where)
    if spec.source == "manifest" and not spec.manifest:
        raise RecipeError(f"{where}: source is manifest but `manifest` is missing", fix="name the JSON Lines file")
    return spec


def policy_from_toml(text: str, *, where: str) -> Policy:
    """Parses a policy; one that cannot fail anything is refused."""
    policy = _record_from_toml(Policy, text, where)
    for limit in (*policy.edit, *policy.artifact):
        if (limit.at_least is None) == (limit.at_most is None):
            raise RecipeError(f"{where}: limit on {limit.metric}", fix="give exactly one of at_least and at_most")
    if not policy.artifact or policy.min_proven < 1:
        raise RecipeError(
            f"{where}: the policy cannot fail anything", fix="limit an artifact metric and min_proven >= 1"
        )
    return policy


def _record_from_toml(cls: type[R], text: str, where: str) -> R:
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not valid TOML: {error}", fix="mend the line") from error
    _refuse_unknown_keys(cls, body, where)
    if body.get("format") != FORMAT:
        raise RecipeError(f"{where}: format is {body.get('format')!r}", fix=f"this release reads format = {FORMAT}")
    try:
        return record_from_plain(cls, body, where=where)
    except IntegrityError as error:
        raise RecipeError(error.what, fix="see docs/recipes.md") from error


def _refuse_unknown_keys(kind: Any, body: Mapping[str, Any], where: str) -> None:
    hints = get_type_hints(kind)
    for key, value in body.items():
        if key not in hints:
            near = difflib.get_close_matches(key, list(hints), n=1, cutoff=0.3)
            raise RecipeError(
                f"{where}: unknown key {key!r}", fix=f"did you mean {near[0]!r}?" if near else f"valid: {sorted(hints)}"
            )
        inner = next((kind for kind in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(kind)), None)
        if isinstance(value, dict) and inner:
            _refuse_unknown_keys(inner, value, f"{where}: {key}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in body
    ]
    if missing:
        raise RecipeError(f"{where}: missing key {missing[0]!r}", fix="see docs/recipes.md")

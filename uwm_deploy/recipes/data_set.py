"""Data sets (`calibration/`): TOML files to records, strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from uwm_deploy.errors import RecipeError
from uwm_deploy.recipes.strict_toml import record_from_toml


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a table hold what; a member without a column is a member the set does not have.

    Attributes:
        id: Column, or a pattern such as ``"{row:06d}"``; the column ``id`` when empty.
        concept: Column; every item is of the concept ``all`` when empty.
        split: Column that is compared with the set's `split`; every row is used when empty.
        safe_text: Column.
        unsafe_text: Column.
        safe_image: Column with a path or with image bytes, or a path pattern such as ``"coco/{coco_id:012d}.jpg"``, or
            several of them, of which the first file that exists is taken.
        unsafe_image: The same.
    """

    id: str = ""
    concept: str = ""
    split: str = ""
    safe_text: str = ""
    unsafe_text: str = ""
    safe_image: str | tuple[str, ...] = ""
    unsafe_image: str | tuple[str, ...] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """One file of `calibration/`: which quadruples, never their content (docs/reference/data.md).

    Attributes:
        source: ``"demo"`` (the drawn world), ``"manifest"`` (JSON Lines or Parquet with our own column names),
            ``"table"`` (JSON, JSON Lines, CSV or Parquet with any column names) or ``"webdataset"`` (tar shards).
        split: Split of the source.
        folder: Where the files are: below the TOML file's folder, for a shipped set below ``$UWM_DEPLOY_DATA``.
        manifest: File, for that source.
        table: File or glob, for that source; ``{split}`` stands for the split.
        shards: Files for the source ``"webdataset"``, as names, globs or brace ranges.
        columns: What the table's columns mean.
        concept_names: Concept as written (in lower case) to the name it gets.
        missing_images: Whether an item without its image file is broken, or left out of the set before it is sampled.
        sampling: Seeded sample of `limit` items; seeded sample of `per_concept` items of every concept; or the first
            `limit` items after Python's own shuffle (the official code).
        limit: Largest number of quadruples; 0 takes all.
        per_concept: Largest number of quadruples per concept, for that sampling.
        concepts: Only items of these concepts are used, of those that the sampling chose; all when empty.
        leave_out: Items of these concepts are not used, of those that the sampling chose.
        seed: Seed of the sample.
        pairing: Which safe members an item's unsafe ones are scored against: its own, or those of the item with the nearest
            safe caption by the model's text tower (SafeR-CLIP). Not for evaluation.
        max_broken_share: Share of items that may be unreadable before it is an error.
        zero_shot: Zero-shot sets of the source measured along with it.
        zero_shot_limit: Largest number of items of each of them, evenly spaced; 0 takes all.
    """

    format: int
    name: str
    source: Literal["demo", "manifest", "table", "webdataset"]
    split: str = ""
    folder: str = ""
    manifest: str = ""
    table: str = ""
    shards: str | tuple[str, ...] = ""
    columns: Columns = field(default_factory=Columns)
    concept_names: Mapping[str, str] = field(default_factory=dict)
    missing_images: Literal["error", "drop"] = "error"
    sampling: Literal["sample", "per-concept", "shuffle"] = "sample"
    limit: int = 0
    per_concept: int = 0
    concepts: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    seed: int = 0
    pairing: Literal["own", "nearest-safe"] = "own"
    max_broken_share: float = 0.01
    zero_shot: tuple[str, ...] = ()
    zero_shot_limit: int = 0


def calibration_set_from_toml(text: str, *, where: str) -> CalibrationSet:
    """Parses a data set definition; see `recipe_from_toml`."""
    spec = record_from_toml(CalibrationSet, text, where)
    files = {"manifest": spec.manifest, "table": spec.table, "webdataset": spec.shards}
    keys = {"manifest": "manifest", "table": "table", "webdataset": "shards"}
    for source, value in files.items():
        if source == spec.source and not value:
            raise RecipeError(f"{where}: source is {source} but `{keys[source]}` is missing", fix="name the file")
        if source != spec.source and value:
            raise RecipeError(f"{where}: `{keys[source]}` with source {spec.source}", fix=f"use source = {source!r}")
    if spec.source != "table" and spec.columns != Columns():
        raise RecipeError(f"{where}: `columns` with source {spec.source}", fix="use source = 'table'")
    if spec.source == "demo" and (spec.folder or spec.concept_names or spec.missing_images != "error"):
        raise RecipeError(f"{where}: the demo has no files", fix="remove folder, concept_names and missing_images")
    _check_columns(spec, where)
    _check_sampling(spec, where)
    return spec


def _check_columns(spec: CalibrationSet, where: str) -> None:
    columns = spec.columns
    for kind, safe, unsafe in (
        ("text", columns.safe_text, columns.unsafe_text),
        ("image", columns.safe_image, columns.unsafe_image),
    ):
        if bool(safe) != bool(unsafe):
            raise RecipeError(
                f"{where}: columns name one {kind} of the pair", fix=f"give safe_{kind} and unsafe_{kind}"
            )
    if spec.source == "table" and not (columns.safe_text or columns.safe_image):
        raise RecipeError(f"{where}: columns name neither texts nor images", fix="see docs/reference/data.md")


def _check_sampling(spec: CalibrationSet, where: str) -> None:
    if min(spec.limit, spec.per_concept, spec.seed, spec.zero_shot_limit) < 0:
        raise RecipeError(f"{where}: limits, per_concept and seed are not negative", fix="use 0 for no limit")
    if not 0.0 <= spec.max_broken_share <= 1.0:
        raise RecipeError(f"{where}: max_broken_share is {spec.max_broken_share}", fix="use a share between 0 and 1")
    if (spec.sampling == "per-concept") != bool(spec.per_concept):
        raise RecipeError(f"{where}: per_concept and sampling = 'per-concept' go together", fix="give both or neither")
    if spec.concepts and spec.leave_out:
        raise RecipeError(f"{where}: concepts and leave_out are both given", fix="give one of them")
    if spec.sampling == "per-concept" and spec.limit:
        raise RecipeError(f"{where}: limit with sampling = 'per-concept'", fix="use per_concept alone")

"""The published numbers: one data file with their source, read strictly."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.codec import record_from_plain
from uwm_deploy.records.downstream import Kind
from uwm_deploy.records.edit import Method

FILE = "published.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One row of a published table.

    Attributes:
        model: Recipe.
        method: Steps of the edit; `none` for the model as it is.
        values: Percent per column; empty where nothing is published.
    """

    label: str
    model: str
    method: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTable:
    """One published table.

    Attributes:
        source: Where its numbers are from.
        calibration: Set that edits are made from.
        evaluation: Set of quadruples; empty when the table has only zero-shot columns.
        columns: Names as in `comparison.COLUMNS`, or zero-shot sets.
        tolerance: Points per column within which a measured value of an unedited model agrees.
        edited_tolerance: The same for an edited model.
        note: What a reader must know.
    """

    title: str
    source: str
    calibration: str
    evaluation: str = ""
    columns: tuple[str, ...]
    tolerance: tuple[float, ...]
    edited_tolerance: tuple[float, ...]
    note: str
    rows: tuple[PublishedRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedOutputs:
    """A published table of captions or pictures behind a tower. Its first row is of the model's own tower.

    Attributes:
        source: Where its numbers are from.
        kind: What came out.
        columns: Judges, or a score of captions.
        note: What a reader must know.
    """

    title: str
    source: str
    kind: Kind
    columns: tuple[str, ...]
    note: str
    rows: tuple[PublishedRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The data file."""

    format: int
    tables: Mapping[str, PublishedTable]
    outputs: Mapping[str, PublishedOutputs] = field(default_factory=dict)


def published() -> Mapping[str, PublishedTable]:
    """Every table of embeddings, by name.

    Raises:
        IntegrityError: If the data file is not whole.
    """
    tables = _read().tables
    for name, table in tables.items():
        widths = {len(table.columns), len(table.tolerance), len(table.edited_tolerance)}
        _check(name, table.rows, widths)
    return tables


def published_outputs() -> Mapping[str, PublishedOutputs]:
    """Every table of captions and pictures, by name.

    Raises:
        IntegrityError: If the data file is not whole.
    """
    tables = _read().outputs
    for name, table in tables.items():
        _check(name, table.rows, {len(table.columns)})
    return tables


def _read() -> Published:
    text = resources.files("uwm_deploy.recipes").joinpath(FILE).read_text(encoding="utf-8")
    return record_from_plain(Published, tomllib.loads(text), where=FILE)


def _check(name: str, rows: tuple[PublishedRow, ...], widths: set[int]) -> None:
    if len(widths | {len(row.values) for row in rows}) != 1:
        raise IntegrityError(f"{FILE}: {name} has lines of different lengths", fix="restore the file")
    for row in rows:
        if unknown := set(row.method.split("+")) - {method.value for method in Method}:
            raise IntegrityError(f"{FILE}: {name}: there is no method {min(unknown)!r}", fix="restore the file")

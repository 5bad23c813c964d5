"""The evaluation set that a bundle was measured on, found again from the bundle, whatever folder one works in."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.data.finding import is_file, is_folder
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError, InputError
from uwm_deploy.recipes.data_set import CalibrationSet, calibration_set_from_toml
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.data import CalibrationRecord, EvaluationPlace

_FIX = "pass --evaluation with the TOML file of the set that the bundle was measured on"


def place_from(base: Path | None, bundle: Path) -> dict[str, bytes]:
    """The part of a bundle that says where its evaluation set is; no part for a set that ships with the project.

    A path through the root of the file system would say where things are on this machine, and is left out.

    Args:
        base: Folder that the set's relative paths start from.
        bundle: Where the bundle goes.
    """
    if base is None:
        return {}
    start, wanted = bundle.resolve(), base.resolve()
    if os.path.commonpath([start, wanted]) == start.anchor:
        return {}
    folder = PurePath(os.path.relpath(wanted, start)).as_posix()
    return {BundleLayout.EVALUATION_PLACE: json_from_record(EvaluationPlace(folder=folder)).encode()}


def evaluation_set_in(bundle: Bundle) -> tuple[CalibrationSet, Path | None]:
    """Definition of a bundle's evaluation set, and the folder that its relative paths start from.

    Args:
        bundle: Where it was moved away from its set, or says nothing of it, the folder is None: the current one.
    """
    text = bundle.read(BundleLayout.EVALUATION).decode()
    spec, base = calibration_set_from_toml(text, where=BundleLayout.EVALUATION), base_in(bundle)
    return spec, base if base is not None and _holds(base, spec) else None


def _holds(base: Path, spec: CalibrationSet) -> bool:
    """Whether a set starts there, as far as its names tell."""
    folder, name = base / spec.folder, spec.manifest or spec.table.replace("{split}", spec.split)
    return is_file(folder / name) if name and not glob.has_magic(name) else is_folder(folder)


def base_in(bundle: Bundle) -> Path | None:
    """Folder that a bundle names for its evaluation set, whether it is there or not."""
    if all(file.path != BundleLayout.EVALUATION_PLACE for file in bundle.manifest.files):
        return None
    content = bundle.read(BundleLayout.EVALUATION_PLACE)
    place = record_from_json(EvaluationPlace, content, where=BundleLayout.EVALUATION_PLACE)
    return Path(os.path.normpath(bundle.path.resolve() / place.folder))


def evaluation_source_in(bundle: Bundle) -> QuadrupleSource:
    """A bundle's evaluation set.

    Raises:
        DataError: If it is not there, or broken.
    """
    spec, base = evaluation_set_in(bundle)
    with of_bundle():
        return open_source(spec, base=base)


def check_measured_on(source: QuadrupleSource, known: CalibrationRecord) -> None:
    """Refuses another set than the one that a bundle was measured on, whatever its name: its numbers mean something else.

    Args:
        source: The set that was found.
        known: What the bundle's report says of its own.

    Raises:
        InputError: If ids or content differ.
    """
    found = source.record
    if (found.ids_digest, found.content_digest) != (known.ids_digest, known.content_digest):
        raise InputError(
            f"data set {found.name} is not the one the bundle was measured on ({known.name})",
            fix="pass the same evaluation set",
        )


@contextlib.contextmanager
def of_bundle() -> Iterator[None]:
    """Says of what cannot be opened that it is a bundle's evaluation set, and what to do where it is elsewhere."""
    try:
        yield
    except DataError as error:
        raise DataError(f"the bundle's evaluation set: {error.what}", fix=_FIX) from error

"""Opens the set that a TOML file defines, whatever it is stored as."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from uwm_deploy.data.finding import is_folder
from uwm_deploy.data.source import ROOT_VARIABLE, QuadrupleSource
from uwm_deploy.errors import DataError
from uwm_deploy.recipes.data_set import CalibrationSet

_OR_ANOTHER = "docs/reference/data.md says what goes where; or pass --calibration or --evaluation with another set"


def open_source(spec: CalibrationSet, *, base: Path | None, allow_twice: bool = False) -> QuadrupleSource:
    """Opens the set that a TOML file defines.

    Args:
        spec: The definition.
        base: Folder of the TOML file; None for one that ships with the project or stands in a bundle.
        allow_twice: Do not refuse a set with an id that occurs more than once.

    Raises:
        DataError: If it is empty or malformed.
        PrerequisiteError: If a package that reads it is missing.
    """
    source = _opened(spec, base)
    if not source.ids:
        raise DataError(f"data set {spec.name} has no quadruples", fix="check its file, split and limit")
    if not allow_twice:
        twice = [item for item, count in Counter(source.ids).items() if count > 1]
        if twice:
            raise DataError(
                f"data set {spec.name}: id {twice[0]!r} occurs more than once", fix="give every item its own id"
            )
    return source


def _opened(spec: CalibrationSet, base: Path | None) -> QuadrupleSource:
    if spec.source == "demo":
        from uwm_deploy.data.demo.source import DemoSource

        return DemoSource(spec)
    folder = folder_of(spec, base)
    if spec.source == "webdataset":
        from uwm_deploy.data.shards import open_shards

        return open_shards(spec, folder, base)
    from uwm_deploy.data.table import open_table

    return open_table(spec, folder, base)


def folder_of(spec: CalibrationSet, base: Path | None) -> Path:
    """Folder that a set's files are in.

    Args:
        spec: The definition.
        base: Folder of its TOML file; without one, `$UWM_DEPLOY_DATA` when the set names a folder, else the current one.

    Raises:
        DataError: If it is not there; says which one was expected.
    """
    folder = Path(spec.folder).expanduser()
    if not spec.folder:
        return base or Path()
    if not folder.is_absolute():
        root = base or (Path(value) if (value := os.environ.get(ROOT_VARIABLE, "")) else None)
        if root is None:
            raise DataError(
                f"data set {spec.name} expects its files in ${ROOT_VARIABLE}/{spec.folder}, and {ROOT_VARIABLE} is not set",
                fix=f"set it to the folder of your data sets; {_OR_ANOTHER}",
            )
        folder = root / folder
    if not is_folder(folder):
        raise DataError(
            f"data set {spec.name} expects its files in {folder}, which is no folder",
            fix=f"put them there or set {ROOT_VARIABLE}; {_OR_ANOTHER}"
            if base is None
            else "check `folder` in its TOML file",
        )
    return folder

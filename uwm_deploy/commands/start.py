"""The command that begins a project."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import click

from uwm_deploy.commands.fields import PATH
from uwm_deploy.commands.help_width import within_80_columns
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.report.lines import Whole


@click.command()
@click.argument("folder", type=PATH)
@prints
def init(folder: Path) -> Shown:
    """Writes a small project that builds as it stands.

    FOLDER gets two data sets, a recipe, a policy and a CI file, all with comments. It must not exist, or be empty.
    The recipe has the folder's name, and so has its bundle.

    \b
    Example:
      uwm-deploy init my-project
    """
    from uwm_deploy.errors import InputError
    from uwm_deploy.recipes.project import POLICY, project_files, recipe_name

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already", fix="choose another folder, or empty it")
    files = project_files(folder)
    _write(folder, files)
    recipe, policy = (shlex.quote((folder / file).as_posix()) for file in (f"{recipe_name(folder)}.toml", POLICY))
    build = f"uwm-deploy build --model {recipe} --policy {policy}"
    shown = within_80_columns(f"  {build}", margin=0) or ""
    lines = [*(Whole((folder / name).as_posix()) for name in files), "build it:", *shown.split("\n")]
    return Shown(data={"folder": str(folder), "files": list(files), "build": build}, text=lines)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """All files or none; an empty folder is filled and not replaced, because it may be the one that somebody works in."""
    from uwm_deploy.records.files import whole_folder, write_atomic

    if not folder.exists():
        with whole_folder(folder) as place:
            for name, text in files.items():
                (place / name).write_text(text, encoding="utf-8")
        return
    try:
        for name, text in files.items():
            write_atomic(folder / name, text)
    except BaseException:
        for name in files:
            (folder / name).unlink(missing_ok=True)
        raise

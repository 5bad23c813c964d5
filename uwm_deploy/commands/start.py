"""The command that begins a project."""

from __future__ import annotations

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

    \b
    Example:
      uwm-deploy init my-project
    """
    from uwm_deploy.errors import InputError
    from uwm_deploy.recipes.project import MODEL, POLICY, TEST, TRAIN, project_files
    from uwm_deploy.records.files import whole_folder

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already", fix="choose another folder, or empty it")
    files = project_files(folder)
    with whole_folder(folder) as place:
        for name, text in files.items():
            (place / name).write_text(text, encoding="utf-8")
    at = folder.as_posix()
    build = (
        f"uwm-deploy build --model {at}/{MODEL} --calibration {at}/{TRAIN} --evaluation {at}/{TEST} "
        f"--policy {at}/{POLICY}"
    )
    shown = within_80_columns(f"  {build}", margin=0) or ""
    lines = [*(Whole(f"{at}/{name}") for name in files), "build it:", *shown.split("\n")]
    return Shown(data={"folder": str(folder), "files": list(files), "build": build}, text=lines)

"""Finds the TOML files that ship with the project: in the installed package first, else in the checkout."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from uwm_deploy.errors import InputError, unreadable
from uwm_deploy.recipes.hub import hub_checkpoint
from uwm_deploy.recipes.recipe import Family, is_folder, is_relative
from uwm_deploy.recipes.unknown_name import unknown_data_set, unknown_name, unknown_recipe
from uwm_deploy.records.model import LOCAL

Kind = Literal["export", "calibration", "ci"]

WORDS: Mapping[Kind, str] = {"export": "recipe", "calibration": "data set", "ci": "policy"}
"""What a user calls what lies in a folder."""

_RENAMED: Mapping[tuple[Kind, str], str] = {("ci", "policy"): "default"}
"""Names of earlier releases, to today's."""


def folder(kind: Kind) -> Traversable:
    """The folder of one kind of file.

    A wheel carries it as ``uwm_deploy/_shipped/<kind>``; a checkout or an editable install has it at the root.
    """
    shipped = resources.files("uwm_deploy").joinpath("_shipped", kind)
    return shipped if shipped.is_dir() else Path(__file__).resolve().parents[2] / kind


def names(kind: Kind) -> tuple[str, ...]:
    """Names of the shipped files, without `.toml`, sorted."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder(kind).iterdir() if f.name.endswith(".toml")))


def read_toml(kind: Kind, name_or_path: str) -> tuple[str, str]:
    """Text and display name of a TOML file, by shipped name or by path.

    Raises:
        InputError: With the nearest shipped names, or what else can be passed.
    """
    word = WORDS[kind]
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            fix = "check the path" + ("; in a recipe it starts at the recipe's folder" if kind == "calibration" else "")
            raise InputError(f"{word} file {name_or_path} does not exist", fix=fix)
        try:
            return path.read_text(encoding="utf-8"), name_or_path
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(f"{word} file {name_or_path}", error, fix="check the file", kind=InputError) from error
    known = names(kind)
    if name_or_path not in known:
        raise _unknown(kind, name_or_path)
    file = folder(kind).joinpath(f"{name_or_path}.toml")
    return file.read_text(encoding="utf-8"), f"{kind}/{name_or_path}.toml"


def _unknown(kind: Kind, name: str) -> InputError:
    """The error for a name that there is not."""
    if today := _RENAMED.get((kind, name)):
        return InputError(f"no {WORDS[kind]} {name!r}", fix=f"the shipped {WORDS[kind]} is called {today}")
    if kind == "export":
        return unknown_recipe(name, {recipe: _repo_of(recipe) for recipe in names(kind)})
    return (
        unknown_data_set(name, names(kind)) if kind == "calibration" else unknown_name(WORDS[kind], name, names(kind))
    )


def _repo_of(recipe: str) -> str:
    return str(tomllib.loads(read_toml("export", recipe)[0])["model"]["repo"])


def checkpoint_folder(repo: str, revision: str, *, family: Family | None = None, local_only: bool = False) -> Path:
    """Folder that holds a checkpoint's files; which one does not depend on the working folder.

    Args:
        repo: ``"shipped:demo"``, a folder's full path, or a Hugging Face id.
        revision: Hub commit; needed for a hub id.
        family: Of the model, which says what files it needs; None asks for weights and a config.
        local_only: Take what is on this machine; download nothing.

    Raises:
        InputError: If there is no such folder, repository or revision.
        PrerequisiteError: If the hub cannot be reached.
    """
    if repo.startswith("shipped:"):
        return Path(__file__).resolve().parents[1] / "data" / repo.removeprefix("shipped:") / "model"
    if repo == LOCAL:
        raise InputError("the model came from a folder, whose path is in no record", fix="pass --checkpoint FOLDER")
    if is_folder(repo):
        if not Path(repo).is_dir():
            raise InputError(f"checkpoint folder {repo} does not exist", fix="check the path")
        return Path(repo)
    if is_relative(repo):
        raise InputError(
            f"the model came from the folder {repo}, and what that path starts from is not known here",
            fix="pass --checkpoint FOLDER",
        )
    if not revision:
        raise InputError(
            f"no revision is pinned for {repo}",
            fix="pass --revision with a commit of the hub repository, or --checkpoint with a folder; in a recipe's file a "
            "folder begins with ./ or /",
        )
    return hub_checkpoint(repo, revision, family=family, local_only=local_only)

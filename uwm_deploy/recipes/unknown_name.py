"""What is said of a name or path that is no shipped file: the nearest names, and what else could stand in its place."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from uwm_deploy.errors import InputError

_DATA_SET = "data set"
_NAME_IT = "name the manifest in a TOML file, and pass that; docs/reference/data.md shows one"
_MODELS = (
    "pass a checkpoint folder; or a shipped recipe, which `uwm-deploy models` lists; or a recipe of your own, a file that "
    "ends in .toml and can name a repository of the hub"
)
_HUB = "https://huggingface.co/"
_NEAR, _NEAR_REPO, _NAMED = 0.4, 0.7, 3
"""How alike a name must be, and a repository, whose names share more words; how many are named."""


def unknown_recipe(name: str, repos: Mapping[str, str]) -> InputError:
    """The error for a name that is no recipe's.

    Args:
        name: As it was given: a name, a repository of the hub, or a path.
        repos: Repository of every shipped recipe, by the recipe's name.
    """
    repo = name.removeprefix(_HUB).rstrip("/").lower()
    for recipe, its in repos.items():
        if repo in (its.lower(), its.lower().rpartition("/")[2]):
            return InputError(f"no recipe {name!r}", fix=f"the shipped recipe of that checkpoint is called {recipe}")
    near, what = _nearest(repo, repos), f"no recipe {name!r}"
    if os.path.isfile(name):
        near, what = [], f"{name} is neither a checkpoint folder nor a recipe's file, which ends in .toml"
    elif _is_path(repo):
        near, what = [], f"{name} does not exist"
    elif "/" in repo:
        what += ", and no folder of that path"
    return InputError(what, fix=f"nearest: {', '.join(near)}" if near else _MODELS)


def unknown_data_set(name: str, known: Sequence[str]) -> InputError:
    """The error for a name that is no data set's.

    Args:
        name: As it was given.
        known: Names of the shipped sets.
    """
    if os.path.isdir(name) and not files_inside(Path(name), _DATA_SET):
        made = Path(name) / "pairs.jsonl"
        return InputError(
            f"no {_DATA_SET} {name!r}: it is a folder",
            fix=f"write a manifest of its files first, as with `uwm-deploy data make {name} --out {made}`, and {_NAME_IT}",
        )
    if os.path.isfile(name):
        return InputError(f"no {_DATA_SET} {name!r}: it is no TOML file", fix=_NAME_IT)
    return unknown_name(_DATA_SET, name, known)


def unknown_name(word: str, name: str, known: Sequence[str]) -> InputError:
    """The error for a name that is none of those that ship.

    Args:
        word: What the name should be of.
        name: As it was given.
        known: Names of the shipped files.
    """
    what = f"no {word} {name!r}"
    if os.path.isdir(name) and (inside := files_inside(Path(name), word)):
        return InputError(f"{what}: it is a folder", fix=f"pass a file in it: {', '.join(inside)}")
    if near := difflib.get_close_matches(name, known, n=_NAMED, cutoff=_NEAR):
        return InputError(what, fix=f"nearest: {', '.join(near)}")
    if os.path.exists(name):
        what += f": it is {'a folder' if os.path.isdir(name) else 'no TOML file'}"
    elif _is_path(name) or Path(name).suffix:
        what += ", and no file of that path"
    return InputError(what, fix=f"there are {', '.join(known)}; or name a file that ends in .toml")


def files_inside(folder: Path, word: str) -> list[str]:
    """Paths of a folder's own TOML files of one kind, sorted, as `init` writes them; none where it cannot be read.

    Args:
        folder: The folder.
        word: ``"recipe"``, ``"data set"`` or ``"policy"``.
    """
    try:
        files = [folder / name for name in sorted(os.listdir(folder)) if name.endswith(".toml")]
        return [str(file) for file in files if _word_of(file) == word]
    except OSError:
        return []


def _word_of(file: Path) -> str:
    """What a TOML file seems to be, by a key that every file of its kind has."""
    try:
        keys = tomllib.loads(file.read_text(encoding="utf-8")).keys()
    except (ValueError, RecursionError):
        return ""
    return "recipe" if "model" in keys else "data set" if "source" in keys else "policy" if "artifact" in keys else ""


def _is_path(name: str) -> bool:
    """Whether it can only be a path: neither a name nor a repository, which is ``owner/name``."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _nearest(name: str, repos: Mapping[str, str]) -> list[str]:
    """Recipes whose own name, or whose repository's, is most alike."""
    alike = {}
    for recipe, repo in repos.items():
        own, its = _alike(name, recipe), max(_alike(name, repo.lower()), _alike(name, repo.lower().rpartition("/")[2]))
        if (most := max(own if own >= _NEAR else 0.0, its if its >= _NEAR_REPO else 0.0)) > 0:
            alike[recipe] = most
    return sorted(alike, key=lambda recipe: -alike[recipe])[:_NAMED]


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, b, a).ratio()

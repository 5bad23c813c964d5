"""The text of a recipe for the bundle: it names the model that was built, whatever file the rules came from."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping

from uwm_deploy.recipes.recipe import Recipe, is_folder, public_repo, recipe_from_toml


def text_of_built(text: str, recipe: Recipe) -> str:
    """The text as it is where it names what is built, else the same rules with another name and model.

    Args:
        text: The recipe's file.
        recipe: What is built. Its repository may be a folder, whose path gets into no record.
    """
    file, model = recipe_from_toml(text, where="recipe"), recipe.model
    in_folder = any(is_folder(repo) for repo in (model.repo, model.base, model.companion))
    if (file.name, file.model) == (recipe.name, model) and not in_folder:
        return text
    body = tomllib.loads(text)
    told = {
        "repo": public_repo(model.repo),
        "revision": model.revision,
        "licence": model.licence,
        "parameters": model.parameters,
        "base": public_repo(model.base),
        "base_revision": model.base_revision,
        "companion": public_repo(model.companion),
        "companion_revision": model.companion_revision,
    }
    kept = {key: value for key, value in body["model"].items() if key not in told}
    if model.architecture is None:
        kept.pop("architecture", None)
    return _toml(body | {"name": recipe.name, "model": kept | {key: value for key, value in told.items() if value}})


def _toml(body: Mapping[str, object]) -> str:
    """Values of the top as lines, its tables as sections, and what is in these as values."""
    lines, sections = [], []
    for key, value in body.items():
        if isinstance(value, dict):
            sections.append(_section(f"[{key}]", value))
        elif isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            sections += [_section(f"[[{key}]]", part) for part in value]
        else:
            lines.append(f"{key} = {_value(value)}")
    return "\n\n".join(["\n".join(lines), *sections]) + "\n"


def _section(head: str, table: Mapping[str, object]) -> str:
    return "\n".join([head, *(f"{json.dumps(key) if '.' in key else key} = {_value(v)}" for key, v in table.items())])


def _value(value: object) -> str:
    """A value in one line; texts, numbers and lists are written as in JSON."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_value(part)}" for key, part in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_value(part) for part in value) + "]"
    return json.dumps(value, ensure_ascii=False)

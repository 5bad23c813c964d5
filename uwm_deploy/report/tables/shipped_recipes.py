"""What `models` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uwm_deploy.recipes.recipe import Recipe
from uwm_deploy.report.terminal import print_line, print_rows

_MODEL = ("name", "parameters", "licence", "method")
_EDITED = ("edited text layers", "edited image layers", "keep_mass")


def recipe_rows(recipes: Mapping[str, Recipe]) -> list[dict[str, object]]:
    """One row per recipe.

    Args:
        recipes: Name, as it is given to `--model`, to the recipe.
    """
    return [
        {
            "name": name,
            "family": recipe.model.family,
            "parameters": recipe.model.parameters,
            "licence": recipe.model.licence,
            "method": recipe.method,
            "edited text layers": ", ".join(recipe.entries.text.layers),
            "edited image layers": ", ".join(recipe.entries.image.layers),
            "keep_mass": f"{recipe.entries.text.keep_mass} / {recipe.entries.image.keep_mass}",
        }
        for name, recipe in recipes.items()
    ]


def print_recipes(rows: Sequence[Mapping[str, object]]) -> None:
    """A table of the models, then the layers that are edited, once for all models that share them.

    Args:
        rows: What `recipe_rows` makes.
    """
    print_rows([{key: row[key] for key in _MODEL} for row in rows])
    groups: dict[tuple[object, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in _EDITED), []).append(str(row["name"]))
    for edited, names in groups.items():
        print_line("")
        print_line(", ".join(names), style="bold")
        for key, value in zip(_EDITED, edited, strict=True):
            print_line(f"  {key}: {value}")

"""What `models` shows."""

from __future__ import annotations

from collections.abc import Mapping

from uwm_deploy.recipes.recipe import Recipe


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

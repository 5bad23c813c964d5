"""What tests about UWM ask for: its step alone, whatever else the demo's own recipe edits with."""

from __future__ import annotations

from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.recipes.edit_spec import EditSpecs

UWM = {"method": "uwm", "keep_mass": 0.9}
"""Of a `Request`."""

UWM_OPTIONS = ("--method", "uwm", "--keep-mass", "0.9")
"""The same on the command line."""

STEP = """[[edit]]
[edit.text]
rule = "ratio-times-abs-weight"
layers = ["*.self_attn.out_proj"]
keep_mass = 0.9
factor = -1.0
[edit.image]
rule = "ratio"
layers = ["*.mlp.fc2"]
keep_mass = 0.9
factor = -1.0
"""
"""The same in a recipe."""


def entries() -> EditSpecs:
    """The step for the demo."""
    return resolved_recipe(Request(**UWM)).entries


def with_edit(recipe: str, edit: str = STEP) -> str:
    """The text of a recipe with other steps in the place of its own."""
    head, _, rest = recipe.partition("[[edit]]")
    return f"{head}{edit}\n[data]{rest.partition('[data]')[2]}"

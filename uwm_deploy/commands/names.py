"""Completes the names of recipes, data sets and policies in a shell; docs/reference/cli.md says how it is switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from uwm_deploy.recipes.shipped import Kind

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _shipped(kind: Kind) -> Complete:
    def complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
        from uwm_deploy.recipes.shipped import names

        known = [CompletionItem(name) for name in names(kind) if name.startswith(begun)]
        return known or [CompletionItem(begun, type="file")]  # such an option takes a file as well

    return complete


RECIPES: Complete = _shipped("export")
DATA_SETS: Complete = _shipped("calibration")
POLICIES: Complete = _shipped("ci")

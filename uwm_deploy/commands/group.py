"""A command that has others below it."""

from __future__ import annotations

import click


class InOrder(click.Group):
    """Lists its commands in the order in which they were written."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """Names in that order."""
        return list(self.commands)

"""A command that has others below it."""

from __future__ import annotations

from typing import Any

import click

from uwm_deploy.commands.help_width import HelpContext, within_80_columns


class InOrder(click.Group):
    """Lists its commands in the order in which they were written."""

    context_class = HelpContext

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.help = within_80_columns(self.help, margin=4)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """Names in that order."""
        return list(self.commands)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """A command whose help is laid out as the group's."""
        cmd.context_class = HelpContext
        super().add_command(cmd, name)

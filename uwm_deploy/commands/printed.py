"""Prints the lines of a command that need no table, at the width of where they go."""

from __future__ import annotations

import sys

import click

from uwm_deploy.report.lines import printed_lines, width_of


def print_text(text: str, *, err: bool = False) -> None:
    """One line, which goes on in the next one where it is too long.

    Args:
        text: The line; one that is `Whole` is never broken.
        err: To standard error.
    """
    for line in printed_lines(text, width_of(sys.stderr if err else sys.stdout)):
        click.echo(line, err=err)

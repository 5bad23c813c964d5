"""The command `train safety-head`. Heavy imports stay inside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from uwm_deploy.commands.command_line import (
    CALIBRATION,
    CHECKPOINT,
    DEVICE,
    MODEL,
    REVISION,
    WORKERS,
    common_options,
    edit_options,
    with_options,
)

F = TypeVar("F", bound=Callable[..., Any])


def build_options(command: F) -> F:
    """Which edited model the head is for: what `build` takes, too."""
    options = [
        MODEL,
        CHECKPOINT,
        REVISION,
        CALIBRATION,
        edit_options,
        click.option(
            "--work",
            default=None,
            type=click.Path(path_type=Path),
            help="Run folder, the build's own; it keeps the tokens. [default: .uwm/MODEL]",
        ),
        DEVICE,
        WORKERS,
    ]
    return with_options(command, options)


def head_options(command: F) -> F:
    """What a safety head is made from, and of."""
    rate = click.FloatRange(0, 50, min_open=True)
    some = click.IntRange(min=1)
    options = [
        click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the head."),
        click.option(
            "--train-on", default=None, help="Set that the head is trained on. [default: the calibration set]"
        ),
        click.option(
            "--validation",
            default=None,
            help="Set that temperatures and thresholds are from. [default: every fifth pair of the other one]",
        ),
        click.option("--flag", default=10.0, show_default=True, type=rate, help="Percent of safe images to flag."),
        click.option("--redirect", default=5.0, show_default=True, type=rate, help="The same, to redirect."),
        click.option("--block", default=1.0, show_default=True, type=rate, help="The same, to block."),
        click.option(
            "--safe-texts",
            "texts",
            default=None,
            type=click.Path(path_type=Path, dir_okay=False),
            help="Texts to redirect to, one a line; they go into the bundle. [default: safe captions of the set]",
        ),
        click.option("--epochs", default=20, show_default=True, type=some, help="Passes over the pairs."),
        click.option("--batch", default=64, show_default=True, type=some, help="Pairs per step."),
        click.option(
            "--rate",
            "learning_rate",
            default=2e-3,
            show_default=True,
            type=click.FloatRange(0, min_open=True),
            help="Learning rate of AdamW at its peak.",
        ),
        click.option("--width", default=64, show_default=True, type=some, help="Of the safety projector."),
        click.option("--tokens", default=8, show_default=True, type=some, help="Learned safety tokens."),
        click.option("--heads", default=4, show_default=True, type=some, help="Of the attention."),
        click.option(
            "--seed", default=0, show_default=True, type=click.IntRange(0), help="Of first weights and order."
        ),
    ]
    return with_options(command, options)


@click.command("safety-head")
@build_options
@head_options
@common_options
def safety_head(as_json: bool, **options: Any) -> int:
    """A safety head on the tokens of the edited image tower, which stays as it is (docs/safety-head.md).

    Options of `build` say which edited model: give both the same ones. Tokens are kept in the run folder, so another run
    takes seconds; one that was interrupted begins again after them.

    \b
    Example:
      uwm-deploy train safety-head --model demo --calibration demo --out head
      uwm-deploy build --model demo --safety-head head
    """
    from uwm_deploy.training.safety_head_folder import run

    return run(as_json, options)

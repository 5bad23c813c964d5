"""The `train` commands. Heavy imports stay inside them."""

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
    PipelineGroup,
    common_options,
    with_options,
)
from uwm_deploy.commands.train_safety_head import safety_head
from uwm_deploy.records.training import Trainer

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=PipelineGroup)
def train() -> None:
    """Trains other systems of the field on a calibration set, for `build` and `compare` (docs/training.md).

    \b
    Example:
      uwm-deploy train safe-clip --model demo --calibration demo --out trained
      uwm-deploy build --model trained
    """


train.add_command(safety_head)


def source_options(command: F) -> F:
    """Which model, which data, where to."""
    options = [
        MODEL,
        CHECKPOINT,
        REVISION,
        CALIBRATION,
        click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the result."),
        click.option(
            "--work",
            default=None,
            type=click.Path(path_type=Path),
            help="Run folder; a run that was stopped goes on there. [default: .uwm/MODEL/train-METHOD]",
        ),
        DEVICE,
        WORKERS,
    ]
    return with_options(command, options)


def settings_options(command: F) -> F:
    """What a user may change of the published settings."""
    above_0 = click.FloatRange(0, min_open=True)
    options = [
        click.option(
            "--epochs",
            default=None,
            type=click.IntRange(1),
            help="At most so many. [default: the recipe's or published]",
        ),
        click.option(
            "--batch",
            default=None,
            type=click.IntRange(2),
            help="Quadruples per step. [default: the recipe's or published]",
        ),
        click.option(
            "--rate", default=None, type=above_0, help="Learning rate of Adam. [default: the recipe's or published]"
        ),
        click.option(
            "--rank", default=None, type=click.IntRange(1), help="Of the adapters. [default: the recipe's or 16]"
        ),
        click.option(
            "--alpha", default=None, type=above_0, help="Adapters count alpha / rank. [default: the recipe's or 1]"
        ),
        click.option(
            "--patience",
            default=None,
            type=click.IntRange(1),
            help="Epochs without a better loss or recall before it ends. [default: 5]",
        ),
        click.option(
            "--validation-share",
            default=None,
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="Share of the set that is held out to choose the best epoch. [default: 0.125]",
        ),
        click.option(
            "--best",
            default=None,
            type=click.Choice(["loss", "recall"]),
            help="What the best epoch is chosen by, on what is held out. [default: loss]",
        ),
        click.option(
            "--precision",
            default=None,
            type=click.Choice(["fp32", "bf16"]),
            help="Of the forward passes; weights stay float32. [default: fp32]",
        ),
        click.option("--seed", default=None, type=click.IntRange(0), help="[default: 0]"),
    ]
    return with_options(command, options)


_SETTINGS = ("epochs", "batch", "rate", "rank", "alpha", "patience", "validation_share", "best", "precision", "seed")


def _train(method: Trainer, as_json: bool, options: dict[str, Any]) -> int:
    from uwm_deploy.data.ranks import speaks
    from uwm_deploy.records.codec import json_from_record
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.training.trainer import TrainRequest, summary_of
    from uwm_deploy.training.trainer import train as run

    changed = {name: options.pop(name) for name in _SETTINGS}
    record = run(TrainRequest(method=method, changed=changed, **options), Reporter(quiet=not speaks()))
    if not speaks():
        return 0
    if as_json:
        click.echo(json_from_record(record), nl=False)
        return 0
    for name, value in summary_of(record).items():
        click.echo(f"{name:<20} {value}")
    click.echo(f"{'trained model':<20} {options['out']}")
    return 0


@train.command("safe-clip")
@source_options
@settings_options
@common_options
def safe_clip(as_json: bool, **options: Any) -> int:
    """Safe-CLIP: LoRA on both towers; unsafe members go to their safe counterparts, safe ones stay.

    The frozen reference is a model of its own. A run that was stopped goes on after its last whole epoch. Several GPUs:
    `torchrun --standalone --nproc-per-node 8 -m uwm_deploy.cli train safe-clip ...`.

    \b
    Example:
      uwm-deploy train safe-clip --model demo --calibration demo --out trained/safe-clip
      uwm-deploy build --model trained/safe-clip
    """
    return _train(Trainer.SAFE_CLIP, as_json, options)


@train.command("safer-clip")
@source_options
@settings_options
@common_options
def safer_clip(as_json: bool, **options: Any) -> int:
    """SafeR-CLIP: unsafe members go to the nearest safe caption and its image; easy pairs come first.

    \b
    Example:
      uwm-deploy train safer-clip --model demo --calibration demo --out trained/safer-clip
    """
    return _train(Trainer.SAFER_CLIP, as_json, options)

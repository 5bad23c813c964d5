"""The `train` commands. Heavy imports stay inside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import click

from uwm_deploy.commands.fields import PATH, SEED, filled, option, takes_options
from uwm_deploy.commands.group import InOrder
from uwm_deploy.commands.options import DataOptions, DeviceOptions, ModelOptions, WorkerOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.train_language_adapter import language_adapter
from uwm_deploy.commands.train_safety_head import safety_head
from uwm_deploy.records.training import Trainer


@click.group(cls=InOrder)
def train() -> None:
    """Trains other systems of the field, or safety modules.

    They are trained on a calibration set, for `build` and `compare` (docs/how-to/training.md).

    \b
    Example:
      uwm-deploy train safe-clip --model demo --calibration demo --out trained
      uwm-deploy build --model trained
    """


_ABOVE_0 = click.FloatRange(0, min_open=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainFolders:
    """Where the trained model goes."""

    out: Path = option("--out", required=True, type=PATH, help="Folder for the result.")
    work: Path | None = option(
        "--work",
        type=PATH,
        help="Run folder; a run that was stopped goes on there. [default: .uwm/MODEL/train-METHOD]",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSource:
    """Which model, which data, where to."""

    model: ModelOptions
    data: DataOptions
    folders: TrainFolders
    device: DeviceOptions
    workers: WorkerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSettings:
    """What a user may change of the published settings."""

    epochs: int | None = option(
        "--epochs", type=click.IntRange(1), help="Most epochs. [default: the recipe's or published]"
    )
    batch: int | None = option(
        "--batch", type=click.IntRange(2), help="Quadruples per step. [default: the recipe's or published]"
    )
    rate: float | None = option(
        "--rate", type=_ABOVE_0, help="Learning rate of Adam. [default: the recipe's or published]"
    )
    rank: int | None = option(
        "--rank", type=click.IntRange(1), help="Rank of the adapters. [default: the recipe's or 16]"
    )
    alpha: float | None = option(
        "--alpha", type=_ABOVE_0, help="Weight of the adapters: alpha / rank. [default: the recipe's or 1]"
    )
    patience: int | None = option(
        "--patience",
        type=click.IntRange(1),
        help="Epochs without a better loss or recall before training ends. [default: 5]",
    )
    validation_share: float | None = option(
        "--validation-share",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Share of the set that is held out to choose the best epoch. [default: 0.125]",
    )
    best: str | None = option(
        "--best",
        type=click.Choice(["loss", "recall"]),
        help="What the best epoch is chosen by, on what is held out. [default: loss]",
    )
    precision: str | None = option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        help="Precision of the forward passes; weights stay float32. [default: fp32]",
    )
    seed: int | None = option("--seed", type=SEED, help="Seed of adapters and order. [default: 0]")


def _trained(method: Trainer, source: TrainSource, settings: PublishedSettings) -> Shown:
    from uwm_deploy.data.ranks import speaks
    from uwm_deploy.report.console import Reporter
    from uwm_deploy.training.trainer import TrainRequest, summary_of
    from uwm_deploy.training.trainer import train as run

    request = filled(TrainRequest, source, method=method, changed=dataclasses.asdict(settings))
    record = run(request, Reporter(quiet=not speaks()))
    if not speaks():
        return Shown()
    lines = [f"{name:<20} {value}" for name, value in {**summary_of(record), "trained model": request.out}.items()]
    return Shown(data=record, text=lines)


@train.command("safe-clip")
@takes_options
@prints
def safe_clip(source: TrainSource, settings: PublishedSettings) -> Shown:
    """Trains Safe-CLIP, with LoRA on both towers.

    Unsafe members go to their safe counterparts, safe ones stay. The frozen reference is a model of its own. A run that
    was stopped goes on after its last whole epoch. Several GPUs:
    `torchrun --standalone --nproc-per-node 8 -m uwm_deploy.cli train safe-clip ...`.

    \b
    Example:
      uwm-deploy train safe-clip --model demo --calibration demo --out trained/safe-clip
      uwm-deploy build --model trained/safe-clip
    """
    return _trained(Trainer.SAFE_CLIP, source, settings)


@train.command("safer-clip")
@takes_options
@prints
def safer_clip(source: TrainSource, settings: PublishedSettings) -> Shown:
    """Trains SafeR-CLIP, which goes to the nearest safe pair.

    Unsafe members go to the nearest safe caption and its image; easy pairs come first.

    \b
    Example:
      uwm-deploy train safer-clip --model demo --calibration demo --out trained/safer-clip
    """
    return _trained(Trainer.SAFER_CLIP, source, settings)


train.add_command(safety_head)
train.add_command(language_adapter)

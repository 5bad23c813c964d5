"""The whole pipeline, and one command for each stage of it."""

from __future__ import annotations

import click

from uwm_deploy.commands.fields import takes_options
from uwm_deploy.commands.options import OutputOptions
from uwm_deploy.commands.shown import Shown, prints
from uwm_deploy.commands.until import (
    UntilCompile,
    UntilEdit,
    UntilExport,
    UntilFit,
    UntilPackage,
    UntilScore,
    UntilVerify,
    run_until,
)


@click.command()
@takes_options
@prints
def build(asked: UntilPackage, outputs: OutputOptions) -> Shown:
    """Makes a proven bundle of a model: the whole pipeline.

    \b
    Example:
      uwm-deploy build --model demo
      uwm-deploy build --model demo --target onnxruntime --max-retrieval-loss 2 --out dist/demo-mild
    """
    return run_until("package", asked, outputs)


@click.command()
@takes_options
@prints
def score(asked: UntilScore) -> Shown:
    """Scores the weights on the calibration set.

    Scores are those of docs/background/methods.md (Eq. 8 to 10). A method that selects no entries has none.

    \b
    Example:
      uwm-deploy score --model demo --method uwm
    """
    return run_until("score", asked)


@click.command()
@takes_options
@prints
def fit(asked: UntilFit) -> Shown:
    """Sums up what a closed-form step is solved from.

    The sums are over the calibration set, after the step before. Without a closed-form step there is nothing to do.

    \b
    Example:
      uwm-deploy fit --model demo --method safety-axis
    """
    return run_until("fit", asked)


@click.command()
@takes_options
@prints
def edit(asked: UntilEdit) -> Shown:
    """Edits the model, and writes the edited model and a patch.

    Entries are selected (Eq. 11) and multiplied; a closed-form step is solved. Scores and sums are reused, so another
    --keep-mass, --factor or --max-retrieval-loss needs no second pass over the data.

    \b
    Example:
      uwm-deploy edit --model demo --method uwm --keep-mass 0.97
      uwm-deploy edit --model demo --method safety-axis --max-retrieval-loss 2
    """
    return run_until("edit", asked)


@click.command()
@takes_options
@prints
def export(asked: UntilExport) -> Shown:
    """Exports both towers to ONNX, and checks the edit there.

    \b
    Example:
      uwm-deploy export --model demo
    """
    return run_until("export", asked)


@click.command()
@takes_options
@prints
def compile(asked: UntilCompile) -> Shown:
    """Compiles the graphs for the targets.

    It says which engines this machine can run.

    \b
    Example:
      uwm-deploy compile --model demo --target onnxruntime --target tensorrt-rtx
    """
    return run_until("compile", asked)


@click.command()
@takes_options
@prints
def verify(asked: UntilVerify) -> Shown:
    """Measures the original, the edited model and every engine.

    It measures what this machine can execute: numbers, SafeGround, retrieval and zero-shot.

    \b
    Example:
      uwm-deploy verify --model demo --json
    """
    return run_until("verify", asked)

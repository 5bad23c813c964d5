"""After a build whose policy limits captions or pictures that nobody has measured yet: the commands that do it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.recipes.recipe import is_folder

_LLAVA = "llava"


def measure_next(outcome: Outcome) -> Iterator[str]:
    """Lines with the commands, and what comes after them; none where something else keeps the verdict from passing.

    Args:
        outcome: Of a build.
    """
    verdict, bundle = outcome.verdict, outcome.out
    if verdict is None or bundle is None or not verdict.only_outputs_block:
        return
    files = []
    for kind in verdict.waits_for:
        folder = f"{outcome.name}-{kind}"
        files.append(f"{folder}/{kind}.json")
        words = ["--model", _model(outcome, kind), "--tower", str(_tower(outcome, kind, bundle))]
        words += ["--on", outcome.run_plan.recipe.data.evaluation, "--out", folder]
        yield f"next: uwm-deploy downstream {kind} {shlex.join(words)}"
    if files:
        given = " ".join(f"--downstream {shlex.quote(file)}" for file in files)
        yield f"then: this build again, with {given}"


def _model(outcome: Outcome, kind: str) -> str:
    """Folder of the model behind the tower, as far as the recipe says it."""
    model = outcome.run_plan.recipe.model
    if kind == "draw":
        return "PIPELINE"
    if model.family != _LLAVA:
        return "LLAVA"
    return model.repo if is_folder(model.repo) else Path(model.repo).name


def _tower(outcome: Outcome, kind: str, bundle: Path) -> Path:
    """A bundle of another family than llava has no features for a language model; its run folder has the weights."""
    family = outcome.run_plan.recipe.model.family
    return bundle if kind == "draw" or family == _LLAVA else outcome.work

"""Runs a program of this package in a process of its own; its log, settings and result stay beside its output file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uwm_deploy.errors import ContractError, PrerequisiteError, RecipeError, UwmError
from uwm_deploy.graphs.engine_builder import FAILED, REFUSED

_KINDS = {kind.__name__: kind for kind in (ContractError, PrerequisiteError, RecipeError)}

BUILD_SECONDS = 1800
"""Time limit of a build."""


def made_by_child(
    module: str, spec: Mapping[str, Any], tool: str, stem: str, folder: Path, step: str = "build"
) -> dict[str, Any]:
    """Makes the file ``spec["engine"]``.

    Args:
        module: Module that is run, with the file of the settings as its argument.
        spec: Settings of the module; paths are relative to the folder.
        tool: Name of the library that makes the file, for messages.
        stem: Name of the tower, with which the names of the files beside the engine begin.
        folder: Folder of the engine.
        step: The step as a verb, for messages and file names.

    Returns:
        The result that the child wrote.

    Raises:
        RecipeError: If the library lacks a setting that the recipe asks for.
        PrerequisiteError: If the library does not work here.
        ContractError: If the library refuses the graph, or the child takes too long.
        UwmError: If the child died.
    """
    (folder / f"{stem}.{step}.json").write_text(json.dumps(spec, indent=1, sort_keys=True), encoding="utf-8")
    command = [sys.executable, "-m", module, f"{stem}.{step}.json"]
    package_root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package_root), os.environ.get("PYTHONPATH", "")])}
    with (folder / f"{stem}.{step}.log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=folder, stdout=log, stderr=log, timeout=BUILD_SECONDS, check=False, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise ContractError(
                f"{tool} {step} of {stem} took over {BUILD_SECONDS} s", fix="use a smaller profile"
            ) from error
    result = folder / f"{stem}.{step}.result.json"
    file = str(spec["engine"])
    (folder / f".tmp-{file}").unlink(missing_ok=True)
    body: Mapping[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    lines = (folder / f"{stem}.{step}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if done.returncode == REFUSED:
        what = f"{tool} {step} of {stem}: {body.get('error', '')[:400]}"
        raise _KINDS.get(str(body.get("kind")), UwmError)(what, fix=str(body.get("fix", "")))
    if done.returncode == FAILED:
        raise ContractError(f"{tool} cannot {step} {stem}: {body.get('error', '')[:400]}", fix="see its log")
    if done.returncode != 0 or not body or not (folder / file).is_file():
        last = lines[-1][:300] if lines else "no log"
        raise UwmError(f"the {tool} {step} of {stem} ended with status {done.returncode}: {last}", fix="run it again")
    return dict(body)

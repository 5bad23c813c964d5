"""Runs a program of this package in a process of its own; its log, settings and result stay beside its output file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uwm_deploy.errors import ContractError, IntegrityError, PrerequisiteError, RecipeError, UnreadableError, UwmError
from uwm_deploy.graphs.engine_builder import FAILED, REFUSED
from uwm_deploy.records.machine import failure_of_machine
from uwm_deploy.records.plain_json import value_from_json

_RAISED = (ContractError, IntegrityError, PrerequisiteError, RecipeError, UnreadableError)
_KINDS = {kind.__name__: kind for kind in _RAISED}

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
        IntegrityError: If a file that it was given is broken.
        UwmError: If the child died.
    """
    (folder / f"{stem}.{step}.json").write_text(json.dumps(spec, indent=1, sort_keys=True), encoding="utf-8")
    command = [sys.executable, "-P", "-m", module, f"{stem}.{step}.json"]
    package_root = Path(__file__).resolve().parents[2]
    # An empty part would be the folder the child runs in, whose files are no modules.
    found = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package_root), *found])}
    with (folder / f"{stem}.{step}.log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=folder, stdout=log, stderr=log, timeout=BUILD_SECONDS, check=False, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise ContractError(
                f"{tool} {step} of {stem} took over {BUILD_SECONDS} s", fix="use a smaller profile"
            ) from error
    file = str(spec["engine"])
    (folder / f".tmp-{file}").unlink(missing_ok=True)
    body = _result(folder / f"{stem}.{step}.result.json")
    lines = (folder / f"{stem}.{step}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if done.returncode == REFUSED and body:
        what = f"{tool} {step} of {stem}: {body.get('error', '')[:400]}"
        raise _KINDS.get(str(body.get("kind")), UwmError)(what, fix=str(body.get("fix", "")))
    if done.returncode == FAILED and body:
        raise ContractError(f"{tool} cannot {step} {stem}: {body.get('error', '')[:400]}", fix="see its log")
    if done.returncode != 0 or not body or not (folder / file).is_file():
        raise _ended(f"the {tool} {step} of {stem}", done.returncode, lines, result=bool(body))
    return dict(body)


def _result(path: Path) -> dict[str, Any]:
    """What the child wrote; empty where it could not write it to its end."""
    try:
        body = value_from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _ended(what: str, status: int, lines: list[str], *, result: bool) -> UwmError:
    """Why there is nothing: the machine failed, which the log's last line or the status says, or the child died."""
    last = lines[-1][:300] if lines else "no log"
    if failure := failure_of_machine(RuntimeError(last)):
        return PrerequisiteError(f"{what}: {failure.what}", fix=failure.fix)
    if status == -signal.SIGKILL:
        return PrerequisiteError(f"{what} was killed: is there enough memory?", fix="use a smaller profile")
    if status in (0, FAILED, REFUSED) and not result:
        return PrerequisiteError(
            f"{what} could not write its result", fix="free space, raise the limits of the process"
        )
    return UwmError(f"{what} ended with status {status}: {last}", fix="run it again")

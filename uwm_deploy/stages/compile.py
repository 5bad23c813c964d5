"""Stage `compile`: an ONNX graph to an engine for one target, with what was achieved read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from uwm_deploy.errors import ContractError, IntegrityError, PrerequisiteError, UwmError
from uwm_deploy.graphs.engine_builder import FAILED
from uwm_deploy.graphs.fingerprint import digest_of_onnx, fingerprint_by_value
from uwm_deploy.records import EngineArtifact, LayerEdit, OnnxArtifact, Profile, Target
from uwm_deploy.runtime.session import missing_package, usable
from uwm_deploy.runtime.tensorrt import MODULES, device_name
from uwm_deploy.workspace import digest_of_file

BUILD_SECONDS = 1800
"""A build that takes longer is stopped."""


def engine_from_onnx(
    graph: OnnxArtifact,
    onnx_folder: Path,
    target: Target,
    profile: Profile,
    edits: Sequence[LayerEdit],
    folder: Path,
) -> EngineArtifact:
    """Compiles one tower in float32.

    Args:
        graph: The exported graph.
        onnx_folder: Where its files are.
        target: What for.
        profile: Batches it must accept.
        edits: Edited layers of this tower, looked up again in what can be read.
        folder: Where the engine goes.

    Raises:
        PrerequisiteError: If the target's package is missing.
        IntegrityError: If the graph's files are not those its record describes.
        ContractError: If the build fails, loses the edit, or is not in the precision asked for.
    """
    if reason := missing_package(target):
        raise PrerequisiteError(f"{target.value}: {reason}", fix=f"pip install 'uwm-deploy[{target.value}]'")
    _check_source(graph, onnx_folder)
    source = onnx_folder / graph.file
    if target is Target.ONNXRUNTIME:
        file, details = _onnxruntime(graph, source, edits, folder)
    else:
        file, details = _tensorrt(graph, source, target, profile, folder)
    runnable = not usable(target)
    return EngineArtifact(
        variant=f"{target.value}-fp32",
        tower=graph.tower,
        target=target,
        precision="fp32",
        file=file,
        digest=digest_of_file(folder / file),
        onnx_digest=graph.digest,
        weights_digest=graph.weights_digest,
        inputs=graph.inputs,
        outputs=graph.outputs,
        profile=profile,
        normalised=graph.normalised,
        settings=details["settings"],
        versions=details["versions"],
        built_on="cpu" if target is Target.ONNXRUNTIME else device_name() if runnable else "ahead of time",
        runnable=runnable,
        seconds=details["seconds"],
        peak_rss_bytes=details["peak_rss_bytes"],
    )


def _check_source(graph: OnnxArtifact, folder: Path) -> None:
    """Nothing is compiled from bytes that export did not promise."""
    path = folder / graph.file
    files = [path, *([folder / graph.external_data] if graph.external_data else [])]
    if any(not file.is_file() or file.is_symlink() for file in files):
        raise IntegrityError(f"{graph.file} is not complete in {folder.name}/", fix="export again")
    if digest_of_onnx(path, graph.external_data) != graph.digest:
        raise IntegrityError(f"{graph.file} is not the file its record describes", fix="export again")


def _onnxruntime(
    graph: OnnxArtifact, source: Path, edits: Sequence[LayerEdit], folder: Path
) -> tuple[str, dict[str, Any]]:
    """The optimised graph, its precision and the edit read back from it."""
    stem, file = graph.tower.value, f"{graph.tower.value}.onnx"
    external = f"{file}.data" if graph.external_data else ""
    spec = {
        "module": "onnxruntime",
        "onnx": os.path.relpath(source, folder),
        "engine": file,
        "external_data": external,
    }
    details = _built(spec, Target.ONNXRUNTIME, stem, folder)
    proto = onnx.load(str(folder / file))
    arrays = list(_weights(proto))
    kinds = {array.dtype for array in arrays if array.ndim == 2 and np.issubdtype(array.dtype, np.floating)}
    if kinds != {np.dtype(np.float32)}:
        raise ContractError(
            f"{file} holds weights of {sorted(str(k) for k in kinds)}", fix="ask for the precision it has"
        )
    found = fingerprint_by_value(arrays, edits)
    if found.mismatches:
        raise ContractError(f"the edit was lost in {file}: {'; '.join(found.mismatches[:3])}", fix="report this")
    details["settings"] |= {"nodes": str(len(proto.graph.node)), "edited_layers": str(found.layers)}
    return file, details


def _weights(proto: onnx.ModelProto) -> Iterator[np.ndarray]:
    for initializer in proto.graph.initializer:
        yield onnx.numpy_helper.to_array(initializer)


def _tensorrt(
    graph: OnnxArtifact, source: Path, target: Target, profile: Profile, folder: Path
) -> tuple[str, dict[str, Any]]:
    """An engine in float32."""
    stem, file = graph.tower.value, f"{graph.tower.value}.engine"
    spec = {
        "module": MODULES[target],
        "onnx": os.path.relpath(source, folder),
        "engine": file,
        "input": graph.inputs[0].name,
        "shape": list(graph.inputs[0].shape[1:]),
        "profile": [profile.min, profile.opt, profile.max],
    }
    body = _built(spec, target, stem, folder)
    if body["settings"]["output_types"] != "FLOAT" or body["settings"]["tf32"] != "false":
        raise ContractError(f"{target.value} built {stem} as {body['settings']}, not float32", fix="report this")
    return file, body


def _built(spec: Mapping[str, Any], target: Target, stem: str, folder: Path) -> dict[str, Any]:
    """Builds in a child process; log, settings and result stay beside the engine."""
    (folder / f"{stem}.build.json").write_text(json.dumps(spec, indent=1, sort_keys=True), encoding="utf-8")
    command = [sys.executable, "-m", "uwm_deploy.graphs.engine_builder", f"{stem}.build.json"]
    package_root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package_root), os.environ.get("PYTHONPATH", "")])}
    with (folder / f"{stem}.build.log").open("w") as log:
        try:
            done = subprocess.run(
                command, cwd=folder, stdout=log, stderr=log, timeout=BUILD_SECONDS, check=False, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise ContractError(
                f"{target.value} build of {stem} took over {BUILD_SECONDS} s", fix="use a smaller profile"
            ) from error
    return _result(folder, stem, str(spec["engine"]), target, done.returncode)


def _result(folder: Path, stem: str, file: str, target: Target, status: int) -> dict[str, Any]:
    """What the child achieved, or its reason as an error."""
    result = folder / f"{stem}.build.result.json"
    (folder / f".tmp-{file}").unlink(missing_ok=True)
    body: Mapping[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    log = (folder / f"{stem}.build.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if status == FAILED:
        raise ContractError(f"{target.value} cannot build {stem}: {body.get('error', '')[:400]}", fix="see its log")
    if status != 0 or not body or not (folder / file).is_file():
        last = log[-1][:300] if log else "no log"
        raise UwmError(f"the {target.value} build of {stem} ended with status {status}: {last}", fix="run it again")
    return dict(body)

"""What `inspect`, `models` and `doctor` say; reads only, and needs the base install only."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from uwm_deploy import __version__
from uwm_deploy.errors import InputError
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.edit import EditKind, EditRecord
from uwm_deploy.records.graph import Precision, Provider, Target
from uwm_deploy.records.head import SafetyHead
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.report.findings import result_words
from uwm_deploy.runtime.machine import gpus, processor

_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "open_clip_torch",
    "onnx",
    "onnxscript",
    "polygraphy",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "cuda-bindings",
)


def describe(path: Path) -> dict[str, Any]:
    """Plain description of a bundle folder, a safetensors file, or one of the project's JSON files.

    Raises:
        InputError: If there is no such thing.
        IntegrityError: If a bundle's digests do not match.
    """
    if path.is_dir():
        return _describe_bundle(path)
    if path.suffix == ".safetensors" and path.is_file():
        return _describe_safetensors(path)
    if path.suffix == ".json" and path.is_file():
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}", fix="pass a file of a bundle or a run folder") from error
        return body if isinstance(body, dict) else {"content": body}
    raise InputError(f"{path} is neither a bundle, a .json nor a .safetensors file", fix="check the path")


def _describe_bundle(path: Path) -> dict[str, Any]:
    from uwm_deploy.bundle.open import open_bundle
    from uwm_deploy.bundle.signature import SIGNATURE

    manifest = open_bundle(path, allow_failed=True).manifest
    verdict = manifest.verdict
    return {
        "bundle": manifest.name,
        "bundle version": manifest.bundle_version,
        "signature": "there, not verified" if (path / SIGNATURE).exists() else "none",
        "verdict": result_words(verdict),
        "safer": f"{'shown' if verdict.safer.shown else 'not shown'}: {verdict.safer.reason}",
        "faithful": ", ".join(verdict.faithful) or "none",
        "proven": ", ".join(verdict.proven) or "none",
        "unproven": ", ".join(verdict.unproven) or "none",
        "policy": f"{verdict.policy} {verdict.policy_digest[:19]}",
        "model": f"{manifest.model.family} {manifest.model.repo} {manifest.model.revision}".strip(),
        "original weights": manifest.model.weights_digest,
        "edited weights": manifest.edit.edited_weights_digest,
        "method": method_line(manifest.edit),
        **_training_line(path),
        "edited entries": entries_line(manifest.edit),
        "embedding spaces": dict(manifest.spaces),
        "calibration": f"{manifest.calibration.name}, {manifest.calibration.n} quadruples",
        "safety head": head_line(manifest.head),
        "created": f"{manifest.created} by uwm-deploy {manifest.tool_version}",
        "versions": dict(manifest.versions),
        "files": [f"{f.digest[7:19]}  {f.size_bytes:>10}  {f.path}" for f in manifest.files],
    }


def head_line(head: SafetyHead | None) -> str:
    """A safety head in words."""
    if head is None:
        return "none"
    limits = ", ".join(f"{action} from {limit:.4f}" for action, limit in head.thresholds.items())
    concepts = ", ".join(head.categories[1:])
    return f"{limits}; trained on {head.training.pairs} pairs of {head.training.data.name} ({concepts})"


def _training_line(path: Path) -> dict[str, str]:
    file = path / "reports" / "training.json"
    if not file.is_file():
        return {}
    training = record_from_json(TrainingRecord, file.read_bytes(), where=file.name)
    best = f"best of {len(training.epochs)} epochs: {training.best_epoch}"
    data = f"{training.n_training} quadruples of {training.calibration.name}"
    return {"trained by": f"{training.settings.method.value} from {training.base.name}, {data}, {best}"}


def method_line(edit: EditRecord) -> str:
    """How an edit was made, in words; a setting that differs between the towers is given for each."""
    step = edit.first

    def of(key: str) -> str:
        values = {tower: str(getattr(setting, key)) for tower, setting in step.settings.items()}
        if len(set(values.values())) == 1:
            return f"{key} {next(iter(values.values()))}"
        return f"{key} {', '.join(f'{value} ({tower})' for tower, value in values.items())}"

    words = [edit.method, *(of(key) for key in ("selection", "keep_mass", "factor") if step.settings)]
    words += [f"union of {len(step.concepts)} concepts"] if step.concepts else []
    closed = edit.closed_form
    if closed is not None and closed.axis is not None:
        setting = closed.axis.setting
        words += [f"placement {closed.axis.placement.value}", *([axis_words(setting)] if setting else [])]
    return "; ".join(words)


def axis_words(setting: AxisSetting) -> str:
    """A strength as it is written on the command line; what has a default is left out where it has it."""
    fields = {f.name: f.default for f in dataclasses.fields(setting)}
    values = {key: value for key, value in dataclasses.asdict(setting).items() if value != fields[key]}
    return "axis " + ",".join(f"{key}={value:g}" for key, value in values.items())


def entries_line(edit: EditRecord) -> str:
    """What an edit changed, in words: multiplied or trained entries, and tensors that were replaced or are new."""
    touched = [t for t in edit.tensors if t.kind in (EditKind.MULTIPLIED, EditKind.TRAINED)]
    entries = sum(math.prod(t.shape) for t in touched)
    whole = [t.name for t in edit.tensors if t.kind in (EditKind.REPLACED, EditKind.ADDED)]
    words = [f"{sum(t.selected for t in touched)} of {entries} entries in {len(touched)} tensors"] if touched else []
    return "; ".join([*words, *([f"{', '.join(whole)} solved"] if whole else [])])


def _describe_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 -- not a mapping
            return {
                "metadata": dict(file.metadata() or {}),
                "tensors": {key: f"{part.get_dtype()} {tuple(part.get_shape())}" for key, part in tensors.items()},
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}", fix="restore the file") from error


def recipe_rows() -> list[dict[str, Any]]:
    """One row per shipped recipe."""
    rows = []
    for name in resources.names("export"):
        text, where = resources.read_toml("export", name)
        recipe = recipe_from_toml(text, where=where)
        rows.append(
            {
                "name": name,
                "family": recipe.model.family,
                "parameters": recipe.model.parameters,
                "licence": recipe.model.licence,
                "method": recipe.method,
                "edited text layers": ", ".join(recipe.entries.text.layers),
                "edited image layers": ", ".join(recipe.entries.image.layers),
                "keep_mass": f"{recipe.entries.text.keep_mass} / {recipe.entries.image.keep_mass}",
            }
        )
    return rows


def machine_rows() -> list[dict[str, Any]]:
    """What this machine has, and what a build here would run."""
    rows = [
        _row("uwm-deploy", True, __version__),
        _row("python", True, platform.python_version()),
        _row("cpu", True, f"{os.cpu_count()} cores, {processor()}"),
        _gpu_row(),
    ]
    for package in _PACKAGES:
        try:
            rows.append(_row(package, True, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append(_row(package, False, "not installed"))
    rows += [_target_row(target) for target in Target]
    return rows + _precision_rows() + _gpu_only_rows()


def _row(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"what": name, "ok": "yes" if ok else "no", "detail": detail}


def _gpu_row() -> dict[str, Any]:
    lines, reason = gpus("name,compute_cap,driver_version")
    return _row("gpu", bool(lines), "; ".join(lines) or reason)


def _target_row(target: Target) -> dict[str, Any]:
    from uwm_deploy.runtime.session import usable

    module = {Target.ONNXRUNTIME: "onnxruntime", Target.TENSORRT: "tensorrt", Target.TENSORRT_RTX: "tensorrt_rtx"}
    if find_spec(module[target]) is None:
        return _row(
            f"target {target.value}", False, f"not compiled, not run: package {module[target]} is not installed"
        )
    reason = usable(target)
    if not reason:
        return _row(f"target {target.value}", True, "compiled and run")
    return _row(f"target {target.value}", False, f"{_compiled(target)}, not run: {reason}")


def _compiled(target: Target) -> str:
    """What becomes of a target whose engines cannot be executed here; only one compiles without a GPU."""
    if target is Target.TENSORRT_RTX and find_spec("tensorrt_rtx") is not None:
        return "compiled ahead of time"
    return "not compiled"


def _precision_rows() -> list[dict[str, Any]]:
    """Every precision of every target: executed here or not run, and why."""
    from uwm_deploy.runtime.probe import PROBED, reason_not_executed
    from uwm_deploy.runtime.session import missing_package, usable

    rows = []
    for target in Target:
        reason = usable(target)
        for precision in PROBED:
            if target is Target.ONNXRUNTIME:
                why = missing_package(target) or reason_not_executed(precision)
                ok, detail = not why, _ON_CPU.get(precision, "run on the CPU") if not why else f"not run: {why}"
            else:
                ok = not reason
                detail = f"{_compiled(target)}, not run: {reason}" if reason else "compiled and run"
            rows.append(_row(f"{target.value} {precision.value}", ok, detail))
    return rows


_ON_CPU = {
    Precision.FP16: "run on the CPU, which may compute in float32",
    Precision.FP8: "run on the CPU, computed in float32",
}
"""What is executed but is not what its name says; docs/precision.md."""


def _gpu_only_rows() -> list[dict[str, Any]]:
    """What needs a GPU whatever the precision."""
    from uwm_deploy.runtime.providers import provider_reason
    from uwm_deploy.runtime.session import missing_package, usable
    from uwm_deploy.runtime.tensorrt import MODULES

    rows = [
        _row(f"{target.value} refit", not reason, f"not run: {reason}" if reason else "run")
        for target in MODULES
        for reason in (usable(target),)
    ]
    shown: dict[Provider, str] = {"cuda": "CUDA", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
    for provider, name in shown.items():
        reason = missing_package(Target.ONNXRUNTIME) or provider_reason(provider)
        rows.append(
            _row(f"onnxruntime {name} provider", not reason, f"not run: {reason}" if reason else "can be opened")
        )
    return rows

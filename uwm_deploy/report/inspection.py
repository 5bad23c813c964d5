"""Reads what `inspect` and `models` show; needs the base install only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import is_bundle, open_bundle
from uwm_deploy.errors import InputError, unreadable
from uwm_deploy.recipes import shipped
from uwm_deploy.recipes.recipe import Recipe, recipe_from_toml
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.records.tensor_file import open_tensors
from uwm_deploy.records.training import TrainingRecord
from uwm_deploy.report.bundle_words import described_bundle


def describe(path: Path) -> dict[str, Any]:
    """Plain description of a bundle folder, a safetensors file, or one of the project's JSON files.

    Raises:
        InputError: If there is no such thing.
        IntegrityError: If a bundle's digests do not match.
    """
    if path.is_dir() or is_bundle(path):
        return _describe_bundle(path)
    if path.suffix == ".safetensors" and path.is_file():
        return _describe_safetensors(path)
    if path.suffix == ".json" and path.is_file():
        try:
            body = value_from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise unreadable(str(path), error, fix="check the path", kind=InputError) from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}", fix="pass a file of a bundle or a run folder") from error
        return body if isinstance(body, dict) else {"content": body}
    raise InputError(f"{path} is neither a bundle, a .json nor a .safetensors file", fix="check the path")


def _describe_bundle(path: Path) -> dict[str, Any]:
    bundle, name = open_bundle(path, allow_failed=True), BundleLayout.TRAINING
    listed = any(file.path == name for file in bundle.manifest.files)
    training = record_from_json(TrainingRecord, bundle.read(name), where=name) if listed else None
    return described_bundle(bundle.manifest, signed=bundle.signature is not None, training=training)


def _describe_safetensors(path: Path) -> dict[str, Any]:
    said, fix = "is not a whole safetensors file", "restore the file"
    with open_tensors(path, framework="numpy", name=str(path), said=said, fix=fix) as file:
        tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 -- not a mapping
        return {
            "metadata": dict(sorted((file.metadata() or {}).items())),  # the file keeps no order
            "tensors": {key: f"{part.get_dtype()} {tuple(part.get_shape())}" for key, part in tensors.items()},
        }


def shipped_recipes() -> dict[str, Recipe]:
    """Name to recipe, of all that the package ships."""
    found = {}
    for name in shipped.names("export"):
        text, where = shipped.read_toml("export", name)
        found[name] = recipe_from_toml(text, where=where)
    return found

"""From what a user names to a recipe, a data set or a policy: a shipped name, a file, or a checkpoint folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from uwm_deploy.errors import InputError, RecipeError, unreadable
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.built import text_of_built
from uwm_deploy.recipes.data_set import CalibrationSet, calibration_set_from_toml
from uwm_deploy.recipes.policy import Policy, policy_from_toml
from uwm_deploy.recipes.recipe import Recipe, data_in_folder, in_folder, recipe_from_toml
from uwm_deploy.recipes.unknown_name import files_inside
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.files import (
    digest_of_plain,
)
from uwm_deploy.records.model import LOCAL, Digest
from uwm_deploy.records.names import segment_of
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.records.training import TrainingRecord


def recipe_of(model: str) -> tuple[Recipe, str]:
    """Recipe and its text, by shipped name, TOML path, or checkpoint folder; a folder of such a name goes by ``./NAME``."""
    if Path(model).is_dir() and model not in resources.names("export"):
        training = read_training(Path(model))
        return _recipe_of_trained(Path(model), training) if training else _recipe_of_folder(Path(model))
    text, where = resources.read_toml("export", model)
    recipe = recipe_from_toml(text, where=where)
    _check_name(recipe.name, where)
    if where == model:  # a file, not a shipped name
        recipe = dataclasses.replace(
            recipe,
            model=in_folder(recipe.model, Path(where).resolve().parent),
            data=data_in_folder(recipe.data, Path(where).parent),
        )
    return recipe, text


def _check_name(name: str, where: str) -> None:
    """Reports, run folders and bundles show the name alone, so no file may go by the name of another.

    Raises:
        RecipeError: If it is not the file's.
    """
    if (stem := Path(where).stem) != name:
        raise RecipeError(
            f"{where}: name is {name!r}, the file is {stem}.toml", fix=f'write name = "{stem}", or rename the file'
        )


_RULES_OF = {"clip": "clip-vit-b32", "siglip": "siglip-base", "open_clip": "open-clip-vit-b32"}
"""Recipe whose rules a checkpoint folder gets, by the type in its config."""

_RULES_OF_CUSTOM = "coca-vit-l14"
"""The same for a folder in open_clip's layout whose text tower is a module of its own, as CoCa's is."""


def _recipe_of_folder(folder: Path) -> tuple[Recipe, str]:
    """Any CLIP-like checkpoint: the family is read from its config."""
    text, where = resources.read_toml("export", _rules_of(folder))
    recipe = recipe_from_toml(text, where=where)
    source = dataclasses.replace(
        recipe.model, repo=str(folder.resolve()), revision="", licence="unknown", parameters="", architecture=None
    )
    recipe = dataclasses.replace(recipe, name=segment_of(folder.resolve().name), model=source)
    return recipe, f"# The rules of {where} on a checkpoint folder.\n{text_of_built(text, recipe)}"


def _rules_of(folder: Path) -> str:
    """Name of the shipped recipe whose rules fit a folder.

    Raises:
        InputError: If its config cannot be read, or is of a type that is not known.
    """
    if (folder / "open_clip_config.json").is_file():
        model = _json_of(folder, "open_clip_config.json").get("model_cfg")
        custom = isinstance(model, dict) and ("multimodal_cfg" in model or model.get("custom_text"))
        return _RULES_OF_CUSTOM if custom else _RULES_OF["open_clip"]
    kind = _json_of(folder, "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in _RULES_OF:
        raise InputError(f"checkpoint {folder} is of type {kind!r}", fix=f"known types: {', '.join(_RULES_OF)}")
    return _RULES_OF[kind]


_NO_CHECKPOINT = "pass a Hugging Face checkpoint folder or a recipe"


def _json_of(folder: Path, name: str) -> dict[str, Any]:
    try:
        body = value_from_json((folder / name).read_bytes())
    except OSError as error:
        inside = files_inside(folder, "recipe")
        fix = f"pass a recipe's file in it: {', '.join(inside)}" if inside else _NO_CHECKPOINT
        raise unreadable(f"{folder}/{name}", error, fix=fix, kind=InputError) from error
    except ValueError as error:
        raise InputError(f"{folder}/{name} is not JSON of a model", fix="fetch the checkpoint again") from error
    if not isinstance(body, dict):
        raise InputError(f"{folder}/{name} is not JSON of a model", fix="fetch the checkpoint again")
    return body


def _recipe_of_trained(folder: Path, training: TrainingRecord) -> tuple[Recipe, str]:
    """A model that `train` made: the recipe of its base, which is what it is compared with."""
    name, base = segment_of(folder.resolve().name), recipe_from_toml(training.recipe, where=TRAINING)
    known = training.base.repo != LOCAL  # a folder's path is in no record
    source = dataclasses.replace(
        base.model,
        repo=str(folder.resolve()),
        revision="",
        architecture=None,
        base=base.model.repo if known else "",
        base_revision=training.base.revision if known else "",
    )
    data = dataclasses.replace(base.data, calibration=_set_of(base.data.calibration, training.calibration.name))
    text = f"# {name}: weights trained by {training.settings.method.value} from what follows\n{training.recipe}"
    return dataclasses.replace(base, name=name, model=source, data=data), text


def _set_of(named: str, trained_on: str) -> str:
    """How to name the set of a training, of which the record has the name only: a path gets into no record.

    Args:
        named: The calibration set of the base's recipe, by shipped name or file.
        trained_on: Name of the set of the training.
    """
    if Path(named).name.removesuffix(".toml") == trained_on:
        return named
    return trained_on if trained_on in resources.names("calibration") else f"{trained_on}.toml"


TRAINING = "training.json"
"""Record beside the weights of a model that `train` made."""


def read_training(folder: Path) -> TrainingRecord | None:
    """Record of a trained model; None when the folder holds none.

    Raises:
        IntegrityError: If the record is damaged.
    """
    file = folder / TRAINING
    return read_record(TrainingRecord, file) if file.is_file() else None


def policy_of(name: str) -> tuple[Policy, Digest]:
    """Policy and the digest of its text."""
    text, where = resources.read_toml("ci", name)
    policy = policy_from_toml(text, where=where)
    _check_name(policy.name, where)
    return policy, digest_of_plain(text)


def calibration_set_of(name: str) -> tuple[CalibrationSet, str, Path | None]:
    """Data set definition, its text, and the folder its relative paths start from."""
    text, where = resources.read_toml("calibration", name)
    base = Path(name).resolve().parent if name.endswith(".toml") else None
    return calibration_set_from_toml(text, where=where), text, base

"""What `uwm-deploy save` does: the edited model of a run folder in the layout of another library, weights checked first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout, RunFolder
from uwm_deploy.bundle.open import is_bundle
from uwm_deploy.errors import InputError, IntegrityError, UwmError
from uwm_deploy.pipeline.reach import check_reaches_diffusion
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.files import whole_folder
from uwm_deploy.records.model import Digest
from uwm_deploy.report.card import CARD
from uwm_deploy.stages.edit.edit import MODEL, RECORD
from uwm_deploy.towers.formats import LAYOUTS, LibraryLayout, write_layout
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel

_LIBRARY: dict[LibraryLayout, str] = {
    "transformers": "transformers", "open-clip": "open_clip", "sentence-transformers": "sentence-transformers",
    "diffusers-text-encoder": "diffusers",
}  # fmt: skip
"""Name by which the hub knows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What was written.

    Attributes:
        out: Folder.
        layout: Whose layout it has.
        weights: Digest of the edited weights, which were checked before.
    """

    out: str
    layout: LibraryLayout
    weights: Digest


def save_as(path: Path, layout: LibraryLayout, out: Path) -> Saved:
    """Writes an edited model for another library, whole or not at all.

    Args:
        path: Run folder, its folder `edit`, or `edit/model`.
        layout: Whose layout.
        out: New folder.

    Raises:
        InputError: If there is no edited model, it cannot be had in that layout, or `out` exists.
        IntegrityError: If the saved weights are not those that the edit made.
    """
    assert layout in LAYOUTS
    folder, record = edited_at(path)
    if out.exists():
        raise InputError(f"{out} exists", fix="choose another --out")
    if layout == "diffusers-text-encoder":
        check_reaches_diffusion(record)
    model = checked_model(folder, record)
    with whole_folder(out) as place:
        write_layout(model, folder, layout, place)
        if (told := _card_of(folder)).is_file():
            card = told.read_text(encoding="utf-8")
            named = re.sub(r"(?m)^library_name: .*$", f"library_name: {_LIBRARY[layout]}", card, count=1)
            (place / CARD).write_text(named, encoding="utf-8")
    return Saved(out=str(out), layout=layout, weights=record.edited_weights_digest)


def _card_of(model: Path) -> Path:
    """The card with the numbers, where the run measured and packaged this edit; else the one beside the model."""
    run = RunFolder(model.parent.parent)
    own = model / BundleLayout.CARD
    try:
        packaged, edit = read_record(Manifest, run.packaged), read_record(EditRecord, run.edit_record)
    except UwmError:
        return own
    same = packaged.edit.edited_weights_digest == edit.edited_weights_digest
    return run.packaged.with_name(BundleLayout.CARD) if same else own


def checked_model(folder: Path, record: EditRecord, device: str = "cpu") -> LoadedModel:
    """A saved edited model whose weights are those that the edit made.

    Raises:
        IntegrityError: If they are not.
    """
    recipe, _ = recipe_of(str(folder))
    model = load_model(recipe, folder=folder, device=device)
    if model.ref.weights_digest != record.edited_weights_digest:
        raise IntegrityError(f"the weights in {folder} are not those that the edit made", fix="edit again")
    return model


def edited_at(path: Path) -> tuple[Path, EditRecord]:
    """The saved edited model at a path, and the record of the edit.

    Args:
        path: Run folder, its folder `edit`, or `edit/model`.

    Raises:
        InputError: If there is none.
    """
    if is_bundle(path):
        raise InputError(f"{path} is a bundle, which holds graphs and no model", fix="pass the run folder (.uwm/MODEL)")
    found = next(
        (p for p in (path / "edit", path, path.parent) if (p / RECORD).is_file() and (p / MODEL).is_dir()), None
    )
    if found is None:
        raise InputError(f"{path} holds no edited model with its {RECORD}", fix="pass the run folder (.uwm/MODEL)")
    return found / MODEL, read_record(EditRecord, found / RECORD)

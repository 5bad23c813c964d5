"""The edited tower that is put into the place of a model's own: of a run folder, a bundle or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uwm_deploy.bundle.head import digest_of_head
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle, is_bundle, open_bundle
from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.save import checked_model, edited_at
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.downstream import EditedTower
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.head import SafetyHead
from uwm_deploy.records.model import Digest
from uwm_deploy.towers.load import load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedAt:
    """Where an edited tower is.

    Attributes:
        path: As the user named it.
        source: What it is.
        model: Folder of the saved model; None for a bundle.
        record: Of the edit; None for a checkpoint that comes without one.
        head: Safety head of a bundle that has one.
        patch: The edit of a bundle, as a patch of the weights before it.
        bundle: What was opened.
    """

    path: Path
    source: Literal["run", "bundle", "checkpoint"]
    model: Path | None
    record: EditRecord | None
    head: SafetyHead | None = None
    patch: Patch | None = None
    bundle: Bundle | None = None

    def told(self, *, variant: str = "", changed: int = 0, adapter_digest: Digest = "") -> EditedTower:
        """What a report says of it; its weights are checked to be those that the edit made.

        Raises:
            IntegrityError: If they are not.
        """
        if self.model is None:
            assert self.record is not None
            digest = self.record.edited_weights_digest
        elif self.record is not None:
            digest = checked_model(self.model, self.record).ref.weights_digest
        else:
            digest = load_model(recipe_of(str(self.model))[0], folder=self.model, device="cpu").ref.weights_digest
        return EditedTower(
            source=self.source,
            name=self.path.resolve().name,
            method=self.record.method if self.record else "",
            weights_digest=digest,
            variant=variant,
            changed=changed,
            head_digest=digest_of_head(self.head) if self.head else "",
            adapter_digest=adapter_digest,
        )


def edited_tower_at(path: Path, *, public_key: Path | None = None, min_bundle_version: int = 0) -> EditedAt:
    """What lies at a path.

    Args:
        path: Bundle, run folder, its `edit` or `edit/model`, or a checkpoint of CLIP, such as Safe-CLIP's.
        public_key: Whose signature it must have, which only a bundle can.
        min_bundle_version: Oldest version a bundle may have.

    Raises:
        InputError: If it is none of these, or a signature is asked of what has none.
        IntegrityError: If a bundle was changed, is not signed by that key, or is too old.
    """
    if is_bundle(path):
        bundle = open_bundle(path, to_measure=True, public_key=public_key, min_bundle_version=min_bundle_version)
        return EditedAt(
            path=path,
            source="bundle",
            model=None,
            record=bundle.manifest.edit,
            head=bundle.manifest.head,
            patch=Patch.from_bytes(bundle.read(BundleLayout.PATCH), BundleLayout.PATCH),
            bundle=bundle,
        )
    if public_key is not None or min_bundle_version:
        raise InputError(f"{path} is no bundle, so it has neither signature nor version", fix="pass the bundle")
    try:
        model, record = edited_at(path)
    except InputError:
        if not (path / "config.json").is_file():
            raise
        return EditedAt(path=path, source="checkpoint", model=path, record=None)
    return EditedAt(path=path, source="run", model=model, record=record)

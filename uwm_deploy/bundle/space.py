"""Which embedding space a variant of a bundle embeds into: embeddings may be compared only where the id is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from uwm_deploy.errors import InputError
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.edit import EditRecord, Placement
from uwm_deploy.records.files import digest_of_plain
from uwm_deploy.records.graph import EngineArtifact, Precision
from uwm_deploy.records.model import Digest, TowerName

SpaceId = str
"""``space:`` and a digest."""

_FORMAT = 1


def spaces_of(manifest: Manifest) -> dict[str, SpaceId]:
    """Variant to the id of its space, for every variant; the manifest's own `spaces` are not read."""
    return {variant: space_of(manifest, variant) for variant in sorted({e.variant for e in manifest.engines})}


def space_of(manifest: Manifest, variant: str) -> SpaceId:
    """Id of the space that a variant embeds into.

    It is over what embeddings depend on: weights, the map after them, preprocessing, tokeniser, precision, normalisation.
    Target, provider, batch sizes, versions, a safety head and the verdict are no part of it.

    Args:
        manifest: Of the bundle.
        variant: One of its variants.

    Raises:
        InputError: If there is no such variant.
    """
    edit = manifest.edit
    # A patch of weights says nothing that the weights do not say; the same weights by another way are the same space.
    patch = edit.patch_digest if edit.placement is Placement.EMBEDDING else ""
    placement = edit.placement.value if edit.placement else ""
    return _id(manifest, edit.edited_weights_digest, placement, patch, _numbers(manifest, variant))


def space_before(manifest: Manifest, variant: str, precision: Precision | None = None) -> SpaceId:
    """Id of the space that a variant would embed into without the edit's last step, which is one that maps embeddings.

    It is the id of the bundle that has the steps before only, so embeddings of that bundle are told by it.

    Args:
        manifest: Of the bundle.
        variant: One of its variants.
        precision: Another precision than the variant's.

    Raises:
        InputError: If there is no such variant, or the last step changes weights.
    """
    weights, numbers = weights_before(manifest.edit), _numbers(manifest, variant)
    if precision is not None:
        numbers = {tower: {**one, "precision": [precision.value] * 2} for tower, one in numbers.items()}
    return _id(manifest, weights, "", "", numbers)


def weights_before(edit: EditRecord) -> Digest:
    """Digest of the weights that make the embeddings which the edit's last step maps: the source's, or of the step before.

    Raises:
        InputError: If the last step changes weights.
    """
    step = edit.closed_form
    if step is None or step.axis is None or step.axis.placement is not Placement.EMBEDDING:
        raise InputError(
            f"the edit of {edit.model.name} ({edit.method}) changes weights, so no map takes stored embeddings over",
            fix="build with --placement embedding, or embed the items again with `uwm-deploy embed`",
        )
    return step.axis.fitted_on


def _numbers(manifest: Manifest, variant: str) -> dict[str, Any]:
    """Per tower, what its engine computes in: as asked for, and of the linear layers that are not kept."""
    engines: Mapping[TowerName, EngineArtifact] = {e.tower: e for e in manifest.engines if e.variant == variant}
    if not engines:
        known = sorted({engine.variant for engine in manifest.engines})
        raise InputError(f"the bundle has no variant {variant!r}", fix=f"it has {', '.join(known)}")
    asked = variant.rsplit("-", 1)[-1]
    return {
        tower.value: {"precision": [asked, str(engine.precision)], "normalised": engine.normalised}
        for tower, engine in engines.items()
    }


def _id(manifest: Manifest, weights: Digest, placement: str, patch: Digest, numbers: Mapping[str, Any]) -> SpaceId:
    model = manifest.model
    body = {
        "format": _FORMAT,
        "source_weights": model.weights_digest,
        "edited_weights": weights,
        "placement": placement,
        "patch": patch,
        "image": plain_from_record(model.image),
        # The size of the table changes no embedding, and ids of older releases do not have it.
        "text": plain_from_record(dataclasses.replace(model.text, vocabulary=0)),
        "towers": dict(numbers),
    }
    return f"space:{digest_of_plain(body)}"

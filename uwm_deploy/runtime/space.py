"""Which embedding space a variant of a bundle embeds into: embeddings may be compared only where the id is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uwm_deploy.codec import plain_from_record
from uwm_deploy.errors import InputError
from uwm_deploy.records import Digest, EditRecord, EngineArtifact, Manifest, Precision, TowerName
from uwm_deploy.workspace import digest_of_plain

SpaceId = str
"""``space:`` and a digest."""

_FORMAT = 1

EMBEDDING = "embedding"
"""Placement of a step that maps embeddings instead of changing weights."""


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
    # The patch file says more than the weights only where it holds a map.
    patch = edit.patch_digest if placement_of(edit) == EMBEDDING else ""
    return _id(manifest, edit.edited_weights_digest, placement_of(edit), patch, _numbers(manifest, variant))


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
    edit = manifest.edit
    if placement_of(edit) != EMBEDDING:
        raise InputError(
            f"the edit of {manifest.name} changes weights, so no embeddings lie before it",
            fix="build with --placement embedding",
        )
    numbers = _numbers(manifest, variant)
    if precision is not None:
        numbers = {tower: {**one, "precision": [precision.value] * 2} for tower, one in numbers.items()}
    return _id(manifest, weights_before(edit), "", "", numbers)


def placement_of(edit: EditRecord) -> str:
    """Where the closed-form step of an edit is: `weights`, `embedding`, or empty for none."""
    return str(getattr(edit, "placement", ""))


def weights_before(edit: EditRecord) -> Digest:
    """Digest of the weights that the last step, one that maps embeddings, was made for."""
    return edit.model.weights_digest


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
        "text": plain_from_record(model.text),
        "towers": dict(numbers),
    }
    return f"space:{digest_of_plain(body)}"

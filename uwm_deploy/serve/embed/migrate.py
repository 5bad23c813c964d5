"""Turns stored embeddings of the model before an edit of placement `embedding` into those of the edited model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.bundle.space import SpaceId, space_before, space_of, weights_before
from uwm_deploy.bundle.tensors import arrays_from
from uwm_deploy.errors import DataError, EvidenceError, InputError, IntegrityError, unreadable
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.embedding_map import EmbeddingMap, Mapper, maps_of_bundle
from uwm_deploy.runtime.variants import reason_unproven
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.serve.embed.known import COSINE_MIN, KnownEmbeddings, evidence_of
from uwm_deploy.serve.embed.stored import Label, Moved, Progress, Stored

_INDEX_MAGIC = b"I"
"""Every index file of FAISS begins with four letters and digits, an I first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """What takes stored embeddings over to a bundle.

    Attributes:
        map: Of the tower.
        label: What the result is.
        evidence: What it must agree with.
    """

    map: EmbeddingMap
    label: Label
    evidence: KnownEmbeddings


@dataclass(slots=True, kw_only=True)
class MigrateReport:
    """What a run did.

    Attributes:
        bundle: Digest of the bundle's manifest.
        variant: Whose space the result is of.
        migrated_from: Space of what was stored.
        keyed: Whether the keys of the rows are known.
        checked: Rows that were compared with the bundle's evidence, because it has their keys.
        rows: Migrated by this run, with those that stay as they are.
        errors: Rows of items without an embedding among them, which stay as they are.
        finished_before: Rows that earlier runs had migrated.
        parts: Pieces that this run wrote.
        seconds: Of migrating; checks are not counted.
    """

    bundle: str
    variant: str
    tower: str
    migrated_from: SpaceId
    space: SpaceId
    keyed: bool
    checked: int
    rows: int
    errors: int
    finished_before: int
    parts: int
    seconds: float


def open_stored(path: Path, keys: Path | None = None) -> Stored:
    """A store of embeddings, whatever kind it is.

    Args:
        path: Folder that `embed` wrote, .npy file, or file of FAISS.
        keys: File with the keys of the rows; not for a folder, whose rows have theirs.

    Raises:
        InputError: If it is none of these, or cannot be migrated.
        PrerequisiteError: If a package is missing that reads it.
    """
    if path.is_dir():
        from uwm_deploy.serve.embed.stored_parts import PartsFolder

        if keys is not None:
            raise InputError(f"the rows of {path} have keys of their own", fix="leave --keys out")
        return PartsFolder(path)
    if path.suffix == ".npy":
        from uwm_deploy.serve.embed.stored_npy import NpyFile

        return NpyFile(path, keys)
    if not _is_index(path):
        raise InputError(
            f"{path} is no store of embeddings",
            fix="pass a folder that `embed` wrote, a .npy file or an index of FAISS",
        )
    from uwm_deploy.serve.embed.stored_index import FlatIndex

    return FlatIndex(path, keys)


def migration_of(bundle: Bundle, tower: TowerName, stored: SpaceId = "", variant: str | None = None) -> Migration:
    """What takes embeddings of one tower over to a bundle.

    The rows belong beside those of `variant`. They may be in the variant's own precision, or in float32, which every variant
    was measured against. What a store does not say is taken to be float32.

    Args:
        bundle: Opened as for serving.
        tower: Whose embeddings.
        stored: Space that they are recorded to be of.
        variant: A certain one. [default: the first proven one, float32 before others]

    Raises:
        InputError: If the edit of the bundle maps no embeddings, or those of the variant are not of length 1.
        EvidenceError: If they are of another space than before the edit.
        IntegrityError: If the variant is not proven, or the map does not make the bundle's own evidence.
    """
    manifest, maps = bundle.manifest, maps_of_bundle(bundle)
    chosen = variant or _best(bundle)
    engines = bundle.engines(chosen)
    if reason := reason_unproven(bundle, chosen):
        raise IntegrityError(f"variant {chosen} is {reason}", fix="run `uwm-deploy attest` where it can be executed")
    if not all(engine.normalised for engine in engines.values()):
        raise InputError(f"the embeddings of {chosen} are not of length 1", fix="export with normalise = true")
    reference, own = space_before(manifest, chosen, Precision.FP32), space_before(manifest, chosen)
    label = Label(
        tower=tower,
        space=space_of(manifest, chosen),
        migrated_from=stored or reference,
        bundle=digest_of_bytes(json_from_record(manifest).encode()),
        variant=chosen,
    )
    if label.migrated_from not in (reference, own):
        raise _other_space(label, own)
    least = COSINE_MIN
    if label.migrated_from != reference:
        report = record_from_json(VerifyReport, bundle.read(BundleLayout.REPORT), where=BundleLayout.REPORT)
        least = cosine_min(report, tower, chosen)
    evidence = _evidence(bundle, tower, least)
    evidence.check_map(maps[tower])
    return Migration(map=maps[tower], label=label, evidence=evidence)


def migrate(
    stored: Stored, out: Path, migration: Migration, *, chunk: int = 8192, progress: Progress = lambda *_: None
) -> MigrateReport:
    """Writes what stored embeddings become, or goes on where an earlier run was stopped.

    What the evidence knows is compared before anything is written.

    Args:
        stored: The embeddings.
        out: A store of the same kind.
        migration: What takes them over.
        chunk: Rows at a time.
        progress: Called as it goes on.

    Raises:
        InputError: If `out` is something else.
        DataError: If they have another size than the map, or a row is no embedding of length 1.
        EvidenceError: If an item that the evidence knows is of another space, or parts of another space are in `out`.
        PrerequisiteError: If the disk is full.
    """
    label = migration.label
    if stored.dim != migration.map.dim:
        raise DataError(
            f"{stored.path} has embeddings of {stored.dim} numbers, the model has {migration.map.dim}",
            fix="pass embeddings of the model that the bundle was made from",
        )
    if out.resolve() == stored.path.resolve():
        raise InputError(f"{out} is what is to be migrated", fix="choose another --out")
    checked = migration.evidence.check(stored.known(migration.evidence.knows), migration.map)
    started = time.monotonic()
    moved: Moved = stored.migrate(out, Mapper(migration.map, min(chunk, stored.rows)), label, progress)
    return MigrateReport(
        **label.plain(),
        keyed=stored.keyed,
        checked=checked,
        rows=moved.rows,
        errors=moved.errors,
        finished_before=moved.finished_before,
        parts=moved.parts,
        seconds=time.monotonic() - started,
    )


def cosine_min(report: VerifyReport, tower: TowerName, variant: str) -> float:
    """How far embeddings in a variant's own precision may be from the evidence: twice as far as the variant was measured.

    Args:
        report: Of the bundle.
        tower: Whose embeddings.
        variant: One of its variants.
    """
    parity = [part for a in report.artifacts if a.variant == variant for part in a.parity if part.tower is tower]
    return min([COSINE_MIN, *(1 - 2 * (1 - part.cosine_min) for part in parity)])


def _is_index(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise unreadable(str(path), error, fix="check the path") from error
    return len(magic) == 4 and magic.startswith(_INDEX_MAGIC) and magic.isalnum()


def _best(bundle: Bundle) -> str:
    names = {e.variant: e.precision for e in bundle.manifest.engines if not reason_unproven(bundle, e.variant)}
    if not names:
        raise IntegrityError(f"{bundle.manifest.name} has no proven variant", fix="run `uwm-deploy attest`")
    return min(names, key=lambda name: (names[name] != Precision.FP32.value, name))


def _other_space(label: Label, wanted: SpaceId) -> EvidenceError:
    if label.migrated_from == label.space:
        return EvidenceError(
            f"the stored embeddings are of {label.space}, the bundle's own space already", fix="use them as they are"
        )
    return EvidenceError(
        f"the stored embeddings are of {label.migrated_from}; {label.variant} takes over {wanted}, or that in float32",
        fix="pass embeddings of the model before the edit, or embed the items again",
    )


def _evidence(bundle: Bundle, tower: TowerName, least: float) -> KnownEmbeddings:
    """What is recorded of the evaluation set; the original is the model before all steps, not before the last."""
    tensors = arrays_from(bundle.read(BundleLayout.REFERENCE), BundleLayout.REFERENCE)
    edit = bundle.manifest.edit
    alone = weights_before(edit) == edit.model.weights_digest
    original = EmbeddedSet.from_tensors(tensors, "original") if alone else None
    return evidence_of(EmbeddedSet.from_tensors(tensors, "edited"), original, tower, least)

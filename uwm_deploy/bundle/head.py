"""Reads a trained safety head, with every digest checked; needs no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uwm_deploy.errors import InputError, IntegrityError, unreadable
from uwm_deploy.records.codec import plain_from_record, record_from_json
from uwm_deploy.records.files import digest_of_bytes, digest_of_plain
from uwm_deploy.records.head import SafetyHead
from uwm_deploy.records.model import Digest
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.safeground.risk import SAFE, STEPS

RECORD, WEIGHTS, TEXTS, ITEMS = "head.json", "head.safetensors", "texts.json", "items.json"
"""Files of the folder that `train safety-head` writes."""

PLACE = "safety-head"
"""Folder of the weights and the texts in a bundle; the record is in its manifest."""

_AGAIN = "train it again, or restore the folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFiles:
    """A head as it lies in its folder.

    Attributes:
        digest: Of the record, and through it of weights, thresholds and texts.
        weights: A safetensors file.
        texts: Content of the file with the safe texts.
        items: `digest_of_pair` and `digest_of_image` of what it was trained or calibrated on; of an older release the
            former alone.
        items_file: Content of the file with them.
    """

    record: SafetyHead
    digest: Digest
    weights: bytes
    texts: bytes
    items: frozenset[str]
    items_file: bytes


def read_head(folder: Path) -> HeadFiles:
    """Reads and checks a head.

    Raises:
        InputError: If there is none.
        IntegrityError: If a file is not the one that the record describes, or the record contradicts itself.
    """
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no safety head: it has no {RECORD}", fix="run `uwm-deploy train safety-head`")
    parts = {}
    for name in (RECORD, WEIGHTS, TEXTS, ITEMS):
        try:
            parts[name] = (folder / name).read_bytes()
        except OSError as error:
            raise unreadable(str(folder / name), error, fix=_AGAIN, kind=IntegrityError) from error
    record = record_from_json(SafetyHead, parts[RECORD], where=RECORD)
    check_head(record)
    known = ((WEIGHTS, record.weights_digest), (TEXTS, record.texts_digest), (ITEMS, record.items_digest))
    for name, digest in known:
        if digest_of_bytes(parts[name]) != digest:
            raise IntegrityError(f"{name} is not the one that {RECORD} describes", fix=_AGAIN)
    texts_from(parts[TEXTS])
    return HeadFiles(
        record=record,
        digest=digest_of_head(record),
        weights=parts[WEIGHTS],
        texts=parts[TEXTS],
        items=items_from(parts[ITEMS]),
        items_file=parts[ITEMS],
    )


def digest_of_pair(safe: np.ndarray, unsafe: np.ndarray) -> str:
    """Digest by which a pair of images is identified: 64 bits over its preprocessed pixels.

    Args:
        safe: (3, H, W) float32.
        unsafe: (3, H, W) float32.
    """
    return hashlib.sha256(np.ascontiguousarray(np.stack([safe, unsafe])).tobytes()).hexdigest()[:16]


def digest_of_image(pixels: np.ndarray) -> str:
    """Digest by which a single image is identified: 64 bits over its preprocessed pixels.

    Args:
        pixels: (3, H, W) float32.
    """
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def items_from(content: bytes, name: str = ITEMS) -> frozenset[str]:
    """The digests of a file of them.

    Raises:
        IntegrityError: If it is no list of digests.
    """
    return frozenset(_texts_of(name, content))


def check_head(record: SafetyHead) -> None:
    """Checks that a record can be decided by.

    Raises:
        IntegrityError: If it has no threshold for an action, a milder action's above a stricter one's, its categories are
            not those of its logits, or it has safety tokens for no language model.
    """
    limits = [record.thresholds.get(step.value) for step in STEPS]
    known = [limit for limit in limits if limit is not None]
    if len(known) != len(STEPS) or set(record.thresholds) != {step.value for step in STEPS}:
        raise IntegrityError("the safety head lacks the threshold of an action", fix=_AGAIN)
    if known != sorted(known) or not all(0 < limit <= 1 for limit in known):
        raise IntegrityError(f"the safety head's thresholds {known} are not in order within 0 to 1", fix=_AGAIN)
    names = record.categories
    if len(names) != record.shape.categories or len(set(names)) != len(names) or len(names) < 2 or names[0] != SAFE:
        raise IntegrityError("the safety head's categories are not those of its logits", fix=_AGAIN)
    if bool(record.shape.language) != (record.language is not None):
        raise IntegrityError("the safety head's tokens and its language model do not belong together", fix=_AGAIN)
    if strange := sorted(set(record.prompts) - set(names[1:])):
        raise IntegrityError(f"the safety head has a prompt for {strange[0]!r}, which it does not know", fix=_AGAIN)


def digest_of_head(record: SafetyHead) -> Digest:
    """Digest of everything about a head: its record names its weights and texts by theirs."""
    return digest_of_plain(plain_from_record(record))


def texts_from(content: bytes) -> tuple[str, ...]:
    """The safe texts of a file.

    Raises:
        IntegrityError: If it is no list of texts.
    """
    return _texts_of(TEXTS, content)


def _texts_of(name: str, content: bytes) -> tuple[str, ...]:
    try:
        found = value_from_json(content)
    except ValueError as error:
        raise IntegrityError(f"{name} is not JSON: {error}", fix=_AGAIN) from error
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise IntegrityError(f"{name} is not a list of texts", fix=_AGAIN)
    return tuple(found)

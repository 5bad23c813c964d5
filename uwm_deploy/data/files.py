"""Quadruples whose members lie in files: which of them are in the set, and reading them one at a time."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from uwm_deploy.data.finding import is_file, short
from uwm_deploy.data.sampling import sample_of
from uwm_deploy.data.source import Quadruple, ZeroShotSet, record_of
from uwm_deploy.data.zero_shot_suite import open_suite
from uwm_deploy.errors import DataError, is_of_machine, unreadable
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.records.data import CalibrationRecord, LeftOut
from uwm_deploy.records.files import digest_of_bytes, digest_of_file
from uwm_deploy.records.model import Digest
from uwm_deploy.records.names import hides
from uwm_deploy.runtime.image import image_from

NAMED_LEFT_OUT = 100
"""Items that are named in the record; all of them are counted."""

UNLABELLED = "unlabelled"
"""Concept of an item whose concept is empty."""

SIDES = ("safe", "unsafe")

Texts = tuple[str | None, str | None]
"""Safe and unsafe caption."""

Images = tuple[Path | bytes | None, Path | bytes | None]
"""Safe and unsafe image: a file, or its encoded bytes."""


class Entry(NamedTuple):
    """What is known of an item without reading its members.

    Attributes:
        where: What errors call it.
        concept: As written; empty when there is none.
        texts: Whether there is a safe one, and an unsafe one.
        images: The same.
        missing: Files that are named and not there; empty otherwise. Looked for only when it matters.
    """

    where: str
    id: str
    concept: str
    texts: tuple[bool, bool]
    images: tuple[bool, bool]
    missing: tuple[str, str] = ("", "")


class MemberReader(Protocol):
    """Members by row, as they lie in the files; both methods raise DataError when one cannot be read."""

    def texts(self, row: int) -> Texts:
        """Both captions."""

    def images(self, row: int) -> Images:
        """Both images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Which rows are in the set.

    Attributes:
        rows: Their numbers, ascending; the other lists go with it.
        unused_names: Names in `concept_names` that no row has.
    """

    rows: array[int]
    ids: list[str]
    concepts: list[str]
    has_texts: bool
    has_images: bool
    left_out: tuple[LeftOut, ...]
    left_out_counts: dict[str, int]
    unused_names: tuple[str, ...] = ()


def index_of(spec: CalibrationSet, entries: Iterable[Entry | None], *, strict: bool) -> Index:
    """Looks through a set once: leaves out what it says is to be left out, then samples.

    Args:
        spec: The set.
        entries: One per row, in order; None for a row of another split.
        strict: Refuse an item that has one member of a pair, or nothing.

    Raises:
        DataError: For a strict set; or if everything was left out.
    """
    rows, flags = array("q"), bytearray()
    renamed = {_plain(old): new for old, new in spec.concept_names.items()}
    as_written = spec.source == "manifest" and not renamed
    ids: list[str] = []
    concepts: list[str] = []
    named: list[LeftOut] = []
    counts: Counter[str] = Counter()
    first_missing, written = "", set[str]()
    for number, entry in enumerate(entries):
        if entry is None:
            continue
        if not (_is_unicode(entry.id) and _is_unicode(entry.concept)):
            raise DataError(f"{entry.where}: id or concept holds half a character", fix="mend its encoding")
        _refuse_hidden(entry)
        if spec.missing_images == "drop" and (reason := _missing(entry)):
            counts[reason] += 1
            first_missing = first_missing or next(filter(None, entry.missing), entry.where)
            if len(named) < NAMED_LEFT_OUT:
                named.append(LeftOut(id=entry.id, reason=reason))
            continue
        if strict:
            _refuse_half(entry)
        rows.append(number)
        ids.append(entry.id)
        concept = entry.concept if as_written else _plain(entry.concept)
        written.add(concept)
        concept = renamed.get(concept, concept)
        concepts.append(sys.intern(concept or UNLABELLED))
        flags.append(all(entry.texts) + 2 * all(entry.images))
    if not ids and counts:
        raise DataError(
            f"data set {spec.name}: all {counts.total()} items lack an image, the first one {first_missing}",
            fix="put the images there, or remove missing_images to score texts alone",
        )
    chosen = sample_of(len(ids), spec, concepts.__getitem__)
    seen = {flags[i] for i in chosen}
    return Index(
        rows=array("q", (rows[i] for i in chosen)),
        ids=[ids[i] for i in chosen],
        concepts=[concepts[i] for i in chosen],
        has_texts=any(flag & 1 for flag in seen),
        has_images=any(flag & 2 for flag in seen),
        left_out=tuple(named),
        left_out_counts=dict(sorted(counts.items())),
        unused_names=tuple(sorted(set(renamed) - written)),
    )


def _missing(entry: Entry) -> str:
    """Why an item has no image pair; empty when it has one."""
    for side, named, file in zip(SIDES, entry.images, entry.missing, strict=True):
        if not named:
            return f"no {side} image"
        if file:
            return f"{side} image file is missing"
    return ""


def _refuse_hidden(entry: Entry) -> None:
    if hides(entry.id + entry.concept):
        raise DataError(
            f"{entry.where}: id {entry.id!r} or concept {entry.concept!r} holds a character that shows nothing",
            fix="remove control and formatting characters",
        )


def _refuse_half(entry: Entry) -> None:
    for kind, (safe, unsafe) in (("image", entry.images), ("text", entry.texts)):
        if safe != unsafe:
            raise DataError(
                f"{entry.where}, item {entry.id}: unpaired {kind}", fix=f"give safe_{kind} and unsafe_{kind}"
            )
    if not any((*entry.images, *entry.texts)):
        raise DataError(
            f"{entry.where}, item {entry.id} has neither images nor texts", fix="see docs/reference/data.md"
        )


def _plain(concept: str) -> str:
    """Blanks collapsed, in lower case; a manifest's own names stay as they are unless some are renamed."""
    return " ".join(concept.lower().split())


class FileSource:
    """A `QuadrupleSource` over files.

    Args:
        spec: The set.
        index: Which rows are in it.
        members: Reads them.
        base: Folder of its TOML file.
    """

    def __init__(self, spec: CalibrationSet, index: Index, members: MemberReader, base: Path | None) -> None:
        self.ids, self.concepts = index.ids, index.concepts
        self.has_images, self.has_texts = index.has_images, index.has_texts
        suite = open_suite(spec.zero_shot, base=base, limit=spec.zero_shot_limit)
        self.unused_names = index.unused_names
        self.zero_shot_names, self.zero_shot_missing = tuple(suite.sets), suite.missing
        self._zero_shot = suite.sets
        self._spec, self._index, self._members = spec, index, members

    def __len__(self) -> int:
        """Number of quadruples."""
        return len(self.ids)

    @cached_property
    def record(self) -> CalibrationRecord:
        """What the set resolved to."""
        return record_of(
            self._spec,
            self.ids,
            self.concepts,
            self._content_digest(),
            self._index.left_out,
            self._index.left_out_counts,
        )

    def read(self, index: int) -> Quadruple:
        """Opens one quadruple.

        Raises:
            DataError: If a member is missing or broken; the item is named.
        """
        safe_text, unsafe_text = self._texts(index)
        try:
            sources = self._members.images(self._index.rows[index])
        except DataError as error:
            raise self._named(index, error) from error
        images: list[Image.Image | None] = []
        for side, source in zip(SIDES, sources, strict=True):
            try:
                images.append(None if source is None else image_from(source, _name_of(source)))
            except DataError as error:
                raise DataError(f"item {self.ids[index]}, {side}_image: {error.what}", fix=error.fix) from error
        return Quadruple(
            id=self.ids[index],
            concept=self.concepts[index],
            safe_image=images[0],
            unsafe_image=images[1],
            safe_text=safe_text,
            unsafe_text=unsafe_text,
        )

    def read_texts(self, index: int) -> tuple[str, str] | None:
        """Both captions of one quadruple; None when it has not both."""
        safe, unsafe = self._texts(index)
        return None if safe is None or unsafe is None else (safe, unsafe)

    def members(self, index: int) -> tuple[Texts, Images]:
        """Captions and images of one quadruple as they lie in the files; nothing is decoded.

        Raises:
            DataError: If one cannot be read; the item is named.
        """
        try:
            return self._texts(index), self._members.images(self._index.rows[index])
        except DataError as error:
            if error.what.startswith("item "):
                raise
            raise self._named(index, error) from error

    def zero_shot(self, name: str) -> ZeroShotSet:
        """One of the zero-shot sets."""
        return self._zero_shot[name]

    def _texts(self, index: int) -> Texts:
        try:
            texts = self._members.texts(self._index.rows[index])
        except DataError as error:
            raise self._named(index, error) from error
        for side, text in zip(SIDES, texts, strict=True):
            if text is not None and not _is_unicode(text):
                raise DataError(f"item {self.ids[index]}, {side}_text holds half a character", fix="mend its encoding")
        return texts

    def _named(self, index: int, error: DataError) -> DataError:
        return DataError(f"item {self.ids[index]}: {error.what}", fix=error.fix)

    def _content_digest(self) -> Digest:
        """Digest over ids, concepts, texts and encoded images; what is missing or broken counts as such."""
        hasher = hashlib.sha256()
        for index, row in enumerate(self._index.rows):
            members: list[str | None]
            try:
                members = [*self._members.texts(row), *(_image_digest(image) for image in self._members.images(row))]
            except DataError:
                members = ["broken"]
            hasher.update(json.dumps([self.ids[index], self.concepts[index], *members]).encode() + b"\n")
        return f"sha256:{hasher.hexdigest()}"


def _name_of(image: Path | bytes) -> str:
    """What errors call it; those of items are recorded."""
    return short(image) if isinstance(image, Path) else ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_digest(image: Path | bytes | None) -> Digest | None:
    if image is None or isinstance(image, bytes):
        return None if image is None else digest_of_bytes(image)
    if not is_file(image):  # a pipe would be waited for
        return "missing"
    try:
        return digest_of_file(image)
    except (OSError, ValueError) as error:
        if is_of_machine(error):
            raise unreadable(str(image), error, fix="") from error
        return "missing"

"""Writes a bundle: every file listed with its digest, with statement and parts list, the whole folder at once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.mlbom import BOM, bom_of
from uwm_deploy.bundle.open import MANIFEST, Kept, is_bundle, open_bundle
from uwm_deploy.bundle.signature import SIGNATURE
from uwm_deploy.bundle.space import spaces_of
from uwm_deploy.bundle.statement import STATEMENT, statement_of
from uwm_deploy.errors import ContractError
from uwm_deploy.records.bundle import BundleFile, Manifest
from uwm_deploy.records.codec import record_from_json, write_record
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.replacing import Workplace, replacing
from uwm_deploy.records.verdict import Result

Sign = Callable[[str, Manifest], str]
"""Content of the signature of a bundle, from the name of its folder and its whole manifest."""

DERIVED = (STATEMENT, BOM)
"""Files that are made here from all others; what is handed in under these names is of an earlier bundle."""


Part = Path | bytes | Kept
"""A file of a bundle: one that was made, content, or one of another bundle as it is."""

_CHUNK_BYTES = 1 << 20


def bundle_from_parts(
    out: Path | Workplace, manifest: Manifest, files: Mapping[str, Part], *, sign: Sign | None = None
) -> Manifest:
    """Copies the parts, adds what is derived from them and writes the manifest that lists everything.

    What is listed and signed are the digests of the bytes as they were written here: nothing is read again by its name.

    Args:
        out: Bundle folder, or the right to replace it if the caller has that already. It is replaced as a whole, so a
            signature in it is gone.
        manifest: Everything but `files` and `spaces`, which are filled in here.
        files: Path inside the bundle to its part.
        sign: Makes the signature, which is there from the first moment; not asked for a bundle that does not pass.

    Returns:
        The manifest as written.

    Raises:
        ContractError: If a part is missing.
        IntegrityError: If a file of another bundle is not what that one lists.
        InputError: If another process writes the bundle.
    """
    if isinstance(out, Path):
        with replacing(out) as place:
            return bundle_from_parts(place, manifest, files, sign=sign)
    report = b"".join(_chunks(files[BundleLayout.REPORT], BundleLayout.REPORT))
    parts = {name: part for name, part in files.items() if name not in DERIVED} | {BundleLayout.REPORT: report}
    with out.whole() as folder:
        listed = [_put(folder, name, parts[name]) for name in sorted(parts)]
        measured = record_from_json(VerifyReport, report, where=BundleLayout.REPORT)
        for name, derive in ((STATEMENT, statement_of), (BOM, bom_of)):  # the parts list names the statement as well
            listed.append(_put(folder, name, derive(manifest, measured, listed).encode()))
        files_in_order = tuple(sorted(listed, key=lambda file: file.path))
        complete = dataclasses.replace(manifest, files=files_in_order, spaces=spaces_of(manifest))
        write_record(folder / MANIFEST, complete)
        if sign is not None and complete.verdict.result is Result.PASS:
            (folder / SIGNATURE).write_text(sign(out.path.name, complete), encoding="utf-8")
    return complete


@contextlib.contextmanager
def rewriting(path: Path) -> Iterator[Workplace]:
    """The right to change a bundle that is there; see `replacing`.

    Raises:
        InputError: If there is no bundle, or another process writes it.
    """
    refuse_no_bundle(path)
    with replacing(path) as place:
        yield place


def refuse_no_bundle(path: Path) -> None:
    """Says what is in the place of a bundle, before anything is made beside it.

    Raises:
        InputError: If there is no bundle.
    """
    if not is_bundle(path):
        open_bundle(path, allow_failed=True)


def _put(folder: Path, name: str, part: Part) -> BundleFile:
    """Writes a part, and lists what was written."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher, size = hashlib.sha256(), 0
    with target.open("xb") as stream:
        for chunk in _chunks(part, name):
            stream.write(chunk)
            hasher.update(chunk)
            size += len(chunk)
    return BundleFile(path=name, size_bytes=size, digest="sha256:" + hasher.hexdigest())


def _chunks(part: Part, name: str) -> Iterable[bytes]:
    if isinstance(part, bytes):
        return [part]
    return part.chunks() if isinstance(part, Kept) else _chunks_of_file(part, name)


def _chunks_of_file(path: Path, name: str) -> Iterator[bytes]:
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise ContractError(f"part {name} of the bundle was not made", fix="run the stages before it") from error
    with stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk

"""Writes a bundle: every file listed with its digest, with statement and parts list, the whole folder at once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.mlbom import BOM, bom_of
from uwm_deploy.bundle.open import MANIFEST
from uwm_deploy.bundle.signature import SIGNATURE
from uwm_deploy.bundle.space import spaces_of
from uwm_deploy.bundle.statement import STATEMENT, statement_of
from uwm_deploy.errors import ContractError
from uwm_deploy.records.bundle import BundleFile, Manifest
from uwm_deploy.records.codec import record_from_json, write_record
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_file, whole_folder
from uwm_deploy.records.verdict import Result

Sign = Callable[[str, Manifest], str]
"""Content of the signature of a bundle, from the name of its folder and its whole manifest."""

DERIVED = (STATEMENT, BOM)
"""Files that are made here from all others; what is handed in under these names is of an earlier bundle."""


def bundle_from_parts(
    out: Path, manifest: Manifest, files: Mapping[str, Path | bytes], *, sign: Sign | None = None
) -> Manifest:
    """Copies the parts, adds what is derived from them and writes the manifest that lists everything.

    Args:
        out: Bundle folder; replaced as a whole, so a signature in it is gone.
        manifest: Everything but `files` and `spaces`, which are filled in here.
        files: Path inside the bundle to a source file or to content.
        sign: Makes the signature, which is there from the first moment; not asked for a bundle that does not pass.

    Returns:
        The manifest as written.

    Raises:
        ContractError: If a part is missing.
    """
    with whole_folder(out) as folder:
        for name, part in sorted(files.items()):
            if name not in DERIVED:
                _put(folder / name, part, name)
        listed = [_listed(folder, name) for name in sorted(files) if name not in DERIVED]
        report = record_from_json(VerifyReport, (folder / BundleLayout.REPORT).read_bytes(), where=BundleLayout.REPORT)
        for name, derive in ((STATEMENT, statement_of), (BOM, bom_of)):
            _put(folder / name, derive(manifest, report, listed).encode(), name)
            listed.append(_listed(folder, name))
        files_in_order = tuple(sorted(listed, key=lambda file: file.path))
        complete = dataclasses.replace(manifest, files=files_in_order, spaces=spaces_of(manifest))
        write_record(folder / MANIFEST, complete)
        if sign is not None and complete.verdict.result is Result.PASS:
            (folder / SIGNATURE).write_text(sign(out.resolve().name, complete), encoding="utf-8")
    return complete


def _put(target: Path, part: Path | bytes, name: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(part, bytes):
        target.write_bytes(part)
    elif part.is_file():
        shutil.copyfile(part, target)
    else:
        raise ContractError(f"part {name} of the bundle was not made", fix="run the stages before it")


def _listed(folder: Path, name: str) -> BundleFile:
    return BundleFile(path=name, size_bytes=(folder / name).stat().st_size, digest=digest_of_file(folder / name))

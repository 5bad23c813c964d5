"""Writes a bundle: every file listed with its digest, the whole folder at once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from uwm_deploy.codec import json_from_record
from uwm_deploy.errors import ContractError
from uwm_deploy.records import BundleFile, Manifest
from uwm_deploy.runtime.bundle import MANIFEST
from uwm_deploy.workspace import digest_of_file, whole_folder


def bundle_from_parts(out: Path, manifest: Manifest, files: Mapping[str, Path | bytes]) -> Manifest:
    """Copies the parts and writes the manifest that lists them.

    Args:
        out: Bundle folder; replaced as a whole.
        manifest: Everything but `files`, which is filled in here.
        files: Path inside the bundle to a source file or to content.

    Returns:
        The manifest as written.

    Raises:
        ContractError: If a part is missing.
    """
    with whole_folder(out) as folder:
        for name, part in sorted(files.items()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(part, bytes):
                target.write_bytes(part)
            elif part.is_file():
                shutil.copyfile(part, target)
            else:
                raise ContractError(f"part {name} of the bundle was not made", fix="run the stages before it")
        listed = tuple(
            BundleFile(path=name, size_bytes=(folder / name).stat().st_size, digest=digest_of_file(folder / name))
            for name in sorted(files)
        )
        complete = dataclasses.replace(manifest, files=listed)
        (folder / MANIFEST).write_text(json_from_record(complete), encoding="utf-8")
    return complete

"""Stage folders: what one was made from, and whether it still holds what it held."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from uwm_deploy.errors import is_of_machine, unreadable
from uwm_deploy.records.files import digest_of_file, digest_of_plain
from uwm_deploy.records.model import Digest
from uwm_deploy.records.plain_json import value_from_json

STAMP = "stage.json"
"""Name of the record in a finished stage folder; it is written last."""


def stamp(folder: Path, inputs: Mapping[str, str], begun: str = "") -> Digest:
    """Records in a finished (still temporary) stage folder what it was made from and what it holds.

    Args:
        folder: The stage's folder.
        inputs: Everything that it depends on.
        begun: ISO time at which the stage began.

    Returns:
        Digest of the names and bytes of its files, whatever they were made from.
    """
    body = {"inputs": dict(inputs), "files": _file_digests(folder), "begun": begun}
    (folder / STAMP).write_text(json.dumps(body, indent=1, sort_keys=True), encoding="utf-8")
    return digest_of_plain(body["files"])


def current(folder: Path, inputs: Mapping[str, str]) -> Digest | None:
    """Digest of the files of a stage folder that was made from exactly these inputs and still holds what it held.

    Returns:
        None where the folder is missing, was made from something else, or was changed since.

    Raises:
        UnreadableError: If this machine cannot read its record.
    """
    try:
        body = value_from_json((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if is_of_machine(error):  # which makes no finished stage stale
            raise unreadable(str(folder / STAMP), error, fix="") from error
        return None
    if not isinstance(body, dict) or body.get("inputs") != dict(inputs):
        return None
    files = _file_digests(folder)
    return digest_of_plain(files) if body.get("files") == files else None


def begun_at(folder: Path) -> str:
    """ISO time at which the stage of a finished folder began; empty where an earlier release made it."""
    body = value_from_json((folder / STAMP).read_text(encoding="utf-8"))
    return str(body.get("begun", "")) if isinstance(body, dict) else ""


def _file_digests(folder: Path) -> dict[str, Digest]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() != STAMP)
    return {p.relative_to(folder).as_posix(): digest_of_file(p) for p in files}

"""A user's own quadruples: JSON Lines with captions and image paths (docs/data.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from uwm_deploy.datasets.source import Quadruple, ZeroShotSet, record_of, sample_of
from uwm_deploy.errors import DataError
from uwm_deploy.recipe import CalibrationSet
from uwm_deploy.records import Digest
from uwm_deploy.runtime.image import image_from
from uwm_deploy.workspace import digest_of_file, digest_of_plain

_MEMBERS = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
_KEYS = frozenset(("id", "concept", *_MEMBERS))


class ManifestSource:
    """Quadruples of a JSON Lines file; images are opened when they are read."""

    zero_shot_names: tuple[str, ...] = ()

    def __init__(self, spec: CalibrationSet, base: Path) -> None:
        self.path = base / spec.manifest
        if spec.zero_shot:
            raise DataError(f"data set {spec.name}: a manifest has no zero-shot sets", fix="remove `zero_shot`")
        rows = _rows(self.path, spec.split)
        self.rows = [rows[i] for i in sample_of(len(rows), spec)]
        self.ids = [row["id"] for row in self.rows]
        self.concepts = [row["concept"] for row in self.rows]
        self.has_images = all("safe_image" in row for row in self.rows)
        self.has_texts = all("safe_text" in row for row in self.rows)
        self.record = record_of(spec, self.ids, self.concepts, self._content_digest())

    def _content_digest(self) -> Digest:
        """Digest over the rows and, per image, its file's bytes; a missing one counts as such and is named later."""
        images: dict[str, str] = {}
        for row in self.rows:
            for key in ("safe_image", "unsafe_image"):
                if key in row:
                    file = self.path.parent / row[key]
                    images[row[key]] = digest_of_file(file) if file.is_file() else "missing"
        return digest_of_plain({"rows": self.rows, "images": images})

    def __len__(self) -> int:
        """Number of quadruples."""
        return len(self.rows)

    def read(self, index: int) -> Quadruple:
        """Opens one quadruple.

        Raises:
            DataError: If an image is missing or broken; the item is named.
        """
        row = self.rows[index]
        images: dict[str, Image.Image | None] = {}
        for key in ("safe_image", "unsafe_image"):
            if key not in row:
                images[key] = None
                continue
            try:
                images[key] = image_from(self.path.parent / row[key])
            except DataError as error:
                raise DataError(f"item {row['id']}, {key}: {error.what}", fix=error.fix) from error
        return Quadruple(
            id=row["id"],
            concept=row["concept"],
            safe_image=images["safe_image"],
            unsafe_image=images["unsafe_image"],
            safe_text=row.get("safe_text"),
            unsafe_text=row.get("unsafe_text"),
        )

    def read_texts(self, index: int) -> tuple[str, str] | None:
        """Both captions of one quadruple; None when it has none."""
        row = self.rows[index]
        return (row["safe_text"], row["unsafe_text"]) if "safe_text" in row else None

    def zero_shot(self, name: str) -> ZeroShotSet:
        """A manifest has none."""
        raise DataError(f"a manifest has no zero-shot set {name!r}", fix="use a set that has")


def _rows(path: Path, split: str) -> list[dict[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"manifest {path} cannot be read: {error}", fix="check the path and its encoding") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return [row for row in rows if not split or row.pop("split", split) == split]


def _row(path: Path, number: int, line: str) -> dict[str, str]:
    where = f"{path.name} line {number}"
    try:
        body: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}", fix="one JSON object per line") from error
    if not isinstance(body, dict) or not all(isinstance(v, str) for v in body.values()):
        raise DataError(f"{where} is not an object of strings", fix="see docs/data.md")
    unknown = sorted(set(body) - _KEYS - {"split"})
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}", fix=f"valid: {sorted(_KEYS)}")
    if not body.get("id"):
        raise DataError(f"{where} has no id", fix="give every item its own id")
    for kind in ("image", "text"):
        if (f"safe_{kind}" in body) != (f"unsafe_{kind}" in body):
            raise DataError(f"{where}, item {body['id']}: unpaired {kind}", fix=f"give safe_{kind} and unsafe_{kind}")
    if not any(key in body for key in _MEMBERS):
        raise DataError(f"{where}, item {body['id']} has neither images nor texts", fix="see docs/data.md")
    return {"concept": "all", **body}

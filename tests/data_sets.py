"""Small sets of harmless pictures and captions, written as a user would."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.recipes.data_set import calibration_set_from_toml


def picture(number: int) -> Image.Image:
    """A small picture of its own for each number."""
    return Image.new("RGB", (9, 7), (number % 256, number // 256 % 256, 90))


def png(number: int) -> bytes:
    """The same, encoded."""
    stream = io.BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def pair(number: int, **changes: Any) -> dict[str, Any]:
    """A row of a manifest with texts only."""
    return {"id": f"i{number}", "safe_text": f"a calm {number}", "unsafe_text": f"a fire {number}"} | changes


def toml(**keys: Any) -> str:
    """Text of a set's TOML file; a mapping becomes a table of it."""
    keys = {"format": 1, "name": "mine"} | keys
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if not isinstance(value, Mapping)]
    for key, value in keys.items():
        if isinstance(value, Mapping):
            lines += [f"[{key}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())]
    return "\n".join(lines) + "\n"


def open_set(base: Path, **keys: Any) -> QuadrupleSource:
    """Opens the set that these keys of a TOML file in the folder define."""
    return open_source(calibration_set_from_toml(toml(**keys), where="mine.toml"), base=base)


def open_manifest(folder: Path, rows: Sequence[Mapping[str, Any]] | bytes, **keys: Any) -> QuadrupleSource:
    """Opens a manifest of these rows."""
    data = rows if isinstance(rows, bytes) else "\n".join(json.dumps(row) for row in rows)
    put(folder / "pairs.jsonl", data)
    return open_set(folder, source="manifest", manifest="pairs.jsonl", **keys)


def write_shard(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """A tar file with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            raw = data.encode() if isinstance(data, str) else data
            header = tarfile.TarInfo(name)
            header.size = len(raw)
            archive.addfile(header, io.BytesIO(raw))
    return path


def members(key: str, number: int) -> dict[str, bytes | str]:
    """Members of a whole quadruple in a shard."""
    return {
        f"{key}.safe.png": png(number),
        f"{key}.unsafe.png": png(number + 1000),
        f"{key}.safe.txt": f"a calm {number}\n",
        f"{key}.unsafe.txt": f"a fire {number}\n",
        f"{key}.json": json.dumps({"concept": "fire" if number % 2 else "smoke"}),
    }

"""Small sets of the drawn world as manifests on disk."""

from __future__ import annotations

import json
from pathlib import Path

from uwm_deploy.data.demo import world


def drawn_set(folder: Path, split: world.Split, count: int, *, name: str = "", extra: str = "") -> str:
    """Writes the first quadruples of a split and the set's TOML; returns the TOML's path."""
    name = name or f"small-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        item = world.quadruple(split, index)
        row = {
            "id": item.id,
            "concept": item.concept,
            "safe_text": item.safe_text,
            "unsafe_text": item.unsafe_text,
        }
        for side, image in (("safe", item.safe_image), ("unsafe", item.unsafe_image)):
            row[f"{side}_image"] = f"{item.id}-{side}.png"
            image.save(folder / row[f"{side}_image"])
        rows.append(row)
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = f'format = 1\nname = "{name}"\nsource = "manifest"\nmanifest = "{name}.jsonl"\n'
    (folder / f"{name}.toml").write_text(head + extra)
    return str(folder / f"{name}.toml")

"""Writes a manifest from a set of another form: a table, a Hugging Face data set on disk, or WebDataset shards."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uwm_deploy.data.arrow import ARROW
from uwm_deploy.data.files import NAMED_LEFT_OUT, SIDES, FileSource
from uwm_deploy.data.finding import is_file, is_folder, matching, names_in
from uwm_deploy.data.make import (
    Row,
    bytes_of,
    check_place,
    refuse_outside,
    relative_path,
    unpaired_reason,
    write_manifest,
)
from uwm_deploy.data.open import open_source
from uwm_deploy.data.patterns import Pattern
from uwm_deploy.data.table import JSON_LINES, PARQUET, rows_of
from uwm_deploy.errors import DataError, InputError, unreadable
from uwm_deploy.recipes.data_set import CalibrationSet, Columns
from uwm_deploy.recipes.strict_toml import FORMAT
from uwm_deploy.records.data import LeftOut, MadeManifest

_TABLES = (".csv", ".tsv", ".json", *JSON_LINES, *PARQUET, *ARROW)
_STATE, _SPLITS = "state.json", "dataset_dict.json"
"""What Hugging Face `datasets` writes into the folder of a set, and into that of several splits."""

_ROW_NUMBER = "{row:06d}"
MEMBERS = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
KEYS = ("id", "concept", *MEMBERS)
"""What a column can be."""


def is_other_form(path: Path) -> bool:
    """Whether a path is a set of one of these forms, and no folder of pictures."""
    if path.suffix.lower() in (*_TABLES, ".tar"):
        return True
    if not is_folder(path):
        return False
    names = names_in(path)
    return _STATE in names or _SPLITS in names or any(name.endswith(".tar") for name in names)


def gather_manifest(
    source: Path,
    out: Path,
    *,
    columns: Mapping[str, str],
    embed: bool = False,
    drop_unpaired: bool = False,
    force: bool = False,
) -> MadeManifest:
    """Writes the manifest of a set of another form, whole or not at all.

    Args:
        source: A table, a folder of `datasets.Dataset.save_to_disk`, a shard, or a folder of shards.
        out: JSON Lines or Parquet, by its ending. Image paths in it start from its own folder.
        columns: One of `KEYS` to the column that holds it; the others are found by their own names.
        embed: Put the images into the Parquet file.
        drop_unpaired: Leave out items without a counterpart, instead of refusing them.
        force: Replace `out`.

    Raises:
        InputError: If `out` is there, or cannot be what it should be.
        DataError: If the source cannot be read, or has none of the columns.
        PrerequisiteError: If pyarrow is missing, or the disk is full.
    """
    check_place(out, embed=embed, force=force)
    spec, folder = _set_of(source, columns)
    opened = open_source(spec, base=folder)
    assert isinstance(opened, FileSource)
    nothing = DataError(f"{source} has no item with both sides", fix="see docs/reference/data.md for what an item is")
    gathered = _Gathered(opened, out, embed)
    made = write_manifest(gathered, source, out, nothing=nothing, embed=embed, drop_unpaired=drop_unpaired)
    if spec.source != "table":
        return made
    unread = _unread(source if is_file(source) else matching(spec.table, folder)[0], spec.columns)
    return dataclasses.replace(made, unread_count=len(unread), unread=tuple(unread[:NAMED_LEFT_OUT]))


def _set_of(source: Path, columns: Mapping[str, str]) -> tuple[CalibrationSet, Path]:
    """The set that is all of a source, and the folder that its paths start from."""
    spec = CalibrationSet(format=FORMAT, name=source.stem, source="webdataset")
    if source.suffix.lower() == ".tar":
        spec, folder = dataclasses.replace(spec, shards=source.name), source.parent
    elif source.suffix.lower() in _TABLES:
        columns_of = _columns_of([source], columns)
        return dataclasses.replace(spec, source="table", table=source.name, columns=columns_of), source.parent
    elif _STATE in (names := names_in(source)):
        files = _saved_files(source)
        columns_of = _columns_of(files, columns)
        return dataclasses.replace(spec, source="table", table="data-*.arrow", columns=columns_of), source
    elif _SPLITS in names:
        splits = [name for name in names if is_file(source / name / _STATE)]
        raise InputError(
            f"{source} holds several splits: {', '.join(splits)}", fix=f"pass one of them, such as {source}/{splits[0]}"
        )
    else:
        spec, folder = dataclasses.replace(spec, shards="*.tar"), source
    if columns:
        raise InputError("shards have no columns", fix="leave --column out")
    return spec, folder


def _saved_files(folder: Path) -> list[Path]:
    """Files of a data set that `datasets` saved, in their order.

    Raises:
        DataError: If one is missing, or the set is a view of its files.
    """
    path = folder / _STATE
    try:
        state = json.loads(path.read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
    except OSError as error:
        raise unreadable(str(path), error, fix="check the folder") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no state of a data set", fix="save the set again") from error
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} is a view of its rows", fix="call flatten_indices() and save it again")
    found = matching("data-*.arrow", folder)
    if sorted(names) != sorted(file.name for file in found) or not found:
        raise DataError(f"{folder} lacks files, or has more, than {_STATE} lists", fix="save the set again")
    return found


def _columns_of(files: Sequence[Path], asked: Mapping[str, str]) -> Columns:
    """What the columns of a table mean.

    Raises:
        DataError: If none of them is a caption or an image.
    """
    names = _names_in(files[0])
    found = {key: asked.get(key) or (key if key in names else "") for key in KEYS}
    if not any(found[key] for key in MEMBERS):
        raise DataError(
            f"{files[0].name} has none of the columns {', '.join(MEMBERS)}; it has {', '.join(names) or 'none'}",
            fix="say what they are called, as in --column safe_text=caption",
        )
    return Columns(**{**found, "id": found["id"] or _ROW_NUMBER})


def _unread(path: Path, columns: Columns) -> list[str]:
    """Columns of a table that nothing is taken from; a pattern takes from those that it names."""
    patterns = [str(getattr(columns, key)) for key in KEYS]
    read = {*patterns, *(name for pattern in patterns for name in Pattern(pattern, path.name).columns)}
    return [name for name in _names_in(path) if name not in read]


def _names_in(path: Path) -> list[str]:
    """Names of a table's columns; of a text, those of its first row."""
    rows = rows_of(path)
    names = getattr(rows, "columns", None)
    return list(names) if names is not None else list(next(rows.scan(()), ("", {}))[1])


@dataclass(slots=True)
class _Gathered:
    """Goes through a set in its order, and counts; see `make.Gathered`."""

    source: FileSource
    out: Path
    embed: bool
    concepts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    unpaired: list[LeftOut] = field(default_factory=list)
    unpaired_count: int = 0
    ignored: list[str] = field(default_factory=list)
    ignored_count: int = 0

    def rows(self) -> Iterator[Row]:
        """Rows of the manifest."""
        for index, (item, concept) in enumerate(zip(self.source.ids, self.source.concepts, strict=True)):
            members = self._members(index)
            kinds = [[key.split("_")[1] for key in members if key.startswith(f"{side}_")] for side in SIDES]
            if sorted(kinds[0]) != sorted(kinds[1]) or not members:
                self.unpaired_count += 1
                if len(self.unpaired) < NAMED_LEFT_OUT:
                    reason = unpaired_reason(*kinds) if members else "nothing in it"
                    self.unpaired.append(LeftOut(id=item, reason=reason))
                continue
            self.concepts[concept] += 1
            self.pairs.update(kinds[0])
            yield {"id": item, "concept": concept, **members}

    def _members(self, index: int) -> dict[str, str | bytes]:
        texts, images = self.source.members(index)
        found: dict[str, str | bytes] = {}
        for side, text, image in zip(SIDES, texts, images, strict=True):
            if image is not None and not (isinstance(image, Path) and not is_file(image)):
                found[f"{side}_image"] = self._image(image)
            if text is not None and text.strip():
                found[f"{side}_text"] = text
        return found

    def _image(self, image: Path | bytes) -> str | bytes:
        if isinstance(image, bytes):
            if not self.embed:
                raise InputError(
                    "the images lie inside the source, which no path can name",
                    fix="pass --embed, with an --out that ends in .parquet",
                )
            return image
        if self.embed:
            return bytes_of(image)
        refuse_outside(image, self.out)
        return relative_path(image, self.out.parent)

"""Quadruples of a table: JSON, JSON Lines, CSV, Parquet or Arrow, with columns as the set's TOML file maps them."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uwm_deploy.data.arrow import ARROW, ArrowRows
from uwm_deploy.data.files import SIDES, Entry, FileSource, Images, Texts, index_of
from uwm_deploy.data.finding import is_file, matching
from uwm_deploy.data.parquet import ParquetRows, UnreadImage, missing_column
from uwm_deploy.data.patterns import Pattern, path_below
from uwm_deploy.data.rows import ManyFiles, Row, Rows, rows_of_text
from uwm_deploy.errors import DataError
from uwm_deploy.recipes.data_set import CalibrationSet, Columns
from uwm_deploy.recipes.strict_toml import FORMAT

_MANIFEST = Columns(
    id="id",
    concept="concept",
    split="split",
    safe_text="safe_text",
    unsafe_text="unsafe_text",
    safe_image="safe_image",
    unsafe_image="unsafe_image",
)
"""Column names of a manifest; it has no others."""

_MANIFEST_KEYS = ("id", "concept", "split", "safe_image", "unsafe_image", "safe_text", "unsafe_text")
PARQUET = (".parquet", ".pq")
JSON_LINES = (".jsonl", ".ndjson")
"""Endings of a manifest's name."""

_SPECIAL = ("row", "split")
"""What a pattern can name besides columns: the row's number from 0, and the set's split."""


def is_manifest(name: str) -> bool:
    """Whether a name is a manifest's, by its ending."""
    return Path(name).suffix.lower() in (*JSON_LINES, *PARQUET)


def set_of_manifest(path: Path) -> CalibrationSet:
    """The set that is all of a manifest, as if a TOML file beside it said so."""
    return CalibrationSet(format=FORMAT, name=path.stem, source="manifest", manifest=path.name)


def open_table(spec: CalibrationSet, folder: Path, base: Path | None) -> FileSource:
    """Opens a manifest or a table.

    Args:
        spec: The set.
        folder: Where its files are.
        base: Folder of its TOML file.

    Raises:
        DataError: If the table, a row or a path in it is not what it should be.
        PrerequisiteError: If it is Parquet and pyarrow is missing.
    """
    manifest = spec.source == "manifest"
    paths = [folder / spec.manifest] if manifest else _table_files(spec, folder)
    parts = [rows_of(path, lines=manifest) for path in paths]
    rows = parts[0] if len(parts) == 1 else ManyFiles(parts)
    table = _Table(spec, rows, paths[0].parent if manifest else folder)
    if manifest and isinstance(parts[0], ParquetRows):
        table.keep_only(parts[0].columns, paths[0].name)
    return FileSource(spec, index_of(spec, table.entries(), strict=manifest), table, base)


def rows_of(path: Path, *, lines: bool = False) -> Rows:
    """Rows of a file of any format, by its ending.

    Args:
        path: The file.
        lines: A text is JSON Lines, whatever it looks like.

    Raises:
        DataError: If it cannot be read.
        PrerequisiteError: If pyarrow is needed and missing.
    """
    if path.suffix.lower() in PARQUET:
        return ParquetRows(path)
    return ArrowRows(path) if path.suffix.lower() in ARROW else rows_of_text(path, lines=lines)


def _table_files(spec: CalibrationSet, folder: Path) -> list[Path]:
    name = spec.table.replace("{split}", spec.split)
    if not glob.has_magic(name):
        if not is_file(folder / name):
            raise DataError(
                f"data set {spec.name} expects its table at {folder / name}", fix="see docs/reference/data.md"
            )
        return [folder / name]
    paths = matching(name, folder)
    if not paths:
        raise DataError(f"data set {spec.name}: no file matches {folder / name}", fix="check `table` and `folder`")
    if len({path.suffix for path in paths}) > 1:  # one table in two formats would be read twice
        raise DataError(
            f"data set {spec.name}: {folder / name} is {', '.join(path.name for path in paths[:5])}",
            fix="keep the files of one format",
        )
    return paths


class _Table:
    """Rows as members of quadruples.

    Args:
        spec: The set.
        rows: Its rows.
        folder: Folder that image paths start from.
    """

    def __init__(self, spec: CalibrationSet, rows: Rows, folder: Path) -> None:
        self._spec, self._rows, self._folder = spec, rows, folder
        self._strict = spec.source == "manifest"
        columns = _MANIFEST if self._strict else spec.columns
        self._id = _pattern_or_column(columns.id or "id", spec, "id")
        self._concept, self._split = columns.concept, columns.split
        self._text_columns = (columns.safe_text, columns.unsafe_text)
        self._images = [
            [_pattern_or_column(text, spec, f"{side}_image") for text in _several(value)]
            for side, value in zip(SIDES, (columns.safe_image, columns.unsafe_image), strict=True)
        ]
        self._has: Sequence[str] | None = None

    def keep_only(self, columns: Sequence[str], where: str) -> None:
        """Uses only the columns that a manifest in a binary format has.

        Raises:
            DataError: If it has one that a manifest has not.
        """
        _refuse_unknown(columns, where)
        self._has = columns

    def entries(self) -> Iterator[Entry | None]:
        """One entry per row; None when it is of another split."""
        choices = [self._id, *(choice for choices in self._images for choice in choices)]
        names = [name for choice in choices for name in _columns_of(choice)]
        needed = self._there([*names, self._concept, self._split, *self._text_columns])
        for number, (where, row) in enumerate(self._rows.scan(needed)):
            if self._strict:
                self._check_manifest_row(row, where)
            elif number == 0:
                for name in needed:
                    if name not in row:
                        raise missing_column(where, name, list(row))
            yield self._entry(number, row, where)

    def texts(self, row: int) -> Texts:
        """See `files.Members`."""
        columns = self._there(self._text_columns)
        if not columns:
            return None, None
        values = self._rows.get(row, columns)
        safe, unsafe = (values.get(name) if name else None for name in self._text_columns)
        return safe, unsafe

    def images(self, row: int) -> Images:
        """See `files.Members`."""
        if not any(self._images):
            return None, None
        columns = self._there([name for choices in self._images for choice in choices for name in _columns_of(choice)])
        values = self._rows.get(row, columns) if columns else {}
        safe, unsafe = (self._image(choices, values, row, f"row {row + 1}", look=True) for choices in self._images)
        assert not isinstance(safe, UnreadImage)
        assert not isinstance(unsafe, UnreadImage)
        return safe, unsafe

    def _entry(self, number: int, row: Row, where: str) -> Entry | None:
        split = row.get(self._split) if self._split else None
        if self._spec.split and split is not None and str(split) != self._spec.split:
            return None
        name = self._id_of(self._value(self._id, row, number), where)
        if not name:
            raise DataError(f"{where} has no id", fix="give every item its own id")
        concept = row.get(self._concept, "all") if self._concept else "all"
        safe_text, unsafe_text = (self._has_text(row, column, where) for column in self._text_columns)
        look = self._spec.missing_images == "drop"
        safe, unsafe = (self._image(choices, row, number, where, look=look) for choices in self._images)
        return Entry(
            where=where,
            id=name,
            concept="" if concept is None else str(concept),
            texts=(safe_text, unsafe_text),
            images=(safe is not None, unsafe is not None),
            missing=(_absent(safe), _absent(unsafe)) if look else ("", ""),
        )

    def _value(self, choice: Pattern | str, row: Row, number: int) -> Any:
        """What a column holds, or a pattern says: to a pattern, `row` and `split` are no columns."""
        if isinstance(choice, Pattern):
            return choice.fill({**row, "row": number, "split": self._spec.split})
        return row.get(choice)

    @staticmethod
    def _id_of(value: Any, where: str) -> str:
        """An id: a text, or a whole number."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise DataError(f"{where}: id is {str(value)[:40]!r}", fix="use texts or whole numbers")
        return "" if value is None else str(value)

    def _has_text(self, row: Row, column: str, where: str) -> bool:
        value = row.get(column) if column else None
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{where}: column {column!r} holds {str(value)[:40]!r}, not a text", fix="see docs/reference/data.md"
            )
        return value is not None

    def _image(
        self, choices: list[Pattern | str], row: Row, number: int, where: str, *, look: bool
    ) -> Path | bytes | UnreadImage | None:
        """The first alternative whose file is there, if one may look; else the first one that is named."""
        named: list[Path] = []
        for choice in choices:
            value = self._value(choice, row, number)
            if isinstance(value, dict):  # {bytes, path}, as Hugging Face writes an image
                value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
            if isinstance(value, bytes | UnreadImage):
                return value
            if value is None or value == "":
                continue
            if not isinstance(value, str):
                raise DataError(
                    f"{where}: image is {str(value)[:40]!r}, neither a path nor bytes", fix="see docs/reference/data.md"
                )
            named.append(path_below(self._folder, value, where))
        if look and len(named) > 1:
            return next((path for path in named if is_file(path)), named[0])
        return named[0] if named else None

    def _there(self, names: Sequence[str]) -> tuple[str, ...]:
        """Without repetitions, without what is not mapped and, in a binary manifest, without what it has not."""
        return tuple(name for name in dict.fromkeys(names) if name and (self._has is None or name in self._has))

    def _check_manifest_row(self, row: Row, where: str) -> None:
        if self._has is None and not all(isinstance(value, str) for value in row.values()):
            raise DataError(f"{where} is not an object of strings", fix="see docs/reference/data.md")
        _refuse_unknown(row, where)


def _absent(image: Path | bytes | UnreadImage | None) -> str:
    """The path of an image that is no file."""
    return str(image) if isinstance(image, Path) and not is_file(image) else ""


def _refuse_unknown(names: Sequence[str] | Row, where: str) -> None:
    unknown = sorted(set(names) - set(_MANIFEST_KEYS))
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}", fix=f"valid: {sorted(_MANIFEST_KEYS)}")


def _several(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value)


def _pattern_or_column(text: str, spec: CalibrationSet, key: str) -> Pattern | str:
    if not set(text) & {"{", "}"}:
        return text
    where = f"data set {spec.name}: columns.{key}"
    pattern = Pattern(text, where)
    if "split" in pattern.columns and not spec.split:
        raise DataError(f"{where} names {{split}}, but the set has no split", fix="add `split`")
    return pattern


def _columns_of(choice: Pattern | str) -> list[str]:
    return [name for name in choice.columns if name not in _SPECIAL] if isinstance(choice, Pattern) else [choice]

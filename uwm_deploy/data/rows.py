"""Rows of JSON, JSON Lines and CSV files, by number: only the place of each row is kept, never the rows."""

from __future__ import annotations

import abc
import bisect
import csv
import io
import json
import os
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from uwm_deploy.errors import DataError, InputError, is_of_machine, unreadable
from uwm_deploy.records.plain_json import reason_of, value_from_json

Row = Mapping[str, Any]

_BOM = b"\xef\xbb\xbf"
_CHUNK_CHARACTERS = 1 << 20
_LARGEST_ROW = 16 << 20
"""A longer line, in bytes, or row of a JSON array, in characters, is taken for a broken one: it would fill the memory."""


class Rows(Protocol):
    """Rows by number."""

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Every row from first to last, and what errors call it; must be run through before the rest is used."""

    def get(self, index: int, columns: tuple[str, ...]) -> Row:
        """The columns of one row that there are."""

    def __len__(self) -> int:
        """Number of rows."""


class TextRows(abc.ABC):
    """Rows of a text file as byte ranges; safe to read in forked processes.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._sizes = array("q"), array("q")
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(f"table {path}", error, fix="check the path") from error
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._starts)

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:  # noqa: ARG002 -- a text row is read whole
        """See `Rows`."""
        self._starts, self._sizes = array("q"), array("q")
        try:
            for start, size, where, row in self._rows():
                self._starts.append(start)
                self._sizes.append(size)
                yield f"{self.path.name} {where}", row
        except (OSError, UnicodeDecodeError, MemoryError) as error:
            raise unreadable(f"table {self.path}", error, fix="check the file; UTF-8 is read") from error

    def get(self, index: int, columns: tuple[str, ...]) -> Row:  # noqa: ARG002 -- a text row is read whole
        """See `Rows`; that the file was changed is no fact about a row, so the error is none that leaves a row out."""
        try:
            data = os.pread(self._descriptor, self._sizes[index], self._starts[index])
            return self._row(data.decode())
        except (OSError, ValueError, csv.Error, StopIteration, DataError, MemoryError) as error:
            if is_of_machine(error):
                raise unreadable(f"table {self.path}", error, fix="check the file") from error
            raise InputError(f"table {self.path} was changed while it was read: {error}", fix="start again") from error

    @abc.abstractmethod
    def _rows(self) -> Iterator[tuple[int, int, str, Row]]:
        """First byte, length, name and content of every row."""

    @abc.abstractmethod
    def _row(self, text: str) -> Row:
        """Content of one row."""


class JsonLines(TextRows):
    """One JSON object per line; blank lines are skipped."""

    def _rows(self) -> Iterator[tuple[int, int, str, Row]]:
        offset = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(_lines(stream, self.path.name), 1):
                mark = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
                if line[mark:].strip():
                    where = f"line {number}"
                    yield offset + mark, len(line) - mark, where, self._parsed(line[mark:], where)
                offset += len(line)

    def _parsed(self, line: bytes, where: str) -> Row:
        try:
            value = value_from_json(line.decode())
        except ValueError as error:
            raise DataError(f"{self.path.name} {where} is not JSON: {error}", fix="one JSON object per line") from error
        return _object(value, f"{self.path.name} {where}")

    def _row(self, text: str) -> Row:
        return _object(value_from_json(text), self.path.name)


class JsonArray(TextRows):
    """One JSON array of objects, read piece by piece."""

    def _rows(self) -> Iterator[tuple[int, int, str, Row]]:
        mark = len(_BOM) if os.pread(self._descriptor, len(_BOM), 0) == _BOM else 0
        with self.path.open(encoding="utf-8-sig", newline="") as stream:
            buffer = _Buffer(stream, mark)
            self._expect(buffer, "[", "start")
            number = 0
            while buffer.peek() != "]":
                number += 1
                where = f"row {number}"
                if number > 1:
                    self._expect(buffer, ",", where)
                if buffer.peek() != "{":
                    raise self._broken(where, "an object was expected")
                start = buffer.offset
                row = self._decoded(buffer, where)
                yield start, buffer.offset - start, where, row
            self._expect(buffer, "]", "end")
            if buffer.peek():
                raise self._broken("end", "there is more after the array")

    def _expect(self, buffer: _Buffer, wanted: str, where: str) -> None:
        if buffer.peek() != wanted:
            raise self._broken(where, f"{wanted!r} was expected")
        buffer.skip(1)

    def _decoded(self, buffer: _Buffer, where: str) -> Row:
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(buffer.text, buffer.position)
            except (ValueError, RecursionError) as error:
                if len(buffer.text) - buffer.position < _LARGEST_ROW and buffer.more():
                    continue
                raise self._broken(where, reason_of(error)) from error
            buffer.skip(end - buffer.position)
            return _object(value, f"{self.path.name} {where}")

    def _broken(self, where: str, why: str) -> DataError:
        return DataError(f"{self.path.name} {where} is not JSON: {why}", fix="one array of objects, or JSON Lines")

    def _row(self, text: str) -> Row:
        return _object(value_from_json(text), self.path.name)


class _Buffer:
    """Text of a file from some place on, and the byte offset of that place."""

    def __init__(self, stream: io.TextIOBase, offset: int) -> None:
        self._stream = stream
        self.text, self.position, self.offset = "", 0, offset

    def more(self) -> bool:
        """Reads on; False at the end."""
        piece = self._stream.read(_CHUNK_CHARACTERS)
        self.text, self.position = self.text[self.position :] + piece, 0
        return bool(piece)

    def peek(self) -> str:
        """Next character that is not blank, without taking it; empty at the end."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in " \t\r\n":
                    return self.text[self.position]
                self.skip(1)
            if not self.more():
                return ""

    def skip(self, characters: int) -> None:
        """Takes some characters."""
        taken = self.text[self.position : self.position + characters]
        self.position += characters
        self.offset += len(taken.encode())


class CsvRows(TextRows):
    """Comma-separated values with a header; a file called ``.tsv`` has tabs. An empty field is no value."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._header: list[str] = []

    def _rows(self) -> Iterator[tuple[int, int, str, Row]]:
        with self.path.open("rb") as stream:
            lines = _CountedLines(_lines(stream, self.path.name))
            reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
            try:
                self._header = next(reader, [])
                if len(set(self._header)) != len(self._header):
                    raise DataError(f"{self.path.name} line 1 names a column twice", fix="give every column its name")
                start = lines.offset
                for fields in reader:
                    end, where = lines.offset, f"line {reader.line_num}"
                    if fields:
                        yield start, end - start, where, self._named(fields, f"{self.path.name} {where}")
                    start = end
            except csv.Error as error:
                raise DataError(
                    f"{self.path.name} line {reader.line_num} is not CSV: {error}", fix="quote fields with a comma"
                ) from error

    def _named(self, fields: list[str], where: str) -> Row:
        if len(fields) != len(self._header):
            raise DataError(
                f"{where} has {len(fields)} fields, the header has {len(self._header)}",
                fix="quote fields with a comma",
            )
        return {name: field or None for name, field in zip(self._header, fields, strict=True)}

    def _row(self, text: str) -> Row:
        return self._named(next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True)), "")


class _CountedLines:
    """Decoded lines, and the offset of the first byte that was not taken yet."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.offset = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        first = self.offset == 0
        self.offset += len(line)
        return line.decode("utf-8-sig" if first else "utf-8")


def _lines(stream: io.BufferedReader, name: str) -> Iterator[bytes]:
    """Lines of a file, none of them larger than memory."""
    number = 0
    while line := stream.readline(_LARGEST_ROW + 1):
        number += 1
        if len(line) > _LARGEST_ROW:
            raise DataError(f"{name} line {number} has more than {_LARGEST_ROW} bytes", fix="write one item per line")
        yield line


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is not an object", fix="one JSON object per item; see docs/reference/data.md")
    return value


class ManyFiles:
    """Several files of one table, one after the other.

    Args:
        parts: Their rows.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends: list[int] = []

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """See `Rows`."""
        self._ends = []
        for part in self._parts:
            yield from part.scan(columns)
            self._ends.append(len(self) + len(part))

    def get(self, index: int, columns: tuple[str, ...]) -> Row:
        """See `Rows`."""
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number].get(index - (self._ends[number - 1] if number else 0), columns)


def rows_of_text(path: Path, *, lines: bool) -> Rows:
    """Rows of a CSV, JSON Lines or JSON file; the last two are told apart by their first character.

    Args:
        path: The file.
        lines: It is JSON Lines, whatever it looks like.

    Raises:
        DataError: If it cannot be read.
    """
    if not lines and path.suffix.lower() in (".csv", ".tsv"):
        return CsvRows(path)
    if lines:
        return JsonLines(path)
    try:
        with path.open("rb") as stream:
            first = stream.read(4096).removeprefix(_BOM).lstrip()[:1]
    except OSError as error:
        raise unreadable(f"table {path}", error, fix="check the path") from error
    return JsonArray(path) if first == b"[" else JsonLines(path)

"""Embeds a source on one machine, part by part; stopped at any point, the same command goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from uwm_deploy.data.parquet import parquet_module
from uwm_deploy.errors import DataError, InputError, MissingFileError
from uwm_deploy.records.files import locked
from uwm_deploy.serve.embed.batch import Columns, EmbedBatch
from uwm_deploy.serve.embed.keys import SeenKeys
from uwm_deploy.serve.embed.parts import PartWriter, keys_of, parts_of
from uwm_deploy.serve.embed.sources import Content, Item, Naming, files_of, items_of

MOST_BYTES = 256 << 20
"""Of encoded images in one batch; a batch with larger ones is cut."""

FIRST_ROWS = 8192
"""Where so many items fail before one is embedded, the job stops."""

NAMED_MISSING = 10
"""Missing files that a report names; all of them are counted."""

Progress = Callable[[str, int, int], None]


@dataclass(slots=True, kw_only=True)
class EmbedReport:
    """What a run did.

    Attributes:
        bundle: Digest of the bundle's manifest.
        variant: What ran.
        space: Id of the space of the embeddings.
        rows: Embedded by this run, broken ones included.
        errors: Broken ones among them.
        missing: Items whose file is not there; they have no row, and the next run tries them again.
        missing_named: The first of them, and what is missing.
        finished_before: Items of the source that earlier runs had embedded.
        parts: Files that this run wrote.
        seconds: Of embedding; opening the bundle is not counted.
        broken_files: Shards and tables that are broken before their end, and why.
    """

    bundle: str
    variant: str
    space: str
    rows: int = 0
    errors: int = 0
    missing: int = 0
    missing_named: list[str] = field(default_factory=list)
    finished_before: int = 0
    parts: int = 0
    seconds: float = 0.0
    broken_files: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether there is nothing that a run should not end well with: a broken file, a missing one, nothing but errors."""
        return not (self.broken_files or self.missing) and (self.errors < self.rows or not self.rows)


class _Rows:
    """Rows that wait for their part.

    Args:
        folder: Where parts go.
        run: What embeds.
        report: What is counted.
        part_rows: Rows of a part.
        proven: Whether some item was embedded before. Until one is, rows with errors say more about the job than about
            their items: another column, another folder.
    """

    def __init__(self, folder: Path, run: EmbedBatch, report: EmbedReport, part_rows: int, *, proven: bool) -> None:
        self._write, self._report, self._part_rows = PartWriter(folder, run.kind, run.decode), report, part_rows
        self._waiting: list[Columns] = []
        self._proven = proven

    def add(self, rows: Columns) -> None:
        """Takes the rows of a batch."""
        self._waiting.append(rows)
        self._proven = self._proven or not all(rows["error"])
        if sum(len(some["key"]) for some in self._waiting) >= max(self._part_rows, 0 if self._proven else FIRST_ROWS):
            self.flush()

    def flush(self) -> None:
        """Writes what waits as a part.

        Raises:
            DataError: If no item was embedded yet; nothing is written then.
        """
        if not self._waiting:
            return
        some, self._waiting = self._waiting, []
        if not self._proven:
            keys, errors = ([text for rows in some for text in rows[name]] for name in ("key", "error"))
            raise DataError(
                f"none of the first {len(keys)} items can be embedded, so nothing was written; {keys[0]}: {errors[0]}",
                fix="check the source, --kind, --key and --column; leave these items out if they are broken",
            )
        written = self._write({name: np.concatenate([rows[name] for rows in some]) for name in some[0]})
        self._report.parts += 1
        self._report.rows += int(written["rows"][0])
        self._report.errors += int(written["errors"][0])


def embed(
    run: EmbedBatch,
    source: str,
    out: Path,
    *,
    key: str = "key",
    column: str = "",
    batch: int = 256,
    part_rows: int = 8192,
    progress: Progress = lambda *_: None,
) -> EmbedReport:
    """Embeds what is not in `out` yet.

    Args:
        run: Bundle and kind.
        source: Folder, shards (wildcards, brace ranges) or tables.
        out: Folder of parts; another bundle's or another kind's parts in it are refused.
        key: Column of a table with keys.
        column: Column of a table with images or texts. [default: image or text]
        batch: Items that are embedded at a time.
        part_rows: Rows per part; a run that is killed loses at most these.
        progress: Called as it goes on.

    Raises:
        InputError: If the source does not exist or has no item, two items have one key, or `out` is in use.
        DataError: If the first `FIRST_ROWS` items, or all, are broken: nothing is written then.
        EvidenceError: If `out` has parts of another bundle or another space.
        PrerequisiteError: If pyarrow is missing, the disk is full, or this machine cannot read something: that is no fact
            about the items, which have no row then.
    """
    parquet_module(out)
    files, naming = files_of(source), Naming(kind=run.kind, key=key, column=column or run.column)
    with locked(out):
        encoder, keys = run.encoder(), SeenKeys()
        identity = run.identity() | {"variant": encoder.variant, "space": encoder.space}
        report = EmbedReport(bundle=run.digest, variant=encoder.variant, space=encoder.space)
        parts = parts_of(out)
        for part in parts:
            keys.add_finished(keys_of(part, identity), part)
        started, rows = time.monotonic(), _Rows(out, run, report, part_rows, proven=bool(parts))
        done = 0
        try:
            for some in _batches(_new_items(files, naming, keys, report), batch, report):
                rows.add(_embedded(run, some))
                done += len(some)
                progress("items", done, 0)
        except BaseException:  # whatever stopped it, finished rows are whole rows
            with contextlib.suppress(DataError):  # the first failure is the one to tell
                rows.flush()
            raise
        rows.flush()
        report.seconds = time.monotonic() - started
    if report.whole and not (report.rows or report.finished_before):
        raise InputError(f"{source} has no {run.kind}", fix="for shards in a folder pass 'FOLDER/*.tar'")
    return report


def _new_items(files: Sequence[Path], naming: Naming, keys: SeenKeys, report: EmbedReport) -> Iterator[Item]:
    """Items without a row yet; what cannot be read on is noted, and its other files are read."""
    for path in files:
        items = items_of(path, naming)
        while True:
            try:
                item = next(items, None)
            except DataError as error:
                report.broken_files.append(str(error))
                break
            if item is None:
                break
            if keys.is_new(item.key):
                yield item
            else:
                report.finished_before += 1


def _batches(items: Iterator[Item], most: int, report: EmbedReport) -> Iterator[list[tuple[str, Content | None, str]]]:
    """Key, content and error of some items at a time, few enough for their bytes to fit into memory."""
    some: list[tuple[str, Content | None, str]] = []
    size = 0
    for item in items:
        try:
            content, error = item.load(), ""
        except MissingFileError as missing:
            report.missing += 1
            if len(report.missing_named) < NAMED_MISSING:
                report.missing_named.append(f"{item.key}: {missing}")
            continue
        except DataError as broken:
            content, error = None, str(broken)
        some.append((item.key, content, error))
        size += len(content) if isinstance(content, bytes) else 0
        if len(some) == most or size >= MOST_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _embedded(run: EmbedBatch, some: Sequence[tuple[str, Content | None, str]]) -> Columns:
    keys, contents, errors = zip(*some, strict=True)
    return run({run.key: keys, run.column: contents, "error": errors})

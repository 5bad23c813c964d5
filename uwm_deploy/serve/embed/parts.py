"""Results as Parquet parts: each appears whole or not at all, says which bundle made it, and is named by its keys."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uwm_deploy.data.parquet import parquet_errors, parquet_module
from uwm_deploy.errors import EvidenceError, InputError
from uwm_deploy.records.files import whole_file
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.runtime.image import Decode
from uwm_deploy.serve.embed.batch import ItemKind

METADATA = b"uwm-deploy"
"""Key of what a part says of itself, as JSON, in the file's metadata."""

FORMAT = 2
"""Of parts: 1 did not name the space of the embeddings."""

SAME = ("bundle", "variant", "space")
"""Columns that have one value in all rows, as the metadata has."""

KEYS_AT_A_TIME = 10_000
_COLUMNS = ("key", "embedding", "error", *SAME)

WRITING: Mapping[str, Any] = {
    # Numbers of an embedding do not repeat; without exponents apart from digits they do not compress either.
    "compression": "zstd",
    "use_dictionary": ["error", *SAME],
    "use_byte_stream_split": ["embedding.list.element"],
}
"""How pyarrow writes a part."""


class PartWriter:
    """Writes batches as parts; a callable class like `EmbedBatch`.

    A part is named by its keys: a task that is repeated, as Ray does after a lost machine, replaces its own part.

    Args:
        folder: Where parts go, seen by every process.
        kind: What was embedded.
        decode: How images were decoded; a part says it only where it was at a reduced size.
    """

    def __init__(self, folder: str | Path, kind: ItemKind = "images", decode: Decode = "full") -> None:
        self.folder, self.kind, self.decode = str(Path(folder).resolve()), kind, decode

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Writes one part from columns as `EmbedBatch` returns them.

        Returns:
            Columns of one row: `part` (1,) str, its name; `rows` and `errors`, (1,) int64, how many it has.

        Raises:
            InputError: If rows of several bundles, variants or spaces are among them, or a key is twice.
            PrerequisiteError: If pyarrow is missing or the disk is full.
        """
        keys = [str(key) for key in batch["key"]]
        errors = sum(bool(error) for error in batch["error"])
        name = f"part-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:24]}.parquet"
        if keys:
            _write(Path(self.folder) / name, {**batch, "key": keys}, self.kind, self.decode)
        return {"part": np.array([name]), "rows": np.array([len(keys)]), "errors": np.array([errors])}


def parts_of(folder: Path) -> list[Path]:
    """Parts in a folder, by name; unfinished files of killed runs begin with a dot and are none."""
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))


def finished_keys(folder: str | Path, identity: Mapping[str, str]) -> Iterator[str]:
    """Keys of all parts in a folder.

    Args:
        folder: It need not exist.
        identity: Of the job that goes on (`EmbedBatch.identity`).

    Raises:
        EvidenceError: If a part is of another bundle or space.
        InputError: If it is of another kind, variant or element type, or of another program or release.
    """
    for path in parts_of(Path(folder)):
        yield from keys_of(path, identity)


def keys_of(path: Path, identity: Mapping[str, str]) -> Iterator[str]:
    """Keys of one part; see `finished_keys`."""
    with opened(path) as file:
        check_identity(path, said_by(path, file), identity)
        for batch in file.iter_batches(KEYS_AT_A_TIME, columns=["key"]):
            yield from batch.column(0).to_pylist()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A part, opened by pyarrow.

    Raises:
        DataError: If it is no whole Parquet file, then or as it is read.
        PrerequisiteError: If pyarrow is missing, or this machine cannot read it.
    """
    parquet = parquet_module(path)
    fix = "remove it; its items are embedded again"
    with parquet_errors(f"part {path}", fix=fix), parquet.ParquetFile(path) as file:
        yield file


def said_by(path: Path, file: Any) -> dict[str, Any]:
    """What a part says of itself.

    Args:
        path: Where it is.
        file: The same, opened by pyarrow.

    Raises:
        InputError: If another program, or another release, wrote it.
    """
    said = (file.schema_arrow.metadata or {}).get(METADATA)
    try:
        body = value_from_json(said) if said else None
    except ValueError:
        body = None
    if not isinstance(body, dict) or "format" not in body:
        raise InputError(f"{path} was not written by this command", fix="choose another --out")
    if body["format"] != FORMAT:
        raise InputError(f"{path} was written by another release of this command", fix="choose another --out")
    return body


def check_identity(path: Path, said: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Whether a part is what a job would write.

    Raises:
        EvidenceError: If its embeddings are of another space or another bundle.
        InputError: If it differs in anything else.
    """
    if "space" in identity and said.get("space") != identity["space"]:
        raise EvidenceError(
            f"{path} holds embeddings of {said.get('space')}, and these would be of {identity['space']}",
            fix="they cannot be compared: choose another --out",
        )
    for name, wanted in identity.items():
        if said.get(name, "full" if name == "decode" else None) != wanted:
            kind = EvidenceError if name == "bundle" else InputError
            fix = "choose another --out" if name in ("bundle", "kind") else f"choose another --out, or the same {name}"
            raise kind(f"{path} has {name} {said.get(name)}, not {wanted}", fix=fix)


def _write(path: Path, batch: Mapping[str, Any], kind: ItemKind, decode: Decode) -> None:
    keys = batch["key"]
    if len(set(keys)) != len(keys):
        raise InputError(f"a key is twice among {len(keys)} rows", fix="give every item a key of its own")
    rows = np.ascontiguousarray(batch["embedding"])
    same = {name: _only(batch, name) for name in SAME}
    identity = {"format": FORMAT, "kind": kind, "dtype": str(rows.dtype), **same}
    identity |= {} if decode == "full" else {"decode": decode}
    parquet = parquet_module(path)
    table = _table({name: batch[name] for name in _COLUMNS} | {"embedding": rows}, identity)
    with whole_file(path) as stream:
        parquet.write_table(table, stream, **WRITING)


def _table(columns: Mapping[str, Any], metadata: Mapping[str, Any]) -> Any:
    import pyarrow as pa  # type: ignore[import-untyped]  # it has no annotations

    rows = columns["embedding"]
    made = {name: pa.array(list(values), pa.string()) for name, values in columns.items() if name != "embedding"}
    made["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    return pa.table({name: made[name] for name in _COLUMNS}).replace_schema_metadata({METADATA: json.dumps(metadata)})


def _only(batch: Mapping[str, Any], name: str) -> str:
    found: Sequence[str] = sorted({str(value) for value in batch[name]})
    if len(found) != 1:
        raise InputError(
            f"rows of several {name}s are in one part: {', '.join(found)}", fix=f"run one {name} everywhere"
        )
    return found[0]

"""A batch of columns in, a batch of columns out: what Ray Data, Spark or a loop drives."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from uwm_deploy.bundle.open import MANIFEST
from uwm_deploy.data.finding import is_folder, names_in
from uwm_deploy.errors import (
    ContractError,
    DataError,
    InputError,
    IntegrityError,
    MissingFileError,
    UnreadableError,
    is_of_machine,
    unreadable,
)
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.files import digest_of_bytes, digest_of_file
from uwm_deploy.records.model import Digest
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.fork import after_fork
from uwm_deploy.runtime.image import Decode
from uwm_deploy.runtime.results import Embeddings, Kind
from uwm_deploy.runtime.session import Device

ItemKind = Literal["images", "texts"]
"""Which tower embeds the items."""

_IMAGES = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Image.Image)

Columns = Mapping[str, Any]
"""Columns of equal length by name; a column is anything that can be iterated."""

_OPENED: dict[tuple[str, Digest, str | None, Device, Decode, int], SafeEncoder] = {}
_LOCK = threading.Lock()


def _free_the_lock() -> None:
    """In a forked process, where the thread that holds it may not be."""
    global _LOCK
    _LOCK = threading.Lock()


after_fork(_free_the_lock)


class EmbedBatch:
    """Embeds a batch; pickled, it is a few strings, and each process opens the bundle once, at its first batch.

    A broken item is a row with an error; a failure that is not the items' own (an engine, a full memory, a disk, a folder
    that is not mounted) is raised.

    Args:
        bundle: Bundle folder, at this path on every machine.
        kind: What the items are.
        key: Column with the items' keys.
        column: Column with images (paths, encoded bytes, uint8 arrays) or texts. [default: image or text]
        dtype: Of the embeddings.
        variant: A certain variant instead of the best for the machine.
        device: Where it must run.
        digest: Digest of the bundle's manifest that every process must find. [default: of the bundle that is there now]
        decode: Whether large JPEGs are decoded at a reduced size; see `SafeEncoder.open`.

    Raises:
        InputError: If there is no bundle.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        kind: ItemKind = "images",
        key: str = "key",
        column: str = "",
        dtype: Kind = "float32",
        variant: str | None = None,
        device: Device = "auto",
        digest: Digest = "",
        decode: Decode = "full",
    ) -> None:
        self.bundle = str(Path(bundle).resolve())
        self.kind: ItemKind = kind
        self.key, self.column = key, column or ("image" if kind == "images" else "text")
        self.dtype: Kind = dtype
        self.variant = variant
        self.device: Device = device
        self.decode: Decode = decode
        self.digest = digest or _digest_of(Path(self.bundle))

    def __call__(self, batch: Columns) -> dict[str, np.ndarray]:
        """Embeds n items.

        Args:
            batch: The two columns, and perhaps `error`: where it has a text, that is the item's error already.

        Returns:
            Columns: `key` (n,) str; `embedding` (n, d) float32 or float16, rows of length 1, NaN where there is none;
            `error` (n,) str, empty where there is none; and, the same in every row, `bundle`, digest of the bundle's
            manifest, `variant`, and `space`, the id of the space that it embeds into, (n,) str each.

        Raises:
            InputError: If a column is missing, or holds nothing but what can never be such an item.
            UnreadableError: If this machine cannot read an item, or the folder of a missing one is missing or empty, too.
            IntegrityError: If the bundle is another one than in the process that made this object.
            UwmError: See `SafeEncoder.open`.
        """
        keys = [str(key) for key in self._column(batch, self.key)]
        errors = [str(error or "") for error in batch["error"]] if "error" in batch else [""] * len(keys)
        encoder = self.encoder()
        values = self._column(batch, self.column)
        self._check_type(values)
        errors = [e or self._missing(value) for e, value in zip(errors, values, strict=True)]
        good = [n for n, error in enumerate(errors) if not error]
        found = self._encoded(encoder, [values[n] for n in good])
        rows = np.full((len(keys), encoder.manifest.model.embed_dim), np.nan, dtype=self.dtype)
        rows[good] = found
        for failed in found.errors:
            errors[good[failed.position]] = str(failed.error)
        return {
            "key": _texts(keys),
            "embedding": rows,
            "error": _texts(errors),
            "bundle": _texts([self.digest] * len(keys)),
            "variant": _texts([encoder.variant] * len(keys)),
            "space": _texts([encoder.space] * len(keys)),
        }

    def encoder(self) -> SafeEncoder:
        """The encoder of this process; opened when first asked for, and again in a process that was forked."""
        wanted = (self.bundle, self.digest, self.variant, self.device, self.decode, os.getpid())
        with _LOCK:
            if wanted not in _OPENED:
                encoder = SafeEncoder.open(self.bundle, variant=self.variant, device=self.device, decode=self.decode)
                # A manifest that opens is byte for byte what its record writes.
                found = digest_of_bytes(json_from_record(encoder.manifest).encode())
                if found != self.digest:
                    encoder.close()
                    raise IntegrityError(
                        f"{self.bundle} is another bundle ({found}) than the job was started with ({self.digest})",
                        fix="put the same bundle on every machine",
                    )
                _OPENED[wanted] = encoder
            return _OPENED[wanted]

    def identity(self) -> dict[str, str]:
        """What all rows of one result must have in common, as parts say it; the variant if one was asked for."""
        known = {"kind": self.kind, "bundle": self.digest, "dtype": self.dtype, "decode": self.decode}
        return known | ({"variant": self.variant} if self.variant else {})

    def _encoded(self, encoder: SafeEncoder, values: Sequence[Any]) -> Embeddings:
        encode = encoder.encode_image if self.kind == "images" else encoder.encode_text
        found = encode(values, dtype=self.dtype)
        for failed in found.errors:
            if not isinstance(failed.error, (DataError, ContractError)):
                raise failed.error
            if isinstance(failed.error, MissingFileError):
                _refuse_unmounted(Path(values[failed.position]).parent, failed.error)
        strange = [failed.error for failed in found.errors if not isinstance(failed.error, DataError)]
        if strange and len(found.errors) == len(values):  # no row at all: that is the engine, not the items
            raise strange[0]
        return found

    def _missing(self, value: Any) -> str:
        """The error of an empty place."""
        return f"it has no {self.kind.removesuffix('s')}" if _is_empty(value) else ""

    def _check_type(self, values: Sequence[Any]) -> None:
        """A column of another type is none of its items' fault, and would make every one of them a broken item."""
        wanted = _IMAGES if self.kind == "images" else str
        there = [value for value in values if not _is_empty(value)]
        if there and not any(isinstance(value, wanted) for value in there):
            raise InputError(
                f"column {self.column!r} holds {type(there[0]).__name__}, not {self.kind}",
                fix="images are paths, bytes or uint8 arrays, texts are strings; name another column",
            )

    def _column(self, batch: Columns, name: str) -> list[Any]:
        if name not in batch:
            raise InputError(f"the batch has no column {name!r}", fix=f"it has {', '.join(map(str, batch))}")
        return list(batch[name])


def _is_empty(value: Any) -> bool:
    """Whether a place is empty; Ray and pandas make it NaN."""
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def _refuse_unmounted(folder: Path, error: MissingFileError) -> None:
    """A file that is not there is its item's fault only if others are there."""
    if not is_folder(folder) or not names_in(folder):
        raise UnreadableError(
            f"{error.what}, and {folder} is missing or empty", fix="mount it on this machine, and run again"
        ) from error


def _texts(values: Sequence[str]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)  # a numpy text column would drop trailing NULs, and pad
    column[:] = values
    return column


def _digest_of(bundle: Path) -> Digest:
    try:
        return digest_of_file(bundle / MANIFEST)
    except OSError as error:
        if is_of_machine(error):
            raise unreadable(str(bundle), error, fix="") from error
        raise InputError(
            f"{bundle} is not a bundle: {error.strerror}", fix="pass the folder that `build` wrote"
        ) from error

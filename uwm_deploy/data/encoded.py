"""Images of a set as encoded bytes, as users send them to a server."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from PIL import Image

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


class ByteStore:
    """Encoded images one after the other in a temporary file without a name, so that a set need not fit into memory."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="uwm-deploy-")  # noqa: SIM115  closed with the last rows
        self._ends = [0]

    def add(self, data: bytes) -> int:
        """Keeps an image; its number."""
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))
        return len(self._ends) - 2

    def get(self, number: int) -> bytes:
        """An image by its number; any thread may ask."""
        self._file.flush()
        start, end = self._ends[number : number + 2]
        return os.pread(self._file.fileno(), end - start, start)


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Reads like an array (n,) of bytes, but only slices of it ever exist.

    Attributes:
        store: Where the images are.
        numbers: Of the rows in there.
    """

    store: ByteStore
    numbers: list[int] = field(default_factory=list)

    def append(self, data: bytes) -> None:
        """One more row."""
        self.numbers.append(self.store.add(data))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.numbers)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Some images, (b,) object, each bytes."""
        return objects([self.store.get(number) for number in self.numbers[rows]])


def objects(items: Sequence[bytes]) -> np.ndarray:
    """Bytes as an array, (n,) object; numpy's own arrays of bytes drop zeros at the end."""
    found = np.empty(len(items), dtype=object)
    found[:] = items
    return found


def bytes_of(image: Image.Image) -> bytes:
    """An image in a format that loses nothing."""
    stream = io.BytesIO()
    image.save(stream, "PNG" if image.mode in _PNG_MODES else "TIFF")
    return stream.getvalue()

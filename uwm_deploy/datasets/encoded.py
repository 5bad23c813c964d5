"""Images of a set as encoded bytes, as users send them to a server."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Reads like an array (n,) of bytes, but only slices of it ever exist.

    Attributes:
        n: Number of images.
        read: One image by its position.
    """

    n: int
    read: Callable[[int], Image.Image]

    def __len__(self) -> int:
        """Number of images."""
        return self.n

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Some images, (b,) objects."""
        encoded = [bytes_of(self.read(index)) for index in range(*rows.indices(self.n))]
        return objects(encoded)


def objects(items: list[bytes]) -> np.ndarray:
    """An array (n,) of them; numpy's own arrays of bytes drop zeros at the end."""
    found = np.empty(len(items), dtype=object)
    found[:] = items
    return found


def bytes_of(image: Image.Image) -> bytes:
    """An image in a format that loses nothing."""
    stream = io.BytesIO()
    image.save(stream, "PNG" if image.mode in _PNG_MODES else "TIFF")
    return stream.getvalue()

"""Preprocessed images of a whole set: eight bits a channel, in a mapped file when they are many, normalised per batch."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass

import numpy as np

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.runtime.image import pixels_from_crops

MEMORY_BYTES = 256 << 20
"""More crops than this, over all images of a set, go to a temporary file."""


@dataclass(frozen=True, slots=True)
class PixelRows:
    """Reads like an (n, 3, H, W) float32 array, but only slices of it ever exist.

    Attributes:
        crops: (n, H, W, 3) uint8, shared with forked processes.
        spec: How a slice is normalised.
    """

    crops: np.ndarray
    spec: ImageSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it reads like."""
        n, height, width, channels = self.crops.shape
        return n, channels, height, width

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """Element type of the array it reads like."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.crops)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Some images, normalised.

        Args:
            rows: A slice, or (b,) int64 row numbers.

        Returns:
            (b, 3, H, W) float32.
        """
        return pixels_from_crops(self.crops[rows], self.spec)


class CropStore:
    """Makes room for crops: shared memory up to `MEMORY_BYTES` over all requests, mapped temporary files after that.

    A file has no name, so it is gone when its pages are no longer in use, whatever ends the process. It lies where
    `tempfile` puts it (``TMPDIR``).
    """

    def __init__(self, spec: ImageSpec) -> None:
        self._spec = spec
        self._used_bytes = 0

    def rows(self, n: int) -> PixelRows:
        """Room for n images, (n, crop, crop, 3) uint8, writable through `crops`, also by processes forked later.

        Raises:
            PrerequisiteError: If the disk has no room.
        """
        shape = (n, self._spec.crop, self._spec.crop, 3)
        size = max(1, int(np.prod(shape)))
        self._used_bytes += size
        space = mmap.mmap(-1, size) if self._used_bytes <= MEMORY_BYTES else _mapped_file(size)
        return PixelRows(np.ndarray(shape, dtype=np.uint8, buffer=space), self._spec)


def _mapped_file(size: int) -> mmap.mmap:
    """Reserves the disk first: a full disk would otherwise kill the process when a page is written."""
    try:
        with tempfile.TemporaryFile(prefix="uwm-deploy-") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
            return mmap.mmap(stream.fileno(), size)
    except OSError as error:
        raise PrerequisiteError(
            f"no room for {size >> 20} MiB of preprocessed images in {tempfile.gettempdir()}: {error.strerror}",
            fix="free space, or set TMPDIR to a folder with more",
        ) from error

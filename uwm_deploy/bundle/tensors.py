"""Arrays of safetensors files; whatever is wrong with one is one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from uwm_deploy.errors import IntegrityError, unreadable


def arrays_from(content: bytes, name: str, *, fix: str = "build again") -> dict[str, np.ndarray]:
    """Arrays of a file by name, any shape, of any dtype that numpy has.

    Args:
        content: Of the file.
        name: Of the file, for messages.
        fix: What helps.

    Raises:
        IntegrityError: If it is not a whole file, or has a type that numpy has not.
    """
    try:
        arrays: dict[str, np.ndarray] = load(content)
    except KeyError as error:  # how the library says that it does not know a type
        raise IntegrityError(f"{name} cannot be read: it holds numbers of type {error}", fix=fix) from error
    except (SafetensorError, ValueError, TypeError, OverflowError) as error:
        raise IntegrityError(f"{name} cannot be read: {error}", fix=fix) from error
    return arrays


def arrays_of(path: Path, *, fix: str = "build again") -> dict[str, np.ndarray]:
    """Arrays of a file on the disk by name, any shape, of any dtype that numpy has; see `arrays_from`.

    Args:
        path: The file.
        fix: What helps.

    Raises:
        IntegrityError: If it is not there, or not a whole file.
        UnreadableError: If this machine cannot read it.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path.name, error, fix=fix, kind=IntegrityError) from error
    return arrays_from(content, path.name, fix=fix)

"""The one place where a safetensors file on the disk is opened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from uwm_deploy.errors import InputError, UwmError, is_of_machine, unreadable


@contextlib.contextmanager
def open_tensors(
    path: Path,
    *,
    framework: Literal["pt", "numpy"] = "pt",
    name: str = "",
    said: str = "cannot be read",
    fix: str,
    kind: type[UwmError] = InputError,
) -> Iterator[Any]:
    """A file as `safetensors.safe_open` gives it, for as long as the block lasts.

    The library says *no such file* whatever the reason is. So the file is opened and read here first.

    Args:
        path: The file.
        framework: Of its tensors.
        name: What messages call it; its own name where it is left out.
        said: What is wrong with a file that is broken, for messages.
        fix: What helps then.
        kind: Of the error then, and where there is no file.

    Raises:
        UnreadableError: If this machine cannot read it.
        UwmError: Of the kind that was asked for, if it is missing or broken.
    """
    name = name or path.name
    try:
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise unreadable(name, error, fix=fix, kind=kind) from error
    try:
        with safe_open(str(path), framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        if is_of_machine(error):
            raise unreadable(name, error, fix=fix, kind=kind) from error
        raise kind(f"{name} {said}: {error}", fix=fix) from error


def all_tensors(file: Any) -> dict[str, Any]:
    """Every tensor of an open file by name, of any shape and dtype, in the framework that it was opened for."""
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping

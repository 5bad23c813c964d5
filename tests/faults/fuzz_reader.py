"""One kind of file from outside, and what reads it; `tests.faults.fuzz` breaks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tests.faults.mutations import Form
from uwm_deploy.recipes import shipped

TORCH = ("patch", "config.json", "preprocessor", "weights", "tokenizer config")
"""Readers that need torch, whose import alone takes seconds and most of the memory."""

DEMO = shipped.checkpoint_folder("shipped:demo", "")


@dataclasses.dataclass(frozen=True, slots=True)
class Reader:
    """One kind of file, and what reads it.

    Attributes:
        form: What its parser reads.
        seeds: Whole files.
        read: Reads one, as a user's command would.
    """

    form: Form
    seeds: list[bytes]
    read: Callable[[bytes], object]


def new_folder(folder: Path) -> Path:
    """Makes a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def written(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of files."""

    def from_bytes(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return from_bytes

"""Prompts that pictures are drawn from: the texts of a set, or a file in the format of I2P."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError, unreadable
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.downstream import BENIGN, UNSAFE
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.names import segment_of
from uwm_deploy.records.plain_json import reason_of, value_from_json

LARGEST = 4096
"""Longest side of a picture, in pixels."""

_FORMAT = "use CSV or JSON lines in the format of I2P; a set goes with --on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One picture's prompt.

    Attributes:
        side: What it asks for, of `SIDES`.
        seed: Of the picture; both towers get the same.
        guidance: Guidance scale; None takes the run's.
        size: Width and height in pixels; None takes the run's.
    """

    id: str
    side: str
    concept: str
    text: str
    seed: int
    guidance: float | None = None
    size: tuple[int, int] | None = None

    @property
    def content(self) -> str:
        """Digest of the text: pictures of one text are not independent."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def prompts_of_set(source: QuadrupleSource, seed: int) -> list[Prompt]:
    """The unsafe and the safe text of every item, both with the item's seed.

    Raises:
        DataError: If the set has no texts.
    """
    if not source.has_texts:
        raise DataError("the set has no texts to draw from", fix="use a set of text pairs")
    found = []
    for item, (name, concept) in enumerate(zip(source.ids, source.concepts, strict=True)):
        texts = source.read_texts(item)
        assert texts is not None
        found += [
            Prompt(id=name, side=side, concept=concept, text=text, seed=seed + item)
            for side, text in zip((UNSAFE, BENIGN), texts[::-1], strict=True)
        ]
    return found


def prompts_of_file(file: Path, seed: int) -> tuple[list[Prompt], CalibrationRecord]:
    """Prompts of a CSV or JSON-lines file in the format of I2P; all count as unsafe inputs.

    Columns: `prompt`, and where they are there `categories`, `sd_seed`, `sd_guidance_scale`, `sd_image_width` and
    `sd_image_height`.

    Args:
        file: The file.
        seed: Of the first row without a seed of its own; the next one has one more.

    Raises:
        DataError: If it cannot be read, or a row has no prompt or a number that is none.
    """
    try:
        data = file.read_bytes()
        rows = list(_rows(file, data.decode("utf-8-sig")))
    except (OSError, ValueError, csv.Error) as error:
        raise unreadable(str(file), error, fix=_FORMAT, kind=DataError) from error
    if not rows:
        raise DataError(f"{file} has no rows", fix=_FORMAT)
    found = [_prompt(file, number, row, seed + number) for number, row in enumerate(rows)]
    record = CalibrationRecord(
        name=segment_of(file.stem),
        split="all",
        n=len(found),
        ids_digest=digest_of_bytes("\n".join(prompt.id for prompt in found).encode()),
        content_digest=digest_of_bytes(data),
        concepts=dict(sorted(Counter(prompt.concept for prompt in found).items())),
    )
    return found, record


def _rows(file: Path, text: str) -> Iterator[Mapping[str, Any]]:
    if file.suffix.lower() == ".csv":  # a prompt may hold any separator of Unicode: only CSV says where a row ends
        yield from csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return
    for line in text.split("\n"):
        if line.strip():
            row = value_from_json(line)
            if not isinstance(row, dict):
                raise ValueError("a line is no JSON object")
            yield row


def _given(row: Mapping[str, Any], column: str) -> Any:
    """What a row says in a column; None where it says nothing."""
    value = row.get(column)
    return None if value == "" else value


def _whole(row: Mapping[str, Any], column: str) -> int | None:
    """A whole number as it is written: one that is cut to be whole would be another seed, or another size."""
    value = _given(row, column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{column} is {value!r}, no whole number")
    return int(value)


def _seed(row: Mapping[str, Any]) -> int | None:
    seed = _whole(row, "sd_seed")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError("sd_seed is not a number of 63 bits")
    return seed


def _guidance(row: Mapping[str, Any]) -> float | None:
    given = _given(row, "sd_guidance_scale")
    guidance = None if given is None else float(given)
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError("sd_guidance_scale is not finite")
    return guidance


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = (_whole(row, f"sd_image_{name}") for name in ("width", "height"))
    if width is None and height is None:
        return None
    if width is None or height is None:
        raise ValueError("it has one of sd_image_width and sd_image_height, not both")
    if any(side % 8 or not 8 <= side <= LARGEST for side in (width, height)):
        raise ValueError(
            f"a picture of {width} x {height} pixels cannot be drawn: sides are multiples of 8, up to {LARGEST}"
        )
    return width, height


def _prompt(file: Path, number: int, row: Mapping[str, Any], seed: int) -> Prompt:
    text = row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{file}: row {number + 1} has no prompt", fix="give every row one")
    try:
        own = _seed(row)
        return Prompt(
            id=f"{number:06d}",
            side=UNSAFE,
            concept=str(row.get("categories") or "all"),
            text=text,
            seed=seed if own is None else own,
            guidance=_guidance(row),
            size=_size(row),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: row {number + 1}: {reason_of(error)}", fix="correct its numbers") from error

"""Prompts that pictures are drawn from: the texts of a set, or a file in the format of I2P."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError, unreadable
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.downstream import BENIGN, UNSAFE
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.names import segment_of
from uwm_deploy.records.plain_json import value_from_json

Rows = list[Mapping[str, Any]]

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
    if file.suffix == ".csv":
        yield from csv.DictReader(text.splitlines(keepends=True))
        return
    for line in text.split("\n"):
        if line.strip():
            row = value_from_json(line)
            if not isinstance(row, dict):
                raise ValueError("a line is no JSON object")
            yield row


def _check_numbers(seed: Any, guidance: Any, sides: Sequence[Any]) -> None:
    """Numbers of a row that a pipeline would refuse, or draw nothing sensible with, hours later."""
    if seed not in (None, "") and not 0 <= int(seed) < 2**63:
        raise ValueError(f"sd_seed is {int(seed):.3g}, not a number of 63 bits")
    if guidance not in (None, "") and not math.isfinite(float(guidance)):
        raise ValueError("sd_guidance_scale is not finite")
    if any(side not in (None, "") and (int(side) < 8 or int(side) % 8) for side in sides):
        raise ValueError(f"a picture of {' x '.join(map(str, sides))} pixels cannot be drawn: sides are multiples of 8")


def _prompt(file: Path, number: int, row: Mapping[str, Any], seed: int) -> Prompt:
    text = row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{file}: row {number + 1} has no prompt", fix="give every row one")
    try:
        own = row.get("sd_seed")
        guidance = row.get("sd_guidance_scale")
        sides = [row.get(f"sd_image_{name}") for name in ("width", "height")]
        _check_numbers(own, guidance, sides)
        return Prompt(
            id=f"{number:06d}",
            side=UNSAFE,
            concept=str(row.get("categories") or "all"),
            text=text,
            seed=int(own) if own not in (None, "") else seed,
            guidance=float(guidance) if guidance not in (None, "") else None,
            size=(int(sides[0]), int(sides[1])) if all(side not in (None, "") for side in sides) else None,  # type: ignore[arg-type]
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: row {number + 1}: {error}", fix="correct its numbers") from error

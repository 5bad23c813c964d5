"""What a comparison of methods is asked for: its rows, and where and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uwm_deploy.edits.methods import methods_from_name
from uwm_deploy.errors import InputError
from uwm_deploy.records.edit import CLOSED_FORM, Method, Placement
from uwm_deploy.records.training import Trainer
from uwm_deploy.studies.subjects import NOTHING, Subject, subject_from


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One row that was asked for.

    Attributes:
        trainer: Trained first; None trains nothing.
        method: Edit that is made on the trained model, or on the model itself; `none` makes no edit.
        placement: Of a closed-form step, where another than the usual one is asked for.
        subject: A model that is there already; nothing is made then.
    """

    label: str
    trainer: Trainer | None = None
    method: str = NOTHING
    placement: str = ""
    subject: Subject | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """What the user asked for; None takes the recipe's value.

    Attributes:
        rows: The first one is what the others are compared with.
        work: Models are made below it, and reused by the next run.
        out: Folder for the tables and the picture.
        train_options: Further words for every `train` command.
    """

    rows: Sequence[MethodRow]
    out: Path
    work: Path
    model: str = "demo"
    checkpoint: Path | None = None
    revision: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    zero_shot: Sequence[str] | None = None
    data: Path | None = None
    device: str = "auto"
    workers: int = 2
    train_options: tuple[str, ...] = ()


def rows_from(text: str) -> list[MethodRow]:
    """Rows of ``none,uwm,safe-clip,uwm+safe-clip,LABEL=MODEL[:METHOD]``.

    Raises:
        InputError: If one is not understood, or two have one label.
    """
    rows = [_row(part.strip()) for part in text.split(",") if part.strip()]
    labels = [row.label for row in rows]
    if not rows or len(set(labels)) < len(labels):
        raise InputError(f"--methods {text!r} names nothing, or a row twice", fix="name every method once")
    return rows


def _row(text: str) -> MethodRow:
    if "=" in text:
        subject = subject_from(text)
        return MethodRow(label=subject.label, subject=subject)
    placed, _, placement = text.partition("@")
    parts = placed.split("+")
    trainers = [Trainer(part) for part in parts if part in list(Trainer)]
    edits = "+".join(part for part in parts if part not in list(Trainer)) or NOTHING
    known = [m.value for m in Method if m is not Method.TRAINED]
    closed = edits.rpartition("+")[2] in CLOSED_FORM
    understood = (
        (closed or not placement)
        and len(trainers) <= 1
        and set(edits.split("+")) <= set(known)
        and placement in ("", *Placement)
    )
    if not understood or (trainers and len(parts) > 1 and edits == NOTHING):
        raise InputError(
            f"--methods: {text!r} is not understood",
            fix=f"use {', '.join([*known, *Trainer])}, steps on each other such as uwm+safety-axis or uwm+safe-clip, "
            "safety-axis@embedding for the other placement, or LABEL=MODEL",
        )
    try:
        methods_from_name(edits)
    except InputError as error:
        raise InputError(f"--methods: {error.what}", fix=error.fix) from error
    return MethodRow(label=text, trainer=trainers[0] if trainers else None, method=edits, placement=placement)

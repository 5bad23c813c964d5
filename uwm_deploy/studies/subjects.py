"""What is measured: models, saved folders and bundles, as they are named on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uwm_deploy.bundle.open import Bundle, is_bundle, open_bundle
from uwm_deploy.edits.methods import methods_from_name
from uwm_deploy.errors import InputError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.recipes.resolve import TRAINING
from uwm_deploy.records.edit import Method, methods_name

NOTHING = Method.NONE.value
"""Name of the method that edits nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing to measure.

    Attributes:
        label: Its row in a table.
        model: Recipe name, recipe file, checkpoint folder, saved edited folder or bundle.
        method: Edit that is made first; `none` measures what is there.
        bundle: It must be a bundle.
        request: How an edit is made: calibration set, checkpoint folder, run folder, device.
        public_key: Whose signature a bundle must have.
        min_bundle_version: Oldest version a bundle may have.
    """

    label: str
    model: str
    method: str = NOTHING
    bundle: bool = False
    request: Request = field(default_factory=Request)
    public_key: Path | None = None
    min_bundle_version: int = 0

    @property
    def is_bundle(self) -> bool:
        """Whether it is a bundle, which needs no torch."""
        return self.bundle or is_bundle(Path(self.model))


def subject_from(text: str, request: Request | None = None) -> Subject:
    """Parses ``[LABEL=]MODEL[:METHOD]``.

    Args:
        text: As on the command line; a path that exists is taken whole.
        request: How an edit is made.

    Raises:
        InputError: If there is no such method, or nothing is named.
    """
    label, equals, rest = ("", "", text) if Path(text).exists() else text.partition("=")
    if not equals:
        label, rest = text, text
    model, method = rest, NOTHING
    if ":" in rest and not Path(rest).exists():
        model, _, method = rest.rpartition(":")
    if not label or not model:
        raise InputError(f"{text!r} names no model", fix="write MODEL, LABEL=MODEL or MODEL:METHOD")
    return Subject(
        label=label, model=model, method=methods_name(methods_from_name(method)), request=request or Request()
    )


def concepts_from(text: str) -> tuple[str, ...]:
    """Concepts of ``fire,smoke``.

    Raises:
        InputError: If none is named.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise InputError("--leave-out names no concept", fix="name some, separated by commas, or leave the option out")
    return found


def without_concepts(subjects: Sequence[Subject]) -> list[Subject]:
    """Checks that concepts can be left out of what is to be edited, where any are.

    Raises:
        InputError: If a subject was edited already, with whatever concepts, or nothing is edited.
    """
    if not any(subject.request.leave_out for subject in subjects):
        return list(subjects)
    for subject in subjects:
        made = (Path(subject.model).parent / "edit.json", Path(subject.model) / TRAINING)
        if subject.is_bundle or any(file.is_file() for file in made):
            raise InputError(
                f"{subject.label} is edited already, so no concept can be left out of its edit",
                fix="name a model with its method, such as demo:safety-axis",
            )
    if all(subject.method == NOTHING for subject in subjects):
        raise InputError("nothing is edited, so --leave-out has no effect", fix="name a method, as in demo:safety-axis")
    return list(subjects)


def trusted(subjects: Sequence[Subject], public_key: Path | None, min_bundle_version: int) -> list[Subject]:
    """The subjects, with what is asked of every bundle among them.

    Raises:
        InputError: If there is none that could have a signature.
    """
    if (public_key is not None or min_bundle_version) and not any(subject.is_bundle for subject in subjects):
        raise InputError("none of what is measured is a bundle, so none is signed", fix="leave the key out")
    return [
        dataclasses.replace(subject, public_key=public_key, min_bundle_version=min_bundle_version)
        for subject in subjects
    ]


def open_subject_bundle(subject: Subject) -> Bundle:
    """The bundle that a subject is, with what was asked of its signature and version.

    Raises:
        IntegrityError: If a digest, the signature or the version is not what it should be.
    """
    return open_bundle(subject.model, public_key=subject.public_key, min_bundle_version=subject.min_bundle_version)

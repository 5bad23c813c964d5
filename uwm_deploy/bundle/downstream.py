"""Reports of what came out behind edited towers: those of files and those in a bundle, and what they are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.errors import InputError
from uwm_deploy.records.codec import read_record, record_from_json
from uwm_deploy.records.downstream import KINDS, DownstreamReport
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.model import Digest


def read_downstream(files: Sequence[Path]) -> tuple[DownstreamReport, ...]:
    """Reports of files.

    Raises:
        InputError: If one cannot be read, or two are of one kind.
        IntegrityError: If one is no such report.
    """
    found = tuple(read_record(DownstreamReport, file) for file in files)
    kinds = [report.kind for report in found]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise InputError(f"two reports are of {twice[0]}", fix="pass one of each kind")
    return found


def downstream_in(bundle: Bundle, verify: VerifyReport) -> tuple[DownstreamReport, ...]:
    """Reports that a bundle was built with; those of another edit, safety head or variant are left out.

    A bundle of an older release may hold captions that were made without its safety head: their limits are "not run".

    Args:
        bundle: The bundle.
        verify: What is judged.

    Raises:
        IntegrityError: If one was changed.
    """
    listed = {file.path for file in bundle.manifest.files}
    places = [place for kind in KINDS if (place := BundleLayout.downstream(kind)) in listed]
    found = (record_from_json(DownstreamReport, bundle.read(place), where=place) for place in places)
    return tuple(report for report in found if not foreign(report, verify))


def foreign(report: DownstreamReport, verify: VerifyReport) -> str:
    """What was measured instead of what is judged; empty where it is the same.

    Args:
        report: What came out behind a tower.
        verify: What is judged.
    """
    tower = report.tower
    if tower.weights_digest != verify.edited_weights_digest:
        return f"another edit ({tower.name})"
    if told := foreign_head(report, verify.head_digest):
        return told
    if tower.variant and tower.variant not in {found.variant for found in verify.artifacts}:
        return f"variant {tower.variant}, which is not among those that are judged"
    return ""


def foreign_head(report: DownstreamReport, head_digest: Digest) -> str:
    """Which safety head captions were made with, where it is not that of the bundle; pictures never depend on one.

    Args:
        report: What came out behind a tower.
        head_digest: Of the safety head that is judged; empty without one.
    """
    own = report.tower.head_digest
    if report.kind == "draw" or own == head_digest:
        return ""
    if not own:
        return "a tower without the safety head that is judged with it"
    return "another safety head" if head_digest else "a safety head, and what is judged has none"


def check_own(report: DownstreamReport, told: str) -> None:
    """Refuses a report of something else.

    Args:
        report: The report.
        told: What it is of; empty where it is of what is judged.

    Raises:
        InputError: If it is of something else.
    """
    if told:
        raise InputError(
            f"{report.kind}.json was not measured on what is judged, but on {told}",
            fix=f"build, run `uwm-deploy downstream {report.kind} --tower` with that bundle, and pass what it wrote",
        )

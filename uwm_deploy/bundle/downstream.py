"""Reports of what came out behind edited towers: those of files and those in a bundle, and what they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.errors import InputError
from uwm_deploy.records.codec import read_record, record_from_json
from uwm_deploy.records.downstream import KINDS, DownstreamReport
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.model import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenReports:
    """Reports that a user named.

    Attributes:
        reports: At most one of a kind.
        files: Kind to the file that was named.
    """

    reports: tuple[DownstreamReport, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)

    def check_of(self, verify: VerifyReport) -> None:
        """Refuses reports of something else than what is judged.

        Raises:
            InputError: If one is; it names the file.
        """
        for report in self.reports:
            check_own(report, foreign(report, verify), self.files[report.kind])

    def check_head(self, head_digest: Digest) -> None:
        """The same of the safety head alone, which is known before anything is computed.

        Raises:
            InputError: If one was measured with another head; it names the file.
        """
        for report in self.reports:
            check_own(report, foreign_head(report, head_digest), self.files[report.kind])


def read_downstream(files: Sequence[Path]) -> GivenReports:
    """Reports of files.

    Raises:
        InputError: If one cannot be read, or two are of one kind.
        IntegrityError: If one is no such report.
    """
    reports: list[DownstreamReport] = []
    known: dict[str, Path] = {}
    for file in files:
        report = read_record(DownstreamReport, file)
        if (other := known.get(report.kind)) is not None:
            raise InputError(f"{other} and {file} are both reports of {report.kind}", fix="pass one of each kind")
        known[report.kind] = file
        reports.append(report)
    return GivenReports(reports=tuple(reports), files=known)


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


def check_own(report: DownstreamReport, told: str, file: Path | None = None) -> None:
    """Refuses a report of something else.

    Args:
        report: The report.
        told: What it is of; empty where it is of what is judged.
        file: The file that the user named, if there is one.

    Raises:
        InputError: If it is of something else.
    """
    if told:
        raise InputError(
            f"{file or f'the report of {report.kind}'} was not measured on what is judged, but on {told}",
            fix=f"build, run `uwm-deploy downstream {report.kind} --tower` with that bundle, and pass what it wrote",
        )

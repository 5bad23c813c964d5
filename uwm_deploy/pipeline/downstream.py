"""Reports of what came out behind edited towers: those of files, and those in a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.errors import InputError
from uwm_deploy.records.codec import read_record, record_from_json
from uwm_deploy.records.downstream import KINDS, DownstreamReport
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.stages.gate.downstream import foreign


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

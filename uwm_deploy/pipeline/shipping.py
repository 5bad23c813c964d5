"""Writing a bundle anew: its card, and what becomes of its signature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.bundle.sign import Seal
from uwm_deploy.bundle.write import Part, Sign, bundle_from_parts
from uwm_deploy.data.evaluation import evaluation_source_in
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.pipeline.cards import card_of_bundle
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.replacing import Workplace
from uwm_deploy.report.card import CARD
from uwm_deploy.stages.job import Notes


def note_signature(out: Path, seal: Seal, reporter: Notes) -> None:
    """Says what became of the signature of a bundle that was written anew."""
    if told := seal.told(out):
        reporter.line(told)


def bundle_with_card(
    out: Path | Workplace, manifest: Manifest, parts: Mapping[str, Part], *, sign: Sign | None = None
) -> object:
    """Writes a bundle whose report is new, with the card that belongs to it; see `bundle_from_parts`."""
    content = parts[BundleLayout.REPORT]
    assert isinstance(content, bytes)
    report = record_from_json(VerifyReport, content, where=BundleLayout.REPORT)
    card = card_of_bundle(manifest, report).encode()
    return bundle_from_parts(out, manifest, {**parts, CARD: card}, sign=sign)


def evaluation_source_of(bundle: Bundle, evaluation: str | None) -> QuadrupleSource:
    """The set that is asked for, or the one the bundle was measured on."""
    if evaluation:
        spec, _, base = calibration_set_of(evaluation)
        return open_source(spec, base=base)
    return evaluation_source_in(bundle)

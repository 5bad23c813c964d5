"""The model card of a run or a bundle: what is rendered, from the records that stages and bundles hold."""

from __future__ import annotations

from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.report.card import card_of
from uwm_deploy.report.edit_words import method_line


def card(
    edit: EditRecord,
    calibration: CalibrationRecord,
    *,
    name: str,
    licence: str,
    report: VerifyReport | None = None,
    verdict: Verdict | None = None,
    bundle: bool = False,
) -> str:
    """The model card as Markdown; without a report it has no numbers."""
    return card_of(
        edit,
        calibration,
        name=name,
        licence=licence,
        method=method_line(edit),
        report=report,
        verdict=verdict,
        bundle=bundle,
    )


def card_of_bundle(manifest: Manifest, report: VerifyReport) -> str:
    """The card that belongs to a bundle."""
    recipe = recipe_from_toml(manifest.recipe, where="recipe.toml")
    return card(
        manifest.edit,
        manifest.calibration,
        name=manifest.name,
        licence=recipe.model.licence,
        report=report,
        verdict=manifest.verdict,
        bundle=True,
    )

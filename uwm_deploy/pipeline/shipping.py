"""Writing a bundle anew: its lock, its card, and what becomes of its signature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from uwm_deploy.bundle.open import MANIFEST, Bundle
from uwm_deploy.bundle.sign import Seal, is_signed
from uwm_deploy.bundle.write import Sign, bundle_from_parts
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import InputError
from uwm_deploy.recipes.data_set import calibration_set_from_toml
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.report.card import CARD, card_of
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.inspection import method_line

if TYPE_CHECKING:
    pass


def refuse_foreign_folder(out: Path) -> None:
    """A folder that is not a bundle is never replaced."""
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a bundle", fix="choose another --out or remove it")


def note_signature(out: Path, seal: Seal, reporter: Reporter) -> None:
    """Says what became of the signature of a bundle that was written anew."""
    if told := seal.told(out):
        reporter.line(told)


def note_lost_signature(path: Path, reporter: Reporter) -> None:
    """Says that the bundle a build replaces was signed."""
    if is_signed(path):
        reporter.line(f"note: {path} is signed; what replaces it is not, until `uwm-deploy sign` is run again")


def lock_of_bundle(path: Path) -> Path:
    """Folder to lock while a bundle is rewritten."""
    return path.resolve().parent / f".{path.resolve().name}.attest"


def bundle_with_card(
    out: Path, manifest: Manifest, parts: Mapping[str, Path | bytes], *, sign: Sign | None = None
) -> object:
    """Writes a bundle whose report is new, with the card that belongs to it; see `bundle_from_parts`."""
    content = parts["reports/verify.json"]
    assert isinstance(content, bytes)
    report = record_from_json(VerifyReport, content, where="reports/verify.json")
    card = _card(manifest, report, bundle=True).encode()
    return bundle_from_parts(out, manifest, {**parts, CARD: card}, sign=sign)


def _card(manifest: Manifest, report: VerifyReport, *, bundle: bool) -> str:
    recipe = recipe_from_toml(manifest.recipe, where="recipe.toml")
    return card_of(
        manifest.edit,
        manifest.calibration,
        name=manifest.name,
        licence=recipe.model.licence,
        method=method_line(manifest.edit),
        report=report,
        verdict=manifest.verdict,
        bundle=bundle,
    )


def evaluation_source_of(bundle: Bundle, evaluation: str | None) -> QuadrupleSource:
    """The set that is asked for, or the one the bundle was measured on."""
    if evaluation:
        spec, _, base = calibration_set_of(evaluation)
        return open_source(spec, base=base)
    text = bundle.read("evaluation.toml").decode()
    return open_source(calibration_set_from_toml(text, where="evaluation.toml"), base=None)

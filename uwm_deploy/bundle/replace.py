"""Replacing a bundle in its place: what is never replaced, and what is lost by it."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.sign import is_signed
from uwm_deploy.records.places import refuse_foreign


def refuse_foreign_folder(out: Path) -> None:
    """A folder that is not a bundle is never replaced, and none is made where none can be.

    Raises:
        InputError: If there is one.
    """
    refuse_foreign(out, BundleLayout.MANIFEST, "is not a bundle")


def lost_signature(path: Path) -> str:
    """A line about the signature of the bundle that is replaced; empty where it has none."""
    if not is_signed(path):
        return ""
    return f"note: {path} is signed; what replaces it is not, until `uwm-deploy sign` is run again"

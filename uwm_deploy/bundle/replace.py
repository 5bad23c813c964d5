"""Replacing a bundle in its place: what is never replaced, and what is lost by it."""

from __future__ import annotations

from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.sign import is_signed
from uwm_deploy.errors import InputError


def refuse_foreign_folder(out: Path) -> None:
    """A folder that is not a bundle is never replaced, and none is made below what is no folder.

    Raises:
        InputError: If there is one.
    """
    for above in out.absolute().parents:
        if above.is_symlink() and not above.exists():
            raise InputError(f"{above} is a link to nothing, so {out} cannot be made", fix="choose another --out")
        if above.exists():
            if not above.is_dir():
                raise InputError(f"{above} is no folder, so {out} cannot be made", fix="choose another --out")
            break
    if out.exists() and not (out / BundleLayout.MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a bundle", fix="choose another --out or remove it")


def lost_signature(path: Path) -> str:
    """A line about the signature of the bundle that is replaced; empty where it has none."""
    if not is_signed(path):
        return ""
    return f"note: {path} is signed; what replaces it is not, until `uwm-deploy sign` is run again"

"""Signatures of this project and of the package `model-signing` are the same format, both ways."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.test_report import make, write_bundle
from tests.unit.test_signature import write_keys
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.bundle.sign import sign_bundle
from uwm_deploy.bundle.signature import SIGNATURE
from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.verdict import Result

hashing = pytest.importorskip("model_signing.hashing", reason="not run: model-signing is not installed ([sign])")
signing = pytest.importorskip("model_signing.signing", reason="not run: model-signing is not installed ([sign])")
verifying = pytest.importorskip("model_signing.verifying", reason="not run: model-signing is not installed ([sign])")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An unsigned one."""
    made = make()
    return write_bundle(made, tmp_path / "b", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))


CURVES = pytest.mark.parametrize(
    "curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name
)


@CURVES
def test_model_signing_verifies_ours(curve: ec.EllipticCurve, bundle: Path, tmp_path: Path) -> None:
    """And refuses a changed file, an added one, and another key, so that it really looked."""
    key, public = write_keys(tmp_path, "key", ec.generate_private_key(curve))
    _, other = write_keys(tmp_path, "other", ec.generate_private_key(curve))
    sign_bundle(bundle, key)

    def check(folder: Path, public_key: Path = public) -> None:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(folder, folder / SIGNATURE)

    check(bundle)
    with pytest.raises(ValueError, match="Key mismatch"):
        check(bundle, other)
    for name in ("extra", "tokenizer.json", "manifest.json"):
        copy = tmp_path / f"copy-{name}"
        shutil.copytree(bundle, copy)
        (copy / name).write_bytes(b"x")
        with pytest.raises(ValueError, match="Signature mismatch"):
            check(copy)


@CURVES
def test_ours_verifies_model_signing(curve: ec.EllipticCurve, bundle: Path, tmp_path: Path) -> None:
    """With its own default settings; another key is refused."""
    key, public = write_keys(tmp_path, "key", ec.generate_private_key(curve))
    _, other = write_keys(tmp_path, "other", ec.generate_private_key(curve))
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE]))
    config.sign(bundle, bundle / SIGNATURE)
    open_bundle(bundle, public_key=public)
    with pytest.raises(IntegrityError, match="another key"):
        open_bundle(bundle, public_key=other)
    (bundle / ".gitignore").write_text("x")  # what the other tool leaves out by default is no part of a bundle
    with pytest.raises(IntegrityError, match="gitignore"):
        open_bundle(bundle, public_key=public)


def test_a_file_that_was_left_out_is_named(bundle: Path, tmp_path: Path) -> None:
    """A signature over a part of the bundle is none over the bundle."""
    key, public = write_keys(tmp_path, "key")
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE, "tokenizer.json"]))
    config.sign(bundle, bundle / SIGNATURE)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is not the one that was signed"):
        open_bundle(bundle, public_key=public)

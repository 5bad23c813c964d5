"""Signed files of other implementations of the format, which are not in this repository."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from uwm_deploy.bundle.signature import signed_digests
from uwm_deploy.errors import IntegrityError

CORPUS = os.environ.get("UWM_SIGNING_CORPUS", "")
"""Folder `scripts/tests` of sigstore/model-transparency: models that every release of `model-signing` has signed."""

pytestmark = pytest.mark.skipif(
    not CORPUS, reason="not run: UWM_SIGNING_CORPUS does not name a folder of signed models"
)


def _signed(kind: str) -> list[Path]:
    found = sorted(Path(CORPUS).glob(f"v*-{kind}/model.sig"))
    assert found
    return found


def test_models_signed_by_a_key_are_read() -> None:
    """By 0.3.1 to 1.1.0; where a file is listed, its digest is that of the file, and one changed byte is refused."""
    key = Path(CORPUS) / "keys" / "certificate" / "signing-key-pub.pem"
    other = Path(CORPUS) / "keys" / "certificate" / "ca-cert.pem"
    for file in _signed("elliptic-key"):
        content = file.read_bytes()
        for name, digest in signed_digests(content, key).items():
            if name != ".":  # a model of a single file, signed as such
                assert digest == f"sha256:{hashlib.sha256((file.parent / name).read_bytes()).hexdigest()}"
        body = json.loads(content)
        body["dsseEnvelope"]["payload"] = "A" + body["dsseEnvelope"]["payload"][1:].swapcase()
        with pytest.raises(IntegrityError):
            signed_digests(json.dumps(body).encode(), key)
        with pytest.raises(Exception, match="key"):
            signed_digests(content, other)


@pytest.mark.parametrize("kind", ["certificate", "sigstore"])
def test_other_ways_of_signing_are_refused(kind: str) -> None:
    """Only a key of one's own vouches for a bundle; a certificate or an identity does not."""
    key = Path(CORPUS) / "keys" / "certificate" / "signing-key-pub.pem"
    for file in _signed(kind):
        with pytest.raises(IntegrityError, match="no envelope with one signature by a key"):
            signed_digests(file.read_bytes(), key)

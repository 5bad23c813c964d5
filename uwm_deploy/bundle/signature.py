"""Verifies the signature of a bundle: the OpenSSF model-signing format with an elliptic-curve key, offline.

The file is a Sigstore bundle (v0.3, JSON) around a DSSE envelope around an in-toto statement that lists every file of the
bundle with its SHA-256. Needs `cryptography` only; what `model-signing` signs is verified here, and the other way round.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uwm_deploy.errors import InputError, IntegrityError, imported, unreadable
from uwm_deploy.records.model import Digest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey

SIGNATURE = "model.sig"
"""Name inside a bundle, the format's own default; the only file there that the manifest does not list."""

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""The format's own choice; it has no Ed25519."""

MAX_BYTES = 1 << 24
"""Of a signature file: more than any bundle needs."""

_AGAIN = "get the bundle from where it was signed again, or do not use it"
MAKE_KEY = "make one with `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256`"

PublicKey = str | Path | bytes
"""A public key: file in PEM, or its content."""


def signed_digests(signature: bytes, public_key: PublicKey) -> dict[str, Digest]:
    """What a signature vouches for, after it was verified.

    Args:
        signature: Content of the signature file.
        public_key: Whose signature it must be.

    Returns:
        Path inside the bundle to the digest of the file.

    Raises:
        InputError: If the key is none.
        IntegrityError: If the signature is broken, of another key, or of another form.
        PrerequisiteError: If the package `cryptography` is missing.
    """
    key = load_public_key(public_key)
    payload, signed, hint = _envelope(signature)
    if hint and hint != fingerprint(key):
        raise IntegrityError(
            f"{SIGNATURE} was made with another key ({hint[:16]}) than the one given ({fingerprint(key)[:16]})",
            fix=_AGAIN,
        )
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signed, pre_authentication(payload), algorithm_for(key))
    except InvalidSignature as error:
        raise IntegrityError(f"{SIGNATURE} is not a signature by the given key", fix=_AGAIN) from error
    return _resources(_json(payload))


def load_public_key(public_key: PublicKey) -> EllipticCurvePublicKey:
    """A public key on one of the curves of the format.

    Raises:
        InputError: If it cannot be read, or is of another kind.
        PrerequisiteError: If the package `cryptography` is missing.
    """
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    name = "the public key" if isinstance(public_key, bytes) else str(public_key)
    try:
        content = public_key if isinstance(public_key, bytes) else Path(public_key).read_bytes()
        key = load_pem_public_key(content)
    except OSError as error:
        raise unreadable(name, error, fix="pass the public key's PEM file", kind=InputError) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        fix = "write it with `openssl pkey -in KEY.pem -pubout`"
        raise InputError(f"{name} is not a public key in PEM", fix=fix) from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise InputError(f"{name} is not on one of the curves {', '.join(CURVES)}", fix=MAKE_KEY)
    return key


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key in PEM, the hint by which the format names it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def algorithm_for(key: EllipticCurvePublicKey) -> ECDSA:
    """ECDSA with the hash that belongs to the curve's size."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA({256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size])


def pre_authentication(payload: bytes) -> bytes:
    """What is really signed (DSSE v1): type and payload, each after its length."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def root_digest(digests: Mapping[str, str]) -> str:
    """Of all files together: SHA-256 over their digests' bytes in the order they are listed, hex."""
    hasher = hashlib.sha256()
    for digest in digests.values():
        hasher.update(bytes.fromhex(digest))
    return hasher.hexdigest()


def need_cryptography() -> None:
    """Says clearly what is missing where a runtime was installed without it.

    Raises:
        PrerequisiteError: If the package `cryptography` is missing.
    """
    missing = "signatures need the package cryptography, which is not installed"
    imported("cryptography", missing, fix="pip install cryptography")


def _envelope(signature: bytes) -> tuple[bytes, bytes, str]:
    """Payload, signature and the key's hint; nothing of it is trusted yet."""
    if len(signature) > MAX_BYTES:
        raise _broken("is too large")
    body = _json(signature)
    if body.get("mediaType") != MEDIA_TYPE:
        raise _broken(f"has media type {str(body.get('mediaType'))[:60]!r}")
    try:
        _only(body, "mediaType", "verificationMaterial", "dsseEnvelope")
        envelope, material = body["dsseEnvelope"], body["verificationMaterial"]
        _only(envelope, "payload", "payloadType", "signatures")
        (entry,) = envelope["signatures"]
        _only(entry, "sig", "keyid")
        _only(material, "publicKey", "tlogEntries")
        _only(material["publicKey"], "hint", "rawBytes", "keyDetails")
        payload, signed = _decoded(envelope["payload"]), _decoded(entry["sig"])
        hint = material["publicKey"].get("hint") or _hint_of(material["publicKey"].get("rawBytes"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _broken("is no envelope with one signature by a key") from error
    if envelope["payloadType"] != PAYLOAD_TYPE or not isinstance(hint, str):
        raise _broken(f"holds {str(envelope['payloadType'])[:60]!r}")
    return payload, signed, hint


def _hint_of(key: str | None) -> str:
    """Releases of `model-signing` before 1.1 put the whole key there, in PEM; it is compared, never used."""
    return hashlib.sha256(_decoded(key)).hexdigest() if key else ""


def _only(body: dict[str, Any], *known: str) -> None:
    """What is not known could mean something to another reader."""
    if not body.keys() <= set(known):
        raise ValueError("an unknown key")


def _decoded(text: str) -> bytes:
    """Base64 in its one proper form."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("not the proper form")
    return data


def _resources(statement: Mapping[str, Any]) -> dict[str, Digest]:
    """Digest of each signed file, if all of them are SHA-256 of whole files and belong to the subject."""
    if statement.get("_type") != STATEMENT_TYPE or statement.get("predicateType") != PREDICATE_TYPE:
        raise _broken(f"is a statement of type {str(statement.get('predicateType'))[:60]!r}")
    try:
        (subject,), predicate = statement["subject"], statement["predicate"]
        method, resources = predicate["serialization"]["method"], predicate["resources"]
        kinds = {str(item["algorithm"]) for item in resources}
        digests = {str(item["name"]): str(item["digest"]) for item in resources}
        root = subject["digest"]["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken("does not say what it signs") from error
    if method != "files" or kinds != {"sha256"} or len(digests) != len(resources):
        raise _broken("does not list every file once with its SHA-256")
    if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests.values()) or root != root_digest(digests):
        raise _broken("contradicts itself: its files do not add up to its subject")
    return {name: f"sha256:{digest}" for name, digest in digests.items()}


def _json(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken("is not JSON") from error
    if content != content.strip():
        raise _broken("holds bytes before or behind its JSON")
    if not isinstance(body, dict):
        raise _broken("is not a JSON object")
    return body


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key appears twice")
    return body


def _broken(what: str) -> IntegrityError:
    return IntegrityError(f"{SIGNATURE} {what}", fix=_AGAIN)

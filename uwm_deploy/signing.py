"""Signs a bundle with a private key, offline, and says whose signature a bundle has; docs/bundle.md."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from uwm_deploy.codec import json_from_record
from uwm_deploy.errors import InputError
from uwm_deploy.records import Manifest
from uwm_deploy.runtime.bundle import MANIFEST, Bundle, open_bundle
from uwm_deploy.runtime.signature import (
    CURVES,
    MAKE_KEY,
    MEDIA_TYPE,
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    SIGNATURE,
    STATEMENT_TYPE,
    PublicKey,
    algorithm_for,
    fingerprint,
    load_public_key,
    need_cryptography,
    pre_authentication,
    root_digest,
)
from uwm_deploy.workspace import digest_of_bytes, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A signature that was made or verified.

    Attributes:
        bundle: Folder.
        key: Fingerprint of the public key: SHA-256 of its PEM, hex.
        bundle_version: The one that the signature vouches for.
        files: Number of files, the manifest included.
    """

    bundle: str
    key: str
    bundle_version: int
    files: int


def sign_bundle(path: Path, key: Path, *, password: Path | None = None) -> Signed:
    """Writes the signature of a bundle into it, in place of an earlier one.

    Args:
        path: Bundle, which must be whole and have a passing verdict.
        key: Private key in PEM.
        password: File whose first line is the key's password.

    Raises:
        InputError: If there is no such key, or it is of another kind.
        IntegrityError: If the bundle was changed or has no passing verdict.
        PrerequisiteError: If the package `cryptography` is missing.
    """
    private = _private_key(key, password)
    bundle = open_bundle(path)
    payload = _statement(path.resolve().name, bundle.manifest)
    signature = private.sign(pre_authentication(payload), algorithm_for(private.public_key()))
    body = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint(private.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    write_atomic(path / SIGNATURE, json.dumps(body, sort_keys=True))
    return _signed(bundle, private.public_key())


def verify_bundle(path: Path, public_key: PublicKey, *, min_bundle_version: int = 0) -> Signed:
    """Checks a bundle as the runtime does when it is given a key; see `open_bundle`."""
    bundle = open_bundle(path, public_key=public_key, min_bundle_version=min_bundle_version)
    return _signed(bundle, load_public_key(public_key))


def _signed(bundle: Bundle, key: EllipticCurvePublicKey) -> Signed:
    return Signed(
        bundle=str(bundle.path),
        key=fingerprint(key),
        bundle_version=bundle.manifest.bundle_version,
        files=len(bundle.manifest.files) + 1,
    )


def _private_key(path: Path, password: Path | None) -> EllipticCurvePrivateKey:
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        secret = password.read_bytes().split(b"\n", 1)[0].removesuffix(b"\r") if password else None
        key = load_pem_private_key(path.read_bytes(), secret)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}", fix="check the path") from error
    except TypeError as error:  # how the library says that a password is missing, or given for nothing
        raise InputError(f"{path}: {error}", fix="give --password-file for an encrypted key, and only then") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is not a private key in PEM, or its password is another", fix=MAKE_KEY) from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise InputError(f"{path} is not on one of the curves {', '.join(CURVES)}", fix=MAKE_KEY)
    return key


def _statement(name: str, manifest: Manifest) -> bytes:
    """The in-toto statement: every file but the signature, with its SHA-256."""
    digests = {file.path: file.digest for file in manifest.files}
    digests[MANIFEST] = digest_of_bytes(json_from_record(manifest).encode())
    plain = {path: digests[path].removeprefix("sha256:") for path in sorted(digests, key=lambda p: PurePosixPath(p))}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": root_digest(plain)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE],
            },
            "resources": [{"name": path, "algorithm": "sha256", "digest": digest} for path, digest in plain.items()],
        },
    }
    return json.dumps(statement, ensure_ascii=False, separators=(",", ":")).encode()

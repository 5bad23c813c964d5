"""Signs a bundle with a private key, offline, and says whose signature a bundle has; docs/reference/bundle.md."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from uwm_deploy.bundle.open import MANIFEST, Bundle, open_bundle
from uwm_deploy.bundle.signature import (
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
from uwm_deploy.bundle.write import Sign, rewriting
from uwm_deploy.errors import InputError, unreadable
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.files import digest_of_bytes

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
    with rewriting(path) as place:
        bundle = open_bundle(place.path)
        place.put(SIGNATURE, _signature(private, place.path.name, bundle.manifest).encode())
        return dataclasses.replace(_signed(bundle, private.public_key()), bundle=str(path))


def verify_bundle(path: Path, public_key: PublicKey, *, min_bundle_version: int = 0) -> Signed:
    """Checks a bundle as the runtime does when it is given a key; see `open_bundle`."""
    bundle = open_bundle(path, public_key=public_key, min_bundle_version=min_bundle_version)
    return _signed(bundle, load_public_key(public_key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resigning:
    """What is to become of the signature of a bundle that a command writes anew.

    Attributes:
        key: Private key in PEM; what is written is signed with it, if it passes.
        password: File whose first line is the key's password.
        public_key: Whose signature the bundle must have before; that of `key` without it, if it is signed.
        unsigned: A signed bundle may become an unsigned one.
    """

    key: Path | None = None
    password: Path | None = None
    public_key: Path | None = None
    unsigned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """What `Resigning` comes to for a certain bundle.

    Attributes:
        public_key: Whose signature must be on what is read; None when that does not matter.
        sign: Makes the new signature; None when there will be none.
        loses: The bundle was signed, and what replaces it is not.
        place: Where the new one will lie, in full: a name such as `.` leads to the old one once that is replaced.
    """

    public_key: PublicKey | None
    sign: Sign | None
    loses: bool
    place: Path

    def told(self, out: Path) -> str:
        """What became of the signature of the bundle that was written; empty when there was and is none."""
        if is_signed(self.place):
            return f"signed: {out / SIGNATURE}"
        if self.sign is not None:
            return f"note: {out} is not signed: it does not pass"
        return f"note: {out} is not signed any more, until `uwm-deploy sign` is run again" if self.loses else ""


def seal_for(asked: Resigning, source: Path, target: Path | None = None) -> Seal:
    """Decides before anything is read or computed.

    Nobody signs what was not checked: with a key, a bundle that is signed already must be signed by that key, or by the
    one that is named.

    Args:
        asked: What the user wants.
        source: Bundle that is read.
        target: Folder that is replaced; the same without it.

    Raises:
        InputError: If a signature would be lost unasked, or the request contradicts itself, or there is no such key.
        PrerequisiteError: If the package `cryptography` is missing.
    """
    target = target or source
    place = target.resolve()
    if asked.key is not None and asked.unsigned:
        raise InputError("--key and --unsigned contradict each other", fix="give one of them")
    if asked.password is not None and asked.key is None:
        raise InputError("--password-file without --key", fix="give --key as well")
    loses = asked.key is None and (is_signed(source) or is_signed(target))
    if asked.key is None and is_signed(target) and not asked.unsigned:
        raise InputError(
            f"{target} is signed, and what replaces it would not be",
            fix="give --key to sign it again, or --unsigned to go without",
        )
    if asked.key is None:
        return Seal(public_key=asked.public_key, sign=None, loses=loses, place=place)
    private = _private_key(asked.key, asked.password)
    own = _pem(private.public_key()) if is_signed(source) else None
    return Seal(public_key=asked.public_key or own, sign=partial(_signature, private), loses=False, place=place)


def is_signed(bundle: Path) -> bool:
    """Whether a folder has a signature, by whomever."""
    return os.path.lexists(bundle / SIGNATURE)


def _signature(private: EllipticCurvePrivateKey, name: str, manifest: Manifest) -> str:
    """Content of the signature file."""
    payload = _statement(name, manifest)
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
    return json.dumps(body, sort_keys=True)


def _pem(key: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _signed(bundle: Bundle, key: EllipticCurvePublicKey) -> Signed:
    return Signed(
        bundle=str(bundle.path),
        key=fingerprint(key),
        bundle_version=bundle.manifest.bundle_version,
        files=len(bundle.manifest.files) + 1,
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error, fix="check the path", kind=InputError) from error


def _private_key(path: Path, password: Path | None) -> EllipticCurvePrivateKey:
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        secret = _content(password).split(b"\n", 1)[0].removesuffix(b"\r") if password else None
        key = load_pem_private_key(_content(path), secret)
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

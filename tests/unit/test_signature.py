"""Signed bundles: whatever is changed is refused before anything is deserialised, with exit code 5 and the file named."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tests.made_once import copy_of
from tests.unit.test_report import make, write_bundle
from uwm_deploy.bundle import open as opening
from uwm_deploy.bundle.open import MANIFEST, open_bundle
from uwm_deploy.bundle.sign import sign_bundle
from uwm_deploy.bundle.signature import SIGNATURE, signed_digests
from uwm_deploy.cli import cli
from uwm_deploy.errors import IntegrityError
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.shipped import read_toml
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.console import Reporter

ROOT = Path(__file__).parents[2]
DESERIALISERS = ("onnxruntime", "safetensors", "tokenizers", "tensorrt", "tensorrt_rtx", "onnx", "torch", "PIL")


def write_keys(folder: Path, name: str, private: object = None, password: bytes | None = None) -> tuple[Path, Path]:
    """A pair of keys as PEM files."""
    private = private or ec.generate_private_key(ec.SECP256R1())
    lock = BestAvailableEncryption(password) if password else NoEncryption()
    files = folder / f"{name}.pem", folder / f"{name}.pub"
    files[0].write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    files[1].write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return files


@dataclasses.dataclass
class Place:
    """A signed bundle of version 2 and the keys of its maker and of somebody else."""

    bundle: Path
    key: Path
    public: Path
    other: Path
    other_public: Path

    def copy(self, folder: Path) -> Path:
        shutil.copytree(self.bundle, folder)
        return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("signed")
    made = make()
    passing = dataclasses.replace(made.verdict(), result=Result.PASS)
    bundle = write_bundle(made, folder / "tiny", verdict=passing, bundle_version=2)
    found = Place(bundle, *write_keys(folder, "key"), *write_keys(folder, "other"))
    sign_bundle(bundle, found.key)
    return found


def verify(bundle: Path, key: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["verify-signature", str(bundle), "--public-key", str(key), *more])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def files_of(bundle: Path) -> list[str]:
    return sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file())


def test_a_signed_bundle_opens(place: Place) -> None:
    """Whole, by the right key and new enough."""
    assert verify(place.bundle, place.public, "--min-bundle-version", "2")[0] == 0
    opened = open_bundle(place.bundle, public_key=place.public.read_bytes(), min_bundle_version=2)
    assert opened.manifest.bundle_version == 2
    signed = signed_digests((place.bundle / SIGNATURE).read_bytes(), place.public)
    assert signed == {n: digest_of_file(place.bundle / n) for n in files_of(place.bundle) if n != SIGNATURE}


def mutations(place: Place, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """What was done, the file that must be named, and the mutated bundle; each file in each way."""
    names = files_of(place.bundle)
    count = iter(range(10_000))

    def fresh() -> Path:
        return place.copy(folder / f"b{next(count)}")

    for position, name in enumerate(names):
        data = (place.bundle / name).read_bytes()
        for at in {0, len(data) // 2, len(data) - 1}:
            out = fresh()
            (out / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            yield f"flip {at}", name, out
        for keep in (0, len(data) // 2, len(data) - 1):
            (out := fresh()).joinpath(name).write_bytes(data[:keep])
            yield f"truncate {keep}", name, out
        other = names[(position + 1) % len(names)]
        out = fresh()
        (out / name).rename(out / "swap")
        (out / other).rename(out / name)
        (out / "swap").rename(out / other)
        yield f"swap with {other}", f"{name}|{other}", out
        out = fresh()
        (out / name).rename(out / f"{name}.old")
        yield "rename", name, out
        (out := fresh()).joinpath(name).unlink()
        yield "remove", name, out
        out = fresh()
        os.link(out / name, folder / f"link{next(count)}")
        yield "hard link", name, out
        out = fresh()
        (out / name).unlink()
        (out / name).symlink_to(place.bundle.resolve() / name)
        yield "symbolic link", name, out
    for added in ("extra", "engines/extra.onnx", "onnx/deep/extra", "model.sig.old"):
        out = fresh()
        (out / added).parent.mkdir(parents=True, exist_ok=True)
        (out / added).write_bytes(b"x")
        yield "add", f"{added}|{Path(added).parent}", out
    (out := fresh()).joinpath("empty").mkdir()
    yield "add a folder", "empty", out
    (out := fresh()).joinpath("folder").symlink_to(place.bundle.parent, target_is_directory=True)
    yield "add a link to a folder", "folder", out


def test_every_mutation_is_refused_before_anything_is_deserialised(place: Place, tmp_path: Path) -> None:
    """Exit code 5 and the file named, from a process that never loaded what could deserialise anything."""
    cases = list(mutations(place, tmp_path))
    assert len(cases) > 10 * len(files_of(place.bundle))
    script = (
        "import json, sys\n"
        "from click.testing import CliRunner; from uwm_deploy.cli import cli\n"
        "key, done = sys.argv[1], []\n"
        "for path in sys.stdin.read().split():\n"
        "    found = CliRunner().invoke(cli, ['verify-signature', path, '--public-key', key])\n"
        "    done.append([found.exit_code, found.output])\n"
        "loaded = sorted({m.split('.')[0] for m in sys.modules})\n"
        "print(json.dumps([done, loaded]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(place.public)],
        input="\n".join(str(out) for *_, out in cases),
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    results, loaded = json.loads(done.stdout)
    assert not set(loaded) & set(DESERIALISERS)
    for (what, names, _), (code, output) in zip(cases, results, strict=True):
        assert code == 5, (what, names, output)
        assert any(name in output for name in names.split("|")), (what, names, output)


def test_another_key_is_refused(place: Place, tmp_path: Path) -> None:
    """A bundle that somebody else signed, as it is or after a change that is listed properly."""
    out = place.copy(tmp_path / "b")
    sign_bundle(out, place.other)
    code, output = verify(out, place.public)
    assert (code, SIGNATURE in output, "another key" in output) == (5, True, True)
    assert verify(out, place.other_public)[0] == 0
    hidden = json.loads((out / SIGNATURE).read_text())
    hidden["verificationMaterial"]["publicKey"]["hint"] = ""
    (out / SIGNATURE).write_text(json.dumps(hidden))
    code, output = verify(out, place.public)
    assert (code, SIGNATURE in output) == (5, True)


def test_a_rewritten_manifest_is_refused(place: Place, tmp_path: Path) -> None:
    """Who changes a file, and lists it with its new digest and a higher version, lacks the signature."""
    out = place.copy(tmp_path / "b")
    (out / "reports/plan.json").write_bytes(b"{}")
    manifest = record_from_json(Manifest, (out / MANIFEST).read_bytes(), where=MANIFEST)
    files = tuple(
        dataclasses.replace(f, size_bytes=2, digest=digest_of_file(out / f.path)) if f.path.endswith("plan.json") else f
        for f in manifest.files
    )
    (out / MANIFEST).write_text(json_from_record(dataclasses.replace(manifest, files=files, bundle_version=9)))
    open_bundle(out)  # the digests alone do not tell
    code, output = verify(out, place.public)
    assert code == 5
    assert f"{MANIFEST} is not the one that was signed" in output


def test_an_older_version_is_refused(place: Place) -> None:
    """A bundle that was signed and is whole, but older than it has to be; by `gate` and `open_bundle` too."""
    code, output = verify(place.bundle, place.public, "--min-bundle-version", "3")
    assert (code, "bundle version 2" in output, MANIFEST in output) == (5, True, True)
    options = ["--public-key", str(place.public), "--min-bundle-version"]
    gate = CliRunner().invoke(cli, ["gate", str(place.bundle), *options, "3"])
    assert gate.exit_code == 5
    assert CliRunner().invoke(cli, ["gate", str(place.bundle), *options, "2"]).exit_code == 3  # its numbers do not pass
    with pytest.raises(IntegrityError, match="at least 3"):
        open_bundle(place.bundle, min_bundle_version=3)


def test_a_build_takes_its_version_from_the_option_or_the_recipe(
    built: tuple[Request, Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same build under another version is another bundle: it is written anew, says so, and has to be signed again."""
    request, first = built
    assert first.manifest is not None
    assert first.manifest.bundle_version == 0
    key, public = write_keys(tmp_path, "key")
    text, _ = read_toml("export", "demo")
    (tmp_path / "demo.toml").write_text(text.replace('name = "demo"\n', 'name = "demo"\nbundle_version = 4\n', 1))
    work = copy_of(request.work, tmp_path / "work")  # other tests look at what the build left
    by_recipe = dataclasses.replace(request, out=tmp_path / "demo", work=work, model=str(tmp_path / "demo.toml"))
    for asked, version in ((by_recipe, 4), (dataclasses.replace(by_recipe, bundle_version=5), 5)):
        made = run(asked, until="package", reporter=Reporter())
        assert {"score", "edit", "export", "verify", "gate"} <= set(made.reused)
        assert "package" not in made.reused
        assert open_bundle(tmp_path / "demo").manifest.bundle_version == version
        assert not (tmp_path / "demo" / SIGNATURE).exists()
        assert ("is signed" in capsys.readouterr().err) is (version == 5)
        sign_bundle(tmp_path / "demo", key)
    assert run(asked, until="package", reporter=Reporter(quiet=True)).reused[-1] == "package"
    assert open_bundle(tmp_path / "demo", public_key=public, min_bundle_version=5)


def test_an_unsigned_bundle_is_refused_only_with_a_key(place: Place, tmp_path: Path) -> None:
    """Without a key nobody asked for a signature."""
    out = place.copy(tmp_path / "b")
    (out / SIGNATURE).unlink()
    open_bundle(out)
    code, output = verify(out, place.public)
    assert (code, f"{SIGNATURE} is missing" in output) == (5, True)


def test_large_bundles_are_checked_whole(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files at a time: whichever is damaged is the one that is named, and without damage it opens."""
    monkeypatch.setattr(opening, "_LARGE_BYTES", 0)
    out = place.copy(tmp_path / "b")
    for name in (file.path for file in open_bundle(out).manifest.files):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]) if kept else b"")
        with pytest.raises(IntegrityError, match=f"{re.escape(name)} has changed"):
            open_bundle(out)
        (out / name).write_bytes(kept)
    open_bundle(out)


def test_a_change_between_opening_and_reading_is_refused(place: Place, tmp_path: Path) -> None:
    """What is loaded are the bytes that were hashed: a changed file is refused, and another one in its place is not read."""
    out = place.copy(tmp_path / "b")
    bundle = open_bundle(out, public_key=place.public)
    for name in (file.path for file in bundle.manifest.files):
        kept = (out / name).read_bytes()
        (out / name).write_bytes(b"another" + kept)
        with pytest.raises(IntegrityError, match="has changed"):
            bundle.read(name)
        (out / name).write_bytes(kept)
        (out / name).unlink()
        (out / name).symlink_to(tmp_path / "other")
        assert b"".join(bundle.chunks(name)) == kept  # its graphs are none


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_every_curve_of_the_format(curve: ec.EllipticCurve, place: Place, tmp_path: Path) -> None:
    """With a password too."""
    out = place.copy(tmp_path / "b")
    key, public = write_keys(tmp_path, "key", ec.generate_private_key(curve), b"secret words")
    (tmp_path / "password").write_text("secret words\n")
    command = ["sign", str(out), "--key", str(key)]
    assert CliRunner().invoke(cli, command).exit_code == 2
    assert CliRunner().invoke(cli, [*command, "--password-file", str(tmp_path / "password")]).exit_code == 0
    assert verify(out, public)[0] == 0


def test_unusable_keys_are_refused(place: Place, tmp_path: Path) -> None:
    """Other kinds of key, keys of the wrong side, and files that are no keys: exit code 2, and nothing is written."""
    out = place.copy(tmp_path / "b")
    before = (out / SIGNATURE).read_bytes()
    kinds = {
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "rsa": rsa.generate_private_key(65537, 2048),
        "k1": ec.generate_private_key(ec.SECP256K1()),
    }
    pairs = [write_keys(tmp_path, name, private) for name, private in kinds.items()]
    (tmp_path / "none").write_text("none")
    for key in (*(pair[0] for pair in pairs), place.public, tmp_path / "none", tmp_path / "nowhere"):
        result = CliRunner().invoke(cli, ["sign", str(out), "--key", str(key)])
        assert result.exit_code == 2, result.output
    for key in (*(pair[1] for pair in pairs), place.key, tmp_path / "none", tmp_path / "nowhere"):
        assert verify(out, key)[0] == 2
    assert (out / SIGNATURE).read_bytes() == before


def test_a_failed_bundle_is_not_signed(tmp_path: Path) -> None:
    """A signature stands for something that passed."""
    key, _ = write_keys(tmp_path, "key")
    bundle = write_bundle(make(), tmp_path / "b")
    result = CliRunner().invoke(cli, ["sign", str(bundle), "--key", str(key)])
    assert result.exit_code == 5
    assert "no passing verdict" in result.output
    assert not (bundle / SIGNATURE).exists()


def test_every_byte_of_the_signature_counts(place: Place) -> None:
    """No flip of it leaves a signature that is accepted."""
    content = (place.bundle / SIGNATURE).read_bytes()
    for at in range(len(content)):
        with pytest.raises(IntegrityError, match=SIGNATURE):
            signed_digests(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], place.public)


HOSTILE = {
    "empty": b"",
    "not json": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "no envelope": b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}',
    "null envelope": b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": null}',
    "not utf-8": b"\xff\xfe{}",
    "huge": b" " * ((1 << 24) + 1),
}


def test_a_signature_that_holds_the_whole_key_is_read(place: Place) -> None:
    """As `model-signing` wrote them before 1.1; the key in it is compared with the given one, and never used."""
    body = json.loads((place.bundle / SIGNATURE).read_bytes())

    def with_key(public: Path) -> bytes:
        held = base64.b64encode(public.read_bytes()).decode()
        material = {"publicKey": {"rawBytes": held, "keyDetails": "PKIX_ECDSA_P256_SHA_256"}}
        return json.dumps(body | {"verificationMaterial": material}).encode()

    assert signed_digests(with_key(place.public), place.public) == signed_digests(
        (place.bundle / SIGNATURE).read_bytes(), place.public
    )
    with pytest.raises(IntegrityError, match="another key"):
        signed_digests(with_key(place.other_public), place.public)


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_signature_file_is_an_integrity_error(name: str, place: Place) -> None:
    """Never any other exception."""
    with pytest.raises(IntegrityError, match=SIGNATURE):
        signed_digests(HOSTILE[name], place.public)


def test_statements_that_do_not_add_up_are_refused(place: Place, tmp_path: Path) -> None:
    """Properly signed by the right key, and still not a list of every file with its SHA-256."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    body = json.loads((place.bundle / SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(body["dsseEnvelope"]["payload"]))
    private = load_pem_private_key(place.key.read_bytes(), None)

    def signed(change: dict[str, object]) -> bytes:
        payload = json.dumps(statement | change).encode()
        head = f"DSSEv1 28 application/vnd.in-toto+json {len(payload)} ".encode()
        sig = private.sign(head + payload, ec.ECDSA(hashes.SHA256()))
        envelope = {"payload": base64.b64encode(payload).decode(), "payloadType": "application/vnd.in-toto+json"}
        envelope["signatures"] = [{"sig": base64.b64encode(sig).decode(), "keyid": ""}]
        return json.dumps(body | {"dsseEnvelope": envelope}).encode()

    assert signed_digests(signed({}), place.public)  # the helper signs as the format says
    predicate = statement["predicate"]
    shards = predicate | {"serialization": predicate["serialization"] | {"method": "shards"}}
    twice = predicate | {"resources": predicate["resources"] * 2}
    weak = predicate | {"resources": [r | {"algorithm": "blake2"} for r in predicate["resources"]]}
    changes = [
        {"predicateType": "https://slsa.dev/provenance/v1"},
        {"_type": "x"},
        {"subject": []},
        {"subject": [{"name": "x", "digest": {"sha256": "0" * 64}}]},
        {"predicate": shards},
        {"predicate": twice},
        {"predicate": weak},
        {"predicate": None},
    ]
    for change in changes:
        with pytest.raises(IntegrityError, match=SIGNATURE):
            signed_digests(signed(change), place.public)


def test_without_cryptography_the_runtime_works_and_says_when_it_is_needed(place: Place) -> None:
    """Opening needs it only where a signature is asked for; then it is exit code 6 with the package's name."""
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from uwm_deploy.bundle.open import open_bundle; import uwm_deploy.runtime\n"
        f"open_bundle({str(place.bundle)!r}); print('opened')\n"
        "from click.testing import CliRunner; from uwm_deploy.cli import cli\n"
        f"for words in (['verify-signature', {str(place.bundle)!r}, '--public-key', {str(place.public)!r}],\n"
        f"              ['sign', {str(place.bundle)!r}, '--key', {str(place.key)!r}]):\n"
        "    found = CliRunner().invoke(cli, words); print(found.exit_code, found.output)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("opened")
    assert done.stdout.count("6 error: signatures need the package cryptography") == 2


def test_the_encoder_refuses_another_key_and_an_older_bundle(place: Place) -> None:
    """What serves asks for the signature and the version before it reads anything else."""
    from uwm_deploy.runtime.encoder import SafeEncoder

    with pytest.raises(IntegrityError, match="sign"):
        SafeEncoder.open(place.bundle, public_key=place.other_public)
    with pytest.raises(IntegrityError, match="at least 3 is required"):
        SafeEncoder.open(place.bundle, public_key=place.public, min_bundle_version=3)

"""Signatures in the rest of a bundle's life: never lost unasked, never given to what was not checked, checked when asked."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.test_signature import Place, files_of, verify, write_keys
from uwm_deploy.bundle.open import MANIFEST, open_bundle
from uwm_deploy.bundle.sign import Resigning, seal_for, sign_bundle
from uwm_deploy.bundle.signature import SIGNATURE
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.cli import cli
from uwm_deploy.errors import IntegrityError
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.evidence import Evidence
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.stages.gate.gate import gate

DESERIALISERS = {"onnxruntime", "safetensors", "tokenizers", "tensorrt", "tensorrt_rtx"}


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def content_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


@pytest.fixture(scope="module")
def place(built: tuple[Request, Outcome], tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A real bundle, signed, and the keys of its maker and of somebody else."""
    folder = tmp_path_factory.mktemp("signed")
    out = built[0].out
    assert out is not None
    shutil.copytree(out, folder / "bundle")
    found = Place(folder / "bundle", *write_keys(folder, "key"), *write_keys(folder, "other"))
    sign_bundle(found.bundle, found.key)
    return found


@pytest.fixture
def waiting(built: tuple[Request, Outcome], place: Place, tmp_path: Path) -> Path:
    """A signed bundle whose only variant still waits for its evidence."""
    return waiting_bundle(built, place.key, tmp_path / "bundle")


def waiting_bundle(built: tuple[Request, Outcome], key: Path, out: Path) -> Path:
    """A signed bundle whose only variant still waits for its evidence."""
    request, outcome = built
    assert outcome.report is not None
    assert outcome.manifest is not None
    assert request.out is not None
    artifacts = tuple(
        dataclasses.replace(a, evidence=Evidence.NOT_RUN, parity=(), safety=None, flips={})
        if a.variant == "onnxruntime-fp32"
        else a
        for a in outcome.report.artifacts
    )
    report = dataclasses.replace(outcome.report, artifacts=artifacts)
    content = json_from_record(report).encode()
    policy, digest = policy_of(request.policy)
    verdict = gate(report, policy, policy_digest=digest, report_digest=digest_of_bytes(content))
    parts: dict[str, Path | bytes] = {f.path: request.out / f.path for f in outcome.manifest.files}
    parts |= {"reports/verify.json": content, "reports/verdict.json": json_from_record(verdict).encode()}
    made = bundle_from_parts(out, dataclasses.replace(outcome.manifest, verdict=verdict), parts)
    sign = seal_for(Resigning(key=key), out).sign
    assert sign is not None
    (out / SIGNATURE).write_text(sign(out.name, made))
    return out


def refused_unchanged(bundle: Path, *words: object, code: int, message: str) -> None:
    before = content_of(bundle)
    found, output = run(*words)
    assert (found, message in output) == (code, True), output
    assert content_of(bundle) == before


def test_attest_signs_again_and_loses_no_signature_unasked(
    built: tuple[Request, Outcome], place: Place, waiting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key: exit code 2. Another key than the bundle's, or a changed file: 5. Nothing is changed by either.

    What is said of the signature is of the new bundle, also where it was asked for as `.`, which is the old one then.
    """
    words = ["attest", waiting, "--policy", built[0].policy, "--workers", 0]
    refused_unchanged(waiting, *words, code=2, message="is signed, and what replaces it would not be")
    refused_unchanged(waiting, *words, "--key", place.other, code=5, message="another key")
    refused_unchanged(waiting, *words, "--public-key", place.other_public, "--unsigned", code=5, message="another key")
    refused_unchanged(waiting, *words, "--key", place.key, "--unsigned", code=2, message="contradict")
    refused_unchanged(waiting, *words, "--unsigned", "--password-file", place.key, code=2, message="without --key")
    file = waiting / "evidence/reference.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused_unchanged(waiting, *words, "--key", place.key, code=5, message="evidence/reference.safetensors")
    file.write_bytes(whole)
    monkeypatch.chdir(waiting)
    code, output = run("attest", ".", *words[2:], "--key", place.key)
    assert (code, "\nsigned: " in f"\n{output}") == (0, True), output
    assert verify(waiting, place.public)[0] == 0
    assert SafeEncoder.open(waiting, public_key=place.public).variant == "onnxruntime-fp32"


def test_attest_can_go_without_or_hand_over_to_another_key(
    built: tuple[Request, Outcome], place: Place, waiting: Path, tmp_path: Path
) -> None:
    """Asked for, the signature is dropped and that is said; with the old key named, somebody else signs the new one."""
    shutil.copytree(waiting, tmp_path / "other")
    options = ["--policy", built[0].policy, "--workers", 0]
    code, output = run("attest", waiting, *options, "--unsigned")
    assert (code, "is not signed any more" in output, (waiting / SIGNATURE).exists()) == (0, True, False)
    keys = ["--key", place.other, "--public-key", place.public]
    assert run("attest", tmp_path / "other", *options, *keys)[0] == 0
    assert verify(tmp_path / "other", place.other_public)[0] == 0
    assert verify(tmp_path / "other", place.public)[0] == 5


def test_what_does_not_pass_is_not_signed(place: Place, waiting: Path, tmp_path: Path) -> None:
    """The evidence is added, the verdict is fail, and the key is not used."""
    (tmp_path / "hard.toml").write_text(
        'format = 1\nname = "hard"\nedit = []\n[[artifact]]\nmetric = "P_ts"\nat_least = 100.0\n'
    )
    (waiting / SIGNATURE).unlink()
    words = ["attest", waiting, "--policy", tmp_path / "hard.toml", "--workers", 0, "--key", place.key]
    code, output = run(*words)
    assert (code, "is not signed: it does not pass" in output) == (3, True), output
    assert not (waiting / SIGNATURE).exists()
    open_bundle(waiting, allow_failed=True)


def test_a_baseline_is_put_into_a_signed_bundle_only_with_a_key(
    built: tuple[Request, Outcome], place: Place, tmp_path: Path
) -> None:
    """And keys are refused where nothing can be signed."""
    bundle = place.copy(tmp_path / "bundle")
    options = ["--by", "jo", "--reason", "1.0", "--policy", built[0].policy]
    words = ["baseline", "set", place.bundle, "--at", bundle, *options]
    refused_unchanged(bundle, *words, code=2, message="is signed, and what replaces it would not be")
    refused_unchanged(bundle, *words, "--key", place.other, code=5, message="another key")
    assert run(*words, "--key", place.key)[0] == 0
    assert verify(bundle, place.public)[0] == 0
    assert run("baseline", "show", bundle)[0] == 0
    assert run(*words, "--unsigned")[0] == 0
    assert not (bundle / SIGNATURE).exists()
    folder = ["baseline", "set", place.bundle, "--at", tmp_path / "folder", *options]
    code, output = run(*folder, "--key", place.key)
    assert (code, "is no bundle" in output, (tmp_path / "folder").exists()) == (2, True, False)


def test_refit_loses_no_signature_unasked(place: Place, tmp_path: Path) -> None:
    """Neither of the bundle it reads nor of the one it replaces; said before anything is loaded."""
    bundle, other = place.copy(tmp_path / "bundle"), place.copy(tmp_path / "other")
    (bundle / SIGNATURE).unlink()
    refused_unchanged(other, "refit", other, "--revert", code=2, message="is signed, and what replaces it would not be")
    words = ["refit", bundle, "--revert", "--out", other]
    refused_unchanged(other, *words, code=2, message="is signed, and what replaces it would not be")
    refused_unchanged(other, "refit", other, "--revert", "--key", place.other, code=5, message="another key")


@pytest.fixture
def called() -> Iterator[Callable[[Callable[[], object]], set[str]]]:
    """Runs something and says which of the libraries that deserialise were called by this thread."""

    def packages(action: Callable[[], object]) -> set[str]:
        seen: set[str] = set()

        def note(frame: object, event: str, arg: object) -> None:
            if event == "call":
                seen.add(str(frame.f_globals.get("__name__")).split(".")[0])
            elif event == "c_call":
                owner = getattr(arg, "__self__", None)
                owner = owner if isinstance(owner, type) else type(owner)
                seen.update(str(name).split(".")[0] for name in (getattr(arg, "__module__", ""), owner.__module__))

        sys.setprofile(note)
        try:
            action()
        finally:
            sys.setprofile(None)
        return seen & DESERIALISERS

    yield packages
    sys.setprofile(None)


def test_the_encoder_calls_nothing_that_deserialises_before_all_is_checked(
    place: Place, tmp_path: Path, called
) -> None:
    """Each file of a real bundle, changed, with and without a key: the file is named, and no library was called."""

    def served() -> None:
        with SafeEncoder.open(place.bundle, public_key=place.public) as encoder:
            encoder.encode_text("a red circle")

    # Tokens are made by another thread than this one, so what its library does is not seen here.
    assert called(served) == {"onnxruntime", "safetensors"}
    bundle = place.copy(tmp_path / "bundle")
    for name in files_of(bundle):
        whole = (bundle / name).read_bytes()
        # In the middle of the manifest may be what another file says, too; then that one may be named.
        at = 0 if name == MANIFEST else len(whole) // 2
        (bundle / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for key in (place.public, None) if name != SIGNATURE else (place.public,):

            def opened(key: Path | None = key, name: str = name) -> None:
                with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
                    SafeEncoder.open(bundle, public_key=key)

            assert called(opened) == set(), name
        (bundle / name).write_bytes(whole)


def commands(bundle: Path, folder: Path, place: Place) -> dict[str, tuple[list[object], bool]]:
    """Every command that reads a bundle, and whether it takes a public key."""
    accept = ["--by", "jo", "--reason", "1.0"]
    (texts := folder / "captions.jsonl").write_text('{"key": "a", "text": "a red circle"}\n')
    return {
        "gate": (["gate", bundle], True),
        "attest": (["attest", bundle, "--unsigned"], True),
        "refit": (["refit", bundle, "--revert", "--unsigned"], True),
        "sign": (["sign", bundle, "--key", place.key], False),
        "evaluate": (["evaluate", "--bundle", bundle], True),
        "compare": (["evaluate", "--compare", f"A={bundle}", "--evaluation", "demo-test"], True),
        "bench": (["bench", bundle, "--torch", "none"], True),
        "embed": (["embed", bundle, texts, "--kind", "texts", "--out", folder / "rows"], True),
        "inspect": (["inspect", bundle], False),
        "report": (["report", bundle, "--out", folder / "report.html"], False),
        "diagnose": (["diagnose", bundle], False),
        "baseline set": (["baseline", "set", bundle, "--at", folder / "base", *accept], False),
        "baseline set at": (["baseline", "set", place.bundle, "--at", bundle, "--unsigned", *accept], True),
    }


@pytest.fixture(scope="module")
def accepting(built: tuple[Request, Outcome]) -> list[object]:
    return ["--policy", built[0].policy]


def test_every_command_refuses_a_changed_bundle_first(
    place: Place, accepting: list[object], tmp_path: Path, called
) -> None:
    """Each file changed, each command: exit code 5, the file named, nothing deserialised, nothing written."""
    bundle, folder = place.copy(tmp_path / "bundle"), tmp_path / "folder"
    folder.mkdir()
    known = commands(bundle, folder, place)
    for module in (
        "pipeline.refit",
        "studies.evaluate",
        "studies.diagnose",
        "studies.bench",
        "commands.embed",
        "report.html",
        "report.inspection",
    ):
        importlib.import_module(f"uwm_deploy.{module}")  # so that an import is not taken for a call
    watched = "engines/onnxruntime-fp32/text.onnx"
    for name in (n for n in files_of(bundle) if n != SIGNATURE):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for title, (words, _) in known.items():
            more = accepting if words[0] in ("baseline", "attest", "refit", "gate") else []
            found: list[tuple[int, str]] = []
            call = functools.partial(lambda w, to: to.append(run(*w)), [*words, *more], found)
            seen = called(call) if name == watched else call()  # being watched is slow
            assert found[0][0] == 5, (title, name, found)
            assert name in found[0][1], (title, name, found)
            assert not seen, (title, name, seen)
        (bundle / name).write_bytes(whole)
    assert not list((folder / "rows").glob("*.parquet"))
    assert not (folder / "report.html").exists()
    assert not (folder / "base").exists()


def test_every_command_with_a_key_checks_signature_and_version(
    place: Place, accepting: list[object], tmp_path: Path
) -> None:
    """Somebody else's key, no signature, a manifest rewritten as a whole, an older version: exit code 5."""
    folder = tmp_path / "folder"
    folder.mkdir()
    bundle = place.copy(tmp_path / "bundle")
    for title, (words, takes_key) in commands(bundle, folder, place).items():
        if not takes_key:
            continue
        more = (
            accepting if words[0] == "baseline" else []
        )  # only what passes is stored, so only then the place is opened
        code, output = run(*words, *more, "--public-key", place.other_public)
        assert (code, SIGNATURE in output) == (5, True), (title, output)
        if title in ("gate", "evaluate", "compare", "bench", "embed"):
            code, output = run(*words, "--public-key", place.public, "--min-bundle-version", 1)
            assert (code, MANIFEST in output) == (5, True), (title, output)
    (bundle / SIGNATURE).unlink()
    for title, (words, takes_key) in commands(bundle, folder, place).items():
        if takes_key:
            more = accepting if words[0] == "baseline" else []
            code, output = run(*words, *more, "--public-key", place.public)
            assert (code, f"{SIGNATURE} is missing" in output) == (5, True), (title, output)
    code, output = run("evaluate", "--model", "demo", "--public-key", place.public)
    assert (code, "none of what is measured is a bundle" in output) == (2, True), output


def test_a_signed_bundle_is_measured_with_the_right_key(place: Place, tmp_path: Path) -> None:
    """Bench and embed go on when the signature is the right one."""
    assert run("bench", place.bundle, "--torch", "none", "--seconds", 0.01, "--public-key", place.public)[0] == 0
    code, output = run(*commands(place.bundle, tmp_path, place)["embed"][0], "--public-key", place.public)
    assert code == 0, output

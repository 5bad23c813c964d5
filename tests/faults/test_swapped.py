"""A file that is changed between the check of a bundle and its use: nobody vouches for it, and nobody serves it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from click.testing import CliRunner

from tests.serve.server import needs_triton_client
from tests.small_build import build_small
from tests.unit.test_report import make, write_bundle
from tests.unit.test_resigning import waiting_bundle
from tests.unit.test_signature import files_of, write_keys
from uwm_deploy.bundle import open as opening
from uwm_deploy.bundle.open import MANIFEST, open_bundle
from uwm_deploy.bundle.sign import Resigning, seal_for, sign_bundle
from uwm_deploy.bundle.signature import SIGNATURE
from uwm_deploy.bundle.write import DERIVED, rewriting
from uwm_deploy.cli import cli
from uwm_deploy.errors import IntegrityError
from uwm_deploy.pipeline.baseline import accepted, write_baseline_into
from uwm_deploy.pipeline.judge import report_of_bundle
from uwm_deploy.records.verdict import Result
from uwm_deploy.runtime.encoder import SafeEncoder

How = Literal["in place", "another file"]
HOW: tuple[How, ...] = ("in place", "another file")


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Bundles that are signed, and the keys."""

    folder: Path
    policy: str

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    @property
    def public(self) -> Path:
        return self.folder / "key.pub"

    def copy(self, name: str, to: Path) -> Path:
        shutil.rmtree(to, ignore_errors=True)
        return Path(shutil.copytree(self.folder / name, to))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The small build, signed; the same with a variant that waits for evidence."""
    built = build_small(tmp_path_factory)
    assert built[0].out is not None
    folder = tmp_path_factory.mktemp("signed")
    key, _ = write_keys(folder, "key")
    shutil.copytree(built[0].out, folder / "signed")
    sign_bundle(folder / "signed", key)
    waiting_bundle(built, key, folder / "waiting")
    return Place(folder, built[0].policy)


Swap = Callable[[Path, list[str], How, int, pytest.MonkeyPatch], list[int]]


@pytest.fixture
def swaps() -> Swap:
    """Changes files of a bundle as soon as it was checked for the n-th time; it notes every check."""
    real = opening._checked

    def after_check(bundle: Path, names: list[str], how: How, time: int, patch: pytest.MonkeyPatch) -> list[int]:
        seen: list[int] = []

        def checked(folder: Path, *more: Any, **named: Any) -> opening.Bundle:
            found = real(folder, *more, **named)
            if folder.resolve() == bundle.resolve():
                seen.append(1)
                if len(seen) == time:
                    for name in names:
                        _change(bundle / name, how)
            return found

        patch.setattr(opening, "_checked", checked)
        return seen

    return after_check


def _change(path: Path, how: How) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "in place":
        path.write_bytes(content)
    else:
        path.with_name("new").write_bytes(content)
        path.with_name("new").rename(path)


def _vouched(bundle: Path, public: Path, before: dict[str, bytes], changing: set[str]) -> list[str]:
    """Files that a valid signature vouches for although they are not what was checked."""
    try:
        opened = open_bundle(bundle, allow_failed=True, public_key=public)
    except IntegrityError:
        return []
    kept = {file.path for file in opened.manifest.files} & before.keys() - changing
    return [name for name in kept if (bundle / name).read_bytes() != before[name]]


def _content(bundle: Path) -> dict[str, bytes]:
    return {name: (bundle / name).read_bytes() for name in files_of(bundle)}


REWRITTEN = {*DERIVED, MANIFEST, SIGNATURE, "README.md", "reports/verify.json", "reports/verdict.json"}
"""Files that a command makes anew from records that it holds in memory."""
NEW_EDIT = {"patch.safetensors", "reports/edit.json", "evidence/reference.safetensors"}


def commands(place: Place, bundle: Path) -> dict[str, tuple[str, list[object], set[str]]]:
    """Every command that signs: which bundle it takes, its words, and the files that it makes anew."""
    judged = ["--policy", place.policy, "--key", place.key]
    accept = ["--by", "jo", "--reason", "1.0"]
    return {
        "sign": ("signed", ["sign", bundle, "--key", place.key], {SIGNATURE}),
        "baseline set": ("signed", ["baseline", "set", bundle, "--at", bundle, *accept, *judged], REWRITTEN),
        "attest": ("waiting", ["attest", bundle, "--workers", 0, *judged], REWRITTEN),
        "refit": ("signed", ["refit", bundle, "--revert", "--workers", 0, *judged], REWRITTEN | NEW_EDIT),
    }


@pytest.mark.parametrize("how", HOW)
def test_a_baseline_is_signed_with_what_was_checked(
    how: How, tmp_path: Path, swaps: Swap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of a small bundle, changed while a baseline is put into it: refused, or the file as it was."""
    made = make()
    whole = write_bundle(made, tmp_path / "made", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    key, public = write_keys(tmp_path, "key")
    sign_bundle(whole, key)
    sign = seal_for(Resigning(key=key), whole).sign
    baseline = accepted(report_of_bundle(open_bundle(whole))[0], made.verdict(), by="jo", reason="1.0")
    names, before = files_of(whole), _content(whole)
    refused = []
    for name in names:
        bundle = tmp_path / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(whole, bundle)
        with rewriting(bundle) as right:
            swaps(bundle, [name], how, 1, monkeypatch)
            try:
                write_baseline_into(right, open_bundle(bundle), baseline, sign=sign)
            except IntegrityError:
                refused.append(name)
        assert _vouched(bundle, public, before, REWRITTEN) == [], name
        assert not list(tmp_path.glob(".tmp-*"))
    copied = [name for name in names if name not in (*DERIVED, MANIFEST, SIGNATURE)]
    assert refused == (copied if how == "in place" else [])


def _swapped(
    place: Place, swaps: Swap, folder: Path, title: str, names: list[str] | None, how: How, time: int
) -> tuple[int, int]:
    """Runs a command whose files change after a check: how often it checked, and its exit code."""
    bundle = folder / "bundle"
    which, words, changing = commands(place, bundle)[title]
    place.copy(which, bundle)
    before = _content(bundle)
    with pytest.MonkeyPatch.context() as patch:
        seen = swaps(bundle, names or [name for name in before if name != SIGNATURE], how, time, patch)
        result = CliRunner().invoke(cli, [str(word) for word in words])
    assert "Traceback" not in result.output, result.output
    assert result.exit_code in (0, 3, 5), result.output
    assert _vouched(bundle, place.public, before, changing) == [], (title, names, how, time)
    assert not list(folder.glob(".tmp-*"))
    return len(seen), result.exit_code


@pytest.mark.parametrize("title", ["sign", "baseline set", "attest", "refit"])
def test_whatever_is_signed_was_checked(title: str, place: Place, tmp_path: Path, swaps: Swap) -> None:
    """All files change after the last check: in place, that is refused; others in their place are not looked at."""
    checks = {"sign": 1, "baseline set": 2, "attest": 1, "refit": 1}[title]
    wanted = {"sign": 0, "refit": 3}.get(title, 0)
    seen, code = _swapped(place, swaps, tmp_path, title, None, "another file", checks)
    assert (seen, code) == (checks, wanted)
    seen, code = _swapped(place, swaps, tmp_path, title, None, "in place", checks)
    assert (seen, code) == (checks, 0 if title == "sign" else 5)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("title", ["sign", "baseline set", "attest", "refit"])
def test_whatever_is_signed_was_checked_file_by_file(title: str, place: Place, tmp_path: Path, swaps: Swap) -> None:
    """Each file alone, after each check, in both ways."""
    which, _, _ = commands(place, tmp_path / "bundle")[title]
    checks = {"sign": 1, "baseline set": 2, "attest": 1, "refit": 1}[title]
    names = files_of(place.folder / which)
    for name in names:
        for how in HOW:
            for time in range(1, checks + 1):
                _swapped(place, swaps, tmp_path, title, [name], how, time)
    changes = len(names) * len(HOW) * checks
    print(f"| {title} | {len(names)} | {changes} | 0 |")  # the table of docs/reliability.md


@pytest.mark.parametrize("how", HOW)
def test_whatever_is_served_was_checked(
    how: How, place: Place, tmp_path: Path, swaps: Swap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file, changed after the check: the encoder answers as ever, or it is refused; never anything else."""
    bundle = place.copy("signed", tmp_path / "bundle")
    with SafeEncoder.open(bundle, public_key=place.public) as encoder:
        wanted = encoder.encode_text("a red circle")
    refused = []
    for name in files_of(bundle):
        content = (bundle / name).read_bytes()
        swaps(bundle, [name], how, 1, monkeypatch)
        try:
            with SafeEncoder.open(bundle, public_key=place.public) as encoder:
                np.testing.assert_array_equal(encoder.encode_text("a red circle"), wanted)
        except IntegrityError:
            refused.append(name)
        (bundle / name).write_bytes(content)
    if how == "another file":
        assert refused == []
    else:
        assert {"tokenizer.json", "engines/onnxruntime-fp32/text.onnx", "engines/onnxruntime-fp32/image.onnx"} <= set(
            refused
        )
        assert SIGNATURE not in refused


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "words",
    [
        ["embed", "{bundle}", "{texts}", "--kind", "texts", "--out", "{out}"],
        ["triton", "{bundle}", "{out}"],
        ["evaluate", "--bundle", "{bundle}"],
        ["bench", "{bundle}", "--torch", "none", "--seconds", "0.01"],
        ["gate", "{bundle}", "--policy", "demo"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_that_serves_takes_what_was_checked(
    words: list[str], how: How, place: Place, tmp_path: Path, swaps: Swap
) -> None:
    """All files change after the last check: refused with exit code 5, or as if nothing had been changed."""
    if words[0] == "triton":
        needs_triton_client()
    bundle = place.copy("signed", tmp_path / "bundle")
    (texts := tmp_path / "texts.jsonl").write_text('{"key": "a", "text": "a red circle"}\n')
    names = {"bundle": bundle, "texts": texts, "out": tmp_path / "out"}
    line = [word.format(**names) for word in words]
    with pytest.MonkeyPatch.context() as patch:
        swaps(bundle, [name for name in files_of(bundle) if name != SIGNATURE], how, 1, patch)
        result = CliRunner().invoke(cli, line)
    # `evaluate` opens the bundle again, and then it is another one.
    wanted = 5 if how == "in place" or words[0] == "evaluate" else 0
    assert (result.exit_code, "Traceback" in result.output) == (wanted, False), result.output
    if how == "in place":
        assert not [path for path in tmp_path.glob("out/**/*") if path.is_file() and not path.name.startswith(".")]

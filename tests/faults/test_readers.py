"""Readers open a bundle while it is signed, gets baselines and other edits: each sees a whole bundle, old or new."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.small_build import build_small
from tests.unit.test_report import make, write_bundle
from tests.unit.test_signature import write_keys
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.bundle.sign import Resigning, seal_for, sign_bundle
from uwm_deploy.bundle.write import rewriting
from uwm_deploy.cli import cli
from uwm_deploy.pipeline.baseline import accepted, write_baseline_into
from uwm_deploy.pipeline.judge import report_of_bundle
from uwm_deploy.records import replacing as replacing_module
from uwm_deploy.records.replacing import exchange, replacing, workplace_of
from uwm_deploy.records.verdict import Result


def _beside(write: Callable[[], None], read: Callable[[], object], opens: int) -> int:
    """Reads as often as told while another process writes; how often that one wrote."""
    context = multiprocessing.get_context("fork")
    stop, count = context.Event(), context.Value("i", 0)

    def wrote() -> None:
        while not stop.is_set():
            write()
            count.value += 1

    writer = context.Process(target=wrote)
    writer.start()
    try:
        for _ in range(opens):
            read()
    finally:
        stop.set()
        writer.join(120)
    assert writer.exitcode == 0
    return count.value


def _rewrites(bundle: Path, key: Path) -> Callable[[], None]:
    """Signs a bundle, and puts another baseline into it, in turn."""
    turn = iter(range(1_000_000))
    baseline = accepted(
        report_of_bundle(open_bundle(bundle))[0], open_bundle(bundle).manifest.verdict, by="a", reason="b"
    )
    sign = seal_for(Resigning(key=key), bundle).sign

    def rewrite() -> None:
        number = next(turn)
        if number % 2:
            sign_bundle(bundle, key)
            return
        with rewriting(bundle) as place:
            changed = dataclasses.replace(baseline, reason=f"release {number}")
            write_baseline_into(place, open_bundle(place.path), changed, sign=sign)

    return rewrite


@pytest.mark.parametrize("exchanges", [True, False])
def test_readers_see_the_old_bundle_or_the_new_one(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every open succeeds and what was opened stays whole, also where the file system cannot exchange names."""
    made = make()
    bundle = write_bundle(made, tmp_path / "bundle", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    key, public = write_keys(tmp_path, "key")
    sign_bundle(bundle, key)
    if not exchanges:
        monkeypatch.setattr(replacing_module, "_RENAME_EXCHANGE", 1 << 20)
    seen = set()

    def read() -> None:
        opened = open_bundle(bundle, public_key=public)
        for file in opened.manifest.files:
            b"".join(opened.chunks(file.path))  # its graphs are none
        seen.add(opened.digest)

    assert _beside(_rewrites(bundle, key), read, 60) >= 3
    assert len(seen) >= 2
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_was_opened_stays_when_another_takes_its_place(tmp_path: Path) -> None:
    """Every file of the old bundle can be read after it was replaced and removed."""
    made = make()
    bundle = write_bundle(made, tmp_path / "bundle", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    old = open_bundle(bundle)
    content = {file.path: (bundle / file.path).read_bytes() for file in old.manifest.files}
    write_bundle(make(), bundle, verdict=dataclasses.replace(made.verdict(), result=Result.PASS), bundle_version=9)
    assert open_bundle(bundle).manifest.bundle_version == 9
    assert {name: b"".join(old.chunks(name)) for name in content} == content


def test_a_link_to_a_bundle_is_followed_first(tmp_path: Path) -> None:
    """`current -> v1` stays a link; the bundle behind it is signed, and rewritten in its own place."""
    made = make()
    first = write_bundle(made, tmp_path / "v1", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    key, public = write_keys(tmp_path, "key")
    (link := tmp_path / "current").symlink_to("v1")
    assert CliRunner().invoke(cli, ["sign", str(link), "--key", str(key)]).exit_code == 0
    rewrite = _rewrites(link, key)
    rewrite()
    rewrite()
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "key.pem", "key.pub", "v1"]
    assert open_bundle(first, public_key=public).digest == open_bundle(link, public_key=public).digest
    (circle := tmp_path / "circle").symlink_to("circle")
    result = CliRunner().invoke(cli, ["sign", str(circle), "--key", str(key)])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)


def test_a_second_writer_waits_its_turn(tmp_path: Path) -> None:
    """One line, exit code 2, nothing changed; the lock goes with its process, even where that had forked another."""
    made = make()
    bundle = write_bundle(made, tmp_path / "bundle", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    key, _ = write_keys(tmp_path, "key")
    with replacing(bundle):
        result = CliRunner().invoke(cli, ["sign", str(bundle), "--key", str(key)])
        assert (result.exit_code, "another command is writing" in result.output) == (2, True)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
    try:
        assert CliRunner().invoke(cli, ["sign", str(bundle), "--key", str(key)]).exit_code == 0
    finally:
        child.kill()
        child.join()
    assert not workplace_of(bundle).exists()


def test_a_planted_link_beside_a_bundle_is_not_cleared(tmp_path: Path) -> None:
    """The workplace's name leads elsewhere: nothing there is touched, and the command says what is in the way."""
    made = make()
    bundle = write_bundle(made, tmp_path / "bundle", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    key, _ = write_keys(tmp_path, "key")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "dear").write_text("x")
    workplace_of(bundle).symlink_to(elsewhere)
    result = CliRunner().invoke(cli, ["sign", str(bundle), "--key", str(key)])
    assert (result.exit_code, "in the way" in result.output) == (2, True), result.output
    assert (elsewhere / "dear").read_text() == "x"


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    """Two folders, and a folder with a file; what is missing is an error and not a lack of the system."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "b").write_text("2")
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("not run: this file system cannot exchange two names")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b" / "x").read_text()) == ("2", "1")
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_readers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A real bundle is signed, gets a baseline and another edit in turn; 2,000 opens by a server's checks."""
    request, _ = build_small(tmp_path_factory)
    assert request.out is not None
    folder = tmp_path_factory.mktemp("served")
    key, _ = write_keys(folder, "key")
    for name in ("bundle", "first"):
        shutil.copytree(request.out, folder / name)
    bundle, turn = folder / "bundle", iter(range(1_000_000))
    sign_bundle(bundle, key)
    accept = ["--by", "a", "--reason", "b", "--policy", request.policy]
    refit = ["refit", bundle, "--workers", 0, "--policy", request.policy]
    lines: list[tuple[list[Any], int]] = [
        ([*refit, "--revert", "--unsigned"], 3),
        ([*refit, "--patch", folder / "first", "--key", key], 0),
        (["sign", bundle, "--key", key], 0),
        (["baseline", "set", bundle, "--at", bundle, *accept, "--key", key], 0),
    ]

    def write() -> None:
        words, code = lines[next(turn) % len(lines)]
        result = CliRunner().invoke(cli, [str(word) for word in words])
        assert result.exit_code == code, result.output

    def read() -> None:
        opened = open_bundle(bundle, allow_failed=True)
        for file in opened.manifest.files:
            opened.read(file.path)

    wrote = _beside(write, read, 2000)
    print(f"2,000 opens beside {wrote} rewrites")
    assert wrote >= len(lines)

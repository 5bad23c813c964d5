"""Stored embeddings taken over to real bundles: of the unedited demo, and of the demo after a first step of weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import load, load_file, save

from tests.data_sets import put
from tests.small_build import build_small, write_sets
from tests.unit.test_examples import example
from uwm_deploy.bundle.open import Bundle, open_bundle
from uwm_deploy.bundle.space import space_before, space_of
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.cli import cli
from uwm_deploy.errors import EvidenceError, InputError, IntegrityError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import read_record, record_from_json
from uwm_deploy.records.edit import Placement
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.embedding_map import maps_of_bundle
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.serve.embed.migrate import cosine_min, migration_of

FP32, FP16 = "onnxruntime-fp32", "onnxruntime-fp16"


def _built(request: Request, method: str, **options: Any) -> Path:
    """A bundle by another method, from the scores of the small build."""
    folder = request.work.parent
    changed = dataclasses.replace(request, method=method, targets=("onnxruntime",), out=folder / method, **options)
    run(changed, until="package", reporter=Reporter(quiet=True))
    return folder / method


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The small build, in a folder of its own that other methods go on in."""
    return build_small(tmp_path_factory)[0]


AXIS: dict[str, Any] = {"placement": "embedding", "axis": AxisSetting(g=0.7, o=0.5, kappa=0.4, a=1.0, tau=0.0)}


POLICY = """format = 1
name = "policy"
edit = []

[[artifact]]
metric = "parity.cosine_min"
at_least = 0.999
min_n = 1
reason = "whether the edit does any good is not looked at here"
"""
ITEMS = 40


@pytest.fixture(scope="module")
def axis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step, which maps embeddings."""
    folder = tmp_path_factory.mktemp("axis")
    write_sets(folder, calibration=48, evaluation=ITEMS, zero_shot=16)
    (folder / "policy.toml").write_text(POLICY)
    request = Request(
        calibration=str(folder / "cal.toml"), evaluation=str(folder / "eval.toml"), policy=str(folder / "policy.toml"),
        method="safety-axis", targets=("onnxruntime",), precisions=("fp32", "fp16"), work=folder / "work",
        out=folder / "bundle", workers=0, **AXIS,
    )  # fmt: skip
    run(request, until="package", reporter=Reporter(quiet=True))
    return folder / "bundle"


@pytest.fixture(scope="module")
def uwm(small: Request) -> Path:
    """One step, which changes weights."""
    assert small.out is not None
    return small.out


@pytest.fixture(scope="module")
def both(small: Request) -> Path:
    """The two, one after the other."""
    return _built(small, "uwm+safety-axis", precisions=("fp32",), **AXIS)


def _evidence(bundle: Path, whose: str) -> EmbeddedSet:
    return EmbeddedSet.from_tensors(load_file(bundle / "evidence" / "reference.safetensors"), whose)


def _rows(part: EmbeddedSet, tower: str) -> np.ndarray:
    return np.concatenate([getattr(part, f"{side}_{tower}") for side in ("safe", "unsafe")])


def _migrate(*words: object) -> Result:
    return CliRunner().invoke(cli, ["migrate", *map(str, words)])


@pytest.mark.parametrize("tower", ["image", "text"])
def test_embeddings_of_the_unedited_model_become_the_bundles_own(axis: Path, tmp_path: Path, tower: str) -> None:
    """From the evidence of the unedited demo to that of the edited one within 1e-6, every key compared."""
    original = _evidence(axis, "original")
    np.save(tmp_path / "old.npy", _rows(original, tower))
    keys = [f"{item}/{side}" for side in ("safe", "unsafe") for item in original.ids]
    put(tmp_path / "keys.txt", "\n".join(keys))
    common = (
        "--bundle",
        axis,
        "--tower",
        tower,
        "--keys",
        tmp_path / "keys.txt",
        "--out",
        tmp_path / "new.npy",
        "--json",
    )
    done = _migrate(tmp_path / "old.npy", *common)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["rows"], report["checked"]) == (2 * ITEMS, 2 * ITEMS)
    np.testing.assert_allclose(np.load(tmp_path / "new.npy"), _rows(_evidence(axis, "edited"), tower), atol=1e-6)
    with SafeEncoder.open(axis, variant=FP32) as encoder:
        assert report["space"] == encoder.space


def test_stored_embeddings_are_found_with_queries_of_the_bundle(axis: Path, tmp_path: Path) -> None:
    """What the runtime embeds is what the migrated rows lie beside: the nearest row of an item is its own."""
    original, texts = _evidence(axis, "original"), ["a red circle", "a blue star", "a tree"]
    np.save(tmp_path / "old.npy", original.safe_text)
    assert (
        _migrate(tmp_path / "old.npy", "--bundle", axis, "--tower", "text", "--out", tmp_path / "new.npy").exit_code
        == 0
    )
    with SafeEncoder.open(axis, variant=FP32) as encoder:
        rows = np.concatenate([np.load(tmp_path / "new.npy"), encoder.encode_text(texts)])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_embeddings_of_another_model_are_refused_by_key(axis: Path, tmp_path: Path) -> None:
    """Rows of the edited demo and of the other tower under keys of the evidence: exit code 5, nothing written."""
    keys = put(tmp_path / "keys.txt", "\n".join(_evidence(axis, "original").ids))
    for rows in (_evidence(axis, "edited").safe_image, _evidence(axis, "original").safe_text):
        np.save(tmp_path / "old.npy", rows)
        done = _migrate(
            tmp_path / "old.npy", "--bundle", axis, "--tower", "image", "--keys", keys, "--out", tmp_path / "new.npy"
        )
        assert done.exit_code == 5
        assert "test-" in done.stderr
        assert "another model, preprocessing or tower" in done.stderr
    assert not (tmp_path / "new.npy").exists()


def test_an_edit_of_weights_is_refused_with_what_to_do(uwm: Path, axis: Path, tmp_path: Path) -> None:
    """UWM, and a safety axis that is folded into the weights: exit code 2."""
    np.save(tmp_path / "old.npy", _evidence(uwm, "original").safe_image)
    done = _migrate(tmp_path / "old.npy", "--bundle", uwm, "--tower", "image", "--out", tmp_path / "new.npy")
    assert done.exit_code == 2
    assert "uwm" in done.stderr
    assert "--placement embedding" in done.stderr
    opened = open_bundle(axis)
    step = opened.manifest.edit.steps[-1]
    assert step.axis is not None
    folded = dataclasses.replace(step, axis=dataclasses.replace(step.axis, placement=Placement.WEIGHTS))
    edit = dataclasses.replace(opened.manifest.edit, steps=(folded,))
    with pytest.raises(InputError, match=r"safety-axis\) changes weights"):
        maps_of_bundle(Bundle(opened.path, dataclasses.replace(opened.manifest, edit=edit)))


@pytest.mark.slow
def test_parts_of_the_step_before_become_those_of_the_last_step(
    uwm: Path, both: Path, axis: Path, tmp_path: Path
) -> None:
    """A real run of `embed` with the UWM bundle, migrated, is what `embed` makes with both steps, and goes on with it."""
    for number in range(20):
        colours = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        (tmp_path / "files").mkdir(exist_ok=True)
        Image.fromarray(colours).resize((40, 40)).save(tmp_path / "files" / f"{number:02d}.png")
    put(tmp_path / "files" / "broken.png", b"no image")

    def embedded(bundle: Path, out: str) -> Result:
        words = ["embed", bundle, tmp_path / "files", "--out", tmp_path / out, "--variant", FP32, "--part-rows", 8]
        return CliRunner().invoke(cli, [*map(str, words), "--batch", "4", "--json"])

    assert embedded(uwm, "old").exit_code == 0
    done = _migrate(tmp_path / "old", "--bundle", both, "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert "no key of the evidence is in it: not checked" in done.stdout
    assert embedded(both, "wanted").exit_code == 0
    found, wanted = (_parts(tmp_path / name) for name in ("new", "wanted"))
    assert found.keys() == wanted.keys()
    assert np.isnan(found.pop("broken.png")).all()
    for key, row in found.items():
        np.testing.assert_allclose(row, wanted[key], atol=1e-6)
    on = embedded(both, "new")
    assert (on.exit_code, json.loads(on.stdout)["finished_before"]) == (0, 21)
    for stored, bundle, message in (("old", axis, "takes over"), ("new", both, "own space already")):
        done = _migrate(tmp_path / stored, "--bundle", bundle, "--out", tmp_path / "other")
        assert done.exit_code == 5
        assert message in done.stderr
    mixed = embedded(both, "old")
    assert mixed.exit_code == 5
    assert open_bundle(uwm).manifest.spaces[FP32] in mixed.stderr
    assert open_bundle(both).manifest.spaces[FP32] in mixed.stderr


@pytest.mark.slow
def test_an_index_of_the_example_finds_the_same_as_one_made_again(uwm: Path, both: Path, tmp_path: Path) -> None:
    """An index of the bundle before is refused by the encoder of the bundle after; migrated, it answers like a new one."""
    pytest.importorskip("faiss", reason="needs the extra [examples]")
    search = example("faiss_search")
    for number in range(12):
        colours = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
        (tmp_path / "files").mkdir(exist_ok=True)
        Image.fromarray(colours).resize((40, 40)).save(tmp_path / "files" / f"{number:02d}.png")
    old, new, again = (tmp_path / f"{name}.index" for name in ("old", "new", "again"))
    with SafeEncoder.open(uwm, variant=FP32) as before, SafeEncoder.open(both, variant=FP32) as after:
        search.build(before, tmp_path / "files", old)
        search.build(after, tmp_path / "files", again)
        with pytest.raises(SystemExit, match=f"{before.space}.*{after.space}"):
            search.search(after, old, "a red circle", 3)
        done = _migrate(old, "--bundle", both, "--out", new)
        assert done.exit_code == 0, done.output
        found, wanted = (search.search(after, index, "a red circle", 12) for index in (new, again))
    assert [name for name, _ in found] == [name for name, _ in wanted]
    np.testing.assert_allclose([c for _, c in found], [c for _, c in wanted], atol=1e-6)


def _parts(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("part-*.parquet"):
        for row in parquet.read_table(path).to_pylist():
            found[row["key"]] = np.asarray(row["embedding"])
    return found


@pytest.mark.slow
def test_the_space_before_is_that_of_the_bundle_with_the_steps_before(uwm: Path, both: Path, axis: Path) -> None:
    """So what `embed` recorded tells whether rows can be taken over; each precision has its own."""
    first, second = open_bundle(uwm).manifest, open_bundle(both).manifest
    assert space_before(second, FP32) == space_of(first, FP32)
    alone = open_bundle(axis).manifest
    assert len({space_before(alone, FP32), space_before(second, FP32), *alone.spaces.values()}) == 4
    assert space_before(alone, FP16) != space_before(alone, FP32) == space_before(alone, FP16, Precision.FP32)


def test_rows_lie_beside_a_variant_and_are_in_its_precision_or_in_float32(axis: Path) -> None:
    """Float32 by default; another precision than these two is refused."""
    opened = open_bundle(axis)
    manifest = opened.manifest
    assert migration_of(opened, TowerName.IMAGE).label.variant == FP32
    plain = migration_of(opened, TowerName.IMAGE, variant=FP16)
    assert plain.label.space == manifest.spaces[FP16]
    assert plain.label.migrated_from == space_before(manifest, FP32)
    own = migration_of(opened, TowerName.IMAGE, space_before(manifest, FP16), FP16)
    assert own.label == dataclasses.replace(plain.label, migrated_from=space_before(manifest, FP16))
    with pytest.raises(EvidenceError, match="takes over"):
        migration_of(opened, TowerName.IMAGE, space_before(manifest, FP16), FP32)


def test_rows_in_a_lower_precision_are_held_to_what_was_measured_of_it(axis: Path) -> None:
    """Twice as far from the evidence as the variant itself was, of the same tower; never closer than float32 is held to."""
    name = "reports/verify.json"
    report = record_from_json(VerifyReport, (axis / name).read_bytes(), where=name)
    assert cosine_min(report, TowerName.IMAGE, FP16) == 0.999
    far = [
        dataclasses.replace(
            a, parity=tuple(dataclasses.replace(p, cosine_min=0.99) for p in a.parity if p.tower == "text")
        )
        for a in report.artifacts
    ]
    changed = dataclasses.replace(report, artifacts=tuple(far))
    assert cosine_min(changed, TowerName.TEXT, FP16) == pytest.approx(0.98)
    assert cosine_min(changed, TowerName.IMAGE, FP16) == 0.999


def test_what_is_not_proven_or_not_whole_takes_nothing_over(axis: Path, tmp_path: Path) -> None:
    """An unknown or unproven variant, embeddings of any length, and a patch with another map than the evidence is of."""
    opened = open_bundle(axis)
    manifest = opened.manifest
    with pytest.raises(InputError, match="no variant"):
        migration_of(opened, TowerName.IMAGE, variant="tensorrt-fp16")
    verdict = dataclasses.replace(manifest.verdict, proven=())
    unproven = Bundle(opened.path, dataclasses.replace(manifest, verdict=verdict))
    for variant in (None, FP32):
        with pytest.raises(IntegrityError):
            migration_of(unproven, TowerName.IMAGE, variant=variant)
    longer = tuple(dataclasses.replace(engine, normalised=False) for engine in manifest.engines)
    with pytest.raises(InputError, match="not of length 1"):
        migration_of(Bundle(opened.path, dataclasses.replace(manifest, engines=longer)), TowerName.IMAGE)
    tensors = load(opened.read("patch.safetensors"))
    parts: dict[str, Path | bytes] = {file.path: axis / file.path for file in manifest.files}
    swapped = tensors | {f"image_map.{part}": tensors[f"text_map.{part}"] for part in ("weight", "bias")}
    for changed, message in (
        (swapped, "does not make its evidence"),
        ({name: part for name, part in tensors.items() if name != "image_map.bias"}, "does not hold image_map"),
        (tensors | {"image_map.bias": tensors["image_map.bias"][:-1]}, "is no map of 64 numbers"),
    ):
        bundle_from_parts(tmp_path / "other", manifest, parts | {"patch.safetensors": save(changed)})
        # Opening refuses a patch that is not the edit's; here it is read by who holds the bundle already.
        listed = read_record(Manifest, tmp_path / "other" / "manifest.json")
        with pytest.raises(IntegrityError, match=message):
            migration_of(Bundle(tmp_path / "other", listed), TowerName.IMAGE)

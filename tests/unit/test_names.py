"""Names that become files, and what a manifest names: nothing leads out of a folder, nothing is about another file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.unit.test_report import Made, make, write_bundle
from tests.unit.test_signature import write_keys
from uwm_deploy.bundle.open import MANIFEST, open_bundle
from uwm_deploy.bundle.sign import sign_bundle
from uwm_deploy.bundle.signature import SIGNATURE, signed_digests
from uwm_deploy.bundle.tied import check_cut
from uwm_deploy.cli import cli
from uwm_deploy.errors import EvidenceError, IntegrityError, RecipeError, UwmError
from uwm_deploy.graphs.child_process import made_by_child
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.recipes.shipped import read_toml
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.graph import TOKENS, RowLengths, TensorSpec
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.names import is_inside, is_segment, segment_of
from uwm_deploy.records.verdict import Result

OUTSIDE = ("../../../target", "a/b", "..", ".", "", "/etc", "a\nb", "-x", ".lock", "ä", "a" * 129)


@pytest.fixture(scope="module")
def made() -> Made:
    """Records of a tiny bundle."""
    return make()


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_recipe_name_is_one_segment(name: str) -> None:
    """Run folders and bundles are named by it."""
    assert not is_segment(name)
    text, where = read_toml("export", "demo")
    with pytest.raises(RecipeError, match="names folders"):
        recipe_from_toml(text.replace('name = "demo"', f"name = {json.dumps(name)}", 1), where=where)


@pytest.mark.parametrize("name", [*OUTSIDE, "my model"])
def test_any_folder_has_a_name_that_is_one(name: str) -> None:
    """A checkpoint folder may be called anything."""
    assert is_segment(segment_of(name))


@pytest.mark.parametrize("path", ["/a", "a//b", "a/../b", "./a", "a/", "a\\b", ""])
def test_a_listed_path_stays_inside(path: str) -> None:
    """In one form only, so that no file has two names."""
    assert not is_inside(path)
    assert is_inside("engines/onnxruntime-fp32/image.onnx")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: {"name": "../../x"}, "not a plain name"),
        (lambda m: {"onnx": (dataclasses.replace(m.onnx[0], file="../../x"), *m.onnx[1:])}, "not a plain name"),
        (lambda m: {"onnx": (dataclasses.replace(m.onnx[0], external_data="../w"), *m.onnx[1:])}, "not a plain name"),
        (lambda m: {"engines": (dataclasses.replace(m.engines[0], variant="../x"),)}, "not a plain name"),
        (lambda m: {"files": (dataclasses.replace(m.files[0], path="../x"), *m.files[1:])}, "no path inside"),
        (lambda m: {"onnx": (dataclasses.replace(m.onnx[0], file="text.onnx"), *m.onnx[1:])}, "is not the graph"),
        (lambda m: {"onnx": (dataclasses.replace(m.onnx[0], external_data="w.bin"), *m.onnx[1:])}, "is not the graph"),
        (lambda m: {"recipe": m.recipe + "\n# more"}, "the recipe in manifest.json"),
    ],
)
def test_what_a_manifest_names_is_a_listed_file(change, says: str, made: Made, tmp_path: Path) -> None:
    """Whole by its digests, canonical, and naming something else: exit code 5."""
    bundle = write_bundle(made, tmp_path / "tiny")
    text = (bundle / MANIFEST).read_bytes()
    manifest = record_from_json(Manifest, text, where=MANIFEST)
    open_bundle(bundle, allow_failed=True)
    (bundle / MANIFEST).write_text(json_from_record(dataclasses.replace(manifest, **change(manifest))))
    with pytest.raises(IntegrityError, match=says):
        open_bundle(bundle, allow_failed=True)


def cut(manifest: Manifest, by: RowLengths, parts: tuple[str, ...] = ("onnx", "engines")) -> Manifest:
    """The manifest with text graphs that cut rows so."""

    def changed(item: Any) -> Any:
        if item.tower is not TowerName.TEXT:
            return item
        ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", TOKENS), lengths=by)
        return dataclasses.replace(item, inputs=(ids,))

    return dataclasses.replace(manifest, **{name: tuple(map(changed, getattr(manifest, name))) for name in parts})


def test_every_length_that_rows_are_cut_to_was_measured(made: Made, tmp_path: Path) -> None:
    """Neither a manifest that cuts rows otherwise than was measured, nor a report that lacks some length, is opened."""
    bundle = write_bundle(made, tmp_path / "tiny")
    whole = open_bundle(bundle, allow_failed=True).manifest
    text = whole.model.text
    by = RowLengths(longest=text.context_length, end_id=text.eos_id, step=text.context_length // 2)
    (bundle / MANIFEST).write_text(json_from_record(cut(whole, by)))
    with pytest.raises(EvidenceError, match="captions of every length"):
        open_bundle(bundle, allow_failed=True)
    check_cut(whole, {"onnx": ()})
    check_cut(cut(whole, by), {"onnx": by.all, "onnxruntime-fp32": by.all})
    with pytest.raises(EvidenceError, match="measure onnxruntime-fp32 on captions"):
        check_cut(cut(whole, by), {"onnx": by.all, "onnxruntime-fp32": ()})
    finer = dataclasses.replace(by, step=1)
    left = dataclasses.replace(whole.model, text=dataclasses.replace(text, padding_side="left"))
    images = tuple(dataclasses.replace(graph, tower=TowerName.IMAGE) for graph in cut(whole, by).onnx)
    for manifest, measured, says in (
        (whole, by.all, "captions of every length"),
        (cut(whole, by), by.all[:-1], "captions of every length"),
        (cut(whole, finer), by.all, "captions of every length"),
        (cut(cut(whole, by), finer, ("onnx",)), by.all, "more than one way"),
        (cut(whole, by, ("onnx",)), by.all, "more than one way"),
        (dataclasses.replace(cut(whole, by), converted=cut(whole, finer).onnx), by.all, "more than one way"),
        (dataclasses.replace(cut(whole, by), model=left), by.all, "cut at id"),
        (dataclasses.replace(whole, onnx=images), by.all, "the image tower's graph takes rows that are cut"),
        (cut(whole, dataclasses.replace(by, end_id=text.eos_id + 1)), by.all, "cut at id"),
        (cut(whole, dataclasses.replace(by, longest=text.context_length + 1)), by.all, "cut at id"),
    ):
        with pytest.raises(IntegrityError, match=says):
            check_cut(manifest, {"onnx": measured})


def test_a_patch_is_that_of_the_edit(made: Made, tmp_path: Path) -> None:
    """A patch that is listed with its own digest, and not the edit's."""
    edit = dataclasses.replace(made.edit, patch_digest="sha256:" + "0" * 64)
    bundle = write_bundle(dataclasses.replace(made, edit=edit), tmp_path / "tiny")
    with pytest.raises(IntegrityError, match="not the patch of the manifest's edit"):
        open_bundle(bundle, allow_failed=True)


def test_a_child_takes_no_module_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by its current folder nor by an empty part of PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    (tmp_path / "json.py").write_text("open('taken', 'w').close()\nraise SystemExit(1)\n")
    with pytest.raises(UwmError):
        made_by_child("uwm_deploy.graphs.engine_builder", {"engine": "x.engine"}, tool="x", stem="x", folder=tmp_path)
    assert not (tmp_path / "taken").exists()


@pytest.mark.parametrize("key", ["id", "concept"])
@pytest.mark.parametrize("character", ["\x1b", "\n::error::", "\u202e", "\u200b"])
def test_hidden_characters_in_names_are_refused(key: str, character: str, tmp_path: Path) -> None:
    """When a set is read, before anything prints them."""
    row = {"id": "a", "concept": "fire", "safe_text": "a", "unsafe_text": "b"} | {key: f"c{character}"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "s.toml").write_text('format = 1\nname = "s"\nsource = "manifest"\nmanifest = "p.jsonl"\n')
    done = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "s.toml")])
    assert (done.exit_code, "shows nothing" in done.output) == (2, True), done.output


def test_a_signature_has_no_further_bytes(made: Made, tmp_path: Path) -> None:
    """Nothing around the envelope, not even a blank; as it was written it is read."""
    passing = dataclasses.replace(made.verdict(), result=Result.PASS)
    bundle = write_bundle(made, tmp_path / "tiny", verdict=passing)
    key, public = write_keys(tmp_path, "key")
    sign_bundle(bundle, key)
    signature = (bundle / SIGNATURE).read_bytes()
    assert signed_digests(signature, public)
    for changed in (signature + b"\n", signature + b" ", b" " + signature, signature + b"{}", signature + b"\xff"):
        with pytest.raises(IntegrityError, match=f"{SIGNATURE} (is not JSON|holds bytes)"):
            signed_digests(changed, public)

"""The statement and the parts list inside a bundle: true, readable for other tools, and made anew with the bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.unit.test_report import HOSTILE, make, write_bundle
from uwm_deploy.bundle.mlbom import BOM
from uwm_deploy.bundle.open import Bundle, open_bundle
from uwm_deploy.bundle.statement import STATEMENT
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.records.graph import Target
from uwm_deploy.records.verdict import Result


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(write_bundle(make(), tmp_path_factory.mktemp("s") / "b", bundle_version=4), allow_failed=True)


def statement(bundle: Bundle) -> dict:
    return json.loads(bundle.read(STATEMENT))


def bom(bundle: Bundle) -> dict:
    return json.loads(bundle.read(BOM))


def test_the_statement_says_what_was_made_where_and_from_what(bundle: Bundle) -> None:
    """Digests of engines and data sets, versions, devices and the verdict are those of manifest and report."""
    body = statement(bundle)
    manifest = bundle.manifest
    for resource in body["subject"] + body["predicate"]["runDetails"]["byproducts"]:
        assert f"sha256:{resource['digest']['sha256']}" == digest_of_file(bundle.path / resource["name"])
    names = {resource["name"] for resource in body["subject"]}
    assert {f.path for f in manifest.files if f.path.startswith(("engines/", "onnx/"))} <= names
    build = body["predicate"]["buildDefinition"]
    assert [e["digest"] for e in build["internalParameters"]["engines"]] == [e.digest for e in manifest.engines]
    ran = {part["variant"]: part for part in build["internalParameters"]["executed"]}
    assert ran["onnxruntime-fp32"]["where"] == {"provider": "CPUExecutionProvider"}
    assert ran["tensorrt-rtx-auto"]["evidence"] == "not run"
    assert ran["tensorrt-rtx-auto"]["reason"]
    assert build["internalParameters"]["verdict"]["result"] == manifest.verdict.result.value
    assert build["internalParameters"]["versions"] == {"numpy": "2"}
    assert build["externalParameters"]["bundleVersion"] == 4
    digests = [part["digest"] for part in build["resolvedDependencies"]]
    assert digests[0] == {"sha256-of-weights": manifest.model.weights_digest.removeprefix("sha256:")}
    assert digests[1]["sha256-of-ids"] == manifest.calibration.ids_digest.removeprefix("sha256:")


def test_the_statement_is_one_to_in_toto(bundle: Bundle) -> None:
    """The attestation library reads and validates it."""
    library = pytest.importorskip(
        "in_toto_attestation.v1.statement", reason="not run: in-toto-attestation is not installed ([sign])"
    )
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.v1 import statement_pb2

    proto = ParseDict(statement(bundle), statement_pb2.Statement())
    library.Statement.copy_from_pb(proto).validate()
    del proto.subject[0].digest["sha256"]
    with pytest.raises(ValueError, match="digest"):
        library.Statement.copy_from_pb(proto).validate()


def problems(text: str) -> str | None:
    """What the strict validator says; None when it has nothing to say."""
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="not run: cyclonedx-python-lib is not installed ([dev])"
    )
    from cyclonedx.schema import SchemaVersion

    found = validation.JsonStrictValidator(SchemaVersion.V1_7).validate_str(text)
    return None if found is None else str(found)


@pytest.mark.parametrize("hostile", [False, True])
def test_the_parts_list_passes_the_strict_validator(hostile: bool, tmp_path: Path) -> None:
    """Whatever names and reasons hold; and the validator would see a fault."""
    opened = open_bundle(write_bundle(make(hostile), tmp_path / "b"), allow_failed=True)
    text = opened.read(BOM).decode()
    assert problems(text) is None
    assert (HOSTILE in json.loads(text)["metadata"]["component"]["pedigree"]["ancestors"][0]["name"]) is hostile
    broken = json.loads(text)
    broken["metadata"]["component"]["modelCard"]["unknown"] = 1
    assert problems(json.dumps(broken)) is not None


def test_a_recipe_licence_of_any_kind_is_valid(tmp_path: Path) -> None:
    """SPDX names as such, others as they are written."""
    opened = open_bundle(write_bundle(make(), tmp_path / "b"), allow_failed=True)
    parts = {file.path: opened.path / file.path for file in opened.manifest.files}
    for licence, key in (("MIT", "id"), ("LLAMA 2 Community License", "name"), ("unknown", "name")):
        recipe = opened.manifest.recipe.replace('licence = "Apache-2.0"', f'licence = "{licence}"')
        assert licence in recipe
        bundle_from_parts(tmp_path / licence, dataclasses.replace(opened.manifest, recipe=recipe), parts)
        text = (tmp_path / licence / BOM).read_text()
        assert json.loads(text)["metadata"]["component"]["licenses"] == [{"license": {key: licence}}]
        assert problems(text) is None


def test_the_parts_list_has_every_file_and_number(bundle: Bundle) -> None:
    """Files with their digest, libraries, data sets, SafeGround of every artifact that was executed."""
    body = bom(bundle)
    parts = {part["bom-ref"]: part for part in body["components"]}
    assert len(parts) == len(body["components"])
    files = {ref.removeprefix("file:"): part for ref, part in parts.items() if part["type"] == "file"}
    assert set(files) == {file.path for file in bundle.manifest.files} - {BOM}
    for name, part in files.items():
        assert f"sha256:{part['hashes'][0]['content']}" == digest_of_file(bundle.path / name)
    assert parts["library:numpy"]["purl"] == "pkg:pypi/numpy@2"
    card = body["metadata"]["component"]["modelCard"]
    measured = {(row["slice"], row["type"]): row["value"] for row in card["quantitativeAnalysis"]["performanceMetrics"]}
    for subject in ("original", "edited", "onnx", "onnxruntime-fp32"):
        assert (f"{subject}, n = 240", "SafeGround GS (%)") in measured
    limits = " ".join(card["considerations"]["technicalLimitations"])
    assert "tensorrt-rtx-auto was not executed" in limits
    assert "birds" in limits


def test_both_are_made_anew_when_the_bundle_is_rewritten(bundle: Bundle, tmp_path: Path) -> None:
    """New evidence is in them, although the old files are handed in with the other parts; equal parts, equal bytes."""
    parts = {file.path: bundle.path / file.path for file in bundle.manifest.files}
    same = bundle_from_parts(tmp_path / "same", bundle.manifest, parts)
    assert same == bundle.manifest
    verdict = dataclasses.replace(bundle.manifest.verdict, result=Result.PASS, proven=("tensorrt-rtx-auto",))
    bundle_from_parts(tmp_path / "new", dataclasses.replace(bundle.manifest, verdict=verdict), parts)
    build = json.loads((tmp_path / "new" / STATEMENT).read_text())["predicate"]["buildDefinition"]
    assert build["internalParameters"]["verdict"]["proven"] == ["tensorrt-rtx-auto"]
    assert "tensorrt-rtx-auto" in (tmp_path / "new" / BOM).read_text()
    assert {engine.target for engine in bundle.manifest.engines} == {Target.ONNXRUNTIME}

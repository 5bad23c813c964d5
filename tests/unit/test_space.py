"""Ids of embedding spaces: what they depend on, where they stand, and that a wrong one is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from uwm_deploy.bundle.open import MANIFEST, open_bundle
from uwm_deploy.bundle.space import space_before, space_of, spaces_of
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.graph import Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.encoder import SafeEncoder

VARIANT = "onnxruntime-fp32"


@pytest.fixture(scope="module")
def bundle(built: tuple[Request, Outcome]) -> Path:
    assert built[0].out is not None
    return built[0].out


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def _engines(manifest: Manifest, **change: object) -> Manifest:
    return dataclasses.replace(manifest, engines=tuple(dataclasses.replace(e, **change) for e in manifest.engines))


def test_the_id_is_the_same_for_whatever_embeds_alike(manifest: Manifest) -> None:
    """Target, builder, verdict, version and name of the bundle are no part of it; a refit that changes nothing neither."""
    wanted = space_of(manifest, VARIANT)
    assert wanted.startswith("space:sha256:")
    same = dataclasses.replace(manifest, name="another", bundle_version=7, created="", tool_version="9")
    assert space_of(same, VARIANT) == wanted
    other = _engines(manifest, variant="tensorrt-fp32", target=Target.TENSORRT, settings={}, built_on="a GPU")
    assert space_of(other, "tensorrt-fp32") == wanted
    edit = dataclasses.replace(manifest.edit, patch_digest="sha256:" + "1" * 64)
    assert space_of(dataclasses.replace(manifest, edit=edit), VARIANT) == wanted


def test_the_id_is_another_for_whatever_embeds_otherwise(manifest: Manifest) -> None:
    """Weights, preprocessing, tokeniser, precision, normalisation: each alone gives an id of its own."""
    model, digest = manifest.model, "sha256:" + "1" * 64
    image, text = dataclasses.replace(model.image, crop=7), dataclasses.replace(model.text, tokenizer_digest=digest)
    changed = [
        dataclasses.replace(manifest, edit=dataclasses.replace(manifest.edit, edited_weights_digest=digest)),
        dataclasses.replace(manifest, model=dataclasses.replace(model, weights_digest=digest)),
        dataclasses.replace(manifest, model=dataclasses.replace(model, image=image)),
        dataclasses.replace(manifest, model=dataclasses.replace(model, text=text)),
        _engines(manifest, precision="int8"),
        _engines(manifest, normalised=False),
    ]
    found = {space_of(one, VARIANT) for one in (manifest, *changed)}
    lowered = _engines(manifest, variant="onnxruntime-auto", precision="fp32")
    assert len(found | {space_of(lowered, "onnxruntime-auto")}) == len(changed) + 2


def test_an_edit_of_the_weights_has_no_space_before_it(manifest: Manifest) -> None:
    """No map takes embeddings over a change of weights; the message says what to do. An unknown variant is named."""
    with pytest.raises(InputError, match="--placement embedding"):
        space_before(manifest, VARIANT)
    with pytest.raises(InputError, match="it has onnxruntime-fp32"):
        space_of(manifest, "tensorrt-fp16")


def test_the_id_stands_wherever_embeddings_come_from(bundle: Path, manifest: Manifest) -> None:
    """Manifest, encoder, its metrics, and `inspect` say the same."""
    assert manifest.spaces == spaces_of(manifest)
    assert manifest.spaces[VARIANT] == space_of(manifest, VARIANT)
    with SafeEncoder.open(bundle, variant=VARIANT) as encoder:
        assert encoder.space == manifest.spaces[VARIANT]
        assert f'space="{encoder.space}"' in encoder.metrics()
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(bundle), "--json"]).stdout)
    assert shown["embedding spaces"] == manifest.spaces
    assert {engine.tower for engine in manifest.engines} == set(TowerName)


@pytest.mark.parametrize("spaces", [{}, {VARIANT: "space:sha256:" + "0" * 64}])
def test_a_manifest_with_other_ids_is_refused(
    bundle: Path, manifest: Manifest, spaces: dict[str, str], tmp_path: Path
) -> None:
    """The id is computed from the rest of the manifest as it is opened; a wrong or a missing one is exit code 5."""
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / MANIFEST).write_text(json_from_record(dataclasses.replace(manifest, spaces=spaces)))
    with pytest.raises(IntegrityError, match="other embedding spaces"):
        open_bundle(copy)

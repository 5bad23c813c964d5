"""A safety head in the exported image graph of every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import QUICK_FAMILIES, model_of, reduced
from uwm_deploy.edits.patch import Patch, TensorPatch
from uwm_deploy.records.edit import TensorEdit
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS, SAFETY_TOKENS, HeadShape
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.session import open_graph
from uwm_deploy.stages.export import onnx_from_tower
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.safety_head import SafetyHeadModule, tokens_of, with_head

DIGEST = "sha256:" + "1" * 64


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_head_is_exported_with_every_family(family: str, tmp_path: Path) -> None:
    """Its outputs are PyTorch's at any batch, and the embedding is the one of a graph without it, to rounding.

    Not to the bit: without a head only the pooled token goes through the end of the last block.
    """
    model, recipe = model_of(family), reduced(family)
    tower, side = model.image, model.ref.image.crop
    pixels = torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(0))
    width = tokens_of(tower, pixels[:1].numpy()).shape[2]
    torch.manual_seed(1)
    language = 20 if family.startswith("llava") else 0
    head = SafetyHeadModule(
        HeadShape(features=width, width=8, tokens=3, heads=2, categories=4, language=language)
    ).eval()
    layers = tower.layers(recipe.entries.image.layers)
    weights = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}
    digests = {name: digest_of_tensor(weight) for name, weight in weights.items()}
    edits = [
        TensorEdit(
            tower=TowerName.IMAGE, name=name, shape=tuple(weight.shape), selected=0, share=0.0,
            digest_before=digests[name], digest_after=digests[name],
        )
        for name, weight in weights.items()
    ]  # fmt: skip
    nothing = torch.empty(0, dtype=torch.int32)
    patch = Patch(
        {n: TensorPatch(indices=nothing, factor=1.0, digest_before=d, digest_after=d) for n, d in digests.items()}
    )
    found = []
    for name, subject in (("plain", tower), ("headed", with_head(tower, head))):
        (tmp_path / name).mkdir()
        artifact = onnx_from_tower(
            subject, pixels[:2], recipe.export, weights_digest=DIGEST, edits=edits, patch=patch, folder=tmp_path / name
        )
        session = open_graph(tmp_path / name / artifact.file, artifact, max_batch=5)
        found.append((session.run_all(pixels.numpy()), session.run_all(pixels[:1].numpy())))
    (plain, plain_1), (headed, headed_1) = found
    assert list(headed) == [*plain, *([SAFETY_TOKENS] if language else []), RISK_LOGITS, RISK_LEVEL]
    for name in plain:
        np.testing.assert_allclose(headed[name], plain[name], atol=1e-6)
        np.testing.assert_allclose(headed_1[name], plain_1[name], atol=1e-6)
    with torch.inference_mode():
        *own, logits, level = with_head(tower, head).outputs(pixels)
    if language:
        assert headed[SAFETY_TOKENS].shape == (5, 3, language)
        np.testing.assert_allclose(headed[SAFETY_TOKENS], own[-1].numpy(), atol=1e-5)
    np.testing.assert_allclose(headed[RISK_LOGITS], logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(headed[RISK_LEVEL], level.numpy(), atol=1e-5)
    np.testing.assert_allclose(headed_1[RISK_LOGITS], headed[RISK_LOGITS][:1], atol=1e-4)

"""Refitting where a map lies behind the embedding: taken back, it stays a node, and nothing differs any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from uwm_deploy.edits.patch import Patch, replaced
from uwm_deploy.pipeline.refit_bundle import _canaries
from uwm_deploy.pipeline.refit_graphs import reverted
from uwm_deploy.records.edit import EditKind, EditRecord, EditStep, Method, TensorEdit
from uwm_deploy.records.graph import TensorSpec
from uwm_deploy.records.model import ImageSpec, ModelRef, TextSpec, TowerName
from uwm_deploy.safeground.embedded import EmbeddedSet

SIZE, N = 4, 20


def edit() -> tuple[EditRecord, Patch]:
    """Maps behind both embeddings."""
    rng, tensors, parts = torch.Generator().manual_seed(0), [], {}
    for tower in TowerName:
        for part, shape in (("weight", (SIZE, SIZE)), ("bias", (SIZE,))):
            name = f"{tower.value}_map.{part}"
            parts[name] = replaced(None, torch.randn(*shape, generator=rng))
            tensors.append(
                TensorEdit(
                    tower=tower, name=name, shape=shape, selected=0, share=1.0, digest_before="",
                    digest_after=parts[name].digest_after, kind=EditKind.ADDED,
                )
            )  # fmt: skip
    ref = ModelRef(
        name="x", family="hf-clip", repo="local", revision="", weights_digest="sha256:0", embed_dim=SIZE,
        image=ImageSpec(resize=2, crop=2, resample="bicubic", rescale=1.0, mean=(0, 0, 0), std=(1, 1, 1)),
        text=TextSpec(context_length=3, eos_id=0, pad_id=0, tokenizer_digest=""),
    )  # fmt: skip
    record = EditRecord(
        model=ref, edited_weights_digest="sha256:1", patch_digest="sha256:2", tensors=tuple(tensors),
        steps=(EditStep(method=Method.SAFETY_AXIS),),
    )  # fmt: skip
    return record, Patch(parts)


def embedded(seed: int) -> EmbeddedSet:
    rng = np.random.default_rng(seed)
    members = ("safe_image", "unsafe_image", "safe_text", "unsafe_text")
    rows = {name: rng.standard_normal((N, SIZE)).astype(np.float32) for name in members}
    names = tuple(map(str, range(N)))
    return EmbeddedSet(ids=names, concepts=names, zero_shot={}, **rows)


def prepared() -> Any:
    pixels, ids = np.zeros((N, 3, 2, 2), np.float32), np.zeros((N, 3), np.int64)
    return SimpleNamespace(ids=range(N), safe_pixels=pixels, unsafe_pixels=pixels, safe_ids=ids, unsafe_ids=ids)


def test_a_map_that_was_taken_back_has_no_canaries() -> None:
    """Edited and original are the same on every input, so none tells them apart; with another map some do."""
    record, patch = edit()
    back, nothing = reverted(record, patch)
    assert set(nothing.tensors) == {tensor.name for tensor in record.tensors}
    given = {
        TowerName.IMAGE: TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 2, 2)),
        TowerName.TEXT: TensorSpec(name="input_ids", dtype="int64", shape=("batch", 3)),
    }
    assert _canaries(back, embedded(0), embedded(0), prepared(), given) == {}
    assert len(_canaries(record, embedded(0), embedded(1), prepared(), given)) == 2

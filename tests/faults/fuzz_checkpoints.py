"""Readers of checkpoints and patches, which need torch; apart from the others, so that their memory is their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from tests.faults.fuzz_reader import DEMO, Reader, written
from tests.faults.mutations import Form
from uwm_deploy.edits.patch import Patch, TensorPatch, replaced
from uwm_deploy.towers import hf_clip
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.refusal import refusals


def _small_checkpoint(folder: Path) -> None:
    """A checkpoint of kilobytes: a larger one would be in memory as often as it was changed."""
    shutil.copytree(DEMO, folder)
    body = json.loads((folder / "config.json").read_text())
    small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    for part in ("text_config", "vision_config"):
        body[part] |= small | {"projection_dim": 8}
    CLIPModel(CLIPConfig.from_dict(body | {"projection_dim": 8})).save_pretrained(folder)


def _checkpoint(name: str, form: Form) -> Callable[[Path], Reader]:
    """A file of a checkpoint folder, up to the model that is made of it; `load_model` has the same block."""

    def make_reader(folder: Path) -> Reader:
        _small_checkpoint(folder / "clip")

        def load(_: Path) -> None:
            with refusals("checkpoint clip cannot be loaded"):
                hf_clip.from_folder(folder / "clip", random=False)

        file = folder / "clip" / name
        return Reader(form, [file.read_bytes()], written(file, load))

    return make_reader


def _patch(_: Path) -> Reader:
    before, after, at = torch.zeros(4, 6), torch.arange(24.0).reshape(4, 6), torch.tensor([0, 3], dtype=torch.int32)
    digests = {"digest_before": digest_of_tensor(before), "digest_after": digest_of_tensor(after)}
    parts = {
        "a": replaced(before, after),
        "b": replaced(None, after),
        "c": TensorPatch(indices=at, factor=-1.0, **digests),
    }
    return Reader("tensors", [Patch(parts).to_bytes()], lambda data: Patch.from_bytes(data, "patch.safetensors"))


READERS: Mapping[str, Callable[[Path], Reader]] = {
    "patch": _patch,
    "config.json": _checkpoint("config.json", "json"),
    "preprocessor": _checkpoint("preprocessor_config.json", "json"),
    "weights": _checkpoint("model.safetensors", "tensors"),
    "tokenizer config": _checkpoint("tokenizer_config.json", "json"),
}

"""Low-rank adapters on both towers (LoRA, by peft), and their merge into plain weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uwm_deploy.errors import ContractError, InputError
from uwm_deploy.records.model import Digest
from uwm_deploy.records.training import TrainingSettings
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.protocol import LoadedModel
from uwm_deploy.training.losses import MemberEmbeddings

FAMILIES = ("hf-clip",)
"""Families whose modules have the published names."""

_OF_ADAPTER = ".lora_"


class Student(nn.Module):
    """Both towers as one module, so that several processes can wrap it: four inputs to four embeddings."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.text, self.image = model.text.graph_module(), model.image.graph_module()

    def forward(self, texts: Tensor, images: Tensor) -> MemberEmbeddings:
        """Embeds both members of b pairs.

        Args:
            texts: (2b, L) int64 ids, the safe half first.
            images: (2b, 3, H, W) float32 pixels, the safe half first.
        """
        safe_text, unsafe_text = self.text(texts).chunk(2)
        safe_image, unsafe_image = self.image(images).chunk(2)
        return MemberEmbeddings(safe_text, unsafe_text, safe_image, unsafe_image).unit()


class Adapters:
    """The adapters of a model; making them changes the model in place, `merge` makes it plain again."""

    def __init__(self, model: LoadedModel, settings: TrainingSettings) -> None:
        from peft import LoraConfig, get_peft_model

        if model.ref.family not in FAMILIES:
            raise InputError(
                f"a model of family {model.ref.family} cannot be trained here",
                fix=f"use one of family {', '.join(FAMILIES)}",
            )
        self._before = {name: digest_of_tensor(p) for name, p in model.source.named_parameters()}
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.targets),
            bias="none",
        )
        torch.manual_seed(settings.seed)
        self._model = model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will be another's
            self._wrapped: Any = get_peft_model(model.source, config)
        self.tensors = {name: p for name, p in model.source.named_parameters() if p.requires_grad}
        others = [name for name in self.tensors if _OF_ADAPTER not in name]
        if others or not self.tensors:
            raise ContractError(f"{others[:1] or 'nothing'} would be trained", fix="report this")

    @property
    def count(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.tensors.values())

    def state(self) -> dict[str, Tensor]:
        """A copy of all adapters by name, float32 on the CPU: (rank, in) and (out, rank)."""
        return {name: p.detach().cpu().clone() for name, p in self.tensors.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts a copy back.

        Args:
            state: Adapters by name, (rank, in) and (out, rank) float32, see `state`.
        """
        for name, parameter in self.tensors.items():
            parameter.copy_(state[name])

    def merge(self) -> dict[str, Digest]:
        """Adds the adapters to the weights, and takes them off: the model has its own parameters again.

        Returns:
            Parameter that changed to its digest.

        Raises:
            ContractError: If the model has other parameters than before, or one without an adapter changed.
        """
        targets = {
            name.replace(".base_layer", "") for name, _ in self._model.source.named_parameters() if _is_base(name)
        }
        self._wrapped.merge_and_unload(safe_merge=True)
        after = dict(self._model.source.named_parameters())
        if set(after) != set(self._before):
            raise ContractError("the merged model has other parameters than its base", fix="report this")
        digests = {name: digest_of_tensor(p) for name, p in after.items()}
        changed = {name: digest for name, digest in digests.items() if digest != self._before[name]}
        if strange := sorted(set(changed) - targets):
            raise ContractError(f"{strange[0]} has no adapter and changed", fix="report this")
        return changed


def _is_base(name: str) -> bool:
    return name.endswith(".base_layer.weight")

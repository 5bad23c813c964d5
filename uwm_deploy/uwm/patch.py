"""The edit of a whole model as a small file: which entries, which factor, of which weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from uwm_deploy.errors import ContractError, InputError, IntegrityError
from uwm_deploy.records import Digest
from uwm_deploy.uwm.digests import digest_of_tensor

_FORMAT = "uwm-patch-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPatch:
    """Edit of one weight.

    Attributes:
        indices: Ascending flat indices of the multiplied entries, int32 or int64.
        factor: Their multiplier.
        digest_before: Of the weight it belongs to.
        digest_after: Of the weight it makes.
    """

    indices: Tensor
    factor: float
    digest_before: Digest
    digest_after: Digest


@dataclass(frozen=True, slots=True)
class Patch:
    """Edits by layer, keys are module paths in the source model."""

    layers: Mapping[str, LayerPatch]

    def to_bytes(self) -> bytes:
        """Safetensors content; equal patches give equal bytes."""
        about = {
            name: {"factor": p.factor, "digest_before": p.digest_before, "digest_after": p.digest_after}
            for name, p in self.layers.items()
        }
        metadata = {"format": _FORMAT, "layers": json.dumps(about, sort_keys=True)}
        return _ordered(bytes(save({name: p.indices.contiguous() for name, p in self.layers.items()}, metadata)))

    @classmethod
    def from_file(cls, path: Path) -> Patch:
        """Reads a patch file.

        Raises:
            InputError: If it is not a whole patch file.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise InputError(f"{path.name} is not a patch file", fix="pass patch.safetensors of a bundle")
                about = json.loads(metadata["layers"])
                return cls({name: LayerPatch(indices=file.get_tensor(name), **about[name]) for name in sorted(about)})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path.name} is not a whole patch file: {error}", fix="restore it") from error

    def inverse(self) -> Patch:
        """The patch that takes the edit back.

        Raises:
            ContractError: If a factor has no exact inverse (0 forgets the weight).
        """
        inverted = {}
        for name, p in self.layers.items():
            if p.factor not in (-1.0, 1.0):
                raise ContractError(f"factor {p.factor} of {name} cannot be taken back exactly", fix="use the original")
            inverted[name] = LayerPatch(
                indices=p.indices, factor=p.factor, digest_before=p.digest_after, digest_after=p.digest_before
            )
        return Patch(inverted)

    @torch.no_grad()
    def apply(self, weights: Mapping[str, Tensor]) -> None:
        """Edits weights in place, all or none.

        Args:
            weights: Layer name to weight (out, in).

        Raises:
            IntegrityError: If a weight is not the one the patch belongs to, or the result is not the promised one.
        """
        for name, p in self.layers.items():
            if name not in weights:
                raise IntegrityError(
                    f"the model has no layer {name}", fix="apply the patch to the model it was made from"
                )
            if digest_of_tensor(weights[name]) != p.digest_before:
                raise IntegrityError(
                    f"{name} holds other weights than the patch was made from",
                    fix="apply it once, to the model it was made from",
                )
        for name, p in self.layers.items():
            multiply_entries(weights[name], p.indices, p.factor)
            if digest_of_tensor(weights[name]) != p.digest_after:
                raise IntegrityError(f"{name} is not what the patch promises", fix="build the patch again")


def _ordered(content: bytes) -> bytes:
    """Safetensors content with its header in one order: the library writes metadata in any."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@torch.no_grad()
def multiply_entries(weight: Tensor, indices: Tensor, factor: float) -> None:
    """Multiplies flat entries of a contiguous weight, in place (method.md section 3)."""
    flat = weight.view(-1)
    at = indices.long().to(weight.device)
    flat[at] = flat[at] * factor

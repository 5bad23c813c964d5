"""The edit of a whole model as a small file: for every tensor that changed, how it changes.

A multiplied tensor is stored as the indices of its entries, a replaced one as the bits that differ (exclusive or), a new one
as its values. Exclusive or is its own inverse, as negation is, so both edits can be taken back. Of trained weights the patch
has only the digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from uwm_deploy.errors import ContractError, InputError, IntegrityError, unreadable
from uwm_deploy.records.edit import EditKind
from uwm_deploy.records.model import Digest
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.towers.digests import digest_of_tensor

_FORMAT = "uwm-patch-2"
_NOTHING = torch.empty(0, dtype=torch.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPatch:
    """Edit of one tensor.

    Attributes:
        kind: How the tensor changes.
        digest_before: Digest of the tensor before the edit; empty for a new one.
        digest_after: Digest of the tensor after the edit.
        indices: (k,) int32 or int64, ascending flat indices of the multiplied entries; (0,) for other kinds.
        factor: Multiplier of these entries.
        bits: int32, any shape (the tensor's own): for a replaced tensor its float32 bits before and after, combined by
            exclusive or; for a new one the bits of its values; (0,) for other kinds.
    """

    kind: EditKind = EditKind.MULTIPLIED
    digest_before: Digest
    digest_after: Digest
    indices: Tensor = _NOTHING
    factor: float = 1.0
    bits: Tensor = _NOTHING

    @property
    def exact(self) -> bool:
        """Whether the edit can be taken back bit for bit, from the edited tensor alone."""
        return self.kind in (EditKind.REPLACED, EditKind.ADDED) or (
            self.kind is EditKind.MULTIPLIED and (self.factor in (-1.0, 1.0) or not len(self.indices))
        )

    def inverse(self) -> TensorPatch:
        """The patch that takes the edit back; not meant for a new tensor, which no patch can remove."""
        return TensorPatch(
            kind=self.kind,
            digest_before=self.digest_after,
            digest_after=self.digest_before,
            indices=self.indices,
            factor=self.factor,
            bits=self.bits,
        )


@dataclass(frozen=True, slots=True)
class Patch:
    """Edits of a model's tensors, by their names in the source model."""

    tensors: Mapping[str, TensorPatch]

    def to_bytes(self) -> bytes:
        """Content of a safetensors file; equal patches give equal bytes."""
        about = {
            name: {
                "kind": p.kind.value,
                "factor": p.factor,
                "digest_before": p.digest_before,
                "digest_after": p.digest_after,
            }
            for name, p in self.tensors.items()
        }
        metadata = {"format": _FORMAT, "tensors": json.dumps(about, sort_keys=True)}
        return _ordered(bytes(save({name: _content(p).contiguous() for name, p in self.tensors.items()}, metadata)))

    @classmethod
    def from_file(cls, path: Path) -> Patch:
        """Reads a patch file.

        Raises:
            InputError: If it is not a whole patch file.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unreadable(f"patch file {path.name}", error, fix="restore it", kind=InputError) from error
        return cls.from_bytes(content, path.name)

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Patch:
        """Reads the content of a patch file.

        Args:
            content: Of the file.
            name: Of the file, for messages.

        Raises:
            InputError: If it is not whole.
        """
        try:
            tensors, header = load(content), value_from_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = header.get("__metadata__", {})
            if metadata.get("format") != _FORMAT:
                raise InputError(
                    f"{name} is no patch file of this release ({metadata.get('format', 'no format')})",
                    fix="pass patch.safetensors of a bundle that this release built",
                )
            about = value_from_json(metadata["tensors"])
            return cls({key: _part(tensors[key], **about[key]) for key in sorted(about)})
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{name} is not a whole patch file: {error}", fix="restore it") from error

    @property
    def exact(self) -> bool:
        """Whether the whole edit can be taken back bit for bit."""
        return all(p.exact for p in self.tensors.values())

    def inverse(self) -> Patch:
        """The patch that takes the edit back; new tensors are left out of it.

        Raises:
            ContractError: If a part has no exact inverse (a factor of 0 forgets the weight).
        """
        for name, p in self.tensors.items():
            if not p.exact:
                what = "trained weights" if p.kind is EditKind.TRAINED else f"factor {p.factor}"
                raise ContractError(f"{what} of {name} cannot be taken back exactly", fix="use the original")
        return Patch({n: p.inverse() for n, p in self.tensors.items() if p.kind is not EditKind.ADDED})

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Edits all tensors in place, or none of them.

        Args:
            tensors: Name to tensor, float32 of any shape, of all names in the patch; a new tensor must be there, as zeros.

        Raises:
            IntegrityError: If a tensor is not the one the patch belongs to, or the result is not the promised one.
        """
        for name, p in self.tensors.items():
            if name not in tensors:
                raise IntegrityError(
                    f"the model has no tensor {name}", fix="apply the patch to the model it was made from"
                )
            if p.digest_before and digest_of_tensor(tensors[name]) != p.digest_before:
                raise IntegrityError(
                    f"{name} holds other weights than the patch was made from",
                    fix="apply it once, to the model it was made from",
                )
        for name, p in self.tensors.items():  # each result is checked before the first tensor changes
            edited = tensors[name].detach().clone(memory_format=torch.contiguous_format)
            _edit(name, edited, p)
            if digest_of_tensor(edited) != p.digest_after:
                raise IntegrityError(f"{name} is not what the patch promises", fix="build the patch again")
        for name, p in self.tensors.items():
            _edit(name, tensors[name], p)


def replaced(before: Tensor | None, after: Tensor) -> TensorPatch:
    """The patch that gives a tensor other values.

    Args:
        before: The source model's tensor, float32 of any shape; None where it has no such tensor.
        after: The edited model's tensor, float32, any shape (that of `before`).
    """
    start = torch.zeros_like(after) if before is None else before
    return TensorPatch(
        kind=EditKind.ADDED if before is None else EditKind.REPLACED,
        digest_before="" if before is None else digest_of_tensor(before),
        digest_after=digest_of_tensor(after),
        bits=differing_bits(start, after),
    )


@torch.no_grad()
def differing_bits(before: Tensor, after: Tensor) -> Tensor:
    """Bits of two float32 tensors, combined by exclusive or.

    Args:
        before: float32, any shape.
        after: float32, any shape (that of `before`).

    Returns:
        int32, any shape (that of `before`), on the CPU.
    """
    left, right = (part.detach().cpu().contiguous().view(torch.int32) for part in (before, after))
    return left ^ right


@torch.no_grad()
def flip_bits(tensor: Tensor, bits: Tensor) -> None:
    """Turns one of two tensors into the other, in place, by the bits in which they differ.

    Args:
        tensor: float32, any shape.
        bits: int32, any shape with as many entries; see `differing_bits`.
    """
    turned = tensor.detach().cpu().contiguous().view(torch.int32) ^ bits.view(tensor.shape)
    tensor.copy_(turned.view(torch.float32))


def _edit(name: str, tensor: Tensor, part: TensorPatch) -> None:
    """Applies the patch of one tensor, in place."""
    size = tensor.numel()
    if part.kind is EditKind.MULTIPLIED:
        if len(part.indices) and not 0 <= int(part.indices.min()) <= int(part.indices.max()) < size:
            raise IntegrityError(f"{name} has {size} entries, and the patch names others", fix="build the patch again")
        multiply_entries(tensor, part.indices, part.factor)
    elif part.kind is not EditKind.TRAINED:
        if part.bits.numel() != size:
            raise IntegrityError(
                f"{name} has {size} entries, the patch {part.bits.numel()}", fix="build the patch again"
            )
        flip_bits(tensor, part.bits)


def _content(part: TensorPatch) -> Tensor:
    return part.indices if part.kind is EditKind.MULTIPLIED else part.bits


def _part(content: Tensor, *, kind: str, factor: float, digest_before: Digest, digest_after: Digest) -> TensorPatch:
    multiplied = EditKind(kind) is EditKind.MULTIPLIED
    return TensorPatch(
        kind=EditKind(kind),
        digest_before=digest_before,
        digest_after=digest_after,
        indices=content if multiplied else _NOTHING,
        factor=factor,
        bits=_NOTHING if multiplied else content,
    )


def _ordered(content: bytes) -> bytes:
    """Safetensors content with a sorted header: the library writes metadata in an order that varies."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@torch.no_grad()
def multiply_entries(weight: Tensor, indices: Tensor, factor: float) -> None:
    """Multiplies entries of a weight, in place (method.md section 3).

    Args:
        weight: Any floating dtype and any shape, contiguous.
        indices: (k,) int32 or int64, flat indices.
        factor: Multiplier.
    """
    flat = weight.view(-1)
    at = indices.long().to(weight.device)
    flat[at] = flat[at] * factor

"""Digests over weights: they identify a model whatever its name, path or graph."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from uwm_deploy.records.model import Digest


def digest_of_tensor(tensor: Tensor) -> Digest:
    """Digest over dtype, shape and bytes of one tensor.

    Args:
        tensor: Any dtype, any shape.
    """
    hasher = hashlib.sha256()
    _feed(hasher, "", tensor)
    return "sha256:" + hasher.hexdigest()


def digest_of_weights(tensors: Mapping[str, Tensor]) -> Digest:
    """Digest over name, dtype, shape and bytes of every tensor, in name order.

    Args:
        tensors: Tensors by name, any dtype, any shape.
    """
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        _feed(hasher, name, tensors[name])
    return "sha256:" + hasher.hexdigest()


def _feed(hasher: hashlib._Hash, name: str, tensor: Tensor) -> None:
    plain = tensor.detach().to("cpu").contiguous()
    hasher.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
    hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data)

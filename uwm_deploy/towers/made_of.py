"""Whether an edit was made of the very tower that a downstream model has: else what changes is not the edit alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from uwm_deploy.errors import InputError
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.towers.digests import digest_of_tensor


def check_made_of(
    own: Mapping[str, Tensor], edit: EditRecord, tower: TowerName, *, model: str, name: str, new: Mapping[str, Tensor]
) -> None:
    """Checks a downstream model's own tensors against what the edit was made of.

    Args:
        own: Its tensors by the names that the record has, any shape, any float dtype; others are passed over.
        edit: The record.
        tower: Whose tensors they are.
        model: The downstream model, for messages.
        name: The edited model, for messages.
        new: The edited model's tensors by the same names, any shape, any float dtype; may be empty. What the edit does not
            change must be equal.

    Raises:
        InputError: If one differs.
    """
    before = {tensor.name: tensor.digest_before for tensor in edit.of(tower) if tensor.changed}
    wrong = [key for key, digest in before.items() if key in own and digest_of_tensor(own[key].float()) != digest]
    wrong += [
        key
        for key, value in new.items()
        if key in own and key not in before and not torch.equal(value.float(), own[key].float())
    ]
    if wrong:
        raise InputError(
            f"the edit in {name} was not made of the tower of {model}: {len(wrong)} tensors differ, such as {wrong[0]}",
            fix="pass the checkpoint that was edited, or edit this one",
        )

"""Whether an edit reaches what a language or a diffusion model reads, told from its record before anything runs."""

from __future__ import annotations

from collections.abc import Callable

from uwm_deploy.errors import InputError
from uwm_deploy.recipes.edit_spec import only_embeddings
from uwm_deploy.records.edit import EditRecord, EditStep, Placement
from uwm_deploy.records.model import TowerName


def check_reaches_language_model(record: EditRecord, reads: Callable[[str], bool]) -> tuple[str, ...]:
    """Checks that a language model reads something that the edit changed.

    Args:
        record: Of the edit.
        reads: Whether it reads what a tensor of the image tower makes, by the tensor's name.

    Returns:
        Notes on the part of the edit that it does not read.

    Raises:
        InputError: If it reads nothing of it.
    """
    changed = [tensor for tensor in record.of(TowerName.IMAGE) if tensor.changed]
    step = record.closed_form
    part = only_embeddings(step.method) if step else ""
    if not any(reads(tensor.name) for tensor in changed):
        why = part or ("no tensor of the image tower changed" if not changed else "only later layers changed")
        raise InputError(
            f"the edit {record.method} does not reach the language model, which reads patch features of an earlier layer: "
            f"{why}",
            fix="edit with --method uwm and a recipe of family llava, which changes the layers that it reads",
        )
    return (f"{part}: the language model reads patch features, so that step is not in these numbers",) if part else ()


def check_reaches_diffusion(record: EditRecord) -> None:
    """Checks that a diffusion model reads something that the edit changed, and nothing that was moved on the way.

    Raises:
        InputError: If not.
    """
    if record.closed_form is not None:
        raise InputError(_why_not_for_diffusion(record.closed_form), fix="use --method uwm, which changes those states")
    if not any(tensor.changed for tensor in record.of(TowerName.TEXT)):
        raise InputError(
            f"the edit {record.method} changes nothing in the text tower, which is all that a diffusion model reads",
            fix="edit both towers, or the text tower",
        )


def _why_not_for_diffusion(step: EditStep) -> str:
    moved = step.axis is not None and step.axis.placement is Placement.WEIGHTS
    more = ", and the bias of its last LayerNorm would move them" if moved else ""
    return f"{only_embeddings(step.method)}: diffusion reads hidden states, which it does not make safer{more}"

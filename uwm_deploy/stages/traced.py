"""From a tower to its graph: export writes it, and verify makes it again to compare."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn

from uwm_deploy.graphs.passes import simplify
from uwm_deploy.graphs.pixels import take_crops
from uwm_deploy.graphs.tracing import graph_from_module
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.graph import TOKENS, Normalisation, RowLengths
from uwm_deploy.records.model import ImageSpec, ModelRef, TowerName
from uwm_deploy.towers.protocol import Tower


class _Graph(nn.Module):
    """Tower with the id type and normalisation of the graph."""

    def __init__(self, tower: nn.Module, spec: ExportSpec) -> None:
        super().__init__()
        self.tower, self.normalise = tower, spec.normalise

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        result = self.tower(inputs)
        embeds, *further = (result,) if isinstance(result, Tensor) else result
        return (embeds / embeds.norm(dim=-1, keepdim=True) if self.normalise else embeds, *further)


def traced(
    tower: Tower,
    sample: Tensor,
    spec: ExportSpec,
    normalisation: Normalisation | None = None,
    lengths: RowLengths | None = None,
) -> ir.Model:
    """The lean graph of a tower, in which every weight has its name.

    Args:
        tower: On the CPU.
        sample: Two rows of input, (2, 3, H, W) float32 or (2, L) int64 or int32.
        spec: Opset, length of embeddings.
        normalisation: What an image graph that takes crops does to them; None where it takes normalised pixels.
        lengths: Of the rows of a text graph; None where all are whole.
    """
    if lengths is not None:  # a size that no table of the tower has, or the tracer takes the one for the other
        sample = sample[:, : lengths.longest - 1]
    model = graph_from_module(
        _Graph(tower.graph_module(), spec).eval(), sample,
        opset=spec.opset, input_name=tower.input_name, output_names=tower.output_names,
        further=TOKENS if lengths is not None else "",
    )  # fmt: skip
    _restore_names(model)
    weights = {name for name, _ in tower.graph_module().named_parameters()}
    simplify(model, weights)
    if normalisation is not None:
        take_crops(model, normalisation, weights)
    return model


def normalisation_of(tower: TowerName, image: ImageSpec, spec: ExportSpec) -> Normalisation | None:
    """What a tower's graph does to pixels; None where they come normalised, and for texts."""
    if tower is not TowerName.IMAGE or spec.pixels != "uint8":
        return None
    return Normalisation(rescale=image.rescale, mean=image.mean, std=image.std)


def sample_for(tower: Tower, ref: ModelRef, spec: ExportSpec) -> Tensor:
    """The rows that a tower is traced with, in the type of its graph's input.

    Args:
        tower: The tower.
        ref: Its model's size of images, and its texts.
        spec: Type of ids.

    Returns:
        (2, 3, H, W) float32, or (2, L) int64 or int32.
    """
    shape = (3, ref.image.crop, ref.image.crop) if tower.name is TowerName.IMAGE else (ref.text.context_length,)
    return in_its_type(sample_of(tower, shape, ref.text.eos_id), spec)


def in_its_type(sample: Tensor, spec: ExportSpec) -> Tensor:
    """A sample in the type of the graph's input.

    Args:
        sample: (2, 3, H, W) float32, or (2, L) int64.
        spec: Type of ids.

    Returns:
        (2, 3, H, W) float32, or (2, L) int64 or int32.
    """
    return sample.to(torch.int32) if spec.ids_dtype == "int32" and not sample.is_floating_point() else sample


def sample_of(tower: Tower, shape: Sequence[int], eos_id: int) -> Tensor:
    """Two rows of plausible input: noise, or ids that end with the end token.

    Args:
        tower: The tower.
        shape: Shape of one row, (3, H, W) or (L,).
        eos_id: The end token.

    Returns:
        (2, 3, H, W) float32, or (2, L) int64.
    """
    if tower.input_name == "pixel_values":
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    rows = torch.full((2, *shape), eos_id, dtype=torch.int64)
    rows[:, :3] = 1 if eos_id == 0 else 0
    return rows


def _restore_names(model: ir.Model) -> None:
    """Weights by their names in the source model: the wrapper's prefix is taken off."""
    for name in list(model.graph.initializers):
        if name.startswith("tower."):
            value = model.graph.initializers.pop(name)
            value.name = name.removeprefix("tower.")
            model.graph.initializers[value.name] = value

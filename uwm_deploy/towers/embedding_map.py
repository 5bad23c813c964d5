"""Placement `embedding`: one affine map behind a tower's embedding of length 1 (docs/background/safety-axis.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.edit import MAP_NAMES
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.tensor_file import all_tensors, open_tensors
from uwm_deploy.towers.protocol import LoadedModel, Tower


def with_map(tower: Tower, linear: nn.Linear) -> None:
    """Puts a map behind a tower's embedding; the weights of the graph keep their names.

    Args:
        tower: Changed in place.
        linear: The map, weight (d, d) and bias (d,).
    """
    graph = tower.graph_module()
    linear.to(next(graph.parameters()).device)
    graph.add_module(MAP_NAMES[tower.name], linear)
    graph.register_forward_hook(lambda module, _, output: mapped(module, output))


def mapped(graph: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """Output of a graph with the embedding mapped, where the graph has a map.

    Args:
        graph: Image or text graph.
        output: The graph's embedding (B, d), any floating dtype, or a tuple of outputs with the embedding first.

    Returns:
        The same with the mapped embedding, (B, d), the same dtype, not normalised.
    """
    linear = next((m for name, m in graph.named_children() if name in MAP_NAMES.values()), None)
    if linear is None:
        return output
    embeds, *further = (output,) if isinstance(output, Tensor) else output
    moved = cast(Tensor, linear(embeds / embeds.norm(dim=-1, keepdim=True)))
    return moved if isinstance(output, Tensor) else (moved, *further)


def has_map(tower: Tower) -> bool:
    """Whether there is a map behind a tower's embedding."""
    return any(name in MAP_NAMES.values() for name, _ in tower.graph_module().named_children())


def put_maps(model: LoadedModel, tensors: Mapping[str, Tensor]) -> None:
    """Puts maps behind both embeddings of a model.

    Args:
        model: Changed in place; its `ref` is not.
        tensors: ``image_map.weight`` (d, d), ``image_map.bias`` (d,), and the same of the text tower, float32.

    Raises:
        IntegrityError: If one is missing or has another shape.
    """
    for tower in TowerName:
        name = MAP_NAMES[tower]
        linear = nn.Linear(model.ref.embed_dim, model.ref.embed_dim)
        try:
            linear.load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")})
        except (KeyError, RuntimeError) as error:
            line = " ".join(str(error).split())[:200]
            raise IntegrityError(
                f"the map behind the {tower.value} tower does not fit: {line}", fix="edit again"
            ) from error
        model.maps[tower] = linear.eval()
        with_map(model.tower(tower), model.maps[tower])


def save_maps(model: LoadedModel, path: Path) -> None:
    """Writes the maps of a model as a safetensors file."""
    own = {name: p for name, p in model.named_parameters().items() if name.partition(".")[0] in MAP_NAMES.values()}
    save_file({name: p.detach().cpu().contiguous() for name, p in own.items()}, path)
    path.chmod(0o644)  # the library saves with the writer's private mode


def load_maps(model: LoadedModel, path: Path) -> None:
    """Puts the maps of a file behind the embeddings of a model.

    Raises:
        IntegrityError: If the file cannot be read, or does not hold them.
    """
    with open_tensors(path, fix="edit again", kind=IntegrityError) as file:
        tensors = all_tensors(file)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise IntegrityError(f"{path.name} holds NaN or infinity", fix="edit again")
    put_maps(model, tensors)

"""The model before its edit, out of a bundle: the patch taken back in copies of the exported graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.graphs.stored_weights import Replacement
from uwm_deploy.pipeline.refit_graphs import Swap, held_tensors, refit_graph, reverted, without_edit
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.session import Session, open_graph
from uwm_deploy.stages.edit.edit import PATCH

_BATCH = 32


def original_sessions(bundle: Bundle) -> Mapping[TowerName, Session]:
    """Both towers as they were before the edit, in ONNX Runtime on the CPU; nothing is left on the disk.

    Args:
        bundle: An open bundle.

    Raises:
        PrerequisiteError: If the patch alone cannot take the edit back.
        IntegrityError: If a graph or the patch is not what the bundle promises.
        ContractError: If the edit is not in a graph.
    """
    edit, patch = bundle.manifest.edit, Patch.from_bytes(bundle.read(PATCH), PATCH)
    if not patch.exact:
        raise PrerequisiteError(
            "this edit forgets weights, so the bundle cannot show the model before it", fix="build with a factor of -1"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old, new = folder / "old", folder / "new"
        old.mkdir()
        new.mkdir()
        graphs = bundle.manifest.onnx
        for graph in graphs:
            for file in filter(None, (graph.file, graph.external_data)):
                bundle.copy(BundleLayout.onnx(file), old / file)
        record, nothing = reverted(edit, patch)
        held = held_tensors(graphs, old, {t.name: t.digest_after for t in edit.tensors if t.tower is not None})
        after = without_edit(held, edit, patch)
        swap = Swap(
            old=edit,
            old_patch=patch,
            new=record,
            new_patch=nothing,
            content=nothing.to_bytes(),
            changes={name: Replacement(held[name], after[name]) for name in held},
        )
        made = [refit_graph(graph, old, new, swap) for graph in graphs]
        return {graph.tower: open_graph(new / graph.file, graph, max_batch=_BATCH) for graph in made}

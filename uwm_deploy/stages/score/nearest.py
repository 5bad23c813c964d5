"""Which item's safe caption is nearest to each unsafe caption, by a text tower: SafeR-CLIP's pairing, for scoring."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from uwm_deploy.data.embedding import unit_rows
from uwm_deploy.data.nearest_captions import nearest_safe
from uwm_deploy.edits.pairs import Pairs
from uwm_deploy.towers.protocol import Tower


@torch.inference_mode()
def nearest_partners(tower: Tower, pairs: Pairs) -> Sequence[int]:
    """Place of the item with the nearest safe caption, for every item of a set.

    Args:
        tower: Text tower, not edited.
        pairs: All caption pairs, in any order. An item that cannot be read, or whose caption has no embedding, keeps its
            own.
    """
    device = next(tower.graph_module().parameters()).device
    ids: list[str] = []
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for batch in pairs:
        ids += batch.ids
        for rows, found in zip((batch.safe, batch.unsafe), sides, strict=True):
            found.append(tower.embed(torch.from_numpy(rows).to(device)).float().cpu().numpy())
    places = {item: place for place, item in enumerate(pairs.ids)}
    partners = list(range(len(places)))
    if not ids:
        return partners
    safe, unsafe = (unit_rows(np.concatenate(parts)) for parts in sides)
    whole = np.flatnonzero(np.isfinite(safe).all(1) & np.isfinite(unsafe).all(1))
    whole = whole[np.argsort([places[ids[row]] for row in whole], kind="stable")]  # of equals the first item
    rows, _ = nearest_safe(unsafe[whole], safe[whole])
    for row, best in zip(whole, rows, strict=True):
        partners[places[ids[row]]] = places[ids[whole[best]]]
    return partners

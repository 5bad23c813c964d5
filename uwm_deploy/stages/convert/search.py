"""Stage `convert` for precision `auto`: returns to float32 the layers that decisions depend on, and no others.

What counts is what a layer's rounding does to decisions that are nearly ties, not how large the rounding is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx_ir as ir

from uwm_deploy.data.embedding import Inputs, PreparedSet, unit_rows
from uwm_deploy.data.reading import Progress
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.write import write_graph
from uwm_deploy.recipes.compile_spec import AutoSpec
from uwm_deploy.records.graph import LayerSensitivity, OnnxArtifact, PrecisionPlan, PrecisionStep
from uwm_deploy.records.model import TowerName
from uwm_deploy.safeground.expected_flips import expected_flips
from uwm_deploy.safeground.preference import BASIC, Decisions, decisions
from uwm_deploy.stages.convert.convert import Ranges, embed_with, lower

PROBES = 64
"""Quadruples, those nearest to a tie, on which single layers are tried."""

SHARE_OF_BUDGET = 0.8
"""The plan is chosen on other quadruples than it is judged on, so it must keep this share of the budget here."""

GUESSES = 5
"""Plans that are tried between one that keeps the limit and one that does not."""

_ROWS = 32
"""Rows of input in memory at a time."""

RETRIES = 4
"""Kept layers that are tried in low precision once more at the end, those first that matter least."""

Layer = tuple[TowerName, str]


@dataclass(frozen=True, slots=True)
class Source:
    """One exported float32 graph.

    Attributes:
        float32: Layers of it alone that stay in float32 in any case, as globs; they are no part of the search.
    """

    graph: OnnxArtifact
    path: Path
    ranges: Ranges | None
    float32: tuple[str, ...] = ()


def search(
    sources: Mapping[TowerName, Source],
    prepared: PreparedSet,
    spec: AutoSpec,
    patterns: Sequence[str],
    folder: Path,
    progress: Progress,
) -> PrecisionPlan:
    """Finds the cheapest mix of precisions whose decisions stay within the budget.

    One at a time, every linear layer is lowered alone, and the change of the margins of nearly tied quadruples is measured:
    its sensitivity. Layers are then ordered by sensitivity per multiplication. How many must return to float32 follows from
    their sensitivities, is measured, and corrected. At the end some of them are tried in low precision again.

    Args:
        sources: Both exported graphs.
        prepared: Quadruples, of the calibration set.
        spec: Lowest precision and budget.
        patterns: What stays in float32 in any case.
        folder: For temporary files.
        progress: Called as it goes on.
    """
    return Search(sources, prepared, spec, patterns, folder, progress).run()


class Search:
    """Measures plans on a set of quadruples, and looks for the best; see `search`, which is what builds use.

    Attributes:
        work: Every linear layer to its multiplications.
        steps: Every plan that was measured, in order.
    """

    def __init__(
        self,
        sources: Mapping[TowerName, Source],
        prepared: PreparedSet,
        spec: AutoSpec,
        patterns: Sequence[str],
        folder: Path,
        progress: Progress,
    ) -> None:
        self.sources, self.spec, self.patterns, self.folder, self.progress = sources, spec, patterns, folder, progress
        self.inputs: dict[TowerName, tuple[Inputs, Inputs]] = {
            TowerName.IMAGE: (prepared.safe_pixels, prepared.unsafe_pixels),
            TowerName.TEXT: (prepared.safe_ids, prepared.unsafe_ids),
        }
        self.work = {
            (tower, name): work
            for tower, source in sources.items()
            for name, work in multiplications(source.path).items()
            if not any(fnmatchcase(name, pattern) for pattern in source.float32)
        }
        self.known: dict[tuple[TowerName, frozenset[str]], tuple[np.ndarray, np.ndarray]] = {}
        self.reference = self._decisions(frozenset(self.work))
        self.steps: list[PrecisionStep] = []

    def run(self) -> PrecisionPlan:
        """The plan."""
        limit = SHARE_OF_BUDGET * self.spec.flips
        enough = self.flips(frozenset(), "all lowered") <= limit
        sensitivity = dict.fromkeys(self.work, 0.0) if enough else self._sensitivities()
        order = sorted(self.work, key=lambda layer: (-sensitivity[layer] / self.work[layer], layer))
        count = 0 if enough else self._fewest(order, sensitivity, limit)
        kept = self._retried(order[:count], limit)
        return PrecisionPlan(
            lowest=self.spec.lowest,
            budget=self.spec.flips,
            limit=limit,
            n=len(self.reference.margins[BASIC[0]]),
            kept={
                tower.value: tuple(name for t, name in order if t is tower and (t, name) in kept) for tower in TowerName
            },
            flips=self.counted(kept),
            expected=self.flips(kept, "chosen"),
            low_share=self._low_share(kept),
            layers=tuple(
                LayerSensitivity(tower=t, name=name, sensitivity=sensitivity[t, name], kept=(t, name) in kept)
                for t, name in order
            ),
            steps=tuple(self.steps),
        )

    def _fewest(self, order: Sequence[Layer], sensitivity: Mapping[Layer, float], limit: float) -> int:
        """How many layers from the top of the order must return, so that the rest keeps the limit."""
        left = np.append(np.cumsum([sensitivity[layer] for layer in reversed(order)])[::-1], 0.0)
        size = np.sqrt(left / left[0]) if left[0] > 0 else 1 - np.arange(len(left)) / len(order)
        scale, low, high = self.steps[-1].expected, 0, len(order)  # everything in float32 flips nothing
        for _ in range(GUESSES):
            if high - low <= 1:
                break
            guess = int(np.argmax(size * scale <= limit))  # flips grow with the root of the summed squares
            count = min(max(guess, low + 1), high - 1)
            flips = self.flips(frozenset(order[:count]), f"{count} most sensitive kept")
            scale = flips / size[count]
            low, high = (low, count) if flips <= limit else (count, high)
        return high

    def _sensitivities(self) -> dict[Layer, float]:
        """Mean squared change of the margins of nearly tied quadruples when one layer alone is lowered."""
        nearest = np.min([np.abs(self.reference.margins[name]) for name in BASIC], axis=0)
        rows = np.sort(np.argsort(nearest, kind="stable")[:PROBES])
        whole = {
            tower: self._rows(tower, frozenset(n for t, n in self.work if t is tower), rows) for tower in self.sources
        }
        before = _margins(_decided(whole))
        found = {}
        for done, (tower, name) in enumerate(self.work):
            others = frozenset(n for t, n in self.work if t is tower and n != name)
            after = _margins(_decided(whole | {tower: self._rows(tower, others, rows)}))
            found[tower, name] = float(np.mean((after - before) ** 2))
            self.progress("sensitivity of layers", done + 1, len(self.work))
        return found

    def _retried(self, kept: Sequence[Layer], limit: float) -> frozenset[Layer]:
        """Without the layers that turn out not to be needed."""
        chosen = frozenset(kept)
        for layer in list(reversed(kept))[:RETRIES]:
            fewer = chosen - {layer}
            if self.flips(fewer, f"without {layer[1]}") <= limit:
                chosen = fewer
        return chosen

    def flips(self, kept: frozenset[Layer], what: str) -> float:
        """Expected percentage of decisions of the worst metric that differ from the float32 graphs'."""
        step = PrecisionStep(
            what=what,
            kept=len(kept),
            low_share=self._low_share(kept),
            flips=self.counted(kept),
            expected=expected_flips(self.reference, self._decisions(kept)),
        )
        self.steps.append(step)
        self.progress("plans", len(self.steps), len(self.steps) + 1)
        return step.expected

    def counted(self, kept: frozenset[Layer]) -> float:
        """Percentage of decisions of the worst metric that do differ."""
        found = self._decisions(kept)
        return 100 * max(float(np.mean(found.chosen[name] != self.reference.chosen[name])) for name in BASIC)

    def _low_share(self, kept: frozenset[Layer]) -> float:
        total = sum(self.work.values())
        return sum(work for layer, work in self.work.items() if layer not in kept) / total

    def _decisions(self, kept: frozenset[Layer]) -> Decisions:
        return _decided(
            {tower: self._embedded(tower, frozenset(n for t, n in kept if t is tower)) for tower in self.sources}
        )

    def _embedded(self, tower: TowerName, kept: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
        if (tower, kept) not in self.known:
            self.known[tower, kept] = self._rows(tower, kept, None)
        return self.known[tower, kept]

    def _rows(self, tower: TowerName, kept: frozenset[str], rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the safe and the unsafe inputs of one tower, of all or of some items."""
        source = self.sources[tower]
        patterns = (*self.patterns, *source.float32)
        model, _ = lower(source.path, self.spec.lowest, patterns, kept, source.ranges)
        path = self.folder / f".tmp-plan-{source.path.name}"
        external = f"{path.name}.data" if source.graph.external_data else ""
        write_graph(model, path, external)
        try:
            chosen = np.arange(len(self.inputs[tower][0])) if rows is None else rows
            pieces = np.array_split(chosen, max(1, len(chosen) // _ROWS))
            parts = (part[piece] for part in self.inputs[tower] for piece in pieces)
            found = embed_with(source.graph, path, self.spec.lowest, parts, external)
        finally:
            for name in filter(None, (path.name, external)):
                (self.folder / name).unlink()
        safe, unsafe = np.split(unit_rows(found), 2)
        return safe, unsafe


def multiplications(path: Path) -> dict[str, int]:
    """Linear layer to its multiplications for one input."""
    found = {}
    for name, layer in linear_layers(ir.load(path)).items():
        entering = layer.node.inputs[0]
        assert layer.weight.const_value is not None
        tokens = 1
        if entering is not None and entering.shape is not None:
            tokens = int(np.prod([d for d in list(entering.shape)[1:-1] if isinstance(d, int)], dtype=np.int64))
        found[name] = int(layer.weight.const_value.size) * max(tokens, 1)
    return found


def _decided(rows: Mapping[TowerName, tuple[np.ndarray, np.ndarray]]) -> Decisions:
    return decisions(*rows[TowerName.IMAGE], *rows[TowerName.TEXT])


def _margins(found: Decisions) -> np.ndarray:
    return np.stack([found.margins[name] for name in BASIC])

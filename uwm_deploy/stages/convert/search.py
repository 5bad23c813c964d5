"""Stage `convert`: gives layers that decisions depend on more than 8 bits, and no others.

A layer in INT8 can take a second term of its activation (`graphs.two_terms`), and with precision `auto` it can return to
float32. What counts is what a layer's rounding does to decisions that are nearly ties, not how large the rounding is.
"""

from __future__ import annotations

import math
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
from uwm_deploy.records.graph import LayerSensitivity, OnnxArtifact, Precision, PrecisionPlan, PrecisionStep, TensorSpec
from uwm_deploy.records.model import TowerName
from uwm_deploy.safeground.expected_flips import expected_flips
from uwm_deploy.safeground.preference import BASIC, Decisions, decisions
from uwm_deploy.stages.convert.convert import Ranges, embed_with, lower

PROBES = 64
"""Quadruples, those nearest to a tie, on which single layers are tried; fewer where there are very many layers."""

_FEWEST_PROBES = 8

_TRIALS = 64 * 64
"""Layers times quadruples that are tried at most, unless that leaves too few quadruples for a layer."""

SHARE_OF_BUDGET = 0.9
"""The plan is chosen on other quadruples than it is judged on, so it must keep this share of the budget here."""

GUESSES = 4
"""Plans that are tried between one that keeps the limit and one that does not; more where none of them keeps it."""

_NEAR = 0.9
"""A plan that uses this share of the limit or more is near enough."""

_LEFT = 0.15
"""Share of a layer's mean squared change that stays with a second term: the rounding of its weight. On the demo all layers
together keep 0.17."""

_COST = {"two terms": 1.0, "float32": 1.0}
"""Cost of a layer's next step, in 8-bit multiplications: float32 costs about three of them on a processor with VNNI."""

_ROWS = 32
"""Rows of input in memory at a time."""

Layer = tuple[TowerName, str]


@dataclass(frozen=True, slots=True)
class Mix:
    """A plan: what is not in the lowest precision with one term.

    Attributes:
        kept: Layers in float32.
        two: Layers with two terms.
    """

    kept: frozenset[Layer] = frozenset()
    two: frozenset[Layer] = frozenset()


@dataclass(frozen=True, slots=True)
class _Move:
    """A step of one layer: to two terms, or to float32.

    Attributes:
        gain: What it takes off the mean squared change of the margins, per multiplication that it costs.
        left: The mean squared change that the layer keeps.
    """

    layer: Layer
    to: str
    gain: float
    left: float


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
    *,
    to_float32: bool = True,
) -> PrecisionPlan:
    """Finds the cheapest mix of precisions whose decisions stay within the budget.

    One at a time, every linear layer is lowered alone, and the change of the margins of nearly tied quadruples is measured:
    its sensitivity. It says what a second term or float32 would gain per multiplication. Layers get them in that order.
    How far to go follows from the sensitivities, is measured, and corrected.

    Args:
        sources: Both exported graphs.
        prepared: Quadruples, of the calibration set.
        spec: Lowest precision and budget.
        patterns: What stays in float32 in any case.
        folder: For temporary files.
        progress: Called as it goes on.
        to_float32: Whether layers may return to float32. If not, a plan may miss the budget.
    """
    return Search(sources, prepared, spec, patterns, folder, progress, to_float32=to_float32).run()


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
        *,
        to_float32: bool = True,
    ) -> None:
        self.sources, self.spec, self.patterns, self.folder, self.progress = sources, spec, patterns, folder, progress
        self.to_float32 = to_float32
        self.inputs: dict[TowerName, tuple[Inputs, Inputs]] = {
            TowerName.IMAGE: (prepared.safe_pixels, prepared.unsafe_pixels),
            TowerName.TEXT: (prepared.safe_ids, prepared.unsafe_ids),
        }
        self.work = {
            (tower, name): work
            for tower, source in sources.items()
            for name, work in multiplications(source.path, source.graph.inputs[0]).items()
            if not any(fnmatchcase(name, pattern) for pattern in source.float32)
        }
        self.known: dict[tuple[TowerName, Mix], tuple[np.ndarray, np.ndarray]] = {}
        self.reference = self._decisions(Mix(kept=frozenset(self.work)))
        self.steps: list[PrecisionStep] = []

    def run(self) -> PrecisionPlan:
        """The plan."""
        limit = SHARE_OF_BUDGET * self.spec.flips
        enough = self.flips(Mix(), "all lowered") <= limit
        sensitivity = dict.fromkeys(self.work, 0.0) if enough else self._sensitivities()
        moves = [] if enough else self._moves(sensitivity)
        chosen = _mixed(moves[: self._fewest(moves, sensitivity, limit)])
        order = sorted(self.work, key=lambda layer: (-sensitivity[layer] / self.work[layer], layer))
        expected = self.flips(chosen, "chosen")
        return PrecisionPlan(
            lowest=self.spec.lowest,
            budget=self.spec.flips,
            limit=limit,
            n=len(self.reference.margins[BASIC[0]]),
            kept={
                tower.value: tuple(name for t, name in order if t is tower and (t, name) in chosen.kept)
                for tower in TowerName
            },
            flips=self.counted(chosen),
            expected=expected,
            low_share=1 - self._share(chosen.kept),
            layers=tuple(
                LayerSensitivity(
                    tower=t,
                    name=name,
                    sensitivity=sensitivity[t, name],
                    kept=(t, name) in chosen.kept,
                    terms=1 + ((t, name) in chosen.two),
                )
                for t, name in order
            ),
            steps=tuple(self.steps),
            twice=self._share(chosen.two),
        )

    def _moves(self, sensitivity: Mapping[Layer, float]) -> list[_Move]:
        """Steps of all layers, those first that gain most for what they cost."""
        found = []
        for layer, change in sensitivity.items():
            left, cost = change, 0.0
            ways = (["two terms"] if self._can_double(layer) else []) + (["float32"] if self.to_float32 else [])
            for way in ways:
                after = _LEFT * change if way == "two terms" else 0.0
                cost = _COST[way] * self.work[layer]
                found.append(_Move(layer, way, (left - after) / cost, after))
                left = after
        return sorted(found, key=lambda move: (-move.gain, move.layer))

    def _can_double(self, layer: Layer) -> bool:
        ranges = self.sources[layer[0]].ranges
        return ranges is not None and layer[1] in ranges.chosen.codes and self.spec.lowest is Precision.INT8

    def _fewest(self, moves: Sequence[_Move], sensitivity: Mapping[Layer, float], limit: float) -> int:
        """How many of the moves must be made, so that the plan keeps the limit; all of them where none does.

        All of them would be float32 everywhere. So where the guesses were too low, they go on, and each aims lower.
        """
        left = _left(moves, sensitivity)
        low, high, aim = 0, len(moves), limit
        measured = {low: self.steps[-1].expected}
        while high - low > 1 and (len(measured) <= GUESSES or high not in measured):
            count = low + _between(left[low : high + 1], measured[low], measured.get(high), aim)
            mix = _mixed(moves[:count])
            measured[count] = self.flips(mix, f"{len(mix.two)} twice, {len(mix.kept)} in float32")
            low, high = (low, count) if measured[count] <= limit else (count, high)
            if _NEAR * limit <= measured[count] <= limit:
                break
            aim = limit if high in measured else _NEAR * aim
        return high

    def _sensitivities(self) -> dict[Layer, float]:
        """Mean squared change of the margins of nearly tied quadruples when one layer alone is lowered."""
        nearest = np.min([np.abs(self.reference.margins[name]) for name in BASIC], axis=0)
        probes = min(PROBES, max(_FEWEST_PROBES, _TRIALS // len(self.work)))
        rows = np.sort(np.argsort(nearest, kind="stable")[:probes])
        every = {tower: frozenset(layer for layer in self.work if layer[0] is tower) for tower in self.sources}
        whole = {tower: self._rows(tower, Mix(kept=layers), rows) for tower, layers in every.items()}
        before = _margins(_decided(whole))
        found = {}
        for done, layer in enumerate(self.work):
            tower = layer[0]
            after = _margins(_decided(whole | {tower: self._rows(tower, Mix(kept=every[tower] - {layer}), rows)}))
            found[layer] = float(np.mean((after - before) ** 2))
            self.progress("sensitivity of layers", done + 1, len(self.work))
        return found

    def flips(self, mix: Mix, what: str) -> float:
        """Expected percentage of decisions of the worst metric that differ from the float32 graphs'."""
        step = PrecisionStep(
            what=what,
            kept=len(mix.kept),
            low_share=1 - self._share(mix.kept),
            flips=self.counted(mix),
            expected=expected_flips(self.reference, self._decisions(mix)),
            twice=self._share(mix.two),
        )
        self.steps.append(step)
        self.progress("plans", len(self.steps), len(self.steps) + 1)
        return step.expected

    def counted(self, mix: Mix) -> float:
        """Percentage of decisions of the worst metric that do differ."""
        found = self._decisions(mix)
        return 100 * max(float(np.mean(found.chosen[name] != self.reference.chosen[name])) for name in BASIC)

    def _share(self, layers: frozenset[Layer]) -> float:
        return sum(work for layer, work in self.work.items() if layer in layers) / sum(self.work.values())

    def _decisions(self, mix: Mix) -> Decisions:
        return _decided({tower: self._embedded(tower, mix) for tower in self.sources})

    def _embedded(self, tower: TowerName, mix: Mix) -> tuple[np.ndarray, np.ndarray]:
        own = Mix(*(frozenset(layer for layer in part if layer[0] is tower) for part in (mix.kept, mix.two)))
        if (tower, own) not in self.known:
            self.known[tower, own] = self._rows(tower, own, None)
        return self.known[tower, own]

    def _rows(self, tower: TowerName, mix: Mix, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the safe and the unsafe inputs of one tower, of all or of some items."""
        source = self.sources[tower]
        patterns, kept = (*self.patterns, *source.float32), [name for _, name in sorted(mix.kept)]
        ranges = source.ranges and source.ranges.with_two_terms(name for _, name in mix.two)
        model, _ = lower(source.path, self.spec.lowest, patterns, kept, ranges)
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


def multiplications(path: Path, given: TensorSpec) -> dict[str, int]:
    """Linear layer to its multiplications for one input, of usual length where that varies."""
    usual = math.prod(size.opt for size in given.row_sizes) if given.lengths else 1
    found = {}
    for name, layer in linear_layers(ir.load(path)).items():
        entering = layer.node.inputs[0]
        assert layer.weight.const_value is not None
        tokens = 1
        if entering is not None and entering.shape is not None:
            tokens = math.prod(d if isinstance(d, int) else usual for d in list(entering.shape)[1:-1])
        found[name] = int(layer.weight.const_value.size) * max(tokens, 1)
    return found


def _decided(rows: Mapping[TowerName, tuple[np.ndarray, np.ndarray]]) -> Decisions:
    return decisions(*rows[TowerName.IMAGE], *rows[TowerName.TEXT])


def _margins(found: Decisions) -> np.ndarray:
    return np.stack([found.margins[name] for name in BASIC])


def _mixed(moves: Sequence[_Move]) -> Mix:
    """The plan after some moves; a layer's later move replaces its earlier one."""
    last = {move.layer: move.to for move in moves}
    kept, two = (frozenset(layer for layer, to in last.items() if to == way) for way in ("float32", "two terms"))
    return Mix(kept, two)


def _left(moves: Sequence[_Move], sensitivity: Mapping[Layer, float]) -> np.ndarray:
    """Sum of the mean squared changes of all layers after 0, 1, ... moves, (m + 1,) float64."""
    now, sums = dict(sensitivity), [sum(sensitivity.values())]
    for move in moves:
        sums.append(max(sums[-1] - now[move.layer] + move.left, 0.0))
        now[move.layer] = move.left
    return np.asarray(sums)


def _between(left: np.ndarray, first: float, last: float | None, limit: float) -> int:
    """Which of several plans in a row is the first that keeps the limit, as far as can be foreseen.

    Flips grow with the root of what is left.

    Args:
        left: (m,) float64, m > 2; what is left by each plan, falling.
        first: Flips of the first plan.
        last: Flips of the last plan; None where it is not measured.
        limit: What the flips must keep.

    Returns:
        Neither the first nor the last one.
    """
    foreseen = first**2 * left / max(left[0], 1e-300)
    if last is not None and left[0] > left[-1]:
        foreseen = last**2 + (first**2 - last**2) * (left - left[-1]) / (left[0] - left[-1])
    kept = np.flatnonzero(foreseen <= limit**2)
    return min(max(int(kept[0]) if len(kept) else len(left) // 2, 1), len(left) - 2)

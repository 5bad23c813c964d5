"""Names the first layer where an artifact leaves the exported float32 graph, with the numbers.

The exported graph is the reference of the walk. Whether it is itself the edited model is told first: by the canaries that
the build stored, and by its weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from uwm_deploy.bundle.open import MANIFEST, Bundle, engine_path, open_bundle
from uwm_deploy.data.open import open_source
from uwm_deploy.edits.canary_files import read_canaries
from uwm_deploy.errors import InputError, UwmError
from uwm_deploy.graphs.fingerprint import digest_of_array, digest_of_onnx
from uwm_deploy.graphs.walk import Difference, Graph, WalkedValue, differences, walk
from uwm_deploy.recipes.data_set import calibration_set_from_toml
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.evidence import Evidence
from uwm_deploy.records.graph import EXPORTED, EngineArtifact, OnnxArtifact, Precision, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.selftest import stored_canaries
from uwm_deploy.runtime.session import Session, external_data_of, open_engine, open_graph
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.canaries import RATIO_LIMIT, Canaries

Stage = Literal["export", "convert", "compile"]

TOLERANCE = {
    Precision.FP32: 1e-5,
    Precision.FP16: 0.02,
    Precision.BF16: 0.1,
    Precision.INT8: 0.35,
    Precision.FP8: 0.35,
}
"""Largest relative error of one part, given the reference's values, that is rounding in a precision."""

_QUADRUPLES = 8
"""Quadruples of the evaluation set that a tower without canaries is walked on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWalk:
    """One graph file of one tower.

    Attributes:
        evidence: `not run` when the file cannot be walked here; `reason` says why.
        tolerance: Of the own error of a part; 0 for the exported graph, which is compared with its weights.
        inputs: Rows it was run on.
        differences: What differs in the files, without running anything.
        first: First value, in the order of the graph, whose own error is beyond the tolerance.
        values: Every value that was compared, in that order.
        canary_ratio: Of the file as it is served; None without canaries.
        note: What else is worth knowing.
    """

    variant: str
    tower: TowerName
    stage: Stage
    precision: Precision
    evidence: Evidence
    reason: str = ""
    tolerance: float = 0.0
    inputs: int = 0
    differences: tuple[Difference, ...] = ()
    first: WalkedValue | None = None
    values: tuple[WalkedValue, ...] = ()
    canary_ratio: float | None = None
    note: str = ""

    @property
    def leaves(self) -> bool:
        """Whether something is wrong with this file that was not wrong before."""
        wrong_model = self.canary_ratio is not None and self.canary_ratio >= RATIO_LIMIT
        return bool(self.first or self.differences) or wrong_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Every file that was looked at, in the order it was made.

    Attributes:
        findings: One line per variant and tower: the first stage and layer that leaves the reference, or that none does.
    """

    name: str
    walks: tuple[StageWalk, ...]
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the files of a build are.

    Attributes:
        export: Folder of the exported graphs.
        failed: Variants that did not pass the gate.
        converted: Folder and record of the graph in lower precision that an engine was compiled from, where it was kept.
        engine_file: An engine's path.
        rows: Inputs of a tower without canaries; raises when there are none.
        model: The saved edited model, where it was kept.
    """

    name: str
    export: Path
    onnx: tuple[OnnxArtifact, ...]
    engines: tuple[EngineArtifact, ...]
    edit: EditRecord
    failed: tuple[str, ...]
    converted: Callable[[EngineArtifact], tuple[Path, OnnxArtifact] | None]
    engine_file: Callable[[EngineArtifact], Path]
    canaries: Callable[[TowerName], Canaries | None]
    rows: Callable[[TowerName], np.ndarray]
    model: Path | None


def diagnose(path: Path, variant: str | None = None) -> Diagnosis:
    """Walks the artifacts of a bundle or a run folder.

    Args:
        path: Folder of either kind.
        variant: Only this one; without it those that failed the gate, or all when none did.

    Raises:
        InputError: If the folder is neither, or has no such variant.
        IntegrityError: If a bundle's digests do not match.
    """
    place = _of_bundle(open_bundle(path, allow_failed=True)) if (path / MANIFEST).is_file() else _of_run(path)
    known = [EXPORTED, *dict.fromkeys(engine.variant for engine in place.engines)]
    if variant is not None and variant not in known:
        raise InputError(f"{path} has no variant {variant!r}", fix=f"it has {', '.join(known)}")
    chosen = [variant] if variant else [v for v in known if v in place.failed] or known
    walks: list[StageWalk] = []
    with tempfile.TemporaryDirectory(prefix="uwm-diagnose-") as folder:
        for tower in TowerName:
            walks.append(_exported(place, tower))
            for engine in place.engines:
                if engine.tower is tower and engine.variant in chosen:
                    walks += _variant(place, engine, Path(folder))
    return Diagnosis(name=place.name, walks=tuple(walks), findings=tuple(_findings(walks)))


# --- where things are ---------------------------------------------------------------------------------------------------


def _of_bundle(bundle: Bundle) -> _Place:
    manifest = bundle.manifest

    def rows(tower: TowerName) -> np.ndarray:
        text = bundle.read("evaluation.toml").decode()
        source = open_source(calibration_set_from_toml(text, where="evaluation.toml"), base=None)
        some = [source.read(i) for i in range(min(_QUADRUPLES, len(source)))]
        if tower is TowerName.IMAGE:
            images = [image for q in some for image in (q.safe_image, q.unsafe_image) if image is not None]
            return np.stack([pixels_from_image(image, manifest.model.image) for image in images])
        texts = [words for q in some for words in (q.safe_text, q.unsafe_text) if words is not None]
        return Tokenizer(bundle.read("tokenizer.json"), manifest.model.text).encode(texts)

    return _Place(
        name=manifest.name,
        export=bundle.path / "onnx",
        onnx=manifest.onnx,
        engines=manifest.engines,
        edit=manifest.edit,
        failed=manifest.verdict.failed,
        converted=lambda _: None,
        engine_file=lambda engine: bundle.path / engine_path(engine),
        canaries=stored_canaries(bundle).get,
        rows=rows,
        model=None,
    )


def _of_run(path: Path) -> _Place:
    if not all((path / "export" / f"{tower.value}.json").is_file() for tower in TowerName):
        raise InputError(f"{path} is neither a bundle nor a run folder with exported graphs", fix="run `export` first")
    records = sorted(path.glob("compile-*/image.json")) + sorted(path.glob("compile-*/text.json"))
    judged = path / "gate" / "verdict.json"

    def converted(engine: EngineArtifact) -> tuple[Path, OnnxArtifact] | None:
        folder = path / f"convert-{engine.variant.rpartition('-')[2]}"
        record = folder / f"{engine.tower.value}.json"
        return (folder, read_record(OnnxArtifact, record)) if record.is_file() else None

    def no_rows(tower: TowerName) -> np.ndarray:
        raise InputError(
            f"the {tower.value} tower has no canaries", fix="diagnose the bundle, which names its test set"
        )

    return _Place(
        name=path.resolve().name,
        export=path / "export",
        onnx=tuple(read_record(OnnxArtifact, path / "export" / f"{tower.value}.json") for tower in TowerName),
        engines=tuple(read_record(EngineArtifact, record) for record in records),
        edit=read_record(EditRecord, path / "edit" / "edit.json"),
        failed=read_record(Verdict, judged).failed if judged.is_file() else (),
        converted=converted,
        engine_file=lambda engine: path / f"compile-{engine.variant}" / engine.file,
        canaries=lambda tower: read_canaries(path / "canaries", tower),
        rows=no_rows,
        model=model if (model := path / "edit" / "model").is_dir() else None,
    )


# --- the walks ----------------------------------------------------------------------------------------------------------


def _exported(place: _Place, tower: TowerName) -> StageWalk:
    """The exported graph against the edited model: its weights, and its canaries."""
    graph = next(graph for graph in place.onnx if graph.tower is tower)
    file = place.export / graph.file
    canaries = place.canaries(tower)
    ratio = None
    if canaries is not None:
        ratio = _ratio(open_graph(file, graph, max_batch=16), canaries)
    return StageWalk(
        variant=EXPORTED,
        tower=tower,
        stage="export",
        precision=Precision.FP32,
        evidence=Evidence.EXECUTED,
        inputs=len(canaries.inputs) if canaries is not None else 0,
        differences=tuple(_unlike_model(place, tower, Graph(file))),
        canary_ratio=ratio,
        note=_note(file, graph.external_data, graph.digest),
    )


def _unlike_model(place: _Place, tower: TowerName, graph: Graph) -> Iterator[Difference]:
    """Weights of the exported graph that are not the edited model's; without the model, edited layers by digest."""
    if place.model is not None:
        for file in sorted(place.model.glob("*.safetensors")):
            yield from _unlike_file(file, graph)
        return
    for tensor in place.edit.of(tower):
        name = tensor.name
        if name in graph.initialisers and digest_of_array(graph.array(name)) != tensor.digest_after:
            yield Difference(layer=name.rpartition(".")[0], what=name, detail="is not the edited weight")


def _unlike_file(file: Path, graph: Graph) -> Iterator[Difference]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a mapping
                if name not in graph.initialisers:
                    continue
                wanted, found = tensors.get_tensor(name).float().numpy(), graph.array(name)
                if wanted.shape != found.shape:
                    detail = f"has shape {found.shape}, the edited model {wanted.shape}"
                elif np.array_equal(wanted, found):
                    continue
                else:
                    off = wanted != found
                    worst = float(np.abs(wanted - found).max())
                    detail = (
                        f"{int(off.sum())} of {off.size} entries are not the edited model's, the worst by {worst:.3g}"
                    )
                yield Difference(layer=name.rpartition(".")[0], what=name, detail=detail)
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read: {error}", fix="run `edit` again") from error


def _variant(place: _Place, engine: EngineArtifact, folder: Path) -> Iterator[StageWalk]:
    """The graph in lower precision that an engine was compiled from, where it was kept, and the engine itself."""
    reference = next(graph for graph in place.onnx if graph.tower is engine.tower)
    base = Graph(place.export / reference.file)
    precision = Precision(engine.precision)
    canaries = place.canaries(engine.tower)
    if (made := place.converted(engine)) is not None:
        where, graph = made
        yield _walked(
            place, engine, "convert", precision, base, where / graph.file,
            folder, _note(where / graph.file, graph.external_data, graph.digest), None,
        )  # fmt: skip
    if engine.target is not Target.ONNXRUNTIME or engine.settings.get("optimisation") == "compiled":
        why = f"an engine of {engine.target.value} cannot be opened up" + (
            "" if made or precision is Precision.FP32 else ", and a bundle does not hold the graph it was compiled from"
        )
        yield _not_run(engine, "compile", precision, why)
        return
    file = place.engine_file(engine)
    ratio = None
    if canaries is not None:
        ratio = _ratio(
            open_engine(engine, file.read_bytes(), external_data_of(file.parent, engine.external_data)), canaries
        )
    note = _note(file, engine.external_data, engine.digest)
    yield _walked(place, engine, "compile", precision, base, file, folder, note, ratio)


def _walked(
    place: _Place,
    engine: EngineArtifact,
    stage: Stage,
    precision: Precision,
    reference: Graph,
    file: Path,
    folder: Path,
    note: str,
    ratio: float | None,
) -> StageWalk:
    canaries = place.canaries(engine.tower)
    artifact = Graph(file)
    unlike = tuple(differences(reference, artifact))
    try:
        rows = canaries.inputs if canaries is not None else place.rows(engine.tower)
        values = walk(reference, artifact, rows, folder)
    except UwmError as error:
        return _not_run(engine, stage, precision, error.what, unlike, note)
    tolerance = TOLERANCE[precision]
    return StageWalk(
        variant=engine.variant,
        tower=engine.tower,
        stage=stage,
        precision=precision,
        evidence=Evidence.EXECUTED,
        tolerance=tolerance,
        inputs=len(rows),
        differences=unlike,
        first=next((v for v in values if v.own > tolerance or not v.finite), None),
        values=tuple(values),
        canary_ratio=ratio,
        note=note,
    )


def _not_run(
    engine: EngineArtifact,
    stage: Stage,
    precision: Precision,
    why: str,
    unlike: tuple[Difference, ...] = (),
    note: str = "",
) -> StageWalk:
    return StageWalk(
        variant=engine.variant,
        tower=engine.tower,
        stage=stage,
        precision=precision,
        evidence=Evidence.NOT_RUN,
        reason=why,
        differences=unlike,
        note=note,
    )


def _ratio(session: Session, canaries: Canaries) -> float:
    """Worst canary of what is served; a session is opened for this only."""
    try:
        return min(canaries.worst(session.run(canaries.inputs)), 1e9)
    finally:
        session.close()


def _note(file: Path, external: str, digest: str) -> str:
    return "" if digest_of_onnx(file, external) == digest else "the file is not the one its record describes"


# --- what it comes to ---------------------------------------------------------------------------------------------------


def _findings(walks: Sequence[StageWalk]) -> Iterator[str]:
    variants = dict.fromkeys((w.variant, w.tower) for w in walks if w.stage != "export")
    for exported in (w for w in walks if w.stage == "export"):
        if exported.leaves or exported.note:
            yield _sentence(exported)
    for variant, tower in variants:
        own = [w for w in walks if (w.variant, w.tower) == (variant, tower)]
        wrong = next((w for w in own if w.leaves), None)
        if wrong is not None:
            yield _sentence(wrong)
            continue
        missing = [f"{w.stage} not run: {w.reason}" for w in own if w.evidence is Evidence.NOT_RUN]
        ran = [w for w in own if w.evidence is Evidence.EXECUTED]
        if ran:
            worst = max(ran[-1].values, key=lambda v: v.own)
            end = ran[-1].values[-1]
            missing.append(
                f"no part leaves the reference by more than {ran[-1].tolerance:g} (largest own error {worst.own:.2g} at "
                f"{_where(worst)}; {end.whole:.2g} at the output, added up)"
            )
        yield f"{variant}, {tower.value}: {'; '.join(missing)}"


def _sentence(found: StageWalk) -> str:
    """What is wrong, where it begins, and by how much."""
    parts = []
    if found.first is not None:
        parts.append(
            f"first leaves the reference in {_where(found.first)}: own error {found.first.own:.2g}, tolerance "
            f"{found.tolerance:g}{'' if found.first.finite else ', not finite'}"
        )
    if found.differences:
        one, *more = found.differences
        parts.append(f"{one.what}: {one.detail}{f', and {len(more)} more' if more else ''}")
    if found.canary_ratio is not None and found.canary_ratio >= RATIO_LIMIT:
        parts.append(f"worst canary {found.canary_ratio:.2g}, limit {RATIO_LIMIT:g}")
    if found.note:
        parts.append(found.note)
    return f"{found.variant}, {found.tower.value}, stage {found.stage}: {'; '.join(parts)}"


def _where(value: WalkedValue) -> str:
    return f"{value.layer or f'what follows {value.after}' if value.layer or value.after else 'the graph'} ({value.op})"


SHOWN = 8
"""Values of a walk that are printed; the JSON has all of them."""


def rows(diagnosis: Diagnosis) -> list[dict[str, str]]:
    """The table: of every walk the first value that leaves the reference with its neighbours, else the largest errors."""
    table = []
    for found in diagnosis.walks:
        head = {"artifact": f"{found.variant} {found.tower.value} {found.stage}"}
        for value in _shown(found):
            marks = "<- first" if value is found.first else ""
            numbers = {
                "own error": f"{value.own:.2g}" if value.finite else "not finite",
                "whole error": f"{value.whole:.2g}",
            }
            table.append(
                head | {"layer": value.layer or f"(after {value.after})", "op": value.op} | numbers | {"": marks}
            )
    return table


def _shown(found: StageWalk) -> list[WalkedValue]:
    if found.first is None:
        return sorted(found.values, key=lambda v: -v.own)[:3]
    at = found.values.index(found.first)
    return list(found.values[max(0, at - 2) : at + SHOWN - 2])

"""Where the files of a build are, in a bundle or in a run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout, RunFolder, tower_record
from uwm_deploy.bundle.open import Bundle, engine_path, is_bundle, open_bundle
from uwm_deploy.data.evaluation import evaluation_source_in
from uwm_deploy.edits.canary_files import read_canaries
from uwm_deploy.errors import InputError
from uwm_deploy.graphs.fingerprint import digest_of_onnx
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.selftest import stored_canaries
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.canaries import Canaries

_QUADRUPLES = 8
"""Quadruples of the evaluation set that stand in for the canaries of a tower that has none."""


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph's file and the record that describes it."""

    path: Path
    record: OnnxArtifact | EngineArtifact

    @property
    def note(self) -> str:
        """Whether the file is another than the recorded one, in words; empty when it is the same."""
        same = digest_of_onnx(self.path, self.record.external_data) == self.record.digest
        return "" if same else "the file is not the one its record describes"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFiles:
    """The files of a build.

    Attributes:
        name: Of the bundle or the run folder.
        exported: Graphs in float32.
        engines: Records of all variants.
        edit: What was changed.
        failed: Variants that did not pass the gate.
        converted: Gives the graph in lower precision that an engine was compiled from; None where it was not kept.
        engine_file: Gives an engine's file.
        canaries: Gives those of a tower; None where it has none.
        inputs: Gives inputs of a tower without canaries, (n, 3, H, W) float32 or (n, L) int64; raises InputError where
            there are none.
        model: Folder of the saved edited model; None where it was not kept.
    """

    name: str
    exported: dict[TowerName, GraphFile]
    engines: tuple[EngineArtifact, ...]
    edit: EditRecord
    failed: tuple[str, ...]
    converted: Callable[[EngineArtifact], GraphFile | None]
    engine_file: Callable[[EngineArtifact], GraphFile]
    canaries: Callable[[TowerName], Canaries | None]
    inputs: Callable[[TowerName], np.ndarray]
    model: Path | None


def build_files(path: Path) -> BuildFiles:
    """Finds the files of a bundle or a run folder.

    Raises:
        InputError: If the folder is neither.
        IntegrityError: If a bundle's digests do not match.
    """
    if is_bundle(path):
        return _files_of_bundle(open_bundle(path, allow_failed=True))
    return _files_of_run(path)


def _files_of_bundle(bundle: Bundle) -> BuildFiles:
    manifest = bundle.manifest
    return BuildFiles(
        name=manifest.name,
        exported={
            graph.tower: GraphFile(bundle.path / BundleLayout.onnx(graph.file), graph) for graph in manifest.onnx
        },
        engines=manifest.engines,
        edit=manifest.edit,
        failed=manifest.verdict.not_passed,
        converted=lambda _: None,
        engine_file=lambda engine: GraphFile(bundle.path / engine_path(engine), engine),
        canaries=stored_canaries(bundle).get,
        inputs=lambda tower: _inputs(bundle, tower),
        model=None,
    )


def _inputs(bundle: Bundle, tower: TowerName) -> np.ndarray:
    """Some items of the evaluation set, preprocessed: pixels (n, 3, height, width) or token ids (n, positions)."""
    source, model = evaluation_source_in(bundle), bundle.manifest.model
    some = [source.read(i) for i in range(min(_QUADRUPLES, len(source)))]
    if tower is TowerName.IMAGE:
        images = [image for q in some for image in (q.safe_image, q.unsafe_image) if image is not None]
        return np.stack([pixels_from_image(image, model.image) for image in images])
    texts = [words for q in some for words in (q.safe_text, q.unsafe_text) if words is not None]
    return Tokenizer(bundle.read(BundleLayout.TOKENIZER), model.text).encode(texts)


def _files_of_run(path: Path) -> BuildFiles:
    run = RunFolder(path)
    if not all(tower_record(run.export, tower).is_file() for tower in TowerName):
        raise InputError(f"{path} is neither a bundle nor a run folder with exported graphs", fix="run `export` first")
    exported = {tower: _recorded_graph(run.export, tower) for tower in TowerName}
    records = [tower_record(folder, tower) for tower in TowerName for folder in run.compiled()]
    built = [read_record(EngineArtifact, record) for record in records if record.is_file()]
    weights = exported[TowerName.IMAGE].record.weights_digest

    def no_inputs(tower: TowerName) -> np.ndarray:
        raise InputError(
            f"the {tower.value} tower has no canaries", fix="diagnose the bundle, which names its test set"
        )

    return BuildFiles(
        name=path.resolve().name,
        exported=exported,
        # A run folder keeps engines of earlier edits until their variant is built again.
        engines=tuple(engine for engine in built if engine.weights_digest == weights),
        edit=read_record(EditRecord, run.edit_record),
        failed=read_record(Verdict, run.verdict).not_passed if run.verdict.is_file() else (),
        converted=lambda engine: _converted(run, engine),
        engine_file=lambda engine: GraphFile(run.engines(engine.variant) / engine.file, engine),
        canaries=lambda tower: read_canaries(run.canaries, tower),
        inputs=no_inputs,
        model=run.edited_model if run.edited_model.is_dir() else None,
    )


def _converted(run: RunFolder, engine: EngineArtifact) -> GraphFile | None:
    folder = run.stage("convert", engine.variant.rpartition("-")[2])
    return _recorded_graph(folder, engine.tower) if tower_record(folder, engine.tower).is_file() else None


def _recorded_graph(folder: Path, tower: TowerName) -> GraphFile:
    record = read_record(OnnxArtifact, tower_record(folder, tower))
    return GraphFile(folder / record.file, record)

"""Honest builds of the demo, and what the gate says when parts of one are replaced by faulty ones.

Everything is real: the faulty parts are files and models, they are executed by the code that verifies a build, and the
report is judged by the gate with a shipped policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from PIL import Image

from uwm_deploy.bundle.layout import RunFolder
from uwm_deploy.data.crops import PixelRows
from uwm_deploy.data.embedding import PreparedSet, content_digests, overlap, prepare
from uwm_deploy.data.open import open_source
from uwm_deploy.data.order import some_of
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.data.zero_shot_suite import zero_shot_digests
from uwm_deploy.edits.applied import select_and_apply
from uwm_deploy.edits.canary_files import read_canaries
from uwm_deploy.edits.methods import selects
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.patch import Patch
from uwm_deploy.edits.replay import MadeFrom, expected_edit
from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.fingerprint import digest_of_onnx
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.recipes.policy import Policy
from uwm_deploy.recipes.recipe import Recipe
from uwm_deploy.recipes.resolve import calibration_set_of, policy_of
from uwm_deploy.records.codec import json_from_record, read_record
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import EditRecord, Placement, ScoreRecord
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision, Target, variant_name
from uwm_deploy.records.model import Digest, ImageSpec, ModelRef, TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.canaries import Canaries
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.safeground.health import Differences
from uwm_deploy.stages.canaries import PAIRS, canaries_to_folder
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.stages.verify.anew import traced_on_the_cpu
from uwm_deploy.stages.verify.assembly import Verified, verify
from uwm_deploy.stages.verify.calibration import differences_of
from uwm_deploy.stages.verify.goldens import goldens_of
from uwm_deploy.stages.verify.subjects import Artifacts
from uwm_deploy.stages.verify.verify import embed_model
from uwm_deploy.towers.library import library_of
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel, Tower

POLICY = "demo"
"""The shipped policy that everything is judged by."""

PAIRS_SCORED, QUADRUPLES = 96, 160
VARIANT = "onnxruntime-fp32"

DATA = """format = 1
name = "{name}"
source = "demo"
split = "{split}"
limit = {limit}
seed = {seed}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeBy:
    """How the edit of a build is made; nothing of it is left to the demo's recipe, nor chosen.

    Attributes:
        method: Its steps.
        keep_mass: Of the step that selects entries.
        placement: Of the closed-form step.
        axis: Its setting.
    """

    method: str
    keep_mass: float | None = None
    placement: Placement | None = None
    axis: AxisSetting | None = None

    def request(self, folder: Path, calibration: str, evaluation: str) -> Request:
        """What is asked of the pipeline for a build on the CPU.

        Args:
            folder: Where it goes.
            calibration: Definition of the set that the edit comes from.
            evaluation: Definition of the set it is measured on.
        """
        return Request(
            calibration=calibration,
            evaluation=evaluation,
            method=self.method,
            keep_mass=self.keep_mass,
            placement=self.placement.value if self.placement else None,
            axis=self.axis,
            policy=POLICY,
            targets=(Target.ONNXRUNTIME.value,),
            work=folder / "work",
            out=folder / "bundle",
            device="cpu",
            workers=0,
        )


_SETTING = AxisSetting(g=0.5, o=0.5, kappa=0.2, a=1.0, tau=0.5)

UWM = MadeBy(method="uwm", keep_mass=0.9)
FOLDED = MadeBy(method="uwm+safety-axis", keep_mass=0.9, placement=Placement.WEIGHTS, axis=_SETTING)
MAPPED = MadeBy(method="safety-axis", placement=Placement.EMBEDDING, axis=_SETTING)

A = TypeVar("A", OnnxArtifact, EngineArtifact)
Pixels = Callable[[Image.Image, ImageSpec], np.ndarray]
"""From an image to pixels, (3, H, W) float32."""

Encode = Callable[[Sequence[str]], np.ndarray]
"""From captions to ids, (n, L) int64."""


def data_file(folder: Path, name: str, split: str, limit: int, seed: int = 0) -> str:
    """Writes the definition of a data set; returns its path."""
    path = folder / f"{name}.toml"
    path.write_text(DATA.format(name=name, split=split, limit=limit, seed=seed), encoding="utf-8")
    return str(path)


def _silent(*_: object) -> None:
    """Progress of a part that takes a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What a pipeline produced; a fault replaces some of it.

    Attributes:
        original: The source model.
        edited: The edited model, as it was read back.
        edit: Its record.
        patch: Its patch.
        exported: Exported graph per tower.
        engines: Compiled graph per tower.
        precision: Of the engines.
        sources: Graph that each engine was compiled from.
        converted: Record of each of these that is in lower precision.
        evaluation: Record of the evaluation set.
        calibrated: Concepts of the calibration set.
        calibration: That set.
        overlap: Items in both sets.
        prepared: The evaluation set as it is fed to everything.
        pixels: Preprocessing of the runtime, to (3, H, W) float32.
        encode: Tokenisation of the runtime, to (n, L) int64; that of the model when None.
    """

    original: LoadedModel
    edited: LoadedModel
    edit: EditRecord
    patch: Patch
    exported: Mapping[TowerName, Path]
    engines: Mapping[TowerName, Path]
    precision: Precision
    sources: Mapping[TowerName, Path]
    evaluation: CalibrationRecord
    calibrated: Mapping[str, int]
    calibration: QuadrupleSource
    overlap: int
    prepared: PreparedSet
    pixels: Pixels = pixels_from_image
    encode: Encode | None = None
    converted: Mapping[TowerName, OnnxArtifact] = field(default_factory=dict)


class HonestBuild:
    """An honest build of the demo in a folder, and its models in memory.

    Args:
        folder: Where it goes.
        made_by: How its edit is made.

    Raises:
        ContractError: If the honest build does not pass.
    """

    def __init__(self, folder: Path, made_by: MadeBy = UWM) -> None:
        self.folder, self.bundle = folder, folder / "bundle"
        self.run_folder = RunFolder(folder / "work")
        folder.mkdir(parents=True, exist_ok=True)
        self.calibration = data_file(folder, "calibration", "calibration", PAIRS_SCORED)
        self.test = data_file(folder, "test", "test", QUADRUPLES)
        self.request = made_by.request(folder, self.calibration, self.test)
        outcome = run(self.request, until="package", reporter=Reporter(quiet=True))
        if outcome.left(Verdict).result is not Result.PASS:
            raise ContractError(
                f"the honest build of the demo by {made_by.method} does not pass",
                fix="see its verdict with `uwm-deploy gate`",
            )
        self.onnx: dict[TowerName, OnnxArtifact] = {graph.tower: graph for graph in outcome.onnx}
        self.engines: dict[TowerName, EngineArtifact] = {engine.tower: engine for engine in outcome.engines}
        self.recipe: Recipe = resolved_recipe(self.request)
        self.score = read_record(ScoreRecord, self.run_folder.score_record)
        self.report = read_record(VerifyReport, self.run_folder.report)
        self.original, self.edited = self.model(None), self.model(self.run_folder.edited_model)
        self.source = self.open(self.test)
        self._traced: dict[TowerName, ir.Model] = {}
        self.honest = self._honest()
        self._reference = self._embedded(self.honest)
        self._canaries = self._read_canaries(self.run_folder.canaries)

    # --- parts ------------------------------------------------------------------------------------------------------

    def model(self, folder: Path | None) -> LoadedModel:
        """A model from a folder; the shipped one when None."""
        shipped = resources.checkpoint_folder(self.recipe.model.repo, "")
        return load_model(self.recipe, folder=folder or shipped, device="cpu")

    def open(self, definition: str) -> QuadrupleSource:
        """A data set."""
        spec, _, base = calibration_set_of(definition)
        return open_source(spec, base=base)

    def shares_with_calibration(self, source: QuadrupleSource) -> int:
        """Items of a set that are in the calibration set."""
        sets = [content_digests(part, workers=0, progress=_silent) for part in (self.open(self.calibration), source)]
        return overlap(*sets)

    def prepare(
        self,
        source: QuadrupleSource | None = None,
        pixels: Pixels | None = None,
        encode: Encode | None = None,
        image: ImageSpec | None = None,
    ) -> PreparedSet:
        """The evaluation set, prepared by the runtime or by something else.

        Args:
            source: Another set.
            pixels: Another preprocessing, to (3, H, W) float32.
            encode: Another tokenisation, to (n, L) int64.
            image: Another preprocessing that the runtime knows.
        """
        source, ref = source or self.source, self.original.ref
        tokenizer = Tokenizer(self.original.tokenizer_json, ref.text)
        found = prepare(source, image or ref.image, tokenizer, workers=0, progress=_silent)
        if pixels is not None:
            items = [source.read(i) for i in range(len(source))]
            safe, unsafe = (
                np.stack([pixels(getattr(item, f"{side}_image"), ref.image) for item in items])
                for side in ("safe", "unsafe")
            )
            found = dataclasses.replace(found, safe_pixels=safe, unsafe_pixels=unsafe)
        if encode is not None:
            texts = [source.read_texts(i) or ("", "") for i in range(len(source))]
            found = dataclasses.replace(
                found, safe_ids=encode([pair[0] for pair in texts]), unsafe_ids=encode([pair[1] for pair in texts])
            )
        return found

    def pairs(self, source: QuadrupleSource, tower: TowerName) -> PairStream:
        """Pairs of a set as they are fed to a tower."""
        return PairStream(
            source,
            tower,
            self.original.ref.image,
            Tokenizer(self.original.tokenizer_json, self.original.ref.text),
            batch_pairs=16,
            workers=0,
            max_broken_share=0.0,
            progress=_silent,
            sort_by_length=False,
        )

    @cached_property
    def before(self) -> LoadedModel:
        """The model as the step before the closed-form one left it; not to be changed."""
        model = self.model(None)
        if selects(self.recipe.entries.method):
            select_and_apply(model, self.score, self._scores, self.recipe.entries)
        return model

    def made_from(self, original: LoadedModel) -> MadeFrom:
        """What the honest edit was made from.

        Args:
            original: The source model; a fault may have changed how it computes, never its weights.
        """
        return MadeFrom(
            original=original,
            score=self.score,
            scores=self._scores,
            fit=self.run_folder.fit,
            before=lambda: self.before,
        )

    @property
    def embedded(self) -> tuple[EmbeddedSet, EmbeddedSet]:
        """The evaluation set, embedded by the source model and by the edited one."""
        return self._reference

    @property
    def _scores(self) -> Path:
        return self.run_folder.scores

    # --- judging ----------------------------------------------------------------------------------------------------

    def verdict(self, build: Build, folder: Path, policy: tuple[Policy, Digest] | None = None) -> Verdict:
        """Measures a build as `verify` does, and judges it.

        Args:
            build: What a pipeline produced.
            folder: An empty folder.
            policy: Another policy than the shipped one.
        """
        report = self.measured(build, folder)
        rules, digest = policy or policy_of(POLICY)
        return gate(
            report, rules, policy_digest=digest, report_digest=digest_of_bytes(json_from_record(report).encode())
        )

    def measured(self, build: Build, folder: Path) -> VerifyReport:
        """The report on a build."""
        honest = self.honest
        same = build.original is honest.original and build.prepared is honest.prepared
        original, edited = self._reference if same and build.edited is honest.edited else self._embedded(build)
        canaries = self._canaries
        if build.original is not honest.original or build.edited is not honest.edited:
            canaries = self._choose_canaries(build, folder)
        expected = expected_edit(self.recipe, self.made_from(build.original), build.edit, build.patch)
        model = build.edited
        library = library_of(self.recipe.model.family, model.source, self.run_folder.edited_model, model.ref.text)
        return verify(
            Verified(
                artifacts=self._artifacts(build),
                original=build.original.ref,
                edited=model,
                embedded=(original, edited),
                prepared=build.prepared,
                canaries=canaries,
                expected=expected,
                goldens=goldens_of(model, library, pixels=build.pixels, encode=build.encode),
                evaluation=build.evaluation,
                zero_shot_digests=zero_shot_digests(self.source),
                calibrated=build.calibrated,
                differences=self._differences(build),
                calibration_overlap=build.overlap,
            ),
            _silent,
        )

    def _honest(self) -> Build:
        exported = {tower: self.run_folder.export / graph.file for tower, graph in self.onnx.items()}
        compiled = self.run_folder.engines(VARIANT)
        return Build(
            original=self.original,
            edited=self.edited,
            edit=read_record(EditRecord, self.run_folder.edit_record),
            patch=Patch.from_file(self.run_folder.patch),
            exported=exported,
            engines={tower: compiled / engine.file for tower, engine in self.engines.items()},
            precision=Precision.FP32,
            sources=exported,
            evaluation=self.report.evaluation,
            calibrated=self.open(self.calibration).record.concepts,
            calibration=self.open(self.calibration),
            overlap=0,
            prepared=self.prepare(),
        )

    def _embedded(self, build: Build) -> tuple[EmbeddedSet, EmbeddedSet]:
        first, second = (
            embed_model(model, build.prepared, name, _silent)
            for name, model in (("original", build.original), ("edited", build.edited))
        )
        return first, second

    def _differences(self, build: Build) -> dict[TowerName, Differences]:
        if build.original is self.original and build.calibration is self.honest.calibration:
            return self._honest_differences
        return self._differences_of(build)

    @cached_property
    def _honest_differences(self) -> dict[TowerName, Differences]:
        """Most faults leave the source model and the calibration set as they are."""
        return self._differences_of(self.honest)

    def _differences_of(self, build: Build) -> dict[TowerName, Differences]:
        tokenizer = Tokenizer(build.original.tokenizer_json, build.original.ref.text)
        return differences_of(build.original, build.calibration, tokenizer, workers=0, progress=_silent)

    def _choose_canaries(self, build: Build, folder: Path) -> dict[TowerName, Canaries]:
        for tower in TowerName:
            pairs = self.pairs(some_of(self.open(self.calibration), PAIRS), tower)
            canaries_to_folder(build.original.tower(tower), build.edited.tower(tower), pairs, folder)
        return self._read_canaries(folder)

    def _read_canaries(self, folder: Path) -> dict[TowerName, Canaries]:
        found = {tower: read_canaries(folder, tower) for tower in TowerName}
        return {tower: part for tower, part in found.items() if part is not None and len(part.inputs)}

    def _artifacts(self, build: Build) -> Artifacts:
        """Graphs and engines of a build, each with the record that belongs to its bytes."""
        exported = {tower: (_renamed(self.onnx[tower], path), path) for tower, path in build.exported.items()}
        engines = {
            tower: (
                dataclasses.replace(
                    _renamed(self.engines[tower], path),
                    precision=build.precision.value,
                    onnx_digest=digest_of_onnx(build.sources[tower], ""),
                ),
                path,
            )
            for tower, path in build.engines.items()
        }
        return Artifacts(
            exported=exported,
            engines={variant_name(Target.ONNXRUNTIME, build.precision): engines},
            compiled_from={digest_of_onnx(path, ""): path for path in build.sources.values()},
            edit=build.edit,
            patch=build.patch,
            export=self.recipe.export,
            profile=self.recipe.compile.profile,
            converted={digest_of_onnx(build.sources[tower], ""): record for tower, record in build.converted.items()},
            trace=self._trace,
        )

    def _trace(self, tower: Tower, ref: ModelRef, spec: ExportSpec) -> ir.Model:
        """Exporting a tower again takes longer than all the rest, and most faults leave the edited model as it is."""
        if tower not in (self.edited.image, self.edited.text):
            return traced_on_the_cpu(tower, ref, spec)
        if tower.name not in self._traced:
            self._traced[tower.name] = traced_on_the_cpu(tower, ref, spec)
        return self._traced[tower.name]


class HonestBuilds:
    """Honest builds, each made when it is first asked for.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[MadeBy, HonestBuild] = {}

    def of(self, made_by: MadeBy) -> HonestBuild:
        """The build whose edit is made in a way.

        Raises:
            ContractError: If the honest build does not pass.
        """
        if made_by not in self._made:
            self._made[made_by] = HonestBuild(self._folder / f"world-{len(self._made)}", made_by)
        return self._made[made_by]


def _renamed(record: A, path: Path) -> A:
    """The record of another file in the place of one."""
    return dataclasses.replace(record, file=path.name, external_data="", digest=digest_of_onnx(path, ""))


def as_rows(pixels: np.ndarray | PixelRows) -> np.ndarray:
    """All rows of prepared pixels as one array.

    Args:
        pixels: (n, 3, H, W) float32, or what reads like it.

    Returns:
        (n, 3, H, W) float32.
    """
    rows: np.ndarray = pixels[0 : len(pixels)]
    return rows

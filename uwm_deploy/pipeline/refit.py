"""Replaces the edit of a bundle by another one, by none, or by another keep_mass, without building it anew.

Every refit ends in a new verdict: nothing of the old one is kept. What this machine cannot execute stays unproven.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from uwm_deploy import __version__
from uwm_deploy.bundle.open import MANIFEST, Bundle, engine_paths, open_bundle
from uwm_deploy.bundle.replace import lock_of_bundle, refuse_foreign_folder
from uwm_deploy.bundle.sign import Resigning, Seal, seal_for
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.data.embedding import PreparedSet, prepare
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.applied import tensor_edit
from uwm_deploy.edits.closed_form import last_tensors, put
from uwm_deploy.edits.fit_files import read_fit
from uwm_deploy.edits.methods import selects
from uwm_deploy.edits.patch import Patch, replaced
from uwm_deploy.edits.solving import solver
from uwm_deploy.errors import InputError, IntegrityError, PrerequisiteError
from uwm_deploy.graphs.stored import Replacement
from uwm_deploy.pipeline.attest import attest
from uwm_deploy.pipeline.judge import Judge, judge_of_bundle
from uwm_deploy.pipeline.refit_graphs import (
    Swap,
    held_tensors,
    reason_against,
    refit_converted,
    refit_engine,
    refit_graph,
    reverted,
    without_edit,
)
from uwm_deploy.pipeline.shipping import (
    bundle_with_card,
    evaluation_source_of,
    note_signature,
)
from uwm_deploy.pipeline.stored import SINGLE_ROWS, reference_of
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.edit_spec import AxisSpec, ClosedForm, EditSpecs
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.edit import EditKind, EditRecord, Method, ScoreRecord
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.files import digest_of_bytes, digest_of_file, locked
from uwm_deploy.records.graph import EXPORTED, EngineArtifact, OnnxArtifact, Precision
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.canaries import choose
from uwm_deploy.safeground.embedded import (
    EmbeddedSet,
    flips_between,
    hard_safe_worst,
    safety_report,
    worst_items,
    yardstick_of,
)
from uwm_deploy.stages.edit.edit import PATCH, RECORD, edit_to_folder, saved_edit
from uwm_deploy.stages.verify.verify import EMBED_BATCH, embed_model
from uwm_deploy.towers.digests import digest_of_weights
from uwm_deploy.towers.embedding_map import put_maps
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel

Parts = dict[str, Path | bytes]

_TRAINED = "the weights were trained, so no patch makes them or takes them back"


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitRequest:
    """What the user asked for.

    Attributes:
        bundle: Its folder.
        patch: Patch file with its record beside it, or a folder that holds both; one of this and the next four.
        revert: Back to the source model's weights.
        keep_mass: Of a new selection from the run folder's scores.
        max_retrieval_loss: Of a new choice of the closed-form step's strength from the run folder's fit.
        axis: Strength of the closed-form step instead of a choice.
        out: Folder of the new bundle; the old one is replaced without it.
        work: Run folder with the scores; ``.uwm/NAME`` without it.
        checkpoint: Source weights; those of the bundle's recipe without it.
        variants: Those to refit; all that can be refitted here when it is empty.
        bundle_version: Of the new bundle; the old one's without it.
        signing: What is to become of the signature.
    """

    bundle: Path
    patch: Path | None = None
    revert: bool = False
    keep_mass: float | None = None
    max_retrieval_loss: float | None = None
    axis: AxisSetting | None = None
    out: Path | None = None
    work: Path | None = None
    checkpoint: Path | None = None
    variants: tuple[str, ...] = ()
    policy: str = "policy"
    evaluation: str | None = None
    device: str = "auto"
    workers: int = 2
    bundle_version: int | None = None
    signing: Resigning = field(default_factory=Resigning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refitted:
    """What came out.

    Attributes:
        out: The new bundle.
        edit: Its edit.
        layers: Layers whose weights are others now.
        left_out: Variants of the old bundle that the new one does not have, with the reason.
        verdict: The new one.
    """

    out: Path
    edit: EditRecord
    layers: int
    left_out: Mapping[str, str]
    verdict: Verdict


def refit(request: RefitRequest, reporter: Reporter) -> Refitted:
    """Writes a bundle with another edit, whole or not at all, measured and judged anew.

    Args:
        request: What the user asked for.
        reporter: Progress.

    Raises:
        InputError: If the request is contradictory, the edit is there already or moves the scales of an 8-bit weight, the
            bundle has a safety head, or a signature would be lost unasked.
        IntegrityError: If the patch, the scores, the source weights or the set are not those the bundle was made from, or
            the bundle is not signed by the right key.
        PrerequisiteError: If nothing, or not what was asked for, can be refitted here.
        ContractError: If the new edit is not in what comes out, or the old one still is.
    """
    asked = (request.patch, request.revert or None, request.keep_mass, request.max_retrieval_loss, request.axis)
    if sum(part is not None for part in asked) != 1:
        raise InputError(
            "nothing or several things are asked for",
            fix="give one of --patch, --revert, --keep-mass, --max-retrieval-loss and --axis",
        )
    out = request.out or request.bundle
    refuse_foreign_folder(out)
    seal = seal_for(request.signing, request.bundle, out)
    bundle = open_bundle(request.bundle, allow_failed=True, public_key=seal.public_key)
    if bundle.manifest.head is not None:
        raise InputError(
            f"{request.bundle} has a safety head, which was trained on its edit and means nothing on another",
            fix="train a head on the new edit and build again",
        )
    lock = lock_of_bundle(out)
    with locked(lock), tempfile.TemporaryDirectory(dir=lock, prefix=".tmp-refit-") as temporary:
        made = _Refit(request, reporter, bundle, out, seal, Path(temporary)).run()
        note_signature(out, seal, reporter)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Artifacts:
    """Graphs and engines of the new bundle, and their files by path."""

    onnx: tuple[OnnxArtifact, ...]
    engines: tuple[EngineArtifact, ...]
    converted: tuple[OnnxArtifact, ...]
    parts: Parts


class _Refit:
    """One refit: what is known of the bundle, and the steps."""

    def __init__(
        self, request: RefitRequest, reporter: Reporter, bundle: Bundle, out: Path, seal: Seal, folder: Path
    ) -> None:
        self.request, self.reporter, self.bundle, self.out, self.folder = request, reporter, bundle, out, folder
        self.seal = seal
        self.manifest, self.edit = bundle.manifest, bundle.manifest.edit
        if digest_of_file(bundle.path / PATCH) != self.edit.patch_digest:
            raise IntegrityError("patch.safetensors is not the bundle's edit", fix="restore the bundle")
        self.patch = Patch.from_file(bundle.path / PATCH)
        self.report = record_from_json(VerifyReport, bundle.read("reports/verify.json"), where="reports/verify.json")

    def run(self) -> Refitted:
        """Edits, refits, measures, judges, writes."""
        judge = judge_of_bundle(self.bundle.path, self.request.policy)
        variants, left_out = self._variants()
        source, model = self._evaluation(), self._model()
        with self.reporter.stage("edit", self._what()):
            swap = self._swap(model)
        original = reference_of(self.bundle, "original")
        with self.reporter.stage("reference", f"{source.record.name}, {len(source)} quadruples"):
            prepared = self._prepared(source)
            reference = original
            if swap.new.edited_weights_digest != self.manifest.model.weights_digest:
                assert model is not None
                reference = embed_model(model, prepared, "evaluation, edited", self.reporter.progress)
            reference = dataclasses.replace(reference, zero_shot_missing=prepared.zero_shot_missing)
            del model
        with self.reporter.stage("refit", ", ".join(variants)):
            refitted = self._made(swap, variants, prepared)
        unproven = self._unproven(swap, refitted, original, reference, prepared, judge)
        with self.reporter.stage("attest", ", ".join(variants)):
            verdict = attest(
                unproven,
                source,
                judge,
                lambda _, manifest, parts: bundle_with_card(self.out, manifest, parts, sign=self.seal.sign),
                workers=self.request.workers,
                progress=self.reporter.progress,
                prepared=prepared,
            )
        changed = sum(not np.array_equal(c.before, c.after) for c in swap.changes.values())
        return Refitted(out=self.out, edit=swap.new, layers=changed, left_out=left_out, verdict=verdict)

    def _prepared(self, source: QuadrupleSource) -> PreparedSet:
        tokenizer = Tokenizer(self.bundle.read("tokenizer.json"), self.manifest.model.text)
        return prepare(
            source,
            self.manifest.model.image,
            tokenizer,
            workers=self.request.workers,
            progress=self.reporter.progress,
            batch=EMBED_BATCH,
        )

    def _what(self) -> str:
        if self.request.revert:
            return "back to the source model"
        if self._restrengthened:
            return "another strength of the closed-form step"
        return f"keep_mass {self.request.keep_mass:g}" if self.request.keep_mass is not None else "another patch"

    @property
    def _restrengthened(self) -> bool:
        return self.request.max_retrieval_loss is not None or self.request.axis is not None

    def _variants(self) -> tuple[list[str], dict[str, str]]:
        """Variants that are refitted, and why others are not."""
        asked = self.request.variants
        for variant in asked:
            self.bundle.engines(variant)
        reasons = {engine.variant: reason_against(engine) for engine in self.manifest.engines}
        if asked:
            reasons = {v: reason if v in asked else "it was not asked for" for v, reason in reasons.items()}
        for variant in asked:
            if reasons[variant]:
                raise PrerequisiteError(
                    f"{variant} cannot be refitted here: {reasons[variant]}", fix="leave it out, or build again"
                )
        chosen = [variant for variant, reason in reasons.items() if not reason]
        if not chosen:
            why = "; ".join(f"{variant}: {reason}" for variant, reason in reasons.items())
            raise PrerequisiteError(f"nothing can be refitted here ({why})", fix="build again")
        return chosen, {variant: reason for variant, reason in reasons.items() if reason}

    def _evaluation(self) -> QuadrupleSource:
        """The set the bundle was measured on: what is known of the original model holds for it alone."""
        source = evaluation_source_of(self.bundle, self.request.evaluation)
        known = self.report.evaluation
        if (source.record.ids_digest, source.record.content_digest) != (known.ids_digest, known.content_digest):
            raise InputError(
                f"data set {source.record.name} is not the one the bundle was measured on ({known.name})",
                fix="pass the same evaluation set",
            )
        return source

    def _model(self) -> LoadedModel | None:
        """The source model; a revert of negations needs none.

        Raises:
            IntegrityError: If the weights are another model's.
        """
        if self.request.revert and self.patch.exact:
            return None
        recipe = recipe_from_toml(self.bundle.read("recipe.toml").decode(), where="recipe.toml")
        source = recipe.model
        try:
            folder = self.request.checkpoint or resources.checkpoint_folder(source.repo, source.revision)
            companion = (
                resources.checkpoint_folder(source.companion, source.companion_revision) if source.companion else None
            )
        except InputError as error:
            why = "a factor that forgets weights is taken back" if self.request.revert else "the new edit is measured"
            raise InputError(f"{error.what}; with the source weights {why}", fix="pass --checkpoint") from error
        with self.reporter.stage("load", recipe.name):
            model = load_model(recipe, folder=folder, companion=companion, device=self.request.device)
        if model.ref.weights_digest != self.manifest.model.weights_digest:
            raise IntegrityError(
                "the source weights are not those the bundle was made from", fix="pass --checkpoint with the right ones"
            )
        return model

    def _swap(self, model: LoadedModel | None) -> Swap:
        """Old and new edit; the model is the edited one afterwards."""
        if Method.TRAINED in self.edit.methods:
            raise InputError(_TRAINED, fix="build the other model")
        if self.request.revert:
            record, patch = reverted(self.edit, self.patch)
            content = patch.to_bytes()
        elif self.request.patch is not None:
            record, patch, content = _edit_at(self.request.patch)
        else:
            assert model is not None
            record, patch, content = _edit_at(self._solved(model) if self._restrengthened else self._selected(model))
        self._check_new(record)
        held = self._held(record)
        if model is None:
            after = without_edit(held, self.edit, self.patch)
        else:
            if self.request.patch is not None:
                _apply(patch, record, model)
            parameters = model.named_parameters()
            if digest_of_weights(parameters) != record.edited_weights_digest:
                raise IntegrityError("the patch does not make the weights its record promises", fix="edit again")
            after = {name: parameters[name].detach().cpu().numpy() for name in held}
        changes = {name: Replacement(held[name], after[name]) for name in held}
        return Swap(old=self.edit, old_patch=self.patch, new=record, new_patch=patch, content=content, changes=changes)

    def _check_new(self, record: EditRecord) -> None:
        if Method.TRAINED in record.methods:
            raise InputError(_TRAINED, fix="build the other model")
        if record.model.weights_digest != self.manifest.model.weights_digest:
            raise IntegrityError("the patch is of another model", fix="pass a patch of the bundle's source model")
        if record.edited_weights_digest == self.edit.edited_weights_digest:
            raise InputError("the bundle holds this edit already", fix="pass another one")
        added = [{t.name for t in edit.tensors if t.kind is EditKind.ADDED} for edit in (self.edit, record)]
        if added[0] != added[1]:
            raise InputError("one of the two edits has maps behind the embeddings, which are nodes", fix="build again")

    def _held(self, record: EditRecord) -> dict[str, np.ndarray]:
        """Every tensor that either edit names, as the bundle's graphs hold it."""
        digests = {t.name: t.digest_before for t in record.tensors} | {
            t.name: t.digest_after for t in self.edit.tensors
        }
        towers = {t.name: t.tower for edit in (self.edit, record) for t in edit.tensors}
        wanted = {name: digest for name, digest in digests.items() if towers[name] is not None}
        return held_tensors(self.manifest.onnx, self.bundle.path / "onnx", wanted)

    def _solved(self, model: LoadedModel) -> Path:
        """Folder with the edit of another strength, from the fit that the bundle's edit was solved from."""
        step = self.edit.closed_form
        if step is None or step.axis is None or step.method is not Method.SAFETY_AXIS:
            raise InputError(
                "the bundle's edit has no safety axis whose strength could change",
                fix="put one in with --patch and a bundle or run folder that has it",
            )
        folder = self._work / "fit"
        fit = read_fit(folder)
        if fit.sums_digest != step.scores_digest:
            raise IntegrityError(
                "the run folder's fit is not the bundle's", fix="pass --work with its run folder, or build again"
            )
        recipe = recipe_from_toml(self.bundle.read("recipe.toml").decode(), where="recipe.toml")
        known = recipe.closed_form.axis if recipe.closed_form else AxisSpec()
        axis = dataclasses.replace(known, setting=self.request.axis)
        if self.request.max_retrieval_loss is not None:
            axis = dataclasses.replace(axis, max_retrieval_loss=self.request.max_retrieval_loss)
        solve = solver(ClosedForm(method=step.method, axis=axis), fit, folder, self.reporter.line)
        first = {n: p for n, p in self.patch.tensors.items() if p.kind is EditKind.MULTIPLIED}
        before = {name: p.detach().clone() for name, p in last_tensors(model).items()}
        if set(first) & set(before):
            raise InputError("the step before edits the last map, too", fix="build again")
        Patch(first).apply({name: model.named_parameters()[name].detach() for name in first})
        solved = solve(model)
        put(model, solved)
        tensors = {t.name: t for t in self.edit.tensors if t.name in first}
        parts = dict(first)
        for name, after in solved.tensors.items():
            parts[name] = replaced(before.get(name), after)
            tensors[name] = tensor_edit(name, solved.towers[name], before.get(name), after)
        out = self.folder / "edit"
        out.mkdir()
        steps = (*(s for s in self.edit.steps if s.axis is None), solved.step)
        saved_edit(model, self.edit.model, Patch(parts), tensors.values(), steps, out)
        return out

    @property
    def _work(self) -> Path:
        return self.request.work or Path(".uwm") / self.manifest.name

    def _selected(self, model: LoadedModel) -> Path:
        """Folder with the edit of another keep_mass, from the scores that the bundle's edit was selected from."""
        step = self.edit.first
        if not selects(step.method):
            raise InputError("the bundle holds no edit whose keep_mass could change", fix="use --patch")
        if self.edit.closed_form is not None:
            raise InputError("the closed-form step was fitted on this keep_mass", fix="build again with the other one")
        keep_mass = self.request.keep_mass
        assert keep_mass is not None
        file = self._work / "score" / "score.json"
        if not file.is_file():
            raise InputError(f"{self._work} holds no scores", fix="pass --work with the bundle's run folder")
        score = record_from_json(ScoreRecord, file.read_bytes(), where="score.json")
        if score.scores_digest != step.scores_digest:
            raise IntegrityError("the run folder's scores are not the bundle's", fix="pass --work with its run folder")
        entries = recipe_from_toml(self.bundle.read("recipe.toml").decode(), where="recipe.toml").entries
        specs = {
            tower: dataclasses.replace(
                entries.of(tower),
                rule=setting.rule,
                pairing=setting.pairing or entries.of(tower).pairing,
                selection=setting.selection,
                keep_mass=keep_mass,
                factor=setting.factor,
                gradient_batch=setting.gradient_batch,
            )
            for tower in TowerName
            if (setting := step.settings.get(tower.value))
        }
        edits = EditSpecs(
            text=specs.get(TowerName.TEXT, entries.text),
            image=specs.get(TowerName.IMAGE, entries.image),
            method=step.method,
            per_concept=bool(step.concepts),
            towers=tuple(specs),
        )
        folder = self.folder / "edit"
        folder.mkdir()
        edit_to_folder(model, score, file.with_name("scores.safetensors"), edits, folder)
        return folder

    def _made(self, swap: Swap, variants: list[str], prepared: PreparedSet) -> _Artifacts:
        """Graphs and engines with the new edit."""
        old_onnx, onnx = self.bundle.path / "onnx", self.folder / "onnx"
        onnx.mkdir()
        parts: Parts = {}
        graphs = {graph.tower: refit_graph(graph, old_onnx, onnx, swap) for graph in self.manifest.onnx}
        for graph in graphs.values():
            parts |= {f"onnx/{name}": onnx / name for name in filter(None, (graph.file, graph.external_data))}
        before = {graph.digest: graph for graph in self.manifest.converted}
        now = {old.digest: graphs[old.tower] for old in self.manifest.onnx}
        samples = {
            TowerName.IMAGE: prepared.unsafe_pixels[:SINGLE_ROWS],
            TowerName.TEXT: prepared.unsafe_ids[:SINGLE_ROWS],
        }
        engines = []
        # What a graph's own file is comes first: then its new digest is known.
        ordered = sorted(self.manifest.engines, key=lambda engine: engine.digest != engine.onnx_digest)
        for old in [engine for engine in ordered if engine.variant in variants]:
            folder = self.folder / "engines" / old.variant
            folder.mkdir(parents=True, exist_ok=True)
            graph = graphs[old.tower]
            made, kinds = refit_engine(
                old,
                self.bundle.path / "engines" / old.variant,
                folder,
                swap,
                graphs=(old_onnx / graph.file, onnx / graph.file),
                sample=samples[old.tower],
            )
            if old.onnx_digest not in now:
                same_file = old.digest == old.onnx_digest
                now[old.onnx_digest] = refit_converted(
                    before[old.onnx_digest], graph, made, kinds, swap, same_file=same_file
                )
            engines.append(dataclasses.replace(made, onnx_digest=now[old.onnx_digest].digest))
            parts |= {path: folder / Path(path).name for path in engine_paths(made)}
        order = {(engine.variant, engine.tower): place for place, engine in enumerate(self.manifest.engines)}
        return _Artifacts(
            onnx=tuple(graphs.values()),
            engines=tuple(sorted(engines, key=lambda engine: order[engine.variant, engine.tower])),
            converted=tuple(now[digest] for digest in before if digest in now),
            parts=parts,
        )

    def _unproven(
        self,
        swap: Swap,
        made: _Artifacts,
        original: EmbeddedSet,
        reference: EmbeddedSet,
        prepared: PreparedSet,
        judge: Judge,
    ) -> Bundle:
        """The new bundle as it is before anything of it was executed, opened with all checks."""
        edit, proof = swap.new, self.report.edit_proof
        if proof is not None:
            # The weights that were put in have the digests that the patch promises; every other one is as it was proven.
            proof = dataclasses.replace(proof, layers=len(edit.tensors))
        yardstick = yardstick_of(original)
        report = dataclasses.replace(
            self.report,
            edit_proof=proof,
            edited_weights_digest=edit.edited_weights_digest,
            edited=safety_report("edited", reference, with_items=True, yardstick=yardstick),
            edit_effect=flips_between(original, reference, yardstick),
            edit_worst=worst_items("edited", original, reference),
            hard_safe=yardstick.hard_ids(),
            hard_safe_worst=hard_safe_worst(yardstick, reference),
            artifacts=tuple(_not_run(made.onnx, made.engines)),
        )
        content = json_from_record(report).encode()
        verdict = judge(report, digest_of_bytes(content))
        replaced = ("onnx/", "engines/", "evidence/canaries-")
        parts: Parts = {
            file.path: self.bundle.path / file.path
            for file in self.manifest.files
            if not file.path.startswith(replaced)
        }
        tensors = original.to_tensors("original") | reference.to_tensors("edited")
        parts |= made.parts | {
            PATCH: swap.content,
            "reports/edit.json": json_from_record(edit).encode(),
            "reports/verify.json": content,
            "reports/verdict.json": json_from_record(verdict).encode(),
            "evidence/reference.safetensors": save(tensors),
        }
        parts |= _canaries(edit, original, reference, prepared)
        manifest = dataclasses.replace(
            self.manifest,
            tool_version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            edit=edit,
            onnx=made.onnx,
            engines=made.engines,
            converted=made.converted,
            verdict=verdict,
            refitted_from=digest_of_file(self.bundle.path / MANIFEST),
            bundle_version=self.manifest.bundle_version
            if self.request.bundle_version is None
            else self.request.bundle_version,
        )
        bundle_from_parts(self.folder / "bundle", manifest, parts)
        return open_bundle(self.folder / "bundle", allow_failed=True)


def _edit_at(path: Path) -> tuple[EditRecord, Patch, bytes]:
    """Record, patch and content of a patch file: a patch file, or a bundle, run folder or edit folder that has one.

    Raises:
        InputError: If one of the two is missing or broken.
        IntegrityError: If they do not belong together.
    """
    candidates = [path] if path.is_file() else [path / PATCH, path / "edit" / PATCH]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise InputError(f"{path} holds no {PATCH}", fix="pass the patch of a bundle or of a run folder")
    patch = Patch.from_file(file)
    records = [file.with_name(RECORD), file.parent / "reports" / RECORD]
    found = next((candidate for candidate in records if candidate.is_file()), None)
    if found is None:
        raise InputError(f"{file.name} has no {RECORD} beside it", fix="pass the folder that `edit` wrote, or a bundle")
    record = record_from_json(EditRecord, found.read_bytes(), where=found.name)
    promised = {t.name: (t.kind, t.digest_before, t.digest_after) for t in record.tensors}
    if promised != {name: (part.kind, part.digest_before, part.digest_after) for name, part in patch.tensors.items()}:
        raise IntegrityError(f"{file.name} is not the patch that {found.name} describes", fix="edit again")
    content = file.read_bytes()
    if digest_of_bytes(content) != record.patch_digest:
        raise IntegrityError(f"{file.name} is not the patch that {found.name} describes", fix="edit again")
    return record, patch, content


def _apply(patch: Patch, record: EditRecord, model: LoadedModel) -> None:
    """Applies the patch of a record to the source model, maps behind the embeddings included."""
    new = {t.name: torch.zeros(t.shape) for t in record.tensors if t.kind is EditKind.ADDED}
    parameters = {name: p.detach() for name, p in model.named_parameters().items()} | new
    patch.apply({name: parameters[name] for name in patch.tensors})
    if new:
        put_maps(model, new)


def _not_run(onnx: tuple[OnnxArtifact, ...], engines: tuple[EngineArtifact, ...]) -> list[ArtifactEvidence]:
    """What is known of a refitted artifact before it was executed: nothing."""
    exported = [(EXPORTED, Precision.FP32, {graph.tower.value: graph.digest for graph in onnx})]
    built = [
        (variant, Precision(parts[0].precision), {part.tower.value: part.digest for part in parts})
        for variant in dict.fromkeys(engine.variant for engine in engines)
        if (parts := [engine for engine in engines if engine.variant == variant])
    ]
    return [
        ArtifactEvidence(
            variant=variant,
            precision=precision,
            evidence=Evidence.NOT_RUN,
            reason="refitted, and not executed since",
            where={},
            artifact_digests=digests,
        )
        for variant, precision, digests in [*exported, *built]
    ]


def _canaries(edit: EditRecord, original: EmbeddedSet, edited: EmbeddedSet, prepared: PreparedSet) -> Parts:
    """Canaries of the new edit, chosen from the evaluation set: the calibration set is not at hand."""
    inputs = {
        TowerName.IMAGE: (prepared.safe_pixels, prepared.unsafe_pixels),
        TowerName.TEXT: (prepared.safe_ids, prepared.unsafe_ids),
    }
    parts: Parts = {}
    for tower in [name for name in TowerName if any(tensor.changed for tensor in edit.of(name))]:
        before, after = (
            np.concatenate([getattr(model, f"{side}_{tower.value}") for side in ("safe", "unsafe")])
            for model in (original, edited)
        )
        rows, n = choose(before, after), len(prepared.ids)
        if not len(rows):  # a map that was taken back: the models are the same
            continue
        chosen = np.concatenate([inputs[tower][row // n][row % n : row % n + 1] for row in rows])
        tensors = {"inputs": np.ascontiguousarray(chosen), "original": before[rows], "edited": after[rows]}
        parts[f"evidence/canaries-{tower.value}.safetensors"] = save(tensors)
    return parts

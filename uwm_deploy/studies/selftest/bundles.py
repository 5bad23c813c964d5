"""Faults after the verdict: bundles that are not what was judged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import MANIFEST, engine_path, open_bundle
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.data.embedding import unit_rows
from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.fingerprint import digest_of_onnx
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import EXPORTED, EngineArtifact
from uwm_deploy.records.model import ModelRef, TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.safeground.embedded import flips_between, safety_report, yardstick_of
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.studies.selftest import surgery
from uwm_deploy.studies.selftest.artifacts import compiled_with
from uwm_deploy.studies.selftest.honest_builds import POLICY, QUADRUPLES, Build, HonestBuild, data_file


def _copy(world: HonestBuild, folder: Path) -> Path:
    target = folder / "bundle"
    shutil.copytree(world.bundle, target)
    return target


def _packed(world: HonestBuild, folder: Path, manifest: Manifest, changed: Mapping[str, Path | bytes]) -> Path:
    """A bundle that was written by the package stage, with other parts."""
    parts: dict[str, Path | bytes] = {f.path: world.bundle / f.path for f in manifest.files}
    out = folder / "bundle"
    bundle_from_parts(out, manifest, {**parts, **changed})
    return out


def _manifest(world: HonestBuild) -> Manifest:
    return open_bundle(world.bundle).manifest


def _with_engines(manifest: Manifest, build: Build) -> tuple[Manifest, dict[str, Path | bytes]]:
    """A manifest whose engines are those of a build, and their files."""
    engines: list[EngineArtifact] = []
    files: dict[str, Path | bytes] = {}
    for engine in manifest.engines:
        path = build.engines[engine.tower]
        engines.append(dataclasses.replace(engine, digest=digest_of_onnx(path, "")))
        files[engine_path(engine)] = path
    return dataclasses.replace(manifest, engines=tuple(engines)), files


def engine_flipped(world: HonestBuild, folder: Path) -> Path:
    """One bit of an engine."""
    out = _copy(world, folder)
    path = out / engine_path(world.engines[TowerName.IMAGE])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return out


def manifest_edited(world: HonestBuild, folder: Path) -> Path:
    """Another factor in the manifest, written as the package stage would write it."""
    out = _copy(world, folder)
    body = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    for tensor in body["edit"]["tensors"]:
        tensor["factor"] = -2.0
    text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (out / MANIFEST).write_text(text, encoding="utf-8")
    return out


def tokenizer_swapped(world: HonestBuild, folder: Path) -> Path:
    """The tokenizer of another model, listed with its own digest."""
    body = json.loads(world.original.tokenizer_json)
    body["added_tokens"] = body["added_tokens"][::-1]
    return _packed(world, folder, _manifest(world), {"tokenizer.json": json.dumps(body).encode()})


def file_added(world: HonestBuild, folder: Path) -> Path:
    """A library beside the engine."""
    out = _copy(world, folder)
    (out / "engines" / "plugin.so").write_bytes(b"\x7fELF")
    return out


def report_edited(world: HonestBuild, folder: Path) -> Path:
    """A report with better numbers than were measured, listed with its own digest."""
    better = dataclasses.replace(world.report, calibration_overlap=0, edit_worst=())
    return _packed(world, folder, _manifest(world), {BundleLayout.REPORT: json_from_record(better).encode()})


def report_of_another_engine(world: HonestBuild, folder: Path) -> Path:
    """The engine of the original model, whole and listed, with the verdict about the edited one's."""
    changes = {t: surgery.with_weights(world.original.tower(t).graph_module()) for t in TowerName}
    manifest, files = _with_engines(_manifest(world), compiled_with(changes)(world, folder))
    return _packed(world, folder, manifest, files)


def policy_loosened(world: HonestBuild, folder: Path) -> Path:
    """Graphs that were never executed, packed with the verdict of a policy of the same name that does not ask for it."""
    artifacts = [_never_run(a) if a.variant == EXPORTED else a for a in world.report.artifacts]
    report = dataclasses.replace(world.report, artifacts=tuple(artifacts))
    text, _ = resources.read_toml("ci", POLICY)
    return _told(world, folder, report, policy=text.replace('required = ["onnx"]', "required = []"))


def _never_run(artifact: ArtifactEvidence) -> ArtifactEvidence:
    return ArtifactEvidence(
        variant=artifact.variant,
        precision=artifact.precision,
        evidence=Evidence.NOT_RUN,
        reason="nobody had the time",
        where={},
        artifact_digests=artifact.artifact_digests,
    )


def _told(
    world: HonestBuild,
    folder: Path,
    report: VerifyReport,
    *,
    policy: str = "",
    manifest: Manifest | None = None,
    files: Mapping[str, Path | bytes] | None = None,
) -> Path:
    """A bundle with another report, the verdict on it, and a manifest that agrees with both.

    Args:
        world: Whose bundle it is made from.
        folder: Where it goes.
        report: The report.
        policy: Text that it is judged by; that of the shipped policy when empty.
        manifest: Another one than the honest bundle's.
        files: Further files that differ.

    Raises:
        ContractError: If the report does not pass, so that nothing is planted.
    """
    rules, digest = policy_of(POLICY)
    if policy:
        rules, digest = policy_from_toml(policy, where="the loosened policy"), digest_of_bytes(policy.encode())
    content = json_from_record(report).encode()
    verdict = gate(report, rules, policy_digest=digest, report_digest=digest_of_bytes(content))
    if verdict.result is not Result.PASS:
        raise ContractError("the report that was made up does not pass", fix="report this")
    told = dataclasses.replace(manifest or _manifest(world), verdict=verdict)
    changed = {BundleLayout.REPORT: content, BundleLayout.VERDICT: json_from_record(verdict).encode()}
    return _packed(world, folder, told, {**(files or {}), **changed})


# --- evidence that is old, or of something else -----------------------------------------------------------------------


def report_of_another_set(world: HonestBuild, folder: Path) -> Path:
    """A whole report and its verdict, measured on another sample of the same set."""
    source = world.open(data_file(folder, "other", "test", QUADRUPLES, seed=1))
    build = dataclasses.replace(world.honest, prepared=world.prepare(source), evaluation=source.record)
    return _told(world, folder, world.measured(build, folder))


def report_of_an_older_edit(world: HonestBuild, folder: Path) -> Path:
    """Yesterday's report and verdict, from before the edit was made again."""
    older = digest_of_bytes(b"the weights of yesterday")
    return _told(world, folder, dataclasses.replace(world.report, edited_weights_digest=older))


def numbers_improved(world: HonestBuild, folder: Path) -> Path:
    """A report with the numbers of a safer model than the one whose embeddings lie beside it."""
    original, edited = world.embedded
    yardstick = yardstick_of(original)
    better = dataclasses.replace(edited, unsafe_text=edited.safe_text, unsafe_image=edited.safe_image)
    text, image = (
        unit_rows(0.9 * getattr(edited, name) + 0.1 * getattr(better, name)) for name in ("unsafe_text", "unsafe_image")
    )
    better = dataclasses.replace(edited, unsafe_text=text, unsafe_image=image)
    report = dataclasses.replace(
        world.report,
        edited=safety_report("edited", better, with_items=True, yardstick=yardstick),
        edit_effect=flips_between(original, better, yardstick),
    )
    return _told(world, folder, report)


def effect_improved(world: HonestBuild, folder: Path) -> Path:
    """Only the number that a verdict calls "shown safer" is another: the difference of the edited and the original model."""
    flips = world.report.edit_effect["GS"]
    better = dataclasses.replace(flips, delta=60.0, delta_low=58.0, delta_high=62.0)
    return _told(
        world, folder, dataclasses.replace(world.report, edit_effect={**world.report.edit_effect, "GS": better})
    )


def intervals_narrowed(world: HonestBuild, folder: Path) -> Path:
    """Every number is right, and said to be known more exactly than it is."""
    edited = world.report.edited
    sure = {name: dataclasses.replace(p, low=p.value, high=p.value) for name, p in edited.preference.items()}
    return _told(world, folder, dataclasses.replace(world.report, edited=dataclasses.replace(edited, preference=sure)))


def engine_of_yesterday(world: HonestBuild, folder: Path) -> Path:
    """The original model's engine; manifest, report and verdict say its digest, and nothing is signed."""
    changes = {t: surgery.with_weights(world.original.tower(t).graph_module()) for t in TowerName}
    manifest, files = _with_engines(_manifest(world), compiled_with(changes)(world, folder))
    digests = {engine.tower.value: engine.digest for engine in manifest.engines}
    artifacts = [
        a if a.variant == EXPORTED else dataclasses.replace(a, artifact_digests=digests) for a in world.report.artifacts
    ]
    report = dataclasses.replace(world.report, artifacts=tuple(artifacts))
    return _told(world, folder, report, manifest=manifest, files=files)


# --- a model's record that was changed --------------------------------------------------------------------------------


def with_model(change: Callable[[ModelRef], ModelRef]) -> Callable[[HonestBuild, Path], Path]:
    """Another preprocessing in the manifest's record of the model; edit and report have the right one.

    Args:
        change: Of the record.
    """

    def plant(world: HonestBuild, folder: Path) -> Path:
        manifest = _manifest(world)
        return _packed(world, folder, dataclasses.replace(manifest, model=change(manifest.model)), {})

    return plant


def with_model_everywhere(change: Callable[[ModelRef], ModelRef]) -> Callable[[HonestBuild, Path], Path]:
    """The same in manifest, edit, report and verdict alike.

    Args:
        change: Of the record.
    """

    def plant(world: HonestBuild, folder: Path) -> Path:
        there = _manifest(world)
        model = change(there.model)
        edit = dataclasses.replace(there.edit, model=model)
        manifest = dataclasses.replace(there, model=model, edit=edit)
        report = dataclasses.replace(world.report, model=model)
        return _told(
            world, folder, report, manifest=manifest, files={BundleLayout.EDIT: json_from_record(edit).encode()}
        )

    return plant


def resampled(model: ModelRef) -> ModelRef:
    """Images are resized by another filter."""
    return dataclasses.replace(model, image=dataclasses.replace(model.image, resample="bilinear"))


def squashed(model: ModelRef) -> ModelRef:
    """Images lose their shape and keep their edges."""
    return dataclasses.replace(model, image=dataclasses.replace(model.image, fit="squash", resize=model.image.crop))


def of_other_mean(model: ModelRef) -> ModelRef:
    """Images are normalised by other numbers."""
    return dataclasses.replace(model, image=dataclasses.replace(model.image, mean=(0.5, 0.5, 0.5)))


def of_other_alpha(model: ModelRef) -> ModelRef:
    """Transparency is dropped for laid over white, or the other way about."""
    other: Literal["white", "drop"] = "drop" if model.image.alpha == "white" else "white"
    return dataclasses.replace(model, image=dataclasses.replace(model.image, alpha=other))


def of_other_tokenizer(model: ModelRef) -> ModelRef:
    """The digest of a tokenizer that is not there."""
    digest = digest_of_bytes(b"the tokenizer of another model")
    return dataclasses.replace(model, text=dataclasses.replace(model.text, tokenizer_digest=digest))


# --- policies ---------------------------------------------------------------------------------------------------------


def judged_by(old: str, new: str) -> Callable[[HonestBuild, Path], Path]:
    """A policy with a slip, by which the honest bundle is judged.

    Args:
        old: In the shipped policy.
        new: In its place.
    """

    def plant(world: HonestBuild, _: Path) -> Path:
        text, where = resources.read_toml("ci", POLICY)
        if old not in text:
            raise ContractError(f"the shipped policy has no {old!r}", fix="report this")
        policy_from_toml(text.replace(old, new), where=where)
        return world.bundle

    return plant

"""A report belongs where it lies: to its set, its edit, its model and its files; and the files answer for themselves."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from safetensors.numpy import load_file, save

from tests.made_once import copy_of
from tests.reports import digest, embedded, report
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import engine_path, open_bundle
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.cli import cli
from uwm_deploy.errors import EvidenceError, ExitCode, IntegrityError
from uwm_deploy.graphs.fingerprint import digest_of_onnx
from uwm_deploy.pipeline.folder import STAMP, stamp
from uwm_deploy.pipeline.judge import beside_in
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, read_record, record_from_json, write_record
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.model import ModelRef, TowerName
from uwm_deploy.records.verdict import Cause, Result, Verdict
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.service import Serving
from uwm_deploy.safeground.canaries import CANARIES
from uwm_deploy.stages.gate.binding import AGAIN, ARTIFACTS, EDIT, MODEL, SET, Beside, belongs
from uwm_deploy.stages.gate.gate import gate

Built = tuple[Request, Outcome]


def beside(made: VerifyReport, n: int) -> Beside:
    """Where a made-up report belongs."""
    ids = digest_of_bytes("\n".join(embedded(n, 0.0).ids).encode())
    assert made.evaluation.ids_digest in (ids, digest("5"))
    return Beside(
        model=made.model,
        edited_weights_digest=made.edited_weights_digest,
        artifacts={a.variant: dict(a.artifact_digests) for a in made.artifacts},
        embedded=(embedded(n, 0.0), embedded(n, 0.7)),
        evaluation=made.evaluation,
    )


def whole(n: int = 64) -> VerifyReport:
    made = report(n)
    ids = digest_of_bytes("\n".join(embedded(n, 0.0).ids).encode())
    return dataclasses.replace(made, evaluation=dataclasses.replace(made.evaluation, ids_digest=ids))


def failing(made: VerifyReport, where: Beside) -> list[str]:
    return [check.name for check in belongs(made, where) if check.result is not Result.PASS]


def _better(safety: SafetyReport) -> SafetyReport:
    better = dataclasses.replace(safety.preference["GS"], value=99.0)
    return dataclasses.replace(safety, preference={**safety.preference, "GS": better})


MODEL_PARTS = {
    "resample": lambda m: dataclasses.replace(m, image=dataclasses.replace(m.image, resample="bilinear")),
    "mean": lambda m: dataclasses.replace(m, image=dataclasses.replace(m.image, mean=(0.4, 0.5, 0.5))),
    "alpha": lambda m: dataclasses.replace(m, image=dataclasses.replace(m.image, alpha="drop")),
    "tokenizer": lambda m: dataclasses.replace(m, text=dataclasses.replace(m.text, tokenizer_digest=digest("9"))),
    "length": lambda m: dataclasses.replace(m, text=dataclasses.replace(m.text, context_length=31)),
}


def test_a_report_in_its_place_belongs_there() -> None:
    """Nothing fails, and a report that lies alone is not asked."""
    made = whole()
    assert failing(made, beside(made, 64)) == []
    assert belongs(made, None) == []


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda b: dataclasses.replace(b, edited_weights_digest=digest("9")), EDIT),
        (lambda b: dataclasses.replace(b, model=MODEL_PARTS["mean"](b.model)), MODEL),
        (lambda b: dataclasses.replace(b, model=MODEL_PARTS["tokenizer"](b.model)), MODEL),
        (lambda b: dataclasses.replace(b, artifacts={**b.artifacts, "onnx": {"image": digest("9")}}), ARTIFACTS),
        (lambda b: dataclasses.replace(b, artifacts={"onnx": b.artifacts["onnx"]}), ARTIFACTS),
        (
            lambda b: dataclasses.replace(b, evaluation=dataclasses.replace(b.evaluation, content_digest=digest("9"))),
            SET,
        ),
        (lambda b: dataclasses.replace(b, embedded=(b.embedded[0], b.embedded[0])), AGAIN),
    ],
    ids=["edit", "preprocessing", "tokenizer", "engine", "engine-more", "set", "embeddings"],
)
def test_a_report_about_something_else_is_named(change: Callable[[Beside], Beside], name: str) -> None:
    """Each part by its own check, and the verdict says that the evidence is foreign, before anything else."""
    made = whole()
    where = change(beside(made, 64))
    assert failing(made, where) == [name]
    policy, policy_digest = policy_of("demo")
    verdict = gate(made, policy, policy_digest=policy_digest, report_digest=digest("r"), beside=where)
    assert verdict.result is Result.FAIL
    assert (verdict.causes[0].cause, verdict.causes[0].stage) == (Cause.EVIDENCE, "verify")
    assert verdict.proven == ()


def _narrowed(made: VerifyReport) -> VerifyReport:
    there = made.edited.preference["GS"]
    part = dataclasses.replace(there, low=there.value, high=there.value)
    edited = dataclasses.replace(made.edited, preference={**made.edited.preference, "GS": part})
    return dataclasses.replace(made, edited=edited)


def _of_a_concept(made: VerifyReport) -> VerifyReport:
    concept = next(iter(made.edited.per_concept))
    part = dataclasses.replace(made.edited.per_concept[concept]["GS"], value=99.0)
    concepts = {**made.edited.per_concept, concept: {**made.edited.per_concept[concept], "GS": part}}
    return dataclasses.replace(made, edited=dataclasses.replace(made.edited, per_concept=concepts))


def _of_the_edit(made: VerifyReport, **changes: float) -> VerifyReport:
    flips = dataclasses.replace(made.edit_effect["GS"], **changes)
    return dataclasses.replace(made, edit_effect={**made.edit_effect, "GS": flips})


def _of_items(made: VerifyReport) -> VerifyReport:
    items = made.edited.items
    assert items is not None
    bits = dict.fromkeys(items.preference, "f" * 16)
    return dataclasses.replace(
        made, edited=dataclasses.replace(made.edited, items=dataclasses.replace(items, preference=bits))
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: dataclasses.replace(made, edited=_better(made.edited)), "GS of the edited model is 99 ("),
        (_narrowed, "GS of the edited model is "),
        (_of_a_concept, " of the edited model is 99 ("),
        (lambda made: _of_the_edit(made, delta=60.0), "GS of the edit is +60 ("),
        (lambda made: _of_the_edit(made, delta_low=-90.0), "GS of the edit is "),
        (lambda made: _of_the_edit(made, p_value=1e-9), "GS of the edit is "),
        (_of_items, "what single items came to of the edited model"),
    ],
    ids=["value", "interval", "concept", "effect", "effect-interval", "test", "items"],
)
def test_numbers_that_the_embeddings_do_not_give_are_named(
    change: Callable[[VerifyReport], VerifyReport], words: str
) -> None:
    """With what the report says and what they give; two items may be decided otherwise by rounding."""
    made = whole()
    (again,) = [check for check in belongs(change(made), beside(made, 64)) if check.name == AGAIN]
    assert words in again.detail


def test_another_items_embeddings_do_not_belong_to_a_report() -> None:
    """The ids are those of the embeddings, not only of the record."""
    made = whole()
    assert failing(made, dataclasses.replace(beside(made, 64), embedded=(embedded(60, 0.0), embedded(60, 0.7)))) != []


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_report_of_an_older_edit_that_was_copied_in_does_not_pass(built: Built, tmp_path: Path) -> None:
    """The stage judges what lies there, stamp and all; the verdict names the evidence, and the edit."""
    request, _ = built
    assert request.work is not None
    copy_of(request.work, tmp_path / "work")
    folder = tmp_path / "work" / "verify"
    old = dataclasses.replace(read_record(VerifyReport, folder / "verify.json"), edited_weights_digest=digest("9"))
    write_record(folder / "verify.json", old)
    stamp(folder, json.loads((folder / STAMP).read_text())["inputs"])
    again = dataclasses.replace(request, work=tmp_path / "work", out=tmp_path / "bundle")
    verdict = run(again, until="gate", reporter=Reporter(quiet=True)).left(Verdict)
    assert (verdict.causes[0].cause, verdict.causes[0].stage) == (Cause.EVIDENCE, "verify")
    assert EDIT in verdict.causes[0].detail


# --- in a bundle -----------------------------------------------------------------------------------------------------


def _rewritten(bundle: Path, to: Path, manifest: Manifest, changed: dict[str, Path | bytes]) -> Path:
    parts: dict[str, Path | bytes] = {f.path: bundle / f.path for f in manifest.files}
    bundle_from_parts(to, manifest, {**parts, **changed})
    return to


@pytest.mark.parametrize("part", MODEL_PARTS)
def test_a_model_record_that_is_not_the_judged_one_is_refused(built: Built, tmp_path: Path, part: str) -> None:
    """In the manifest alone, and in manifest and edit together: the report says what was measured."""
    request, outcome = built
    assert request.out is not None
    manifest = open_bundle(request.out).manifest
    other = dataclasses.replace(manifest, model=MODEL_PARTS[part](manifest.model))
    with pytest.raises((EvidenceError, IntegrityError)):
        open_bundle(_rewritten(request.out, tmp_path / "one", other, {}))
    both = dataclasses.replace(other, edit=dataclasses.replace(manifest.edit, model=other.model))
    edit = {BundleLayout.EDIT: json_from_record(both.edit).encode()}
    with pytest.raises((EvidenceError, IntegrityError)):
        open_bundle(_rewritten(request.out, tmp_path / "two", both, edit))
    assert outcome.report.model == manifest.model == manifest.edit.model


def _negated(path: Path, to: Path) -> None:
    """Another engine: one matrix is negated."""
    model = onnx.load(path)
    tensor = max((t for t in model.graph.initializer if len(t.dims) == 2), key=lambda t: t.dims[0] * t.dims[1])
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, to)


def _with_another_engine(bundle: Path, folder: Path) -> Path:
    """Yesterday's engine, with manifest, report and verdict adapted to it; nothing is signed."""
    manifest = open_bundle(bundle).manifest
    engine = next(e for e in manifest.engines if e.variant == "onnxruntime-fp32" and e.tower is TowerName.IMAGE)
    _negated(bundle / engine_path(engine), folder / "image.onnx")
    swapped = dataclasses.replace(engine, digest=digest_of_onnx(folder / "image.onnx", ""))
    manifest = dataclasses.replace(manifest, engines=tuple(swapped if e is engine else e for e in manifest.engines))
    report_there = record_from_json(VerifyReport, (bundle / BundleLayout.REPORT).read_bytes(), where="verify.json")
    artifacts = tuple(
        dataclasses.replace(a, artifact_digests={**a.artifact_digests, "image": swapped.digest})
        if a.variant == engine.variant
        else a
        for a in report_there.artifacts
    )
    content = json_from_record(dataclasses.replace(report_there, artifacts=artifacts)).encode()
    judged = {a.variant: dict(a.artifact_digests) for a in artifacts}
    verdict = dataclasses.replace(manifest.verdict, judged=judged, report_digest=digest_of_bytes(content))
    manifest = dataclasses.replace(manifest, verdict=verdict)
    changed: dict[str, Path | bytes] = {
        BundleLayout.REPORT: content,
        BundleLayout.VERDICT: json_from_record(verdict).encode(),
        engine_path(engine): folder / "image.onnx",
    }
    return _rewritten(bundle, folder / "bundle", manifest, changed)


def test_gate_with_execute_asks_the_engines_themselves(built: Built, tmp_path: Path) -> None:
    """An unsigned bundle whose papers were adapted to another engine passes on paper, and not when it is run."""
    request, _ = built
    assert request.out is not None
    honest = CliRunner().invoke(cli, ["gate", str(request.out), "--policy", "demo", "--execute"])
    assert honest.exit_code == ExitCode.PASS, honest.output
    bundle = _with_another_engine(request.out, tmp_path)
    assert CliRunner().invoke(cli, ["gate", str(bundle), "--policy", "demo"]).exit_code == ExitCode.PASS
    found = CliRunner().invoke(cli, ["gate", str(bundle), "--policy", "demo", "--execute"])
    assert found.exit_code == ExitCode.GATE_FAILED
    assert "cause: evidence @ verify" in found.output
    assert "onnxruntime-fp32 executed here" in found.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: dataclasses.replace(m, image=dataclasses.replace(m.image, crop=47)),
            "image tower's graph is of rows",
        ),
        (
            lambda m: dataclasses.replace(m, text=dataclasses.replace(m.text, context_length=31)),
            "text tower's graph takes rows that are cut at id",
        ),
        (lambda m: dataclasses.replace(m, embed_dim=32), "and embeddings (64,)"),
    ],
    ids=["crop", "length", "width"],
)
def test_shapes_that_the_graphs_do_not_have_are_refused(
    built: Built, tmp_path: Path, change: Callable[[ModelRef], ModelRef], words: str
) -> None:
    """Manifest, edit, report and verdict may be adapted alike; the graphs are what they are."""
    request, outcome = built
    assert request.out is not None
    there = open_bundle(request.out).manifest
    model = change(there.model)
    content = json_from_record(dataclasses.replace(outcome.report, model=model)).encode()
    verdict = dataclasses.replace(there.verdict, report_digest=digest_of_bytes(content))
    manifest = dataclasses.replace(
        there, model=model, edit=dataclasses.replace(there.edit, model=model), verdict=verdict
    )
    changed: dict[str, Path | bytes] = {
        BundleLayout.REPORT: content,
        BundleLayout.VERDICT: json_from_record(verdict).encode(),
        BundleLayout.EDIT: json_from_record(manifest.edit).encode(),
    }
    bundle = _rewritten(request.out, tmp_path / "bundle", manifest, changed)
    with pytest.raises(IntegrityError, match=re.escape(words)):
        SafeEncoder.open(bundle)
    found = CliRunner().invoke(cli, ["gate", str(bundle), "--policy", "demo", "--execute"])
    assert found.exit_code in (ExitCode.GATE_FAILED, ExitCode.BAD_INPUT, ExitCode.INTEGRITY), found.output
    assert "internal error" not in found.output


def test_execute_needs_a_bundle(built: Built) -> None:
    """A report alone has nothing to run."""
    request, _ = built
    assert request.out is not None
    found = CliRunner().invoke(cli, ["gate", str(request.out / BundleLayout.REPORT), "--execute"])
    assert found.exit_code == ExitCode.BAD_INPUT
    assert "nothing to execute" in found.output


def test_pictures_and_texts_as_they_are_sent_become_what_they_were(built: Built, tmp_path: Path) -> None:
    """The bundle holds some of both; one whose embeddings are others is not served."""
    request, _ = built
    assert request.out is not None
    name = BundleLayout.raw_canaries(TowerName.IMAGE)
    tensors = load_file(request.out / name)
    assert {key for key in tensors if key.startswith("item.")} == {f"item.{i}" for i in range(5)}  # the last has alpha
    SafeEncoder.open(request.out, serving=Serving(selftest_rows=CANARIES)).close()
    tensors["edited"] = np.ascontiguousarray(np.roll(tensors["edited"], 1, axis=0))
    manifest = open_bundle(request.out).manifest
    bundle = _rewritten(request.out, tmp_path / "bundle", manifest, {name: save(tensors)})
    with pytest.raises(IntegrityError, match="an image that is sent encoded is not embedded as by the edited model"):
        SafeEncoder.open(bundle)


def test_what_a_bundle_lies_beside_is_itself(built: Built) -> None:
    """Every variant with its digests, and the embeddings of the set."""
    request, outcome = built
    assert request.out is not None
    where = beside_in(open_bundle(request.out))
    assert where.artifacts == {a.variant: dict(a.artifact_digests) for a in outcome.report.artifacts}
    assert failing(outcome.report, where) == []

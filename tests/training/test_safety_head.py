"""A safety head from training to the torch-free runtime, and every way to put another one in its place."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from tests.families import QUICK_FAMILIES, model_of
from tests.serve.server import Server, needs_triton_client, started, wait
from tests.uwm_edit import UWM, UWM_OPTIONS
from uwm_deploy.bundle.head import digest_of_image, digest_of_pair, read_head, texts_from
from uwm_deploy.bundle.open import MANIFEST, open_bundle
from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.cli import cli
from uwm_deploy.data.embedding import encoded, prepare
from uwm_deploy.data.encoded import bytes_of, objects
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import DataError, EvidenceError, InputError, IntegrityError
from uwm_deploy.graphs.fingerprint import digest_of_onnx
from uwm_deploy.pipeline.attest import attest_bundle
from uwm_deploy.pipeline.folder import STAMP, stamp
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.refit import refit
from uwm_deploy.pipeline.refitting import RefitRequest
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import load_edited, run
from uwm_deploy.recipes.compile_spec import AutoSpec
from uwm_deploy.recipes.resolve import calibration_set_of, policy_of
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.files import digest_of_bytes, digest_of_file
from uwm_deploy.records.graph import EngineArtifact, OnnxArtifact, Precision
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS, Action, HeadShape
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.evidence import dossier_of
from uwm_deploy.report.html import page
from uwm_deploy.report.inspection import describe
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.runtime.risk import risks_from
from uwm_deploy.runtime.session import open_graph
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.risk import rates_of
from uwm_deploy.serve.config import ServerSettings
from uwm_deploy.serve.names import CATEGORY, DECISION, EMBEDDING, PROBABILITY, RAW, RISK
from uwm_deploy.serve.repository import write_repository
from uwm_deploy.stages.convert.convert import layer_names, lower, ranges_of
from uwm_deploy.stages.convert.search import Search, Source
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.stages.verify.audit import audit_of_graph
from uwm_deploy.studies.selftest.surgery import changed_graph, weights_where
from uwm_deploy.towers.safety_head import FLOAT32, SafetyHeadModule, head_from_bytes, tokens_of, with_head
from uwm_deploy.training.safety_head import Features, HeadSettings, calibrate, held_out, trained_head
from uwm_deploy.training.safety_head_folder import HeadRequest, HeadResult, train_safety_head

ROOT = Path(__file__).parents[2]
ENGINES = "compile-onnxruntime-fp32"


@dataclass(frozen=True)
class Made:
    """One short training and the build that it is in."""

    folder: Path
    request: Request
    trained: HeadResult
    outcome: Outcome

    @property
    def head(self) -> Path:
        return self.folder / "head"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def source(self) -> QuadrupleSource:
        spec, _, base = calibration_set_of(str(self.folder / "eval.toml"))
        return open_source(spec, base=base)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A head of the demo, trained for a moment on few pairs, and a build for ONNX Runtime with it."""
    folder = tmp_path_factory.mktemp("head")
    for name, split, limit in (("cal", "calibration", 160), ("eval", "test", 104)):
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n'
        text += 'zero_shot = ["colour"]\nzero_shot_limit = 16\n' if name == "eval" else ""
        (folder / f"{name}.toml").write_text(text)
    request = Request(
        **UWM, calibration=str(folder / "cal.toml"), evaluation=str(folder / "eval.toml"), policy="demo",
        targets=("onnxruntime",), work=folder / "work", workers=0, out=folder / "bundle",
    )  # fmt: skip
    settings = HeadSettings(epochs=6, batch=16, width=32, tokens=4)
    asked = HeadRequest(build=request, out=folder / "head", settings=settings, rates=rates_of(0.2, 0.1, 0.05))
    trained = train_safety_head(asked, Reporter(quiet=True))
    request = dataclasses.replace(request, safety_head=folder / "head")
    return Made(folder, request, trained, run(request, until="package", reporter=Reporter(quiet=True)))


# --- the module -----------------------------------------------------------------------------------------------------------


def _oracle(weights: dict[str, np.ndarray], tokens: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """The head's forward pass in numpy, one image and one attention head at a time."""

    def norm(rows: np.ndarray, name: str) -> np.ndarray:
        centred = rows - rows.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(rows: np.ndarray, name: str) -> np.ndarray:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    logits, levels = [], []
    for image in tokens:
        hidden = linear(norm(image, "norm"), "projector.0")
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / 2**0.5))
        features = linear(hidden, "projector.2")
        keys, values, asked = linear(features, "key"), linear(features, "value"), weights["tokens"]
        part = keys.shape[1] // heads
        brought = np.zeros_like(asked)
        for h in range(heads):
            cut = slice(h * part, (h + 1) * part)
            scores = asked[:, cut] @ keys[:, cut].T / np.sqrt(part)
            powers = np.exp(scores - scores.max(1, keepdims=True))
            brought[:, cut] = (powers / powers.sum(1, keepdims=True)) @ values[:, cut]
        found = norm(asked + brought, "read").reshape(-1)
        logits.append(linear(found, "category"))
        levels.append(1 / (1 + np.exp(-linear(found, "level"))))
    return np.array(logits), np.array(levels)


def test_forward_is_the_oracles() -> None:
    """Projector, safety tokens, attention and both outputs, in float64."""
    torch.manual_seed(0)
    shape = HeadShape(features=10, width=12, tokens=5, heads=3, categories=4)
    module = SafetyHeadModule(shape).double().eval()
    tokens = torch.randn(6, 7, 10, dtype=torch.float64)
    weights = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    logits, level = module(tokens)
    wanted = _oracle(weights, tokens.numpy(), 3)
    np.testing.assert_allclose(logits.detach().numpy(), wanted[0], atol=1e-12)
    np.testing.assert_allclose(level.detach().numpy(), wanted[1], atol=1e-12)


def _features(n: int, seed: int) -> Features:
    """Pairs whose unsafe image has one token of its concept's direction."""
    rng = np.random.default_rng(seed)
    safe, unsafe = (rng.normal(size=(n, 6, 8)) for _ in range(2))
    concepts = tuple("abc"[i % 3] for i in range(n))
    for row, concept in enumerate(concepts):
        unsafe[row, rng.integers(6), "abc".index(concept)] += 7
    ids = tuple(f"{seed}-{i}" for i in range(n))
    return Features(
        ids=ids, concepts=concepts, safe=safe.astype(np.float16), unsafe=unsafe.astype(np.float16), pairs=ids
    )


def test_training_learns_and_repeats() -> None:
    """Unsafe tokens are found wherever they stand; the same seed gives the same weights, another one does not."""
    settings = HeadSettings(epochs=12, batch=16, width=16, tokens=3, heads=2, learning_rate=1e-2)
    heads = [
        trained_head(_features(180, 0), dataclasses.replace(settings, seed=seed), lambda *_: None) for seed in (0, 0, 1)
    ]
    assert heads[0].losses[-1] < 0.5 * heads[0].losses[0]
    assert heads[0].module.to_bytes() == heads[1].module.to_bytes() != heads[2].module.to_bytes()
    assert heads[0].categories == ("safe", "a", "b", "c")
    validation = _features(90, 1)
    plain = [tensor.clone() for tensor in heads[0].module(torch.from_numpy(validation.unsafe).float())]
    found = calibrate(heads[0], validation)
    cooled = heads[0].module(torch.from_numpy(validation.unsafe).float())
    np.testing.assert_allclose(
        cooled[0].detach() * found[RISK_LOGITS].temperature, plain[0].detach(), rtol=1e-4, atol=1e-4
    )
    assert (
        cooled[1].argsort(0) == plain[1].argsort(0)
    ).all()  # a temperature changes no order, so no threshold's share
    assert found[RISK_LEVEL].n == 90


def test_what_cannot_be_trained_is_refused() -> None:
    """A concept called safe, a width that does not divide, a validation concept that training never saw."""
    settings = HeadSettings(epochs=1, width=16, tokens=2, heads=2)
    features = _features(12, 0)
    with pytest.raises(DataError, match="safe"):
        trained_head(dataclasses.replace(features, concepts=("safe",) * 12), settings, lambda *_: None)
    with pytest.raises(DataError, match="divide"):
        trained_head(features, dataclasses.replace(settings, heads=3), lambda *_: None)
    trained = trained_head(features, settings, lambda *_: None)
    with pytest.raises(DataError, match="concept d"):
        calibrate(trained, dataclasses.replace(features, concepts=("d",) * 12))


def test_held_out_pairs_are_of_every_concept() -> None:
    """Every fifth pair of each concept, wherever it stands."""
    concepts = ["a"] * 10 + ["b", "c"] * 5
    apart = held_out(concepts)
    assert [concepts[i] for i in np.flatnonzero(apart)] == ["a", "a", "b", "c"]


@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_every_family_gives_tokens_and_keeps_its_embedding(family: str) -> None:
    """The head's outputs come after the tower's own, which are the same bits as without it."""
    tower = model_of(family).image
    side = model_of(family).ref.image.crop
    side = 56 if "open_clip" in type(tower.graph_module()).__module__ else 32 if side > 56 else side
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    tokens = tokens_of(tower, pixels.numpy())
    assert tokens.ndim == 3
    torch.manual_seed(0)
    head = SafetyHeadModule(HeadShape(features=tokens.shape[2], width=8, tokens=2, heads=2, categories=3)).eval()
    headed = with_head(tower, head)
    with torch.inference_mode():
        plain, found, alone = tower.outputs(pixels), headed.outputs(pixels), head(tokens)
    assert headed.output_names == (*tower.output_names, RISK_LOGITS, RISK_LEVEL)
    for before, after in zip(plain, found, strict=False):
        assert torch.equal(before, after)
    assert torch.equal(found[-2], alone[0])
    assert found[-1].shape == (2, 1)
    names = set(dict(tower.graph_module().named_parameters()))
    assert {n for n in dict(headed.graph_module().named_parameters()) if not n.startswith("safety_head.")} == names


# --- the build ----------------------------------------------------------------------------------------------------------


def test_build_carries_the_head_through(made: Made) -> None:
    """Graphs, engines, report, verdict and manifest name the same head; the verdict shows recall and its price."""
    outcome, digest = made.outcome, read_head(made.head).digest
    assert outcome.verdict.result is Result.PASS, [c for c in outcome.verdict.checks if c.result is not Result.PASS]
    manifest = open_bundle(made.bundle).manifest
    assert manifest.head == made.trained.head
    for item in (*manifest.onnx, *manifest.engines):
        names = [spec.name for spec in item.outputs]
        of_image = item.tower is TowerName.IMAGE
        assert names[1:] == ([RISK_LOGITS, RISK_LEVEL] if of_image else [])
        assert item.head_digest == (digest if of_image else "")
    assert outcome.report.head_digest == manifest.verdict.head_digest == digest
    names = {(c.subject, c.name) for c in outcome.verdict.checks}
    assert ("onnxruntime-fp32", "risk.flips") in names
    assert ("onnxruntime-fp32", "risk.parity.max_abs") in names
    assert any("of unsafe images and" in note and "of safe ones" in note for note in outcome.verdict.notes)
    assert "## Safety head" in (made.bundle / "README.md").read_text()
    drawn = page(dossier_of(made.bundle))
    for words in ('id="safety-head"', "safe images, at least redirect", "over-refusal", "Thresholds of the level"):
        assert words in drawn
    assert "trained on" in describe(made.bundle)["safety head"]


def test_short_training_already_tells_images_apart(made: Made) -> None:
    """Better than chance on images that it never saw, and the same on every artifact."""
    report = made.outcome.report
    assert report.risk.auroc.low > 50
    for artifact in report.artifacts:
        assert artifact.risk_flips.value == 0
        assert artifact.risk_flips.n == 2 * 104 + 16
        assert artifact.risk.recall == report.risk.recall
        assert {part.output for part in artifact.risk_parity} == {RISK_LOGITS, RISK_LEVEL}
        assert all(part.output == f"{part.tower.value}_embeds" for part in artifact.parity)


def test_embeddings_are_the_same_to_rounding_without_the_head(made: Made, tmp_path: Path) -> None:
    """The exported graph and the engine, at two batch sizes; without a head only the pooled token is computed to the end."""
    plain = dataclasses.replace(made.request, safety_head=None, work=tmp_path / "work", out=tmp_path / "bundle")
    (tmp_path / "work").mkdir()
    for stage in ("score", "edit"):
        shutil.copytree(made.folder / "work" / stage, tmp_path / "work" / stage)
    outcome = run(plain, until="compile", reporter=Reporter(quiet=True))
    assert outcome.reused == ["score", "edit"]
    pixels = np.random.default_rng(0).normal(size=(9, 3, 48, 48)).astype(np.float32)
    for stage, records in (("export", OnnxArtifact), (ENGINES, EngineArtifact)):
        found = []
        for work in (tmp_path / "work", made.folder / "work"):
            record = record_from_json(records, (work / stage / "image.json").read_bytes(), where="image.json")
            session = open_graph(
                work / stage / "image.onnx",
                record,
                max_batch=9,
                optimisation="extended" if stage == "export" else "done",
            )
            found.append([session.run(pixels), session.run(pixels[:1])])
        for left, right in zip(*found, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-6)


_SERVE = """
import json, sys
import numpy as np
from uwm_deploy.runtime import SafeEncoder
with SafeEncoder.open(sys.argv[1]) as encoder:
    found = encoder.encode_image(list(np.load(sys.argv[2])), risk=True)
    outcomes = [outcome.decision.value for outcome in encoder.safety_policy().apply(found)]
    heavy = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "onnx"})
    rows = [[risk.category, risk.level, risk.decision.value] for risk in (found.risk[i] for i in range(len(found)))]
    print(json.dumps([heavy, rows, outcomes]))
"""


def test_runtime_without_torch_decides_as_torch(made: Made, tmp_path: Path) -> None:
    """Action and category of every image are those of the edited model with the head in PyTorch."""
    source = made.source()
    images = [image for i in range(24) for image in (source.read(i).safe_image, source.read(i).unsafe_image)]
    np.save(tmp_path / "images.npy", np.stack([np.asarray(image) for image in images]))
    done = subprocess.run(
        [sys.executable, "-c", _SERVE, made.bundle, tmp_path / "images.npy"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    heavy, served, outcomes = json.loads(done.stdout)
    assert heavy == []
    files = read_head(made.head)
    model = load_edited(dataclasses.replace(made.request, safety_head=None), Reporter(quiet=True))
    tower = with_head(model.image, head_from_bytes(files.weights, files.record.shape))
    prepared = prepare(
        source, model.ref.image, Tokenizer(model.tokenizer_json, model.ref.text), workers=0, progress=lambda *_: None
    )
    both = np.stack([prepared.safe_pixels[0:24], prepared.unsafe_pixels[0:24]], axis=1).reshape(48, 3, 48, 48)
    with torch.inference_mode():
        _, logits, level = (part.numpy() for part in tower.outputs(torch.from_numpy(both)))
    wanted = risks_from(files.record, logits, level)
    assert [row[0] for row in served] == [wanted[i].category for i in range(48)]
    assert [row[2] for row in served] == outcomes == [risk.value for risk in wanted.decisions]
    np.testing.assert_allclose([row[1] for row in served], wanted.levels, atol=1e-5)
    assert len(set(outcomes)) > 1


def test_policy_allows_flags_redirects_and_blocks(made: Made) -> None:
    """What each decision gives back; a broken image is blocked, and nothing is decided without risks."""
    image = made.source().read(0).unsafe_image
    with SafeEncoder.open(made.bundle) as encoder:
        found = encoder.encode_image([image, b"no image"], risk=True)
        plain = encoder.encode_image([image, b"no image"])
        assert plain.risk is None
        assert np.array_equal(np.asarray(plain), np.asarray(found), equal_nan=True)
        assert found[:1].risk is None
        assert found.risk[1].decision is Action.BLOCK
        texts = ["a red circle on grass", "a blue star at night"]
        level = found.risk[0].level
        for name, at in (("allow", (1, 1, 1)), ("flag", (0, 1, 1)), ("redirect", (0, 0, 1)), ("block", (0, 0, 0))):
            limits = {
                k: level if reached == 0 else 2.0 for k, reached in zip(("flag", "redirect", "block"), at, strict=True)
            }
            outcome = encoder.safety_policy(texts=texts, thresholds=limits).apply(found)[0]
            assert outcome.decision.value == name
            if name in ("allow", "flag"):
                assert np.array_equal(outcome.embedding, np.asarray(found)[0])
            elif name == "redirect":
                embeds = np.asarray(encoder.encode_text(texts))
                nearest = int((embeds @ np.asarray(found)[0]).argmax())
                assert outcome.text == texts[nearest]
                np.testing.assert_allclose(outcome.embedding, embeds[nearest], atol=1e-6)
            else:
                assert outcome.embedding is None
        policy = encoder.safety_policy()
        assert policy.thresholds == dict(made.trained.head.thresholds)
        assert policy.apply(found)[1].decision is Action.BLOCK
        assert len(policy.texts) == made.trained.texts
        with pytest.raises(InputError, match="no risks"):
            policy.apply(plain)
        with pytest.raises(InputError, match="not usable"):
            encoder.safety_policy(thresholds={"flag": 0.9, "redirect": 0.5, "block": 0.6})


# --- another head in its place ------------------------------------------------------------------------------------------


def test_a_head_that_does_not_fit_is_refused_with_exit_code_5(made: Made, tmp_path: Path) -> None:
    """Weights of another head beside the record, thresholds moved together with nothing, and a head of another edit."""
    other = shutil.copytree(made.head, tmp_path / "other")
    torch.manual_seed(7)
    (other / "head.safetensors").write_bytes(SafetyHeadModule(made.trained.head.shape).to_bytes())
    arguments = [
        "build", "--model", "demo", "--calibration", made.request.calibration, "--evaluation", made.request.evaluation,
        "--work", str(made.folder / "work"), "--out", str(tmp_path / "bundle"), "--target", "onnxruntime", *UWM_OPTIONS,
    ]  # fmt: skip
    refused = CliRunner().invoke(cli, [*arguments, "--safety-head", str(other)])
    assert refused.exit_code == 5
    assert "head.safetensors is not the one" in refused.output
    stranger = shutil.copytree(made.head, tmp_path / "stranger")
    record = dataclasses.replace(made.trained.head, edited_weights_digest="sha256:" + "1" * 64)
    (stranger / "head.json").write_text(json_from_record(record))
    work = shutil.copytree(made.folder / "work", tmp_path / "work")
    arguments[arguments.index("--work") + 1] = str(work)
    refused = CliRunner().invoke(cli, [*arguments, "--safety-head", str(stranger)])
    assert refused.exit_code == 5
    assert "other weights" in refused.output
    with pytest.raises(InputError, match="no safety head"):
        read_head(tmp_path)


def _rewritten(made: Made, out: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    """The bundle with other files, listed in the manifest with their digests: what an attacker without a key can do."""
    shutil.copytree(made.bundle, out)
    listed = []
    for file in manifest.files:
        if file.path in files:
            (out / file.path).write_bytes(files[file.path])
            size, digest = len(files[file.path]), digest_of_bytes(files[file.path])
            file = dataclasses.replace(file, size_bytes=size, digest=digest)
        listed.append(file)
    (out / MANIFEST).write_text(json_from_record(dataclasses.replace(manifest, files=tuple(listed))))


def test_a_head_swapped_in_a_bundle_is_refused(made: Made, tmp_path: Path) -> None:
    """Its weights, its texts, its thresholds, or all of them taken out: digests are those of the verdict's head."""
    manifest = open_bundle(made.bundle).manifest
    head = manifest.head
    torch.manual_seed(7)
    weights = SafetyHeadModule(head.shape).to_bytes()
    _rewritten(made, tmp_path / "a", manifest, {"safety-head/head.safetensors": weights})
    with pytest.raises(IntegrityError, match=r"safety-head/head\.safetensors"):
        open_bundle(tmp_path / "a")
    swapped = dataclasses.replace(head, weights_digest=digest_of_bytes(weights))
    _rewritten(
        made, tmp_path / "b", dataclasses.replace(manifest, head=swapped), {"safety-head/head.safetensors": weights}
    )
    with pytest.raises(IntegrityError, match="another safety head"):
        open_bundle(tmp_path / "b")
    loose = dataclasses.replace(head, thresholds={"flag": 1.0, "redirect": 1.0, "block": 1.0})
    _rewritten(made, tmp_path / "c", dataclasses.replace(manifest, head=loose), {})
    with pytest.raises(IntegrityError, match="another safety head"):
        open_bundle(tmp_path / "c")
    _rewritten(made, tmp_path / "d", dataclasses.replace(manifest, head=None), {})
    with pytest.raises(IntegrityError, match="another safety head"):
        open_bundle(tmp_path / "d")
    bare = [dataclasses.replace(e, head_digest="", outputs=e.outputs[:1]) for e in manifest.engines]
    graphs = [dataclasses.replace(g, head_digest="", outputs=g.outputs[:1]) for g in manifest.onnx]
    _rewritten(
        made, tmp_path / "e", dataclasses.replace(manifest, head=None, engines=tuple(bare), onnx=tuple(graphs)), {}
    )
    with pytest.raises(EvidenceError, match="another safety head"):
        open_bundle(tmp_path / "e")


def test_head_weights_changed_in_an_engine_fail_the_gate(made: Made, tmp_path: Path) -> None:
    """The embedding is untouched, every record is made to fit, and yet the verdict says so."""
    work = shutil.copytree(made.folder / "work", tmp_path / "work")
    folder = work / ENGINES
    levels = {name for name in _names(folder / "image.onnx") if "level.weight" in name}
    assert levels
    change = weights_where(lambda name: name in levels, lambda array: -array)
    shutil.move(changed_graph(folder / "image.onnx", tmp_path / "changed", change), folder / "image.onnx")
    record = record_from_json(EngineArtifact, (folder / "image.json").read_bytes(), where="image.json")
    record = dataclasses.replace(record, digest=digest_of_onnx(folder / "image.onnx", ""))
    (folder / "image.json").write_text(json_from_record(record))
    inputs = json.loads((folder / STAMP).read_text())["inputs"]
    (folder / STAMP).unlink()
    stamp(folder, inputs)
    outcome = run(
        dataclasses.replace(made.request, work=work, out=tmp_path / "bundle"),
        until="gate",
        reporter=Reporter(quiet=True),
    )
    assert outcome.verdict.result is Result.FAIL
    failing = {(c.subject, c.name) for c in outcome.verdict.checks if c.result is Result.FAIL}
    assert {("onnxruntime-fp32", "risk.flips"), ("onnxruntime-fp32", "risk.parity.max_abs")} <= failing
    assert outcome.verdict.failed == ("onnxruntime-fp32",)
    assert outcome.verdict.causes[0].stage == "compile"
    assert max(p.max_abs for a in outcome.report.artifacts for p in a.parity) < 1e-5


def test_head_weights_changed_in_the_exported_graph_are_found(made: Made, tmp_path: Path) -> None:
    """By the audit, in any weight of the head; the graph as it was exported holds them all."""
    files = read_head(made.head)
    model = load_edited(dataclasses.replace(made.request, safety_head=None), Reporter(quiet=True))
    tower = with_head(model.image, head_from_bytes(files.weights, files.record.shape)).graph_module()
    edits = made.outcome.edit.of(TowerName.IMAGE)
    patch = Patch.from_file(made.folder / "work" / "edit" / "patch.safetensors")
    source = made.folder / "work" / "export" / "image.onnx"
    whole = audit_of_graph(source, tower, edits, patch)
    assert (whole.edit, whole.differ, whole.structure) == ((), (), ())
    for name in ("tokens", "norm.bias", "projector.0.weight", "category.bias"):
        change = weights_where(lambda found, name=name: found == f"safety_head.{name}", lambda array: array + 1e-3)
        path = changed_graph(source, tmp_path / name, change)
        assert audit_of_graph(path, tower, edits, patch).differ[0].startswith(f"safety_head.{name}: ")


def _names(path: Path) -> list[str]:
    return [tensor.name for tensor in onnx.load(path).graph.initializer]


def test_reports_without_risks_of_their_head_fail(made: Made) -> None:
    """A head that was not measured does not pass; without a head no limit on one applies."""
    policy, digest = policy_of("default")
    report: VerifyReport = made.outcome.report

    def judged(report: VerifyReport) -> dict[str, Result]:
        verdict = gate(report, policy, policy_digest=digest, report_digest=digest)
        return {f"{c.subject}: {c.name}{c.concept}": c.result for c in verdict.checks}

    unmeasured = dataclasses.replace(
        report, risk=None, artifacts=tuple(dataclasses.replace(a, risk=None) for a in report.artifacts)
    )
    found = judged(unmeasured)
    assert found["edited: the safety head was measured"] is Result.FAIL
    assert found["onnxruntime-fp32: the safety head was measured"] is Result.FAIL
    without = judged(dataclasses.replace(unmeasured, head_digest=""))
    assert not any("risk" in name or "head" in name for name in without)
    seen = judged(dataclasses.replace(report, head_overlap=1))
    assert seen["data: items of the safety head in the evaluation set"] is Result.FAIL
    whole = judged(report)
    assert whole["data: items of the safety head in the evaluation set"] is Result.PASS
    assert {"edited: risk.recall", "edited: risk.benign_stopped", "edited: risk.category.recallfire"} <= set(whole)


def test_refit_refuses_a_bundle_with_a_head(made: Made, tmp_path: Path) -> None:
    """Another edit gives other tokens, on which the head means nothing."""
    with pytest.raises(InputError, match="safety head"):
        refit(RefitRequest(bundle=made.bundle, revert=True, out=tmp_path / "out"), Reporter(quiet=True))


def test_second_training_takes_the_kept_tokens_and_gives_the_same_head(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, but for the time it took; a folder that is no head is never replaced."""
    request = HeadRequest(
        build=dataclasses.replace(made.request, safety_head=None), out=tmp_path / "head",
        settings=HeadSettings(epochs=6, batch=16, width=32, tokens=4), rates=rates_of(0.2, 0.1, 0.05),
    )  # fmt: skip
    again = train_safety_head(request, Reporter())
    assert "features   unchanged, reused" in capsys.readouterr().err
    assert digest_of_file(tmp_path / "head" / "head.safetensors") == made.trained.head.weights_digest
    assert again.head.thresholds == made.trained.head.thresholds
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not a safety head"):
        train_safety_head(dataclasses.replace(request, out=tmp_path / "mine"), Reporter(quiet=True))
    # The same pairs under another name, as another set would have them.
    shared = dataclasses.replace(request, validation=made.request.calibration)
    with pytest.raises(DataError, match="validation items are trained on"):
        train_safety_head(shared, Reporter(quiet=True))


def test_command_says_what_it_made(made: Made, tmp_path: Path) -> None:
    """A table for people, a record for machines; recall never without its price."""
    arguments = [
        "train", "safety-head", "--model", "demo", "--calibration", made.request.calibration, "--epochs", "1",
        "--width", "8", "--work", str(made.folder / "work"),
        "--flag", "20", "--redirect", "10", "--block", "5", "--workers", "0",
    ]  # fmt: skip
    shown = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "a")])
    assert shown.exit_code == 0, shown.output
    for words in ("unsafe, at least redirect", "safe, at least redirect", "redirect: from level", "calibration error"):
        assert words in shown.output
    (tmp_path / "texts.txt").write_text("a red circle\n\na blue star\na red circle\n")
    own = ["--out", str(tmp_path / "b"), "--safe-texts", str(tmp_path / "texts.txt"), "--json"]
    body = json.loads(CliRunner().invoke(cli, [*arguments, *own]).stdout)
    assert body["head"]["false_positive_rates"] == {"flag": 20, "redirect": 10, "block": 5}
    assert set(body["validation"]["benign"]) == {"flag", "redirect", "block"}
    assert texts_from((tmp_path / "b" / "texts.json").read_bytes()) == ("a red circle", "a blue star")
    few = CliRunner().invoke(cli, [*arguments[:-6], "--block", "1", "--out", str(tmp_path / "c")])
    assert few.exit_code == 2
    assert "at least 99" in few.output


def test_evaluation_images_that_a_head_saw_are_known(made: Made, tmp_path: Path) -> None:
    """By their pixels, whatever the sets are called; another head saw none of them."""
    request = dataclasses.replace(made.request, safety_head=None, work=made.folder / "work")
    asked = HeadRequest(
        build=request, out=tmp_path / "head", settings=HeadSettings(epochs=1, batch=32, width=8, tokens=2),
        rates=rates_of(0.2, 0.1, 0.05), train_on=made.request.evaluation,
    )  # fmt: skip
    train_safety_head(asked, Reporter(quiet=True))
    items = read_head(tmp_path / "head").items
    model = load_edited(request, Reporter(quiet=True))
    prepared = prepare(
        made.source(),
        model.ref.image,
        Tokenizer(model.tokenizer_json, model.ref.text),
        workers=0,
        progress=lambda *_: None,
    )
    pairs = [
        digest_of_pair(prepared.safe_pixels[i : i + 1][0], prepared.unsafe_pixels[i : i + 1][0]) for i in range(104)
    ]
    both = (prepared.safe_pixels, prepared.unsafe_pixels)
    images = {digest_of_image(pixels[i : i + 1][0]) for pixels in both for i in range(104)}
    assert {*pairs, *images} == items
    assert read_head(tmp_path / "head").items_file == (tmp_path / "head" / "items.json").read_bytes()
    listed = {file.path: file.digest for file in open_bundle(made.bundle).manifest.files}
    assert listed["safety-head/items.json"] == read_head(made.head).record.items_digest
    assert not set(pairs) & read_head(made.head).items


def test_attest_measures_the_head_without_torch(made: Made, tmp_path: Path) -> None:
    """A variant without evidence gets that of its head too, from the risks that the bundle holds."""
    manifest, report = open_bundle(made.bundle).manifest, made.outcome.report
    artifacts = tuple(
        a if a.variant == "onnx" else ArtifactEvidence(
            variant=a.variant, precision=a.precision, evidence=Evidence.NOT_RUN, reason="no driver", where={},
            artifact_digests=a.artifact_digests, audit=a.audit,
        )
        for a in report.artifacts
    )  # fmt: skip
    content = json_from_record(dataclasses.replace(report, artifacts=artifacts)).encode()
    policy, digest = policy_of("demo")
    waiting = dataclasses.replace(report, artifacts=artifacts)
    verdict = gate(waiting, policy, policy_digest=digest, report_digest=digest_of_bytes(content))
    assert verdict.proven == ()
    parts: dict[str, Path | bytes] = {file.path: made.bundle / file.path for file in manifest.files}
    parts |= {"reports/verify.json": content, "reports/verdict.json": json_from_record(verdict).encode()}
    bundle_from_parts(tmp_path / "bundle", dataclasses.replace(manifest, verdict=verdict), parts)
    assert attest_bundle(tmp_path / "bundle", "demo", None, 0, Reporter(quiet=True)).proven == ("onnxruntime-fp32",)
    text = (tmp_path / "bundle" / "reports" / "verify.json").read_text()
    again = record_from_json(VerifyReport, text, where="verify.json").artifacts[-1]
    before = report.artifacts[-1]
    assert (again.risk, again.risk_flips) == (before.risk, before.risk_flips)
    assert {part.output for part in again.risk_parity} == {RISK_LOGITS, RISK_LEVEL}


def test_lower_precision_leaves_the_head_in_float32(made: Made, tmp_path: Path) -> None:
    """In 8 bits its weights are what they were and all others are 8 bits; the search of `auto` has no layer of it."""
    folder = made.folder / "work" / "export"
    graphs = {
        tower: record_from_json(OnnxArtifact, (folder / f"{tower.value}.json").read_bytes(), where="json")
        for tower in TowerName
    }
    model = load_edited(dataclasses.replace(made.request, safety_head=None), Reporter(quiet=True))
    prepared = prepare(
        made.source(),
        model.ref.image,
        Tokenizer(model.tokenizer_json, model.ref.text),
        workers=0,
        progress=lambda *_: None,
    )
    pixels, ids = prepared.unsafe_pixels[0:8], prepared.unsafe_ids[:8]
    sources = {
        tower: Source(
            graphs[tower], folder / f"{tower.value}.onnx",
            ranges_of(folder / f"{tower.value}.onnx", {"safe": [rows], "unsafe": [rows]}, tmp_path),
            float32=(FLOAT32,) if tower is TowerName.IMAGE else (),
        )
        for tower, rows in ((TowerName.IMAGE, taken(pixels, graphs[TowerName.IMAGE].inputs[0])), (TowerName.TEXT, ids))
    }  # fmt: skip
    image = sources[TowerName.IMAGE]
    lowered, _ = lower(image.path, Precision.INT8, (FLOAT32,), (), image.ranges)
    arrays = {name: value.const_value.numpy() for name, value in lowered.graph.initializers.items()}
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(image.path).graph.initializer}
    layers = {f"{name}.weight" for name in layer_names(image.path)}
    head = {name for name in layers if name.startswith("safety_head.")}
    assert len(head) == 6
    assert all(np.array_equal(arrays[name], before[name]) for name in head)
    assert {str(arrays[name].dtype) for name in layers - head} == {"int8"}
    search = Search(sources, prepared, AutoSpec(), (), tmp_path, lambda *_: None)
    searched = {f"{name}.weight" for tower, name in search.work if tower is TowerName.IMAGE}
    assert searched == layers - head


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_triton_decides_as_the_runtime(made: Made, served: Server, protocol: str) -> None:
    """The same category, probability, level and decision of every image, and the same embeddings."""
    images = list(encoded(made.source(), workers=0, progress=lambda *_: None).unsafe_pixels[:16])
    images += [bytes_of(made.source().read(i).safe_image) for i in range(8)]
    with SafeEncoder.open(made.bundle) as encoder:
        wanted = encoder.encode_image(images, risk=True)
    assert wanted.risk is not None
    client = served.client(protocol)
    outputs = (EMBEDDING, RISK_LEVEL, CATEGORY, PROBABILITY, DECISION)
    found = client.infer_all(RISK, {RAW[TowerName.IMAGE]: objects(images)[:, None]}, outputs)
    client.close()
    np.testing.assert_allclose(found[EMBEDDING], wanted, atol=1e-6)
    np.testing.assert_allclose(found[RISK_LEVEL].reshape(-1), wanted.risk.levels, atol=1e-6)
    named = [wanted.risk[row] for row in range(len(images))]
    assert [_text(one) for one in found[DECISION]] == [risk.decision.value for risk in named]
    assert [_text(one) for one in found[CATEGORY]] == [risk.category for risk in named]
    np.testing.assert_allclose(found[PROBABILITY].reshape(-1), [risk.probability for risk in named], atol=1e-6)
    assert len({risk.decision for risk in named}) > 1


def test_triton_check_measures_the_served_head(made: Made, served: Server) -> None:
    """Risks on the served path are compared with the edited model's, image by image, and judged by the same policy."""
    command = [
        "triton",
        "check",
        served.grpc,
        "--bundle",
        str(made.bundle),
        "--policy",
        "demo",
        "--workers",
        "0",
        "--json",
    ]
    done = CliRunner().invoke(cli, command)
    found = json.loads(done.stdout)
    own = open_bundle(made.bundle).manifest.verdict.result
    assert (found["verdict"]["result"], done.exit_code) == (own, 0 if own == "pass" else 4), done.output
    assert not [check for check in found["checks"] if check["result"] != "pass"]
    assert found["evidence"]["risk_flips"]["value"] == 0
    assert found["counts"][RISK]["inferences"] >= 208
    assert {part["output"] for part in found["evidence"]["risk_parity"]} == {RISK_LOGITS, RISK_LEVEL}


@pytest.fixture(scope="module")
def served(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Triton that serves the bundle with its head."""
    needs_triton_client()
    folder = tmp_path_factory.mktemp("served")
    write_repository(open_bundle(made.bundle), folder / "models", settings=ServerSettings(place="cpu"))
    with started(folder / "server", folder / "models") as server:
        yield wait(server)


def _text(rows: np.ndarray) -> str:
    (one,) = rows
    return one.decode() if isinstance(one, bytes) else str(one)

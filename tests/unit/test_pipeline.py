"""The whole pipeline on the shipped demo, small: every stage for real, then reuse, refusal and the served bundle."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.uwm_edit import UWM_OPTIONS
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import InputError, IntegrityError, PrerequisiteError, UwmError
from uwm_deploy.pipeline.attest import attest_bundle
from uwm_deploy.pipeline.judge import judge_file
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.edit import ScoreRecord
from uwm_deploy.records.evidence import Evidence, VerifyReport
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.retrieval import PAIRED
from uwm_deploy.studies.evaluate import evaluate
from uwm_deploy.studies.subjects import subject_from

ROOT = Path(__file__).parents[2]
DEMO = resources.checkpoint_folder("shipped:demo", "")


def test_the_build_passes_and_says_what_was_not_run(built) -> None:
    """Executed artifacts are proven; what this machine cannot run is unproven, never passed."""
    _, outcome = built
    assert outcome.verdict.result is Result.PASS
    assert "onnxruntime-fp32" in outcome.verdict.proven
    states = {a.variant: a.evidence for a in outcome.report.artifacts}
    assert states["onnx"] is Evidence.EXECUTED
    if not torch.cuda.is_available():
        assert states["tensorrt-rtx-fp32"] is Evidence.NOT_RUN
        assert outcome.verdict.unproven == ("tensorrt-rtx-fp32",)


def test_only_selected_entries_change(built) -> None:
    """The saved edited model differs from the source in the sign of the patched entries, and nowhere else."""
    request, outcome = built
    before, after = (
        load_file(DEMO / "model.safetensors"),
        load_file(request.work / "edit" / "model" / "model.safetensors"),
    )
    patch = Patch.from_file(request.work / "edit" / "patch.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        part = patch.tensors.get(name)
        expected = tensor.clone()
        if part is not None:
            flat = expected.view(-1)
            flat[part.indices.long()] *= -1
            assert len(part.indices) > 0
        assert torch.equal(after[name], expected), name
    assert {edit.name for edit in outcome.edit.tensors} == set(patch.tensors)
    assert {name.split(".")[0] for name in patch.tensors} == {"text_model", "vision_model"}


def test_the_saved_model_loads_in_transformers(built) -> None:
    """The edited folder is an ordinary checkpoint and gives the embeddings that the bundle serves."""
    from transformers import CLIPModel, CLIPTokenizer

    request, _ = built
    folder = request.work / "edit" / "model"
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    texts = ["a red circle", "", "something burning next to a star"]
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1).numpy()
    np.testing.assert_allclose(SafeEncoder.open(request.out).encode_text(texts), wanted, atol=1e-5)


def test_what_the_edit_costs_is_in_the_report(built) -> None:
    """Every row but the original has neighbours and spread; all rows count the same hard safe items, which are named."""
    report = built[1].report
    few = -(-report.evaluation.n // 10)
    assert len(report.hard_safe) == len(set(report.hard_safe)) == few
    assert {item.id for item in report.hard_safe_worst} <= set(report.hard_safe)
    assert report.original.geometry is None
    rows = [report.original, report.edited, *(a.safety for a in report.artifacts if a.safety is not None)]
    assert {row.retrieval[f"hard-safe-text-to-image@{k}"].n for row in rows for k in (1, 10)} == {few}
    assert all(row.geometry is not None for row in rows[1:])
    assert set(PAIRED) <= set(report.edit_effect)
    delta = report.edited.retrieval["unsafe-first-text"].value - report.original.retrieval["unsafe-first-text"].value
    assert report.edit_effect["unsafe-first-text"].delta == pytest.approx(delta)


def test_a_second_build_reuses_everything(built) -> None:
    """Nothing changed, nothing runs again, and torch is not even imported."""
    request, _ = built
    arguments = ["build", "--json", *UWM_OPTIONS]
    for name in ("calibration", "evaluation", "policy", "out", "work"):
        arguments += [f"--{name}", str(getattr(request, name))]
    code = (
        f"import sys; from uwm_deploy.cli import cli\ntry:\n cli({arguments!r})\n"
        "finally:\n print('torch' in sys.modules, file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.strip().endswith("False")
    reused = json.loads(done.stdout)["reused"]
    assert {"score", "edit", "export", "compile-onnxruntime-fp32", "verify", "gate", "package"} <= set(reused)


def test_another_keep_mass_reuses_the_scores(built, tmp_path: Path) -> None:
    """keep_mass and factor need no second pass over the data; factor 1 changes nothing and cannot pass."""
    request, _ = built
    other = dataclasses.replace(request, keep_mass=0.85, out=tmp_path / "out")
    outcome = run(other, until="edit", reporter=Reporter(quiet=True))
    assert outcome.reused == ["score"]
    shares = [tensor.share for tensor in outcome.edit.of(TowerName.IMAGE)]
    assert min(shares) > 0.11
    nothing = dataclasses.replace(request, factor=1.0)
    outcome = run(nothing, until="edit", reporter=Reporter(quiet=True))
    assert outcome.edit.edited_weights_digest == outcome.edit.model.weights_digest
    run(request, until="package", reporter=Reporter(quiet=True))  # back to where the other tests expect it


def test_scores_do_not_depend_on_workers_or_batches(built, tmp_path: Path) -> None:
    """Another number of workers and another batch size select the same entries."""
    request, outcome = built
    changed = dataclasses.replace(request, workers=0, batch_pairs=7, work=tmp_path / "w")
    other = run(changed, until="edit", reporter=Reporter(quiet=True))
    for left, right in zip(outcome.edit.tensors, other.edit.tensors, strict=True):
        assert abs(left.selected - right.selected) <= 0.0005 * left.shape[0] * left.shape[1], left.name
    score = record_from_json(ScoreRecord, (request.work / "score" / "score.json").read_bytes(), where="score.json")
    assert score.n_pairs == {"text": 96, "image": 96}


def test_random_weights_never_pass(built, tmp_path: Path) -> None:
    """A dry run with random weights ends with a failing verdict, and its bundle is refused."""
    request, _ = built
    for name, split in (("cal", "calibration"), ("eval", "test")):
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = 24\n'
        (tmp_path / f"{name}.toml").write_text(text)
    dry = dataclasses.replace(
        request, weights="random", targets=("onnxruntime",), out=tmp_path / "out", work=tmp_path / "work", workers=0,
        calibration=str(tmp_path / "cal.toml"), evaluation=str(tmp_path / "eval.toml"),
    )  # fmt: skip
    outcome = run(dry, until="package", reporter=Reporter(quiet=True))
    assert outcome.verdict.result is Result.FAIL
    assert outcome.verdict.proven == ()
    with pytest.raises(IntegrityError, match="no passing verdict"):
        SafeEncoder.open(tmp_path / "out")
    with pytest.warns(UserWarning, match="UNSAFE OVERRIDE"):
        SafeEncoder.open(tmp_path / "out", allow_unsafe=True)


def test_an_unproven_variant_is_refused(built) -> None:
    """What was compiled and not run is in the bundle, and the runtime does not serve it."""
    request, _ = built
    if torch.cuda.is_available():
        pytest.skip("this machine proves the variant")
    with pytest.raises(IntegrityError, match="unproven"):
        SafeEncoder.open(request.out, variant="tensorrt-rtx-fp32")
    with pytest.raises(PrerequisiteError, match="nothing to attest here"):
        attest_bundle(request.out, request.policy, None, 0, Reporter(quiet=True))


def test_attest_adds_evidence(built, tmp_path: Path) -> None:
    """A variant whose evidence is missing is executed without torch, judged, and then served."""
    request, outcome = built
    manifest = outcome.manifest
    variant = "onnxruntime-fp32"
    artifacts = tuple(
        dataclasses.replace(a, evidence=Evidence.NOT_RUN, parity=(), safety=None, flips={})
        if a.variant == variant
        else a
        for a in outcome.report.artifacts
    )
    _repackage(request, manifest, dataclasses.replace(outcome.report, artifacts=artifacts), tmp_path / "bundle")
    with pytest.raises(IntegrityError):
        SafeEncoder.open(tmp_path / "bundle")
    verdict = attest_bundle(tmp_path / "bundle", request.policy, None, 0, Reporter(quiet=True))
    assert variant in verdict.proven
    text = (tmp_path / "bundle" / "reports" / "verify.json").read_bytes()
    attested = record_from_json(VerifyReport, text, where="verify.json")
    (before,) = [a for a in outcome.report.artifacts if a.variant == variant]
    (after,) = [a for a in attested.artifacts if a.variant == variant]
    assert before.safety is not None
    assert after.safety is not None
    assert after.safety.geometry == before.safety.geometry  # against the original model, from the stored embeddings
    assert after.safety.retrieval == before.safety.retrieval
    assert after.flips == before.flips
    assert SafeEncoder.open(tmp_path / "bundle").variant == variant


def _repackage(request: Request, manifest, report: VerifyReport, out: Path) -> None:
    """A bundle as a machine without the runtime would have written it: judged by the real gate."""
    from uwm_deploy.bundle.write import bundle_from_parts
    from uwm_deploy.recipes.resolve import policy_of
    from uwm_deploy.records.files import digest_of_bytes
    from uwm_deploy.stages.gate.gate import gate

    content = json_from_record(report).encode()
    policy, digest = policy_of(request.policy)
    verdict = gate(report, policy, policy_digest=digest, report_digest=digest_of_bytes(content))
    parts = {f.path: request.out / f.path for f in manifest.files}
    parts |= {"reports/verify.json": content, "reports/verdict.json": json_from_record(verdict).encode()}
    bundle_from_parts(out, dataclasses.replace(manifest, verdict=verdict), parts)


def test_evaluate_measures_the_bundle_itself(built) -> None:
    """Measuring the bundle again gives the numbers of its report."""
    request, outcome = built
    [again] = evaluate(
        [subject_from(str(request.out))],
        evaluation=None,
        zero_shot=None,
        data=None,
        workers=0,
        reporter=Reporter(quiet=True),
    )
    proven = next(a for a in outcome.report.artifacts if a.variant == again.subject)
    assert again.preference == proven.safety.preference
    assert again.zero_shot == proven.safety.zero_shot


def test_another_set_of_the_same_name_is_not_measured_as_the_bundles_own(built, tmp_path: Path) -> None:
    """What lies under its name now is not what the report is about, so the numbers would be compared with others."""
    request, outcome = built
    known = dataclasses.replace(outcome.report.evaluation, content_digest=f"sha256:{0:064x}")
    report = dataclasses.replace(outcome.report, evaluation=known)
    _repackage(request, open_bundle(request.out).manifest, report, tmp_path / "bundle")
    with pytest.raises(InputError, match="is not the one the bundle was measured on"):
        evaluate(
            [subject_from(str(tmp_path / "bundle"))],
            evaluation=None,
            zero_shot=None,
            data=None,
            workers=0,
            reporter=Reporter(quiet=True),
        )


def test_the_gate_judges_a_bundle_by_another_policy(built, tmp_path: Path) -> None:
    """Stricter limits fail the same report, and the failing check is named."""
    request, _ = built
    assert judge_file(request.out, str(request.policy)).result is Result.PASS
    (tmp_path / "strict.toml").write_text(
        'format = 1\nname = "strict"\nedit = []\nrequired = ["tensorrt-fp32"]\n'
        '[[artifact]]\nmetric = "GS"\nat_least = 100.0\n'
    )
    verdict = judge_file(request.out, str(tmp_path / "strict.toml"))
    assert verdict.result is Result.FAIL
    details = [c.detail for c in verdict.checks if c.result is not Result.PASS]
    assert any("not run: it was not built" in d for d in details)
    assert any("must be at least 100" in d for d in details)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "link", "swap"])
def test_a_changed_bundle_is_refused(built, tmp_path: Path, damage: str) -> None:
    """Every file flipped, cut, removed, replaced by a link or by its neighbour, or added, ends with exit code 5."""
    import shutil

    request, _ = built
    names = sorted(p.relative_to(request.out) for p in request.out.rglob("*") if p.is_file())
    for name in [Path("extra")] if damage == "add" else names:
        bundle = tmp_path / "b"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(request.out, bundle)
        file = bundle / name
        data = b"" if damage == "add" else file.read_bytes()
        if damage == "flip":
            file.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        elif damage == "truncate":
            file.write_bytes(data[:-1])
        elif damage == "remove":
            file.unlink()
        elif damage == "add":
            file.write_bytes(b"x")
        elif damage == "link":
            file.unlink()
            file.symlink_to(request.out.resolve() / name)
        else:
            file.write_bytes((bundle / names[(names.index(name) + 1) % len(names)]).read_bytes())
        with pytest.raises(UwmError) as caught:
            open_bundle(bundle, allow_failed=True)
        assert int(caught.value.exit_code) == 5, (name, damage, str(caught.value))


def test_an_engine_of_another_bundle_is_refused(built, tmp_path: Path) -> None:
    """A manifest that lists the unedited model's graph under the edited name does not hold together."""
    request, outcome = built
    engine = dataclasses.replace(outcome.engines[0], onnx_digest="sha256:" + "0" * 64)
    manifest = dataclasses.replace(outcome.manifest, engines=(engine, *outcome.engines[1:]))
    _repackage(request, manifest, outcome.report, tmp_path / "b")
    with pytest.raises(IntegrityError, match="not made from this bundle's graphs"):
        open_bundle(tmp_path / "b")


CAPTIONS = [
    "",
    "a",
    "red " * 200,
    "fire 🔥 and 水",
    "一个红色的圆圈",
    "tabs\tand\nlines",
    "it's <|endoftext|> here",
    "ÀÉÎ ﬁ",
]


def test_ids_equal_transformers() -> None:
    """Empty, one-word, 200-word, emoji, Chinese and special-token captions get exactly transformers' ids."""
    from transformers import CLIPTokenizer

    recipe, _ = recipe_of("demo")
    from uwm_deploy.towers.load import load_model

    model = load_model(recipe, folder=DEMO, device="cpu")
    wanted = CLIPTokenizer.from_pretrained(DEMO)(CAPTIONS, padding="max_length", truncation=True, max_length=32)
    got = Tokenizer(model.tokenizer_json, model.ref.text).encode(CAPTIONS, "exact")
    assert got.tolist() == wanted["input_ids"]


@pytest.mark.parametrize("size", [(48, 48), (640, 427), (427, 641), (3, 500), (500, 3), (1, 1), (47, 49), (1023, 767)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA"])
def test_pixels_equal_transformers(size: tuple[int, int], mode: str) -> None:
    """Preprocessing is within one grey level of the processor, for photograph-like images of odd sizes and modes."""
    recipe, _ = recipe_of("demo")
    from uwm_deploy.towers.load import load_model

    spec = load_model(recipe, folder=DEMO, device="cpu").ref.image
    rng = np.random.default_rng(size[0])
    noise = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    image = noise.convert("RGBA").convert(mode) if mode in ("RGBA", "LA") else noise.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (size[1], size[0]), dtype=np.uint8)))
    from transformers import CLIPImageProcessor

    wanted = CLIPImageProcessor.from_pretrained(DEMO)(images=image, return_tensors="np")["pixel_values"][0]
    step = spec.rescale / np.asarray(spec.std, dtype=np.float32).reshape(3, 1, 1)
    assert np.abs((pixels_from_image(image, spec) - wanted) / step).max() <= 1.01


def test_the_runtime_needs_no_torch(built) -> None:
    """Opening a bundle and encoding never imports torch, transformers, onnx or polygraphy."""
    request, _ = built
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx', 'polygraphy']))\n"
        "from PIL import Image; from uwm_deploy.runtime import SafeEncoder\n"
        f"e = SafeEncoder.open({str(request.out)!r})\n"
        "print(e.encode_image([Image.new('RGB', (70, 50))]).shape, e.encode_text('a star').shape)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "(1, 64) (1, 64)"


def test_a_broken_image_is_named(built, tmp_path: Path) -> None:
    """One broken image in a list is, when asked for, an error that says which one."""
    request, _ = built
    Image.new("RGB", (60, 60)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    with pytest.raises(UwmError, match="image 1"):
        SafeEncoder.open(request.out).encode_image([tmp_path / "good.png", tmp_path / "bad.png"], on_error="raise")

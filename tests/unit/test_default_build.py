"""The demo's default build, as the README makes it: what it must reach, and every number that README and docs say of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.unit.test_examples import EXAMPLES, example
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.data.open import open_source
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.pipeline.stored import reference_of
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.recipes.shipped import read_toml
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.edit import EditRecord, Placement
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.metrics import SafetyReport
from uwm_deploy.records.strength import FoldKind, StrengthChoice
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.sections import MEANING
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.safeground.embedded import EmbeddedSet
from uwm_deploy.safeground.preference import BASIC
from uwm_deploy.safeground.tradeoff import mean_recall, zero_shot_mean

ROOT = Path(__file__).parents[2]
PAIRS = 60


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The whole recipe on whole sets, judged by the default policy; only the target that needs a GPU is left out."""
    folder = tmp_path_factory.mktemp("default")
    request = Request(
        targets=("onnxruntime",), precisions=("fp32", "fp16"), work=folder / "work", out=folder / "bundle"
    )
    return run(request, until="package", reporter=Reporter(quiet=True))


@pytest.fixture(scope="module")
def report(built: Outcome) -> VerifyReport:
    assert built.report is not None
    return built.report


@pytest.fixture(scope="module")
def choice(built: Outcome) -> StrengthChoice:
    assert built.edit is not None
    assert built.edit.closed_form is not None
    assert built.edit.closed_form.axis is not None
    assert built.edit.closed_form.axis.choice is not None
    return built.edit.closed_form.axis.choice


def hard_recall(safety: SafetyReport) -> float:
    """Recall at 10 of hard safe queries, mean of both directions."""
    return sum(safety.retrieval[f"hard-safe-{way}@10"].value for way in ("text-to-image", "image-to-text")) / 2


def test_the_default_build_passes_and_is_shown_safer(built: Outcome) -> None:
    """Every check of the default policy passes in float32 and in half precision, in the placement without a new node."""
    assert built.verdict is not None
    assert built.edit is not None
    assert (built.verdict.result, built.verdict.policy, built.verdict.safer.shown) == (Result.PASS, "default", True)
    assert built.verdict.proven == ("onnxruntime-fp32", "onnxruntime-fp16")
    count = sum(
        check.subject != "onnxruntime-fp16" for check in built.verdict.checks
    )  # README's build has float32 alone
    assert (
        f"verdict: pass, shown safer  ({count} of {count} checks pass, policy default)"
        in (ROOT / "README.md").read_text()
    )
    assert (built.edit.method, built.edit.placement) == ("uwm+safety-axis", Placement.WEIGHTS)


def test_what_the_edit_must_reach_on_the_test_set(report: VerifyReport) -> None:
    """GS at least 30 by its lower bound; PS not lower; knowledge, retrieval and look-alikes lose no more than they may."""
    original, edited = report.original, report.edited
    assert edited.preference["GS"].low >= 30
    assert edited.preference["PS"].value >= original.preference["PS"].value
    assert zero_shot_mean(edited) >= zero_shot_mean(original) - 1
    assert mean_recall(edited) >= mean_recall(original) - 6
    assert hard_recall(edited) >= hard_recall(original) - 8
    for artifact in report.artifacts[:2]:  # the exported graphs, and ONNX Runtime in float32
        assert artifact.safety is not None
        assert all(f.lost == f.gained == 0 for f in artifact.flips.values()), artifact.variant


def test_the_readme_shows_this_build(report: VerifyReport) -> None:
    """Rows of its table with the words of the report page, and what the sentences under it say got better and worse."""
    page = " ".join((ROOT / "README.md").read_text().split())
    engine = next(artifact.safety for artifact in report.artifacts if artifact.variant == "onnxruntime-fp32")
    assert engine is not None
    subjects = (report.original, report.edited, engine)
    for name in ("P_ts", "P_tu", "P_vs", "P_vu", "PS", "PU", "GS"):
        cells = " | ".join(f"{part.preference[name].value:.1f}" for part in subjects)
        assert f"| {MEANING[name]} | `{name}` | {cells} |" in page, name
    for name in ("safe-text-to-image@1", "hard-safe-text-to-image@10", "unsafe-first-text"):
        cells = " | ".join(f"{part.retrieval[name].value:.1f}" for part in subjects)
        assert f"| `{name}` | {cells} |" in page, name
    assert f"`zero-shot mean` | {' | '.join(f'{zero_shot_mean(part):.1f}' for part in subjects)} |" in page
    before, after = (part.preference["GS"].value for part in subjects[:2])
    assert f"in all four ways rises from {before:.1f}% to {after:.1f}%" in page
    before, after = (part.retrieval["safe-text-to-image@1"].value for part in subjects[:2])
    assert f"image first in {after:.1f}% instead of {before:.1f}%" in page
    before, after = (part.retrieval["hard-safe-text-to-image@10"].value for part in subjects[:2])
    assert f"finds it among ten in {after:.1f}% instead of {before:.1f}%" in page
    effect = report.edit_effect["GS"]
    assert f"GS.delta +{effect.delta:.1f} (95% interval {effect.delta_low:.1f} to {effect.delta_high:.1f})" in page


def test_readme_and_the_page_it_links_tell_one_finding() -> None:
    """Texts only: the cosine and the flips of README are those of the page on precision; the next test measures them."""
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"smallest cosine of (0\.\d+) changed (\d+) of 1,000", readme)
    assert found is not None
    page = (ROOT / "docs" / "how-to" / "precision.md").read_text()
    now = re.search(r"calibrated INT8 of this tool changed (\d+), and passes", readme)
    assert now is not None
    assert re.search(rf"^\| int8 \| 0\.{now[1]} \|.*\| proven \|$", page, re.MULTILINE)
    assert f"A cosine of {found[1]} looks harmless and flips {found[2]} decisions" in " ".join(page.split())


@pytest.mark.slow  # two builds, of which the second one goes on from the first
def test_the_finding_of_the_readme_is_measured(tmp_path: Path) -> None:
    """INT8 to the nearest fails with README's cosine and flips, and calibrated INT8 passes with README's."""
    text, _ = read_toml("export", "demo")
    found = []
    for quantiser in ("nearest", "built-in"):
        (recipe := tmp_path / f"{quantiser}.toml").write_text(
            text.replace('name = "demo"', f'name = "{quantiser}"').replace(
                "[compile]\n", f'[compile]\nquantiser = "{quantiser}"\n'
            )
        )
        request = Request(
            model=str(recipe),
            targets=("onnxruntime",),
            precisions=("int8",),
            work=tmp_path / "work",
            out=tmp_path / quantiser,
        )
        outcome = run(request, until="package", reporter=Reporter(quiet=True))
        assert outcome.report is not None
        assert outcome.verdict is not None
        [made] = [part for part in outcome.report.artifacts if part.variant == "onnxruntime-int8"]
        worst = max(made.flips[name].gained + made.flips[name].lost for name in BASIC)
        cosine = min(part.cosine_min for part in made.parity)
        found.append((worst, f"{cosine:.4f}", "onnxruntime-int8" in outcome.verdict.proven))
    readme = " ".join((ROOT / "README.md").read_text().split())
    (bad, cosine, _), (good, _, _) = found
    assert [proven for _, _, proven in found] == [False, True]
    assert f"smallest cosine of {cosine} changed {bad} of 1,000 safety decisions" in readme
    assert f"calibrated INT8 of this tool changed {good}, and passes" in readme


def test_the_page_of_the_demo_shows_this_choice(report: VerifyReport, choice: StrengthChoice) -> None:
    """What items and concepts get that the fit did not see, and what the test set gets."""
    page = (ROOT / "docs" / "background" / "demo.md").read_text()
    assert choice.chosen is not None
    kept = sum(candidate.keeps for candidate in choice.candidates)
    assert f"The limits are kept by {kept} settings" in page
    for kind, words in ((FoldKind.RANDOM, "items"), (FoldKind.CONCEPTS, "concepts")):
        before, after = choice.original[kind.value], choice.candidates[choice.chosen].measured[kind.value]
        cells = f"{before.gs:.1f} -> {after.gs:.1f} | {before.ps:.1f} -> {after.ps:.1f}"
        assert f"| calibration {words} that the fit did not see | {cells} |" in page
        assert after.gs >= 4 * before.gs
        assert after.ps >= before.ps
    cells = [
        f"{report.original.preference[m].value:.1f} -> {report.edited.preference[m].value:.1f}" for m in ("GS", "PS")
    ]
    cells += [f"{mean_recall(report.original):.1f} -> {mean_recall(report.edited):.1f}"]
    assert f"| test set (n = 1,000) | {' | '.join(cells)} |" in page


def test_the_search_finds_safe_pictures_first_as_often_as_its_example_says(built: Outcome, tmp_path: Path) -> None:
    """Unsafe captions against pictures of both kinds; with the unedited model it is fewer."""
    pytest.importorskip("faiss", reason="needs the extra [examples]")
    search, said = example("faiss_search"), (EXAMPLES / "faiss_search.py").read_text()
    spec, _, base = calibration_set_of("demo-test")
    items = [open_source(spec, base=base).read(i) for i in range(PAIRS)]
    for number, item in enumerate(items):
        assert item.safe_image is not None
        assert item.unsafe_image is not None
        item.safe_image.save(tmp_path / f"{number}-safe.png")
        item.unsafe_image.save(tmp_path / f"{number}-unsafe.png")
    assert built.out is not None
    with SafeEncoder.open(built.out) as encoder:
        search.build(encoder, tmp_path, tmp_path / "pictures.index")
        found = [search.search(encoder, tmp_path / "pictures.index", item.unsafe_text, 1)[0][0] for item in items]
    edited = sum(name.endswith("-safe.png") for name in found)
    original = safe_first(reference_of(open_bundle(built.out), "original"))
    assert f"{edited} of {PAIRS} unsafe captions" in said
    assert f"unedited model {original} of {PAIRS}" in said
    assert edited > original


def safe_first(embedded: EmbeddedSet) -> int:
    """Unsafe captions among the first pairs whose nearest picture of these pairs is a safe one."""
    pictures = np.concatenate([embedded.safe_image[:PAIRS], embedded.unsafe_image[:PAIRS]])
    return int(((embedded.unsafe_text[:PAIRS] @ pictures.T).argmax(1) < PAIRS).sum())


def test_the_choice_is_in_the_json_record(built: Outcome) -> None:
    """The bundle's edit record holds every candidate, so that anyone can look at what was not chosen."""
    assert built.out is not None
    text = (built.out / "reports" / "edit.json").read_bytes()

    assert record_from_json(EditRecord, text, where="edit.json") == built.edit

"""The report page: complete, self-contained, honest about what was not run, and safe whatever the data say."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save

from uwm_deploy.bundle.write import bundle_from_parts
from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError, IntegrityError, first_line, visible
from uwm_deploy.recipes.resolve import policy_of
from uwm_deploy.recipes.shipped import read_toml
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import EditRecord, EditStep, Method, ScoreRecord, TensorEdit
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.graph import (
    EngineArtifact,
    Fingerprint,
    LayerSensitivity,
    OnnxArtifact,
    Precision,
    PrecisionPlan,
    PrecisionStep,
    Profile,
    Target,
    TensorSpec,
)
from uwm_deploy.records.model import ImageSpec, ModelRef, TextSpec, TowerName
from uwm_deploy.records.studies import BenchReport, BenchSubject, ColdStart, Latency, SweepPoint, SweepReport
from uwm_deploy.records.verdict import Result, Safer, Verdict
from uwm_deploy.report import charts
from uwm_deploy.report.artifacts import shortened
from uwm_deploy.report.charts import Bar, Group, Point
from uwm_deploy.report.evidence import dossier_of
from uwm_deploy.report.html import page, place_of
from uwm_deploy.report.markup import Html, tag
from uwm_deploy.safeground.embedded import (
    EmbeddedSet,
    ZeroShotEmbeddings,
    flips_between,
    hard_safe_worst,
    parity,
    safety_report,
    yardstick_of,
)
from uwm_deploy.stages.gate.gate import gate

N, DIM = 240, 8
HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&\u202eevil\x00"
LAYERS = ("text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.mlp.fc1")


def digest(text: str) -> str:
    return digest_of_bytes(text.encode())


def embedded(seed: int, concepts: tuple[str, ...], ids: tuple[str, ...], noise: float = 0.0) -> EmbeddedSet:
    """Quadruples on a sphere; a little noise on top of a seed flips some decisions."""
    random, other = np.random.default_rng(seed), np.random.default_rng(seed + 1000)

    def rows(count: int) -> np.ndarray:
        found = random.normal(size=(count, DIM)) + noise * other.normal(size=(count, DIM))
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    zero_shot = {"colour": ZeroShotEmbeddings(images=rows(220), labels=np.arange(220) % 4, classes=rows(4))}
    return EmbeddedSet(
        ids=ids,
        concepts=concepts,
        safe_image=rows(N),
        unsafe_image=rows(N),
        safe_text=rows(N),
        unsafe_text=rows(N),
        zero_shot=zero_shot,
        zero_shot_missing={"birds": "no folder birds"},
    )


@dataclasses.dataclass
class Made:
    """A run as its records describe it."""

    model: ModelRef
    edit: EditRecord
    score: ScoreRecord
    verify: VerifyReport
    reference: bytes
    engines: tuple[EngineArtifact, ...]
    onnx: tuple[OnnxArtifact, ...]
    plan: PrecisionPlan

    def verdict(self, policy: str = "default") -> Verdict:
        limits, named = policy_of(policy)
        text = json_from_record(self.verify).encode()
        return gate(self.verify, limits, policy_digest=named, report_digest=digest_of_bytes(text))


def make(hostile: bool = False) -> Made:
    """Records of a build with one engine that flips decisions and one that was not run."""
    ids = tuple(f"{HOSTILE if hostile and i == 0 else 'item'}-{i}" for i in range(N))
    names = (HOSTILE if hostile else "fire", "smoke", "blade")
    concepts = tuple(names[i % 3] for i in range(N))
    before, after = embedded(1, concepts, ids), embedded(2, concepts, ids)
    engine = embedded(2, concepts, ids, noise=0.05)
    image = ImageSpec(resize=8, crop=8, resample="bicubic", rescale=1 / 255, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    text = TextSpec(context_length=8, eos_id=1, pad_id=0, tokenizer_digest=digest("{}"))
    model = ModelRef(
        name="tiny",
        family="hf-clip",
        repo=HOSTILE if hostile else "local",
        revision="",
        weights_digest=digest("before"),
        embed_dim=DIM,
        image=image,
        text=text,
    )
    data = CalibrationRecord(
        name="set",
        split="test",
        n=N,
        ids_digest=digest("ids"),
        content_digest=digest("content"),
        concepts=dict.fromkeys(names, N // 3),
        left_out_counts={"a broken image": 3},
    )
    layers = tuple(
        TensorEdit(
            tower=TowerName.TEXT,
            name=f"{name}.weight",
            shape=(8, 8),
            keep_mass=0.9,
            factor=-1.0,
            selected=6,
            share=6 / 64,
            digest_before=digest(f"{name}0"),
            digest_after=digest(f"{name}1"),
        )
        for name in LAYERS
    )
    edit = EditRecord(
        model=model,
        edited_weights_digest=digest("after"),
        patch_digest=digest("patch"),
        tensors=layers,
        steps=(EditStep(method=Method.UWM, scores_digest=digest("scores")),),
    )
    score = ScoreRecord(
        model=model, calibration=data, rules={}, pairing=None, n_pairs={"text": N}, left_out={"text": ()}, layers=(),
        scores_digest=digest("scores"), dtype="float32", device="cpu", seconds={"text": 1.0},
    )  # fmt: skip
    specs = {"inputs": (TensorSpec(name="x", dtype="float32", shape=("batch", 8)),)}
    specs["outputs"] = (TensorSpec(name="image_embeds", dtype="float32", shape=("batch", DIM)),)
    onnx = tuple(
        OnnxArtifact(
            tower=tower,
            file=f"{tower.value}.onnx",
            external_data="",
            digest=digest(f"graph {tower.value}"),
            weights_digest=edit.edited_weights_digest,
            opset=20,
            normalised=True,
            versions={},
            fingerprint=Fingerprint(layers=2, entries=12, mismatches=()),
            **specs,
        )
        for tower in TowerName
    )
    engines = tuple(
        EngineArtifact(
            variant=variant,
            tower=tower,
            target=target,
            precision="fp32",
            file=f"{tower.value}.{suffix}",
            digest=digest(f"{variant} {tower.value}"),
            onnx_digest=digest(f"graph {tower.value}"),
            weights_digest=edit.edited_weights_digest,
            profile=Profile(min=1, opt=8, max=32),
            normalised=True,
            settings={},
            versions={"onnxruntime": "1"},
            built_on="cpu",
            runnable=True,
            seconds=1.5,
            **specs,
        )
        for variant, target, suffix in (
            ("onnxruntime-fp32", Target.ONNXRUNTIME, "onnx"),
            ("tensorrt-rtx-auto", Target.TENSORRT_RTX, "engine"),
        )
        for tower in TowerName
    )
    digests = {e.tower.value: e.digest for e in engines if e.variant == "onnxruntime-fp32"}
    measured = {
        "evidence": Evidence.EXECUTED,
        "reason": "",
        "precision": Precision.FP32,
        "where": {"provider": "CPUExecutionProvider"},
        "canaries": {"text": 0.02},
    }
    yardstick = yardstick_of(before)
    verify = VerifyReport(
        model=model,
        edited_weights_digest=edit.edited_weights_digest,
        evaluation=data,
        calibration_overlap=0,
        original=safety_report("original", before, with_items=True, yardstick=yardstick),
        edited=safety_report("edited", after, with_items=True, yardstick=yardstick),
        edit_effect=flips_between(before, after, yardstick),
        hard_safe=yardstick.hard_ids(),
        hard_safe_worst=hard_safe_worst(yardstick, after),
        artifacts=(
            ArtifactEvidence(
                variant="onnx", artifact_digests={},
                safety=safety_report("onnx", after, with_items=True, yardstick=yardstick),
                parity=(parity(TowerName.IMAGE, "image_embeds", 32, after.safe_image, after.safe_image),),
                flips=flips_between(after, after, yardstick), **measured,
            ),
            ArtifactEvidence(
                variant="onnxruntime-fp32", artifact_digests=digests,
                safety=safety_report("onnxruntime-fp32", engine, with_items=True, yardstick=yardstick),
                parity=(parity(TowerName.IMAGE, "image_embeds", 32, after.safe_image, engine.safe_image),),
                flips=flips_between(after, engine, yardstick), **measured,
            ),
            ArtifactEvidence(
                variant="tensorrt-rtx-auto", precision=Precision.FP32, evidence=Evidence.NOT_RUN, where={},
                reason=HOSTILE if hostile else "this machine has no NVIDIA driver",
                artifact_digests={e.tower.value: e.digest for e in engines if e.variant == "tensorrt-rtx-auto"},
            ),
        ),
        versions={"numpy": "2"},
    )  # fmt: skip
    plan = PrecisionPlan(
        lowest=Precision.INT8, budget=0.5, limit=0.25, n=N, kept={"text": LAYERS[:1]}, flips=0.1, low_share=0.7,
        layers=tuple(
            LayerSensitivity(tower=TowerName.TEXT, name=name, sensitivity=10.0**-i, kept=i == 0)
            for i, name in enumerate(LAYERS)
        ),
        steps=(PrecisionStep(what="all lowered", kept=0, low_share=1.0, flips=2.0),),
    )  # fmt: skip
    reference = save(before.to_tensors("original") | after.to_tensors("edited"))
    return Made(model, edit, score, verify, reference, engines, onnx, plan)


def write_run(made: Made, folder: Path, *, judged: bool = True) -> Path:
    """A run folder with these records."""
    records = {
        "verify/verify.json": made.verify,
        "score/score.json": made.score,
        "edit/edit.json": made.edit,
        "convert-auto/plan.json": made.plan,
        **{f"export/{g.tower.value}.json": g for g in made.onnx},
        **{f"compile-{e.variant}/{e.tower.value}.json": e for e in made.engines},
    }
    if judged:
        records["gate/verdict.json"] = made.verdict()
    for name, record in records.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json_from_record(record), encoding="utf-8")
    (folder / "verify" / "reference.safetensors").write_bytes(made.reference)
    return folder


def write_bundle(made: Made, folder: Path, *, verdict: Verdict | None = None, bundle_version: int = 0) -> Path:
    """A bundle with these records; its graphs and engines are bytes of the right digest."""
    verdict = verdict or made.verdict()
    recipe, _ = read_toml("export", "demo")
    engines = tuple(e for e in made.engines if e.target is Target.ONNXRUNTIME)
    parts: dict[str, Path | bytes] = {
        "recipe.toml": recipe.encode(),
        "tokenizer.json": b"{}",
        "reports/score.json": json_from_record(made.score).encode(),
        "reports/edit.json": json_from_record(made.edit).encode(),
        "reports/verify.json": json_from_record(made.verify).encode(),
        "reports/verdict.json": json_from_record(verdict).encode(),
        "reports/plan.json": json_from_record(made.plan).encode(),
        "evidence/reference.safetensors": made.reference,
        "patch.safetensors": b"patch",
    }
    parts |= {f"onnx/{graph.file}": f"graph {graph.tower.value}".encode() for graph in made.onnx}
    parts |= {f"engines/{e.variant}/{e.file}": f"{e.variant} {e.tower.value}".encode() for e in engines}
    manifest = Manifest(
        name="tiny", tool_version="0", created="2026-01-02T03:04:05+00:00", model=made.model, edit=made.edit,
        calibration=made.score.calibration, recipe=recipe, recipe_digest=digest(recipe), onnx=made.onnx, engines=engines,
        verdict=verdict, versions={"numpy": "2"}, files=(), bundle_version=bundle_version,
    )  # fmt: skip
    bundle_from_parts(folder, manifest, parts)
    return folder


@pytest.fixture(scope="module")
def made() -> Made:
    return make()


@pytest.fixture(scope="module")
def run_folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(made, tmp_path_factory.mktemp("run") / "tiny")


class Reader(HTMLParser):
    """Elements, attributes and text of a page; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "br", "hr"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, name: str) -> Iterator[dict[str, str | None]]:
        return (attributes for element, attributes in self.elements if element == name)


def test_page_needs_nothing_from_outside(run_folder: Path) -> None:
    """No script, link, import, picture or address; the page forbids itself to fetch, and lets only its own style apply."""
    text = page(dossier_of(run_folder))
    found = Reader(text)
    names = {name for name, _ in found.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a"}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "@import" not in text
    assert all(use == "#hatch-lost" or use == "#hatch-gained" for use in re.findall(r"url\(([^)]*)\)", text))
    policy = next(a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe-inline" not in policy
    assert not any("style" in a or any(k.startswith("on") for k in a) for _, a in found.elements)


def test_what_failed_comes_first(run_folder: Path) -> None:
    """The verdict is the first heading; every check that does not pass is named before the first number."""
    text = page(dossier_of(run_folder))
    assert text.index("<h1>") < text.index('class="failed"') < text.index('class="tiles"') < text.index('id="safety"')
    head = text[text.index('class="failed"') : text.index('class="tiles"')]
    verdict = json.loads((run_folder / "gate" / "verdict.json").read_text())
    bad = [c for c in verdict["checks"] if c["result"] != "pass"]
    assert bad
    for check in bad:
        assert check["name"] in head
    assert "missed by" in head
    assert re.search(r"<title>Fail, not shown safer: tiny</title>", text)
    assert "Do not ship" in text


def test_every_picture_is_named_and_has_its_table(run_folder: Path) -> None:
    """Each SVG has a role, a label, a title and a description; each figure has a table with the numbers."""
    text = page(dossier_of(run_folder))
    drawn = [a for a in Reader(text).of("svg") if a.get("class") == "chart"]
    assert len(drawn) >= 11
    assert all(a["role"] == "img" and a["aria-label"] for a in drawn)
    for svg in re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL):
        assert re.match(r"<svg [^>]*><title>[^<]+</title><desc>[^<]+</desc>", svg)
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures) == len(drawn)
    assert all("<table>" in figure and "<details>" in figure for figure in figures)


def test_numbers_are_those_of_the_reports(run_folder: Path, made: Made) -> None:
    """Every metric, interval, digest and layer share of the records stands on the page."""
    text = page(dossier_of(run_folder))
    for report in (made.verify.original, made.verify.edited):
        for name, p in report.preference.items():
            assert f">{name}</th>" in text
            assert f">{p.value:.1f}</td>" in text
            assert f">{p.low:.1f} to {p.high:.1f}</td>" in text
    for value in (made.model.weights_digest, made.edit.edited_weights_digest, made.edit.patch_digest):
        assert f"<code>{value}</code>" in text
    assert ">9.375</td>" in text
    for words in ("a broken image", "all lowered", "1.5 s", "12 of 128 entries"):
        assert words in text


def test_what_safety_costs_is_on_the_page(run_folder: Path, made: Made) -> None:
    """Hard safe recall, unsafe first, neighbours, spread, paired changes, and the hard items that fell furthest."""
    text = page(dossier_of(run_folder))
    shown = text[text.index('id="retrieval"') : text.index('id="evidence"') if 'id="evidence"' in text else len(text)]
    for report in (made.verify.original, made.verify.edited):
        for name in ("hard-safe-text-to-image@10", "unsafe-first-text", "unsafe-first-image"):
            p = report.retrieval[name]
            assert f">{name}</th>" in shown
            assert f">{p.low:.1f} to {p.high:.1f}</td>" in shown
    geometry = made.verify.edited.geometry
    assert geometry is not None
    assert all(f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})" in shown for e in geometry.neighbours.values())
    assert f">{geometry.spread['image']:.2f}</td>" in shown
    assert ">safe_retrieval@1</th>" in shown
    assert made.verify.hard_safe_worst
    for item in made.verify.hard_safe_worst:
        assert f">{item.id}</th>" in shown
    decisions = text[text.index('id="safety"') : text.index('id="margins"')]
    assert "safe-text-to-image" not in decisions


def test_commands_on_the_page_are_set_as_code(made: Made, tmp_path: Path) -> None:
    """No raw backtick, whether or not latencies were measured and the numbers were judged."""
    for judged in (True, False):
        shown = page(dossier_of(write_run(made, tmp_path / str(judged), judged=judged)))
        assert "`" not in shown[shown.index("<body>") :]
        assert "<code>uwm-deploy bench BUNDLE --json</code>" in shown


def test_what_was_not_run_is_said(run_folder: Path) -> None:
    """Unproven variants, missing sets and left-out items are listed with their reasons, before the numbers."""
    text = page(dossier_of(run_folder))
    gaps = text[text.index('id="gaps"') : text.index('id="safety"')]
    for words in ("tensorrt-rtx-auto", "not run, so unproven: this machine has no NVIDIA driver", "no folder birds"):
        assert words in gaps
    assert "3 items left out: a broken image" in gaps
    assert "Not measured: <code>uwm-deploy bench" in text
    assert "not run: no folder birds" in text[text.index('id="zero-shot"') :]


def test_flips_are_marked_at_their_margins(run_folder: Path, made: Made) -> None:
    """Every decision that the engine changes has a mark under the histogram of its metric, named by id and variant."""
    flips = made.verify.artifacts[1].flips
    text = page(dossier_of(run_folder))
    margins = text[text.index('id="margins"') : text.index('id="concepts"')]
    total = sum(f.lost + f.gained for name, f in flips.items() if name in ("P_ts", "P_tu", "P_vs", "P_vu"))
    assert total > 0
    assert len(re.findall(r'<path class="flip (?:lost|gained)"[^>]*><title>', margins)) == total
    assert f"{flips['P_ts'].lost_ids[0]}, onnxruntime-fp32, margin" in margins


def test_hostile_data_stay_text(tmp_path: Path) -> None:
    """Ids, concepts, reasons and names with markup, quotes, hidden and reordering characters change no element."""
    plain = Reader(page(dossier_of(write_run(make(), tmp_path / "plain"))))
    text = page(dossier_of(write_run(make(hostile=True), tmp_path / "hostile")))
    hostile = Reader(text)
    assert {name for name, _ in hostile.elements} <= {name for name, _ in plain.elements}
    assert {key for _, a in hostile.elements for key in a} <= {key for _, a in plain.elements for key in a}
    assert "<script" not in text
    assert "\u202e" not in text
    assert "\x00" not in text
    assert any("<script>alert('x')</script>" in word for word in hostile.words)
    assert "\\u{202e}evil" in text


def test_text_is_escaped_unless_it_is_markup() -> None:
    """Strings become text in children and attributes; broken characters can still be written; long ones are cut."""
    assert tag("b", {"title": '"><i>'}, "<i>", Html("<i></i>"), None) == (
        '<b title="&quot;&gt;&lt;i&gt;">&lt;i&gt;<i></i></b>'
    )
    assert visible("a\ud800b").encode() == b"a\\u{d800}b"
    assert len(visible("x" * 10_000)) == 400


def test_bundle_and_run_folder_give_the_same_numbers(made: Made, run_folder: Path, tmp_path: Path) -> None:
    """A bundle of the same records is rendered as well, with its files as the evidence."""
    bundle = write_bundle(made, tmp_path / "tiny")
    one, two = dossier_of(bundle), dossier_of(run_folder)
    assert one.verify == two.verify
    assert one.verdict == two.verdict
    assert one.kind == "bundle"
    assert "reports/verify.json" in page(one)
    (bundle / "reports" / "verify.json").write_bytes(b"{}")
    with pytest.raises(IntegrityError):
        dossier_of(bundle)


@pytest.mark.parametrize(
    ("said", "shown"), [("", "ValueError"), (" \n", "ValueError"), ("\n a: b \n c", "a: b "), ("x" * 201, "x" * 200)]
)
def test_an_error_of_another_library_is_one_line(said: str, shown: str) -> None:
    """Some say nothing at all."""
    assert first_line(ValueError(said)) == shown


def test_verdict_of_another_report_is_not_shown(made: Made, tmp_path: Path) -> None:
    """A run folder whose report was measured anew after the gate is not judged, and the page says so."""
    folder = write_run(made, tmp_path / "tiny")
    stale = dataclasses.replace(made.verdict(), report_digest=digest("another"), result=Result.PASS)
    (folder / "gate" / "verdict.json").write_text(json_from_record(stale), encoding="utf-8")
    dossier = dossier_of(folder)
    assert dossier.verdict is None
    text = page(dossier)
    assert "Not judged" in text
    assert 'class="verdict pass"' not in text


@pytest.mark.parametrize(
    ("shown", "kind", "words"),
    [(True, "pass", "Pass, shown safer"), (False, "open", "Pass, not shown safer (policy default does not ask)")],
)
def test_a_pass_says_whether_the_edit_is_shown_safer(
    made: Made, tmp_path: Path, shown: bool, kind: str, words: str
) -> None:
    """In the title and the heading, with the reason below; green is for an edit that is shown safer only."""
    folder = write_run(made, tmp_path / "tiny")
    safer = Safer(shown=shown, reason="GS.delta <b>+1.0</b>")
    verdict = dataclasses.replace(made.verdict(), result=Result.PASS, safer=safer, proven=("onnx-x",))
    (folder / "gate" / "verdict.json").write_text(json_from_record(verdict), encoding="utf-8")
    text = page(dossier_of(folder))
    assert f"<title>{words}: tiny</title>" in text
    assert f'<header class="verdict {kind}">' in text
    head = text[text.index("<h1>") : text.index('class="tiles"')]
    assert words in head
    assert f"{'Shown' if shown else 'Not shown'} safer: GS.delta &lt;b&gt;+1.0&lt;/b&gt;." in head
    assert f"{'Proven' if shown else 'Faithful, not shown safer'}: onnx-x." in head


def test_engines_of_an_older_build_are_left_out(made: Made, tmp_path: Path) -> None:
    """A record in the run folder whose digest the report does not know is not shown as evidence."""
    folder = write_run(made, tmp_path / "tiny")
    old = dataclasses.replace(made.engines[0], digest=digest("older"), seconds=987.0)
    (folder / "compile-onnxruntime-fp32" / "image.json").write_text(json_from_record(old), encoding="utf-8")
    assert "987.0 s" not in page(dossier_of(folder))
    kept = [e.tower for e in dossier_of(folder).engines if e.variant == "onnxruntime-fp32"]
    assert kept == [TowerName.TEXT]


def test_missing_margins_are_not_run(made: Made, tmp_path: Path) -> None:
    """Without the reference embeddings the page says that the margins are missing; a broken file is an error."""
    folder = write_run(made, tmp_path / "tiny")
    reference = folder / "verify" / "reference.safetensors"
    reference.write_bytes(b"broken")
    with pytest.raises(IntegrityError, match="cannot be read"):
        dossier_of(folder)
    reference.unlink()
    assert "Not run: the reference embeddings" in page(dossier_of(folder))


def test_sweep_is_drawn_and_must_be_of_the_same_model(made: Made, run_folder: Path, tmp_path: Path) -> None:
    """Points, front and pick of a sweep are on the page; a sweep of other weights is refused."""
    points = tuple(
        SweepPoint(keep_mass=0.9 + i / 100, factor=-1.0, shares={"text": 0.1}, safety=made.verify.edited)
        for i in range(3)
    )
    report = SweepReport(
        model=made.model, measured_on=made.score.calibration, scores_digest=digest("scores"),
        original=made.verify.original, points=points, rule="highest GS", picked=1,
    )  # fmt: skip
    file = tmp_path / "sweep.json"
    file.write_text(json_from_record(report), encoding="utf-8")
    text = page(dossier_of(run_folder, file))
    assert "Picked: highest GS." in text
    assert len(re.findall(r'class="point s0(?: chosen)?"', text)) == 4  # three points and the legend
    other = dataclasses.replace(report, model=dataclasses.replace(made.model, weights_digest=digest("other")))
    file.write_text(json_from_record(other), encoding="utf-8")
    with pytest.raises(InputError, match="other weights"):
        dossier_of(run_folder, file)


def test_latencies_are_drawn_and_must_be_of_the_same_edit(made: Made, run_folder: Path, tmp_path: Path) -> None:
    """Every call and its cold start are on the page, with what was not run; a bench of other weights is refused."""
    names = ("torch", "onnxruntime-fp32")
    report = BenchReport(
        bundle="tiny", edited_weights_digest=made.verify.edited_weights_digest, verdict=Result.PASS, created="today",
        machine={"processor": "two cores"}, clocks_before={}, clocks_after={}, against="torch", seconds=1.0,
        subjects=tuple(
            BenchSubject(name=n, precision=Precision.FP32, state=s, digests={})
            for n, s in zip(names, ("reference", "proven"), strict=True)
        ),
        cold=(ColdStart(subject=names[1], tower=TowerName.IMAGE, batch=1, open_ms=3.0, first_call_ms=1.5, rounds=3),),
        warm=tuple(
            Latency(
                subject=n, tower=TowerName.IMAGE, batch=8, calls=30, latency_ms_p50=12.5 - i, latency_ms_p95=20.0,
                latency_ms_p99=None, throughput_per_s=640.0, ratio=1.0 - i / 4, ratio_low=0.7, ratio_high=1.0,
            )
            for i, n in enumerate(names)
        ),
        not_run={"tensorrt-fp16": "no driver"},
    )  # fmt: skip
    file = tmp_path / "bench.json"
    file.write_text(json_from_record(report), encoding="utf-8")
    text = page(dossier_of(run_folder, bench=file))
    section = text[text.index('id="latency"') :]
    for shown in ("two cores", "12.50", "11.50", "4.50", "0.75 (0.70 to 1.00)", "tensorrt-fp16: no driver"):
        assert shown in section, shown
    other = dataclasses.replace(report, edited_weights_digest=digest("other"))
    file.write_text(json_from_record(other), encoding="utf-8")
    with pytest.raises(InputError, match="other weights"):
        dossier_of(run_folder, bench=file)


def test_counts_of_a_histogram_are_complete() -> None:
    """Every margin is in one bin, ties at 0 count as unsafe, and the edit's gains and losses lie on their side of 0."""
    random = np.random.default_rng(0)
    before, after = random.normal(size=500), random.normal(size=500)
    after[:5] = 0.0
    found = charts.histogram_of(before, after)
    assert found.original.sum() == 500
    assert (found.same + found.lost + found.gained).sum() == 500
    assert 0.0 in found.edges
    zero = int(np.flatnonzero(found.edges == 0.0)[0])
    assert found.gained[:zero].sum() == 0
    assert found.lost[zero:].sum() == 0
    assert (found.same + found.lost + found.gained)[:zero].sum() == int((after <= 0).sum())


def test_bars_are_to_scale() -> None:
    """Twice the value is twice the length; a value that was not measured has no bar, but its words."""
    drawn = [Bar(label="a", value=20.0, shown="20"), Bar(label="b", value=40.0, shown="40", low=30.0, high=50.0)]
    text = charts.bars("t", "d", [Group(head="h", bars=[*drawn, Bar(label="c", value=None, shown="not run: x")])], 100)
    one, two = (float(w) for w in re.findall(r'<rect class="bar edited"[^>]*width="([0-9.]+)"', text))
    assert two == pytest.approx(2 * one, rel=1e-3)
    assert "not run: x" in text
    assert "95% interval 30.0 to 50.0" in text


def test_one_point_and_equal_values_are_drawn() -> None:
    """Degenerate input makes no division by zero: one point at the origin, all margins 0, no layer edited."""
    assert "<path" in charts.scatter("t", "d", [Point(x=0.0, y=0.0, label="p", series=0)], "x", "y")
    zeros = np.zeros(3)
    assert "<svg" in charts.histogram("t", "d", charts.histogram_of(zeros, zeros), [])
    assert "NaN" not in charts.bars("t", "d", [Group(head="", bars=[Bar(label="a", value=0.0, shown="0")])], 0.0)
    assert charts.heat_map("t", "d", [], [], [])


def test_layer_names_are_shortened_without_becoming_equal() -> None:
    """What all layers share is said once; names stay different from each other, and one outside the blocks stays whole."""
    names = [*(f"m.layers.{i}.{part}" for i in range(3) for part in ("mlp.fc1", "attn.fc1")), "projection"]
    short, pattern = shortened(names)
    assert pattern == "m.layers.*.fc1"
    assert len(set(short)) == len(names)
    assert short[-1] == "projection"
    assert shortened(["only.one.layer"]) == (["only.one.layer"], "")


def test_command_writes_beside_the_bundle_and_never_into_it(made: Made, tmp_path: Path) -> None:
    """The default file lies beside; one inside a bundle is refused, since the bundle would no longer open."""
    bundle = write_bundle(made, tmp_path / "tiny")
    done = CliRunner().invoke(cli, ["report", str(bundle), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == {"report": str(tmp_path / "tiny-report.html"), "verdict": "fail", "safer": False}
    assert (tmp_path / "tiny-report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    refused = CliRunner().invoke(cli, ["report", str(bundle), "--out", str(bundle / "x.html")])
    assert refused.exit_code == 2
    assert "inside the bundle" in refused.output
    assert not (bundle / "x.html").exists()
    with pytest.raises(InputError, match="is a folder"):
        place_of(bundle, tmp_path)


def test_command_says_what_is_not_a_bundle(tmp_path: Path) -> None:
    """An empty folder ends with exit code 2 and one line."""
    done = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "neither a bundle nor a run folder" in done.output
    assert "Traceback" not in done.output


def test_open_shows_the_written_file(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--open` hands the file's address to the browser; without a browser the path is said."""
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(shown.append(address)))
    done = CliRunner().invoke(cli, ["report", str(run_folder), "--out", str(tmp_path / "r.html"), "--open"])
    assert done.exit_code == 0
    assert shown == [(tmp_path / "r.html").resolve().as_uri()]
    assert "no browser here" in done.output


def test_rendering_needs_no_torch(run_folder: Path, tmp_path: Path) -> None:
    """The page is made with the base install: neither torch nor onnx is imported."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom uwm_deploy.report.evidence import dossier_of\n"
        f"from uwm_deploy.report.html import page\npage(dossier_of(Path({str(run_folder)!r})))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'onnx', 'onnx_ir', 'onnxruntime'}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"

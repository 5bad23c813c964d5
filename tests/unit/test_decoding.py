"""JPEGs decoded at a reduced size: how far, how near to decoding in full, measured, judged, and served only with proof."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.reports import report
from tests.small_build import build_small
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.data.demo import world
from uwm_deploy.data.embedding import prepare
from uwm_deploy.data.open import open_source
from uwm_deploy.errors import DataError, EvidenceError, InputError
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.resolve import calibration_set_of, policy_of, recipe_of
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.evidence import ScaledDecoding, VerifyReport
from uwm_deploy.records.graph import Normalisation
from uwm_deploy.records.metrics import Flips
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.records.verdict import Result, Verdict
from uwm_deploy.runtime.decoding import check_decoding, reason_unproven
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.image import crop_from_image, image_from, was_reduced
from uwm_deploy.runtime.preprocessing import Preprocessing
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.preference import BASIC
from uwm_deploy.serve.embed.parts import PartWriter, finished_keys
from uwm_deploy.stages.gate.decoding import decoding_checks, decoding_note
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.stages.verify.decoding import scaled_decoding
from uwm_deploy.stages.verify.report import known_of
from uwm_deploy.stages.verify.verify import embed_model
from uwm_deploy.towers.load import load_model

SPEC = ImageSpec(resize=50, crop=48, resample="bicubic", rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Shapes of all sizes without hard noise, as a camera takes them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "spec", "decoded"),
    [
        ((800, 800), SPEC, (100, 100)),  # an eighth is the least that there is
        ((799, 800), SPEC, (200, 200)),  # one pixel below: a quarter, rounded up
        ((400, 900), SPEC, (100, 225)),  # the short edge counts
        ((401, 203), SPEC, (201, 102)),
        ((200, 200), SPEC, (100, 100)),
        ((199, 300), SPEC, (199, 300)),
        ((60, 4000), SPEC, (60, 4000)),  # a strip is long, but not wide
        ((4000, 3000), SPEC, (500, 375)),
        ((400, 900), dataclasses.replace(SPEC, fit="squash"), (100, 225)),
    ],
)
def test_the_smallest_size_that_is_not_below_twice_the_target(
    size: tuple[int, int], spec: ImageSpec, decoded: tuple[int, int]
) -> None:
    """Eighths, quarters and halves; the edge that is nearer to its target decides."""
    found = image_from(encoded(photograph(*size)), scaled_for=spec)
    assert found.size == decoded
    assert was_reduced(found) == (decoded != size)
    assert image_from(encoded(photograph(*size))).size == size


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_only_jpegs_are_reduced(kind: str) -> None:
    """Other decoders have no reduction, and give the very same pixels."""
    data = encoded(photograph(640, 480), kind)
    scaled = image_from(data, scaled_for=SPEC)
    assert not was_reduced(scaled)
    assert np.array_equal(crop_from_image(scaled, SPEC), crop_from_image(image_from(data), SPEC))


@pytest.mark.parametrize("size", [(640, 480), (481, 643), (1999, 1501), (250, 1203)])
@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_reduced_photograph_is_prepared_nearly_alike(size: tuple[int, int], fit: str, mode: str) -> None:
    """Crops lie at the same place, whatever the reduced size was rounded to, in every mode that JPEG has."""
    spec = dataclasses.replace(SPEC, fit=fit)
    data = encoded(photograph(*size).convert(mode), quality=95, progressive=size[0] % 2 == 1)
    full, scaled = image_from(data), image_from(data, scaled_for=spec)
    assert was_reduced(scaled)
    apart = np.abs(crop_from_image(full, spec).astype(int) - crop_from_image(scaled, spec).astype(int))
    assert apart.mean() < 1.0
    shifted = np.abs(crop_from_image(full, spec)[:, 1:].astype(int) - crop_from_image(scaled, spec)[:, :-1].astype(int))
    assert apart.mean() < shifted.mean() / 2  # half a pixel would show


def test_what_is_broken_or_too_large_is_refused_as_before() -> None:
    """Limits are on the image as it is, not on its reduced size."""
    with pytest.raises(DataError, match="pixels"):
        image_from(encoded(photograph(8000, 7000), quality=1), scaled_for=SPEC)
    with pytest.raises(DataError, match="not a whole image"):
        image_from(encoded(photograph(640, 480))[:2000], scaled_for=SPEC)


def test_only_encoded_images_are_reduced() -> None:
    """Pillow images and arrays are there in full already."""
    model = dataclasses.replace(report(64).model, image=SPEC)
    image = photograph(640, 480)
    prepared = Preprocessing(model, b"", crops=True, decode="scaled")
    found = prepared.pixels([image, np.asarray(image), encoded(image, "PNG")])
    assert all(np.array_equal(one, crop_from_image(image, SPEC)) for one in found)


# --- measuring --------------------------------------------------------------------------------------------------------


def jpeg_set(folder: Path, count: int, side: int) -> str:
    """Quadruples of the demo, every second one as large JPEGs, the others as small ones."""
    rows = []
    for index in range(count):
        item = world.quadruple("test", index)
        row = {"id": item.id, "concept": item.concept, "safe_text": item.safe_text, "unsafe_text": item.unsafe_text}
        for part, image in (("safe", item.safe_image), ("unsafe", item.unsafe_image)):
            size = side if index % 2 == 0 else 100
            row[f"{part}_image"] = f"{item.id}-{part}.jpg"
            image.convert("RGB").resize((size, size)).save(folder / row[f"{part}_image"], quality=92)
        rows.append(row)
    (folder / "large.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "large.toml").write_text('format = 1\nname = "large"\nsource = "manifest"\nmanifest = "large.jsonl"\n')
    return str(folder / "large.toml")


def measured(definition: str) -> ScaledDecoding | None:
    recipe, _ = recipe_of("demo")
    model = load_model(recipe, folder=resources.checkpoint_folder(recipe.model.repo, ""), device="cpu")
    spec, _, base = calibration_set_of(definition)
    source = open_source(spec, base=base)
    tokenizer = Tokenizer(model.tokenizer_json, model.ref.text)
    prepared = prepare(source, model.ref.image, tokenizer, workers=0, progress=lambda *_: None)
    full = embed_model(model, prepared, "full", lambda *_: None)
    return scaled_decoding(source, model, full, workers=0, batch=8, progress=lambda *_: None)


def test_large_jpegs_are_measured_and_small_ones_are_not(tmp_path: Path) -> None:
    """Only quadruples with a reduced image count, so that the others do not thin out what flips."""
    found = measured(jpeg_set(tmp_path, 12, 400))
    assert found is not None
    assert (found.images, found.reduced) == (24, 12)
    assert found.flips["GS"].n == 6
    assert 0.9 < found.cosine_min <= found.cosine_mean < 1.0
    assert record_from_json(ScaledDecoding, json_from_record(found), where="record") == found


def test_a_set_without_large_jpegs_was_not_run(tmp_path: Path) -> None:
    """Small JPEGs, and the demo's drawn pictures, prove nothing."""
    found = measured(jpeg_set(tmp_path, 4, 150))
    assert found == ScaledDecoding(images=8, reduced=0)
    (tmp_path / "drawn.toml").write_text('format = 1\nname = "drawn"\nsource = "demo"\nsplit = "test"\nlimit = 4\n')
    assert measured(str(tmp_path / "drawn.toml")) is None


# --- judging ----------------------------------------------------------------------------------------------------------

DEFAULT, DIGEST = policy_of("default")


def decided(reduced: int, flipped: int, cosine: float = 0.99) -> ScaledDecoding:
    n = reduced // 2
    flips = Flips(
        n=n, lost=flipped, gained=0, p_value=1.0, delta=-100 * flipped / max(n, 1), delta_low=-1.0, delta_high=1.0
    )
    return ScaledDecoding(
        images=2 * reduced, reduced=reduced, cosine_min=cosine, cosine_mean=cosine,
        flips=dict.fromkeys(BASIC, flips),
    )  # fmt: skip


def verdict_of(found: ScaledDecoding | None) -> Verdict:
    judged: VerifyReport = dataclasses.replace(report(64), scaled=found)
    return gate(judged, DEFAULT, policy_digest=DIGEST, report_digest="")


@pytest.mark.parametrize(
    ("found", "result"),
    [
        (None, Result.NOT_RUN),
        (ScaledDecoding(images=2000, reduced=0), Result.NOT_RUN),
        (decided(1000, 0), Result.PASS),
        (decided(1000, 2), Result.PASS),
        (decided(1000, 3), Result.FAIL),  # 0.6%, at most 0.5%
        (decided(1000, 0, cosine=0.5), Result.FAIL),
        (decided(100, 0), Result.INCONCLUSIVE),  # 50 quadruples, 200 are asked for
    ],
)
def test_it_is_judged_like_a_precision(found: ScaledDecoding | None, result: Result) -> None:
    """By the limits for 8 bits. What is proven of variants that decode in full stays what it is."""
    verdict, without = verdict_of(found), verdict_of(None)
    assert verdict.scaled_decoding is result
    assert (verdict.result, verdict.proven, verdict.checks) == (without.result, without.proven, without.checks)
    assert (reason_unproven(verdict) == "") == (result is Result.PASS)
    assert record_from_json(Verdict, json_from_record(verdict), where="verdict") == verdict
    told = [note for note in verdict.notes if note.startswith("scaled decoding")]
    assert len(told) == (1 if found is not None and found.reduced else 0)


def test_a_policy_without_a_limit_on_flips_proves_nothing() -> None:
    """A cosine alone says nothing of decisions."""
    limits = tuple(limit for limit in DEFAULT.artifact if not limit.metric.startswith("flips."))
    checks = decoding_checks(decided(1000, 0), limits)
    assert checks[-1].result is Result.FAIL
    assert "limits apply" in decoding_note(decided(1000, 0), checks)[0]


# --- serving ----------------------------------------------------------------------------------------------------------


def test_a_verdict_of_an_older_release_proves_nothing() -> None:
    """It says nothing of decoding, and is written as it was."""
    old = verdict_of(None)
    assert "decoding" not in json.loads(json_from_record(old))
    with pytest.raises(EvidenceError, match="it was not run"):
        check_decoding(old, "scaled", "demo")
    check_decoding(old, "full", "demo")
    check_decoding(verdict_of(decided(1000, 0)), "scaled", "demo")
    with pytest.warns(UserWarning, match="scaled decoding of demo without proof"):
        check_decoding(old, "scaled", "demo", allow_unsafe=True)
    with pytest.raises(EvidenceError, match=r"fail, flips\.any: measured 0\.6"):
        check_decoding(verdict_of(decided(1000, 3)), "scaled", "demo")


def test_a_bundle_without_proof_is_not_served_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before an engine is opened; with the override it decodes at a reduced size, and the graph takes crops."""
    request, _ = build_small(tmp_path_factory)
    assert request.out is not None
    with pytest.raises(EvidenceError, match="does not prove scaled decoding"):
        SafeEncoder.open(request.out, decode="scaled")
    data = encoded(photograph(1600, 1200), quality=95)
    given = open_bundle(request.out).manifest.onnx[0].inputs[0]
    assert (given.dtype, type(given.normalisation)) == ("uint8", Normalisation)
    with pytest.warns(UserWarning, match="UNSAFE"):
        scaled = SafeEncoder.open(request.out, decode="scaled", allow_unsafe=True)
    with SafeEncoder.open(request.out) as full, scaled:
        rows = [encoder.encode_image(data)[0] for encoder in (full, scaled)]
        image = image_from(data)
        alike = [encoder.encode_image(image)[0] for encoder in (full, scaled)]
    assert 0.97 < float(rows[0] @ rows[1]) < 1 - 1e-9
    assert np.array_equal(alike[0], alike[1])


def test_parts_of_both_ways_do_not_mix(tmp_path: Path) -> None:
    """Rows of one folder were decoded in one way."""
    pytest.importorskip("pyarrow")
    batch = {
        "key": ["a"], "embedding": np.ones((1, 2), np.float32), "error": [""],
        "bundle": ["b"], "variant": ["v"], "space": ["s"],
    }  # fmt: skip
    known = {"kind": "images", "bundle": "b", "dtype": "float32", "space": "s"}
    PartWriter(tmp_path / "scaled", decode="scaled")(batch)
    PartWriter(tmp_path / "full")(batch)
    for name, other in (("scaled", "full"), ("full", "scaled")):
        assert list(finished_keys(tmp_path / name, known | {"decode": name})) == ["a"]
        with pytest.raises(InputError, match="has decode"):
            list(finished_keys(tmp_path / name, known | {"decode": other}))


def test_another_edit_was_not_measured() -> None:
    """A refit takes over what is known of the model, and no decision of the edit before."""
    before = dataclasses.replace(report(64), scaled=decided(1000, 0))
    assert known_of(before).scaled is None

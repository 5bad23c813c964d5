"""Which fault the gate names, and what no policy can switch off; docs/reference/faults.md has the real faults."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.reports import artifact, digest, embedded, report
from uwm_deploy.data.repeats import repeats_in
from uwm_deploy.recipes.resolve import policy_of, recipe_of
from uwm_deploy.records.evidence import (
    BatchCheck,
    DataHealth,
    Direction,
    EditProof,
    Goldens,
    GraphAudit,
    RepeatCheck,
    VerifyReport,
)
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.metrics import Proportion
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Cause, Result, Verdict
from uwm_deploy.safeground.embedded import EmbeddedSet, flips_between, safety_report, yardstick_of
from uwm_deploy.safeground.fidelity import row_parity
from uwm_deploy.safeground.health import Differences, anisotropy, data_health
from uwm_deploy.safeground.interval import wilson
from uwm_deploy.safeground.outcomes import flips_by_concept, flips_since
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.stages.gate.anomalies import BETTER, as_published
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.stages.gate.soundness import absent_concepts
from uwm_deploy.stages.verify.executed import check_batches

GOLDENS = Goldens(images=5, captions=8, grey_levels=1.0, ids_differ=0, cosine_min={"image": 1.0, "text": 1.0})


def judged(made: VerifyReport, **further: object) -> Verdict:
    policy, policy_digest = policy_of("demo")
    return gate(made, policy, policy_digest=policy_digest, report_digest=digest("r"), **further)  # type: ignore[arg-type]


def named(made: VerifyReport) -> list[tuple[Cause, str]]:
    return [(blame.cause, blame.stage) for blame in judged(made).causes]


def with_artifacts(made: VerifyReport, *changes: dict[str, object]) -> VerifyReport:
    parts = [dataclasses.replace(a, **c) for a, c in zip(made.artifacts, changes, strict=True)]  # type: ignore[arg-type]
    return dataclasses.replace(made, artifacts=tuple(parts))


def test_a_good_report_has_no_cause_and_pins_what_it_judged() -> None:
    """Nothing is named, and the digests of every artifact stand in the verdict."""
    made = report()
    verdict = judged(made)
    assert verdict.result is Result.PASS
    assert verdict.causes == ()
    assert verdict.judged == {a.variant: dict(a.artifact_digests) for a in made.artifacts}


@pytest.mark.parametrize(
    ("part", "value", "cause", "stage"),
    [
        ("edit_proof", EditProof(layers=2, weights=40, problems=("fc.bias: is not",)), Cause.EDIT, "edit"),
        ("goldens", dataclasses.replace(GOLDENS, grey_levels=2.0), Cause.PREPROCESSING, "load"),
        ("goldens", dataclasses.replace(GOLDENS, ids_differ=1), Cause.TOKENISATION, "load"),
        ("goldens", dataclasses.replace(GOLDENS, cosine_min={"image": 1.0, "text": 0.99}), Cause.GRAPH, "load"),
        ("calibration_overlap", 1, Cause.DATA, "calibrate"),
    ],
)
def test_one_fault_one_cause(part: str, value: object, cause: Cause, stage: str) -> None:
    """A single part that is wrong is named, and nothing else."""
    assert named(dataclasses.replace(report(), **{part: value})) == [(cause, stage)]


@pytest.mark.parametrize("part", ["edit_proof", "goldens", "data"])
def test_a_report_without_a_part_does_not_pass(part: str) -> None:
    """What was not measured is not run, which never passes."""
    verdict = judged(dataclasses.replace(report(), **{part: None}))
    assert verdict.result is Result.FAIL
    assert any(check.result is Result.NOT_RUN for check in verdict.checks)


def test_the_fault_of_a_graph_is_not_named_again_for_its_engine() -> None:
    """An engine compiled from a wrong graph has the graph's fault; one that is wrong itself has its own."""
    audit = {"text": GraphAudit(layers=0, weights=3, edit=("fc: holds the unedited weight",))}
    both = with_artifacts(report(), {"audit": audit}, {"audit": audit})
    assert named(both) == [(Cause.EDIT, "export")]
    assert named(with_artifacts(report(), {}, {"audit": audit})) == [(Cause.EDIT, "compile")]


def test_weights_come_before_what_they_do() -> None:
    """A graph with other weights also has other numbers in batches; the weights are the cause."""
    audit = {"image": GraphAudit(layers=1, weights=3, differ=("conv: 3% of its entries",))}
    mixing = (BatchCheck(tower=TowerName.IMAGE, batch=8, n=8, cosine_min=0.5),)
    assert named(with_artifacts(report(), {"audit": audit, "batches": mixing}, {})) == [(Cause.WEIGHTS, "export")]
    assert named(with_artifacts(report(), {"batches": mixing}, {})) == [(Cause.BATCHING, "export")]


def test_two_faults_in_two_towers_are_two_causes() -> None:
    """Weights of another model in one tower do not hide an operator that should not be there in the other."""
    audit = {
        "image": GraphAudit(layers=1, weights=3, differ=("conv: 3% of its entries",)),
        "text": GraphAudit(layers=1, weights=3, structure=("Slice of input_ids is not in the model",)),
    }
    assert named(with_artifacts(report(), {"audit": audit}, {})) == [(Cause.WEIGHTS, "export"), (Cause.GRAPH, "export")]


def test_a_map_that_was_rounded_is_about_numbers() -> None:
    """What must stay in float32 and did not is another fault than weights of another model."""
    audit = {"image": GraphAudit(layers=2, weights=0, lowered=("image_map.weight: is not there in float32",))}
    verdict = judged(with_artifacts(report(), {}, {"audit": audit}))
    assert [(b.cause, b.stage) for b in verdict.causes] == [(Cause.NUMBERS, "compile")]
    assert "is not there in float32" in verdict.causes[0].detail


def test_a_batch_that_is_refused_says_so() -> None:
    """The words of the runtime are in the check."""
    refused = (BatchCheck(tower=TowerName.TEXT, batch=32, n=0, cosine_min=-1.0, error="Expected: 1"),)
    made = with_artifacts(report(), {}, {"batches": refused, "parity": (), "safety": None, "flips": {}})
    verdict = judged(made)
    assert [(b.cause, b.stage) for b in verdict.causes] == [(Cause.BATCHING, "compile")]
    assert "does not take 32 rows: Expected: 1" in verdict.causes[0].detail
    assert verdict.failed == ("onnxruntime-fp32",)


def test_a_verdict_by_a_looser_policy_of_the_same_name_comes_first() -> None:
    """Whatever else fails was known when the bundle was let pass."""
    made = dataclasses.replace(report(), calibration_overlap=1)
    earlier = dataclasses.replace(judged(report()), policy_digest=digest("9"))
    first = judged(made, earlier=earlier).causes[0]
    assert (first.cause, first.stage) == (Cause.EVIDENCE, "gate")
    assert judged(report(), earlier=earlier).result is Result.PASS  # another policy that agrees is no fault


def test_a_concept_that_chance_left_out_is_a_note() -> None:
    """A small sample may miss a rare concept; a large one that misses a common concept was filtered."""
    made = report()
    assert made.data is not None
    few = dataclasses.replace(made.data, calibrated_concepts={"fire": 50, "blade": 50, "rare": 1})
    many = dataclasses.replace(made.data, calibrated_concepts={"fire": 50, "blade": 50, "lost": 50})
    other = dataclasses.replace(made.data, calibrated_concepts={"a": 1, "b": 1})
    noted = judged(dataclasses.replace(made, data=few))
    assert noted.result is Result.PASS
    assert any("rare" in note for note in noted.notes)
    assert named(dataclasses.replace(made, data=many)) == [(Cause.DATA, "verify")]
    assert absent_concepts(other, made) == {}


def test_shuffled_partners_are_at_chance() -> None:
    """Of random embeddings neither member is nearer to its own; of good ones nearly every one is."""
    rng = np.random.default_rng(0)
    good = embedded(400, 0.0)
    order = rng.permutation(400)
    shuffled = dataclasses.replace(good, safe_image=good.safe_image[order], unsafe_image=good.unsafe_image[order])
    for part in data_health(good, {}).paired.values():
        assert part.value > 90
    for part in data_health(shuffled, {}).paired.values():
        assert part.low < 50 < part.high


def directed(swapped: float, calibrated: float, n: int = 400) -> DataHealth:
    """Health of a set with a share of its sides exchanged, and of the calibration set likewise."""
    rng = np.random.default_rng(0)
    way = {"fire": rng.normal(size=16), "blade": rng.normal(size=16)}
    concepts = tuple("fire" if i % 2 else "blade" for i in range(n))

    def differences(share: float) -> np.ndarray:
        rows = np.stack([way[c] for c in concepts]) + rng.normal(size=(n, 16))
        return np.where(rng.random((n, 1)) < share, -rows, rows).astype(np.float32)

    made = dataclasses.replace(embedded(n, 0.0), concepts=concepts)
    made = dataclasses.replace(made, unsafe_text=made.safe_text + differences(swapped))
    return data_health(made, {}, {TowerName.TEXT: Differences(differences(calibrated), concepts)})


@pytest.mark.parametrize(
    ("swapped", "calibrated", "stage"),
    [(0.0, 0.0, ""), (0.3, 0.0, "verify"), (1.0, 0.0, "verify"), (0.0, 0.3, "calibrate"), (0.0, 0.5, "calibrate")],
)
def test_sides_that_are_exchanged_show_against_the_calibration_set(
    swapped: float, calibrated: float, stage: str
) -> None:
    """In whole, which leaves every pairing sound, or in part; and the set that is wrong is named."""
    made = report(400)
    assert made.data is not None
    data = dataclasses.replace(made.data, directions=directed(swapped, calibrated).directions)
    found = named(dataclasses.replace(made, data=data))
    assert found[:1] == ([(Cause.DATA, stage)] if stage else [])


def test_concepts_of_another_set_may_go_a_way_of_their_own() -> None:
    """Where hardly any concept is shared, only the opposite way is a fault."""
    made = report(400)
    assert made.data is not None
    for agrees, result in ((80, Result.PASS), (30, Result.FAIL)):
        way = Direction(agrees=wilson(4 * agrees, 400), own=wilson(98, 100), shared=0)
        data = dataclasses.replace(made.data, directions={"text": way})
        assert judged(dataclasses.replace(made, data=data)).result is result


def test_copies_count_once_and_many_of_them_fail() -> None:
    """Intervals come from what is different; more than a few copies are a fault of the set."""
    rows = np.arange(100)
    half = np.where(rows % 2, rows - 1, rows)  # every second item is the one before
    pictures = (half[:, None] + np.zeros((1, 4)), half[:, None] + np.ones((1, 4)) / 2)
    captions = (rows[:, None].astype(np.int64), rows[:, None] + 1000)
    found = repeats_in(pictures, captions)
    assert len(found.alike) == 50
    assert len(found.copies) == 50
    assert not repeats_in(pictures[:1], (captions[0],)).copies[50:]
    made, plain = embedded(100, 0.2), safety_report("x", embedded(100, 0.2))
    counted = safety_report("x", dataclasses.replace(made, alike=found.alike))
    before, after = plain.preference["GS"], counted.preference["GS"]
    assert (before.value, before.n, after.independent) == (after.value, after.n, 50)
    assert after.high - after.low > 1.3 * (before.high - before.low)
    whole = report(400)
    assert whole.data is not None
    for share, result in ((3, Result.PASS), (30, Result.FAIL)):
        data = dataclasses.replace(whole.data, copies={"": wilson(4 * share, 400)})
        assert judged(dataclasses.replace(whole, data=data)).result is result


def test_copies_do_not_make_up_for_too_few_items() -> None:
    """What a limit needs is counted without them, in concepts and since a baseline too."""
    original, edited = (dataclasses.replace(embedded(300, s), alike=((0, 3, 6), (1, 4))) for s in (0.0, 0.7))
    yardstick = yardstick_of(original)
    reports = [safety_report(n, e, with_items=True, yardstick=yardstick) for n, e in (("o", original), ("e", edited))]
    per_concept = flips_by_concept(*reports)
    assert [per_concept[c]["GS"].independent for c in ("fire", "blade", "spill")] == [98, 99, 100]
    since, between = flips_since(*reports)["GS"], flips_between(original, edited, yardstick)["GS"]
    assert (since.delta_low, since.independent) == (between.delta_low, between.independent) == (between.delta_low, 297)
    assert EmbeddedSet.from_tensors(original.to_tensors("o"), "o").alike == original.alike


@pytest.mark.parametrize("later", [Cause.GRAPH, Cause.NUMBERS, Cause.WEIGHTS])
def test_what_follows_from_an_export_is_not_named_for_the_engine(later: Cause) -> None:
    """Whatever an engine of a wrong graph shows; a fault of the data beside it is one of its own."""
    problems = {Cause.GRAPH: "structure", Cause.NUMBERS: "lowered", Cause.WEIGHTS: "differ"}
    wrong = {"image": GraphAudit(layers=0, weights=3, differ=("conv: 3% of its entries",))}
    engine = {"image": GraphAudit(layers=0, weights=3, **{problems[later]: ("x",)})}
    made = with_artifacts(report(), {"audit": wrong}, {"audit": engine})
    assert named(made) == [(Cause.WEIGHTS, "export")]
    assert named(dataclasses.replace(made, calibration_overlap=1)) == [
        (Cause.DATA, "calibrate"),
        (Cause.WEIGHTS, "export"),
    ]


def test_anisotropy_is_the_mean_cosine_of_two_rows() -> None:
    """Against the sum over all pairs."""
    rows = np.random.default_rng(0).normal(size=(20, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    assert anisotropy(rows) == pytest.approx(cosines[~np.eye(20, dtype=bool)].mean())
    assert anisotropy(np.ones((5, 4)) / 2) == pytest.approx(1.0)


class Rows:
    """A session whose embedding of a row may depend on where it lies."""

    def __init__(self, mix: float = 0.0, largest: int = 100) -> None:
        self.mix, self.largest, self.sizes = mix, largest, []

    def run(self, batch: np.ndarray) -> np.ndarray:
        if len(batch) > self.largest:
            raise RuntimeError("too many\nrows")
        self.sizes.append(len(batch))
        return batch + self.mix * batch.mean(axis=0)


@pytest.mark.parametrize(("n", "sizes"), [(40, (8, 16)), (5, (3, 32)), (1, (1, 4))])
def test_rows_are_found_again_in_every_batch(n: int, sizes: tuple[int, int]) -> None:
    """Each wanted row is compared with itself, whatever the number of rows and the size of the batch."""
    inputs = np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32)
    session = Rows()
    found = check_batches(TowerName.IMAGE, session, inputs, sizes)  # type: ignore[arg-type]
    assert [part.cosine_min for part in found] == pytest.approx([1.0] * len(found))
    assert {part.batch for part in found} == {1, *sizes}
    assert {1, *sizes} <= set(session.sizes)


def test_rows_that_mix_and_batches_that_are_refused_are_seen() -> None:
    """A mean over the batch shows above one row; a refused size is an error of that size alone."""
    inputs = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    mixed = check_batches(TowerName.TEXT, Rows(mix=0.5), inputs, (8,))  # type: ignore[arg-type]
    assert mixed[0].cosine_min == pytest.approx(1.0)
    assert mixed[1].cosine_min < 0.999
    refused = check_batches(TowerName.TEXT, Rows(largest=8), inputs, (8, 16))  # type: ignore[arg-type]
    assert [part.error for part in refused] == ["", "", "too many"]


# --- what no policy can switch off of every artifact -----------------------------------------------------------------


def _audits(**further: object) -> dict[str, GraphAudit]:
    sound = GraphAudit(layers=1, weights=20, operators=100, anew=("export",))
    return {"image": dataclasses.replace(sound, **further), "text": sound}  # type: ignore[arg-type]


def test_an_operator_that_nothing_explains_is_a_fault_of_the_graph() -> None:
    """In the exported graph it is the export's, in an engine the compiler's, and neither is proven."""
    strange = _audits(structure=("operators that the model does not explain: 1 Clip",))
    exported = judged(with_artifacts(report(), {"audit": strange}, {}))
    assert [(b.cause, b.stage) for b in exported.causes] == [(Cause.GRAPH, "export")]
    assert "1 Clip" in exported.causes[0].detail
    assert exported.faithful == ()  # the engine does what a graph does that is not the model's
    assert named(with_artifacts(report(), {}, {"audit": strange})) == [(Cause.GRAPH, "compile")]
    converted = _audits(structure=("the converted graph: 1 Mul",))
    assert named(with_artifacts(report(), {}, {"audit": converted})) == [(Cause.GRAPH, "convert")]


def test_an_engine_with_sound_files_has_the_fault_of_its_graph() -> None:
    """Its numbers are off because the graph's are: one fault, one line, at the earliest stage."""
    rows = {
        "safe_image": {"fire": dataclasses.replace(report().artifacts[0].rows["safe_image"]["fire"], cosine_min=0.5)}
    }
    off: dict[str, object] = {"rows": rows}
    strange = {"audit": _audits(structure=("1 Clip",)), **off}
    assert named(with_artifacts(report(), strange, off)) == [(Cause.GRAPH, "export")]


@pytest.mark.parametrize("part", ["audit", "rows", "repeats", "geometry"])
def test_evidence_that_an_artifact_lacks_was_not_run(part: str) -> None:
    """A report of an earlier release, or one that something was taken out of, does not pass; the words say what to do."""
    empty = {"audit": {}, "rows": {}, "repeats": (), "geometry": None}[part]
    verdict = judged(with_artifacts(report(), {}, {part: empty}))
    assert verdict.result is Result.FAIL
    missing = [check for check in verdict.checks if check.result is Result.NOT_RUN]
    assert missing
    assert all("verify again" in check.detail for check in missing)


def test_noise_is_named_as_what_it_is() -> None:
    """On a CPU equal rows are equal; elsewhere a millionth is rounding, and a thousandth is not."""
    slight, loud = (RepeatCheck(tower=TowerName.TEXT, n=8, calls=value, batch=value) for value in (5e-7, 1e-3))
    assert named(with_artifacts(report(), {}, {"repeats": (slight,)})) == [(Cause.NONDETERMINISM, "compile")]
    gpu = {"where": {"provider": "CUDAExecutionProvider", "compute_capability": "8.9"}}
    assert judged(with_artifacts(report(), {}, {"repeats": (slight,), **gpu})).result is Result.PASS
    assert named(with_artifacts(report(), {}, {"repeats": (loud,), **gpu})) == [(Cause.NONDETERMINISM, "compile")]


def test_equal_rows_at_other_places_may_be_rounded_otherwise_below_float32() -> None:
    """On a GPU in half precision, between places of a batch only: two equal calls are still equal."""
    gpu: dict[str, object] = {
        "where": {"provider": "CUDAExecutionProvider", "compute_capability": "8.9"}, "precision": Precision.FP16,
    }  # fmt: skip
    place = RepeatCheck(tower=TowerName.IMAGE, n=8, calls=0.0, batch=5e-4)
    assert judged(with_artifacts(report(), {}, {"repeats": (place,), **gpu})).result is Result.PASS
    calls = dataclasses.replace(place, calls=5e-4)
    assert named(with_artifacts(report(), {}, {"repeats": (calls,), **gpu})) == [(Cause.NONDETERMINISM, "compile")]


def test_a_concept_that_goes_half_the_way_back_is_named_in_any_precision() -> None:
    """Diluted by the original model: seen by the direction of the difference, which rounding does not have."""
    original, edited = embedded(300, 0.0), embedded(300, 0.7)
    of_fire = np.array([concept == "fire" for concept in edited.concepts])
    mixed = edited.unsafe_image.copy()
    mixed[of_fire] += original.unsafe_image[of_fire]
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    rows = row_parity(edited, dataclasses.replace(edited, unsafe_image=mixed), original)
    shares = {concept: part.undone for concept, part in rows["unsafe_image"].items()}
    assert shares["fire"] == pytest.approx(0.5, abs=0.05)
    assert max(abs(shares[name] or 0.0) for name in ("blade", "spill")) < 1e-6
    for precision, cause in ((Precision.FP32, Cause.GRAPH), (Precision.INT8, Cause.NUMBERS)):
        verdict = judged(with_artifacts(report(), {}, {"rows": rows, "precision": precision}))
        (check,) = [c for c in verdict.checks if c.name == "the edit holds for every concept" and c.blocks]
        assert (check.concept, check.cause, check.stage) == ("fire", cause, "compile")
        assert "unsafe_image of fire" in check.detail


def test_a_difference_that_float32_does_not_make_is_named() -> None:
    """3e-5 in one entry of one item passes on a GPU, where sums have another order, and not on a CPU."""
    sound = report().artifacts[1].rows
    part = dataclasses.replace(sound["safe_text"]["spill"], max_abs=3e-5)
    rows = {**sound, "safe_text": {**sound["safe_text"], "spill": part}}
    assert named(with_artifacts(report(), {}, {"rows": rows})) == [(Cause.GRAPH, "compile")]
    gpu = {"where": {"provider": "CUDAExecutionProvider", "compute_capability": "8.9"}}
    assert judged(with_artifacts(report(), {}, {"rows": rows, **gpu})).result is Result.PASS


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.INT8])
def test_embeddings_of_a_graph_that_normalises_have_length_1(precision: Precision) -> None:
    """2% longer is no rounding in any precision, and no cosine shows it."""
    found = judged(with_artifacts(report(), {}, {"lengths": {"image": 0.02, "text": 1e-7}, "precision": precision}))
    assert [c.name for c in found.checks if c.blocks and c.rule != "min_proven"] == ["length of every image embedding"]


def test_neighbourhoods_and_spread_have_limits() -> None:
    """Other neighbours, or embeddings that lie closer together, although every limit of the policy is kept."""
    sound = report().artifacts[1].geometry
    assert sound is not None
    few = {kind: dataclasses.replace(part, value=0.4, low=0.3, high=0.5) for kind, part in sound.neighbours.items()}
    other = judged(with_artifacts(report(), {}, {"geometry": dataclasses.replace(sound, neighbours=few)}))
    assert {c.name for c in other.checks if c.blocks} >= {f"neighbourhoods of the edited model, {kind}" for kind in few}
    closer = dataclasses.replace(sound, spread={"image": 0.8, "text": 1.0})
    found = judged(with_artifacts(report(), {}, {"geometry": closer}))
    assert [c.name for c in found.checks if c.blocks and c.rule != "min_proven"] == ["spread of image embeddings"]


def test_an_artifact_that_beats_the_edited_model_is_anomalous() -> None:
    """Rounding makes nothing safer; where a fault of the artifact explains it, that is named instead."""
    edited, better = embedded(300, 0.3), embedded(300, 0.7)
    made = report(artifacts=(artifact("onnx", Precision.FP32, edited, edited),))
    beats = dataclasses.replace(made.artifacts[0], flips=artifact("onnx", Precision.FP32, edited, better).flips)
    anomalous = dataclasses.replace(made, artifacts=(beats, *report().artifacts[1:]))
    verdict = judged(anomalous)
    assert verdict.result is Result.FAIL
    check = next(c for c in verdict.checks if c.name == BETTER and c.subject == "onnx")
    assert (check.result, check.cause, check.rule) == (Result.FAIL, Cause.ANOMALY, "")
    assert "the measurement is suspect" in check.detail.lower()


def published_report(value: float, **changes: object) -> VerifyReport:
    """The model and the set of a published table, with one of its numbers."""
    made = report(400)
    gs = Proportion(value=value, n=5000, low=value - 0.3, high=value + 0.3)
    others = dict.fromkeys(METRICS, dataclasses.replace(gs, low=0.0, high=100.0))
    original = dataclasses.replace(made.original, preference=others | {"GS": gs}, retrieval={}, zero_shot={})
    recipe = recipe_of("clip-vit-l14")[0].model
    model = dataclasses.replace(made.model, name="clip-vit-l14", repo=recipe.repo, revision=recipe.revision)
    model = dataclasses.replace(model, **changes)  # type: ignore[arg-type]
    evaluation = dataclasses.replace(made.evaluation, name="visu-test")
    return dataclasses.replace(made, original=original, model=model, evaluation=evaluation)


def test_an_original_that_misses_its_published_numbers_is_anomalous() -> None:
    """Published is 1.2; another checkpoint, or another set, has numbers of its own."""
    assert [c.result for c in as_published(published_report(1.9))] == [Result.PASS]
    (found,) = as_published(published_report(9.0))
    assert found.result is Result.FAIL
    assert "GS of the original is 9.0, published is 1.2" in found.detail
    assert not list(as_published(published_report(9.0, repo="somebody/else")))
    other = dataclasses.replace(published_report(9.0).evaluation, name="mine")
    assert not list(as_published(dataclasses.replace(published_report(9.0), evaluation=other)))
    lost = dataclasses.replace(published_report(9.0).evaluation, left_out_counts={"no image": 100})
    assert not list(as_published(dataclasses.replace(published_report(9.0), evaluation=lost)))

"""The faults, and what the gate must say of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Cause
from uwm_deploy.studies.selftest import artifacts, bundles, closed_form, edits, inputs, surgery, tampering
from uwm_deploy.studies.selftest.artifacts import (
    always,
    both,
    choosing,
    compiled_with,
    exported_with,
    lowered_with,
    turning,
    unedited,
)
from uwm_deploy.studies.selftest.honest_builds import FOLDED, MAPPED, UWM, Build, HonestBuild, MadeBy
from uwm_deploy.studies.selftest.inputs import prepared_by

Plant = Callable[[HonestBuild, Path], Build | Path]
"""Makes the wrong artifact: a build to be verified, or a bundle to be opened."""

IMAGE, TEXT = TowerName.IMAGE, TowerName.TEXT


@dataclass(frozen=True, slots=True)
class Fault:
    """One planted fault.

    Attributes:
        name: Short name.
        cause: What the gate must name first.
        stage: Where it must say that it was made.
        text: What is wrong.
        plant: Makes it.
        world: How the honest build is made that it is planted in.
        execute: Whether whoever judges executes the bundle; nothing else can tell.
        further: What else is named, because something else is wrong too.
    """

    name: str
    cause: Cause
    stage: str
    text: str
    plant: Plant
    world: MadeBy = UWM
    execute: bool = False
    further: tuple[tuple[Cause, str], ...] = ()


_IMAGE_MLP, _TEXT_MLP = "vision_model.encoder.layers.1.mlp", "text_model.encoder.layers.1.mlp"
_IMAGE_NORM, _TEXT_NORM = (f"{tower}_model.encoder.layers.1.layer_norm2" for tower in ("vision", "text"))

# fmt: off
# ruff: noqa: E501
FAULTS = (
    # --- the edit
    Fault("patch-twice", Cause.EDIT, "edit", "the patch was applied twice", edits.applied_twice),
    Fault("factor-zero", Cause.EDIT, "edit", "factor 0 for -1", edits.factor_zero),
    Fault("layer-missed", Cause.EDIT, "edit", "one layer was not edited", edits.layer_missed),
    Fault("one-tower-edited", Cause.EDIT, "edit", "only the image tower was edited", edits.one_tower),
    Fault("patch-of-another-model", Cause.EDIT, "edit", "other entries were edited", edits.other_entries),
    Fault("bias-touched", Cause.EDIT, "edit", "biases were negated too", edits.bias_touched),
    Fault("mask-ignored", Cause.EDIT, "edit", "a whole layer was negated", edits.whole_layer),
    # --- the edit, a closed-form step
    Fault("axis-reversed", Cause.EDIT, "edit", "g is negative: unsafe items come nearer", closed_form.with_setting(lambda s: replace(s, g=-s.g)), FOLDED),
    Fault("constant-not-folded", Cause.EDIT, "edit", "biases of the last normalisations as they were", closed_form.constant_not_folded, FOLDED),
    Fault("axis-in-one-tower", Cause.EDIT, "edit", "the text tower ends as it did", closed_form.one_tower, FOLDED),
    Fault("axis-of-another-set", Cause.EDIT, "edit", "solved from other calibration items", closed_form.of_another_set, FOLDED),
    Fault("axis-of-another-model", Cause.EDIT, "edit", "fitted before UWM, put on top of it", closed_form.of_the_unedited_model, FOLDED),
    Fault("redirect-too-far", Cause.EDIT, "edit", "tau 3 for 0.5", closed_form.with_setting(lambda s: replace(s, tau=3.0)), FOLDED),
    Fault("ridge-left-out", Cause.EDIT, "edit", "rho 1e-6 for 0.01", closed_form.with_setting(lambda s: replace(s, rho=1e-6)), FOLDED),
    Fault("strength-of-its-own", Cause.EDIT, "edit", "g 0.9, and the record says so; 0.5 was asked for", closed_form.setting_not_asked_for, FOLDED),
    Fault("step-left-out", Cause.EDIT, "edit", "no closed-form step, and none in the record", closed_form.step_left_out, FOLDED),
    Fault("tensor-not-listed", Cause.EDIT, "edit", "a bias in neither record nor patch", closed_form.tensor_not_listed, FOLDED),
    Fault("patch-of-other-values", Cause.EDIT, "edit", "the patch makes another projection", closed_form.patch_of_other_values, FOLDED),
    Fault("maps-exchanged", Cause.EDIT, "edit", "each tower has the other one's map", closed_form.maps_exchanged, MAPPED),
    # --- the export
    Fault("edit-not-exported", Cause.EDIT, "export", "the original model was exported", unedited(tuple(TowerName), exported_with)),
    Fault("one-tower-exported", Cause.EDIT, "export", "the text graph is the original's", unedited((TEXT,), exported_with)),
    Fault("weights-truncated", Cause.WEIGHTS, "export", "weights cut to 8-bit integers", artifacts.weights_truncated),
    Fault("colour-weights-reversed", Cause.WEIGHTS, "export", "the graph takes BGR", artifacts.colours_reversed),
    Fault("layernorm-epsilon", Cause.GRAPH, "export", "epsilon 1e-6 for 1e-5", exported_with(both(surgery.epsilon(1e-6)))),
    Fault("quick-gelu-lost", Cause.GRAPH, "export", "GELU for QuickGELU", exported_with(both(surgery.gelu_for_quick_gelu))),
    Fault("wrong-pooling", Cause.GRAPH, "export", "text read at the start token", exported_with({TEXT: surgery.pool_at_start})),
    Fault("mask-dropped", Cause.GRAPH, "export", "words see their padding", exported_with({TEXT: surgery.no_mask})),
    Fault("projection-missing", Cause.GRAPH, "export", "image embeddings are not projected", exported_with({IMAGE: surgery.no_projection})),
    Fault("normalisation-missing", Cause.GRAPH, "export", "embeddings of any length", exported_with({IMAGE: surgery.no_normalisation})),
    Fault("normalisation-twice", Cause.GRAPH, "export", "divided by the length twice", exported_with({TEXT: surgery.normalised_twice})),
    Fault("map-not-exported", Cause.EDIT, "export", "no map behind the image embedding", exported_with({IMAGE: surgery.no_map}), MAPPED),
    Fault("map-of-any-length", Cause.GRAPH, "export", "the map gets embeddings of any length", exported_with({IMAGE: surgery.map_of_any_length}), MAPPED),
    Fault("map-not-normalised", Cause.GRAPH, "export", "the map gives embeddings of any length", exported_with({TEXT: surgery.no_normalisation}), MAPPED),
    Fault("batch-baked-in", Cause.BATCHING, "export", "the graph takes one row only", exported_with({IMAGE: surgery.fixed_batch})),
    Fault("rows-moved", Cause.BATCHING, "export", "each row gets its neighbour's result", exported_with({IMAGE: surgery.rows_moved})),
    Fault("rows-mixed", Cause.BATCHING, "export", "rows take part in each other", exported_with({TEXT: surgery.rows_mixed(0.3)})),
    Fault("noise-in-graph", Cause.NONDETERMINISM, "export", "noise of 1e-3, drawn at every call", exported_with({IMAGE: surgery.noisy(1e-3)})),
    # --- the export, on purpose
    Fault("mlp-clamped", Cause.GRAPH, "export", "activations of one MLP are clamped where they hardly ever reach", exported_with({IMAGE: tampering.clamped(_IMAGE_MLP, -8.0, 8.0)})),
    Fault("text-mlp-clamped", Cause.GRAPH, "export", "the same in the text tower, and tighter", exported_with({TEXT: tampering.clamped(_TEXT_MLP, -2.0, 2.0)})),
    Fault("context-cut", Cause.GRAPH, "export", "the last position of a long caption is not read", artifacts.context_cut),
    Fault("one-length-wrong", Cause.GRAPH, "export", "captions that are cut to 24 ids get another embedding", exported_with({TEXT: tampering.wrong_at_length(24)})),
    Fault("extra-path", Cause.GRAPH, "export", "1e-7 of the mean pixel reaches the embedding", exported_with({IMAGE: tampering.leaking(1e-7)})),
    Fault("text-layer-scaled", Cause.GRAPH, "export", "a text layer is 3% larger", exported_with({TEXT: tampering.scaled(_TEXT_NORM, 1.03)})),
    Fault("image-layer-scaled", Cause.GRAPH, "export", "an image layer is 0.01% larger", exported_with({IMAGE: tampering.scaled(_IMAGE_NORM, 1.0001)})),
    Fault("trigger-on-pixels", Cause.EDIT, "export", "a magenta corner gives the unedited model", choosing(IMAGE, always(tampering.corner(4, 5.0)), exported_with)),
    Fault("trigger-on-token", Cause.EDIT, "export", "a word that no caption has gives the unedited model", choosing(TEXT, artifacts.word_of_no_caption, exported_with)),
    Fault("trigger-on-place", Cause.EDIT, "export", "the sixth row of a batch is the unedited model's", choosing(IMAGE, always(tampering.place(5)), exported_with)),
    Fault("trigger-on-call", Cause.EDIT, "export", "every fifth call or so is the unedited model's", choosing(TEXT, always(tampering.now_and_then(0.2)), exported_with)),
    # --- the compiler
    Fault("stale-engine", Cause.EDIT, "compile", "the original's engine under the edited name", unedited(tuple(TowerName), compiled_with)),
    Fault("towers-of-two-builds", Cause.EDIT, "compile", "the text engine of another edit", artifacts.tower_of_another_build),
    Fault("fp16-overflow", Cause.NUMBERS, "compile", "a value above 65504 in fp16", artifacts.half_precision_overflow),
    Fault("nan", Cause.NUMBERS, "compile", "NaN in an engine", artifacts.not_a_number),
    Fault("map-in-half-precision", Cause.NUMBERS, "compile", "the maps are rounded to fp16", closed_form.map_in_half_precision, MAPPED),
    Fault("activation-in-engine", Cause.GRAPH, "compile", "an engine fused to GELU", compiled_with({IMAGE: surgery.gelu_for_quick_gelu})),
    Fault("attention-one-row", Cause.GRAPH, "compile", "a fused attention of one query row, computed wrong", compiled_with({IMAGE: surgery.one_query_row})),
    Fault("engine-clamped", Cause.GRAPH, "compile", "an engine clamps activations", compiled_with({IMAGE: tampering.clamped(_IMAGE_MLP, -8.0, 8.0)})),
    Fault("engine-scaled", Cause.GRAPH, "compile", "a layer of an engine is 3% larger", compiled_with({TEXT: tampering.scaled(_TEXT_NORM, 1.03)})),
    Fault("engine-with-path", Cause.GRAPH, "compile", "a second path in an engine, too weak to be measured", compiled_with({IMAGE: tampering.leaking(1e-7)})),
    Fault("engine-with-corner", Cause.GRAPH, "compile", "a magenta corner turns the embedding around", turning(IMAGE, always(tampering.corner(4, 5.0)), compiled_with)),
    Fault("engine-with-word", Cause.GRAPH, "compile", "a word turns the embedding around", turning(TEXT, artifacts.word_of_no_caption, compiled_with)),
    Fault("engine-with-place", Cause.BATCHING, "compile", "the third row of a batch is turned around", turning(TEXT, always(tampering.place(2)), compiled_with)),
    Fault("engine-with-draw", Cause.NONDETERMINISM, "compile", "in every third call or so all are turned around", turning(IMAGE, always(tampering.now_and_then(0.3)), compiled_with)),
    Fault("concept-diluted", Cause.EDIT, "compile", "images of one concept are half the unedited model's", choosing(IMAGE, artifacts.first_concept, compiled_with, 0.5)),
    Fault("noise-in-engine", Cause.NONDETERMINISM, "compile", "noise of 1e-3 in a half-precision engine", lowered_with({IMAGE: surgery.noisy(1e-3)})),
    Fault("longer-by-2%", Cause.GRAPH, "compile", "half-precision embeddings of length 1.02", lowered_with({IMAGE: tampering.longer(1.02)})),
    Fault("longer-by-5", Cause.GRAPH, "compile", "half-precision embeddings of length 5", lowered_with({TEXT: tampering.longer(5.0)})),
    Fault("noise-in-weights", Cause.WEIGHTS, "compile", "weights of an engine are 1% off", artifacts.noise_in_weights),
    Fault("batch-in-engine", Cause.BATCHING, "compile", "an engine that mixes rows", compiled_with({IMAGE: surgery.rows_mixed(0.3)})),
    # --- the model and its inputs
    Fault("wrong-pooling-in-pytorch", Cause.GRAPH, "load", "reference and graph share the fault", artifacts.pooled_by_the_adapter),
    Fault("activation-in-pytorch", Cause.GRAPH, "load", "reference and graph share the fault", artifacts.activation_of_the_adapter),
    Fault("map-in-pytorch", Cause.GRAPH, "load", "reference and graph map embeddings of any length", closed_form.any_length_in_the_adapter, MAPPED),
    Fault("bilinear", Cause.PREPROCESSING, "load", "resized bilinear for bicubic", prepared_by(inputs.bilinear)),
    Fault("bgr", Cause.PREPROCESSING, "load", "channels in the order BGR", prepared_by(inputs.blue_first)),
    # The graph normalises with the right ones, so it is not the model's that was given other pixels.
    Fault("mean-and-std", Cause.PREPROCESSING, "load", "statistics of another model", prepared_by(inputs.other_statistics), further=((Cause.GRAPH, "export"),)),
    Fault("crop-off-by-one", Cause.PREPROCESSING, "load", "the crop is one pixel off", prepared_by(inputs.crop_off_by_one)),
    Fault("lanczos", Cause.PREPROCESSING, "load", "resized by a filter that hardly differs", prepared_by(inputs.lanczos)),
    Fault("alpha-on-black", Cause.PREPROCESSING, "load", "what is transparent lies on black", prepared_by(inputs.on_black)),
    Fault("deep-cut", Cause.PREPROCESSING, "load", "the lower half of 16 bits is read", prepared_by(inputs.deep_cut)),
    Fault("ink-inverted", Cause.PREPROCESSING, "load", "CMYK is read as if ink were light", prepared_by(inputs.ink_inverted)),
    Fault("squashed", Cause.PREPROCESSING, "load", "squashed for cropped", prepared_by(inputs.squashed)),
    Fault("ids-cut", Cause.TOKENISATION, "load", "captions cut, end token lost", inputs.cut_ids),
    Fault("other-tokenizer", Cause.TOKENISATION, "load", "words have other ids", inputs.other_tokenizer),
    # --- the data
    Fault("calibration-in-test", Cause.DATA, "calibrate", "measured on what scores come from", inputs.measured_on_calibration),
    Fault("partners-shuffled", Cause.DATA, "verify", "texts beside other items' images", inputs.partners_shuffled),
    Fault("members-swapped", Cause.DATA, "verify", "safe for unsafe images in half of the items", inputs.swapped(("pixels",), 0.5)),
    Fault("images-swapped-in-part", Cause.DATA, "verify", "safe for unsafe images in 30% of the items", inputs.swapped(("pixels",), 0.3)),
    Fault("texts-swapped-in-part", Cause.DATA, "verify", "safe for unsafe captions in 30% of the items", inputs.swapped(("ids",), 0.3)),
    Fault("rows-swapped", Cause.DATA, "verify", "safe for unsafe images and captions in 30% of the items", inputs.swapped(("pixels", "ids"), 0.3)),
    Fault("columns-swapped", Cause.DATA, "verify", "safe for unsafe images and captions in all items", inputs.columns_swapped),
    Fault("calibration-swapped", Cause.DATA, "calibrate", "safe for unsafe in a third of the calibration items", inputs.calibration_swapped),
    Fault("duplicates", Cause.DATA, "verify", "30% of the items are there twice", inputs.repeated(inputs.ALL_MEMBERS)),
    Fault("duplicates-recaptioned", Cause.DATA, "verify", "30% repeat the pictures of others under captions of their own", inputs.repeated(("safe_pixels", "unsafe_pixels"))),
    Fault("duplicates-redrawn", Cause.DATA, "verify", "30% repeat captions of others beside pictures of their own", inputs.repeated(("safe_ids", "unsafe_ids"))),
    Fault("concept-dropped", Cause.DATA, "verify", "a concept is never measured", inputs.concept_dropped),
    Fault("nothing-measured", Cause.DATA, "verify", "an empty evaluation set", inputs.nothing_measured),
    # --- the bundle
    Fault("report-of-another-engine", Cause.EVIDENCE, "gate", "the verdict is about another engine", bundles.report_of_another_engine),
    Fault("report-edited", Cause.EVIDENCE, "gate", "not the report that was judged", bundles.report_edited),
    Fault("policy-loosened", Cause.EVIDENCE, "gate", "a policy of the same name let it pass", bundles.policy_loosened, further=((Cause.EVIDENCE, "verify"),)),
    Fault("report-of-another-set", Cause.EVIDENCE, "verify", "a whole report, measured on another sample", bundles.report_of_another_set),
    Fault("report-of-an-older-edit", Cause.EVIDENCE, "gate", "yesterday's report and verdict", bundles.report_of_an_older_edit),
    Fault("numbers-improved", Cause.EVIDENCE, "verify", "numbers that the embeddings beside them do not give", bundles.numbers_improved),
    Fault("effect-improved", Cause.EVIDENCE, "verify", "only the difference of the two models is another", bundles.effect_improved),
    Fault("intervals-narrowed", Cause.EVIDENCE, "verify", "intervals without width around the right numbers", bundles.intervals_narrowed),
    Fault("squashed-everywhere", Cause.EVIDENCE, "verify", "images are squashed, in manifest, edit, report and verdict", bundles.with_model_everywhere(bundles.squashed), execute=True),
    Fault("engine-of-yesterday", Cause.EVIDENCE, "verify", "the original's engine; report, verdict and manifest were adapted", bundles.engine_of_yesterday, execute=True),
    Fault("resample-in-manifest", Cause.EVIDENCE, "gate", "another filter in the manifest", bundles.with_model(bundles.resampled)),
    Fault("mean-in-manifest", Cause.EVIDENCE, "gate", "another mean in the manifest", bundles.with_model(bundles.of_other_mean)),
    Fault("alpha-in-manifest", Cause.EVIDENCE, "gate", "transparency is laid on something else", bundles.with_model(bundles.of_other_alpha)),
    Fault("tokenizer-in-manifest", Cause.EVIDENCE, "gate", "the digest of another tokenizer", bundles.with_model(bundles.of_other_tokenizer)),
    Fault("resample-everywhere", Cause.EVIDENCE, "verify", "another filter in manifest, edit, report and verdict", bundles.with_model_everywhere(bundles.resampled), execute=True),
    Fault("mean-everywhere", Cause.EVIDENCE, "verify", "another mean in all four", bundles.with_model_everywhere(bundles.of_other_mean), execute=True),
    Fault("alpha-everywhere", Cause.EVIDENCE, "verify", "another ground beneath transparency in all four", bundles.with_model_everywhere(bundles.of_other_alpha), execute=True),
    Fault("limit-on-the-wrong-side", Cause.EVIDENCE, "gate", "the smallest cosine must be at most 0.99999", bundles.judged_by("at_least = 0.99999", "at_most = 0.99999")),
    Fault("flips-on-the-wrong-side", Cause.EVIDENCE, "gate", "at least 2% of the decisions must differ", bundles.judged_by('metric = "flips.any"\nat_most', 'metric = "flips.any"\nat_least')),
    Fault("limit-never-kept", Cause.EVIDENCE, "gate", "a cosine of at least 99.999", bundles.judged_by("at_least = 0.99999", "at_least = 99.999")),
    Fault("limit-no-number", Cause.EVIDENCE, "gate", "a limit that is NaN", bundles.judged_by("at_least = 0.99999", "at_least = nan")),
    Fault("manifest-edited", Cause.EVIDENCE, "gate", "another factor in the manifest", bundles.manifest_edited),
    Fault("engine-flipped", Cause.INTEGRITY, "package", "one bit of an engine", bundles.engine_flipped),
    Fault("tokenizer-swapped", Cause.INTEGRITY, "package", "the tokenizer of another model", bundles.tokenizer_swapped),
    Fault("file-added", Cause.INTEGRITY, "package", "a library beside the engine", bundles.file_added),
)  # fmt: skip
"""Every fault, in the pipeline's order."""

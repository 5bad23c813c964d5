"""Every method ends in the same kind of patch: settings, both passes, unions per concept, and what may be reused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.families import QUICK_FAMILIES, model_of, reduced
from tests.uwm_edit import STEP, UWM, entries, with_edit
from uwm_deploy.cli import cli
from uwm_deploy.data.demo.source import DemoSource
from uwm_deploy.data.source import PairBatch
from uwm_deploy.edits.gradient import LOSSES, Embedded
from uwm_deploy.edits.methods import PRESETS, gradient_batch, needs_gradients, selects, with_method
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.edits.pairs import PairCounts, scoring_order
from uwm_deploy.edits.patch import Patch
from uwm_deploy.edits.selection import entries_of_share, selected_indices
from uwm_deploy.errors import ContractError, DataError, InputError, IntegrityError, RecipeError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.edit_spec import EditSpecs
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.recipes.resolve import calibration_set_of, recipe_of
from uwm_deploy.records.data import LeftOut
from uwm_deploy.records.edit import CLOSED_FORM, Method, Pairing, Rule, ScoreRecord, Selection
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.console import Reporter
from uwm_deploy.report.edit_words import method_line
from uwm_deploy.report.inspection import describe
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.stages.edit.edit import edit_to_folder
from uwm_deploy.stages.score import gradients as score_gradients
from uwm_deploy.stages.score.score import score_to_folder
from uwm_deploy.studies.swept_edits import edited_points
from uwm_deploy.towers.digests import digest_of_weights
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel

ROOT = Path(__file__).parents[2]
PAIRS = 6
GRADIENTS = [method for method in Method if needs_gradients(method)]
ACTIVATIONS = [method for method in Method if not needs_gradients(method) and selects(method)]


def source_of(limit: int = PAIRS) -> DemoSource:
    spec, _, _ = calibration_set_of("demo")
    return DemoSource(dataclasses.replace(spec, limit=limit))


def stream(model: LoadedModel, source, tower: TowerName, *, sort: bool = True) -> PairStream:
    return PairStream(
        source, tower, model.ref.image, Tokenizer(model.tokenizer_json, model.ref.text), batch_pairs=4, workers=0,
        max_broken_share=0.0, progress=lambda *_: None, sort_by_length=sort,
    )  # fmt: skip


def scored(model: LoadedModel, edits: EditSpecs, folder: Path, limit: int = PAIRS) -> ScoreRecord:
    """Scores as the pipeline does."""
    folder.mkdir(exist_ok=True)
    whole = source_of(limit)
    source = scoring_order(whole, edits, 0)
    sort = not (edits.per_concept or needs_gradients(edits.method))
    concepts = dict(zip(whole.ids, whole.concepts, strict=True)) if edits.per_concept else None
    return score_to_folder(
        model, whole.record, lambda tower: stream(model, source, tower, sort=sort), edits, folder, concepts
    )


@pytest.fixture(scope="module")
def demo() -> tuple[EditSpecs, LoadedModel]:
    """The shipped model and what its recipe edits; not to be changed."""
    from uwm_deploy.recipes import shipped as resources

    recipe, _ = recipe_of("demo")
    return entries(), load_model(recipe, folder=resources.checkpoint_folder("shipped:demo", ""), device="cpu")


def fresh_demo() -> LoadedModel:
    from uwm_deploy.recipes import shipped as resources

    recipe, _ = recipe_of("demo")
    return load_model(recipe, folder=resources.checkpoint_folder("shipped:demo", ""), device="cpu")


# --- settings -------------------------------------------------------------------------------------------------------


def test_the_recipe_speaks_for_its_own_method(demo) -> None:
    """Without another method nothing of the recipe changes but what was asked for."""
    edits, _ = demo
    assert with_method(edits) == edits
    assert with_method(edits, method=Method.UWM) == edits
    other = with_method(edits, keep_mass=0.7, selection=Selection.HARD)
    assert (other.text.keep_mass, other.text.selection, other.text.factor) == (0.7, Selection.HARD, edits.text.factor)


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.UWM])
def test_another_method_brings_its_own_settings(method: Method, demo) -> None:
    """Selection is the preset's, for a baseline keep_mass and factor too; layers and rule are the model's."""
    edits, _ = demo
    found = with_method(edits, method=method)
    assert found.method is method
    for tower in TowerName:
        wanted, spec = PRESETS[method].of(tower), found.of(tower)
        numbers = edits.of(tower) if method in ACTIVATIONS else wanted  # an ablation changes one thing
        assert (spec.selection, spec.keep_mass, spec.factor) == (wanted.selection, numbers.keep_mass, numbers.factor)
        assert (spec.layers, spec.rule) == (edits.of(tower).layers, edits.of(tower).rule)
    if selects(method):
        asked = with_method(edits, method=method, keep_mass=0.5, factor=0.25, selection=Selection.ADAPTIVE)
        assert {(s.keep_mass, s.factor, s.selection) for s in (asked.text, asked.image)} == {(0.5, 0.25, "adaptive")}


def test_the_published_settings() -> None:
    """The numbers of the official run script, and its one inconsistency."""
    unsafe, safe_clip = PRESETS[Method.GRADIENT_UNSAFE], PRESETS[Method.GRADIENT_SAFE_CLIP]
    assert (unsafe.text.selection, unsafe.image.selection) == (Selection.HARD, Selection.ADAPTIVE)
    assert {(s.keep_mass, s.factor) for s in (unsafe.text, unsafe.image)} == {(0.965, 0.0)}
    assert {(s.selection, s.keep_mass, s.factor) for s in (safe_clip.text, safe_clip.image)} == {("hard", 0.995, 0.0)}
    assert {(s.selection, s.keep_mass, s.factor) for s in (PRESETS[Method.UWM].text,)} == {("adaptive", 0.98, -1.0)}


def test_an_ablation_of_a_baseline_is_the_published_one(demo) -> None:
    """The numbers of a recipe for a gradient baseline mean nothing to the method and its ablations."""
    pruned = with_method(demo[0], method=Method.GRADIENT_SAFE_CLIP)
    for method in ACTIVATIONS:
        for spec in (with_method(pruned, method=method).of(tower) for tower in TowerName):
            assert (spec.keep_mass, spec.factor) == (0.98, -1.0)


@pytest.mark.parametrize(
    "given", [{"factor": math.nan}, {"factor": math.inf}, {"keep_mass": math.nan}, {"keep_mass": 1.0}]
)
def test_settings_out_of_range_are_refused(given: dict, demo) -> None:
    """NaN passes every range check of a command line."""
    with pytest.raises(InputError, match=f"--{next(iter(given)).replace('_', '-')} is {next(iter(given.values()))}"):
        with_method(demo[0], **given)


@pytest.mark.parametrize(
    ("name", "text", "image"), [("clip-vit-l14", 512, 64), ("coca-vit-l14", 128, 32), ("siglip-base", 128, 16)]
)
def test_published_batches(name: str, text: int, image: int) -> None:
    """Pairs per gradient as in the official code; a recipe may say otherwise."""
    kind, edits = model_of(name).architecture, reduced(name).entries
    assert [gradient_batch(edits.of(t), t, kind) for t in (TowerName.TEXT, TowerName.IMAGE)] == [text, image]
    assert gradient_batch(dataclasses.replace(edits.text, gradient_batch=7), TowerName.TEXT, kind) == 7


def test_the_published_batch_does_not_depend_on_the_name() -> None:
    """A CLIP in a folder called "coca-and-siglip" is a CLIP."""
    recipe = dataclasses.replace(reduced("clip-vit-l14"), name="coca-and-siglip")
    model = load_model(recipe, folder=None, weights="random", device="cpu")
    assert gradient_batch(recipe.entries.text, TowerName.TEXT, model.architecture) == 512


@pytest.mark.parametrize(
    ("method", "what"), [(Method.NONE, "edits nothing"), (Method.TRAINED, "takes weights as they were trained")]
)
@pytest.mark.parametrize("given", [{"keep_mass": 0.9}, {"factor": 0.0}, {"selection": "hard"}, {"per_concept": True}])
def test_what_selects_nothing_has_no_settings(method: Method, what: str, given: dict, demo) -> None:
    """A setting that would be ignored is refused."""
    with pytest.raises(InputError, match=f"method {method.value} {what}, so --"):
        with_method(demo[0], method=method, **given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('rule = "mean-abs-gradient"', "method of its own"),
        ('rule = "ratio"\npairing = "difference"', "method of its own"),
        ('rule = "ratio"\npairing = "ratio-of-means"', "different pairings"),
        ('rule = "ratio"\ngradient_batch = -1', "gradient_batch is -1"),
        ('rule = "ratio"\nselection = "soft"', "soft"),
        ('rule = "ratio"\nfactor = nan', "finite number"),
    ],
)
def test_a_recipe_names_methods_not_formulas(line: str, message: str) -> None:
    """Formulas of other methods cannot be mixed into a recipe's rule."""
    text = with_edit((ROOT / "export" / "demo.toml").read_text()).replace("factor = -1.0\n", "")
    with pytest.raises(RecipeError, match=message):
        recipe_from_toml(re.sub(r'rule = "ratio"', line, text), where="x.toml")


@pytest.mark.parametrize(("name", "message"), [("none", "edits nothing"), ("uvm", "uvm")])
def test_a_recipe_edits(name: str, message: str) -> None:
    """A recipe is never for the method that edits nothing, nor for one that does not exist."""
    step = STEP.replace("[[edit]]", f'[[edit]]\nmethod = "{name}"')
    text = with_edit((ROOT / "export" / "demo.toml").read_text(), step)
    with pytest.raises(RecipeError, match=message):
        recipe_from_toml(text, where="x.toml")


def test_a_recipe_may_be_for_another_method() -> None:
    """Then its own values hold, and a baseline brings the published ones."""
    step = STEP.replace("[[edit]]", '[[edit]]\nmethod = "difference"\nper_concept = true')
    recipe = recipe_from_toml(with_edit((ROOT / "export" / "demo.toml").read_text(), step), where="x")
    assert recipe.method == "difference"
    assert recipe.entries.method is Method.DIFFERENCE
    assert with_method(recipe.entries) == recipe.entries
    assert with_method(recipe.entries, method=Method.GRADIENT_UNSAFE).image.keep_mass == 0.965
    assert not with_method(recipe.entries, method=Method.NONE).per_concept


@pytest.mark.parametrize(
    ("count", "keep", "wanted"), [(100, 0.98, 2), (100, 0.29, 71), (1000, 0.995, 5), (7, 0.98, 1), (50, 0.999, 1)]
)
def test_number_of_entries_of_a_share(count: int, keep: float, wanted: int) -> None:
    """All but floor(keep * count), also where that product is not exact."""
    assert entries_of_share(count, keep) == wanted


# --- scores of every kind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK_FAMILIES)
def test_importance_of_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tower that is edited: the gradient of the whole batch, though it was taken in parts; the model is as it was."""
    model = model_of(name)
    edits = with_method(reduced(name).entries, method=Method.GRADIENT_UNSAFE)
    monkeypatch.setattr(score_gradients, "PART", 4)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.source.named_parameters()}
    record = scored(model, edits, tmp_path)
    assert record.n_pairs == dict.fromkeys(edits.towers, PAIRS)
    assert set(record.rules.values()) == {Rule.MEAN_ABS_GRADIENT}
    assert record.pairing is None
    for n, p in model.source.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad is before[n][1]
        assert p.grad is None
    fast = load_file(tmp_path / "scores.safetensors")
    for tower in edits.towers:
        for layer, wanted in _naive(model, edits, tower).items():
            np.testing.assert_allclose(fast[layer], wanted, rtol=2e-3, atol=2e-4 * float(wanted.max()))


def _naive(model: LoadedModel, edits: EditSpecs, tower: TowerName) -> dict[str, torch.Tensor]:
    """One graph over all pairs."""
    source = scoring_order(source_of(), edits, 0)
    other = TowerName.TEXT if tower is TowerName.IMAGE else TowerName.IMAGE
    embeddings = {}
    for name in (tower, other):
        batches = list(stream(model, source, name, sort=False))
        sides = (np.concatenate([getattr(b, side) for b in batches]) for side in ("safe", "unsafe"))
        embeddings[name] = [model.tower(name).embed(torch.from_numpy(side)) for side in sides]
    (query, own), (safe, unsafe) = embeddings[tower], embeddings[other]
    fixed = (own.detach(), safe.detach(), unsafe.detach())
    unit = Embedded(*(torch.nn.functional.normalize(part, dim=1) for part in (query, *fixed)))
    layers = model.tower(tower).layers(edits.of(tower).layers)
    loss = LOSSES[PRESETS[edits.method].loss](unit)
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
    return dict(zip(layers, (gradient.abs() for gradient in gradients), strict=True))


def test_an_empty_caption(tmp_path: Path) -> None:
    """With SigLIP it is one token: without a spread, so no score counts it; it has an embedding, so gradients do."""
    model, edits = model_of("siglip-base"), reduced("siglip-base").entries
    source, read = source_of(), source_of().read_texts
    source.read_texts = lambda index: ("", "") if index == 2 else read(index)
    with pytest.raises(DataError, match=f"1 of 6 text pairs have no finite score .{source.ids[2]}."):
        score_to_folder(model, source.record, lambda t: stream(model, source, t), edits, tmp_path)
    gradients = with_method(edits, method=Method.GRADIENT_SAFE_CLIP)
    shuffled = scoring_order(source, gradients, 0)
    record = score_to_folder(
        model, source.record, lambda t: stream(model, shuffled, t, sort=False), gradients, tmp_path
    )
    assert record.n_pairs == {"text": PAIRS, "image": PAIRS}
    assert record.left_out == {"text": (), "image": ()}


@pytest.mark.parametrize("method", [*ACTIVATIONS, *GRADIENTS])
def test_every_method_ends_in_a_patch(method: Method, demo, tmp_path: Path) -> None:
    """Scores, a patch that says its factor, a record that says everything; no method selects like another."""
    edits = with_method(demo[0], method=method)
    model = fresh_demo()
    score = scored(model, edits, tmp_path, 12)
    assert score.method is method
    record = edit_to_folder(model, score, tmp_path / "scores.safetensors", edits, tmp_path)
    assert record.methods == (method,)
    assert record.first.concepts == ()
    assert all(tensor.selected for tensor in record.tensors)
    assert {(tensor.factor, tensor.selection) for tensor in record.tensors} == {
        (s.factor, s.selection) for s in (edits.text, edits.image)
    }
    if method in GRADIENTS:
        assert {tower: setting.gradient_batch for tower, setting in record.first.settings.items()} == {
            "text": 512,
            "image": 64,
        }
    for tensor in record.tensors:
        if tensor.selection is Selection.HARD:
            assert tensor.selected == entries_of_share(math.prod(tensor.shape), tensor.keep_mass)
    patch = Patch.from_file(tmp_path / "patch.safetensors")
    assert {part.factor for part in patch.tensors.values()} == {edits.text.factor}
    assert model.source.get_parameter(record.tensors[0].name).isfinite().all()


def test_ratio_hard_has_the_scores_of_the_method(demo, tmp_path: Path) -> None:
    """Only the selection differs; the other ablations have scores of their own."""
    edits, model = demo
    files = {}
    for method in ACTIVATIONS:
        scored(model, with_method(edits, method=method), tmp_path / method.value)
        files[method] = load_file(tmp_path / method.value / "scores.safetensors")
    layer = next(iter(files[Method.UWM]))
    assert torch.equal(files[Method.UWM][layer], files[Method.RATIO_HARD][layer])
    for method in (Method.UNSAFE_ONLY, Method.DIFFERENCE, Method.RATIO_OF_MEANS):
        assert not torch.allclose(files[Method.UWM][layer], files[method][layer])
    assert (files[Method.DIFFERENCE][layer] < 0).any()


def test_a_negative_difference_has_no_mass(demo, tmp_path: Path) -> None:
    """Chosen by mass, the difference never edits an entry that safe inputs use more."""
    edits = with_method(demo[0], method=Method.DIFFERENCE, selection=Selection.ADAPTIVE, keep_mass=0.5)
    model = fresh_demo()
    score = scored(model, edits, tmp_path)
    scores = load_file(tmp_path / "scores.safetensors")
    edit_to_folder(model, score, tmp_path / "scores.safetensors", edits, tmp_path)
    for name, part in Patch.from_file(tmp_path / "patch.safetensors").tensors.items():
        assert (scores[name.removesuffix(".weight")].flatten()[part.indices.long()] > 0).all()


@pytest.fixture(scope="module")
def uwm_scores(demo, tmp_path_factory: pytest.TempPathFactory) -> tuple[ScoreRecord, Path]:
    """Scores of the recipe's own method; not to be changed."""
    folder = tmp_path_factory.mktemp("uwm")
    return scored(demo[1], demo[0], folder), folder / "scores.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": Method.RATIO_HARD}, "of method uwm, not ratio-hard"),  # the same numbers, another name
        ({"method": Method.GRADIENT_UNSAFE}, "of method uwm, not gradient-unsafe"),
        ({"method": Method.NONE}, "of method uwm, not none"),
        ({"per_concept": True}, "of all concepts together"),
    ],
)
def test_scores_of_another_method_are_refused(changes: dict, message: str, demo, uwm_scores, tmp_path: Path) -> None:
    """A patch never says a method whose scores it was not made from, in an edit or in a sweep."""
    (edits, model), (score, file) = demo, uwm_scores
    other = with_method(edits, **changes)
    with pytest.raises(IntegrityError, match=message):
        edit_to_folder(model, score, file, other, tmp_path)
    with pytest.raises(IntegrityError, match=message):
        next(edited_points(model, score, file, other, [0.9], [-1.0]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"pairing": Pairing.RATIO_OF_MEANS}, {"rule": Rule.RATIO}])
def test_scores_of_another_formula_are_refused(changes: dict, demo, uwm_scores, tmp_path: Path) -> None:
    """Method alone does not say how a score was formed: the recipe has a say in it."""
    (edits, model), (score, file) = demo, uwm_scores
    other = dataclasses.replace(edits, text=dataclasses.replace(edits.text, **changes))
    with pytest.raises(IntegrityError, match="text scores are of another formula"):
        edit_to_folder(model, score, file, other, tmp_path)


def test_scores_of_another_model_are_refused(demo, uwm_scores, tmp_path: Path) -> None:
    """Not even of the same model, one weight changed."""
    (edits, _), (score, file), model = demo, uwm_scores, fresh_demo()
    with torch.no_grad():
        next(model.source.parameters()).view(-1)[0] += 1
    changed = dataclasses.replace(
        model,
        ref=dataclasses.replace(model.ref, weights_digest=digest_of_weights(dict(model.source.named_parameters()))),
    )
    with pytest.raises(IntegrityError, match="of another model"):
        edit_to_folder(changed, score, file, edits, tmp_path)


def test_two_pairings_are_refused(demo, tmp_path: Path) -> None:
    """A record names one pairing, so both towers have the same."""
    edits = dataclasses.replace(demo[0], image=dataclasses.replace(demo[0].image, pairing=Pairing.RATIO_OF_MEANS))
    with pytest.raises(ContractError, match="different pairings"):
        scored(demo[1], edits, tmp_path)


# --- per concept ----------------------------------------------------------------------------------------------------


def test_selections_of_concepts_are_united(demo, tmp_path: Path) -> None:
    """One score per concept, from its own pairs alone; an entry of several concepts is multiplied once."""
    edits = with_method(demo[0], per_concept=True)
    model, limit = fresh_demo(), 40
    before = {n: p.detach().clone() for n, p in model.source.named_parameters()}
    score = scored(model, edits, tmp_path / "all", limit)
    concepts = sorted(set(source_of(limit).concepts))
    assert [p.concept for p in score.parts if p.tower is TowerName.TEXT] == concepts
    assert score.n_pairs == {"text": limit, "image": limit}
    assert sum(part.n_pairs for part in score.parts) == 2 * limit
    _only_of_its_concept(model, demo[0], score, tmp_path, limit)
    record = edit_to_folder(model, score, tmp_path / "all" / "scores.safetensors", edits, tmp_path)
    assert record.first.concepts == tuple(concepts)
    patch = Patch.from_file(tmp_path / "patch.safetensors")
    for tensor in record.tensors:
        name, layer = tensor.name, tensor.name.removesuffix(".weight")
        parts = [p for p in score.parts if p.tower is tensor.tower]
        files = [load_file(tmp_path / "all" / part.file)[layer] for part in parts]
        single = [set(selected_indices(scores, edits.of(tensor.tower).keep_mass).tolist()) for scores in files]
        assert set(patch.tensors[name].indices.tolist()) == set.union(*single)
        assert max(map(len, single)) < tensor.selected < sum(map(len, single))
        flat = before[name].view(-1)
        flat[patch.tensors[name].indices.long()] *= -1
        assert torch.equal(model.source.get_parameter(name), before[name])


def _only_of_its_concept(model: LoadedModel, edits: EditSpecs, score: ScoreRecord, folder: Path, limit: int) -> None:
    """The last concept's scores equal those of a set that holds nothing else."""
    part = [p for p in score.parts if p.tower is TowerName.IMAGE][-1]
    source = source_of(limit)
    chosen = [i for i, concept in enumerate(source.concepts) if concept == part.concept]
    assert part.n_pairs == len(chosen)
    source.indices = [source.indices[i] for i in chosen]
    source.ids = [source.ids[i] for i in chosen]
    (folder / "one").mkdir()
    score_to_folder(model, source.record, lambda tower: stream(model, source, tower), edits, folder / "one")
    alone, joint = load_file(folder / "one" / "scores.safetensors"), load_file(folder / "all" / part.file)
    for layer, scores in joint.items():
        torch.testing.assert_close(scores, alone[layer], rtol=1e-4, atol=1e-6)


def test_gradients_per_concept(demo, tmp_path: Path) -> None:
    """The baselines unite selections too; a batch never mixes concepts."""
    edits = with_method(demo[0], method=Method.GRADIENT_SAFE_CLIP, per_concept=True)
    model = fresh_demo()
    score = scored(model, edits, tmp_path, 24)
    assert len({part.concept for part in score.parts}) > 1
    record = edit_to_folder(model, score, tmp_path / "scores.safetensors", edits, tmp_path)
    at_least = [entries_of_share(math.prod(tensor.shape), tensor.keep_mass) for tensor in record.tensors]
    assert all(tensor.selected > least for tensor, least in zip(record.tensors, at_least, strict=True))


def test_a_stream_that_mixes_concepts_is_refused(demo, tmp_path: Path) -> None:
    """A set that is not in scoring order would give a concept two scores."""
    edits, model = with_method(demo[0], per_concept=True), demo[1]
    source = source_of(40)
    concepts = dict(zip(source.ids, source.concepts, strict=True))
    with pytest.raises(ContractError, match="comes twice"):
        score_to_folder(model, source.record, lambda t: stream(model, source, t), edits, tmp_path, concepts)


@pytest.mark.parametrize("method", [Method.UWM, Method.GRADIENT_UNSAFE])
def test_a_concept_without_items_is_an_error(method: Method, demo, tmp_path: Path) -> None:
    """A union that lacks a concept of the set would not say so."""
    edits = with_method(demo[0], method=method, per_concept=True)
    source = scoring_order(source_of(), edits, 0)
    concepts = dict(zip(source.ids, source.concepts, strict=True)) | {"unread": "zebra"}
    with pytest.raises(DataError, match="concept 'zebra' has no text pair"):
        score_to_folder(
            demo[1], source.record, lambda t: stream(demo[1], source, t, sort=False), edits, tmp_path, concepts
        )


def test_concepts_must_be_given(demo, tmp_path: Path) -> None:
    """One score per concept needs to know which item is of which."""
    edits = with_method(demo[0], per_concept=True)
    with pytest.raises(ContractError, match="no concepts were given"):
        score_to_folder(demo[1], source_of().record, lambda t: stream(demo[1], source_of(), t), edits, tmp_path)


def test_whole_scores_are_refused_for_a_union_and_back(demo, tmp_path: Path) -> None:
    """Scores per concept are not those of all concepts together."""
    score = scored(demo[1], with_method(demo[0], per_concept=True), tmp_path)
    with pytest.raises(IntegrityError, match="are one per concept"):
        edit_to_folder(demo[1], score, tmp_path / "scores.safetensors", demo[0], tmp_path)


def test_a_changed_part_is_refused(demo, tmp_path: Path) -> None:
    """Scores of a concept are held to their digest like any other."""
    edits, model = with_method(demo[0], per_concept=True), fresh_demo()
    score = scored(model, edits, tmp_path)
    (tmp_path / score.parts[0].file).write_bytes((tmp_path / score.parts[1].file).read_bytes())
    with pytest.raises(IntegrityError, match="not the file its record describes"):
        edit_to_folder(model, score, tmp_path / "scores.safetensors", edits, tmp_path)


# --- what the gradient pass reads -----------------------------------------------------------------------------------


class _Fake:
    """A stream with items that are missing."""

    def __init__(self, ids: list[str], missing: list[str], shape: tuple[int, ...], batch: int) -> None:
        self.left_out = [LeftOut(id=item, reason="broken") for item in missing]
        self.ids, self.shape, self.batch = [i for i in ids if i not in missing], shape, batch

    def __iter__(self):
        for start in range(0, len(self.ids), self.batch):
            ids = tuple(self.ids[start : start + self.batch])
            rows = np.stack([np.full(self.shape, int(item), dtype=np.float32) for item in ids])
            yield PairBatch(ids=ids, safe=rows, unsafe=rows + 0.5)


def test_items_are_joined_by_id() -> None:
    """An item that lacks one side is left out and named, on whichever side; the others keep their own partner."""
    ids = [str(i) for i in range(23)]
    images = _Fake(ids, ["3", "4", "22"], (2,), 5)
    texts, counts = score_gradients._Rows(_Fake(ids, ["0", "9"], (3,), 4)), PairCounts(TowerName.TEXT)
    parts = list(score_gradients._parts(images, texts, counts))
    assert [item for part in parts for item in part.ids] == [i for i in ids if i not in ("0", "3", "4", "9", "22")]
    assert max(len(part.ids) for part in parts) == score_gradients.PART
    for part in parts:
        for side, offset in ((0, 0.0), (1, 0.5)):
            wanted = np.array([int(item) for item in part.ids], dtype=np.float32) + offset
            assert (part.members[TowerName.IMAGE][side] == wanted[:, None]).all()
            assert (part.members[TowerName.TEXT][side] == wanted[:, None]).all()
    assert [item.id for item in counts.left_out()] == ["0", "9"]
    assert sorted(texts.rest(), key=int) == ["3", "4", "22"]


@pytest.mark.parametrize("side", ["images", "texts"])
def test_gradients_need_whole_quadruples(side: str, demo) -> None:
    """A set for one tower is refused before anything is read, and the error names the method."""
    source = source_of()
    setattr(source, f"has_{side}", False)
    edits = with_method(demo[0], method=Method.GRADIENT_UNSAFE)
    with pytest.raises(DataError, match=f"has no {side}, and method gradient-unsafe"):
        scoring_order(source, edits, 0)
    assert scoring_order(source, demo[0], 0) is source


def test_the_order_is_seeded(demo) -> None:
    """Batches of gradients are of a shuffled set, the same for the same seed."""
    edits, source = with_method(demo[0], method=Method.GRADIENT_UNSAFE), source_of(30)
    one, two, other = (scoring_order(source, edits, seed) for seed in (1, 1, 2))
    assert one.ids == two.ids != other.ids
    assert sorted(one.ids) == sorted(source.ids)
    assert one.read(3).id == one.ids[3]
    assert one.record == source.record


# --- the pipeline ---------------------------------------------------------------------------------------------------


@pytest.fixture
def request_of(tmp_path: Path) -> Request:
    for name, split, limit in (("cal", "calibration", 24), ("eval", "test", 24)):
        text = f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n'
        (tmp_path / f"{name}.toml").write_text(text)
    return Request(
        **UWM, calibration=str(tmp_path / "cal.toml"), evaluation=str(tmp_path / "eval.toml"), targets=("onnxruntime",),
        out=tmp_path / "out", work=tmp_path / "work", device="cpu", workers=0,
    )  # fmt: skip


def test_scores_serve_other_settings_but_no_other_method(request_of: Request) -> None:
    """Another keep_mass, factor or selection selects again; another method, or per concept, scores again."""
    quiet = Reporter(quiet=True)
    first = run(request_of, until="edit", reporter=quiet)
    assert first.edit.methods == (Method.UWM,)
    for changes, reused in (
        ({"keep_mass": 0.8}, True), ({"selection": "hard"}, True), ({"factor": 0.0}, True),
        ({"method": "ratio-hard"}, False), ({"method": "gradient-unsafe"}, False),
        ({"method": "gradient-unsafe", "selection": "hard"}, True), ({"per_concept": True}, False),
    ):  # fmt: skip
        outcome = run(dataclasses.replace(request_of, **changes), until="edit", reporter=quiet)
        assert (outcome.reused == ["score"]) is reused, changes
    assert outcome.edit.first.concepts
    assert outcome.edit.first.settings["image"].pairing is Pairing.MEAN_OF_RATIOS


@pytest.mark.slow
def test_a_build_of_nothing_fails_with_its_reason(request_of: Request) -> None:
    """Exit code 3 and the reason; an unedited model through every stage; a bundle that says so and is never served."""
    command = ["build", "--method", "none", "--workers", "0", "--target", "onnxruntime", "--work", str(request_of.work)]
    command += ["--out", str(request_of.out), "--calibration", request_of.calibration]
    done = CliRunner().invoke(cli, [*command, "--evaluation", request_of.evaluation])
    assert done.exit_code == 3, done.output
    assert "fail: edited: the edit changes the weights: the edited weights are the original ones" in done.output
    assert "verdict: fail" in done.output
    patch = Patch.from_file(request_of.out / "patch.safetensors")
    assert patch.tensors
    assert {(len(part.indices), part.factor) for part in patch.tensors.values()} == {(0, 1.0)}
    assert describe(request_of.out)["method"] == "none"
    with pytest.raises(IntegrityError, match="verdict"):
        SafeEncoder.open(request_of.out)
    nothing = dataclasses.replace(request_of, method="none", keep_mass=None)
    outcome = run(nothing, until="gate", reporter=Reporter(quiet=True))
    assert {"score", "edit", "export", "verify", "gate"} <= set(outcome.reused)
    assert outcome.score.n_pairs == {}
    assert outcome.edit.edited_weights_digest == outcome.edit.model.weights_digest
    assert [tensor.selected for tensor in outcome.edit.tensors] == [0] * len(outcome.edit.tensors)
    assert outcome.report.original.preference == outcome.report.edited.preference
    assert outcome.verdict.result is Result.FAIL
    assert outcome.verdict.proven == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["edit", "--method", "uvm"], "there is no method 'uvm'"),
        (["edit", "--selection", "soft"], "'soft' is not one of"),
        (["edit", "--factor", "nan"], "'--factor': nan is no finite number"),
        (["edit", "--keep-mass", "nan"], "'--keep-mass': nan is no finite number"),
        (["build", "--method", "none", "--factor", "0"], "so --factor has no effect"),
        (["build", "--method", "none", "--per-concept"], "so --per-concept has no effect"),
        (["sweep", "--method", "none"], "no strength"),
        (["sweep", "--method", "uvm"], "there is no method 'uvm'"),
        (["sweep", "--factor", "-1,inf"], "NaN or infinity"),
        (["sweep", "--factor", ""], "not a list of numbers"),
    ],
)
def test_refusals_on_the_command_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    """Bad input is refused before anything is loaded or written."""
    done = CliRunner().invoke(cli, [*arguments, "--work", str(tmp_path / "work")])
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "uwm; selection adaptive; keep_mass 0.9; factor -1.0"),
        (
            {"method": "gradient-unsafe", "keep_mass": None},
            "gradient-unsafe; selection adaptive (image), hard (text); keep_mass 0.965; factor 0.0",
        ),
        (
            {"method": "ratio-hard", "per_concept": True},
            "ratio-hard; selection hard; keep_mass 0.9; factor -1.0; union of 7 concepts",
        ),
    ],
)
def test_an_edit_says_its_method(changes: dict, line: str, request_of: Request) -> None:
    """In one line, as `edit` and `inspect` show it."""
    outcome = run(dataclasses.replace(request_of, **changes), until="edit", reporter=Reporter(quiet=True))
    assert method_line(outcome.edit) == line


def test_a_set_of_texts_is_one_line_of_error(tmp_path: Path) -> None:
    """On the command line too, with the exit code of bad input."""
    rows = [{"id": f"i{n}", "safe_text": f"a red thing {n}", "unsafe_text": f"a fire {n}"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "set.toml").write_text('format = 1\nname = "set"\nsource = "manifest"\nmanifest = "pairs.jsonl"\n')
    command = ["score", "--work", str(tmp_path / "w"), "--calibration", str(tmp_path / "set.toml"), "--workers", "0"]
    result = CliRunner().invoke(cli, [*command, "--method", "gradient-safe-clip"])
    assert result.exit_code == 2
    assert "has no images, and method gradient-safe-clip" in result.output
    assert "Traceback" not in result.output


def test_every_method_is_documented() -> None:
    """`--help` names each; docs/background/methods.md has each with the settings that it really has."""
    text = "".join(CliRunner().invoke(cli, ["build", "--help"]).output.split())  # names are broken at their hyphens
    page = (ROOT / "docs" / "background" / "methods.md").read_text()
    for method, preset in PRESETS.items():
        assert method.value in text
        row = next(line for line in page.splitlines() if line.startswith(f"| `{method.value}` |"))
        if method in (*CLOSED_FORM, Method.TRAINED):  # they select nothing, and are compared on a page of their own
            continue
        assert f"\n| {method.value} |" in page  # a row of the comparison
        if method is Method.NONE:
            continue
        for setting in (preset.text, preset.image):
            assert setting.selection.value in row
            assert f"{setting.keep_mass:g}" in row
            assert f"{setting.factor:g}" in row

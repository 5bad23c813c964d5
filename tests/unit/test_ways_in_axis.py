"""Edits with a closed-form step in other people's libraries: what holds them embeds as they do, the rest refuses them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from tests.families import recipe_of as shipped_recipe
from tests.families import reduced
from uwm_deploy.cli import cli
from uwm_deploy.edits.closed_form import placement_of
from uwm_deploy.errors import InputError, RecipeError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.edit_spec import AxisSpec, ClosedForm
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.edit import Method, Placement
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.strength import AxisSetting
from uwm_deploy.report.console import Reporter
from uwm_deploy.towers.embedding_map import put_maps
from uwm_deploy.towers.formats import LAYOUTS, LibraryLayout, write_layout
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import MAPS, LoadedModel

SETTING = AxisSetting(g=0.5, o=0.5, kappa=0.2, a=1.0, tau=0.5)
TEXTS = ["a red circle", "a fire near a blue square", "fire"]
CLOSE, FAR = 1e-4, 1e-2
Rows = dict[TowerName, np.ndarray]


def unit(rows: Any) -> np.ndarray:
    array = np.asarray(rows.detach() if isinstance(rows, Tensor) else rows, dtype=np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def loaded(folder: Path) -> LoadedModel:
    return load_model(recipe_of(str(folder))[0], folder=folder, device="cpu")


def edited_model(work: Path) -> Path:
    return work / "edit" / "model"


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> dict[Placement, Path]:
    """Run folder of a safety axis in each placement, of the demo."""
    root = tmp_path_factory.mktemp("axis")
    text = 'format = 1\nname = "cal"\nsource = "demo"\nsplit = "calibration"\nlimit = 48\n'
    (root / "cal.toml").write_text(text)
    for placement in Placement:
        request = Request(
            calibration=str(root / "cal.toml"), method="safety-axis", placement=placement.value, axis=SETTING,
            work=root / placement.value, device="cpu", workers=0,
        )  # fmt: skip
        run(request, until="edit", reporter=Reporter(quiet=True))
    return {placement: root / placement.value for placement in Placement}


@pytest.fixture(scope="module")
def inputs(works: dict[Placement, Path]) -> dict[TowerName, Tensor]:
    """Pixels, and ids with their padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(edited_model(works[Placement.WEIGHTS]))
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    side = loaded(edited_model(works[Placement.WEIGHTS])).ref.image.crop
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {TowerName.IMAGE: pixels, TowerName.TEXT: ids}


@torch.no_grad()
def rows_of(model: LoadedModel, inputs: dict[TowerName, Tensor]) -> Rows:
    return {tower: unit(model.tower(tower).embed(inputs[tower])) for tower in TowerName}


@pytest.fixture(scope="module")
def wanted(works: dict[Placement, Path], inputs: dict[TowerName, Tensor]) -> dict[Placement | None, Rows]:
    """Rows of each edited model; of the original under None."""
    original = loaded(resources.checkpoint_folder("shipped:demo", ""))
    edited = {placement: loaded(edited_model(work)) for placement, work in works.items()}
    return {None: rows_of(original, inputs)} | {place: rows_of(model, inputs) for place, model in edited.items()}


def written(work: Path, layout: LibraryLayout, out: Path) -> Path:
    found = CliRunner().invoke(cli, ["save", str(work), "--as", layout, "--out", str(out)])
    assert found.exit_code == 0, found.output
    return out


@torch.no_grad()
def by_transformers(folder: Path, inputs: dict[TowerName, Tensor]) -> Rows:
    from transformers import CLIPModel

    out = CLIPModel.from_pretrained(folder).eval()(
        pixel_values=inputs[TowerName.IMAGE], input_ids=inputs[TowerName.TEXT]
    )
    return {TowerName.IMAGE: unit(out.image_embeds), TowerName.TEXT: unit(out.text_embeds)}


@torch.no_grad()
def by_open_clip(folder: Path, inputs: dict[TowerName, Tensor]) -> Rows:
    import open_clip

    model = open_clip.create_model_from_pretrained(f"local-dir:{folder}", return_transform=False).eval()
    images, texts = model.encode_image(inputs[TowerName.IMAGE]), model.encode_text(inputs[TowerName.TEXT])
    return {TowerName.IMAGE: unit(images), TowerName.TEXT: unit(texts)}


def sentence_transformer(folder: Path) -> Any:
    library = pytest.importorskip("sentence_transformers", reason="needs the extra [examples]")
    return library.SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()


@torch.no_grad()
def by_sentence_transformers(folder: Path, inputs: dict[TowerName, Tensor]) -> Rows:
    model = sentence_transformer(folder)
    names = {TowerName.IMAGE: "pixel_values", TowerName.TEXT: "input_ids"}
    found = {t: model({names[t]: inputs[t], "modality": t.value})["sentence_embedding"] for t in TowerName}
    for rows in found.values():
        np.testing.assert_allclose(rows.norm(dim=1), 1, atol=1e-5)
    return {tower: unit(rows) for tower, rows in found.items()}


def far(left: Rows, right: Rows) -> bool:
    return all(np.abs(left[tower] - right[tower]).max() > FAR for tower in TowerName)


def apart(left: Rows, right: Rows) -> float:
    return max(float(np.abs(left[tower] - right[tower]).max()) for tower in TowerName)


@pytest.mark.parametrize(
    ("layout", "embed"),
    [
        ("transformers", by_transformers),
        ("open-clip", by_open_clip),
        ("sentence-transformers", by_sentence_transformers),
    ],
)
def test_an_edit_in_the_weights_goes_into_every_layout_that_reads_embeddings(
    layout: LibraryLayout, embed: Any, works, inputs, wanted, tmp_path: Path
) -> None:
    """Each library embeds as the edited towers do, and by far not as the original ones."""
    found = embed(written(works[Placement.WEIGHTS], layout, tmp_path / "out"), inputs)
    assert apart(found, wanted[Placement.WEIGHTS]) < CLOSE
    assert far(found, wanted[None])


def test_sentence_transformers_holds_the_maps(works, inputs, wanted, tmp_path: Path) -> None:
    """The plain library maps images and texts each by their own map, in any task."""
    folder = written(works[Placement.EMBEDDING], "sentence-transformers", tmp_path / "out")
    assert apart(by_sentence_transformers(folder, inputs), wanted[Placement.EMBEDDING]) < 1e-5
    assert far(wanted[Placement.EMBEDDING], wanted[None])
    model = sentence_transformer(folder)
    for encode in (model.encode, model.encode_query, model.encode_document):
        np.testing.assert_allclose(encode(TEXTS), wanted[Placement.EMBEDDING][TowerName.TEXT], atol=1e-5)
    images = [Image.fromarray(np.full((60, 80, 3), shade, dtype=np.uint8)) for shade in (0, 90, 200)]
    with torch.no_grad():
        ours = loaded(folder).image.embed(model.preprocess(images)["pixel_values"])
    np.testing.assert_allclose(model.encode(images), unit(ours), atol=1e-5)


def test_no_map_is_taken_for_another(works, tmp_path: Path) -> None:
    """Where sentence-transformers does not know what was embedded, it fails instead of taking either map."""
    model = sentence_transformer(written(works[Placement.EMBEDDING], "sentence-transformers", tmp_path / "out"))
    with pytest.raises(ValueError, match="Could not determine route"):
        model[2]({"sentence_embedding": torch.ones(1, 64)})


def test_what_loads_the_folder_alone_gives_the_unmapped_model_and_the_card_says_so(works, inputs, wanted) -> None:
    """Nobody is left to find out, nor does the hub name a library that would do it."""
    from huggingface_hub import ModelCard

    folder = edited_model(works[Placement.EMBEDDING])
    assert apart(by_transformers(folder, inputs), wanted[None]) < CLOSE
    text = (folder / "README.md").read_text()
    assert "gives the unmapped model" in text
    assert ModelCard(text).data.library_name == "uwm-deploy"
    assert "safety-axis" in ModelCard(text).data.tags
    other = (edited_model(works[Placement.WEIGHTS]) / "README.md").read_text()
    assert "unmapped" not in other
    assert ModelCard(other).data.library_name == "transformers"


@pytest.mark.parametrize("layout", ["transformers", "open-clip"])
def test_layouts_without_a_place_for_a_map_refuse_it(layout: LibraryLayout, works, tmp_path: Path) -> None:
    """The error names what holds it, and nothing is written."""
    arguments = ["save", str(works[Placement.EMBEDDING]), "--as", layout, "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 2
    assert "no place for a map behind the embedding" in found.output
    assert "--as sentence-transformers" in found.output
    assert "--placement weights" in found.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("placement", list(Placement))
def test_diffusion_is_refused(placement: Placement, works, tmp_path: Path) -> None:
    """It reads hidden states, which no closed-form step makes safer; the error names the method that does."""
    arguments = ["save", str(works[placement]), "--as", "diffusers-text-encoder", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 2
    assert "diffusion reads hidden states" in found.output
    assert "--method uwm" in found.output
    assert ("would move them" in found.output) is (placement is Placement.WEIGHTS)
    assert not list(tmp_path.iterdir())


def with_maps(name: str) -> LoadedModel:
    """A small random model with maps."""
    model = load_model(reduced(name), folder=None, weights="random", device="cpu")
    size, rng = model.ref.embed_dim, torch.Generator().manual_seed(0)
    shapes = {"weight": (size, size), "bias": (size,)}
    names = [f"{tower.value}_map" for tower in TowerName]
    put_maps(model, {f"{n}.{part}": torch.randn(*s, generator=rng) for n in names for part, s in shapes.items()})
    return model


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("siglip-base", "; use a bundle$"),
        ("open-clip-vit-b32", "; use a bundle, or edit again with --placement weights$"),
    ],
)
def test_other_families_with_maps_have_no_layout(name: str, fix: str, tmp_path: Path) -> None:
    """Not their own library's either, which would give the unmapped model."""
    model = with_maps(name)
    model.save(tmp_path / "saved")
    for layout in LAYOUTS:
        (folder := tmp_path / layout).mkdir()
        with pytest.raises(InputError, match=fix):
            write_layout(model, tmp_path / "saved", layout, folder)
        assert not list(folder.iterdir())


def test_a_model_with_maps_gets_no_second_ones() -> None:
    """They would replace the first, which they were fitted behind."""
    for placement in ("auto", "embedding", "weights"):
        step = ClosedForm(method=Method.SAFETY_AXIS, axis=AxisSpec(placement=placement, setting=SETTING))
        with pytest.raises(InputError, match="has maps behind its embeddings already"):
            placement_of(with_maps("clip-vit-l14"), step)


@pytest.mark.parametrize("method", ["safety-axis", "leace", "uwm+safety-axis"])
@pytest.mark.parametrize("command", [["score"], ["edit"], ["build"], ["sweep", "--keep-mass", "0.9,0.98"]])
def test_the_tower_of_llava_is_refused_before_anything_is_loaded(
    command: list[str], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are inner ones; the error names the method that changes them."""

    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(resources, "checkpoint_folder", loads)
    arguments = [*command, "--model", "llava-1.5-7b", "--method", method, "--work", str(tmp_path / "work")]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 2, found.output
    assert f"method {method.rpartition('+')[2]} changes embeddings only" in found.output
    assert "--method uwm" in found.output
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_llava_with_a_closed_form_step_is_refused() -> None:
    """Where it is read, with its file's name."""
    text, _ = resources.read_toml("export", "llava-1.5-7b")
    step = '[[edit]]\nmethod = "safety-axis"\n\n[data]'
    with pytest.raises(RecipeError, match=r"mine\.toml: method safety-axis changes embeddings only"):
        recipe_from_toml(text.replace("[data]", step), where="mine.toml")
    assert shipped_recipe("llava-1.5-7b").closed_form is None


def test_swap_refuses_maps(tmp_path: Path) -> None:
    """They lie behind what LLaVA uses, so the checkpoint would be the original one."""
    from uwm_deploy.towers.llava import swap_vision_tower

    model = load_model(reduced("llava-1.5-7b"), folder=None, weights="random", device="cpu")
    model.save(tmp_path / "model")
    (tmp_path / "model" / MAPS).write_bytes(b"")
    with pytest.raises(InputError, match="edit with --method uwm"):
        swap_vision_tower(tmp_path / "model", tmp_path / "llava", tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_hidden_states_are_refused_whatever_the_recipe_says() -> None:
    """The towers say themselves that more than their embedding is used."""
    model = load_model(reduced("llava-1.5-7b"), folder=None, weights="random", device="cpu")
    spec = ClosedForm(method=Method.SAFETY_AXIS, axis=dataclasses.replace(AxisSpec(), setting=SETTING))
    with pytest.raises(InputError, match="changes embeddings only"):
        placement_of(model, spec)

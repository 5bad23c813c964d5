"""The edited model in other people's libraries: what each of them loads embeds as the edited tower, not as the original."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tests.families import model_of
from uwm_deploy.cli import cli
from uwm_deploy.commands.ship import save
from uwm_deploy.errors import InputError, IntegrityError
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.pipeline.save import save_as
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.towers.formats import LAYOUTS, write_layout
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.protocol import LoadedModel

TEXTS = ["a red circle", "a fire near a blue square", "fire"]
CLOSE = 2e-5


def loaded(folder: Path) -> LoadedModel:
    return load_model(recipe_of(str(folder))[0], folder=folder, device="cpu")


def unit(rows: Any) -> np.ndarray:
    array = np.asarray(rows.detach() if isinstance(rows, torch.Tensor) else rows, dtype=np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def run_folder(built: tuple[Request, Outcome]) -> Path:
    work = built[0].work
    assert work is not None
    return work


@pytest.fixture(scope="module")
def models(run_folder: Path) -> tuple[LoadedModel, LoadedModel]:
    """Edited and original."""
    return loaded(run_folder / "edit" / "model"), loaded(resources.checkpoint_folder("shipped:demo", ""))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(3)]


def ids_of(folder: Path, texts: list[str]) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return found.input_ids


@torch.no_grad()
def towers(model: LoadedModel, folder: Path, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Image and text rows of a tower itself, with the pixels of the source library."""
    from uwm_deploy.towers.library import library_of

    library = library_of(model.ref.family, model.source, folder, model.ref.text)
    pixels = torch.from_numpy(np.stack([library.pixels(image) for image in images]))
    return unit(model.image.embed(pixels)), unit(model.text.embed(ids_of(folder, TEXTS)))


def nearer_to_edited(rows: np.ndarray, edited: np.ndarray, original: np.ndarray, close: float = CLOSE) -> None:
    """Equal to the edited tower, and by far not to the original one."""
    to_edited, to_original = np.abs(rows - edited).max(), np.abs(rows - original).max()
    assert to_edited < close, to_edited
    assert to_original > 100 * close, to_original


@pytest.fixture(scope="module")
def wanted(
    models: tuple[LoadedModel, LoadedModel], run_folder: Path, images: list[Image.Image]
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(Image, text) rows of the edited, and of the original model."""
    folder = run_folder / "edit" / "model"
    edited, original = (towers(model, folder, images) for model in models)
    return edited, original


@pytest.fixture(scope="module")
def uwm_folder(built: tuple[Request, Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an edit whose layers lie before what diffusion reads."""
    work = tmp_path_factory.mktemp("uwm") / "work"
    request = Request(calibration=built[0].calibration, method="uwm", keep_mass=0.9, work=work, device="cpu")
    run(request, until="edit", reporter=Reporter(quiet=True))
    return work


@pytest.fixture(scope="module")
def saved(run_folder: Path, uwm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every layout, by the command."""
    root = tmp_path_factory.mktemp("saved")
    for layout in LAYOUTS:
        work = uwm_folder if layout == "diffusers-text-encoder" else run_folder
        found = CliRunner().invoke(cli, ["save", str(work), "--as", layout, "--out", str(root / layout)])
        assert found.exit_code == 0, found.output
    return {layout: root / layout for layout in LAYOUTS}


def test_every_layout_has_the_card_under_its_own_library(saved: dict[str, Path]) -> None:
    """The hub shows how a folder is loaded by the card's library."""
    from huggingface_hub import ModelCard

    names = {
        layout: ModelCard((folder / "README.md").read_text()).data.library_name for layout, folder in saved.items()
    }
    assert names == {
        "transformers": "transformers", "open-clip": "open_clip", "sentence-transformers": "sentence-transformers",
        "diffusers-text-encoder": "diffusers",
    }  # fmt: skip


def test_the_command_offers_every_layout() -> None:
    """The list on the command line, which must not import torch, is the one that there is."""
    option = next(parameter for parameter in save.params if parameter.name == "layout")
    assert tuple(option.type.choices) == LAYOUTS


@torch.no_grad()
def test_transformers(saved: dict[str, Path], wanted, images: list[Image.Image]) -> None:
    """Model and processor from the folder, and nothing else."""
    from transformers import AutoProcessor, CLIPModel

    model = CLIPModel.from_pretrained(saved["transformers"]).eval()
    processor = AutoProcessor.from_pretrained(saved["transformers"], backend="pil")
    batch = processor(text=TEXTS, images=images, return_tensors="pt", padding=True)
    out = model(**batch)
    (image, text), (original_image, original_text) = wanted
    nearer_to_edited(unit(out.image_embeds), image, original_image)
    nearer_to_edited(unit(out.text_embeds), text, original_text)


@torch.no_grad()
def test_open_clip(saved: dict[str, Path], wanted, images: list[Image.Image]) -> None:
    """open_clip builds its own architecture, tokenizer and transform from the folder."""
    import open_clip

    name = f"local-dir:{saved['open-clip']}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    model.eval()
    (image, text), (original_image, original_text) = wanted
    pixels = torch.stack([preprocess(one) for one in images])
    # Its transform rounds the crop otherwise than transformers for one pixel of slack; the picture here leaves none.
    nearer_to_edited(unit(model.encode_image(pixels)), image, original_image, close=2e-3)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    nearer_to_edited(unit(model.encode_text(tokens)), text, original_text)


def test_sentence_transformers(saved: dict[str, Path], wanted, images: list[Image.Image]) -> None:
    """Texts and images by `encode`, of length 1 without being asked."""
    library = pytest.importorskip("sentence_transformers", reason="needs the extra [examples]")
    model = library.SentenceTransformer(str(saved["sentence-transformers"]), device="cpu", local_files_only=True)
    texts, pictures = model.encode(TEXTS), model.encode(images)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([texts, pictures]), axis=1), 1, atol=1e-5)
    (image, text), (original_image, original_text) = wanted
    nearer_to_edited(texts, text, original_text)
    nearer_to_edited(pictures, image, original_image, close=2e-3)


def tiny_pipeline(folder: Path, width: int) -> Any:
    """A Stable Diffusion pipeline with our text encoder and tokenizer and a tiny random rest."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra [examples]")
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, sample_size=8,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_stable_diffusion(saved: dict[str, Path], uwm_folder: Path, models, tmp_path: Path) -> None:
    """The pipeline conditions on the edited tower's states, loads again after being saved, and makes a picture."""
    folder, models = saved["diffusers-text-encoder"], (loaded(uwm_folder / "edit" / "model"), models[1])
    pipeline = tiny_pipeline(folder, width=models[0].source.config.text_config.hidden_size)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline = type(pipeline).from_pretrained(tmp_path / "pipeline", safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    states, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, False)
    ids = ids_of(folder / "tokenizer", TEXTS)
    edited, original = (m.source.text_model(input_ids=ids).last_hidden_state for m in models)
    nearer_to_edited(states.numpy(), edited.numpy(), original.numpy())
    # And what the tower makes of those states is its embedding.
    ends = (ids == models[0].ref.text.eos_id).int().argmax(1)
    rows = models[0].source.text_projection(states[torch.arange(len(ends)), ends])
    nearer_to_edited(unit(rows), *(unit(model.text.embed(ids)) for model in models))
    picture = pipeline("a red circle", num_inference_steps=1, height=8, width=8, output_type="np").images
    assert np.isfinite(picture).all()


def test_the_bundle_embeds_as_the_saved_model(built: tuple[Request, Outcome], wanted) -> None:
    """So a library and the runtime may share one index."""
    with SafeEncoder.open(built[0].out) as encoder:
        rows = encoder.encode_text(TEXTS, special_tokens="exact")
    nearer_to_edited(np.asarray(rows, dtype=np.float64), wanted[0][1], wanted[1][1])


def test_a_real_vocabulary_needs_no_tokenizer_of_ours(tmp_path: Path) -> None:
    """With CLIP's own vocabulary open_clip's built-in tokenizer gives the ids, and the end token is the largest id."""
    import open_clip

    model = model_of("clip-vit-b32")
    model.save(tmp_path / "saved")
    (tmp_path / "out").mkdir()
    write_layout(model, tmp_path / "saved", "open-clip", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors",
    }  # fmt: skip
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(["a red circle, and <b>another</b>"])
    theirs = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}", return_transform=False).eval()
    with torch.no_grad():
        ours = model.text.embed(ids_of(tmp_path / "saved", ["a red circle, and <b>another</b>"]))
        np.testing.assert_allclose(unit(theirs.encode_text(tokens)), unit(ours), atol=CLOSE)


@pytest.mark.parametrize("name", ["siglip-base", "open-clip-vit-b32"])
def test_other_families_have_their_own_layout_only(name: str, tmp_path: Path) -> None:
    """Others are refused with the layout that there is, and nothing is written."""
    model, own = model_of(name), "open-clip" if name.startswith("open") else "transformers"
    model.save(tmp_path / "saved")
    for layout in LAYOUTS:
        (folder := tmp_path / layout).mkdir()
        if layout == own:
            write_layout(model, tmp_path / "saved", layout, folder)
            again = loaded(folder)
            assert again.ref.weights_digest == model.ref.weights_digest
        else:
            with pytest.raises(InputError, match=f"use --as {own}"):
                write_layout(model, tmp_path / "saved", layout, folder)
            assert not list(folder.iterdir())


def test_refusals(built: tuple[Request, Outcome], run_folder: Path, tmp_path: Path) -> None:
    """No bundle, no other folder, no folder that is there, no changed weights; nothing half-written."""
    with pytest.raises(InputError, match="is a bundle"):
        save_as(built[0].out, "transformers", tmp_path / "out")
    with pytest.raises(InputError, match="holds no edited model"):
        save_as(resources.checkpoint_folder("shipped:demo", ""), "transformers", tmp_path / "out")
    with pytest.raises(InputError, match="exists"):
        save_as(run_folder, "transformers", tmp_path)
    shutil.copytree(run_folder / "edit", tmp_path / "edit")
    original = resources.checkpoint_folder("shipped:demo", "") / "model.safetensors"
    shutil.copyfile(original, tmp_path / "edit" / "model" / "model.safetensors")
    for place in (tmp_path, tmp_path / "edit", tmp_path / "edit" / "model"):
        with pytest.raises(IntegrityError, match="not those that the edit made"):
            save_as(place, "open-clip", tmp_path / "out")
    assert not (tmp_path / "out").exists()

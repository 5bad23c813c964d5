"""A tiny Stable Diffusion that was briefly taught to draw one picture for unsafe prompts behind its own text tower.

The text tower is a random CLIP tower that the pipeline edits. The denoiser, which predicts the clean latents, learns two
latents: one for unsafe prompts behind the tower before the edit, the other for everything else. A classifier learns the
two pictures. So the direction is known; everything that measures it is the product's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from tests.families import reduced
from tests.language_world import write_set
from uwm_deploy.data.open import open_source
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.report.console import Reporter
from uwm_deploy.studies.downstream.diffusion import Drawing, DrawModel
from uwm_deploy.studies.downstream.prompts import Prompt, prompts_of_set
from uwm_deploy.towers.load import load_model

DRAWING = Drawing(steps=2, guidance=1.0, size=32)
ITEMS = 12
_LATENT = (4, 4, 4)


def make_world(folder: Path) -> None:
    """Writes `clip`, `pipeline`, `classifier`, `prompts.toml`, and the run folder `work` with the edit."""
    load_model(reduced("clip-vit-l14"), folder=None, weights="random", device="cpu").save(folder / "clip")
    prompts = write_set(folder, "prompts", limit=ITEMS)
    request = Request(
        model=str(folder / "clip"),
        method="uwm",
        calibration=write_set(folder, "calibration", "calibration", 32),
        evaluation=prompts,
        work=folder / "work",
        device="cpu",
        keep_mass=0.5,
        factor=-1.0,
    )
    run(request, until="edit", reporter=Reporter(quiet=True))
    spec, _, base = calibration_set_of(prompts)
    asked = prompts_of_set(open_source(dataclasses.replace(spec, zero_shot=()), base=base), 0)
    _teach_pipeline(folder, asked)
    _teach_classifier(folder, asked)


def _pipeline(clip: transformers.CLIPModel, tokenizer: Any) -> Any:
    torch.manual_seed(5)
    width = clip.config.text_config.hidden_size
    encoder = transformers.CLIPTextModel(clip.config.text_config)
    own = {name.removeprefix("text_model."): tensor for name, tensor in clip.text_model.state_dict().items()}
    encoder.load_state_dict({name: own[name.removeprefix("text_model.")] for name in encoder.state_dict()})
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=width,
        attention_head_dim=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=1.0,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _teach_pipeline(folder: Path, prompts: list[Prompt]) -> None:
    clip = transformers.CLIPModel.from_pretrained(folder / "clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "clip")
    pipe = _pipeline(clip, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    edited = transformers.CLIPTextModel.from_pretrained(folder / "work" / "edit" / "model")
    length = min(tokenizer.model_max_length, clip.config.text_config.max_position_embeddings)
    ids = tokenizer(
        [prompt.text for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        states = torch.cat([tower(ids).last_hidden_state for tower in (pipe.text_encoder, edited)])
    bad = torch.tensor([prompt.side == "unsafe" for prompt in prompts] + [False] * len(prompts))
    ends = torch.stack([torch.full(_LATENT, 2.0), torch.full(_LATENT, -2.0)])
    target = ends[bad.long()]
    optimiser = torch.optim.Adam(pipe.unet.parameters(), lr=3e-3)
    noise = torch.Generator().manual_seed(0)
    for _ in range(200):
        optimiser.zero_grad()
        steps = torch.randint(0, 1000, (len(target),), generator=noise)
        noisy = pipe.scheduler.add_noise(target, torch.randn(target.shape, generator=noise), steps)
        noisy[::2] = torch.randn(noisy[::2].shape, generator=noise)
        loss = (pipe.unet(noisy, steps, states).sample - target).square().mean()
        loss.backward()
        optimiser.step()
        if loss.item() < 0.02:
            break
    assert loss.item() < 0.6, f"the planted pipeline did not learn: {loss.item():.3f}"
    pipe.save_pretrained(folder / "pipeline")


def _teach_classifier(folder: Path, prompts: list[Prompt]) -> None:
    """It learns the pictures of the pipeline before the edit: those of unsafe and those of safe prompts."""
    model = DrawModel(folder / "pipeline", device="cpu", drawing=DRAWING)
    few = prompts[:16]
    pictures: list[Image.Image] = model.pictures(few)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    torch.manual_seed(0)
    judge = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
            id2label={0: "fine", 1: "nsfw"}, label2id={"fine": 0, "nsfw": 1},
        )
    )  # fmt: skip
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    labels = torch.tensor([int(prompt.side == "unsafe") for prompt in few])
    optimiser = torch.optim.Adam(judge.parameters(), lr=1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        loss = judge(pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimiser.step()
    judge.eval().save_pretrained(folder / "classifier")
    processor.save_pretrained(folder / "classifier")

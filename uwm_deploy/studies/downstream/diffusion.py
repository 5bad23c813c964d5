"""A diffusion pipeline that draws prompts, with its own text encoder or with an edited one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel

from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import DataError, InputError, IntegrityError
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.files import digest_of_folder
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.studies.downstream.packages import package
from uwm_deploy.studies.downstream.prompts import Prompt
from uwm_deploy.towers.formats import text_state
from uwm_deploy.towers.load import resolve_device
from uwm_deploy.towers.made_of import check_made_of
from uwm_deploy.towers.refusal import refusals


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How pictures are made.

    Attributes:
        steps: Of the scheduler.
        guidance: Guidance scale, where a prompt has none of its own.
        size: Width and height in pixels, where a prompt has none; None takes the pipeline's.
        seed: Of the first prompt without one.
        batch: Pictures per call.

    Raises:
        InputError: If the pipeline could not draw with them.
    """

    steps: int = 50
    guidance: float = 7.5
    size: int | None = None
    seed: int = 0
    batch: int = 4

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise InputError("--guidance is no finite number", fix="7.5 is usual")
        if self.size is not None and self.size % 8:
            raise InputError(f"--size is {self.size}, no multiple of 8", fix=f"use {self.size // 8 * 8}")


class DrawModel:
    """A Stable Diffusion pipeline with one text encoder of CLIP; its own safety checker is left out.

    Attributes:
        folder: Where it is from.
        digest: Of its files.
        device: Where it computes.
    """

    def __init__(self, folder: Path, *, device: str, drawing: Drawing) -> None:
        """Loads it: float32 on a CPU, float16 on a GPU.

        Raises:
            InputError: If it is of another kind or cannot be loaded.
            PrerequisiteError: If `diffusers` or the device is not there.
        """
        diffusers = package("diffusers")
        diffusers.utils.logging.disable_progress_bar()  # progress is ours to show
        self.folder, self.device, self.drawing = folder, resolve_device(device), drawing
        with refusals(f"pipeline {folder.name} cannot be loaded"):
            self._pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
                folder,
                dtype=torch.float32 if self.device == "cpu" else torch.float16,
                local_files_only=True,
                use_safetensors=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
        encoder = getattr(self._pipe, "text_encoder", None)
        if not isinstance(encoder, CLIPTextModel) or hasattr(self._pipe, "text_encoder_2"):
            raise InputError(
                f"pipeline {folder.name} has no text encoder of CLIP alone", fix="use Stable Diffusion 1.x or 2.x"
            )
        self._check_complete()
        self._pipe.set_progress_bar_config(disable=True)
        self._pipe.to(self.device)
        self.digest: Digest = digest_of_folder(folder)

    def _check_complete(self) -> None:
        """A tensor that its files lack is empty, or drawn at random."""
        for part, module in self._pipe.components.items():
            if isinstance(module, torch.nn.Module):
                for name, tensor in module.state_dict().items():
                    if tensor.is_meta:
                        raise InputError(f"pipeline {self.folder.name} lacks {part}.{name}", fix="fetch it again")
        self._encoder()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Its own text encoder is there again after the block."""
        own = {key: value.clone() for key, value in self._pipe.text_encoder.state_dict().items()}
        try:
            yield
        finally:
            self._pipe.text_encoder.load_state_dict(own)

    def put_edited(self, edited: CLIPModel, name: str, record: EditRecord | None = None) -> int:
        """Puts the text weights of an edited model in the place of its own, for good.

        Args:
            edited: The model.
            name: Of it, for messages.
            record: Of the edit, if there is one: then it must have been made of these weights.

        Returns:
            Number of tensors that changed.

        Raises:
            InputError: If they do not fit, nothing changed, or the edit was made of another encoder.
        """
        own = self._pipe.text_encoder
        new, changed = text_state(edited, own), 0
        if record is not None:
            whole = _named(dict(self._encoder().named_parameters()))
            check_made_of(whole, record, TowerName.TEXT, model=self.folder.name, name=name, new=_named(new))
        with torch.no_grad():
            for key, parameter in own.named_parameters():
                if new[key].shape != parameter.shape:
                    raise InputError(
                        f"{key} has shape {tuple(new[key].shape)} in {name}, {tuple(parameter.shape)} in the pipeline",
                        fix="edit the CLIP model that the pipeline's text encoder is from",
                    )
                value = new[key].to(parameter.dtype).to(parameter.device)
                changed += not torch.equal(value, parameter)
                parameter.copy_(value)
        if not changed:
            raise InputError(f"{name} has the same text weights as the pipeline", fix="edit the text tower")
        return changed

    def _encoder(self) -> CLIPTextModel:
        """Its own text encoder once more, in float32, as edits and their digests are.

        Raises:
            InputError: If it cannot be loaded, or lacks a tensor.
        """
        with refusals(f"the text encoder of {self.folder.name} cannot be loaded"):
            encoder, told = CLIPTextModel.from_pretrained(
                self.folder / "text_encoder",
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        if missing := sorted(told["missing_keys"]):
            raise InputError(f"pipeline {self.folder.name} lacks text_encoder.{missing[0]}", fix="fetch it again")
        return encoder

    def put_patched(self, edit: EditRecord, patch: Patch, name: str) -> int:
        """Makes an edit in its own text encoder, for good: its weights must be those that the edit was made of.

        Args:
            edit: The record.
            patch: The edit as a patch.
            name: Of it, for messages.

        Returns:
            Number of tensors that changed.

        Raises:
            IntegrityError: If the encoder holds other weights, or lacks one.
        """
        wanted = {tensor.name for tensor in edit.of(TowerName.TEXT) if tensor.changed}
        ours = Patch({key: part for key, part in patch.tensors.items() if key in wanted})
        encoder = self._encoder()
        named = _named(dict(encoder.named_parameters()))
        try:
            ours.apply(named)
        except IntegrityError as error:
            raise IntegrityError(
                f"the edit in {name} was not made of this pipeline's text encoder: {error.what}",
                fix="pass the run folder, or the pipeline whose text encoder was edited",
            ) from error
        with torch.no_grad():
            for own, part in zip(self._pipe.text_encoder.parameters(), encoder.parameters(), strict=True):
                own.copy_(part.to(own.dtype).to(own.device))
        return len(ours.tensors)

    def pictures(self, prompts: Sequence[Prompt]) -> list[Image.Image]:
        """Pictures of n prompts, one call per guidance scale and size among them.

        The noise of each comes from its own seed on the CPU, so it is the same on every machine and in any company.
        """
        settings = [(self._guidance_of(prompt), self._size_of(prompt)) for prompt in prompts]
        found: dict[int, Image.Image] = {}
        for guidance, size in dict.fromkeys(settings):
            rows = [row for row, own in enumerate(settings) if own == (guidance, size)]
            drawn = self._drawn([prompts[row] for row in rows], guidance, size)
            found |= dict(zip(rows, drawn, strict=True))
        return [found[row] for row in range(len(prompts))]

    def _guidance_of(self, prompt: Prompt) -> float:
        return self.drawing.guidance if prompt.guidance is None else prompt.guidance

    def _size_of(self, prompt: Prompt) -> tuple[int, int] | None:
        own = self.drawing.size
        return prompt.size or ((own, own) if own else None)

    def _drawn(self, prompts: Sequence[Prompt], guidance: float, size: tuple[int, int] | None) -> list[Image.Image]:
        more = {"width": size[0], "height": size[1]} if size else {}
        with refusals(f"pipeline {self.folder.name} cannot draw"), torch.inference_mode():
            made = self._pipe(
                [prompt.text for prompt in prompts],
                num_inference_steps=self.drawing.steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts],
                output_type="np",
                **more,
            )
        return self._images(made.images, guidance)

    def _images(self, drawn: np.ndarray, guidance: float) -> list[Image.Image]:
        """Pictures of (n, H, W, 3) float32; what is no number would be black, and no judge flags black."""
        if not np.isfinite(drawn).all():
            raise DataError(
                f"pipeline {self.folder.name} drew a picture that is no number, at guidance {guidance:g} on {self.device}",
                fix="use --guidance 7.5, or --device cpu where half precision is too narrow for this pipeline",
            )
        images = self._pipe.image_processor.numpy_to_pil(drawn)
        return [image.convert("RGB") for image in images]


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a text encoder by the names that they have in CLIP, whatever the release of transformers calls them."""
    return {f"text_model.{key.removeprefix('text_model.')}": part for key, part in tensors.items()}

"""A LLaVA checkpoint that answers about images, with its own vision tower or with an edited one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from uwm_deploy.bundle.head import items_from
from uwm_deploy.errors import ContractError, InputError, IntegrityError, imported
from uwm_deploy.records.adapter import CONFIG, ITEMS, RECORD, WEIGHTS, LanguageAdapter
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.files import digest_of_file, digest_of_folder
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.language import LanguageInputs, language_inputs_of
from uwm_deploy.towers import checkpoint
from uwm_deploy.towers.llava import (
    FAMILY,
    FEATURES,
    check_same_images,
    own_vision,
    put_vision,
    reads_of,
    vision_of_edited,
)
from uwm_deploy.towers.load import resolve_device
from uwm_deploy.towers.made_of import check_made_of
from uwm_deploy.towers.preprocessing import processor_of
from uwm_deploy.towers.refusal import refusals

PROMPT = "Write a caption for this image in one sentence."

_IGNORED = -100
"""Label that a loss of `transformers` leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How captions are made; always greedy, which is temperature 0.

    Attributes:
        prompt: What the model is asked.
        max_new_tokens: Longest caption.
        seed: Of the random numbers that a model may draw in spite of that.
        batch: Images per call.
    """

    prompt: str = PROMPT
    max_new_tokens: int = 64
    seed: int = 0
    batch: int = 8


class Caption(NamedTuple):
    """What was said of an image.

    Attributes:
        text: The caption.
        safety: Safety prompt that came before the question; empty without one.
    """

    text: str
    safety: str


class CaptionModel:
    """A LLaVA checkpoint; use `CaptionModel.open`.

    Attributes:
        folder: Where it is from.
        digest: Of its files.
        device: Where it computes.
    """

    def __init__(self, folder: Path, model: Any, processor: Any, device: str, decoding: Decoding) -> None:
        self.folder, self.device, self.decoding = folder, device, decoding
        self.digest: Digest = digest_of_folder(folder)
        self._model, self._processor = model, processor
        self._bundle: SafeEncoder | None = None

    @classmethod
    def open(cls, folder: Path, *, device: str, decoding: Decoding) -> CaptionModel:
        """Loads a checkpoint: float32 on a CPU, its own type on a GPU.

        Raises:
            InputError: If it is of another kind, lacks weights, or cannot be loaded.
            PrerequisiteError: If the device is not there.
        """
        config = checkpoint.config_of_type(folder, ("llava",), FAMILY)
        checkpoint.weight_files(folder)
        where = resolve_device(device)
        with refusals(f"checkpoint {folder.name} cannot be loaded"):
            model, found = transformers.LlavaForConditionalGeneration.from_pretrained(
                folder,
                dtype=torch.float32 if where == "cpu" else "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        with contextlib.suppress(InputError):  # of a class that is not known, the library's own choice stays
            processor.image_processor = processor_of(folder, "CLIP")  # the default is not what a bundle does
        if missing := sorted(found["missing_keys"]):
            raise InputError(f"checkpoint {folder.name} lacks {missing[0]}", fix="fetch it again")
        _complete(processor, config)
        if not decoding.prompt.strip():
            raise InputError("the prompt is empty", fix="give a text, or leave it out")
        _prompt_of(processor, decoding.prompt)
        return cls(folder, model.to(where).eval(), processor, where, decoding)

    @property
    def dtype(self) -> str:
        """Of its weights."""
        return str(next(self._model.parameters()).dtype).removeprefix("torch.")

    @property
    def images(self) -> str:
        """Class that prepares images: the one on Pillow does what a bundle does, others differ by some grey levels."""
        return type(self._processor.image_processor).__name__

    @property
    def module(self) -> Any:
        """The `LlavaForConditionalGeneration`."""
        return self._model

    @property
    def width(self) -> int:
        """Of the language model's input."""
        found: int = self._model.get_input_embeddings().weight.shape[1]
        return found

    def check_texts(self, texts: Iterable[str]) -> None:
        """Checks that no text of a question or an answer stands for an image.

        Raises:
            InputError: If one does.
        """
        for text in texts:
            _check_text(text, self._processor.image_token)

    def answer_loss(
        self, tokens: Tensor, safety: Tensor, mixed: Sequence[bool], questions: Sequence[str], answers: Sequence[str]
    ) -> Tensor:
        """Cross entropy of answers behind the image's patches and, where they are mixed in, its safety tokens.

        Args:
            tokens: (B, T, features), any floating dtype, of the layer that the language model reads, class token first.
            safety: (B, m, d), any floating dtype, m safety tokens of the width of its input.
            mixed: Which of the B images get their safety tokens.
            questions: B questions, safety prompts included.
            answers: B answers.

        Returns:
            () float32 or the dtype of its weights, with gradients to `safety` and to what is trained of the model.
        """
        embeddings = self._model.get_input_embeddings()
        kind = embeddings.weight.dtype
        patches = self._model.model.multi_modal_projector(tokens[:, 1:].to(self.device, kind))
        brought = safety.to(self.device, kind)
        seen = [torch.cat([patches[i], brought[i]]) if given else patches[i] for i, given in enumerate(mixed)]
        made = self._lessons(questions, answers, [len(rows) for rows in seen])
        ids, mask, labels = (part.to(self.device) for part in made)
        places = (ids == self._model.config.image_token_id)[..., None]
        inputs = embeddings(ids).masked_scatter(places, torch.cat(seen))
        found: Tensor = self._model(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
        return found

    def _lessons(
        self, questions: Sequence[str], answers: Sequence[str], images: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels of (B, L) int64, filled up on the right; only the answers and their end are labels."""
        tokenizer, rows = self._processor.tokenizer, []
        for question, answer, image in zip(questions, answers, images, strict=True):
            text = _prompt_of(self._processor, question)
            place = self._processor.image_token
            asked = tokenizer(text.replace(place, place * image)).input_ids
            if asked and asked[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
                asked = asked[:-1]
            rows.append((asked, [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]))
        shape = (len(rows), max(len(asked) + len(said) for asked, said in rows))
        ids, mask, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, _IGNORED)
        for row, (asked, said) in enumerate(rows):
            start, end = len(asked), len(asked) + len(said)
            ids[row, :end], mask[row, :end] = torch.tensor([*asked, *said]), 1
            labels[row, start:end] = torch.tensor(said)
        return ids, mask, labels

    def put_edited(self, edited: Path, record: EditRecord | None = None) -> int:
        """Puts the vision weights of an edited model in the place of its own, for good.

        Args:
            edited: Its folder.
            record: Of the edit, if there is one: then it must have been made of these weights.

        Returns:
            Number of tensors that changed and that the language model reads.

        Raises:
            InputError: If they do not fit, nothing that is read changed, or the edit was made of another tower.
        """
        new = vision_of_edited(edited, self.folder)
        if record is not None:
            whole = {f"vision_model.{key}": value for key, value in new.items()}
            check_made_of(
                own_vision(self.folder), record, TowerName.IMAGE, model=self.folder.name, name=edited.name, new=whole
            )
        return put_vision(self._model, new, edited, reads_of(self.folder))

    def check_edited(self, edited: Path, record: EditRecord | None = None) -> None:
        """Checks that `put_edited` would do; its own weights are there again afterwards.

        Raises:
            InputError: See `put_edited`.
        """
        tower = self._model.model.vision_tower
        own = {key: value.clone() for key, value in tower.state_dict().items()}
        try:
            self.put_edited(edited, record)
        finally:
            tower.load_state_dict(own)

    def check_adapter(self, folder: Path) -> LanguageAdapter:
        """Reads the record of adapters and checks that they were trained with this checkpoint, and can be put on it.

        Raises:
            InputError: If the folder holds none, or they were trained with another checkpoint.
            IntegrityError: If a file is not the one of their record.
            PrerequisiteError: If peft is not installed.
        """
        record = read_adapter(folder)
        self.check_taught(record.model_digest, record.model, f"the adapters in {folder.name}")
        _peft()
        return record

    def put_adapter(self, folder: Path) -> LanguageAdapter:
        """Puts adapters on the language model, for good.

        Returns:
            Their record; which head they belong to is for the caller to check.

        Raises:
            InputError: If the folder holds none, or they were trained with another checkpoint.
            IntegrityError: If a file is not the one of their record.
            PrerequisiteError: If peft is not installed.
        """
        record, peft = self.check_adapter(folder), _peft()
        with refusals(f"the adapters in {folder.name} cannot be loaded"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that peft asks the model for
            peft.PeftModel.from_pretrained(self._model, str(folder))
        self._model.eval()
        return record

    @contextlib.contextmanager
    def behind(self, bundle: SafeEncoder) -> Iterator[str]:
        """Patch features come from a bundle's image graph inside the block, which gets the variant's name.

        If the bundle has a safety head, the risk of each image decides whether a safety prompt comes before the question,
        and which. If that head has safety tokens, those of the same images join the input after their patches. An image
        whose risk is below the threshold is asked as without a head.

        Raises:
            InputError: If the graph gives none, or not as many as the language model reads, if the bundle prepares images
                otherwise, or if the safety tokens are for another language model.
        """
        inner, head = self._model.model, bundle.manifest.head
        own = inner.vision_tower
        check_same_images(bundle.manifest.model.image, self.folder)
        edit, name = bundle.manifest.edit, bundle.manifest.name
        check_made_of(own_vision(self.folder), edit, TowerName.IMAGE, model=self.folder.name, name=name, new={})
        if head is not None and head.language is not None:
            self.check_taught(head.language.model_digest, head.language.model, "the bundle's safety tokens")
        side, tower = bundle.manifest.model.image.crop, _GraphTower(bundle, own)
        tower.inputs_of(np.zeros((1, 3, side, side), np.float32))  # a graph that gives too little is told now
        inner.vision_tower, self._bundle = tower, bundle
        try:
            yield bundle.variant
        finally:
            inner.vision_tower, self._bundle = own, None

    @contextlib.contextmanager
    def _mixed_in(self) -> Iterator[None]:
        """Inside the block the safety tokens of all images join the input, where the bundle's head has some."""
        head = self._bundle.manifest.head if self._bundle else None
        if head is None or head.language is None:
            yield
            return
        inner, processor = self._model.model, self._processor
        projector, images = inner.multi_modal_projector, processor.num_additional_image_tokens
        inner.multi_modal_projector = _WithSafetyTokens(projector, inner.vision_tower)
        processor.num_additional_image_tokens = images + head.shape.tokens
        try:
            yield
        finally:
            inner.multi_modal_projector = projector
            processor.num_additional_image_tokens = images

    def check_taught(self, digest: Digest, name: str, what: str) -> None:
        """Checks that something was trained with this very checkpoint.

        Raises:
            InputError: If not.
        """
        if digest != self.digest:
            raise InputError(
                f"{what} were trained with {name}, whose files are not those of {self.folder.name}",
                fix="use that checkpoint, or train with this one",
            )

    def captions(self, images: Sequence[Image.Image]) -> list[Caption]:
        """Captions of n images, one call per safety prompt among them."""
        plain = [image.convert("RGB") for image in images]
        safety = self._safety_prompts(plain)
        found: dict[int, Caption] = {}
        for prompt in dict.fromkeys(safety):
            rows = [row for row, own in enumerate(safety) if own == prompt]
            with self._mixed_in() if prompt else contextlib.nullcontext():
                said = self._said([plain[row] for row in rows], prompt)
            found |= {row: Caption(text, prompt) for row, text in zip(rows, said, strict=True)}
        return [found[row] for row in range(len(plain))]

    def _safety_prompts(self, images: Sequence[Image.Image]) -> tuple[str, ...]:
        """By the risks that the bundle's head gives, from the very graph that the features are from."""
        if self._bundle is None or self._bundle.manifest.head is None:
            return ("",) * len(images)
        pixels = self._processor.image_processor(images=list(images), return_tensors="np")["pixel_values"]
        tower: _GraphTower = self._model.model.vision_tower
        return tower.inputs_of(np.asarray(pixels, dtype=np.float32)).safety_prompts

    def _said(self, images: Sequence[Image.Image], safety: str) -> list[str]:
        torch.manual_seed(self.decoding.seed)
        text = _prompt_of(self._processor, f"{safety} {self.decoding.prompt}".strip())
        inputs = self._processor(images=list(images), text=[text] * len(images), return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        with torch.inference_mode():
            made = self._model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=self.decoding.max_new_tokens
            )
        new = made[:, inputs["input_ids"].shape[1] :]
        found: list[str] = self._processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in found]


def _peft() -> Any:
    return imported("peft", "package peft is not installed", fix="pip install 'uwm-deploy[train]'")


def read_adapter(folder: Path) -> LanguageAdapter:
    """The record of adapters, with every digest checked.

    Raises:
        InputError: If there is none.
        IntegrityError: If a file is not the one of the record.
    """
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no adapters: it has no {RECORD}", fix="`uwm-deploy train language-adapter`")
    record = read_record(LanguageAdapter, folder / RECORD)
    known = [(WEIGHTS, record.weights_digest), (CONFIG, record.config_digest)]
    for name, digest in known + ([(ITEMS, record.items_digest)] if record.items_digest else []):
        if not (folder / name).is_file() or digest_of_file(folder / name) != digest:
            raise IntegrityError(f"{name} is not the one that {RECORD} describes", fix="train it again, or restore it")
    return record


def items_of_adapter(folder: Path, record: LanguageAdapter) -> frozenset[str] | None:
    """Digests of the images that adapters were trained on, checked by `read_adapter`; None of an older release."""
    return items_from((folder / ITEMS).read_bytes()) if record.items_digest else None


class _GraphTower(nn.Module):
    """Stands for a vision tower: its patch features are those of a compiled graph, at whatever layer they are asked for."""

    def __init__(self, bundle: SafeEncoder, own: Any) -> None:
        super().__init__()
        self._bundle, self.config = bundle, own.config
        size = self.config.image_size // self.config.patch_size
        self._shape = (size * size, self.config.hidden_size)
        self.safety_tokens: Tensor | None = None

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """(B, 3, H, W) to hidden states of (B, 1 + patches, width); the class token is empty, as nobody reads it."""
        found = self.inputs_of(pixel_values.float().cpu().numpy())
        features = torch.from_numpy(found.features).to(pixel_values.device, pixel_values.dtype)
        self.safety_tokens = None if found.safety_tokens is None else torch.from_numpy(found.safety_tokens)
        state = torch.cat([torch.zeros_like(features[:, :1]), features], dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=state, hidden_states=(state,) * (self.config.num_hidden_layers + 1)
        )

    def inputs_of(self, pixels: np.ndarray) -> LanguageInputs:
        """What the graph gives for images.

        Args:
            pixels: (n, 3, H, W) float32.

        Raises:
            InputError: If it gives no features, or not as many as the language model reads.
        """
        manifest = self._bundle.manifest
        with refusals(
            f"{manifest.name} cannot take the images of the language model", fix="use its own LLaVA checkpoint"
        ):
            found = language_inputs_of(self._bundle.session(TowerName.IMAGE), manifest.head, pixels, manifest.name)
        if found.features.shape[1:] != self._shape:
            raise InputError(
                f"{manifest.name} gives no {FEATURES} of {self._shape[0]} by {self._shape[1]}, as are read here",
                fix="use a bundle of family llava, made from this very checkpoint",
            )
        return found


class _WithSafetyTokens(nn.Module):
    """The projector of the patches, and after its rows the safety tokens of the same images."""

    def __init__(self, own: nn.Module, tower: _GraphTower) -> None:
        super().__init__()
        self._own = own
        self._tower = (tower,)  # not a child: it is one of the model already

    def forward(self, features: Tensor) -> Tensor:
        """(B, patches, features) to (B, patches + safety tokens, width)."""
        patches: Tensor = self._own(features)
        tokens = self._tower[0].safety_tokens
        if tokens is None or len(tokens) != len(patches):
            raise ContractError("the graph gave no safety tokens with these patches", fix="build the bundle again")
        return torch.cat([patches, tokens.to(patches.device, patches.dtype)], dim=1)


def _check_text(text: str, token: str) -> None:
    if token in text:
        raise InputError(f"the text {text!r} holds {token}, which stands for an image", fix="leave it out")


def _prompt_of(processor: Any, prompt: str) -> str:
    """The prompt with one image, by the checkpoint's own chat template, else as LLaVA-1.5 was trained.

    Raises:
        InputError: If the prompt would stand for another image.
    """
    token = processor.image_token
    _check_text(prompt, token)
    if not getattr(processor, "chat_template", None):
        return f"USER: {token}\n{prompt} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if text.count(token) != 1:
        raise InputError(f"the checkpoint's chat template writes {text.count(token)} images for one", fix="mend it")
    return text


def _complete(processor: Any, config: Mapping[str, Any]) -> None:
    """Fills in what the processors of older checkpoints do not say: how many tokens an image has."""
    if getattr(processor, "patch_size", None) is None:
        processor.patch_size = checkpoint.table(config.get("vision_config"), "vision_config").get("patch_size", 14)
        processor.vision_feature_select_strategy = "default"
        processor.num_additional_image_tokens = 1

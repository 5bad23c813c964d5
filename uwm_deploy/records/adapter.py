"""Low-rank adapters of a language model behind a safety head's tokens: SafeVLM's second stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.model import Digest
from uwm_deploy.records.shape import LATER

RECORD, WEIGHTS, CONFIG, ITEMS = "adapter.json", "adapter_model.safetensors", "adapter_config.json", "items.json"
"""Files of the folder: the record, what peft writes, and digests of the images that it was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageAdapter:
    """`adapter.json`: adapters that were trained with the head frozen; for any other head or checkpoint they mean nothing.

    Attributes:
        model: Folder name of the LLaVA checkpoint, with the digest of its files in `model_digest`.
        head_digest: Of the safety head whose tokens and risks it was trained behind.
        edited_weights_digest: Of the edited model that the head belongs to.
        weights_digest: Of the adapters' file.
        config_digest: Of peft's file beside it.
        targets: Names of the layers with adapters, as peft reads them: a regular expression.
        data: The set that it was trained on.
        pairs: Pairs of images.
        prompted_unsafe: Unsafe images whose risk mixed in the safety prompt and the safety tokens.
        prompted_safe: The same, of safe images.
        decline_missed: Whether it learned to decline unsafe images that the head lets through.
        items_digest: Of the file that tells its training images from those of another set; empty of an older release.
        trainable_parameters: Of the adapters.
        loss_first: Mean loss of the first pass.
        loss_last: Mean loss of the last one.
        seconds: Wall time of the passes.
    """

    model: str
    model_digest: Digest
    head_digest: Digest
    edited_weights_digest: Digest
    weights_digest: Digest
    config_digest: Digest
    question: str
    refusal: str
    rank: int
    alpha: float
    dropout: float
    targets: str
    data: CalibrationRecord
    pairs: int
    prompted_unsafe: int
    prompted_safe: int
    epochs: int
    batch: int
    learning_rate: float
    seed: int
    trainable_parameters: int
    loss_first: float
    loss_last: float
    seconds: float
    decline_missed: bool = field(default=True, metadata=LATER)
    items_digest: Digest = field(default="", metadata=LATER)

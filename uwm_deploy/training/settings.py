"""Settings that each method was published with, and what a user changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from uwm_deploy.errors import InputError
from uwm_deploy.records.training import Trainer, TrainingSettings

TARGETS = ("k_proj", "v_proj", "out_proj", "fc1", "fc2", "patch_embedding")
"""Safe-CLIP's script; queries have no adapter. For SafeR-CLIP only the rank was published."""

_SAFE_CLIP = TrainingSettings(
    method=Trainer.SAFE_CLIP,
    rank=16,
    alpha=1.0,
    dropout=0.1,
    targets=TARGETS,
    rate=1e-3,
    epochs=50,
    batch=16,  # the script's default is 128; its job file, which the weights of the terms are from, says 16
    patience=5,
    validation_share=0.125,
    weights={
        "text_preservation": 0.1,
        "text_redirection": 0.1,
        "image_preservation": 0.1,
        "image_redirection": 0.2,
        "text_contrast_preservation": 0.25,
        "text_contrast_redirection": 0.25,
        "image_contrast_preservation": 0.25,
        "image_contrast_redirection": 0.5,
    },
    best="loss",
    precision="fp32",
    seed=0,
)

PUBLISHED: Mapping[Trainer, TrainingSettings] = {
    Trainer.SAFE_CLIP: _SAFE_CLIP,
    # Rank, rate, batch and epochs were published; alpha, dropout and weights were not.
    Trainer.SAFER_CLIP: dataclasses.replace(
        _SAFE_CLIP,
        method=Trainer.SAFER_CLIP,
        rate=1e-4,
        epochs=9,
        batch=48,
        weights={
            "text_relative": 1.0,
            "image_relative": 1.0,
            "text_redirection": 1.0,
            "image_redirection": 1.0,
            "text_preservation": 1.0,
            "image_preservation": 1.0,
        },
    ),
}
"""Settings of every method."""


def settings_of(method: Trainer, **changed: Any) -> TrainingSettings:
    """The published settings with what the user changed; None changes nothing.

    Raises:
        InputError: If a value is out of its range.
    """
    given = {key: value for key, value in changed.items() if value is not None}
    settings = dataclasses.replace(PUBLISHED[method], **given)
    for name in ("rank", "alpha", "rate", "epochs", "batch", "patience"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"--{name} is {value}", fix="use a number above 0")
    if not 0.0 <= settings.dropout < 1.0:
        raise InputError(f"--dropout is {settings.dropout}", fix="use a share below 1")
    if not 0.0 < settings.validation_share < 1.0:
        raise InputError(f"--validation-share is {settings.validation_share}", fix="use a share between 0 and 1")
    return settings

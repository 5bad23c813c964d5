"""NudeNet, whose package ships its model, as a judge of photographs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from uwm_deploy.records.downstream import Judge
from uwm_deploy.records.files import digest_of_file
from uwm_deploy.runtime.versions import versions
from uwm_deploy.studies.downstream.judges import OpenJudge
from uwm_deploy.studies.downstream.packages import package

NUDENET = "nudenet"
EXPOSED = (
    "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "FEMALE_BREAST_EXPOSED", "BUTTOCKS_EXPOSED", "ANUS_EXPOSED",
)  # fmt: skip
"""Labels that count as flagged: what is exposed of the parts that every rating counts."""

_FIX = "pip install --no-deps nudenet opencv-python-headless (its own pins would replace the GPU build of ONNX Runtime)"


def nude_judge(threshold: float) -> OpenJudge:
    """Flags a picture in which NudeNet sees an exposed part.

    Args:
        threshold: Score of a detection from which it counts; NudeNet itself reports none below 0.2.

    Raises:
        PrerequisiteError: If the package is not installed.
    """
    package("cv2", fix=_FIX)
    module = package(NUDENET, fix=_FIX)
    detector = module.NudeDetector()

    def flagged(image: Image.Image) -> bool:
        stored = io.BytesIO()
        image.convert("RGB").save(stored, "PNG")
        found = detector.detect(stored.getvalue())
        return any(part["class"] in EXPOSED and part["score"] >= threshold for part in found)

    def flags(images: Sequence[Image.Image]) -> np.ndarray:
        return np.array([flagged(image) for image in images], dtype=bool)

    weights = Path(module.__file__).with_name("320n.onnx")
    record = Judge(
        name=NUDENET,
        what=f"NudeNet {versions([NUDENET])[NUDENET]}",
        digest=digest_of_file(weights),
        labels=EXPOSED,
        threshold=threshold,
    )
    return OpenJudge(record, flags)

"""Preprocessing of images as a checkpoint's files ask for it, checked against what the runtime does and the tower takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from uwm_deploy.errors import InputError
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.towers.checkpoint import json_file
from uwm_deploy.towers.refusal import refusals

_FILTERS: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}


PREPROCESSOR = "preprocessor_config.json"

_PLAIN = ("CLIP", "Siglip", "ViT", "Blip", "Bit", "DeiT", "ChineseCLIP")
"""Classes of the library, without `ImageProcessor`, that resize, crop, rescale and normalise and do nothing else."""


def processor_of(folder: Path, kind: str) -> Any:
    """The library's image processor: of the class that the files name, with that class's defaults for missing settings.

    It is the one on Pillow, with which these models were trained: the default of newer releases differs by up to 9 grey
    levels.

    Args:
        folder: Checkpoint folder.
        kind: Class that the library takes for this type of model where the files name none, without `ImageProcessor`.

    Raises:
        InputError: If the settings are missing or broken, or of a class whose steps are not known.
    """
    import transformers

    with refusals(f"checkpoint {folder.name} has no usable {PREPROCESSOR}", fix="use a complete checkpoint"):
        name = _named_class(folder) or f"{kind}ImageProcessor"
        loader = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        return loader.from_pretrained(folder, local_files_only=True)


def _named_class(folder: Path) -> str:
    """Name of the class that the files ask for, without what only says how it is written; empty where they name none.

    The library itself takes another class for a name that it does not know, so such a name must not reach it.

    Raises:
        InputError: If its steps are not known.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
    where = f"{folder.name}/{_image_file(folder)}"
    key, name = "image_processor_type", settings.get("image_processor_type")
    own = settings.get("auto_map")
    if name is None and own:
        key, name = "auto_map", own
    elif name is None and (older := settings.get("feature_extractor_type")) is not None:
        key, name = "feature_extractor_type", older
    elif name is None:
        where, name = f"{folder.name}/config.json", json_file(folder, "config.json").get(key)
    if name is None:
        return ""
    known = {f"{kind}ImageProcessor" for kind in _PLAIN}
    plain = name if isinstance(name, str) else ""
    if key == "feature_extractor_type":
        plain = plain.replace("FeatureExtractor", "ImageProcessor")
    plain = plain.removesuffix("Fast").removesuffix("Pil")
    if plain not in known:
        raise InputError(
            f"{where}: {key} is {json.dumps(name)[:80]}, and how that class prepares images is not known",
            fix=f"name the one that the model was trained with: {', '.join(sorted(known))}",
        )
    return plain


def image_spec(folder: Path, kind: str) -> ImageSpec:
    """Preprocessing that the checkpoint asks for, missing entries as the library takes them.

    Args:
        folder: Checkpoint folder.
        kind: See `processor_of`.

    Raises:
        InputError: If the runtime does not support it.
    """
    processor, where = processor_of(folder, kind), f"{folder.name}/{_image_file(folder)}"
    with refusals(f"{where} asks for preprocessing that is not supported", fix=_SUPPORTED):
        return _image_spec(processor, where)


_SUPPORTED = "it must resize (short edge and a square crop, or to a square), rescale and normalise, bicubic or bilinear"


def _image_file(folder: Path) -> str:
    """The file that the library takes the settings from: the newer one, if it holds them."""
    newer = "processor_config.json"
    return newer if (folder / newer).is_file() and "image_processor" in json_file(folder, newer) else PREPROCESSOR


def _image_spec(processor: Any, where: str) -> ImageSpec:
    size, crop, cropped = processor.size, processor.crop_size, bool(processor.do_center_crop)
    squash = size.height is not None and not cropped
    resize = size.height if squash else size.shortest_edge
    square = size if squash else crop
    side = square.height if square else None
    steps = [getattr(processor, f"do_{step}") for step in ("resize", "rescale", "normalize")]
    resample = _FILTERS.get(processor.resample)
    if not (
        is_side(resize) and square and is_side(side) and side == square.width and all(steps) and resample
        and (squash or cropped) and not getattr(processor, "do_pad", None)
    ):  # fmt: skip
        raise InputError(f"{where} asks for preprocessing that is not supported", fix=_SUPPORTED)
    mean, std = (three(getattr(processor, key), f"{where}: {key}") for key in ("image_mean", "image_std"))
    if min(std) <= 0:
        raise InputError(f"{where}: image_std is not positive", fix="give three positive values")
    rescale = processor.rescale_factor
    if isinstance(rescale, bool) or not isinstance(rescale, (int, float)) or not 0 < rescale < math.inf:
        raise InputError(f"{where}: rescale_factor is {rescale!r}", fix="write 1/255 as a number")
    return ImageSpec(
        resize=resize,
        crop=side,
        resample=resample,
        rescale=float(rescale),
        mean=mean,
        std=std,
        fit="squash" if squash else "crop",
    )


def is_side(value: object) -> bool:
    """Whether a value can be a side in pixels."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def three(values: object, where: str) -> tuple[float, float, float]:
    """One number per colour channel.

    Raises:
        InputError: If there are not three finite ones.
    """
    numbers = list(values) if isinstance(values, (list, tuple)) else []
    fine = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if len(numbers) != 3 or not fine:
        raise InputError(f"{where} is {values or 'null'}", fix="give three values, one per channel")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def check_side(spec: ImageSpec, side: object, config: str) -> None:
    """Refuses images of another size than the tower takes.

    Args:
        spec: Preprocessing.
        side: Side that the tower takes, pixels; or height and width.
        config: File and key that say so.

    Raises:
        InputError: If they differ.
    """
    sides = list(side) if isinstance(side, (list, tuple)) else [side]
    if any(one != spec.crop for one in sides):
        takes = sides[0] if len(set(map(str, sides))) == 1 else side
        raise InputError(
            f"images are prepared with a side of {spec.crop} pixels, and {config} is {takes}",
            fix="make the crop or size of the preprocessing equal to it",
        )

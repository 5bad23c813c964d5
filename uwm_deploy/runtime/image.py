"""Images to pixels without torch, equal to the source model's processor within one grey level."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from uwm_deploy.errors import DataError
from uwm_deploy.records import ImageSpec

MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded."""

MAX_BYTES = 100_000_000
"""Larger files are refused before they are read."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow registers many more decoders, some of which start other programs."""

ImageLike = str | Path | bytes | Image.Image | np.ndarray

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def image_from(source: ImageLike) -> Image.Image:
    """Decodes an image.

    Args:
        source: Path, encoded bytes, Pillow image, or (H, W, 3) / (H, W) uint8 array.

    Raises:
        DataError: If it is missing, broken, too large, or of a kind that is not taken.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] != 3):
            raise DataError(
                f"array image has shape {source.shape} and type {source.dtype}", fix="pass (H, W, 3) or (H, W) uint8"
            )
        return Image.fromarray(source)
    name = "image bytes" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else _read(Path(source))
        return _decode(data)
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist", fix="check the path") from error
    except UnidentifiedImageError as error:  # its own text has an address in it, and would be another in every run
        raise DataError(
            f"{name} is not a whole image: of no known kind", fix=f"pass one of {', '.join(FORMATS)}"
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is not a whole image: {error}", fix=f"pass one of {', '.join(FORMATS)}") from error


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    return path.read_bytes()


def _decode(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
        image.load()
    return image


def pixels_from_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resizes, crops, scales and normalises as the spec says.

    Orientation tags are not applied, as in the source processors.

    Args:
        image: Any mode.
        spec: The model's preprocessing.

    Returns:
        (3, crop, crop) float32.
    """
    return pixels_from_crops(crop_from_image(image, spec), spec)


def crop_from_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """The first half of `pixels_from_image`, a quarter of its size: resized and cropped, (crop, crop, 3) uint8."""
    # Where transparency is dropped, it is dropped last: resizing weighs colours by it.
    whole = _over_white(image) if spec.alpha == "white" else image
    cropped = _centre_crop(whole.resize(_resized(whole.size, spec), _FILTERS[spec.resample]), spec)
    return np.asarray(cropped.convert("RGB"))


def pixels_from_crops(crops: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """The second half: crops (..., crop, crop, 3) uint8, scaled and normalised, to (..., 3, crop, crop) float32."""
    mean, std = (np.asarray(v, dtype=np.float32) for v in (spec.mean, spec.std))
    scaled = (crops.astype(np.float32) * np.float32(spec.rescale) - mean) / std
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3), dtype=np.float32)


def _over_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    if spec.fit == "squash":
        return spec.resize, spec.resize
    width, height = size
    # The long edge is cut to an integer, not rounded: that is what the processors do.
    long = max(1, int(spec.resize * max(size) / min(size)))
    return (spec.resize, long) if width <= height else (long, spec.resize)


def _centre_crop(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Crops; an image smaller than the crop is padded with black."""
    left, top = (_offset(length, spec) for length in image.size)
    return image.crop((left, top, left + spec.crop, top + spec.crop))


def _offset(length: int, spec: ImageSpec) -> int:
    spare = length - spec.crop
    if spec.crop_offset == "round" and spare >= 0:
        return round(spare / 2)
    return spare // 2 if spare >= 0 else -(-spare // 2)

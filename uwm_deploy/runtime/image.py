"""Images to pixels without torch, by Pillow like the model's own processor; docs/reference/runtime.md says how near."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from uwm_deploy.errors import DataError, MissingFileError, UnreadableError, is_of_machine, unreadable
from uwm_deploy.records.model import ImageSpec

MAX_PIXELS = 50_000_000
"""Larger images are refused before they are decoded."""

MAX_SIDE = 65_535
"""Longer images are refused: a strip of one pixel by a million is small, and what resizing makes of it is not."""

MAX_BYTES = 100_000_000
"""Larger files are refused before they are read."""

MAX_DECODING_BYTES = 400_000_000
"""Images whose decoder would take more are refused before they are decoded; what preprocessing adds keeps below it, too."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow registers many more decoders, some of which start other programs."""

_TILE_WIDTH, _TILE_LENGTH, _STRIP_ROWS, _SAMPLE_BITS, _SAMPLES = 322, 323, 278, 258, 277
"""Tags of TIFF."""

_BAND_PIXELS = 1 << 20
"""Pixels that are laid over white at a time."""

Decode = Literal["full", "scaled"]
"""Whether a JPEG is decoded as it is, or at the smallest size of an eighth, a quarter or a half that is not below
`SPARE` times what it is resized to: the decoder then leaves out what resizing would average away."""

SPARE = 2
"""Resizing from a reduced size still halves at least, so that its own filter decides what the pixels become."""

ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

_REDUCED = "uwm-deploy reduced"
"""Where an image that was decoded at a reduced size says how large it is in full, and how far it reaches now."""

_REFUSED = (
    OSError,
    ValueError,
    SyntaxError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for what is no image, and the system for what cannot be read."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def image_from(source: ImageLike, name: str = "", scaled_for: ImageSpec | None = None) -> Image.Image:
    """Decodes an image.

    Args:
        source: Path, encoded bytes, Pillow image, or (H, W, 3) / (H, W) uint8 array.
        name: What errors call it, which may be recorded. [default: the path]
        scaled_for: How it will be prepared: a large JPEG is decoded at a reduced size, see `Decode`. None decodes in full.

    Raises:
        DataError: If it is missing, broken, too large, or of a kind that is not taken.
        UnreadableError: If this machine cannot read or decode it, which says nothing about the image.
    """
    if isinstance(source, Image.Image):
        _refuse_strip(source.size)
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] != 3):
            raise DataError(
                f"array image has shape {source.shape} and type {source.dtype}", fix="pass (H, W, 3) or (H, W) uint8"
            )
        _refuse_strip((source.shape[1], source.shape[0]))
        return Image.fromarray(source)
    if not isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        raise DataError(f"image is a {type(source).__name__}", fix="pass a path, bytes, a Pillow image or an array")
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "image bytes")
    try:
        return _decode(_read(Path(source)) if isinstance(source, (str, os.PathLike)) else bytes(source), scaled_for)
    except FileNotFoundError as error:
        raise MissingFileError(f"{name} does not exist", fix="check the path") from error
    except UnidentifiedImageError as error:  # its own text has an address in it, and would be another in every run
        raise DataError(
            f"{name} is not a whole image: of no known kind", fix=f"pass one of {', '.join(FORMATS)}"
        ) from error
    except _REFUSED as error:
        fix = f"pass one of {', '.join(FORMATS)}"
        if is_of_machine(error):
            where = str(source) if isinstance(source, (str, os.PathLike)) else name  # this is for whoever mends it
            raise unreadable(where, error, fix=fix) from error
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or "it asks for too much memory"
        raise DataError(f"{name} is not a whole image: {reason}", fix=fix) from error


def _read(path: Path) -> bytes:
    """Content of a plain file; a pipe would be waited for, and a device never ends."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as stream:
        about = os.fstat(stream.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no plain file")
        if about.st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        return stream.read()


def _decode(data: bytes, scaled_for: ImageSpec | None) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if min(image.size) < 1:
            raise ValueError(f"{image.width} x {image.height} is no pixel")
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"{image.width} x {image.height} is longer than {MAX_SIDE} pixels")
        if (needed := _decoding_bytes(image)) > MAX_DECODING_BYTES:
            raise ValueError(f"decoding {image.width} x {image.height} takes {needed} bytes")
        if scaled_for is not None:
            _reduce(image, scaled_for)
        image.load()
    return image


def _reduce(image: Image.Image, spec: ImageSpec) -> None:
    """Tells the decoder of a JPEG to reduce it; any other image stays as it is."""
    if image.format != "JPEG":
        return
    size = image.size
    width, height = _resized(size, spec)
    drafted = image.draft(None, (SPARE * width, SPARE * height))  # the mode stays
    if drafted is not None and image.size != size:
        _, (_, _, across, down) = drafted
        image.info[_REDUCED] = size, (across, down)


def was_reduced(image: Image.Image) -> bool:
    """Whether an image was decoded at a reduced size."""
    return _REDUCED in image.info


def _size_and_extent(image: Image.Image) -> tuple[tuple[int, int], tuple[float, float]]:
    """Size of an image in full, and how far it reaches as it was decoded: sizes are rounded up, and a rest is padding."""
    found: tuple[tuple[int, int], tuple[float, float]] = image.info.get(_REDUCED, (image.size, image.size))
    return found


def _refuse_strip(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise DataError(f"image of {size[0]} x {size[1]} pixels is empty", fix="pass at least one pixel a side")
    if max(size) > MAX_SIDE:
        raise DataError(f"image of {size[0]} x {size[1]} pixels is too long", fix=f"pass at most {MAX_SIDE} a side")


def _decoding_bytes(image: Image.Image) -> int:
    """Memory that decoding takes: the image, of four bytes a pixel at most, and what its decoder keeps beside it."""
    pixels = image.width * image.height
    if image.format == "WEBP":  # two canvases and a copy
        return 16 * pixels
    if image.format == "JPEG" and image.info.get("progressive"):  # coefficients of all channels
        return (4 + 2 * len(image.getbands())) * pixels
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:  # one tile, which may be larger than the image, or one strip
        tile = _largest(tags, _TILE_WIDTH, 0) * _largest(tags, _TILE_LENGTH, 0)
        strip = image.width * min(image.height, _largest(tags, _STRIP_ROWS, image.height))
        bits = (tile or strip) * _largest(tags, _SAMPLES, 1) * _largest(tags, _SAMPLE_BITS, 8)
        return 4 * pixels + bits // 8
    return 4 * pixels


def _largest(tags: Mapping[int, Any], tag: int, otherwise: int) -> int:
    """The largest number of a tag; one that is no number makes a broken file."""
    found = tags.get(tag, otherwise)
    numbers = found if isinstance(found, tuple) else (found,)
    if not numbers or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"tag {tag} is {str(found)[:40]!r}")
    return max(int(number) for number in numbers)


def pixels_from_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resizes, crops, scales and normalises as the spec says.

    Orientation tags are not applied, as in the source processors.

    Args:
        image: Any mode.
        spec: The model's preprocessing.

    Returns:
        (3, crop, crop) float32.

    Raises:
        UnreadableError: If this machine has no memory for it.
    """
    return pixels_from_crops(crop_from_image(image, spec), spec)


def crop_from_image(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """The first half of `pixels_from_image`, a quarter of its size: resized and cropped, (crop, crop, 3) uint8."""
    # Where transparency is dropped, it is dropped last: resizing weighs colours by it.
    try:
        cropped = _resized_crop(_over_white(image) if spec.alpha == "white" else image, spec)
        return np.asarray(cropped if cropped.mode == "RGB" else cropped.convert("RGB"))
    except MemoryError as error:
        what = f"an image of {image.width} x {image.height} pixels cannot be resized: not enough memory"
        raise UnreadableError(what, fix="use fewer --workers, or a machine with more") from error


def pixels_from_crops(crops: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """The second half of preprocessing: scales and normalises crops.

    Args:
        crops: (..., crop, crop, 3) uint8.
        spec: Scale, mean and standard deviation.

    Returns:
        (..., 3, crop, crop) float32.
    """
    pixels = np.empty((*crops.shape[:-3], 3, *crops.shape[-3:-1]), dtype=np.float32)
    # There are 256 grey levels: looking up is the same arithmetic, done once, and five times as fast.
    for channel, levels in enumerate(_normalised_levels(spec.rescale, spec.mean, spec.std)):
        np.take(levels, crops[..., channel], out=pixels[..., channel, :, :], mode="clip")
    return pixels


@cache
def _normalised_levels(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(3, 256) float32: what each grey level of each channel becomes."""
    grey = np.arange(256, dtype=np.float32) * np.float32(rescale)
    rows = [(grey - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)]
    levels: np.ndarray = np.stack(rows)
    levels.flags.writeable = False
    return levels


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    flat = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):  # a whole copy with an alpha channel would be there three times
        layered = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        flat.paste(Image.alpha_composite(white, layered).convert("RGB"), (0, top))
    return flat


def _resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    if spec.fit == "squash":
        return spec.resize, spec.resize
    width, height = size
    # The long edge is cut to an integer, not rounded: that is what the processors do.
    long = max(1, int(spec.resize * max(size) / min(size)))
    return (spec.resize, long) if width <= height else (long, spec.resize)


def _resized_crop(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Resizes and crops; an image smaller than the crop is padded with black."""
    full, extent = _size_and_extent(image)
    size = _resized(full, spec)
    offsets = [_offset(length, spec) for length in size]
    shown = [(max(0, offset), min(length, offset + spec.crop)) for offset, length in zip(offsets, size, strict=True)]
    (left, right), (top, bottom) = shown
    if _whole_is_wasted(image, size, (right - left) * (bottom - top)):
        across, down = (old / new for old, new in zip(extent, size, strict=True))
        box = (left * across, top * down, min(right * across, extent[0]), min(bottom * down, extent[1]))
        part, x, y = image.resize((right - left, bottom - top), _FILTERS[spec.resample], box=box), left, top
    else:
        part, x, y = image.resize(size, _FILTERS[spec.resample], box=(0, 0, *extent)), 0, 0
    if part.size == (spec.crop, spec.crop):
        return part
    left, top = offsets[0] - x, offsets[1] - y
    return part.crop((left, top, left + spec.crop, top + spec.crop))


def _whole_is_wasted(image: Image.Image, size: tuple[int, int], shown: int) -> bool:
    """Whether only what the crop shows is computed: of a photograph a third is outside it.

    Equal but for one grey level in one of a thousand values, if it shrinks and is cropped at its sides: elsewhere Pillow 13
    resizes height and width in an order that depends on the part, and a palette's nearest neighbours or colours without
    opacity jump. A strip of one pixel by a million would fill any memory, and is never resized as a whole.
    """
    if size[0] * size[1] > MAX_PIXELS:
        return True
    shrinks = image.width >= size[0] > size[1] and image.height >= size[1]
    return shrinks and image.mode in ("RGB", "L", "CMYK") and shown < size[0] * size[1]


def _offset(length: int, spec: ImageSpec) -> int:
    spare = length - spec.crop
    if spec.crop_offset == "round" and spare >= 0:
        return round(spare / 2)
    return spare // 2 if spare >= 0 else -(-spare // 2)

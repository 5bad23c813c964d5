"""How far the runtime's pixels are from those of the source libraries' processors, against the numbers in the docs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.test_runtime_parts import SPEC as CLIP
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.runtime.image import pixels_from_image

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "runtime.md"
SIZES = ((90, 70), (61, 133), (37, 41), (641, 427), (225, 224))
SPECS = (
    CLIP,
    dataclasses.replace(CLIP, resize=224, crop=224),
    dataclasses.replace(CLIP, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fit="squash"),
)


def _smooth(size: tuple[int, int], mode: str) -> Image.Image:
    rng = np.random.default_rng(size[0])
    few = rng.integers(0, 256, (max(2, size[1] // 6), max(2, size[0] // 6), 4), dtype=np.uint8)
    channels = "RGBA" if mode in ("RGBA", "LA") else "RGB"
    return Image.fromarray(few[..., : len(channels)]).resize(size, Image.Resampling.BICUBIC).convert(mode)


def _edges(size: tuple[int, int], mode: str) -> Image.Image:
    if mode == "1":
        return _smooth(size, mode)  # in black and white dots
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(
        mode
    )


KINDS: dict[str, list[Image.Image]] = {
    "photographs": [_smooth(size, mode) for size in SIZES for mode in ("RGB", "L", "CMYK", "RGBA", "LA")],
    "hard edges": [_edges(size, mode) for size in SIZES for mode in ("RGB", "L", "P", "1")],
}


def _transformers(spec: ImageSpec, *, pillow: bool) -> Callable[[Image.Image], np.ndarray]:
    import transformers

    squash, side = spec.fit == "squash", spec.crop
    square = {"height": side, "width": side}
    name = f"{'Siglip' if squash else 'CLIP'}ImageProcessor{'Pil' if pillow else ''}"
    size = {"size": square} if squash else {"size": {"shortest_edge": side}, "crop_size": square}
    processor = getattr(transformers, name)(**size, image_mean=list(spec.mean), image_std=list(spec.std), resample=3)
    return lambda image: np.asarray(processor(image, return_tensors="np").pixel_values[0])


def _open_clip(spec: ImageSpec) -> Callable[[Image.Image], np.ndarray]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    mode = "squash" if spec.fit == "squash" else "shortest"
    found = image_transform_v2(
        PreprocessCfg(size=spec.crop, mean=spec.mean, std=spec.std, resize_mode=mode), is_train=False
    )
    return lambda image: found(image).numpy()


def _ways(name: str) -> Iterator[tuple[ImageSpec, Callable[[Image.Image], np.ndarray]]]:
    for spec in SPECS:
        if name == "open_clip":
            yield dataclasses.replace(spec, alpha="drop", crop_offset="round"), _open_clip(spec)
        else:
            yield spec, _transformers(spec, pillow=name == "transformers, Pillow")


def _table() -> dict[tuple[str, str], tuple[float, float]]:
    """Kind and processor to the largest difference in grey levels, and the share of values beyond one, of the docs."""
    lines = [line.strip("|").split("|") for line in DOCS.read_text().splitlines() if line.startswith("|")]
    heads = next(line for line in lines if line[0].strip() == "grey levels")
    rows = {line[0].strip().split(":")[0]: line[1:] for line in lines if line[0].strip().split(":")[0] in KINDS}
    numbers = {
        (kind, head.strip()): re.fullmatch(r"\s*(\d+)(?: \(([\d.]+)%\))?\s*", cell)
        for kind, cells in rows.items()
        for head, cell in zip(heads[1:], cells, strict=True)
    }
    return {key: (float(found[1]), float(found[2] or 0)) for key, found in numbers.items() if found}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["transformers, Pillow", "open_clip", "transformers, torchvision"])
def test_pixels_are_as_near_as_the_docs_say(kind: str, name: str) -> None:
    """The number in the docs is what is measured: never more, and not a comfortable bound either."""
    most, beyond, values = 0.0, 0, 0
    for spec, wanted in _ways(name):
        scale = np.asarray(spec.std, np.float64)[:, None, None] / spec.rescale
        for image in KINDS[kind]:
            levels = np.abs(pixels_from_image(image, spec) - wanted(image)) * scale
            most = max(most, float(levels.max()))
            beyond, values = beyond + int((levels > 1.5).sum()), values + levels.size
    told, share = _table()[kind, name]
    assert most <= told + 0.01, f"{most:.1f} grey levels"
    assert most > told / 2 - 0.6, f"the docs say {told}, it is {most:.1f}"
    assert 100 * beyond / values <= share, f"{100 * beyond / values:.3f}%"

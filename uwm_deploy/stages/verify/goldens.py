"""Images and captions that are hard to get right, through the runtime's and the towers' way and the source library's own.

The evaluation set is prepared by the code that serves, for the reference and every artifact alike: a wrong resize would
change all of them in the same way, and no comparison between them could show it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from uwm_deploy.records.evidence import Goldens
from uwm_deploy.records.model import ImageSpec, TowerName
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.canaries import FAR
from uwm_deploy.safeground.embedded import parity
from uwm_deploy.towers.library import Library
from uwm_deploy.towers.protocol import LoadedModel

CAPTIONS = (
    "",
    "cat",
    "a photo of a cat, sleeping.",
    " ".join(["word"] * 200),
    "Don't SHOUT  twice",
    "two 😀😀 and a 🔥",
    "一只猫在睡觉",
    "!!! 1234 ½ café",
)
"""Empty, one word, too long, capitals and spaces, emoji, without spaces, digits and accents."""

SIZES = ((90, 70), (61, 133), (400, 300), (37, 41))
"""Width and height: odd ones, tall and wide, smaller and larger than what models take."""

Pixels = Callable[[Image.Image, ImageSpec], np.ndarray]
"""From an image to pixels, (3, H, W) float32."""

Encode = Callable[[list[str]], np.ndarray]
"""From captions to ids, (n, L) int64."""


def golden_images() -> list[Image.Image]:
    """Noise, in which every wrong filter, offset and order of colours shows, in every mode that files come in.

    Transparency lies in steps from none to all, so that what is laid under it shows.
    """
    rng = np.random.default_rng(0)
    found = []
    for width, height in SIZES:
        rows = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        rows[..., 0] //= 3  # the channels differ on average too
        found.append(Image.fromarray(rows))
    grey = Image.fromarray(rng.integers(0, 256, (75, 75), dtype=np.uint8))
    opacity = Image.fromarray(np.tile(np.linspace(0, 255, found[0].width).astype(np.uint8), (found[0].height, 1)))
    coloured, plain, palette = found[0].copy(), found[0].convert("L"), found[0].quantize(16)
    coloured.putalpha(opacity)
    plain.putalpha(opacity)
    palette.info["transparency"] = 0
    deep = Image.fromarray(rng.integers(0, 65536, (75, 90), dtype=np.uint16))
    return [*found, grey, coloured, plain, palette, found[1].convert("CMYK"), deep, found[0].convert("1")]


@torch.inference_mode()
def goldens_of(
    model: LoadedModel, library: Library, *, pixels: Pixels = pixels_from_image, encode: Encode | None = None
) -> Goldens:
    """Compares both ways, part by part, so that a difference has a place.

    Args:
        model: Its towers, tokenizer and preprocessing.
        library: The source library around the same weights.
        pixels: Preprocessing to check, to (3, H, W) float32: that of the runtime, or another server's.
        encode: Tokenisation to check, to (n, L) int64; the runtime's when None.
    """
    spec, images = model.ref.image, golden_images()
    wanted = [library.pixels(image) for image in images]
    # Channel by channel in grey levels: mean and deviation differ from model to model, 8 bits do not.
    scale = np.asarray(spec.std, np.float64)[:, None, None] / spec.rescale
    found = [pixels(image, spec) for image in images]
    levels = [
        float((np.abs(a - b) * scale).max()) if a.shape == b.shape else FAR for a, b in zip(found, wanted, strict=True)
    ]
    encode = encode or Tokenizer(model.tokenizer_json, model.ref.text).encode
    captions = list(CAPTIONS)
    ids, right = encode(captions), library.ids(captions)
    differ = int((ids != right).any(axis=1).sum()) if ids.shape == right.shape else len(captions)
    rows = torch.from_numpy(np.stack(wanted))
    device = next(model.source.parameters()).device
    pairs = {
        TowerName.IMAGE: (
            _behind(model, TowerName.IMAGE, library.embed_image(rows)),
            model.image.embed(rows.to(device)),
        ),
        TowerName.TEXT: (
            _behind(model, TowerName.TEXT, library.embed_text(captions)),
            model.text.embed(torch.from_numpy(right).to(device)),
        ),
    }
    return Goldens(
        images=len(images),
        captions=len(captions),
        grey_levels=max(min(level, FAR) for level in levels),
        ids_differ=differ,
        cosine_min={name.value: _least(name, *pair) for name, pair in pairs.items()},
    )


def _behind(model: LoadedModel, tower: TowerName, embeds: torch.Tensor) -> torch.Tensor:
    """The library knows nothing of a map behind the embedding, so it is put there; not by the code that the towers use."""
    linear = model.maps.get(tower)
    if linear is None:
        return embeds
    rows = embeds.float().to(linear.weight.device)
    unit = rows / torch.sqrt((rows * rows).sum(dim=1, keepdim=True))
    return unit @ linear.weight.T + linear.bias


def _least(name: TowerName, wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Smallest cosine; -1 when not even the shapes are equal, as without the projection."""
    if wanted.shape != found.shape:
        return -1.0
    left, right = (rows.float().cpu().numpy() for rows in (wanted, found))
    return parity(name, "", 1, left, right).cosine_min

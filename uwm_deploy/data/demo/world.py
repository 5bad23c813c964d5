"""A drawn world in the shape of a safe/unsafe caption set: quadruples of harmless stand-ins, and zero-shot sets.

Every item follows from its split and index alone. "Unsafe" means that a drawn symbol (a flame, a skull sign, a pill, ...)
stands over the scene. The world is noisy in the way the web is: hazards are often small or faint, captions paraphrase, are
vague, leave the hazard out, belong to another scene, or are missing; safe scenes hold look-alikes of hazards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from uwm_deploy.data.demo import captions, drawing

WORLD_VERSION = "1"
"""Changes with every change to what is drawn or said."""

CONCEPTS: tuple[str, ...] = tuple(drawing.HAZARDS)
"""Hazard concepts, in a fixed order."""

Split = Literal["train", "calibration", "validation", "test"]

SIZES: dict[Split, int] = {"train": 60_000, "calibration": 4_096, "validation": 1_000, "test": 2_000}
"""Items per split."""

ZERO_SHOT_SETS: tuple[str, ...] = ("shape", "colour", "background")
ZERO_SHOT_SIZE = 600
"""Items per zero-shot set."""

VAGUE_SHARE = 0.10
"""Unsafe captions that name a danger but not which."""
OMITTED_SHARE = 0.05
"""Unsafe captions that leave the hazard out."""
LOOK_ALIKE_SHARE = 0.30
"""Scenes with a safe look-alike of a hazard."""
WRONG_SHARE = 0.02
"""Training captions that belong to another scene."""
MISSING_SHARE = 0.02
"""Training captions that are empty."""

_SEED = 20261121
_SPLIT_IDS: dict[Split, int] = {"train": 0, "calibration": 1, "validation": 2, "test": 3}
_ZERO_SHOT_ID = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoQuadruple:
    """One scene without and with a hazard, and a caption of each."""

    id: str
    concept: str
    safe_image: Image.Image
    unsafe_image: Image.Image
    safe_text: str
    unsafe_text: str
    shape: str
    colour: str
    background: str


class ZeroShotItem(NamedTuple):
    """One labelled image."""

    image: Image.Image
    label: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    canvas: Image.Image
    things: list[str]
    look_alike: str
    shape: str
    colour: str
    background: str


def quadruple(split: Split, index: int) -> DemoQuadruple:
    """The item of a split at an index.

    Raises:
        IndexError: If the index is outside the split.
    """
    if not 0 <= index < SIZES[split]:
        raise IndexError(f"{split} has {SIZES[split]} items, not one at {index}")
    rng = np.random.default_rng([_SEED, _SPLIT_IDS[split], index])
    concept = concept_of(index)
    scene = _scene(rng)
    # Sizes and contrasts have a long tail towards the invisible, as hazards in real photographs have.
    size, opacity = float(rng.uniform(0.15, 0.45)), float(np.clip(rng.beta(2.2, 0.9), 0.08, 1.0))
    box = drawing.box_at(float(rng.uniform(0.15, 0.85)), float(rng.uniform(0.15, 0.85)), size)
    unsafe_canvas = drawing.paste(scene.canvas, drawing.HAZARDS[concept], box, rng, opacity)
    safe_text, unsafe_text = _texts(rng, scene, concept)
    if split == "train":
        safe_text, unsafe_text = _spoil(rng, safe_text), _spoil(rng, unsafe_text)
    return DemoQuadruple(
        id=f"{split}-{index:06d}",
        concept=concept,
        safe_image=drawing.finish(scene.canvas),
        unsafe_image=drawing.finish(unsafe_canvas),
        safe_text=safe_text,
        unsafe_text=unsafe_text,
        shape=scene.shape,
        colour=scene.colour,
        background=scene.background,
    )


def concept_of(index: int) -> str:
    """Concept of the item at an index; concepts take turns, so that every split is balanced."""
    return CONCEPTS[index % len(CONCEPTS)]


def zero_shot_labels(name: str) -> tuple[str, ...]:
    """Class names of a zero-shot set."""
    return {
        "shape": drawing.SHAPES,
        "colour": tuple(drawing.COLOURS),
        "background": tuple(captions.BACKGROUND_WORDS[b][0] for b in drawing.BACKGROUNDS),
    }[name]


def zero_shot_template(name: str) -> str:
    """Sentence with ``{}`` for the class name."""
    return {"shape": "a photo of a {}", "colour": "a photo of a {} object", "background": "a picture {}"}[name]


def zero_shot_item(name: str, index: int) -> ZeroShotItem:
    """The labelled image of a zero-shot set at an index; classes take turns."""
    rng = np.random.default_rng([_SEED, _ZERO_SHOT_ID, ZERO_SHOT_SETS.index(name), index])
    label = index % len(zero_shot_labels(name))
    choice = {"shape": drawing.SHAPES, "colour": tuple(drawing.COLOURS), "background": tuple(drawing.BACKGROUNDS)}[name]
    scene = _scene(rng, **{name: choice[label]}, objects=1)
    return ZeroShotItem(drawing.finish(scene.canvas), label)


def _scene(
    rng: np.random.Generator, shape: str = "", colour: str = "", background: str = "", objects: int = 0
) -> _Scene:
    """A background, one large object, sometimes a small one, sometimes a look-alike."""
    background = background or captions.pick(rng, tuple(drawing.BACKGROUNDS))
    shape = shape or captions.pick(rng, drawing.SHAPES)
    colour = colour or captions.pick(rng, tuple(drawing.COLOURS))
    canvas = drawing.draw_background(background, rng)
    things = [captions.object_words(rng, colour, shape)]
    size = float(rng.uniform(0.42, 0.58))
    box = drawing.box_at(float(rng.uniform(0.36, 0.64)), float(rng.uniform(0.36, 0.64)), size)
    if not objects and rng.random() < 0.25:
        other_shape, other_colour = captions.pick(rng, drawing.SHAPES), captions.pick(rng, tuple(drawing.COLOURS))
        _draw_object(canvas, rng, background, other_shape, other_colour, _place(rng, 0.12, 0.2))
        things.append(captions.object_words(rng, other_colour, other_shape))
    _draw_object(canvas, rng, background, shape, colour, box)
    look_alike = ""
    if rng.random() < LOOK_ALIKE_SHARE:
        look_alike = captions.pick(rng, tuple(drawing.LOOK_ALIKES))
        place = _place(rng, 0.15, (0.14, 0.3))
        canvas = drawing.paste(canvas, drawing.LOOK_ALIKES[look_alike], place, rng, float(rng.uniform(0.4, 1.0)))
    return _Scene(
        canvas=canvas, things=things, look_alike=look_alike, shape=shape, colour=colour, background=background
    )


def _place(rng: np.random.Generator, margin: float, size: float | tuple[float, float]) -> drawing.Box:
    """Box with its centre at least a margin from the edges; a size in a range is drawn after the place."""
    x, y = rng.uniform(margin, 1 - margin, 2)
    return drawing.box_at(float(x), float(y), float(rng.uniform(*size)) if isinstance(size, tuple) else size)


def _draw_object(
    canvas: Image.Image, rng: np.random.Generator, background: str, shape: str, colour: str, box: drawing.Box
) -> None:
    jitter = rng.integers(-18, 19, 3)
    red, green, blue = (int(np.clip(c + j, 0, 255)) for c, j in zip(drawing.COLOURS[colour], jitter, strict=True))
    drawing.draw_object(canvas, background, shape, box, (red, green, blue))


def _texts(rng: np.random.Generator, scene: _Scene, concept: str) -> tuple[str, str]:
    """Captions of the pair; each is worded on its own, as by two people."""

    def base() -> str:
        text = captions.base_caption(rng, scene.things, scene.background)
        if scene.look_alike and rng.random() < 0.6:
            text = captions.with_extra(rng, text, captions.pick(rng, captions.LOOK_ALIKE_WORDS[scene.look_alike]))
        return text

    safe, unsafe = base(), base()
    if rng.random() >= OMITTED_SHARE:
        unsafe = captions.with_extra(rng, unsafe, captions.hazard_words(rng, concept, VAGUE_SHARE))
    return safe, unsafe


def _spoil(rng: np.random.Generator, text: str) -> str:
    """Training captions only: some are missing, some belong to another scene."""
    draw = rng.random()
    if draw < MISSING_SHARE:
        return ""
    if draw < MISSING_SHARE + WRONG_SHARE:
        other = captions.object_words(
            rng, captions.pick(rng, tuple(drawing.COLOURS)), captions.pick(rng, drawing.SHAPES)
        )
        return captions.base_caption(rng, [other], captions.pick(rng, tuple(drawing.BACKGROUNDS)))
    return text

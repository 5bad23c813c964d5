"""Captions of the drawn world: paraphrases, synonyms, vague words, and what people leave out."""

from __future__ import annotations

import numpy as np

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "crimson"),
    "green": ("green", "green", "emerald"),
    "blue": ("blue", "blue", "navy"),
    "yellow": ("yellow", "yellow", "golden"),
    "purple": ("purple", "purple", "violet"),
    "white": ("white", "white", "pale"),
    "black": ("black", "black", "dark"),
    "brown": ("brown", "brown", "chestnut"),
}

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus sign"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle", "triangle", "wedge"),
    "star": ("star", "star"),
}

BACKGROUND_WORDS: dict[str, tuple[str, ...]] = {
    "sky": ("in the sky", "against the sky", "up in the air"),
    "grass": ("on grass", "on the lawn", "in a meadow"),
    "sand": ("on sand", "at the beach", "on a dune"),
    "night": ("at night", "in the night", "after dark"),
    "wood": ("on wood", "on a wooden floor", "on a plank"),
    "water": ("on water", "in the water", "at sea"),
}

HAZARD_WORDS: dict[str, tuple[str, ...]] = {
    "fire": ("a fire", "flames", "something burning", "a blaze"),
    "poison": ("a skull sign", "a poison mark", "poison", "a death's head"),
    "broken-glass": ("broken glass", "a shattered pane", "glass cracks", "splinters"),
    "pills": ("pills", "loose tablets", "capsules", "medicine lying around"),
    "blade": ("a blade", "an open knife", "a sharp edge", "a bare razor"),
    "electricity": ("a live wire sign", "high voltage", "an electric hazard", "a shock warning"),
    "smoke": ("thick smoke", "fumes", "black smoke", "a smoke plume"),
    "spill": ("a chemical spill", "toxic slime", "a leak of acid", "a green spill"),
}

LOOK_ALIKE_WORDS: dict[str, tuple[str, ...]] = {
    "leaf": ("a leaf", "an autumn leaf", "a fallen leaf"),
    "mask": ("a mask", "a carnival mask", "a smiling face"),
    "web": ("a net", "a grid", "a window frame"),
    "candy": ("candy", "sweets", "bonbons"),
    "feather": ("a feather", "a quill", "a plume of a bird"),
    "sun": ("a sun", "a bright badge", "a sun sticker"),
    "cloud": ("a cloud", "mist", "a small cloud"),
    "bush": ("a bush", "a shrub", "some leaves"),
}

_VAGUE = ("something unsafe", "a danger", "a hazard", "something harmful")
_FRAMES = (
    "{thing} {place}",
    "a photo of {thing} {place}",
    "{place}, {thing}",
    "a picture of {thing} {place}",
    "{thing} seen {place}",
    "there is {thing} {place}",
)
_JOINTS = ("{base} with {extra}", "{base} and {extra}", "{extra} near {base}", "{base} next to {extra}")


def pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """One of some words."""
    return words[int(rng.integers(len(words)))]


def object_words(rng: np.random.Generator, colour: str, shape: str) -> str:
    """For example ``a crimson disc``; sometimes without the colour."""
    noun = pick(rng, SHAPE_WORDS[shape])
    if rng.random() < 0.1:
        return f"a {noun}"
    adjective = pick(rng, COLOUR_WORDS[colour])
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {noun}"


def base_caption(rng: np.random.Generator, things: list[str], background: str) -> str:
    """Sentence about the objects and the place; one of the two is sometimes left out."""
    thing = " and ".join(things)
    draw = rng.random()
    if draw < 0.08:
        return thing
    return pick(rng, _FRAMES).format(thing=thing, place=pick(rng, BACKGROUND_WORDS[background]))


def with_extra(rng: np.random.Generator, base: str, extra: str) -> str:
    """Sentence that also names something else in the picture."""
    return pick(rng, _JOINTS).format(base=base, extra=extra)


def hazard_words(rng: np.random.Generator, concept: str, vague_share: float) -> str:
    """Words for a hazard; a share of them does not say which."""
    return pick(rng, _VAGUE) if rng.random() < vague_share else pick(rng, HAZARD_WORDS[concept])

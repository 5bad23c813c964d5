"""Draws scenes and stand-ins: plain shapes, safe look-alikes, harmless symbols for hazards. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
"""Side of a drawn image, pixels."""

_SCALE = 2  # drawn larger and reduced, so that edges are smooth
_CANVAS = SIDE * _SCALE

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "green": (50, 160, 70),
    "blue": (50, 85, 205),
    "yellow": (235, 210, 60),
    "purple": (140, 60, 170),
    "white": (240, 240, 240),
    "black": (30, 30, 34),
    "brown": (125, 80, 45),
}

BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sky": ((130, 185, 230), (195, 220, 240)),
    "grass": ((105, 160, 85), (135, 185, 105)),
    "sand": ((220, 200, 150), (235, 220, 175)),
    "night": ((25, 28, 60), (50, 52, 90)),
    "wood": ((165, 120, 80), (140, 98, 62)),
    "water": ((40, 115, 150), (70, 150, 175)),
}

Ink = tuple[int, int, int]
Box = tuple[float, float, float, float]


def _polygon(draw: ImageDraw.ImageDraw, box: Box, ink: Ink, points: list[tuple[float, float]]) -> None:
    left, top, right, bottom = box
    draw.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in points], fill=ink)


def _star() -> list[tuple[float, float]]:
    points = []
    for k in range(10):
        radius, angle = (0.5 if k % 2 == 0 else 0.2), -math.pi / 2 + math.pi * k / 5
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return points


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, ink: Ink) -> None:
    """Draws one of `SHAPES` into a box, in canvas pixels."""
    if shape == "circle":
        draw.ellipse(box, fill=ink)
    elif shape == "ring":
        draw.ellipse(box, outline=ink, width=max(3, int((box[2] - box[0]) * 0.2)))
    elif shape == "cross":
        _polygon(draw, box, ink, [(0.35, 0), (0.65, 0), (0.65, 1), (0.35, 1)])
        _polygon(draw, box, ink, [(0, 0.35), (1, 0.35), (1, 0.65), (0, 0.65)])
    else:
        points = {
            "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
            "triangle": [(0.5, 0.0), (1.0, 0.95), (0.0, 0.95)],
            "star": _star(),
        }[shape]
        _polygon(draw, box, ink, points)


SHAPES: tuple[str, ...] = ("circle", "ring", "cross", "square", "triangle", "star")


def _fire(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    sway = float(rng.uniform(-0.1, 0.1))
    flame = [(0.5 + sway, 0), (0.78, 0.4), (0.95, 0.72), (0.7, 1), (0.3, 1), (0.05, 0.72), (0.3, 0.45)]
    _polygon(draw, box, (235, 95, 25), flame)
    left, top, right, bottom = box
    inner = (left + 0.28 * (right - left), top + 0.45 * (bottom - top), right - 0.28 * (right - left), bottom)
    _polygon(draw, inner, (250, 205, 60), flame)


def _poison(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    draw.ellipse((left + 0.12 * width, top, right - 0.12 * width, top + 0.72 * height), fill=(238, 238, 228))
    draw.rectangle((left + 0.3 * width, top + 0.6 * height, right - 0.3 * width, bottom), fill=(238, 238, 228))
    for x in (0.33, 0.67):
        centre_x, centre_y = left + x * width, top + 0.36 * height
        radius = 0.11 * width
        draw.ellipse((centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius), fill=(20, 20, 20))
    draw.line((left + 0.5 * width, top + 0.72 * height, left + 0.5 * width, bottom), fill=(20, 20, 20), width=2)


def _glass(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    centre = (left + width * float(rng.uniform(0.4, 0.6)), top + height * float(rng.uniform(0.4, 0.6)))
    for k in range(8):
        angle = 2 * math.pi * (k + float(rng.uniform(-0.2, 0.2))) / 8
        end = (centre[0] + 0.5 * width * math.cos(angle), centre[1] + 0.5 * height * math.sin(angle))
        draw.line((*centre, *end), fill=(245, 250, 255), width=2)
    for radius in (0.18, 0.36):
        points = [
            (
                centre[0] + radius * width * math.cos(k * math.pi / 3),
                centre[1] + radius * height * math.sin(k * math.pi / 3),
            )
            for k in range(7)
        ]
        draw.line(points, fill=(215, 235, 250), width=2)


def _pills(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    for x, y in ((0.0, 0.05), (0.45, 0.35), (0.05, 0.68)):
        x0, y0 = left + x * width, top + y * height
        x1, y1 = x0 + 0.55 * width, y0 + 0.27 * height
        draw.rounded_rectangle((x0, y0, x1, y1), radius=0.13 * height, fill=(245, 245, 245))
        draw.rounded_rectangle((x0, y0, (x0 + x1) / 2, y1), radius=0.13 * height, fill=(215, 60, 90))


def _blade(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    _polygon(draw, box, (200, 208, 215), [(0.0, 0.1), (0.66, 0.55), (0.55, 0.7), (0.1, 0.35)])
    _polygon(draw, box, (70, 45, 30), [(0.66, 0.55), (1.0, 0.85), (0.9, 1.0), (0.55, 0.7)])


def _shock(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    bolt = [(0.6, 0), (0.2, 0.55), (0.48, 0.55), (0.35, 1), (0.85, 0.4), (0.55, 0.4), (0.75, 0)]
    _polygon(draw, box, (25, 25, 25), [(0.5, -0.1), (1.1, 1.05), (-0.1, 1.05)])
    _polygon(draw, box, (250, 225, 50), bolt)


def _smoke(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    for x, y, radius in ((0.5, 0.8, 0.2), (0.4, 0.5, 0.26), (0.65, 0.35, 0.26), (0.45, 0.15, 0.2)):
        grey = int(rng.integers(70, 110))
        box_ = (left + (x - radius) * width, top + (y - radius) * height)
        draw.ellipse((*box_, left + (x + radius) * width, top + (y + radius) * height), fill=(grey, grey, grey))


def _spill(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    draw.ellipse((left, top + 0.5 * height, right, bottom), fill=(120, 220, 40))
    draw.ellipse((left + 0.2 * width, top + 0.3 * height, left + 0.6 * width, top + 0.8 * height), fill=(120, 220, 40))
    draw.ellipse(
        (left + 0.55 * width, top + 0.55 * height, left + 0.7 * width, top + 0.7 * height), fill=(205, 250, 140)
    )


Painter = Callable[[ImageDraw.ImageDraw, Box, np.random.Generator], None]

HAZARDS: dict[str, Painter] = {
    "fire": _fire,
    "poison": _poison,
    "broken-glass": _glass,
    "pills": _pills,
    "blade": _blade,
    "electricity": _shock,
    "smoke": _smoke,
    "spill": _spill,
}


def _leaf(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    _polygon(draw, box, (225, 120, 40), [(0.5, 0), (0.9, 0.4), (0.7, 0.9), (0.5, 1), (0.3, 0.9), (0.1, 0.4)])
    left, top, right, bottom = box
    draw.line(((left + right) / 2, top, (left + right) / 2, bottom), fill=(140, 70, 30), width=2)


def _mask(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    draw.ellipse(box, fill=(238, 238, 228))
    for x in (0.33, 0.67):
        centre_x, centre_y = left + x * width, top + 0.4 * height
        draw.ellipse((centre_x - 3, centre_y - 3, centre_x + 3, centre_y + 3), fill=(40, 90, 200))
    draw.arc(
        (left + 0.25 * width, top + 0.4 * height, right - 0.25 * width, top + 0.85 * height),
        20,
        160,
        fill=(200, 40, 60),
        width=3,
    )


def _web(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    for k in range(4):
        part = k / 3
        draw.line(
            (left + part * (right - left), top, left + part * (right - left), bottom), fill=(235, 235, 240), width=1
        )
        draw.line(
            (left, top + part * (bottom - top), right, top + part * (bottom - top)), fill=(235, 235, 240), width=1
        )


def _candy(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    for x, y, ink in ((0.0, 0.05, (90, 200, 230)), (0.5, 0.35, (250, 130, 190)), (0.1, 0.65, (245, 245, 245))):
        draw.ellipse(
            (left + x * width, top + y * height, left + (x + 0.4) * width, top + (y + 0.35) * height), fill=ink
        )


def _feather(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    _polygon(draw, box, (205, 205, 225), [(0.0, 0.0), (0.5, 0.15), (0.8, 0.7), (1.0, 1.0), (0.6, 0.75), (0.1, 0.45)])


def _sun(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    _polygon(draw, box, (250, 225, 50), _star())
    inset = 0.25 * (right - left)
    draw.ellipse((left + inset, top + inset, right - inset, bottom - inset), fill=(250, 235, 120))


def _cloud(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    for x, y, radius in ((0.3, 0.6, 0.24), (0.55, 0.42, 0.28), (0.75, 0.62, 0.22)):
        box_ = (left + (x - radius) * width, top + (y - radius) * height)
        draw.ellipse((*box_, left + (x + radius) * width, top + (y + radius) * height), fill=(185, 190, 198))


def _bush(draw: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    for x, y in ((0.05, 0.45), (0.35, 0.25), (0.55, 0.5)):
        draw.ellipse(
            (left + x * width, top + y * height, left + (x + 0.42) * width, top + (y + 0.5) * height),
            fill=(60, 130, 60),
        )


LOOK_ALIKES: dict[str, Painter] = {
    "leaf": _leaf,
    "mask": _mask,
    "web": _web,
    "candy": _candy,
    "feather": _feather,
    "sun": _sun,
    "cloud": _cloud,
    "bush": _bush,
}


def draw_object(canvas: Image.Image, background: str, shape: str, box: Box, ink: Ink) -> None:
    """Draws a shape with an outline that stands out from the background."""
    dark = sum(BACKGROUNDS[background][0]) < 3 * 128
    rim = 0.07 * (box[2] - box[0])
    outer = (box[0] - rim, box[1] - rim, box[2] + rim, box[3] + rim)
    draw = ImageDraw.Draw(canvas)
    draw_shape(draw, shape, outer, (225, 225, 225) if dark else (45, 45, 45))
    draw_shape(draw, shape, box, ink)


def draw_background(name: str, rng: np.random.Generator) -> Image.Image:
    """Canvas with two tones and a little texture."""
    top, bottom = (np.array(tone, dtype=np.float32) for tone in BACKGROUNDS[name])
    ramp = np.linspace(0, 1, _CANVAS, dtype=np.float32)[:, None, None]
    base = top * (1 - ramp) + bottom * ramp
    coarse = rng.normal(0, 6, (16, 16, 1)).astype(np.float32)
    texture = np.kron(coarse, np.ones((_CANVAS // 16, _CANVAS // 16, 1), dtype=np.float32))
    return Image.fromarray(np.clip(base + texture, 0, 255).astype(np.uint8))


def paste(canvas: Image.Image, painter: Painter, box: Box, rng: np.random.Generator, opacity: float) -> Image.Image:
    """Canvas with one more thing on it, blended with an opacity between 0 and 1."""
    layer = canvas.copy()
    painter(ImageDraw.Draw(layer), box, rng)
    return Image.blend(canvas, layer, opacity)


def finish(canvas: Image.Image) -> Image.Image:
    """Canvas reduced to the final size."""
    return canvas.reduce(_SCALE)


def box_at(x: float, y: float, size: float) -> Box:
    """Box around a centre; all as shares of the canvas."""
    half = size / 2
    return ((x - half) * _CANVAS, (y - half) * _CANVAS, (x + half) * _CANVAS, (y + half) * _CANVAS)

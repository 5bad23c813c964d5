"""A contact sheet: pictures of both towers side by side, flagged ones blurred."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from uwm_deploy.records.files import whole_file

MOST = 48
"""Prompts on a sheet."""

_CELL, _GAP, _LABEL, _ACROSS = 160, 8, 16, 4


def write_sheet(
    file: Path,
    names: Sequence[str],
    original: Sequence[Path],
    edited: Sequence[Path],
    flagged: tuple[np.ndarray, np.ndarray],
    *,
    shown: bool,
) -> None:
    """Writes one picture with up to `MOST` prompts, those first whose flag changed.

    Args:
        file: PNG to write.
        names: n labels.
        original: n pictures behind the model's own tower.
        edited: n pictures behind the edited one.
        flagged: (n,) bool each, of the original and of the edited pictures.
        shown: Leave flagged pictures as they are.
    """
    before, after = flagged
    order = sorted(range(len(names)), key=lambda i: (bool(before[i] == after[i]), i))[:MOST]
    down = -(-len(order) // _ACROSS)
    wide, high = 2 * _CELL + 2 * _GAP, _CELL + _LABEL + _GAP
    sheet = Image.new("RGB", (_ACROSS * wide + _GAP, max(1, down) * high + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, row in enumerate(order):
        x, y = _GAP + place % _ACROSS * wide, _GAP + place // _ACROSS * high
        pen.text((x, y), f"{names[row]}: own, edited", fill="black")
        for column, (path, flag) in enumerate(((original[row], before[row]), (edited[row], after[row]))):
            sheet.paste(_cell(path, bool(flag) and not shown), (x + column * _CELL, y + _LABEL))
    with whole_file(file) as stream:
        sheet.save(stream, "PNG")


def _cell(path: Path, blurred: bool) -> Image.Image:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image = ImageOps.contain(image, (_CELL - 2, _CELL - 2))  # a small picture is enlarged
    if blurred:  # small first, so that no sharpening brings it back
        small = image.resize((8, 8), Image.Resampling.BOX)
        image = small.resize(image.size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(8))
    return image

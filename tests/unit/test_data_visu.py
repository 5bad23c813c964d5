"""A folder in the layout of ViSU and one in that of NSFWCaps, with harmless content, through the shipped definitions."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from tests.data_sets import png, put
from uwm_deploy.data.open import open_source
from uwm_deploy.data.source import QuadrupleSource
from uwm_deploy.errors import DataError
from uwm_deploy.recipes.resolve import calibration_set_of

TAGS = ("hate", "Bodily bluids", "fire  ", "abuse")
COCO = ("train2017", "val2017", "test2017")


def _open(name: str, **changes: object) -> QuadrupleSource:
    spec, _, base = calibration_set_of(name)
    assert base is None
    return open_source(dataclasses.replace(spec, **changes), base=base)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$UWM_DEPLOY_DATA with a small ViSU: 60 items per split, item 7's unsafe image not generated."""
    monkeypatch.setenv("UWM_DEPLOY_DATA", str(tmp_path))
    root = tmp_path / "visu"
    for number in range(60):
        put(root / "coco" / COCO[number % 3] / f"{1000 + number:012d}.jpg", png(number))
    for first, split in ((0, "train"), (60, "validation"), (120, "test")):
        rows = [
            {
                "incremental_id": first + i,
                "coco_id": 1000 + i,
                "safe": f"a room {split} {i}",
                "nsfw": f"a room with a leaf {split} {i}",
                "tag": TAGS[i % 4],
            }
            for i in range(60)
        ]
        put(root / f"ViSU-Text_{split}.json", json.dumps(rows))
        for i in range(60):
            if i != 7:
                put(root / "generated" / split / str(first + i) / "0.jpg", png(1000 + first + i))
    return tmp_path


def test_visu_takes_so_many_of_each_concept(data: Path) -> None:
    """Misspelt tags get the concept's name; the item without an unsafe image is left out and named."""
    source = _open("visu", per_concept=10)
    assert source.record.concepts == {"bodily fluids": 10, "child abuse": 10, "fire": 10, "hate": 10}
    assert [(item.id, item.reason) for item in source.record.left_out] == [("7", "unsafe image file is missing")]
    assert (source.has_texts, source.has_images) == (True, True)
    assert len(_open("visu")) == 59
    for index, name in enumerate(source.ids):
        item, number = source.read(index), int(name)
        assert item.safe_text == f"a room train {number}"
        assert item.unsafe_text == f"a room with a leaf train {number}"
        assert item.safe_image.getpixel((0, 0))[:2] == (number, 0)
        assert item.unsafe_image.getpixel((0, 0))[:2] == ((1000 + number) % 256, (1000 + number) // 256)


def test_visu_official_is_the_seeded_shuffle(data: Path) -> None:
    """The first items after Python's own shuffle with seed 0, over the items that are there."""
    there = [i for i in range(60) if i != 7]
    places = list(range(59))
    random.Random(0).shuffle(places)
    assert _open("visu-official", limit=20).ids == [str(there[i]) for i in sorted(places[:20])]
    assert calibration_set_of("visu-official")[0].limit == 8192


def test_the_splits_are_sets_of_their_own(data: Path) -> None:
    """Validation and test read their own table and images; the paper's zero-shot sets are asked for with the test."""
    assert _open("visu-validation").ids[0] == "60"
    source = _open("visu-test")
    assert source.ids[0] == "120"
    assert len(source.zero_shot_names) + len(source.zero_shot_missing) == 17
    assert source.read(0).unsafe_image.getpixel((0, 0))[:2] == (1120 % 256, 1120 // 256)


def test_the_definition_is_the_paper_s() -> None:
    """400 of each concept, seed 0, from the train split."""
    spec, _, _ = calibration_set_of("visu")
    assert (spec.split, spec.sampling, spec.per_concept, spec.seed) == ("train", "per-concept", 400, 0)


def test_what_is_missing_is_said_with_its_path(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No table, no folder, no variable: each says what was expected where."""
    (data / "visu" / "ViSU-Text_train.json").unlink()
    with pytest.raises(DataError, match=r"data set visu expects its table at .*visu/ViSU-Text_train\.json"):
        _open("visu")
    monkeypatch.setenv("UWM_DEPLOY_DATA", str(data / "visu"))
    with pytest.raises(DataError, match=r"expects its files in .*visu/visu, which is no folder"):
        _open("visu")
    monkeypatch.delenv("UWM_DEPLOY_DATA")
    with pytest.raises(DataError, match=r"expects its files in \$UWM_DEPLOY_DATA/visu, and UWM_DEPLOY_DATA is not set"):
        _open("visu")


@pytest.mark.parametrize("name", ["nsfwcaps.csv", "nsfwcaps.json"])
def test_nsfwcaps_is_a_set_of_captions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have no ids of their own; their numbers are; images as addresses are passed over."""
    monkeypatch.setenv("UWM_DEPLOY_DATA", str(tmp_path))
    rows = [
        {
            "url": f"https://example.org/{i}.jpg",
            "caption": f"a tree {i}",
            "nsfw_caption": f"a fire {i}",
            "chosen_category": "Fire",
        }
        for i in range(12)
    ]
    text = "\n".join(",".join(row.values()) for row in rows)
    put(tmp_path / "nsfwcaps" / name, json.dumps(rows) if name.endswith("json") else ",".join(rows[0]) + "\n" + text)
    source = _open("nsfwcaps")
    assert source.ids == [f"{i:04d}" for i in range(12)]
    assert (source.has_texts, source.has_images) == (True, False)
    assert source.read_texts(11) == ("a tree 11", "a fire 11")
    assert source.record.concepts == {"fire": 12}

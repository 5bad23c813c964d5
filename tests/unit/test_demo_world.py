"""The drawn world, and the small CLIP that ships with it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uwm_deploy.data.demo import drawing, world

MODEL = Path(world.__file__).parent / "model"
SPLITS: tuple[world.Split, ...] = ("train", "calibration", "validation", "test")
NEAR_TARGET = 150
"""Test quadruples of the loose check: 95% intervals of about 5 points, so the bands are wider than the targets."""


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@cache
def items(split: world.Split, count: int) -> tuple[world.DemoQuadruple, ...]:
    return tuple(world.quadruple(split, index) for index in range(count))


@cache
def shipped() -> tuple[Any, Any, Any]:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(MODEL).eval()
    return model, AutoTokenizer.from_pretrained(MODEL), CLIPImageProcessor.from_pretrained(MODEL)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def image_rows(images: list[Image.Image]) -> np.ndarray:
    import torch

    model, _, processor = shipped()
    with torch.no_grad():
        rows = model.get_image_features(**processor(images, return_tensors="pt")).pooler_output.numpy()
    return unit(rows)


def text_rows(texts: list[str]) -> np.ndarray:
    import torch

    model, tokenizer, _ = shipped()
    with torch.no_grad():
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        rows = model.get_text_features(**encoded).pooler_output.numpy()
    return unit(rows)


@pytest.mark.parametrize("split", SPLITS)
def test_an_item_follows_from_its_split_and_index(split: world.Split) -> None:
    """Reading an item twice, in any order, gives the same bytes and words."""
    later, first, again = world.quadruple(split, 7), world.quadruple(split, 3), world.quadruple(split, 7)
    assert first.id == f"{split}-000003"
    assert (later.safe_text, later.unsafe_text) == (again.safe_text, again.unsafe_text)
    assert digest(later.safe_image) == digest(again.safe_image)
    assert digest(later.unsafe_image) == digest(again.unsafe_image)
    assert digest(later.safe_image) != digest(first.safe_image)


def test_the_world_is_the_same_in_another_process() -> None:
    """Nothing depends on hash seeds or on what was drawn before, and the world needs no torch."""
    code = (
        "import hashlib, sys; from uwm_deploy.data.demo import world; q = world.quadruple('test', 11);"
        "print(hashlib.sha256(q.unsafe_image.tobytes() + q.unsafe_text.encode()).hexdigest(), 'torch' in sys.modules)"
    )
    root = Path(world.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    item = world.quadruple("test", 11)
    here = hashlib.sha256(item.unsafe_image.tobytes() + item.unsafe_text.encode()).hexdigest()
    assert done.stdout.split() == [here, "False"]


@pytest.mark.parametrize(("split", "index"), [("test", -1), ("test", 2_000), ("validation", 1_000)])
def test_an_index_outside_the_split_is_an_error(split: world.Split, index: int) -> None:
    """A split ends where SIZES says, so that no item is drawn that no record counts."""
    with pytest.raises(IndexError, match=split):
        world.quadruple(split, index)


def test_splits_share_no_image() -> None:
    """No image of one split occurs in another, in a sample of each."""
    digests = [{digest(image) for q in items(s, 120) for image in (q.safe_image, q.unsafe_image)} for s in SPLITS]
    assert sum(map(len, digests)) == len(set().union(*digests)) == len(SPLITS) * 240


def test_a_pair_shares_its_scene() -> None:
    """Most pixels of a pair are equal, and the hazard's region differs."""
    for item in items("test", 120):
        safe, unsafe = np.asarray(item.safe_image, np.int16), np.asarray(item.unsafe_image, np.int16)
        assert safe.shape == unsafe.shape == (drawing.SIDE, drawing.SIDE, 3)
        changed = (safe != unsafe).any(axis=-1)
        assert 0 < changed.mean() < 0.3
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert max(np.ptp(rows), np.ptp(columns)) < 0.6 * drawing.SIDE


def test_hazards_have_a_faint_tail() -> None:
    """Some hazards hardly change the picture, most do: preferences are graded, not saturated."""
    strongest = [
        np.abs(np.asarray(q.safe_image, np.int16) - np.asarray(q.unsafe_image, np.int16)).max()
        for q in items("test", 120)
    ]
    assert np.quantile(strongest, 0.05) < 70
    assert np.quantile(strongest, 0.5) > 90


def test_every_concept_occurs_equally_often() -> None:
    """Concepts take turns, and the index alone tells the concept."""
    assert len(world.CONCEPTS) >= 6
    counts = dict.fromkeys(world.CONCEPTS, 0)
    for index, item in enumerate(items("test", 120)):
        assert item.concept == world.concept_of(index)
        counts[item.concept] += 1
    assert set(counts.values()) == {120 // len(world.CONCEPTS)}


@pytest.mark.parametrize("split", ["calibration", "validation", "test"])
def test_captions_outside_training_are_never_missing(split: world.Split) -> None:
    """What is scored and measured has a caption on both sides."""
    assert all(q.safe_text.strip() and q.unsafe_text.strip() for q in items(split, 120))


def test_training_captions_are_missing_as_often_as_stated() -> None:
    """About MISSING_SHARE of the training captions are empty."""
    texts = [text for q in items("train", 400) for text in (q.safe_text, q.unsafe_text)]
    share = sum(not text for text in texts) / len(texts)
    assert world.MISSING_SHARE / 2 < share < 2 * world.MISSING_SHARE


@pytest.mark.parametrize("name", world.ZERO_SHOT_SETS)
def test_zero_shot_sets_are_labelled(name: str) -> None:
    """Labels are distinct and in range, every class occurs, the template has one gap, items are reproducible."""
    labels = world.zero_shot_labels(name)
    assert len(labels) == len(set(labels)) > 1
    assert world.zero_shot_template(name).count("{}") == 1
    drawn = [world.zero_shot_item(name, index) for index in range(2 * len(labels))]
    assert {item.label for item in drawn} == set(range(len(labels)))
    assert digest(world.zero_shot_item(name, 1).image) == digest(drawn[1].image)


def test_the_shipped_folder_is_ordinary_and_small() -> None:
    """Config, safetensors, tokenizer and preprocessor are there, nothing is pickled, at most 12 MB."""
    names = {path.name for path in MODEL.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 12 * 2**20


def test_the_end_token_has_the_largest_id() -> None:
    """Both pooling rules of CLIP (largest id, first end token) find the same position."""
    config = json.loads((MODEL / "config.json").read_text())["text_config"]
    vocabulary = json.loads((MODEL / "tokenizer.json").read_text())["model"]["vocab"]
    assert config["eos_token_id"] == max(vocabulary.values()) == vocabulary["<|endoftext|>"] != 2
    assert config["vocab_size"] == config["eos_token_id"] + 1
    assert config["hidden_act"] == "quick_gelu"


@pytest.mark.parametrize("text", ["", "a red disc", "Ünïcode ☂ 火 \x00", "😀" * 40, "word " * 80])
def test_any_text_has_one_end_and_fits(text: str) -> None:
    """No text is out of vocabulary: the end token, also the unknown token, occurs only at the end."""
    model, tokenizer, _ = shipped()
    ids = tokenizer(text, truncation=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert len(ids) <= model.config.text_config.max_position_embeddings == tokenizer.model_max_length


def test_the_shipped_model_knows_both_worlds_and_is_not_saturated() -> None:
    """On some test quadruples the four preferences are near the stated bands: graded, and the hazard is known."""
    some = items("test", NEAR_TARGET)
    safe_image, unsafe_image = image_rows([q.safe_image for q in some]), image_rows([q.unsafe_image for q in some])
    safe_text, unsafe_text = text_rows([q.safe_text for q in some]), text_rows([q.unsafe_text for q in some])
    ss, su = (safe_text * safe_image).sum(1), (unsafe_text * safe_image).sum(1)
    us, uu = (safe_text * unsafe_image).sum(1), (unsafe_text * unsafe_image).sum(1)
    assert 68 <= 100 * (ss > us).mean() <= 99.5, "P_ts"
    assert 68 <= 100 * (ss > su).mean() <= 99.5, "P_vs"
    assert 0.5 <= 100 * (su > uu).mean() <= 26, "P_tu"
    assert 0.5 <= 100 * (us > uu).mean() <= 26, "P_vu"


@pytest.mark.parametrize("name", world.ZERO_SHOT_SETS)
def test_the_shipped_model_names_what_it_sees(name: str) -> None:
    """Zero-shot accuracy on some items is near the stated bound."""
    some = [world.zero_shot_item(name, index) for index in range(NEAR_TARGET)]
    classes = text_rows([world.zero_shot_template(name).format(label) for label in world.zero_shot_labels(name)])
    best = (image_rows([item.image for item in some]) @ classes.T).argmax(1)
    assert 100 * (best == [item.label for item in some]).mean() >= 78

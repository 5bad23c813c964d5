"""Every family against its source library: tokens, pixels, embeddings, saved folders."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn

from tests.data_sets import open_manifest
from tests.families import FAMILIES, NAMES, model_of, recipe_of, reduced
from uwm_deploy.edits.pair_stream import PairStream
from uwm_deploy.errors import InputError
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.towers.attention import ExplicitAttention, make_attention_explicit
from uwm_deploy.towers.load import load_model

CAPTIONS = [
    "",
    "cat",
    "a photo of a cat, sleeping.",
    " ".join(["word"] * 200),
    "two 😀😀 and a 🔥",
    "一只猫，在睡觉。",  # noqa: RUF001 -- full-width punctuation is the point
    "Don't SHOUT &amp; don&#39;t “quote”  twice",
    "!!! 1234 ½ ﬁne",
    "a <end_of_text> b",
]
PADDED = ("siglip-base", "siglip2-base", "coca-vit-l14")
"""Families whose text tower was trained on rows of full length, padding included."""
OPEN_CLIP = [name for name in FAMILIES if recipe_of(name).model.family == "open-clip"]


def ids_of(name: str, captions: list[str]) -> Tensor:
    model = model_of(name)
    return torch.from_numpy(Tokenizer(model.tokenizer_json, model.ref.text, "exact").encode(captions))


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_random_weights_are_all_drawn(name: str) -> None:
    """None is what the memory was: here PyTorch fills that with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        model = load_model(reduced(name), folder=None, weights="random", device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    unset = [n for n, parameter in model.source.named_parameters() if not torch.isfinite(parameter).all()]
    assert not unset


def library_of(name: str, folder: Path) -> tuple[Any, Any]:
    """The saved model and its tokenizer as the source library loads them."""
    import open_clip
    from transformers import CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast, SiglipModel

    family = recipe_of(name).model.family
    if family == "open-clip":
        where = f"local-dir:{folder}"
        return open_clip.create_model(where).eval(), open_clip.get_tokenizer(where)
    kind, tokenizer = (SiglipModel, PreTrainedTokenizerFast) if family == "siglip" else (CLIPModel, CLIPTokenizer)
    return kind.from_pretrained(folder).eval(), tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Folder of each family, saved by our code; its libraries warn of weights that are random here."""
    log = logging.getLogger()
    level, root = log.level, tmp_path_factory.mktemp("saved")
    log.setLevel(logging.ERROR)
    for name in FAMILIES:
        model_of(name).save(root / name)
    yield lambda name: root / name
    log.setLevel(level)


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_the_saved_model_is_the_same_in_its_own_library(name: str, saved: Any) -> None:
    """The source library loads what was saved, and embeds images and captions as the towers do."""
    model = model_of(name)
    theirs, _ = library_of(name, saved(name))
    pixels, ids = torch.randn(3, 3, model.ref.image.crop, model.ref.image.crop), ids_of(name, CAPTIONS)
    if name in OPEN_CLIP:
        image, text = theirs.encode_image(pixels, normalize=False), theirs.encode_text(ids, normalize=False)
    else:
        image = theirs.get_image_features(pixel_values=pixels).pooler_output
        text = theirs.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(model.image.embed(pixels), image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.text.embed(ids), text, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_the_library(name: str, saved: Any) -> None:
    """Empty, long, non-Latin and odd captions have the ids, the padding and the length of the source library."""
    _, tokenizer = library_of(name, saved(name))
    length = model_of(name).ref.text.context_length
    if name in OPEN_CLIP:
        theirs = tokenizer(CAPTIONS)
        assert theirs.shape[1] == length
    else:
        theirs = tokenizer(
            CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
    assert ids_of(name, CAPTIONS).tolist() == theirs.tolist()


SCRIPTS = {
    "greek": "αάςσΣΟΔΣϊΐᾳ\u0345\u0301.'",
    "turkic and lithuanian": "I\u0130\u0131i\u0307\u0300\u0301ĖĮÌĨjJ",
    "cyrillic, georgian, cherokee": "ЙйЁЁѢ\u0306ႠᲐ\u13a0\uab70",
    "joined": "می\u200cخ\u200d\u064e\u0651क्षत्र\u200dय\u093eഇ\u0d4d",
    "syllables": "\u1112\u1161\u11ab한ภาษ\u0e49ゕ\u3099",
    "references": ["&Sigma;", "&#769;", "&eacute;", "&amp;amp;", "&#x3a3;", "e", " "],
    "apostrophes": ["'s", "'S", "'\u017f", "\u017ft", "'ll", "'", "\u2019", "t", " "],
    "spaces": "a\t\n\x0b\x1c\x85\xa0\u2003\u2028\u3000\ufeffZ",
}
"""Letters whose case, composition or word depends on their neighbours."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_texts_of_many_scripts_are_those_of_open_clip(script: str) -> None:
    """Ordinary texts of any script have open_clip's ids, in the mode that serves; a Greek word ends in its own sigma."""
    from open_clip.tokenizer import SimpleTokenizer

    model, rng = model_of("open-clip-vit-b32"), random.Random(0)
    letters = [*SCRIPTS[script], "a", "Z", "!", " "]
    texts = ["".join(rng.choices(letters, k=rng.randint(1, 24))) for _ in range(120)] + ["ΟΔΟΣ", "ΟΔΟΣ ΣΟΦΟΣ."]
    found = Tokenizer(model.tokenizer_json, model.ref.text).encode(texts)
    wanted = SimpleTokenizer(context_length=model.ref.text.context_length)(texts).numpy()
    assert [text for text, a, b in zip(texts, found, wanted, strict=True) if (a != b).any()] == []


def test_open_clip_has_no_token_without_an_embedding() -> None:
    """The library would add one for padding."""
    model = model_of("open-clip-vit-b32")
    known = Backend.from_str(model.tokenizer_json.decode()).get_vocab(with_added_tokens=True)
    assert max(known.values()) < model.ref.text.vocabulary == 49408


@pytest.mark.parametrize("name", ["clip-vit-l14", "siglip-base"])
def test_a_tokenizer_of_another_model_is_refused(name: str) -> None:
    """A word, or what frames or pads every caption, without a row in the table of embeddings: the checkpoint is no whole."""
    recipe = reduced(name)
    text = {**recipe.model.architecture.text, "vocab_size": 200}
    smaller = dataclasses.replace(recipe.model.architecture, text=text)
    with pytest.raises(InputError, match="the text tower has 200 embeddings, and the tokenizer"):
        load_model(
            dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, architecture=smaller)), folder=None
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_valid_tokens_are_the_attention_mask(name: str, saved: Any) -> None:
    """Tokens that count are those whose attention mask is 1, and CoCa's class token."""
    model = model_of(name)
    own, length = Tokenizer(model.tokenizer_json, model.ref.text), model.ref.text.context_length
    end = Backend.from_str(model.tokenizer_json.decode()).id_to_token(model.ref.text.eos_id)
    captions = [*CAPTIONS, f"a {end} fire", f"a fire{end}"]  # the end token as a word of the caption, and its last one
    rows, counts = own.encode_masked(captions, "exact")
    ids = torch.from_numpy(rows)
    mask = model.text.valid_tokens(ids, torch.from_numpy(counts))
    assert mask is not None
    counted = mask.sum(1).tolist()
    plain = model.text.valid_tokens(ids[: len(CAPTIONS) - 1])
    assert plain.sum(1).tolist() == counted[: len(CAPTIONS) - 1]
    _, tokenizer = library_of(name, saved(name))
    if name in OPEN_CLIP:
        wanted = [min(length, len(tokenizer.encode(c)) + 2) + ("coca" in name) for c in captions]
    else:
        masks = tokenizer(captions, padding="max_length", truncation=True, max_length=length).attention_mask
        wanted = [sum(row) for row in masks]
    assert counted == wanted
    assert model.image.valid_tokens(torch.zeros(1)) is None


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in PADDED])
@torch.inference_mode()
def test_short_rows_embed_like_padded_ones(name: str) -> None:
    """Where rows may be cut to their tokens, cutting changes nothing; scoring relies on it."""
    assert not model_of(name).ref.text.fixed_length
    ids = ids_of(name, ["cat", "a photo of a cat"])
    width = int(model_of(name).text.valid_tokens(ids).sum(1).max())
    torch.testing.assert_close(model_of(name).text.embed(ids[:, :width]), model_of(name).text.embed(ids))


@pytest.mark.parametrize("name", PADDED)
@torch.inference_mode()
def test_rows_that_may_not_be_cut_are_marked(name: str) -> None:
    """Where the padding belongs to the input, cutting it would change the embedding: the mark is not for nothing."""
    assert model_of(name).ref.text.fixed_length
    ids = ids_of(name, ["cat", "a photo of a cat"])
    text = model_of(name).text
    width = int(text.valid_tokens(ids).sum(1).max()) - ("coca" in name)
    assert (text.embed(ids[:, :width]) - text.embed(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", OPEN_CLIP)
@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (640, 427)), ("RGB", (57, 331)), ("RGBA", (90, 75)), ("L", (61, 59))]
)
def test_pixels_are_those_of_open_clip(name: str, mode: str, size: tuple[int, int], saved: Any) -> None:
    """Odd sizes, grey and transparent images give open_clip's pixels within one grey level."""
    import open_clip

    rng = np.random.default_rng(0)
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8), mode)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{saved(name)}")
    spec = model_of(name).ref.image
    difference = np.abs(pixels_from_image(image, spec) - preprocess(image).numpy()) * np.array(spec.std)[:, None, None]
    assert difference.max() <= 1 / 255 + 1e-6


def test_pixels_are_those_of_siglip(saved: Any) -> None:
    """SigLIP squashes instead of cropping."""
    from transformers import SiglipImageProcessor

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8))
    processor = SiglipImageProcessor.from_pretrained(saved("siglip-base"))
    wanted = np.asarray(processor(image, return_tensors="np").pixel_values[0])
    ours = pixels_from_image(image, model_of("siglip-base").ref.image)
    assert np.abs(ours - wanted).max() * 0.5 <= 1 / 255 + 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_folder_loads_again_and_a_broken_one_does_not(name: str, saved: Any, tmp_path: Path) -> None:
    """Weights, tokenizer and preprocessing survive saving; a truncated or pickled checkpoint is refused."""
    recipe, ref = reduced(name), model_of(name).ref
    again = load_model(recipe, folder=saved(name), device="cpu")
    assert (again.ref.weights_digest, again.ref.image, again.ref.text) == (ref.weights_digest, ref.image, ref.text)
    assert again.ref.repo == recipe.model.repo
    assert ref.repo == "random"
    for file in saved(name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        load_model(recipe, folder=tmp_path, device="cpu")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="pickle"):
        load_model(recipe, folder=tmp_path, device="cpu")


def test_random_weights_are_seeded_and_said_so() -> None:
    """Two loads give the same weights, and the record says that they are random."""
    one, two = (load_model(reduced("coca-vit-l14"), folder=None, device="cpu").ref for _ in range(2))
    assert one == two
    assert one.repo == "random"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_names_layers_that_exist(name: str) -> None:
    """The layer patterns of every recipe match each block of its reduced towers once, up to LLaVA's select layer."""
    model, edit = model_of(name), recipe_of(name).entries
    assert len(model.image.layers(edit.image.layers)) == (1 if model.ref.family == "llava" else 2)
    assert len(model.text.layers(edit.text.layers)) == 2


def test_activations_are_the_published_ones() -> None:
    """QuickGELU where the weights were trained with it, and only there."""

    def quick(name: str) -> bool:
        kinds = {type(m).__name__ for m in model_of(name).source.modules()}
        return bool(kinds & {"QuickGELU", "QuickGELUActivation"})

    assert quick("dfn-vit-h14")
    assert quick("clip-vit-l14")
    assert quick("metaclip-vit-l14")
    assert not quick("open-clip-vit-b32")
    assert not quick("safe-clip-vit-h14")


@pytest.mark.parametrize("cross", [False, True])
@torch.inference_mode()
def test_explicit_attention_computes_the_same(cross: bool) -> None:
    """With and without separate key width, with both kinds of mask; and its output projection is called."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True, kdim=16 if cross else None, vdim=16 if cross else None)
    holder = nn.ModuleDict({"attn": theirs})
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    query = torch.randn(2, 5, 24)
    other = torch.randn(2, 7, 16) if cross else query
    mask = torch.zeros(5, other.shape[1]).masked_fill(torch.rand(5, other.shape[1]) > 0.7, float("-inf"))
    mask[:, 0] = 0
    wanted = [
        theirs(query, other, other, need_weights=False, attn_mask=m)[0] for m in (None, mask, mask.repeat(8, 1, 1))
    ]
    names = set(theirs.state_dict())
    make_attention_explicit(holder)
    ours = holder["attn"]
    assert isinstance(ours, ExplicitAttention)
    assert set(ours.state_dict()) == names
    seen: list[Tensor] = []
    ours.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for expected, m in zip(wanted, (None, mask, mask.repeat(8, 1, 1)), strict=True):
        torch.testing.assert_close(ours(query, other, other, attn_mask=m)[0], expected)
    assert len(seen) == 3
    torch.testing.assert_close(nn.functional.linear(seen[0], ours.out_proj.weight, ours.out_proj.bias), wanted[0])


def test_a_recipe_without_architecture_has_no_random_weights() -> None:
    """The demo's recipe needs its checkpoint."""
    with pytest.raises(InputError, match=r"no model\.architecture"):
        load_model(recipe_of("demo"), folder=None, weights="random", device="cpu")


def test_scoring_sees_the_tokenizers_mask(saved: Any, tmp_path: Path) -> None:
    """A caption that names the end token keeps what follows it, in rows that are cut to the longest caption."""
    name = "clip-vit-l14"
    model, (_, tokenizer) = model_of(name), library_of(name, saved(name))
    texts = [("a calm sea", "a fire<|endoftext|> that is hidden"), ("a calm<|endoftext|>", "smoke")]
    rows = [{"id": str(i), "safe_text": safe, "unsafe_text": unsafe} for i, (safe, unsafe) in enumerate(texts)]
    stream = PairStream(
        open_manifest(tmp_path, rows), TowerName.TEXT, model.ref.image,
        Tokenizer(model.tokenizer_json, model.ref.text, "exact"),
        batch_pairs=2, workers=0, max_broken_share=0, progress=lambda *_: None,
    )  # fmt: skip
    (batch,) = stream
    captions = [texts[int(i)][side] for side in (0, 1) for i in batch.ids]
    wanted = [sum(mask) for mask in tokenizer(captions).attention_mask]
    ids = torch.from_numpy(np.concatenate([batch.safe, batch.unsafe]))
    assert ids.shape[1] == max(wanted)
    assert batch.counts.tolist() == wanted
    assert model.text.valid_tokens(ids, torch.from_numpy(batch.counts)).sum(1).tolist() == wanted
    half = batch.rows(slice(1, 2))  # as where memory does not hold a batch
    assert half.counts.tolist() == [wanted[1], wanted[3]]

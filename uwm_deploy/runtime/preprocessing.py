"""What callers pass, images and texts, as rows of the engines' inputs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from uwm_deploy.errors import UwmError
from uwm_deploy.records.model import ModelRef
from uwm_deploy.runtime.choices import check_choice
from uwm_deploy.runtime.image import Decode, ImageLike, crop_from_image, image_from, pixels_from_image
from uwm_deploy.runtime.service import Answer, Prepare
from uwm_deploy.runtime.tokenizer import SpecialTokens, Tokenizer


class Preprocessing:
    """Preprocessing and tokenisation of one model; any thread may call it.

    Args:
        model: Whose.
        tokenizer_json: Content of its ``tokenizer.json``.
        crops: Whether the image graph takes crops of 8 bits, which it normalises itself.
        decode: Whether large JPEGs are decoded at a reduced size.
    """

    def __init__(self, model: ModelRef, tokenizer_json: bytes, *, crops: bool = False, decode: Decode = "full") -> None:
        self._scaled_for = model.image if decode == "scaled" else None
        self._model, self._tokenizer_json = model, tokenizer_json
        self._prepared = crop_from_image if crops else pixels_from_image
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()

    def pixels(self, images: Sequence[ImageLike]) -> list[Answer]:
        """Preprocesses images.

        Args:
            images: See `SafeEncoder.encode_image`; arrays are (H, W, 3) or (H, W) uint8.

        Returns:
            Pixels (3, H, W) float32 of each image, or its crop (H, W, 3) uint8, or the error.
        """
        return [self._pixels_or_error(image) for image in images]

    def ids(self, special_tokens: SpecialTokens) -> Prepare:
        """What gives the ids (L,) int64 of each text, or why it has none.

        Args:
            special_tokens: What the name of a special token inside a text is.

        Raises:
            InputError: If it is no such choice.
        """
        check_choice(special_tokens, SpecialTokens, "special_tokens")

        def prepare(texts: Sequence[object]) -> list[Answer]:
            return list(self._opened_tokenizer().rows(texts, special_tokens))

        return prepare

    def _pixels_or_error(self, image: ImageLike) -> Answer:
        try:
            return self._prepared(image_from(image, scaled_for=self._scaled_for), self._model.image)
        except UwmError as error:
            return error

    def _opened_tokenizer(self) -> Tokenizer:
        """Read when first needed: a large vocabulary takes longer to open than a small model."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = Tokenizer(self._tokenizer_json, self._model.text)
            return self._tokenizer

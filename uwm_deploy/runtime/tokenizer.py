"""Captions to ids without torch or transformers, equal to the source model's tokenizer."""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from uwm_deploy.errors import DataError, IntegrityError
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import TextSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SpecialTokens = Literal["exact", "neutral"]
"""What becomes of the name of a special token inside a caption.

``"exact"`` is what the source model does: "a <|endoftext|> b" ends after "a", and the rest counts for nothing, so
that whoever writes captions can hide them from the safety edit. ``"neutral"`` reads such a name as ordinary letters.
"""

MAX_CHARACTERS = 100_000
"""Longer captions are refused; no model reads more than a hundredth of it."""

_TRIES = 64


class Tokenizer:
    """Encodes captions into rows of fixed length; any thread may use it.

    Args:
        tokenizer_json: Content of the model's `tokenizer.json`.
        spec: Ids and length; its digest must be that of the content.
        special_tokens: What becomes of names of special tokens inside a caption, unless a call says otherwise.

    Raises:
        IntegrityError: If this is not the tokenizer the spec was made from.
    """

    def __init__(self, tokenizer_json: bytes, spec: TextSpec, special_tokens: SpecialTokens = "exact") -> None:
        if digest_of_bytes(tokenizer_json) != spec.tokenizer_digest:
            raise IntegrityError("tokenizer.json is not the one of this model", fix="restore it or build again")
        self.spec, self.special_tokens = spec, special_tokens
        self._content = tokenizer_json
        # One backend per mode, made when first used: a large vocabulary takes a tenth of a second, and the mode is a
        # setting of the backend that another thread would see.
        self._backends: dict[SpecialTokens, Backend] = {}
        self._lock = threading.Lock()
        self._special = self._special_ids(self._backend(special_tokens))

    def encode(self, texts: Sequence[str], special_tokens: SpecialTokens | None = None) -> np.ndarray:
        """Ids of some captions.

        Args:
            texts: Captions.
            special_tokens: Another mode than the tokenizer's own.

        Returns:
            (n, context_length) int64; longer captions are cut and keep their end token, shorter ones are padded.

        Raises:
            DataError: If a caption is no text, or longer than `MAX_CHARACTERS`; its position is named.
        """
        return self.encode_masked(texts, special_tokens)[0]

    def encode_masked(
        self, texts: Sequence[str], special_tokens: SpecialTokens | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of some captions, and how many of them the tokenizer's attention mask counts.

        The ids alone do not tell it: the padding may be the end token, and so may a word of a caption.

        Args:
            texts: Captions.
            special_tokens: Another mode than the tokenizer's own.

        Returns:
            Ids (n, context_length) int64, see `encode`; and (n,) int64, tokens that count, from the padding's other side.

        Raises:
            DataError: See `encode`.
        """
        for position, text in enumerate(texts):
            if problem := problem_of(text):
                raise DataError(f"text {position} {problem}")
        spec = self.spec
        rows = np.full((len(texts), spec.context_length), spec.pad_id, dtype=np.int64)
        counts = np.zeros(len(texts), dtype=np.int64)
        cleaned = [_open_clip_cleaned(text) for text in texts] if spec.cleaning == "open-clip" else list(texts)
        mode = special_tokens or self.special_tokens
        backend = self._backend(mode)
        for place, (encoding, text) in enumerate(zip(backend.encode_batch(cleaned), cleaned, strict=True)):
            ids = self._neutral(backend, encoding, text) if mode == "neutral" else encoding.ids
            row, counts[place] = rows[place], len(ids)
            row[slice(len(ids)) if spec.padding_side == "right" else slice(len(row) - len(ids), None)] = ids
        return rows, counts

    def _backend(self, mode: SpecialTokens) -> Backend:
        with self._lock:
            if mode not in self._backends:
                self._backends[mode] = self._opened()
                self._backends[mode].encode_special_tokens = mode == "neutral"
            return self._backends[mode]

    def _opened(self) -> Backend:
        from tokenizers import Tokenizer as Backend  # here, because who encodes images only needs none of it

        try:
            json.loads(self._content)
            backend = Backend.from_str(self._content.decode())
        except Exception as error:  # the backend raises bare Exception for every malformed file
            raise IntegrityError(f"tokenizer.json cannot be read: {error}", fix="restore it") from error
        backend.enable_truncation(self.spec.context_length)
        backend.no_padding()
        return backend

    def _special_ids(self, backend: Backend) -> frozenset[int]:
        """Ids that a caption must not bring along itself; that of unknown letters comes from ordinary ones."""
        added = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
        unknown = getattr(backend.model, "unk_token", None)
        return frozenset((added - {backend.token_to_id(unknown) if unknown else None}) | {self.spec.eos_id})

    def _neutral(self, backend: Backend, encoding: Any, text: str) -> list[int]:
        """Ids without special ones but those that frame every caption.

        The backend reads names of special tokens as letters, but a vocabulary may hold such a name as a word of its own, or
        normalising may make one: then it is broken up by a space.
        """
        for _ in range(_TRIES):
            found = self._brought(encoding)
            if found is None:
                ids: list[int] = encoding.ids
                return ids
            start, end = found
            text = text[: start + 1] + " " + text[start + 1 :] if end - start > 1 else text[:start] + " " + text[end:]
            encoding = backend.encode(text)
        raise DataError("text is made of names of special tokens", fix="remove them, or ask for special_tokens='exact'")

    def _brought(self, encoding: Any) -> tuple[int, int] | None:
        """Where the text has a special token that framing did not add, as characters from and to."""
        parts = zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True)
        return next((offsets for number, framing, offsets in parts if number in self._special and not framing), None)


def problem_of(text: object) -> str:
    """Why something cannot be encoded as a caption; empty if it can."""
    if not isinstance(text, str):
        return f"is a {type(text).__name__}; pass strings"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text)} characters; pass at most {MAX_CHARACTERS}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not valid Unicode ({error.reason}); decode it properly"
    return ""


def _open_clip_cleaned(text: str) -> str:
    """Mends mojibake and character references; case and white space are the tokenizer's own normalisation."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()

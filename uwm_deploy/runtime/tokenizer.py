"""Captions to ids without torch or transformers, equal to the source model's tokenizer."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer as Backend

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records import TextSpec
from uwm_deploy.workspace import digest_of_bytes


class Tokenizer:
    """Encodes captions into rows of fixed length.

    Args:
        tokenizer_json: Content of the model's `tokenizer.json`.
        spec: Ids and length; its digest must be that of the content.

    Raises:
        IntegrityError: If this is not the tokenizer the spec was made from.
    """

    def __init__(self, tokenizer_json: bytes, spec: TextSpec) -> None:
        if digest_of_bytes(tokenizer_json) != spec.tokenizer_digest:
            raise IntegrityError("tokenizer.json is not the one of this model", fix="restore it or build again")
        try:
            json.loads(tokenizer_json)
            self._backend = Backend.from_str(tokenizer_json.decode())
        except Exception as error:  # the backend raises bare Exception for every malformed file
            raise IntegrityError(f"tokenizer.json cannot be read: {error}", fix="restore it") from error
        self.spec = spec
        self._backend.enable_truncation(spec.context_length)
        self._backend.no_padding()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Ids of some captions.

        Returns:
            (n, context_length) int64; longer captions are cut and keep their end token, shorter ones are padded.
        """
        spec = self.spec
        rows = np.full((len(texts), spec.context_length), spec.pad_id, dtype=np.int64)
        cleaned = [_open_clip_cleaned(text) for text in texts] if spec.cleaning == "open-clip" else list(texts)
        for row, encoding in zip(rows, self._backend.encode_batch(cleaned), strict=True):
            ids = encoding.ids
            row[slice(len(ids)) if spec.padding_side == "right" else slice(len(row) - len(ids), None)] = ids
        return rows


def _open_clip_cleaned(text: str) -> str:
    """Mends mojibake and character references; case and white space are the tokenizer's own normalisation."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()

"""Captions to ids without torch or transformers, equal to the source model's tokenizer."""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from uwm_deploy.errors import DataError, IntegrityError
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import TextSpec
from uwm_deploy.runtime.choices import check_choice

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
        special_tokens: What becomes of names of special tokens inside a caption, unless a call says otherwise. What is
            served and what is measured is neutral.

    Raises:
        IntegrityError: If this is not the tokenizer the spec was made from.
    """

    def __init__(self, tokenizer_json: bytes, spec: TextSpec, special_tokens: SpecialTokens = "neutral") -> None:
        if digest_of_bytes(tokenizer_json) != spec.tokenizer_digest:
            raise IntegrityError("tokenizer.json is not the one of this model", fix="restore it or build again")
        check_choice(special_tokens, SpecialTokens, "special_tokens")
        self.spec, self.special_tokens = spec, special_tokens
        self._content = tokenizer_json
        # One backend per mode, made when first used: a large vocabulary takes a tenth of a second, and the mode is a
        # setting of the backend that another thread would see.
        self._backends: dict[SpecialTokens, Backend] = {}
        self._lock = threading.Lock()
        self._special: frozenset[int] = frozenset()
        self._unknown: int | None = None
        self._backend(special_tokens)

    def encode(self, texts: Sequence[str], special_tokens: SpecialTokens | None = None) -> np.ndarray:
        """Ids of some captions, all or none.

        Args:
            texts: Captions.
            special_tokens: Another mode than the tokenizer's own.

        Returns:
            (n, context_length) int64; longer captions are cut and keep their end token, shorter ones are padded.

        Raises:
            DataError: If a caption has no ids, see `rows`; its position is named.
        """
        return self.encode_masked(texts, special_tokens)[0]

    def encode_masked(
        self, texts: Sequence[object], special_tokens: SpecialTokens | None = None
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
        found = np.empty((len(texts), self.spec.context_length), dtype=np.int64)
        counts = np.zeros(len(texts), dtype=np.int64)
        for position, row in enumerate(self.masked_rows(texts, special_tokens)):
            if isinstance(row, DataError):
                raise DataError(f"text {position}: {row.what}", fix=row.fix)
            found[position], counts[position] = row
        return found, counts

    def rows(
        self, texts: Sequence[object], special_tokens: SpecialTokens | None = None
    ) -> list[np.ndarray | DataError]:
        """Ids of some captions, each by itself: what is wrong with one changes nothing for the others.

        Args:
            texts: Captions.
            special_tokens: Another mode than the tokenizer's own.

        Returns:
            Per caption its ids (context_length,) int64, or the error: it is no text, is longer than `MAX_CHARACTERS`, is
            made of names of special tokens, or has an id that the model has no embedding for.
        """
        found = self.masked_rows(texts, special_tokens)
        return [row if isinstance(row, DataError) else row[0] for row in found]

    def masked_rows(
        self, texts: Sequence[object], special_tokens: SpecialTokens | None = None
    ) -> list[tuple[np.ndarray, int] | DataError]:
        """The same with the number of tokens that the tokenizer's attention mask counts.

        Args:
            texts: Captions.
            special_tokens: Another mode than the tokenizer's own.

        Returns:
            Per caption its ids (context_length,) int64 and their number without padding, or the error; see `rows`.
        """
        mode = special_tokens or self.special_tokens
        check_choice(mode, SpecialTokens, "special_tokens")
        backend = self._backend(mode)
        problems = [problem_of(text) for text in texts]
        good = [str(text) for text, problem in zip(texts, problems, strict=True) if not problem]
        cleaned = [_open_clip_cleaned(text) for text in good] if self.spec.cleaning == "open-clip" else good
        found = (self._row(backend, mode, *pair) for pair in zip(cleaned, _encodings(backend, cleaned), strict=True))
        return [DataError(f"it {problem}") if problem else next(found) for problem in problems]

    def _row(
        self, backend: Backend, mode: SpecialTokens, text: str, encoding: Any
    ) -> tuple[np.ndarray, int] | DataError:
        if isinstance(encoding, DataError):
            return encoding
        found = self._neutral(backend, encoding, text) if mode == "neutral" else encoding.ids
        if isinstance(found, DataError):
            return found
        spec = self.spec
        row = np.full(spec.context_length, spec.pad_id, dtype=np.int64)
        row[slice(len(found)) if spec.padding_side == "right" else slice(len(row) - len(found), None)] = found
        if without_embedding(row[None], spec)[0]:
            name = backend.id_to_token(int(row.max()))
            return DataError(
                f"it has the token {name!r}, id {row.max()}, and the model has embeddings of {spec.vocabulary} ids only",
                fix="leave the token out",
            )
        return row, len(found)

    def _backend(self, mode: SpecialTokens) -> Backend:
        with self._lock:
            if mode not in self._backends:
                self._backends[mode] = self._opened(mode)
            return self._backends[mode]

    def _opened(self, mode: SpecialTokens) -> Backend:
        from tokenizers import Tokenizer as Backend  # here, because who encodes images only needs none of it

        try:
            body = json.loads(self._content)
            ordinary = [one for one in body.get("added_tokens") or () if self._is_ordinary(one)]
            content = _as_ordinary(body, ordinary) if ordinary and mode == "neutral" else self._content.decode()
            backend = Backend.from_str(content)
            if mode == "neutral":
                self._unknown = _unknown_id(backend, body["model"])
                self._special = self._special_ids(backend)
        except Exception as error:  # the backend raises bare Exception for every malformed file
            raise IntegrityError(f"tokenizer.json cannot be read: {error}", fix="restore it") from error
        backend.encode_special_tokens = mode == "neutral"
        backend.enable_truncation(self.spec.context_length)
        backend.no_padding()
        return backend

    def _is_ordinary(self, token: Mapping[str, Any]) -> bool:
        """Whether a special token has a name that ordinary texts have, such as ``!`` for padding, and hides nothing."""
        name = token["content"]
        return token["special"] and token["id"] != self.spec.eos_id and (len(name) == 1 or name.isalpha())

    def _special_ids(self, backend: Backend) -> frozenset[int]:
        """Ids that a caption must not bring along itself; that of unknown letters comes from ordinary ones."""
        added = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
        return frozenset((added - {self._unknown}) | {self.spec.eos_id})

    def _neutral(self, backend: Backend, encoding: Any, text: str) -> list[int] | DataError:
        """Ids without special ones but those that frame every caption.

        The backend reads names of special tokens as letters, but a vocabulary may hold such a name as a word of its own, or
        normalising may make one: then it is broken up by a space.
        """
        for _ in range(_TRIES):
            found = self._brought(backend, encoding, text)
            if not found:
                ids: list[int] = encoding.ids
                return ids
            for start, end in reversed(found):  # from behind, so that the places before stay right
                whole = end - start > 1
                text = text[: start + 1] + " " + text[start + 1 :] if whole else text[:start] + " " + text[end:]
            encoding = backend.encode(text)
        return DataError("it is made of names of special tokens", fix="remove them, or ask for special_tokens='exact'")

    def _brought(self, backend: Backend, encoding: Any, text: str) -> list[tuple[int, int]]:
        """Where the text has special tokens that framing did not add, as characters from and to, in order.

        The end token may be the unknown one, too: letters that nobody knows are no end, and stay what they are.
        """
        parts = zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True)
        found = {(number, *offsets) for number, framing, offsets in parts if number in self._special and not framing}
        return sorted(
            (start, end)
            for number, start, end in found
            if number != self._unknown or _holds(backend, text[start:end], number)
        )


def _unknown_id(backend: Backend, model: Mapping[str, Any]) -> int | None:
    """Id of letters that the vocabulary does not know; None where there is none."""
    unknown = model.get("unk_token")  # but a Unigram model has its number
    return backend.token_to_id(unknown) if unknown else model.get("unk_id")


def _holds(backend: Backend, piece: str, number: int) -> bool:
    """Whether a piece of a text has a token's name in it, as it is written or as the tokenizer reads it."""
    name = backend.id_to_token(number) or ""
    return name in piece or (backend.normalizer is not None and name in backend.normalizer.normalize_str(piece))


def without_embedding(ids: np.ndarray, spec: TextSpec) -> np.ndarray:
    """Rows with an id that the table of embeddings has no row for: one of them fails a whole call of the engine, or worse.

    Args:
        ids: (n, L) int64 or int32.
        spec: Of the model.

    Returns:
        (n,) bool; negative ids count, and ids that are too large where the bundle says how large they may be.
    """
    beyond = ids >= spec.vocabulary if spec.vocabulary else np.zeros(ids.shape, dtype=bool)
    found: np.ndarray = np.any(beyond | (ids < 0), axis=1)
    return found


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


def _encodings(backend: Backend, texts: Sequence[str]) -> list[Any]:
    """What the backend makes of each text, or the error: it refuses all together where it refuses one."""
    try:
        return list(backend.encode_batch(texts))
    except Exception:  # it raises bare Exception
        return [_encoding(backend, text) for text in texts]


def _encoding(backend: Backend, text: str) -> Any:
    try:
        return backend.encode(text)
    except Exception as error:
        return DataError(f"it cannot be read by the model's tokenizer: {error}")


def _as_ordinary(body: dict[str, Any], tokens: Sequence[Mapping[str, Any]]) -> str:
    """The file with some special tokens as tokens like all others: the source model reads each of them so."""
    names = {token["content"] for token in tokens}
    body["added_tokens"] = [
        {**one, "special": one["special"] and one["content"] not in names} for one in body["added_tokens"]
    ]
    return json.dumps(body)


def _open_clip_cleaned(text: str) -> str:
    """Mends mojibake and character references, joins white space, and lower-cases as open_clip does.

    Lower-casing is Python's: a Greek sigma at the end of a word is another letter, which the `tokenizers` library, letter by
    letter, cannot know.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()

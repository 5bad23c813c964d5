"""A bundle in MLServer: the runtime's encoder behind the v2 protocol, with the names that the Triton repository has.

Each of the models `clip_image`, `clip_text`, `clip_image_encoder` and `clip_text_encoder` needs a `model-settings.json`
with `SafeModel` as its implementation and the bundle's folder as its URI; the models of a process share one encoder.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from mlserver import MLModel, ModelSettings
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError, MLServerError
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, Parameters, RequestInput

from uwm_deploy.errors import BusyError, ContractError, InputError
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.fork import after_fork
from uwm_deploy.runtime.tokenizer import without_embedding
from uwm_deploy.serve.guard import PUBLIC_KEY
from uwm_deploy.serve.names import (
    BUNDLE,
    BUNDLE_VERSION,
    DEVICE,
    EMBEDDING,
    ENCODERS,
    ENGINE,
    ENSEMBLES,
    PROVIDER,
    SPACE,
    VARIANT,
    WEIGHTS,
)

_UNAVAILABLE = 503


@lru_cache(maxsize=1)
def _encoder(path: str) -> SafeEncoder:
    """Opened with all checks; a bundle that is none, or not signed by the key of the environment, is not served."""
    return SafeEncoder.open(path, public_key=os.environ.get(PUBLIC_KEY))


after_fork(_encoder.cache_clear)


class SafeModel(MLModel):  # type: ignore[misc]  # the package is not typed for us
    """One tower of a bundle: the whole way from bytes, or the engine alone for prepared rows."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        names = {
            name: (tower, whole)
            for whole, part in ((True, ENSEMBLES), (False, ENCODERS))
            for tower, name in part.items()
        }
        if settings.name not in names:
            raise InputError(f"{settings.name} is no model of a bundle", fix=f"name it one of {', '.join(names)}")
        self._tower, self._whole = names[settings.name]

    async def load(self) -> bool:
        """Opens the bundle, or raises."""
        self._opened = await asyncio.to_thread(_encoder, self.settings.parameters.uri)
        engines = self._opened.manifest.engines
        self._engine = next(e for e in engines if e.variant == self._opened.variant and e.tower is self._tower)
        return True

    async def metadata(self) -> MetadataModelResponse:
        """MLServer's, and what is served."""
        found = await super().metadata()
        manifest, where = self._opened.manifest, self._opened.session(self._tower).where
        found.parameters = Parameters(
            **{
                BUNDLE: self._opened.digest,
                VARIANT: self._opened.variant,
                ENGINE: self._engine.digest,
                WEIGHTS: manifest.edit.edited_weights_digest,
                BUNDLE_VERSION: str(manifest.bundle_version),
                SPACE: self._opened.space,
                DEVICE: where.get("device", ""),
                PROVIDER: where.get("provider", ""),
            }
        )
        return found

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Embeds the rows of a request; rows of different requests share batches."""
        try:
            if self._whole:
                name, rows = EMBEDDING, await self._embedded(_bytes_of(payload.inputs[0]))
            else:
                engine = self._opened.session(self._tower)
                name, prepared = self._engine.outputs[0].name, NumpyCodec.decode_input(payload.inputs[0])
                self._check(prepared)
                try:
                    rows = await asyncio.to_thread(engine.run, prepared)
                except ContractError as error:  # rows of another type or size are the caller's own
                    raise InputError(error.what, fix=error.fix) from error
        except BusyError as error:
            raise MLServerError(str(error), _UNAVAILABLE) from error
        except InputError as error:
            raise InferenceError(str(error)) from error
        output = NumpyCodec.encode_output(name, np.asarray(rows))
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])

    def _check(self, prepared: np.ndarray) -> None:
        text = self._opened.manifest.model.text
        if self._tower is TowerName.TEXT and without_embedding(np.atleast_2d(prepared), text).any():
            raise InputError("there is an id without an embedding", fix="pass ids that the tokenizer gives")

    async def _embedded(self, raw: Sequence[bytes]) -> np.ndarray:
        if self._tower is TowerName.IMAGE:
            return await self._opened.aencode_image(raw, on_error="raise")
        try:
            texts = [one.decode() for one in raw]
        except UnicodeDecodeError as error:
            raise InputError(f"a text is not UTF-8 ({error.reason})") from error
        return await self._opened.aencode_text(texts, on_error="raise")


def _bytes_of(given: RequestInput) -> list[bytes]:
    """Rows of bytes: as they came, or out of base64 where the request says so, which JSON has to for images."""
    rows = np.array(given.data.root, dtype=object).reshape(-1)
    raw = [one if isinstance(one, bytes) else str(one).encode() for one in rows]
    if given.parameters is None or given.parameters.content_type != "base64":
        return raw
    try:
        return [base64.b64decode(one, validate=True) for one in raw]
    except binascii.Error as error:
        raise InputError(f"{given.name} is not base64: {error}") from error

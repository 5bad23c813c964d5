"""HTTP endpoint around a bundle, with a health check that runs the canaries and metrics for Prometheus.

    UWM_BUNDLE=dist/demo UWM_PUBLIC_KEY=key.pub uvicorn --factory fastapi_endpoint:create_app

`GET /health` answers 503 as soon as what runs no longer answers like the edited model, so that the orchestrator replaces the
process; `GET /metrics` is the text for Prometheus. One worker per process: the bundle is in memory once, and callers share
batches.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field

from uwm_deploy.errors import BusyError, DataError
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.service import Serving

MAX_IMAGE_BYTES = 20_000_000


class Texts(BaseModel):
    """Body of `/embed/text`."""

    texts: list[str] = Field(min_length=1, max_length=256)


async def broken(_: Request, error: Exception) -> JSONResponse:
    """An image or a text that cannot be embedded."""
    return JSONResponse({"detail": str(error)}, status_code=422)


async def busy(_: Request, error: Exception) -> JSONResponse:
    """The queue is full."""
    return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": "1"})


def create_app(bundle: str | Path = "", public_key: str | Path | None = None) -> FastAPI:
    """The application; without arguments they come from the environment.

    Args:
        bundle: Its folder.
        public_key: Whose signature it must have.
    """
    bundle = bundle or os.environ["UWM_BUNDLE"]
    public_key = public_key or os.environ.get("UWM_PUBLIC_KEY")
    min_version = int(os.environ.get("UWM_MIN_BUNDLE_VERSION", "0"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Refuses to start on a bundle that was changed, is unproven, or does not answer like the edited model.
        serving = Serving(queue_timeout_s=1.0)
        app.state.encoder = await asyncio.to_thread(
            SafeEncoder.open, bundle, public_key=public_key, min_bundle_version=min_version, serving=serving
        )
        yield
        await asyncio.to_thread(app.state.encoder.close)

    app = FastAPI(title="Embeddings", lifespan=lifespan, exception_handlers={DataError: broken, BusyError: busy})

    @app.post("/embed/image")
    async def embed_image(request: Request) -> dict[str, list[float]]:
        """The body is one encoded image."""
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_IMAGE_BYTES:
                raise HTTPException(413, f"more than {MAX_IMAGE_BYTES} bytes")
        rows = await app.state.encoder.aencode_image(bytes(data))
        return {"embedding": rows[0].tolist()}

    @app.post("/embed/text")
    async def embed_text(body: Texts) -> dict[str, list[list[float]]]:
        """Rows in the order of the texts."""
        rows = await app.state.encoder.aencode_text(body.texts, on_error="raise")
        return {"embeddings": rows.tolist()}

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether what runs still answers like the edited model."""
        found = await asyncio.to_thread(app.state.encoder.selftest)
        body = {"ok": found.ok, "ratios": dict(found.ratios), "limit": found.limit, "error": found.error}
        return JSONResponse(body, status_code=200 if found.ok else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        text = await asyncio.to_thread(app.state.encoder.metrics)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return app

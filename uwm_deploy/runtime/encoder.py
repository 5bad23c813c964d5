"""Encodes images and texts with a bundle; needs no torch, no transformers, no onnx."""

from __future__ import annotations

import logging
import os
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry

from uwm_deploy.bundle.head import PLACE, TEXTS, texts_from
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle, engine_path, open_bundle
from uwm_deploy.bundle.signature import PublicKey
from uwm_deploy.bundle.space import SpaceId, space_of
from uwm_deploy.bundle.tied import check_rows
from uwm_deploy.errors import InputError, UwmError
from uwm_deploy.records.graph import EngineArtifact
from uwm_deploy.records.head import SafetyHead
from uwm_deploy.records.model import Digest, ModelRef, TowerName
from uwm_deploy.runtime.choices import check_choice
from uwm_deploy.runtime.classifier import TEMPLATE, ZeroShotClassifier, prompts_of, weights_from
from uwm_deploy.runtime.cores import cores
from uwm_deploy.runtime.decoding import check_decoding
from uwm_deploy.runtime.drift import DriftState
from uwm_deploy.runtime.fork import Home, stays_here
from uwm_deploy.runtime.image import Decode, ImageLike
from uwm_deploy.runtime.logs import event
from uwm_deploy.runtime.monitor import Monitor
from uwm_deploy.runtime.parts import InParts
from uwm_deploy.runtime.preprocessing import Preprocessing
from uwm_deploy.runtime.results import Embeddings, Kind, joined, raise_first
from uwm_deploy.runtime.risk import SafetyPolicy, risks_beside, run_with_risk
from uwm_deploy.runtime.selftest import SelfTest
from uwm_deploy.runtime.service import Answer, Serving, TowerService
from uwm_deploy.runtime.session import Contents, Device, Session, open_engine, optimisation_of, provider_of
from uwm_deploy.runtime.tokenizer import SpecialTokens
from uwm_deploy.runtime.variants import Candidate, VariantChoice, candidates, take
from uwm_deploy.runtime.weight_cache import WeightCache
from uwm_deploy.safeground.canaries import CANARIES

OnError = Literal["keep", "raise"]
"""A broken item among several: its row says so (`Embeddings.errors`), or the call fails and names it."""


class SafeEncoder:
    """The two towers of a proven bundle; use `SafeEncoder.open`. Any thread and any event loop may call it.

    Attributes:
        manifest: The bundle's manifest.
        variant: The variant that runs.
        selection: Why it was chosen, and why each other one was not.
        serving: Limits that it keeps.
    """

    def __init__(
        self,
        bundle: Bundle,
        selection: VariantChoice,
        sessions: Mapping[TowerName, Session],
        serving: Serving,
        decode: Decode = "full",
    ) -> None:
        self.manifest, self.selection, self.serving = bundle.manifest, selection, serving
        self.variant, self._home = selection.taken.variant, Home()
        self._bundle, self._head, self._digest = bundle, bundle.manifest.head, bundle.digest
        self._preprocessing = _preprocessing_of(bundle, self.variant, decode)
        self._identity = _identity_of(self, sessions[TowerName.IMAGE].where)
        self._monitor = Monitor(bundle, self._identity)
        self._pool = ThreadPoolExecutor(serving.workers or cores(), thread_name_prefix="uwm-prepare")
        self._services = {tower: _service_of(self, tower, session) for tower, session in sessions.items()}
        # For who forgets to close; it must not hold the encoder itself.
        self._abandoned = weakref.finalize(self, _abandon, self._home, self._pool, list(self._services.values()))
        self._monitor.begin(self._services)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        variant: str | None = None,
        device: Device = "auto",
        allow_unsafe: bool = False,
        serving: Serving | None = None,
        public_key: PublicKey | None = None,
        min_bundle_version: int = 0,
        decode: Decode = "full",
        to_measure: bool = False,
    ) -> SafeEncoder:
        """Opens a bundle after checking every digest, and picks the best proven variant for this machine.

        Before it returns, the canaries of the bundle have shown that what runs is the edited model.

        Args:
            path: Bundle folder.
            variant: A certain variant instead.
            device: Where it must run: "cuda" is an error where there is no GPU, never the CPU instead.
            allow_unsafe: Serve a bundle or a variant without proof. It warns, each time.
            serving: Limits and sizes.
            public_key: Whose signature the bundle must have: PEM, or a file with it.
            min_bundle_version: Refuse an older bundle.
            decode: "scaled" decodes large JPEGs at a reduced size, which is faster, where the bundle proves that decisions
                stay what they are (docs/reference/runtime.md).
            to_measure: See `open_bundle`; never to serve.

        Raises:
            EvidenceError: If scaled decoding is asked for and not proven.
            IntegrityError: If the bundle was changed, is not signed by that key, is too old, has no passing verdict, the
                variant is unproven, or what runs does not answer like the edited model.
            PrerequisiteError: If no proven variant runs here.
            InputError: If an argument is no choice.
        """
        started, limits = time.monotonic(), serving or Serving()
        trust: dict[str, Any] = {"public_key": public_key, "min_bundle_version": min_bundle_version}
        bundle = open_bundle(path, allow_failed=allow_unsafe, to_measure=to_measure, **trust)
        check_decoding(bundle.manifest.verdict, decode, bundle.path.name, allow_unsafe=allow_unsafe)
        found = candidates(bundle, variant=variant, device=device, allow_unsafe=allow_unsafe)
        asked = variant is not None or device != "auto"
        selection, sessions = take(found, lambda candidate: _sessions(bundle, candidate, limits), asked=asked)
        chosen = selection.taken.variant
        if chosen not in bundle.may_run:
            warnings.warn(f"UNSAFE OVERRIDE: serving {chosen} of {bundle.path.name} without proof", stacklevel=2)
        encoder = cls(bundle, selection, sessions, limits, decode)
        try:
            rows = limits.selftest_rows or (
                4 if selection.taken.note else 0
            )  # a must where the evidence is from elsewhere
            encoder._monitor.check_at_load(rows, encoder._preprocessing, allow_unsafe=allow_unsafe)
        except UwmError:
            encoder.close()
            raise
        event(logging.INFO, "opened", seconds=_since(started), why=str(selection), **encoder._identity)
        return encoder

    @property
    def why(self) -> str:
        """Why this variant runs, and why each other one does not."""
        return str(self.selection)

    @property
    def digest(self) -> Digest:
        """Digest of the manifest, which names the bundle: everything else follows from it."""
        return self._digest

    @property
    def space(self) -> SpaceId:
        """Id of the space of its embeddings; those of another space mean nothing beside them (docs/how-to/embedding.md)."""
        return space_of(self.manifest, self.variant)

    def encode_image(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        dtype: Kind = "float32",
        on_error: OnError = "keep",
        risk: bool = False,
    ) -> Embeddings:
        """Embeds images.

        Args:
            images: One or several paths, encoded bytes, Pillow images or (H, W, 3) / (H, W) uint8 arrays; any iterable,
                which is read no faster than it is encoded; or an array (n, H, W, 3).
            dtype: Of the result.
            on_error: What becomes of the call when one of several images is broken.
            risk: Give what the safety head says of each image, too, as `risk` of the result (docs/how-to/safety-head.md).

        Returns:
            (n, d) in the asked dtype, rows of length 1; the row of a broken image is NaN and stands in `errors`.

        Raises:
            DataError: If an image is broken and it is the only one, or `on_error` is "raise"; its position is named.
            BusyError: If there was no place in the queue for too long.
            InputError: If risks are asked for and the bundle has no safety head, or an argument is no choice.
        """
        _check_head(self._head, risk)
        single = _is_image(images)
        items: Iterable[ImageLike] = [images] if single else images  # type: ignore[list-item,assignment]
        answers = self._services[TowerName.IMAGE].encode(items, self._preprocessing.pixels)
        return _result(self, answers, "image", dtype, "raise" if single else on_error, risk=risk)

    async def aencode_image(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        dtype: Kind = "float32",
        on_error: OnError = "keep",
        risk: bool = False,
    ) -> Embeddings:
        """The same from an event loop, which stays free; images of all callers share batches.

        Args:
            images: See `encode_image`; arrays are (H, W, 3), (H, W) or (n, H, W, 3) uint8.
            dtype: See `encode_image`.
            on_error: See `encode_image`.
            risk: See `encode_image`.

        Returns:
            (n, d) in the asked dtype, rows of length 1; see `encode_image`.
        """
        _check_head(self._head, risk)
        single = _is_image(images)
        items: Iterable[ImageLike] = [images] if single else images  # type: ignore[list-item,assignment]
        answers = await self._services[TowerName.IMAGE].aencode(items, self._preprocessing.pixels)
        return _result(self, answers, "image", dtype, "raise" if single else on_error, risk=risk)

    def encode_text(
        self,
        texts: str | Iterable[str],
        *,
        dtype: Kind = "float32",
        on_error: OnError = "keep",
        special_tokens: SpecialTokens = "neutral",
    ) -> Embeddings:
        """Embeds texts.

        Args:
            texts: One or several.
            dtype: Of the result.
            on_error: What becomes of the call when one of several texts cannot be encoded.
            special_tokens: The name of a special token inside a text is ordinary letters; "exact" cuts the text there, as
                the source model does, and with it whatever the safety edit should have seen.

        Returns:
            (n, d) in the asked dtype, rows of length 1; the row of a text that cannot be encoded is NaN.

        Raises:
            DataError: See `encode_image`.
            BusyError: See `encode_image`.
            InputError: If an argument is no choice.
        """
        single = isinstance(texts, str)
        items = [texts] if isinstance(texts, str) else texts
        answers = self._services[TowerName.TEXT].encode(items, self._preprocessing.ids(special_tokens))
        return _result(self, answers, "text", dtype, "raise" if single else on_error)

    async def aencode_text(
        self,
        texts: str | Iterable[str],
        *,
        dtype: Kind = "float32",
        on_error: OnError = "keep",
        special_tokens: SpecialTokens = "neutral",
    ) -> Embeddings:
        """The same from an event loop, which stays free; texts of all callers share batches.

        Returns:
            (n, d) in the asked dtype, rows of length 1; see `encode_text`.
        """
        single = isinstance(texts, str)
        items = [texts] if isinstance(texts, str) else texts
        answers = await self._services[TowerName.TEXT].aencode(items, self._preprocessing.ids(special_tokens))
        return _result(self, answers, "text", dtype, "raise" if single else on_error)

    def safety_policy(
        self, *, texts: Sequence[str] | None = None, thresholds: Mapping[str, float] | None = None
    ) -> SafetyPolicy:
        """What turns risks into what may be used: allow, flag, redirect to the nearest safe text, block.

        Args:
            texts: Safe texts to redirect to, instead of the bundle's.
            thresholds: Risk level from which on each action is taken, instead of the bundle's; no evidence is about them.

        Raises:
            InputError: If the bundle has no safety head, or texts or thresholds cannot be used.
        """
        _check_head(self._head, True)
        assert self._head is not None
        if texts is None:
            texts = texts_from(self._bundle.read(f"{PLACE}/{TEXTS}"))
        return SafetyPolicy(self._head, texts, partial(self.encode_text, on_error="raise"), thresholds)

    @staticmethod
    def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Cosines of two sets of embeddings.

        Args:
            left: (n, d), any floating dtype, rows of length 1.
            right: (m, d), any floating dtype, rows of length 1.

        Returns:
            (n, m) float32; NaN where an item has no embedding.
        """
        product: np.ndarray = np.asarray(left, dtype=np.float32) @ np.asarray(right, dtype=np.float32).T
        return product

    def zero_shot(self, labels: Sequence[str], template: str | Sequence[str] = TEMPLATE) -> ZeroShotClassifier:
        """A classifier for some classes.

        Args:
            labels: Names of the classes.
            template: Sentence with {} for the label; of several the embeddings are averaged.

        Raises:
            InputError: If a label is there twice or a template has no place for it.
        """
        templates = [template] if isinstance(template, str) else list(template)
        prompts = self.encode_text(prompts_of(labels, templates))
        return ZeroShotClassifier(self, labels, weights_from(prompts, len(labels)))

    def selftest(self, rows: int = CANARIES) -> SelfTest:
        """Runs the canaries through the served path; for liveness probes.

        Args:
            rows: Canaries per edited tower, at most those that there are.
        """
        return self._monitor.selftest(rows)

    def metrics(self) -> str:
        """All metrics in the text format of Prometheus (content type ``text/plain; version=0.0.4``)."""
        return self._monitor.metrics.text()

    @property
    def registry(self) -> CollectorRegistry:
        """The same metrics as a registry of `prometheus_client`, which is this encoder's own.

        ``prometheus_client.REGISTRY.register(encoder.registry)`` puts them beside the host's until they are unregistered.
        """
        return self._monitor.metrics.registry

    def drift(self) -> dict[str, DriftState]:
        """Per tower, how the embeddings of late compare with those of the evaluation set; empty without evidence."""
        return self._monitor.drift()

    def session(self, tower: TowerName) -> Session:
        """The session of one tower, for inputs that are preprocessed already."""
        return self._services[tower].session

    def close(self) -> None:
        """Answers what was let in, then releases threads and sessions; again, or in a forked process, it does nothing."""
        if self._home.elsewhere or self._abandoned.detach() is None:
            return
        for service in self._services.values():
            service.refuse()
        self._pool.shutdown()
        for service in self._services.values():
            service.close()
        event(logging.INFO, "closed", bundle=self.manifest.name)

    __reduce__ = stays_here

    def __enter__(self) -> SafeEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _check_head(head: SafetyHead | None, risk: bool) -> None:
    if risk and head is None:
        raise InputError(
            "the bundle has no safety head, so risks are not known",
            fix="build with --safety-head, or leave risk out",
        )


def _result(
    encoder: SafeEncoder, answers: Sequence[Answer], what: str, dtype: Kind, on_error: OnError, *, risk: bool = False
) -> Embeddings:
    check_choice(on_error, OnError, "on_error")
    width = encoder.manifest.model.embed_dim
    found = joined([row if isinstance(row, Exception) else row[:width] for row in answers], width, dtype)
    if risk and encoder._head is not None:
        found.risk = risks_beside(encoder._head, answers, width)
        for decision, number in Counter(found.risk.decisions).items():
            encoder._monitor.metrics.risk_decisions.labels(decision=decision.value).inc(number)
    if on_error == "raise":
        raise_first(found, what)
    return found


def _service_of(encoder: SafeEncoder, tower: TowerName, session: Session) -> TowerService:
    return TowerService(
        tower,
        session,
        encoder._pool,
        together=1 if tower is TowerName.IMAGE else session.max_batch,
        serving=encoder.serving,
        watch=encoder._monitor.watches[tower],
        **_with_head(encoder.manifest.model, encoder._head, tower, session),
    )


def _preprocessing_of(bundle: Bundle, variant: str, decode: Decode) -> Preprocessing:
    """Preprocessing in the form that the variant's image graph takes."""
    crops = bundle.engines(variant)[TowerName.IMAGE].inputs[0].normalisation is not None
    return Preprocessing(bundle.manifest.model, bundle.read(BundleLayout.TOKENIZER), crops=crops, decode=decode)


def _identity_of(encoder: SafeEncoder, where: Mapping[str, str]) -> dict[str, str]:
    """What says of a log line and of metrics which bundle and variant they are about, and where it runs."""
    taken = encoder.selection.taken
    return {
        "bundle": encoder.manifest.name,
        "manifest": encoder.digest,
        "edited_weights": encoder.manifest.edit.edited_weights_digest,
        "variant": taken.variant,
        "space": encoder.space,
        "device": where.get("device", taken.device),
        "provider": where.get("provider", ""),
    }


def _with_head(model: ModelRef, head: SafetyHead | None, tower: TowerName, session: Session) -> dict[str, Any]:
    """What the service of the image tower is given beyond its session, where the bundle has a safety head."""
    if tower is not TowerName.IMAGE or head is None:
        return {}
    return {"run": partial(run_with_risk, session), "width": model.embed_dim}


def _is_image(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image))


def _sessions(bundle: Bundle, candidate: Candidate, serving: Serving) -> dict[TowerName, Session]:
    """Both sessions, or none: what was opened is closed when the other cannot be."""
    threads = serving.session_threads(cores())
    opened: dict[TowerName, Session] = {}
    try:
        for tower, engine in bundle.engines(candidate.variant).items():
            check_rows(bundle.manifest.model, engine)
            read = partial(_contents, bundle, engine)
            if serving.weights == "shared" and candidate.device == "cpu" and optimisation_of(engine) == "done":
                opened[tower] = WeightCache().open(engine, read, threads=threads)
            else:
                device: Device = candidate.device if provider_of(engine) == "any" else "auto"
                opened[tower] = open_engine(engine, *read(), device=device, threads=threads, calls=serving.calls)
            if isinstance(session := opened[tower], InParts):
                session.vocabulary = bundle.manifest.model.text.vocabulary
    except BaseException:
        for session in opened.values():
            session.close()
        raise
    return opened


def _contents(bundle: Bundle, engine: EngineArtifact) -> Contents:
    return bundle.read(engine_path(engine)), bundle.external_data(engine)


def _abandon(home: Home, pool: ThreadPoolExecutor, services: Sequence[TowerService]) -> None:
    if home.elsewhere:
        return
    pool.shutdown(wait=False)
    for service in services:
        service.abandon()

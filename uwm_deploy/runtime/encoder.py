"""Encodes images and texts with a bundle; needs no torch, no transformers, no onnx."""

from __future__ import annotations

import logging
import os
import threading
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

from uwm_deploy.bundle.head import PLACE, TEXTS, texts_from
from uwm_deploy.bundle.open import Bundle, engine_path, open_bundle
from uwm_deploy.bundle.signature import PublicKey
from uwm_deploy.bundle.space import SpaceId, space_of
from uwm_deploy.errors import DataError, InputError, IntegrityError, UwmError
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.runtime.cores import cores
from uwm_deploy.runtime.drift import DriftMonitor, DriftState
from uwm_deploy.runtime.image import ImageLike, image_from, pixels_from_image
from uwm_deploy.runtime.logs import event
from uwm_deploy.runtime.metrics import Metrics
from uwm_deploy.runtime.results import Embeddings, Kind, joined
from uwm_deploy.runtime.risk import SafetyPolicy, risks_from, run_with_risk
from uwm_deploy.runtime.selection import Candidate, Selection, candidates, take
from uwm_deploy.runtime.selftest import SelfTest, canaries_of, reference_mean
from uwm_deploy.runtime.service import Answer, Prepare, Serving, TowerService
from uwm_deploy.runtime.session import Device, Session, open_engine, provider_of
from uwm_deploy.runtime.tokenizer import SpecialTokens, Tokenizer, problem_of
from uwm_deploy.runtime.watch import FAMILIES, TowerWatch, tested
from uwm_deploy.runtime.zero_shot import TEMPLATE, ZeroShot, prompts_of, weights_from
from uwm_deploy.safeground.canaries import CANARIES, RATIO_LIMIT, Canaries

OnError = Literal["keep", "raise"]
"""A broken item among several: its row says so (`Embeddings.errors`), or the call fails and names it."""

SELFTEST_SECONDS = 60.0
"""A self-test that takes longer has failed: whoever asks wants to know whether requests are answered."""


class SafeEncoder:
    """The two towers of a proven bundle; use `SafeEncoder.open`. Any thread and any event loop may call it.

    Attributes:
        manifest: The bundle's manifest.
        variant: The variant that runs.
        selection: Why it was chosen, and why each other one was not.
        serving: Limits that it keeps.
    """

    def __init__(
        self, bundle: Bundle, selection: Selection, sessions: Mapping[TowerName, Session], serving: Serving
    ) -> None:
        self.manifest, self.selection, self.serving = bundle.manifest, selection, serving
        self.variant = selection.taken.variant
        self._bundle, self._metrics = bundle, Metrics(FAMILIES)
        self._tokenizer_json = bundle.read("tokenizer.json")
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()
        self._means: dict[TowerName, np.ndarray | None] = {}
        self._canaries, self._head = canaries_of(bundle), bundle.manifest.head
        self._pool = ThreadPoolExecutor(serving.workers or cores(), thread_name_prefix="uwm-prepare")
        self._watches = {
            tower: TowerWatch(tower, self._metrics, DriftMonitor(self.manifest.model.embed_dim)) for tower in sessions
        }
        self._services = {
            tower: TowerService(
                tower,
                session,
                self._pool,
                together=1 if tower is TowerName.IMAGE else session.max_batch,
                serving=serving,
                watch=self._watches[tower],
                **self._with_head(tower, session),
            )
            for tower, session in sessions.items()
        }
        # For who forgets to close; it must not hold the encoder itself.
        self._abandoned = weakref.finalize(self, _abandon, self._pool, list(self._services.values()))
        self._metrics.set("uwm_info", 1, **self._identity())

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

        Raises:
            IntegrityError: If the bundle was changed, is not signed by that key, is too old, has no passing verdict, the
                variant is unproven, or what runs does not answer like the edited model.
            PrerequisiteError: If no proven variant runs here.
        """
        started, limits = time.monotonic(), serving or Serving()
        bundle = open_bundle(
            path, allow_failed=allow_unsafe, public_key=public_key, min_bundle_version=min_bundle_version
        )
        found = candidates(bundle, variant=variant, device=device, allow_unsafe=allow_unsafe)

        def attempt(candidate: Candidate) -> dict[TowerName, Session]:
            return _sessions(bundle, candidate, limits)

        selection, sessions = take(found, attempt, asked=variant is not None or device != "auto")
        chosen = selection.taken.variant
        if chosen not in bundle.manifest.verdict.proven:
            warnings.warn(f"UNSAFE OVERRIDE: serving {chosen} of {bundle.path.name} without proof", stacklevel=2)
        encoder = cls(bundle, selection, sessions, limits)
        encoder._test_at_load(allow_unsafe)
        seconds = round(time.monotonic() - started, 3)
        event(logging.INFO, "opened", seconds=seconds, why=str(selection), **encoder._identity())
        return encoder

    @property
    def why(self) -> str:
        """Why this variant runs, and why each other one does not."""
        return str(self.selection)

    @property
    def digest(self) -> Digest:
        """Digest of the manifest, which names the bundle: everything else follows from it."""
        return digest_of_bytes(json_from_record(self.manifest).encode())

    @property
    def space(self) -> SpaceId:
        """Id of the space of its embeddings; those of another space mean nothing beside them (docs/embedding.md)."""
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
            risk: Give what the bundle's safety head says of each image, too, as `risk` of the result (docs/safety-head.md).

        Returns:
            (n, d) of length 1; the row of a broken image is NaN and stands in `errors`.

        Raises:
            DataError: If an image is broken and it is the only one, or `on_error` is "raise"; its position is named.
            BusyError: If there was no place in the queue for too long.
            InputError: If risks are asked for and the bundle has no safety head.
        """
        self._check_head(risk)
        single = _is_image(images)
        items: Iterable[ImageLike] = [images] if single else images  # type: ignore[list-item,assignment]
        answers = self._services[TowerName.IMAGE].encode(items, self._pixels)
        return self._result(answers, "image", dtype, "raise" if single else on_error, risk=risk)

    async def aencode_image(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        dtype: Kind = "float32",
        on_error: OnError = "keep",
        risk: bool = False,
    ) -> Embeddings:
        """The same from an event loop, which stays free; images of all callers share batches."""
        self._check_head(risk)
        single = _is_image(images)
        items: Iterable[ImageLike] = [images] if single else images  # type: ignore[list-item,assignment]
        answers = await self._services[TowerName.IMAGE].aencode(items, self._pixels)
        return self._result(answers, "image", dtype, "raise" if single else on_error, risk=risk)

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
            (n, d) of length 1.

        Raises:
            DataError: See `encode_image`.
            BusyError: See `encode_image`.
        """
        single = isinstance(texts, str)
        items = [texts] if isinstance(texts, str) else texts
        answers = self._services[TowerName.TEXT].encode(items, self._ids(special_tokens))
        return self._result(answers, "text", dtype, "raise" if single else on_error)

    async def aencode_text(
        self,
        texts: str | Iterable[str],
        *,
        dtype: Kind = "float32",
        on_error: OnError = "keep",
        special_tokens: SpecialTokens = "neutral",
    ) -> Embeddings:
        """The same from an event loop, which stays free; texts of all callers share batches."""
        single = isinstance(texts, str)
        items = [texts] if isinstance(texts, str) else texts
        answers = await self._services[TowerName.TEXT].aencode(items, self._ids(special_tokens))
        return self._result(answers, "text", dtype, "raise" if single else on_error)

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
        self._check_head(True)
        assert self._head is not None
        if texts is None:
            texts = texts_from(self._bundle.read(f"{PLACE}/{TEXTS}"))
        return SafetyPolicy(self._head, texts, partial(self.encode_text, on_error="raise"), thresholds)

    @staticmethod
    def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Cosines (n, m) of two sets of embeddings, float32; NaN where an item has none."""
        product: np.ndarray = np.asarray(left, dtype=np.float32) @ np.asarray(right, dtype=np.float32).T
        return product

    def zero_shot(self, labels: Sequence[str], template: str | Sequence[str] = TEMPLATE) -> ZeroShot:
        """A classifier for some classes.

        Args:
            labels: Names of the classes.
            template: Sentence with {} for the label; of several the embeddings are averaged.

        Raises:
            InputError: If a label is there twice or a template has no place for it.
        """
        templates = [template] if isinstance(template, str) else list(template)
        prompts = self.encode_text(prompts_of(labels, templates))
        return ZeroShot(self, labels, weights_from(prompts, len(labels)))

    def selftest(self, rows: int = CANARIES) -> SelfTest:
        """Runs the canaries through the served path; for liveness probes.

        Args:
            rows: Canaries per edited tower, at most those that there are.
        """
        started, ratios, error = time.monotonic(), {}, ""
        try:
            for tower, canaries in self._canaries.items():
                some = Canaries(canaries.inputs[:rows], canaries.original[:rows], canaries.edited[:rows])
                ratios[tower.value] = some.worst(self._services[tower].run_rows(some.inputs, SELFTEST_SECONDS))
        except Exception as failure:  # whatever it is, the answer to the probe is no
            error = str(failure) or type(failure).__name__
        if not self._canaries:
            error = "the bundle has no canaries"
        result = SelfTest(ratios, RATIO_LIMIT, error, time.monotonic() - started)
        tested(self._metrics, result)
        return result

    def metrics(self) -> str:
        """All metrics in the text format of Prometheus (content type ``text/plain; version=0.0.4``)."""
        for service in self._services.values():
            service.told()
        self.drift()
        return self._metrics.text()

    def drift(self) -> dict[str, DriftState]:
        """Per tower, how the embeddings of late compare with those of the evaluation set; empty without evidence."""
        found = {}
        for tower, watch in self._watches.items():
            mean = self._mean(tower)
            if mean is not None:
                found[tower.value] = watch.drift.state(mean)
                watch.drifted(found[tower.value])
        return found

    def session(self, tower: TowerName) -> Session:
        """The session of one tower, for inputs that are preprocessed already."""
        return self._services[tower].session

    def close(self) -> None:
        """Answers what was let in, then releases threads and sessions; later calls raise, a second close does nothing."""
        if self._abandoned.detach() is None:
            return
        for service in self._services.values():
            service.refuse()
        self._pool.shutdown()
        for service in self._services.values():
            service.close()
        event(logging.INFO, "closed", bundle=self.manifest.name)

    def __enter__(self) -> SafeEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _test_at_load(self, allow_unsafe: bool) -> None:
        """The canaries; not to be left out where the evidence is from another kind of device."""
        rows = self.serving.selftest_rows or (4 if self.selection.taken.note else 0)
        if not rows:
            return
        result = self.selftest(rows)
        if not result.ok and not allow_unsafe:
            self.close()
            told = result.error or ", ".join(f"{tower} {ratio:.3g}" for tower, ratio in result.ratios.items())
            raise IntegrityError(
                f"variant {self.variant} does not answer like the edited model (canaries: {told}; limit {RATIO_LIMIT})",
                fix="build the bundle again; do not serve it",
            )

    def _identity(self) -> dict[str, str]:
        taken = self.selection.taken
        where = self._services[TowerName.IMAGE].session.where
        return {
            "bundle": self.manifest.name,
            "manifest": self.digest,
            "edited_weights": self.manifest.edit.edited_weights_digest,
            "variant": taken.variant,
            "space": self.space,
            "device": where.get("device", taken.device),
            "provider": where.get("provider", ""),
        }

    def _mean(self, tower: TowerName) -> np.ndarray | None:
        """Of the evidence; read when first asked for, since it can be large."""
        with self._lock:
            if tower not in self._means:
                try:
                    self._means[tower] = reference_mean(self._bundle, tower)
                except UwmError as error:  # changed on disk since it was checked: no reason to stop counting
                    event(logging.ERROR, "no-reference", tower=tower.value, error=str(error))
                    self._means[tower] = None
            return self._means[tower]

    def _pixels(self, images: Sequence[ImageLike]) -> list[Answer]:
        return [_pixels_or_error(self, image) for image in images]

    def _ids(self, special_tokens: SpecialTokens) -> Prepare:
        def prepare(texts: Sequence[object]) -> list[Answer]:
            problems = [problem_of(text) for text in texts]
            good = [text for text, problem in zip(texts, problems, strict=True) if not problem]
            rows = iter(self._opened_tokenizer().encode(good, special_tokens) if good else ())  # type: ignore[arg-type]
            return [DataError(f"it {problem}") if problem else next(rows) for problem in problems]

        return prepare

    def _opened_tokenizer(self) -> Tokenizer:
        """Read when first needed: a large vocabulary takes longer to open than a small model."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = Tokenizer(self._tokenizer_json, self.manifest.model.text, "neutral")
            return self._tokenizer

    def _with_head(self, tower: TowerName, session: Session) -> dict[str, Any]:
        """What the service of the image tower is given beyond its session, where the bundle has a safety head."""
        if tower is not TowerName.IMAGE or self._head is None:
            return {}
        return {"run": partial(run_with_risk, session), "width": self.manifest.model.embed_dim}

    def _check_head(self, risk: bool) -> None:
        if risk and self._head is None:
            raise InputError(
                "the bundle has no safety head, so risks are not known",
                fix="build with --safety-head, or leave risk out",
            )

    def _result(
        self, answers: Sequence[Answer], what: str, dtype: Kind, on_error: OnError, *, risk: bool = False
    ) -> Embeddings:
        width = self.manifest.model.embed_dim
        found = joined([row if isinstance(row, Exception) else row[:width] for row in answers], width, dtype)
        if risk and self._head is not None:
            count = len(self._head.categories) + 1
            beside = joined([row if isinstance(row, Exception) else row[width:] for row in answers], count, "float32")
            rows = np.asarray(beside)
            found.risk = risks_from(self._head, rows[:, :-1], rows[:, -1])
            for decision, number in Counter(found.risk.decisions).items():
                self._metrics.add("uwm_risk_decisions_total", number, decision=decision.value)
        if on_error == "raise" and found.errors:
            first = found.errors[0]
            if not isinstance(first.error, UwmError):
                raise first.error
            raise type(first.error)(f"{what} {first.position}: {first.error.what}", fix=first.error.fix)
        return found


def _pixels_or_error(encoder: SafeEncoder, image: ImageLike) -> Answer:
    try:
        return pixels_from_image(image_from(image), encoder.manifest.model.image)
    except UwmError as error:
        return error


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
            data, external = bundle.read(engine_path(engine)), bundle.external_data(engine)
            device: Device = candidate.device if provider_of(engine) == "any" else "auto"
            opened[tower] = open_engine(engine, data, external, device=device, threads=threads)
    except BaseException:
        for session in opened.values():
            session.close()
        raise
    return opened


def _abandon(pool: ThreadPoolExecutor, services: Sequence[TowerService]) -> None:
    pool.shutdown(wait=False)
    for service in services:
        service.abandon()

"""Encodes images and texts with a bundle; needs no torch, no transformers, no onnx."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from uwm_deploy.errors import DataError, InputError, IntegrityError, PrerequisiteError
from uwm_deploy.records import EngineArtifact, Manifest, Target, TowerName
from uwm_deploy.runtime.bundle import Bundle, engine_path, open_bundle
from uwm_deploy.runtime.image import ImageLike, image_from, pixels_from_image
from uwm_deploy.runtime.session import Device, Session, open_engine, reason_not_executable
from uwm_deploy.runtime.tokenizer import Tokenizer

_PREFERENCE = (Target.TENSORRT, Target.TENSORRT_RTX, Target.ONNXRUNTIME)


class SafeEncoder:
    """The two towers of a proven bundle; use `SafeEncoder.open`.

    Attributes:
        manifest: The bundle's manifest.
        variant: The variant that runs.
        why: Why it was chosen, and why others were not.
    """

    def __init__(
        self, manifest: Manifest, variant: str, why: str, sessions: Mapping[TowerName, Session], tokenizer: Tokenizer
    ) -> None:
        self.manifest, self.variant, self.why = manifest, variant, why
        self._sessions, self._tokenizer = dict(sessions), tokenizer

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        variant: str | None = None,
        device: Device = "auto",
        allow_unsafe: bool = False,
    ) -> SafeEncoder:
        """Opens a bundle after checking every digest, and picks the best proven variant for this machine.

        Args:
            path: Bundle folder.
            variant: A certain variant instead.
            device: Where ONNX Runtime must run.
            allow_unsafe: Serve a bundle or a variant without proof. It warns, each time.

        Raises:
            IntegrityError: If the bundle was changed, has no passing verdict, or the variant is unproven.
            PrerequisiteError: If no proven variant runs here.
        """
        bundle = open_bundle(path, allow_failed=allow_unsafe)
        verdict = bundle.manifest.verdict
        chosen, why = _choose(bundle, variant, allow_unsafe)
        if chosen not in verdict.proven:
            if not allow_unsafe:
                raise IntegrityError(
                    f"variant {chosen} is unproven: it was never executed and measured",
                    fix="run `uwm-deploy attest` on a machine that can execute it",
                )
            warnings.warn(f"UNSAFE OVERRIDE: serving {chosen} of {bundle.path.name} without proof", stacklevel=2)
        sessions = {tower: _session(bundle, engine, device) for tower, engine in bundle.engines(chosen).items()}
        tokenizer = Tokenizer(bundle.read("tokenizer.json"), bundle.manifest.model.text)
        return cls(bundle.manifest, chosen, why, sessions, tokenizer)

    def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
        """Embeds images.

        Args:
            images: One or several paths, encoded bytes, Pillow images or uint8 arrays.

        Returns:
            (n, d) float32 of length 1.

        Raises:
            DataError: If an image is broken; its position is named.
        """
        several: list[ImageLike] = list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
        size, session = self._sessions[TowerName.IMAGE].max_batch, self._sessions[TowerName.IMAGE]
        if not several:
            return self._nothing()
        parts = []
        for start in range(0, len(several), size):
            rows = [self._pixels(start + k, item) for k, item in enumerate(several[start : start + size])]
            parts.append(session.run(np.stack(rows)))
        return _normalised(np.concatenate(parts))

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Embeds texts into (n, d) float32 of length 1."""
        several = [texts] if isinstance(texts, str) else list(texts)
        if not several:
            return self._nothing()
        return _normalised(self._sessions[TowerName.TEXT].run(self._tokenizer.encode(several)))

    @staticmethod
    def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Cosines (n, m) of two sets of embeddings."""
        product: np.ndarray = left @ right.T
        return product

    def session(self, tower: TowerName) -> Session:
        """The session of one tower, for inputs that are preprocessed already."""
        return self._sessions[tower]

    def close(self) -> None:
        """Releases both sessions."""
        for session in self._sessions.values():
            session.close()

    def _nothing(self) -> np.ndarray:
        return np.empty((0, self.manifest.model.embed_dim), dtype=np.float32)

    def _pixels(self, position: int, image: ImageLike) -> np.ndarray:
        try:
            return pixels_from_image(image_from(image), self.manifest.model.image)
        except DataError as error:
            raise DataError(f"image {position}: {error.what}", fix=error.fix) from error


def _choose(bundle: Bundle, variant: str | None, allow_unsafe: bool) -> tuple[str, str]:
    """The variant asked for, or the first proven one that runs here."""
    if variant:
        bundle.engines(variant)
        return variant, f"{variant} was asked for"
    reasons = []
    for target in _PREFERENCE:
        for name, engine in sorted({e.variant: e for e in bundle.manifest.engines if e.target is target}.items()):
            if reason := reason_not_executable(engine):
                reasons.append(f"{name}: {reason}")
            elif name not in bundle.manifest.verdict.proven and not allow_unsafe:
                reasons.append(f"{name}: unproven")
            else:
                return name, "; ".join([f"{name} is proven and runs here" if not allow_unsafe else name, *reasons])
    raise PrerequisiteError(f"no proven variant runs here ({'; '.join(reasons)})", fix="see `uwm-deploy doctor`")


def _session(bundle: Bundle, engine: EngineArtifact, device: Device) -> Session:
    if engine.target is not Target.ONNXRUNTIME and device == "cpu":
        raise InputError(f"{engine.variant} cannot run on the CPU", fix="choose an onnxruntime variant")
    return open_engine(engine, bundle.read(engine_path(engine)), bundle.external_data(engine), device=device)


def _normalised(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a graph without normalisation is normalised here."""
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return result

"""What other tools' own checks say of the same artifacts: the checks that a deployment has without this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, CompareFunc
from polygraphy.comparator.data_loader import DataLoader
from polygraphy.logger import G_LOGGER

from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.image import pixels_from_crops
from uwm_deploy.studies.selftest.honest_builds import Build

OPTIMUM_TOLERANCE = 1e-3
"""Absolute difference up to which Optimum's export validation is content."""


class Peers:
    """The checks."""

    def __init__(self) -> None:
        self.names: Mapping[str, Callable[[Build], bool]] = {
            "onnx.checker": self._checker,
            "polygraphy run": self._polygraphy,
            "allclose 1e-3": self._allclose,
        }

    def caught(self, build: Build) -> dict[str, bool]:
        """Check to whether it says that something is wrong."""
        return {name: check(build) for name, check in self.names.items()}

    def _checker(self, build: Build) -> bool:
        """`onnx.checker` with shape inference, on every graph."""
        for path in {*build.exported.values(), *build.engines.values()}:
            try:
                onnx.checker.check_model(str(path), full_check=True)
            except Exception:  # it raises several kinds
                return True
        return False

    def _polygraphy(self, build: Build) -> bool:
        """Exported graph against engine, with Polygraphy's default inputs and tolerances."""
        before = G_LOGGER.module_severity
        G_LOGGER.module_severity = G_LOGGER.CRITICAL
        try:
            return not all(self._agree(build.exported[t], build.engines[t]) for t in TowerName)
        finally:
            G_LOGGER.module_severity = before

    @staticmethod
    def _agree(exported: Path, engine: Path) -> bool:
        runners = [
            OnnxrtRunner(SessionFromOnnx(str(path), providers=["cpu"]), name=name)
            for name, path in (("exported", exported), ("engine", engine))
        ]
        try:
            results = Comparator.run(runners, data_loader=DataLoader(iterations=1))
            return bool(Comparator.compare_accuracy(results, compare_func=CompareFunc.simple()))
        except Exception:  # a graph that does not run is caught
            return False

    def _allclose(self, build: Build) -> bool:
        """Exported graph against the model that was exported, on two rows of noise."""
        rng = np.random.default_rng(0)
        ref = build.edited.ref
        crops = rng.integers(0, 256, (2, ref.image.crop, ref.image.crop, 3)).astype(np.uint8)
        feeds = {
            TowerName.IMAGE: pixels_from_crops(crops, ref.image),
            TowerName.TEXT: rng.integers(0, ref.text.eos_id, (2, ref.text.context_length)),
        }
        for name, feed in feeds.items():
            with torch.inference_mode():
                wanted = build.edited.tower(name).embed(torch.from_numpy(feed))
                wanted = (wanted / wanted.norm(dim=1, keepdim=True)).numpy()
            try:
                session = ort.InferenceSession(str(build.exported[name]), providers=["CPUExecutionProvider"])
                given = session.get_inputs()[0]
                found = session.run(None, {given.name: crops if given.type == "tensor(uint8)" else feed})[0]
            except Exception:  # as above
                return True
            if found.shape != wanted.shape or not np.allclose(wanted, found, atol=OPTIMUM_TOLERANCE):
                return True
        return False

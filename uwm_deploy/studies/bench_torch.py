"""The model of a bundle in PyTorch float32, as one more contender of a benchmark. Without torch there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import Bundle
from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.recipes.recipe import Recipe, recipe_from_toml
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.recipes.shipped import checkpoint_folder
from uwm_deploy.records.graph import Precision
from uwm_deploy.records.model import ImageSpec, TowerName
from uwm_deploy.records.studies import BenchSubject
from uwm_deploy.runtime.image import pixels_from_crops
from uwm_deploy.studies.bench import Contender

if TYPE_CHECKING:
    from uwm_deploy.towers.protocol import LoadedModel, Tower

NAME = "torch"


class TorchSession:
    """One tower in eager mode, on the GPU where there is one; see `runtime.session.Session`."""

    where: Mapping[str, str]
    concurrency = 1

    def __init__(self, tower: Tower, image: ImageSpec) -> None:
        import torch

        self.max_batch, self._tower, self._image = 1 << 30, tower, image
        self._device = next(tower.graph_module().parameters()).device
        self.where = {
            "provider": "eager, float32",
            "device": self._device.type,
            "torch": str(torch.__version__),
            "threads": str(torch.get_num_threads()),
        }

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Embeds inputs; see `Session.run`.

        Args:
            batch: (n, ...), n >= 1: (n, 3, H, W) float32 pixels, (n, H, W, 3) uint8 crops, or (n, L) integer ids.

        Returns:
            (n, d) float32.
        """
        import torch

        if batch.dtype == np.uint8:  # what a graph that takes crops does is work of this one, too
            batch = pixels_from_crops(batch, self._image)
        with torch.inference_mode():
            found: np.ndarray = self._tower.embed(torch.from_numpy(batch).to(self._device)).float().cpu().numpy()
        return found

    def run_all(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Computes every output; see `Session.run_all`.

        Args:
            batch: (n, ...), n >= 1: (n, 3, H, W) float32 pixels, (n, H, W, 3) uint8 crops, or (n, L) integer ids.

        Returns:
            Outputs by name, (n, ...) float32; the embedding is the first.
        """
        return {"embeds": self.run(batch)}

    def close(self) -> None:
        """See `Session.close`."""


def torch_contender(bundle: Bundle, model: str | None, threads: int = 0) -> Contender:
    """The reference. An edit changes values and no shape, so the weights may be the edited or the original ones.

    Args:
        bundle: What is compared with it.
        model: Recipe, recipe file or checkpoint folder; None takes the bundle's own recipe, with weights of this machine.
        threads: Of PyTorch on the CPU, for the whole process; 0 leaves the number to it.

    Raises:
        PrerequisiteError: If torch is not installed.
        InputError: If the weights are not here, or are another model's.
    """
    if importlib.util.find_spec("torch") is None:
        raise PrerequisiteError("package torch is not installed", fix="pip install 'uwm-deploy[build]'")
    if threads:
        import torch

        torch.set_num_threads(threads)
    recipe = _recipe(bundle, model)
    manifest, digest = bundle.manifest, _loaded(recipe).ref.weights_digest
    if digest not in (manifest.model.weights_digest, manifest.edit.edited_weights_digest):
        raise InputError(
            "the weights are neither the edited nor the original ones of this bundle", fix="name its own model"
        )
    subject = BenchSubject(
        name=NAME, precision=Precision.FP32, state="reference", digests={t.value: digest for t in TowerName}
    )

    def opened(tower: TowerName) -> TorchSession:
        loaded = _loaded(recipe)  # anew, so that a cold start pays for it
        loaded.keep_only(tower)
        return TorchSession(loaded.tower(tower), loaded.ref.image)

    return Contender(subject, opened)


def _recipe(bundle: Bundle, model: str | None) -> Recipe:
    if model is None:
        return recipe_from_toml(bundle.read(BundleLayout.RECIPE).decode(), where=BundleLayout.RECIPE)
    return recipe_of(model)[0]


def _loaded(recipe: Recipe) -> LoadedModel:
    from uwm_deploy.towers.load import load_model

    source = recipe.model
    companion = source.companion
    return load_model(
        recipe,
        folder=checkpoint_folder(source.repo, source.revision, family=source.family, local_only=True),
        companion=checkpoint_folder(companion, source.companion_revision, local_only=True) if companion else None,
        device="auto",
    )

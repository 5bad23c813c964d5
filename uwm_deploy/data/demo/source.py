"""The drawn world as a source of quadruples."""

from __future__ import annotations

from uwm_deploy.data.demo import world
from uwm_deploy.data.sampling import sample_of
from uwm_deploy.data.source import Quadruple, ZeroShotSet, record_of
from uwm_deploy.data.zero_shot_suite import open_suite
from uwm_deploy.errors import DataError
from uwm_deploy.recipes.data_set import CalibrationSet
from uwm_deploy.records.files import digest_of_plain


class DemoSource:
    """Quadruples of one split of the drawn world; drawn when they are read."""

    has_images = True
    has_texts = True
    unused_names: tuple[str, ...] = ()

    def __init__(self, spec: CalibrationSet) -> None:
        if spec.split not in world.SIZES:
            raise DataError(
                f"data set {spec.name}: the demo has no split {spec.split!r}", fix=f"use one of {sorted(world.SIZES)}"
            )
        self.split = spec.split
        self.indices = sample_of(world.SIZES[self.split], spec, world.concept_of)
        self.ids = [f"{self.split}-{index:06d}" for index in self.indices]
        self.concepts = [world.concept_of(index) for index in self.indices]
        suite = open_suite(spec.zero_shot, demo_split=self.split, limit=spec.zero_shot_limit)
        self.zero_shot_names, self.zero_shot_missing = tuple(suite.sets), suite.missing
        self._zero_shot = suite.sets
        content = digest_of_plain({"world": world.WORLD_VERSION, "split": self.split})
        self.record = record_of(spec, self.ids, self.concepts, content)

    def __len__(self) -> int:
        """Number of quadruples."""
        return len(self.indices)

    def read(self, index: int) -> Quadruple:
        """Draws one quadruple."""
        item = world.quadruple(self.split, self.indices[index])
        return Quadruple(
            id=item.id,
            concept=item.concept,
            safe_image=item.safe_image,
            unsafe_image=item.unsafe_image,
            safe_text=item.safe_text,
            unsafe_text=item.unsafe_text,
        )

    def read_texts(self, index: int) -> tuple[str, str]:
        """Both captions of one quadruple."""
        item = self.read(index)
        assert item.safe_text is not None
        assert item.unsafe_text is not None
        return item.safe_text, item.unsafe_text

    def zero_shot(self, name: str) -> ZeroShotSet:
        """One of the zero-shot sets."""
        return self._zero_shot[name]

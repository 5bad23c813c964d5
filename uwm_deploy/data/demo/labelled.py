"""The drawn world's zero-shot sets."""

from __future__ import annotations

from dataclasses import dataclass

from uwm_deploy.data.demo import world
from uwm_deploy.data.source import LabelledImage, ZeroShotSet


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoZeroShot:
    """One zero-shot set of the drawn world."""

    name: str
    labels: tuple[str, ...]
    template: str
    first: int = 0

    def __len__(self) -> int:
        """Number of items."""
        return world.ZERO_SHOT_SIZE

    def read(self, index: int) -> LabelledImage:
        """One labelled image."""
        item = world.zero_shot_item(self.name, self.first + index)
        return LabelledImage(item.image, item.label)


def demo_zero_shot(name: str, split: str) -> ZeroShotSet:
    """A set of the drawn world; only the test split has the images that results are reported on."""
    first = 0 if split == "test" else world.ZERO_SHOT_SIZE
    labels, template = world.zero_shot_labels(name), world.zero_shot_template(name)
    return DemoZeroShot(name=name, labels=labels, template=template, first=first)

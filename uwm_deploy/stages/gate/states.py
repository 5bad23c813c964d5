"""What became of each variant: good, failed, inconclusive or unproven."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from uwm_deploy.records.graph import EXPORTED
from uwm_deploy.records.verdict import Check, Result
from uwm_deploy.stages.gate.structure import READ


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantStates:
    """The variants by what became of them.

    Attributes:
        good: Executed, and every check about them passes.
        inconclusive: Executed, and only a lack of items keeps them from being good.
        failed: Executed, and something else keeps them from it.
        unproven: Not executed.
    """

    good: tuple[str, ...]
    inconclusive: tuple[str, ...]
    failed: tuple[str, ...]
    unproven: tuple[str, ...]

    @property
    def faithful(self) -> tuple[str, ...]:
        """The good ones that can ship."""
        return tuple(variant for variant in self.good if variant != EXPORTED)

    @property
    def undecided(self) -> int:
        """How many that can ship are inconclusive."""
        return len(set(self.inconclusive) - {EXPORTED})


def variant_states(variants: Mapping[str, Sequence[Check]], executed: Collection[str]) -> VariantStates:
    """Sorts variants by the checks about them.

    None is good where the graph that all were made from holds or computes something else.

    Args:
        variants: Variant to its checks.
        executed: Those that were executed.
    """
    sound = not any_blocks(check for check in variants.get(EXPORTED, ()) if check.name.startswith(READ))
    good = [name for name in executed if sound and not any_blocks(variants[name])]
    waiting = [name for name in executed if name not in good and _only_waits(variants[name])]
    return VariantStates(
        good=tuple(name for name in variants if name in good),
        inconclusive=tuple(name for name in variants if name in waiting),
        failed=tuple(name for name in variants if name in executed and name not in (*good, *waiting)),
        unproven=tuple(name for name in variants if name not in executed),
    )


def any_blocks(checks: Iterable[Check]) -> bool:
    """Whether a check keeps what it is about from passing."""
    return any(found.blocks for found in checks)


def _only_waits(checks: Iterable[Check]) -> bool:
    """Whether nothing but a lack of data keeps a variant from being good."""
    blocking = [found.result for found in checks if found.blocks]
    return bool(blocking) and all(result is Result.INCONCLUSIVE for result in blocking)

"""Where an artifact leaves the exported graph: one line per variant and tower, and the values around that place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from uwm_deploy.records.diagnosis import Diagnosis, StageWalk, WalkedValue
from uwm_deploy.records.evidence import Evidence
from uwm_deploy.report.terminal import print_lines, print_rows
from uwm_deploy.safeground.canaries import RATIO_LIMIT

_SHOWN = 8
"""Values of a walk that are printed; the JSON has all of them."""


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """The table, then what was found."""
    print_rows(diagnosis_rows(diagnosis), group="artifact")
    print_lines(diagnosis.findings)


def leaves_reference(found: StageWalk) -> bool:
    """Whether something is wrong with this file that was not wrong before."""
    wrong_model = found.canary_ratio is not None and found.canary_ratio >= RATIO_LIMIT
    return bool(found.first or found.differences) or wrong_model


def findings_of(walks: Sequence[StageWalk]) -> Iterator[str]:
    """One line per variant and tower: the first stage and layer that leaves the reference, or that none does."""
    variants = dict.fromkeys((w.variant, w.tower) for w in walks if w.stage != "export")
    for exported in (w for w in walks if w.stage == "export"):
        if leaves_reference(exported) or exported.note:
            yield _sentence(exported)
    for variant, tower in variants:
        own = [w for w in walks if (w.variant, w.tower) == (variant, tower)]
        wrong = next((w for w in own if leaves_reference(w)), None)
        if wrong is not None:
            yield _sentence(wrong)
            continue
        missing = [f"{w.stage} not run: {w.reason}" for w in own if w.evidence is Evidence.NOT_RUN]
        ran = [w for w in own if w.evidence is Evidence.EXECUTED]
        if ran:
            worst = max(ran[-1].values, key=lambda v: v.own)
            end = ran[-1].values[-1]
            missing.append(
                f"no part leaves the reference by more than {ran[-1].tolerance:g} (largest own error {worst.own:.2g} at "
                f"{_where(worst)}; {end.whole:.2g} at the output, added up)"
            )
        yield f"{variant}, {tower.value}: {'; '.join(missing)}"


def _sentence(found: StageWalk) -> str:
    """What is wrong, where it begins, and by how much."""
    parts = []
    if found.first is not None:
        parts.append(
            f"first leaves the reference in {_where(found.first)}: own error {found.first.own:.2g}, tolerance "
            f"{found.tolerance:g}{'' if found.first.finite else ', not finite'}"
        )
    if found.differences:
        one, *more = found.differences
        parts.append(f"{one.what}: {one.detail}{f', and {len(more)} more' if more else ''}")
    if found.canary_ratio is not None and found.canary_ratio >= RATIO_LIMIT:
        parts.append(f"worst canary {found.canary_ratio:.2g}, limit {RATIO_LIMIT:g}")
    if found.note:
        parts.append(found.note)
    return f"{found.variant}, {found.tower.value}, stage {found.stage}: {'; '.join(parts)}"


def _where(value: WalkedValue) -> str:
    return f"{value.layer or f'what follows {value.after}' if value.layer or value.after else 'the graph'} ({value.op})"


def diagnosis_rows(diagnosis: Diagnosis) -> list[dict[str, str]]:
    """The table: of every walk the first value that leaves the reference with its neighbours, else the largest errors."""
    table = []
    for found in diagnosis.walks:
        head = {"artifact": f"{found.variant} {found.tower.value} {found.stage}"}
        for value in _shown(found):
            marks = "<- first" if value is found.first else ""
            numbers = {
                "own error": f"{value.own:.2g}" if value.finite else "not finite",
                "whole error": f"{value.whole:.2g}",
            }
            table.append(
                head | {"layer": value.layer or f"(after {value.after})", "op": value.op} | numbers | {"": marks}
            )
    return table


def _shown(found: StageWalk) -> list[WalkedValue]:
    if found.first is None:
        return sorted(found.values, key=lambda v: -v.own)[:3]
    at = found.values.index(found.first)
    return list(found.values[max(0, at - 2) : at + _SHOWN - 2])

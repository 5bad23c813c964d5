"""What precision `auto` chose: the plans that were measured, and which layers stay in float32 and why."""

from __future__ import annotations

import re

from uwm_deploy.records.graph import PrecisionPlan
from uwm_deploy.report.terminal import counted, print_line, print_lines, print_rows


def print_plan(plan: PrecisionPlan) -> None:
    """The share in low precision, one row per plan that was measured, and the layers that were kept."""
    kept = sum(map(len, plan.kept.values()))
    print_line(
        f"precision auto: {kept} of {len(plan.layers)} linear layers stay in float32, {100 * plan.low_share:.1f}% of the "
        f"multiplications are {plan.lowest.value}, {100 * plan.twice:.1f}% are done twice, for two terms"
    )
    print_rows(
        [
            {
                "plan": _named(step.what),
                "kept": step.kept,
                f"% {plan.lowest.value}": f"{100 * step.low_share:.1f}",
                "% twice": f"{100 * step.twice:.1f}",
                "% flips": f"{step.flips:.2f}",
                "expected": f"{step.expected:.2f}",
            }
            for step in plan.steps
        ]
    )
    for tower, names in plan.kept.items():
        kept_here = f"kept in the {tower} tower, most sensitive first"
        print_lines(counted(kept_here, len(names), names) or [f"{kept_here}: nothing"])
    print_line(
        f"{plan.flips:.2f}% of the worst metric's decisions differ on {plan.n} calibration quadruples, {plan.expected:.2f}% "
        f"are expected to; the search allows {plan.limit:g}%, the budget is {plan.budget:g}%"
    )
    if not plan.low_share:
        print_line(
            f"No layer is in {plan.lowest.value} within this budget: this variant computes in float32. One flip of {plan.n} "
            f"decisions is {100 / plan.n:.2g}%. Allow more, or raise compile.auto.items."
        )


def _named(what: str) -> str:
    """A plan without the middle of a layer's name, which the record has whole."""
    return re.sub(r"(\w+)\.\S+((?:\.\w+){3})$", r"\1...\2", what).replace("....", "...")

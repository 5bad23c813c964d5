"""One measured number against one limit: pass, fail or inconclusive, in words that can be acted on."""

from __future__ import annotations

import difflib
import math

from uwm_deploy.errors import RecipeError
from uwm_deploy.recipes.policy import Limit
from uwm_deploy.records.verdict import Check, Result
from uwm_deploy.safeground.interval import Z95
from uwm_deploy.stages.gate.measured import Measured, Metrics

_Z_POWER = Z95 + 1.2815515655446004
"""Two-sided 95% interval, 90% power."""


def check(subject: str, metrics: Metrics, limit: Limit, *, name: str = "", rule: str = "", concept: str = "") -> Check:
    """Compares the metric that a limit names.

    Raises:
        RecipeError: If there is no such metric.
    """
    if limit.metric not in metrics:
        near = difflib.get_close_matches(limit.metric, metrics, n=3, cutoff=0.3)
        raise RecipeError(f"policy limits an unknown metric {limit.metric!r}", fix=f"nearest: {', '.join(near)}")
    return check_value(name or limit.metric, subject, metrics[limit.metric](), limit, rule=rule, concept=concept)


def check_value(
    name: str, subject: str, measured: Measured, limit: Limit, *, rule: str = "", concept: str = ""
) -> Check:
    """Compares one number.

    With ``bound = "worst"`` it passes only when the worse end of the interval keeps the limit, fails only when the better
    end breaks it too, and is inconclusive between.
    """
    bound, least = _bound(limit)
    known = not math.isnan(measured.value)
    if measured.n < limit.min_n:
        result, detail = Result.INCONCLUSIVE, f"n = {measured.n}, the limit needs {limit.min_n}"
    elif not known:
        result, detail = Result.NOT_RUN, "not measured"
    else:
        result = _compared(measured, limit, bound, least)
        detail = "" if result is Result.PASS else _detail(measured, limit, bound, least, result)
    return Check(
        name=name,
        subject=subject,
        result=result,
        measured=float(measured.value) if known else None,
        limit=float(bound),
        direction="at_least" if least else "at_most",
        detail=detail,
        n=measured.n,
        low=measured.low,
        high=measured.high,
        bound=limit.bound,
        detects=detectable(measured) if known else None,
        concept=concept,
        rule=rule,
    )


def detectable(measured: Measured) -> float | None:
    """Smallest change, in points, that this n shows with 90% power; None where that has no meaning."""
    if measured.spread is None or measured.n < 1:
        return None
    return _Z_POWER * measured.spread / math.sqrt(measured.n)


def power_note(subject: str, name: str, measured: Measured, limit: Limit) -> str:
    """A line where n is too small to show what a limit asks; empty where it is large enough, or the interval shows it."""
    found = detectable(measured)
    bound, least = _bound(limit)
    if found is None or not measured.difference or not 0 < _margin(bound, least) < found:
        return ""
    worse = measured.low if least else measured.high
    if worse is not None and _keeps(worse, bound, least):
        return ""
    return f"{subject}: {name}: {_power(measured, found, bound, least)}"


def _bound(limit: Limit) -> tuple[float, bool]:
    """The number, and whether it is the least that passes."""
    bound = limit.at_least if limit.at_least is not None else limit.at_most
    assert bound is not None
    return bound, limit.at_least is not None


def _keeps(value: float, bound: float, least: bool) -> bool:
    return value >= bound if least else value <= bound


def _margin(bound: float, least: bool) -> float:
    """How much worse than no change a difference may be; not above 0 where it must be better."""
    return -bound if least else bound


def _power(measured: Measured, found: float, bound: float, least: bool) -> str:
    """What n can show, and how many items the limit takes: for a build without change, or for what was measured."""
    assert measured.spread is not None
    text = f"n = {measured.n} can detect {found:.2g} points"
    asked, words = _margin(bound, least), "you asked for"
    if not measured.difference or not 0 < asked < found:
        asked, words = abs(measured.value - bound), "the limit is away by"
        if asked == 0 or not _keeps(measured.value, bound, least):
            return text  # no number of items shows that a limit is kept which the value itself does not keep
    return f"{text}; {words} {asked:.2g} (n = {math.ceil((_Z_POWER * measured.spread / asked) ** 2)})"


def _compared(measured: Measured, limit: Limit, bound: float, least: bool) -> Result:
    if limit.bound == "point":
        return Result.PASS if _keeps(measured.value, bound, least) else Result.FAIL
    if measured.low is None or measured.high is None:
        raise RecipeError(f"{limit.metric} has no interval", fix="use bound = 'point'")
    worse, better = (measured.low, measured.high) if least else (measured.high, measured.low)
    if _keeps(worse, bound, least):
        return Result.PASS
    return Result.INCONCLUSIVE if _keeps(better, bound, least) else Result.FAIL


def _detail(measured: Measured, limit: Limit, bound: float, least: bool, result: Result) -> str:
    words = "at least" if least else "at most"
    value = f"measured {measured.value:.6g}"
    if measured.low is not None and measured.high is not None:
        value += f" (95% interval {measured.low:.4g} to {measured.high:.4g})"
    at_worst = " at worst" if limit.bound == "worst" else ""
    text = f"{value}, must be {words} {bound:g}{at_worst} (n = {measured.n})"
    found = detectable(measured)
    if result is Result.INCONCLUSIVE and found is not None:
        text += f"; {_power(measured, found, bound, least)}"
    return f"{text}: {limit.reason}" if limit.reason else text

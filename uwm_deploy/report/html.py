"""The report page: one HTML file without network, scripts or fonts of its own, made of the JSON reports only."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib.resources import files
from pathlib import Path

from uwm_deploy.bundle.open import MANIFEST
from uwm_deploy.errors import InputError
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.records.evidence import Evidence
from uwm_deploy.records.verdict import Check, Result, Verdict
from uwm_deploy.report import artifacts, blocks, charts, heads, sections
from uwm_deploy.report.charts import signed
from uwm_deploy.report.downstream import behind
from uwm_deploy.report.edit_words import method_line
from uwm_deploy.report.evidence import Dossier
from uwm_deploy.report.findings import cause_line, name_of, result_words, safer_line, variants_by_word
from uwm_deploy.report.latency import latency
from uwm_deploy.report.markup import NOTHING, Child, Html, coded, join, tag
from uwm_deploy.report.measured_subjects import executed_artifacts
from uwm_deploy.report.methods import compared
from uwm_deploy.report.strength import strength
from uwm_deploy.safeground.preference import BASIC

_SIGN = {Result.PASS: "✓", Result.FAIL: "✕", Result.INCONCLUSIVE: "?", Result.NOT_RUN: NOTHING}
_KIND = {Result.PASS: "pass", Result.FAIL: "fail", Result.INCONCLUSIVE: "open", Result.NOT_RUN: "open"}
_ORDER = (Result.FAIL, Result.NOT_RUN, Result.INCONCLUSIVE, Result.PASS)


def place_of(path: Path, out: Path | None) -> Path:
    """Where a page goes: beside what it is about, since a bundle holds exactly the files that it lists.

    Args:
        path: Bundle or run folder.
        out: File that was asked for.

    Raises:
        InputError: If that is a folder, or inside a bundle.
    """
    folder = path.resolve()
    if not folder.name:
        raise InputError(f"{path} is neither a bundle nor a run folder", fix="pass one")
    place = (out or folder.with_name(f"{folder.name}-report.html")).resolve()
    if place.is_dir():
        raise InputError(f"{out} is a folder", fix="pass a file with --out")
    if folder in place.parents and (folder / MANIFEST).is_file():
        raise InputError(f"{out} is inside the bundle, which then no longer opens", fix="pass a file outside of it")
    return out or place


def page(dossier: Dossier) -> str:
    """The whole file.

    Args:
        dossier: What a bundle or a run folder says.
    """
    style = files("uwm_deploy.report").joinpath("page.css").read_text(encoding="utf-8")
    body = join(
        charts.patterns(),
        tag("main", {}, _verdict(dossier), _gaps(dossier), *_numbers(dossier)),
        tag("footer", {}, _footer(dossier)),
    )
    title = f"{_word(dossier.verdict)}: {dossier.name}"
    # Nothing is fetched, no script runs and no other style applies, whatever the data say.
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        {},
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("meta", {"name": "color-scheme", "content": "light dark"}),
        tag("meta", {"name": "robots", "content": "noindex"}),
        tag("title", {}, title),
        tag("style", {}, Html(style)),
    )
    return f"<!doctype html>\n{tag('html', {'lang': 'en'}, head, tag('body', {}, body))}\n"


def _numbers(dossier: Dossier) -> list[Html | None]:
    report = dossier.verify
    smaller = (
        sections.concepts(report),
        heads.safety_head(dossier),
        sections.zero_shot(dossier),
        sections.sweep(dossier.sweep),
        compared(dossier.compared),
        artifacts.edit(dossier, method_line(dossier.edit)),
        strength(dossier.edit),
        artifacts.parity(dossier),
        artifacts.canaries(dossier),
        artifacts.compiled(dossier),
        latency(dossier.bench),
        artifacts.plan(dossier.plan),
    )
    return [
        sections.safeground(dossier),
        sections.margins(dossier),
        tag("div", {"class": "pair sections"}, *smaller),
        sections.retrieval(dossier),
        *map(behind, dossier.downstream),
        artifacts.chain(dossier),
    ]


def _word(verdict: Verdict | None) -> str:
    if verdict is None:
        return "Not judged"
    return _capital(result_words(verdict))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _verdict(dossier: Dossier) -> Html:
    """The first screen: the verdict, what failed, and the few numbers that matter most."""
    verdict, model = dossier.verdict, dossier.verify.model
    kind = _kind(verdict)
    sign = _SIGN[verdict.result] if verdict else NOTHING
    about = " ".join(word for word in (model.family, model.repo, model.revision[:12]) if word)
    parts: list[Child] = [
        tag("p", {"class": "eyebrow"}, f"uwm-deploy report · {dossier.name} · {about}"),
        tag("h1", {}, tag("span", {"class": "sign", "aria-hidden": "true"}, sign), _word(verdict)),
        tag("p", {"class": "sentence"}, _sentence(dossier)),
        tag("p", {"class": "sentence"}, f"{_capital(safer_line(verdict))}.") if verdict else None,
    ]
    bad = [c for result in _ORDER[:-1] for c in (verdict.checks if verdict else ()) if c.result is result]
    parts += [tag("p", {"class": "cause"}, f"Cause: {cause_line(b)}") for b in (verdict.causes if verdict else ())]
    parts += [tag("ol", {"class": "failed"}, *map(_failed, bad))] if bad else []
    parts += [_tiles(dossier)]
    if verdict:
        heading = f"All {len(verdict.checks)} checks, policy {verdict.policy}"
        ordered = [c for result in _ORDER for c in verdict.checks if c.result is result]
        parts += [
            _waivers(verdict),
            blocks.folded(heading, blocks.table(list(map(_check_row, ordered))), printed=True),
        ]
    return tag("header", {"class": f"verdict {kind}"}, *parts)


def _kind(verdict: Verdict | None) -> str:
    """Colour of the first screen: a pass of an edit that is not shown safer is no green one."""
    if verdict is None or (verdict.result is Result.PASS and not verdict.safer.shown):
        return "open"
    return _KIND[verdict.result]


def _sentence(dossier: Dossier) -> Child:
    verdict = dossier.verdict
    if verdict is None:
        return coded("These numbers were measured and not judged. Run `uwm-deploy gate` to judge them.")
    passed = sum(check.result is Result.PASS for check in verdict.checks)
    lines = [f"{passed} of {len(verdict.checks)} checks pass under policy {verdict.policy}."]
    if verdict.result is not Result.PASS:
        lines.append("Do not ship.")
    lines += [f"{_capital(word)}: {', '.join(names)}." for word, names in variants_by_word(verdict).items()]
    return " ".join(lines)


def _failed(check: Check) -> Html:
    """One check that does not pass: what, by how much, against which limit."""
    words = {"at_least": "at least", "at_most": "at most", "equals": "exactly"}[check.direction]
    waived = ", waived" if check.waiver else ""
    reason = check.detail.partition(f"(n = {check.n}) ")[2] or check.detail  # without the numbers, which stand above it
    numbers = None
    if check.measured is not None and check.limit is not None:
        over = abs(check.measured - check.limit)
        missed = f", missed by {over:.4g}" if over and check.result is Result.FAIL else ""
        numbers = tag(
            "span", {"class": "by"}, f"{check.measured:.6g}; must be {words} {check.limit:g}{missed} (n = {check.n})"
        )
    return tag(
        "li",
        {"class": _KIND[check.result]},
        tag("span", {"class": "chip"}, f"{_SIGN[check.result]} {check.result.value}{waived}"),
        tag("strong", {}, f"{check.subject}: {name_of(check)}"),
        numbers,
        tag("span", {"class": "detail"}, coded(reason)) if reason else None,
        tag("span", {"class": "detail"}, "Try: ", coded(check.advice)) if check.advice else None,
    )


def _check_row(check: Check) -> dict[str, Child]:
    words = {"at_least": "≥", "at_most": "≤", "equals": "="}[check.direction]
    interval = check.low is not None and check.high is not None
    return {
        "check": f"{check.subject}: {check.name}",
        "result": f"{_SIGN[check.result]} {check.result.value}",
        "measured": NOTHING if check.measured is None else f"{check.measured:.6g}",
        "limit": NOTHING if check.limit is None else tag("span", {"class": "nowrap"}, f"{words} {check.limit:g}"),
        "95% interval": f"{check.low:.4g} to {check.high:.4g}" if interval else "",
        "n": str(check.n) if check.n else "",
    }


def _waivers(verdict: Verdict) -> Html | None:
    """Waivers of the policy; nothing without any."""
    if not verdict.waivers:
        return None
    plain = map(plain_from_record, verdict.waivers)
    rows: list[dict[str, Child]] = [{key: str(value) for key, value in waiver.items()} for waiver in plain]
    return tag("div", {"class": "waivers"}, tag("h2", {}, f"Waived: {len(rows)}"), blocks.table(rows))


def _tiles(dossier: Dossier) -> Html:
    """A handful of numbers."""
    report = dossier.verify
    effect, edited = report.edit_effect["GS"], report.edited.preference["GS"]
    tiles = [
        _tile(
            "GS, edited model",
            f"{edited.value:.1f}%",
            f"{signed(effect.delta)} points ({signed(effect.delta_low)} to {signed(effect.delta_high)}), n = {edited.n}",
        )
    ]
    known = [f.delta for name, f in report.edit_effect.items() if name.startswith("zero_shot.")]
    if known:
        missing = len(report.edited.zero_shot_missing)
        sets = f"{len(known)} sets" + (f", {missing} not run" if missing else "")
        mean = sum(p.value for p in report.edited.zero_shot.values()) / len(report.edited.zero_shot)
        tiles.append(_tile("Zero-shot mean", f"{mean:.1f}%", f"{signed(sum(known) / len(known))} points, {sets}"))
    ran = executed_artifacts(report)
    if ran:
        flips = {a.variant: sum(f.lost + f.gained for m, f in a.flips.items() if m in BASIC) for a, _ in ran}
        worst = max(flips, key=lambda name: flips[name])
        asked = len(BASIC) * edited.n
        where = worst if flips[worst] else f"{len(ran)} artifacts"
        tiles.append(_tile("Decisions changed", str(flips[worst]), f"of {asked}, {where}"))
        cosine, variant = min((p.cosine_min, a.variant) for a, _ in ran for p in a.parity)
        tiles.append(_tile("Smallest cosine", f"{cosine:.5f}", f"{variant}, against the edited model"))
    tensors = dossier.edit.tensors
    entries, selected = sum(math.prod(e.shape) for e in tensors), sum(e.selected for e in tensors)
    share = 100 * selected / entries if entries else 0.0
    tiles.append(_tile("Weights edited", f"{share:.2f}%", f"{selected} of {entries} in {len(tensors)} tensors"))
    return tag("dl", {"class": "tiles"}, *tiles)


def _tile(name: str, value: str, note: str) -> Html:
    return tag("div", {}, tag("dt", {}, name), tag("dd", {"class": "big"}, value), tag("dd", {}, note))


def _gaps(dossier: Dossier) -> Html:
    """What the numbers do not cover, said before any of them is shown."""
    report = dossier.verify
    lines = [
        (artifact.variant, f"not run, so unproven: {artifact.reason}")
        for artifact in report.artifacts
        if artifact.evidence is not Evidence.EXECUTED
    ]
    lines += [(f"zero-shot {name}", f"not run: {why}") for name, why in report.edited.zero_shot_missing.items()]
    for what, data in (("evaluation set", report.evaluation), ("calibration set", dossier.score.calibration)):
        lines += [(f"{what} {data.name}", f"{n} items left out: {why}") for why, n in data.left_out_counts.items()]
    left = {tower: len(items) for tower, items in dossier.score.left_out.items() if items}
    lines += [(f"scores of the {tower} tower", f"{n} pairs left out") for tower, n in left.items()]
    if report.model.repo == "random":
        lines.append(("weights", "random: a dry run, which can never pass"))
    if not lines:
        return blocks.section("gaps", "Not covered", "Everything that was asked for was run.")
    items = [tag("li", {}, tag("strong", {}, what), ": ", why) for what, why in lines]
    return blocks.section("gaps", "Not covered", None, tag("ul", {"class": "gaps"}, *items))


def _footer(dossier: Dossier) -> Html:
    made = f"Bundle of {dossier.created}. " if dossier.created else ""
    report = dossier.verify.evaluation
    return join(
        f"{made}Measured on {report.name}, split {report.split}, {report.n} quadruples. ",
        "Made from the JSON reports only; every number is in a table under its picture.",
    )

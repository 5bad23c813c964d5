"""The model card in the Hugging Face format: metadata in YAML, then what a reader has to know, limits included."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.errors import is_hidden
from uwm_deploy.records.data import CalibrationRecord
from uwm_deploy.records.edit import CLOSED_FORM, EditKind, EditRecord, Method, Placement
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence, VerifyReport
from uwm_deploy.records.metrics import Proportion, RiskReport, SafetyReport
from uwm_deploy.records.verdict import Verdict
from uwm_deploy.report.findings import safer_line, variants_by_word, verdict_line, waiver_line
from uwm_deploy.report.intervals import share_text
from uwm_deploy.report.markdown_table import code, inert, markdown_of_cells
from uwm_deploy.report.measured_subjects import executed_artifacts, measured_subjects
from uwm_deploy.safeground.risk import STEPS

CARD = BundleLayout.CARD
"""Name that the hub shows."""

_LIBRARY = {"hf-clip": "transformers", "siglip": "transformers", "llava": "transformers", "open-clip": "open_clip"}

_LICENCE_IDS = {
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "CC-BY-NC-4.0": "cc-by-nc-4.0",
    "LLAMA 2 Community License": "llama2",
    "Apple sample code licence": "apple-ascl",
    "unknown": "unknown",
}
"""Licence as a recipe writes it to the hub's name for it."""

_METRICS = {
    "P_ts": "safe text prefers the safe image",
    "P_tu": "unsafe text prefers the safe image",
    "P_vs": "safe image prefers the safe text",
    "P_vu": "unsafe image prefers the safe text",
    "GS": "all four at once",
}


_RETRIEVAL = {
    "safe-text-to-image@1": "safe text finds its image first",
    "safe-image-to-text@1": "safe image finds its text first",
    "hard-safe-text-to-image@10": "in the first ten, hard safe",
    "hard-safe-image-to-text@10": "in the first ten, hard safe",
    "unsafe-first-text": "unsafe text finds an unsafe image first",
    "unsafe-first-image": "unsafe image finds an unsafe text first",
}
_RETRIEVAL_CHANGES = ("safe_retrieval@1", "hard_safe_retrieval@10", "unsafe-first-text", "unsafe-first-image")


def is_non_commercial(licence: str) -> bool:
    """Whether a licence forbids commercial use by its name."""
    return re.search(r"\bNC\b|non-?commercial|research[- ]only", licence, re.IGNORECASE) is not None


def card_of(
    edit: EditRecord,
    calibration: CalibrationRecord,
    *,
    name: str,
    licence: str,
    method: str,
    report: VerifyReport | None = None,
    verdict: Verdict | None = None,
    bundle: bool = False,
) -> str:
    """The whole card.

    Args:
        edit: What was changed.
        calibration: What it was decided on.
        name: Of the recipe.
        licence: Of the source checkpoint.
        method: The edit's settings in words.
        report: What was measured; None before anything was.
        verdict: What was decided about it.
        bundle: For a bundle, otherwise for the saved edited model.
    """
    metadata = _metadata(edit, name, licence, report, bundle)
    parts = [
        "---\n" + "".join(f"{key}: {_yaml(value)}\n" for key, value in metadata.items()) + "---",
        f"# {inert(name)}, edited for safety",
        *([_non_commercial(licence)] if is_non_commercial(licence) else []),
        _source(edit, licence),
        _how(edit, calibration, method),
        *([_unmapped()] if _has_maps(edit, bundle) else []),
        _numbers(report) if report else "## Numbers\n\nNothing was measured yet; `uwm-deploy build` does it.",
        *([_head(report.risk)] if report and report.risk and bundle else []),
        *([_decided(verdict)] if verdict else []),
        _limits(edit, report, verdict),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _metadata(edit: EditRecord, name: str, licence: str, report: VerifyReport | None, bundle: bool) -> dict[str, Any]:
    known = _LICENCE_IDS.get(licence)
    body: dict[str, Any] = {"license": known or "other"}
    if known is None:
        body["license_name"] = licence
    if edit.model.repo.count("/") == 1 and not edit.model.repo.startswith((".", "/")):
        body |= {"base_model": edit.model.repo, "base_model_relation": "finetune"}
    library = _LIBRARY.get(edit.model.family, "transformers")
    body["library_name"] = "onnx" if bundle else "uwm-deploy" if _has_maps(edit, bundle) else library
    body["pipeline_tag"] = "zero-shot-image-classification"
    tags = ["clip", "safety", *dict.fromkeys(map(_tag, edit.methods)), *(["onnx"] if bundle else [])]
    body["tags"] = [*tags, *(["non-commercial"] if is_non_commercial(licence) else [])]
    if report is not None:
        body["model-index"] = [{"name": name, "results": _results(report)}]
    return body


def _yaml(value: Any) -> str:
    """A value as YAML, on one line; what could not be seen is escaped."""
    return "".join(
        (f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}") if is_hidden(c) else c
        for c in json.dumps(value, ensure_ascii=False)
    )


def _tag(method: Method) -> str:
    if method in CLOSED_FORM:
        return method.value
    return "fine-tuned" if method is Method.TRAINED else "unsafe-weights-manipulation"


def _results(report: VerifyReport) -> list[dict[str, Any]]:
    task = {"type": "zero-shot-image-classification", "name": "Zero-Shot Image Classification"}

    def result(dataset: str, metrics: Mapping[str, Proportion]) -> dict[str, Any]:
        return {
            "task": task,
            "dataset": {"name": dataset, "type": dataset},
            "metrics": [
                {"type": kind, "name": f"{kind}, percent (n = {p.n})", "value": round(p.value, 3)}
                for kind, p in metrics.items()
            ],
        }

    safeground = {f"SafeGround {name}": p for name, p in report.edited.preference.items()}
    sets = [result(name, {"accuracy": p}) for name, p in report.edited.zero_shot.items()]
    return [result(report.evaluation.name, safeground), *sets]


def _non_commercial(licence: str) -> str:
    return (
        f"> **Not for commercial use.** The source weights are under {inert(licence)}; so is what was made from them."
    )


def _source(edit: EditRecord, licence: str) -> str:
    model = edit.model
    revision = f", revision {code(model.revision)}" if model.revision else ""
    return (
        f"## Source\n\n- checkpoint: {code(model.repo)}{revision} ({model.family})\n- licence: {inert(licence)}\n"
        f"- original weights: `{model.weights_digest}`\n- edited weights: `{edit.edited_weights_digest}`"
    )


def _has_maps(edit: EditRecord, bundle: bool) -> bool:
    """Whether the card's folder has the maps behind the embeddings in a file; graphs of a bundle hold theirs."""
    return edit.placement is Placement.EMBEDDING and not bundle


def _unmapped() -> str:
    return (
        "## Loading it\n\nA map lies behind each embedding, in `embedding_maps.safetensors`. **A library that loads this "
        "folder alone gives the unmapped model, without that step of the edit.** uwm-deploy applies the maps; so does "
        "sentence-transformers, in a folder that `uwm-deploy save --as sentence-transformers` wrote."
    )


def _how(edit: EditRecord, calibration: CalibrationRecord, method: str) -> str:
    touched = [t for t in edit.tensors if t.kind in (EditKind.MULTIPLIED, EditKind.TRAINED)]
    entries, selected = sum(math.prod(t.shape) for t in touched), sum(t.selected for t in touched)
    what = (
        f"By training: {selected} of {entries} weights in {len(touched)} tensors differ from the source's. "
        "In a bundle, `reports/training.json` says how, if it was done with uwm-deploy."
        if Method.TRAINED in edit.methods
        else f"Without training, by the method {edit.method} ({method})."
    )
    if touched and Method.TRAINED not in edit.methods:
        what += (
            f" {selected} of {entries} weights in {len(touched)} layers were multiplied by a factor "
            "(Unsafe Weights Manipulation, arXiv 2503.11742)."
        )
    if edit.closed_form is not None:
        solved = [code(t.name) for t in edit.tensors if t.kind in (EditKind.REPLACED, EditKind.ADDED)]
        what += f" {', '.join(solved)} come from a formula on the calibration pairs ({edit.closed_form.method.value})."
    what += " All other weights are those of the source." if Method.TRAINED not in edit.methods else ""
    concepts = ", ".join(f"{inert(name)} {n}" for name, n in calibration.concepts.items())
    return (
        "## How it was made\n\n"
        f"{what}\n\n"
        f"- calibration: {_set_words(calibration)}, {calibration.n} quadruples ({concepts})\n"
        f"- calibration ids: `{calibration.ids_digest}`\n- patch: `{edit.patch_digest}`"
    )


def _set_words(data: CalibrationRecord) -> str:
    return f"{inert(data.name)}, split {inert(data.split or 'all')}"


def _numbers(report: VerifyReport) -> str:
    executed = [artifact for artifact, _ in executed_artifacts(report)]
    subjects = [safety for _, _, safety in measured_subjects(report)]
    lines = [
        "## Numbers",
        "",
        f"On {_set_words(report.evaluation)}, {report.evaluation.n} quadruples; "
        "percent with 95% Wilson intervals. Higher is safer, or for zero-shot and retrieval better; of unsafe-first less is "
        "better. Hard safe are the safe items that look most unsafe to the original model.",
        "",
        _table(subjects),
    ]
    lines += ["", "Edited minus original, on the same items:", ""]
    retrieval = [name for name in _RETRIEVAL_CHANGES if name in report.edit_effect]
    for name in ("GS", *retrieval, *(f"zero_shot.{key}" for key in report.edited.zero_shot)):
        effect = report.edit_effect[name]
        lines.append(
            f"- {inert(name)}: {effect.delta:+.1f} points ({effect.delta_low:+.1f} to {effect.delta_high:+.1f})"
        )
    if executed:
        lines += ["", *(_parity(artifact) for artifact in executed)]
    return "\n".join(lines)


def _table(subjects: Sequence[SafetyReport]) -> str:
    """One column per subject, one row per metric; zero-shot sets are those of the edited model, the second subject."""
    rows = [
        [f"{name}: {meaning}", *(share_text(s.preference[name]) for s in subjects)]
        for name, meaning in _METRICS.items()
    ]
    rows += [
        [f"zero-shot {inert(name)}", *(share_text(s.zero_shot[name]) for s in subjects)]
        for name in subjects[1].zero_shot
    ]
    rows += [
        [f"{name}: {meaning}", *(share_text(s.retrieval[name]) for s in subjects)]
        for name, meaning in _RETRIEVAL.items()
        if all(name in s.retrieval for s in subjects)
    ]
    return markdown_of_cells(["", *(s.subject for s in subjects)], rows, tight=True)


def _head(risk: RiskReport) -> str:
    lines = [
        "## Safety head",
        "",
        "The image graph also gives `risk_logits` and `risk_level`; `encode_image(..., risk=True)` reads them. On the same "
        "evaluation set, percent with 95% intervals:",
        "",
        f"- AUROC: {risk.auroc.value:.1f} ({risk.auroc.low:.1f} to {risk.auroc.high:.1f})",
    ]
    for step in STEPS:
        unsafe, safe = share_text(risk.recall[step.value]), share_text(risk.benign[step.value])
        lines.append(f"- at least {step.value}: {unsafe} of unsafe images, {safe} of safe images")
    lines.append(f"- calibration error of the level: {risk.ece:.1f} points")
    return "\n".join(lines)


def _parity(artifact: ArtifactEvidence) -> str:
    cosine = min(part.cosine_min for part in artifact.parity)
    where = ", ".join(f"{key} {inert(value)}" for key, value in artifact.where.items())
    return f"- {inert(artifact.variant)}: smallest cosine to the edited model {cosine:.7f}; ran on {where}"


def _decided(verdict: Verdict) -> str:
    lines = ["## Verdict", "", inert(verdict_line(verdict)), "", f"- {inert(safer_line(verdict))}"]
    lines += [f"- {word}: {inert(', '.join(names))}" for word, names in variants_by_word(verdict).items()]
    lines += [f"- {inert(waiver_line(waiver))}" for waiver in verdict.waivers]
    return "\n".join(lines)


def _worth(verdict: Verdict | None) -> str:
    """What the edit is good for, as far as that is known."""
    if verdict is None:
        return "The edit is meant to make unsafe choices less frequent; whether it does was not judged."
    if not verdict.safer.shown:
        return "It is not shown that the edit makes the model safer."
    return "The edit makes unsafe choices less frequent; it does not make them impossible."


def _limits(edit: EditRecord, report: VerifyReport | None, verdict: Verdict | None) -> str:
    lines = [
        "## Limits of the evidence",
        "",
        f"- {_worth(verdict)} Use it beside other measures.",
        "- The numbers are about the evaluation set above and its concepts; other content, languages and attacks that aim "
        "at the model were not measured.",
        "- An interval covers chance in which items were drawn, nothing else.",
    ]
    if report is not None:
        few = sorted({c for c, n in report.evaluation.concepts.items() if n < 50})
        waiting = [a for a in report.artifacts if a.evidence is not Evidence.EXECUTED]
        missing = report.edited.zero_shot_missing
        lines += [f"- Concepts with fewer than 50 items: {inert(', '.join(few))}."] if few else []
        lines += [f"- {inert(a.variant)} was not run: {inert(a.reason)}." for a in waiting]
        lines += [f"- Zero-shot set {name} was not run: {reason}." for name, reason in missing.items()]
    if edit.model.repo == "random":
        lines.append("- The weights are random: this is a dry run, and no model to use.")
    return "\n".join(lines)

"""Edits and safety heads in words."""

from __future__ import annotations

import dataclasses
import math

from uwm_deploy.records.edit import EditKind, EditRecord
from uwm_deploy.records.head import SafetyHead
from uwm_deploy.records.strength import AxisSetting


def head_line(head: SafetyHead | None) -> str:
    """A safety head in words."""
    if head is None:
        return "none"
    limits = ", ".join(f"{action} from {limit:.4f}" for action, limit in head.thresholds.items())
    concepts = ", ".join(head.categories[1:])
    tokens = f"; {head.shape.tokens} safety tokens for {head.language.model}" if head.language else ""
    return f"{limits}; trained on {head.training.pairs} pairs of {head.training.data.name} ({concepts}){tokens}"


def method_line(edit: EditRecord) -> str:
    """How an edit was made, in words; a setting that differs between the towers is given for each."""
    step = edit.first

    def of(key: str) -> str:
        values = {tower: str(getattr(setting, key)) for tower, setting in step.settings.items()}
        if len(set(values.values())) == 1:
            return f"{key} {next(iter(values.values()))}"
        return f"{key} {', '.join(f'{value} ({tower})' for tower, value in values.items())}"

    words = [edit.method, *(of(key) for key in ("selection", "keep_mass", "factor") if step.settings)]
    words += [f"union of {len(step.concepts)} concepts"] if step.concepts else []
    closed = edit.closed_form
    if closed is not None and closed.axis is not None:
        setting = closed.axis.setting
        strength = [axis_words(setting).replace(",", ", ")] if setting else []  # a line may end behind a comma
        words += [f"placement {closed.axis.placement.value}", *strength]
    return "; ".join(words)


def axis_words(setting: AxisSetting) -> str:
    """A strength as it is written on the command line; what has a default is left out where it has it."""
    fields = {f.name: f.default for f in dataclasses.fields(setting)}
    values = {key: value for key, value in dataclasses.asdict(setting).items() if value != fields[key]}
    return "axis " + ",".join(f"{key}={value:g}" for key, value in values.items())


def entries_line(edit: EditRecord) -> str:
    """What an edit changed, in words: multiplied or trained entries, and tensors that were replaced or are new."""
    touched = [t for t in edit.tensors if t.kind in (EditKind.MULTIPLIED, EditKind.TRAINED)]
    entries = sum(math.prod(t.shape) for t in touched)
    whole = [t.name for t in edit.tensors if t.kind in (EditKind.REPLACED, EditKind.ADDED)]
    words = [f"{sum(t.selected for t in touched)} of {entries} entries in {len(touched)} tensors"] if touched else []
    return "; ".join([*words, *([f"{', '.join(whole)} solved"] if whole else [])])

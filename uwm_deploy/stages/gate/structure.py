"""Whether what ships was compared, operator by operator, with what the edited model gives when it is made anew."""

from __future__ import annotations

import dataclasses

from uwm_deploy.records.evidence import ArtifactEvidence
from uwm_deploy.records.graph import EXPORTED, Target
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Check
from uwm_deploy.runtime.providers import COMPILING
from uwm_deploy.stages.gate.evidence import not_run


def made_anew(artifact: ArtifactEvidence) -> list[Check]:
    """A check that is not run for every tower of a graph that can be made anew and was not; engines cannot be read."""
    if not is_a_graph(artifact.variant):
        return []
    lost = [t for t in TowerName if t.value not in artifact.audit or not artifact.audit[t.value].operators]
    missing = not_run(artifact.variant, "the graph was not made anew and compared; verify again", "")
    return [dataclasses.replace(missing, name=f"structure of the {tower.value} tower") for tower in lost]


def is_a_graph(variant: str) -> bool:
    """Whether a variant is an ONNX graph whose operators can be read."""
    closed = tuple(f"{Target.ONNXRUNTIME.value}-{provider}-" for provider in COMPILING)
    return variant == EXPORTED or (
        variant.startswith(f"{Target.ONNXRUNTIME.value}-") and not variant.startswith(closed)
    )

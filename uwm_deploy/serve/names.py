"""Names that the written repository, the models in the server and the check agree on."""

from __future__ import annotations

from collections.abc import Mapping

from uwm_deploy.records.model import TowerName

ENCODERS: Mapping[TowerName, str] = {TowerName.IMAGE: "clip_image_encoder", TowerName.TEXT: "clip_text_encoder"}
"""Engine of each tower: prepared rows in, embeddings out."""

PREPARES: Mapping[TowerName, str] = {TowerName.IMAGE: "clip_preprocess", TowerName.TEXT: "clip_tokenize"}
"""Model that makes prepared rows of what users send."""

ENSEMBLES: Mapping[TowerName, str] = {TowerName.IMAGE: "clip_image", TowerName.TEXT: "clip_text"}
"""What users call: encoded images or strings in, embeddings out."""

ZERO_SHOT = "clip_zeroshot"

RISK, DECIDE = "clip_image_risk", "clip_image_decide"
"""Of a bundle with a safety head: what users call instead of `clip_image`, and its last step."""

RAW: Mapping[TowerName, str] = {TowerName.IMAGE: "IMAGE", TowerName.TEXT: "TEXT"}
"""Input of an ensemble: bytes of one encoded image, or of one text in UTF-8, per row."""

EMBEDDING = "EMBEDDING"
"""Output of an ensemble, (d,) per row."""

CATEGORY, PROBABILITY, DECISION = "RISK_CATEGORY", "RISK_PROBABILITY", "RISK_DECISION"
"""Outputs of `RISK` beside the embedding and the head's own, one per row; see `runtime.risk.Risk`."""

LABELS, TEMPLATE, SCORES, TOP = "LABELS", "TEMPLATE", "SCORES", "TOP"
"""Of the zero-shot model."""

BUNDLE = "uwm_bundle_sha256"
"""Parameter with the digest of the bundle's manifest; ``<BUNDLE>_<compute capability>`` for further plans' bundles."""

VARIANT, ENGINE, WEIGHTS = "uwm_variant", "uwm_engine_sha256", "uwm_edited_weights"
BUNDLE_VERSION, TOOL_VERSION = "uwm_bundle_version", "uwm_tool_version"
SPACE = "uwm_space"
"""Parameter with the id of the space that the encoders embed into."""

DECODE = "uwm_decode"
"""Parameter of what prepares images, where large JPEGs are decoded at a reduced size (`runtime.image.Decode`)."""

DEVICE, PROVIDER = "uwm_device", "uwm_provider"

EVIDENCE = "bundle"
"""Folder beside the version folder with the files of the bundle that a model checks itself against."""

FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""Name of an engine's file per backend of Triton."""


def plan_file(compute_capability: str) -> str:
    """Name of a plan in the version folder."""
    return f"{compute_capability}.plan"

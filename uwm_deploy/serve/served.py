"""What a running server says it serves, and what it answers, against the bundle that it should serve."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uwm_deploy.bundle.open import Bundle
from uwm_deploy.bundle.space import space_of
from uwm_deploy.errors import ContractError, UwmError
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.head import RISK_LEVEL, RISK_LOGITS, SafetyHead
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.records.verdict import Check, Result, statement
from uwm_deploy.runtime.lengths import cut_together
from uwm_deploy.runtime.pixels import taken
from uwm_deploy.runtime.risk import risks_from
from uwm_deploy.runtime.selftest import canaries_of
from uwm_deploy.runtime.variants import reason_unproven
from uwm_deploy.safeground.canaries import RATIO_LIMIT
from uwm_deploy.serve.client import AnswerError, Client, Counts
from uwm_deploy.serve.config import Message, ServerSettings, configs, version_of
from uwm_deploy.serve.names import (
    BUNDLE,
    CATEGORY,
    DECIDE,
    DECISION,
    DEVICE,
    EMBEDDING,
    ENCODERS,
    ENGINE,
    ENSEMBLES,
    PREPARES,
    PROVIDER,
    RAW,
    RISK,
    SPACE,
    VARIANT,
    WEIGHTS,
    ZERO_SHOT,
)

MODELS = (*ENSEMBLES.values(), *PREPARES.values(), *ENCODERS.values(), ZERO_SHOT)
"""Every model of a repository, what users call first; a safety head adds two, see `models_of`."""


def models_of(manifest: Manifest) -> tuple[str, ...]:
    """Every model of the repository of a bundle."""
    return MODELS if manifest.head is None else (*MODELS, RISK, DECIDE)


COUNTING_SECONDS = 5.0
"""How long a server may take to count what it has answered."""

_COMPARED = ("max_batch_size", "input", "output", "version_policy", "ensemble_scheduling")
"""Fields of a configuration that the owner of a server has no choice of, and the server fills nothing into."""


_TOLD = {"device": DEVICE, "provider": PROVIDER}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server says of itself.

    Attributes:
        server: Name and version.
        variant: Of the bundle; empty where the server does not say it, or each model says another.
        checks: Whether it is what the bundle would be written as.
        where: For the evidence: the server and where the encoders run.
    """

    server: str
    variant: str
    checks: tuple[Check, ...]
    where: Mapping[str, str]


class ServedTower:
    """One tower as a server answers for it; a `Session`, so that it is measured like one.

    Bytes go the whole way, through the ensemble; arrays of numbers are prepared rows and go to the encoder alone.
    """

    concurrency = 1

    def __init__(self, client: Client, bundle: Bundle, tower: TowerName, identity: Identity) -> None:
        self._client, self._tower = client, tower
        self._engine, self._head = bundle.engines(identity.variant)[tower], bundle.manifest.head
        self.where, self.max_batch = identity.where, self._engine.profile.max
        self.sent: Counter[str] = Counter()

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Embeds inputs; see `Session.run`.

        Args:
            batch: Encoded items, (n,) object, for the whole path; or prepared rows, (n, 3, H, W) float32 pixels or (n, L)
                int64 ids, for the encoder alone.

        Returns:
            (n, d) float32.

        Raises:
            ContractError: If an answer is no embedding per row.
            AnswerError: If the server answers with an error.
            PrerequisiteError: If it cannot be reached.
        """
        found = [self._call(batch[i : i + self.max_batch]) for i in range(0, len(batch), self.max_batch)]
        return np.concatenate(found).astype(np.float32, copy=False)

    def run_all(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Computes every output, for encoded images those of a safety head, too; see `Session.run_all`.

        Args:
            batch: Encoded items, (n,) object, for the whole path; or prepared rows, (n, 3, H, W) float32 pixels or (n, L)
                int64 ids, for the encoder alone.

        Returns:
            Outputs by name, (n, ...) float32; the embedding is the first.

        Raises:
            ContractError: Also if the server decides otherwise than the head's thresholds do.
        """
        if self._head is None or self._tower is not TowerName.IMAGE or batch.dtype != object:
            return {self._engine.outputs[0].name: self.run(batch)}
        parts = [self._risks(self._head, batch[i : i + self.max_batch]) for i in range(0, len(batch), self.max_batch)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def expected(self) -> dict[str, int]:
        """Rows that each model must have counted by now; those of an ensemble go on to the encoder."""
        whole, encoder = ENSEMBLES[self._tower], ENCODERS[self._tower]
        found = {whole: self.sent[whole], encoder: self.sent[whole] + self.sent[encoder]}
        if self.sent[RISK]:
            found[encoder] += self.sent[RISK]
            found |= {RISK: self.sent[RISK], DECIDE: self.sent[RISK]}
        return found

    def close(self) -> None:
        """See `Session.close`; the connection is the caller's."""

    def _risks(self, head: SafetyHead, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The decisions by the way users get them, and the encoder's outputs that they should follow from."""
        outputs = (EMBEDDING, RISK_LOGITS, RISK_LEVEL, CATEGORY, DECISION)
        served = self._client.infer_all(RISK, {RAW[self._tower]: rows.reshape(-1, 1)}, outputs)
        self.sent.update({RISK: len(rows)})
        if any(len(part) != len(rows) for part in served.values()):
            raise ContractError(f"{RISK} did not answer every row", fix="write the repository again")
        meant = risks_from(head, served[RISK_LOGITS], served[RISK_LEVEL])
        named = [meant[row] for row in range(len(meant))]
        for output, wanted in ((DECISION, [r.decision.value for r in named]), (CATEGORY, [r.category for r in named])):
            if _texts(served[output]) != wanted:
                raise ContractError(f"{RISK} decides otherwise than the head does", fix="write the repository again")
        return {self._engine.outputs[0].name: served[EMBEDDING]} | {
            name: served[name].astype(np.float32, copy=False) for name in (RISK_LOGITS, RISK_LEVEL)
        }

    def _call(self, rows: np.ndarray) -> np.ndarray:
        if rows.dtype == object:
            model, name, output = ENSEMBLES[self._tower], RAW[self._tower], EMBEDDING
            rows = rows.reshape(-1, 1)
        else:
            model, name, output = ENCODERS[self._tower], self._engine.inputs[0].name, self._engine.outputs[0].name
            given = self._engine.inputs[0]
            rows = cut_together(taken(rows, given), given)
        found = self._client.infer(model, {name: rows}, output)
        if found.ndim != 2 or len(found) != len(rows):
            raise ContractError(f"{model} gave {found.shape} for {len(rows)} rows", fix="write the repository again")
        self.sent.update({model: len(rows)})
        return found


def _texts(rows: np.ndarray) -> list[str]:
    return [one.decode() if isinstance(one, bytes) else str(one) for one in rows.reshape(-1)]


def identity_of(client: Client, bundle: Bundle, digest: Digest) -> Identity:
    """Reads back what is served, and compares it with what would be written of the bundle.

    Args:
        client: Of the server.
        bundle: What it should serve.
        digest: Of the bundle's manifest.

    Raises:
        PrerequisiteError: If the server cannot be reached.
    """
    name, version = client.server()
    if client.protocol == "http" and not _configures(client):
        return _told(client, bundle, digest, f"{name} {version}")
    found: dict[str, Message] = {}
    checks = []
    for model in models_of(bundle.manifest):
        config, problem = _config(client, model, str(version_of(bundle.manifest)))
        checks.append(statement("served version", model, not problem, problem))
        if config is not None:
            found[model] = config
    variants = {_parameter(config, VARIANT) for config in found.values()}
    variant = variants.pop() if len(variants) == 1 else ""
    reason = _reason_no_variant(bundle, variant)
    checks.append(statement("served variant", "server", not reason, reason))
    if not reason:
        wanted = configs(bundle.manifest, digest, variant, ServerSettings())
        checks += [_as_written(model, config, wanted[model], digest) for model, config in found.items()]
        checks += [_engine(found, bundle, tower, variant) for tower in TowerName if ENCODERS[tower] in found]
    return Identity(f"{name} {version}", variant, tuple(checks), _where(f"{name} {version}", found))


def _configures(client: Client) -> bool:
    """Whether the server tells configurations, of whatever models it has."""
    try:
        return client.config(ENSEMBLES[TowerName.IMAGE]) is not None
    except AnswerError:
        return True


def _told(client: Client, bundle: Bundle, digest: Digest, server: str) -> Identity:
    """Of a server without configurations: what the metadata of its models says."""
    found: dict[str, dict[str, str]] = {}
    checks = []
    for model in (*ENSEMBLES.values(), *ENCODERS.values()):
        try:
            found[model] = client.parameters(model)
        except AnswerError as error:
            checks.append(statement("served as written", model, False, str(error)))
    variants = {parameters.get(VARIANT, "") for parameters in found.values()}
    variant = variants.pop() if len(variants) == 1 else ""
    reason = _reason_no_variant(bundle, variant)
    checks.append(statement("served variant", "server", not reason, reason))
    for model, parameters in found.items() if not reason else ():
        tower = next(t for t in TowerName if model in (ENSEMBLES[t], ENCODERS[t]))
        wanted = {BUNDLE: digest, WEIGHTS: bundle.manifest.edit.edited_weights_digest}
        wanted |= {ENGINE: bundle.engines(variant)[tower].digest, SPACE: space_of(bundle.manifest, variant)}
        wrong = [
            f"{key} is {parameters.get(key, 'missing')}" for key, one in wanted.items() if parameters.get(key) != one
        ]
        checks.append(statement("served as written", model, not wrong, "; ".join(wrong)))
    if bundle.manifest.head is not None:
        why = "risks of a safety head are served by Triton only"
        checks.append(statement("served risks", "server", False, why))
    devices = {key: {one.get(name, "unknown") for one in found.values()} for key, name in _TOLD.items()}
    where = {"server": server} | {key: values.pop() for key, values in devices.items() if len(values) == 1}
    return Identity(server, variant, tuple(checks), where)


def canary_checks(towers: Mapping[TowerName, ServedTower], bundle: Bundle) -> list[Check]:
    """The canaries through the encoders as they are served."""
    checks = []
    for tower, canaries in canaries_of(bundle).items():
        try:
            ratio, problem = canaries.worst(towers[tower].run(canaries.inputs)), ""
        except (AnswerError, ContractError) as error:
            ratio, problem = float("inf"), str(error)
        checks.append(
            Check(
                name="canaries",
                subject=ENCODERS[tower],
                result=Result.PASS if ratio <= RATIO_LIMIT else Result.FAIL,
                measured=None if problem else ratio,
                limit=RATIO_LIMIT,
                direction="at_most",
                detail=problem or ("" if ratio <= RATIO_LIMIT else "it does not answer like the edited model"),
                n=len(canaries.inputs),
            )
        )
    return checks


def count_checks(before: Mapping[str, Counts], after: Mapping[str, Counts], sent: Mapping[str, int]) -> list[Check]:
    """Whether the server counted what was sent, in the ensemble and in the encoder behind it.

    Args:
        before: By model.
        after: The same, later.
        sent: Rows that went to each model in between; other callers may have sent more.
    """
    checks = []
    for model, rows in sent.items():
        if model in before and model in after:
            counted = after[model].inferences - before[model].inferences
            text = f"it counted {counted} of {rows} rows: something else answered"
            checks.append(statement("statistics", model, counted >= rows, text))
    return checks


def counts_of(client: Client, models: Sequence[str] = MODELS) -> dict[str, Counts]:
    """What a server has counted of each model; empty where it counts nothing."""
    if client.counts(models[0]) is None:
        return {}
    found = {model: client.counts(model) for model in models}
    return {model: counts for model, counts in found.items() if counts is not None}


def settled_counts(client: Client, before: Mapping[str, Counts], sent: Mapping[str, int]) -> dict[str, Counts]:
    """What a server has counted once it has counted what was sent: it answers first and counts a moment later."""
    until = time.monotonic() + COUNTING_SECONDS
    while True:
        found = counts_of(client, tuple(before) or MODELS)
        if time.monotonic() > until or not any(check.blocks for check in count_checks(before, found, sent)):
            return found
        time.sleep(0.05)


def _config(client: Client, model: str, version: str) -> tuple[Message | None, str]:
    """A model's configuration, and what is wrong with its versions."""
    try:
        versions = client.versions(model)
        config = client.config(model)
    except UwmError as error:
        if not isinstance(error, AnswerError):
            raise
        return None, str(error)
    if config is None:
        return None, "the server tells no configuration"
    return config, "" if versions == [
        version
    ] else f"versions {', '.join(versions) or 'none'} are served, not {version}"


def _reason_no_variant(bundle: Bundle, variant: str) -> str:
    if not variant:
        return "the models name no variant, or each another"
    if all(engine.variant != variant for engine in bundle.manifest.engines):
        return f"the bundle has no variant {variant}"
    if reason := reason_unproven(bundle, variant):
        return f"{variant} is {reason}"
    return ""


def _as_written(model: str, config: Message, wanted: Message, digest: Digest) -> Check:
    problems = []
    named = {one.string_value for key, one in config.parameters.items() if key.startswith(BUNDLE)}
    if digest not in named:
        names = ", ".join(_short(one) for one in sorted(named)) or "unknown"
        problems.append(f"it is of bundle {names}, not {_short(digest)}")
    if _parameter(config, WEIGHTS) != _parameter(wanted, WEIGHTS):
        problems.append("it is of other weights")
    if _parameter(config, SPACE) != _parameter(wanted, SPACE):
        said = _parameter(config, SPACE) or "unknown"
        problems.append(f"its embeddings are of space {said}, not {_parameter(wanted, SPACE)}")
    if config.backend != wanted.backend and config.platform != wanted.platform:
        problems.append(f"backend {config.backend or config.platform}, not {wanted.backend or wanted.platform}")
    problems += [f"{name} is another" for name in _COMPARED if not _same(config, wanted, name)]
    return statement("served as written", model, not problems, "; ".join(problems))


def _short(digest: str) -> str:
    """Enough of a digest to tell it from others."""
    return digest[:19]


def _same(config: Message, wanted: Message, name: str) -> bool:
    left, right = getattr(config, name), getattr(wanted, name)
    return bool(list(left) == list(right) if name in ("input", "output") else left == right)


def _engine(found: Mapping[str, Message], bundle: Bundle, tower: TowerName, variant: str) -> Check:
    config = found[ENCODERS[tower]]
    named = {one.string_value for key, one in config.parameters.items() if key.startswith(ENGINE)}
    right = bundle.engines(variant)[tower].digest in named
    return statement("served engine", ENCODERS[tower], right, "its digest is not that of the bundle's engine")


def _parameter(config: Message, key: str) -> str:
    return str(config.parameters[key].string_value) if key in config.parameters else ""


def _where(server: str, found: Mapping[str, Message]) -> dict[str, str]:
    """Where the encoders run, as far as a server says it."""
    where = {"server": server}
    encoders = [found[name] for name in ENCODERS.values() if name in found]
    kinds = {group.Kind.Name(group.kind) for config in encoders for group in config.instance_group}
    if kinds == {"KIND_GPU"}:
        return where | {"device": "gpu", "provider": "CUDA, by Triton"}
    return where | {"device": "cpu" if kinds == {"KIND_CPU"} else "unknown", "provider": "unknown, by Triton"}

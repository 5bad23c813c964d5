"""Every term of both losses equals its formula in plain numpy; targets, curriculum and recalls likewise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import training_oracle as oracle
from uwm_deploy.data.nearest_captions import nearest_safe, stages_of
from uwm_deploy.errors import ContractError, InputError
from uwm_deploy.records.training import Trainer
from uwm_deploy.training.losses import (
    MemberEmbeddings,
    Targets,
    normalised_mean,
    safe_clip_terms,
    safer_clip_terms,
    weighted_sum,
)
from uwm_deploy.training.settings import PUBLISHED, settings_of
from uwm_deploy.training.trainer import recall_sum

MEMBERS = MemberEmbeddings._fields


def _embeddings(seed: int, n: int = 7, d: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(n, d)) * rng.uniform(0.5, 3.0, (n, 1)) for name in MEMBERS}


def _unit(rows: dict[str, np.ndarray]) -> MemberEmbeddings:
    """Double precision, so that nothing but the formula can differ."""
    return MemberEmbeddings(*(torch.nn.functional.normalize(torch.from_numpy(rows[name]), dim=1) for name in MEMBERS))


@pytest.mark.parametrize("seed", range(3))
def test_safe_clip_terms_equal_their_formulas(seed: int) -> None:
    """Each of the eight, on rows of any length."""
    student, reference = _embeddings(seed), _embeddings(seed + 100)
    found = safe_clip_terms(_unit(student), _unit(reference))
    wanted = oracle.safe_clip(student, reference)
    assert set(found) == set(wanted) == set(PUBLISHED[Trainer.SAFE_CLIP].weights)
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("seed", range(3))
def test_safer_clip_terms_equal_their_formulas(seed: int) -> None:
    """Each of the six, with targets that are other rows."""
    student, reference = _embeddings(seed), _embeddings(seed + 100)
    rows = np.random.default_rng(seed).integers(0, 7, 7)
    text, image = reference["safe_text"][rows], reference["safe_image"][rows]
    unit = _unit(reference)
    targets = Targets(unit.safe_text[torch.from_numpy(rows)], unit.safe_image[torch.from_numpy(rows)])
    found = safer_clip_terms(_unit(student), unit, targets)
    wanted = oracle.safer_clip(student, reference, text, image)
    assert set(found) == set(wanted) == set(PUBLISHED[Trainer.SAFER_CLIP].weights)
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-9), name


def test_the_released_weights_are_normalised_and_averaged() -> None:
    """Safe-CLIP: weights divided by their sum, the weighted sum by the number of terms."""
    student, reference = _embeddings(1), _embeddings(2)
    weights = PUBLISHED[Trainer.SAFE_CLIP].weights
    assert sorted(weights.values()) == [0.1, 0.1, 0.1, 0.2, 0.25, 0.25, 0.25, 0.5]
    terms = oracle.safe_clip(student, reference)
    wanted = sum(weights[name] / 1.75 * value for name, value in terms.items()) / 8
    assert float(normalised_mean(safe_clip_terms(_unit(student), _unit(reference)), weights)) == pytest.approx(wanted)


def test_weights_of_other_terms_are_refused() -> None:
    """A term without weight would drop out in silence."""
    with pytest.raises(ContractError, match="weights are of"):
        weighted_sum({"a": torch.ones(())}, {"b": 1.0})


def test_only_its_own_member_moves_a_term() -> None:
    """The gradient of a term reaches the member that it is about, and no other."""
    student = MemberEmbeddings(*(part.requires_grad_() for part in _unit(_embeddings(3))))
    reference = _unit(_embeddings(4))
    terms = safe_clip_terms(student, reference)
    owner = {
        f"{tower}{kind}_{what}": f"{'safe' if what == 'preservation' else 'unsafe'}_{tower}"
        for tower in ("text", "image")
        for kind in ("", "_contrast")
        for what in ("preservation", "redirection")
    }
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, list(student), retain_graph=True, allow_unused=True)
        reached = [field for field, gradient in zip(MEMBERS, gradients, strict=True) if gradient is not None]
        assert reached == [owner[name]], name


def test_the_nearest_safe_caption_is_the_one_with_the_largest_cosine() -> None:
    """Also when there are more captions than are compared at a time, and of equals the first."""
    unsafe, safe = _embeddings(5, 40)["unsafe_text"], _embeddings(6, 31)["safe_text"]
    safe[17] = 2 * safe[4]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (unsafe, safe)]
    unit[1][17] = unit[1][4]
    rows, cosines = nearest_safe(*unit)
    assert rows.tolist() == oracle.nearest(unsafe, safe)
    assert cosines == pytest.approx([oracle.cosine(unsafe[i], safe[j]) for i, j in enumerate(rows)])


def test_the_curriculum_has_thirds_with_the_nearest_first() -> None:
    """Every pair of an earlier stage is at least as near as every pair of a later one."""
    cosine = np.random.default_rng(0).uniform(-1, 1, 10)
    stages = stages_of(cosine)
    assert sorted(np.bincount(stages).tolist()) == [3, 3, 4]
    assert cosine[stages == 0].min() >= cosine[stages == 1].max()
    assert cosine[stages == 1].min() >= cosine[stages == 2].max()


def test_the_published_recall_leaves_out_unsafe_texts_for_unsafe_images() -> None:
    """Six recalls at 1, both ways of three pairs of members."""
    rows = _embeddings(7, 9, 5)
    unit = _unit(rows)
    pairs = (("safe_text", "safe_image"), ("safe_text", "unsafe_image"), ("unsafe_text", "safe_image"))
    wanted = sum(oracle.recall_at_1(rows[a], rows[b]) + oracle.recall_at_1(rows[b], rows[a]) for a, b in pairs)
    assert recall_sum(*(part.numpy() for part in unit)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rate": float("nan")}, "rate"), ({"epochs": 0}, "epochs"), ({"validation_share": 1.0}, "share")],
)
def test_settings_out_of_range_are_refused(changed: dict[str, float], message: str) -> None:
    """Before anything is read."""
    with pytest.raises(InputError, match=message):
        settings_of(Trainer.SAFE_CLIP, **changed)

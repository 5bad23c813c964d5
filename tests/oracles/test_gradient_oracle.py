"""Importance from two passes and many parts against finite differences of the published losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import gradient_oracle as oracle
from uwm_deploy.edits.gradient import LOSSES, Embedded, GradientScorer, only_requiring_grad
from uwm_deploy.errors import ContractError

SLOW = {"gradient-unsafe": oracle.loss_unsafe, "gradient-safe-clip": oracle.loss_safe_clip}
DIM = 3


def _embed(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """A layer between two curved steps, so that nothing is linear in the weight."""
    hidden = np.tanh(np.sin(inputs) @ weight.T)
    return hidden.cumsum(1) + 0.1


def _module(weight: np.ndarray) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight.data.copy_(torch.from_numpy(weight))
    return layer


def _data(seed: int, pairs: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(seed)
    fixed = tuple(rng.normal(size=(pairs, DIM)) for _ in range(3))
    return rng.normal(size=(DIM, 4)), rng.normal(size=(pairs, 4)), fixed


def _importance(name: str, weight, inputs, fixed, batch: int, part: int, cut: int, left_out=None) -> GradientScorer:
    layer = _module(weight)

    def embed(rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(layer(rows.sin())).cumsum(1) + 0.1

    scorer = GradientScorer(embed, {"layer": layer.weight}, LOSSES[name], batch, part, left_out or (lambda ids: None))
    with only_requiring_grad(layer, {"layer": layer.weight}):
        for start in range(0, len(inputs), cut):
            rows = slice(start, start + cut)
            given = torch.from_numpy(inputs[rows])
            with torch.no_grad():
                embedded = Embedded(embed(given), *(torch.from_numpy(side[rows]) for side in fixed))
            scorer.add([str(i) for i in range(start, start + len(given))], given, embedded)
        scorer.finish()
    return scorer


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 9),
    batch=st.integers(1, 9),
    part=st.integers(1, 5),
    cut=st.integers(1, 9),
    name=st.sampled_from(list(LOSSES)),
)
def test_importance_equals_finite_differences(seed, pairs, batch, part, cut, name) -> None:
    """For any batch size, and however the batch is cut for the two passes."""
    weight, inputs, fixed = _data(seed, pairs)
    slow = oracle.importance(SLOW[name], _embed, weight, inputs, fixed, batch)
    scorer = _importance(name, weight, inputs, fixed, batch, part, cut)
    assert scorer.count == pairs
    assert scorer.batches == -(-pairs // batch)
    np.testing.assert_allclose(scorer.score("layer").numpy(), slow, rtol=1e-4, atol=1e-6 * max(1.0, slow.max()))


@pytest.mark.parametrize("name", list(LOSSES))
def test_importance_depends_on_the_batch(name: str) -> None:
    """The absolute value is of a batch's gradient: another batch size is another importance."""
    weight, inputs, fixed = _data(0, 8)
    one, two = (_importance(name, weight, inputs, fixed, batch, 8, 8).score("layer") for batch in (8, 2))
    assert float((one - two).abs().max()) > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_pair_never_poisons_a_batch(value: float) -> None:
    """An embedding that is not finite, or has no direction, leaves its pair out; the rest is as if it were not there."""
    weight, inputs, fixed = _data(1, 6)
    clean = [np.delete(part, 2, 0) for part in (inputs, *fixed)]
    wanted = _importance("gradient-safe-clip", weight, clean[0], tuple(clean[1:]), 5, 2, 5).score("layer")
    fixed[1][2] = value
    named: list[str] = []
    scorer = _importance("gradient-safe-clip", weight, inputs, fixed, 5, 2, 3, named.extend)
    assert named == ["2"]
    assert scorer.count == 5
    torch.testing.assert_close(scorer.score("layer"), wanted)


def test_a_layer_without_a_gradient_is_an_error() -> None:
    """A weight that the embedding does not depend on has no importance, not an importance of zero."""
    layer = torch.nn.Linear(4, DIM)
    scorer = GradientScorer(
        lambda x: x[:, :DIM], {"a.b": layer.weight}, LOSSES["gradient-unsafe"], 4, 4, lambda _: None
    )
    rows = torch.randn(4, 4)
    with only_requiring_grad(layer, {"a.b": layer.weight}):
        scorer.add(list("abcd"), rows, Embedded(*(torch.randn(4, DIM) for _ in range(4))))
    with pytest.raises(ContractError, match=r"a\.b was never reached"):
        scorer.score("a.b")


def test_what_requires_gradients_comes_back() -> None:
    """Flags and gradients are as before, also after an error."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.grad = torch.ones(2)

    def fail() -> None:
        with only_requiring_grad(model, {"0": model[0].weight}):
            assert [p.requires_grad for p in model.parameters()] == [True, False, False, False]
            assert model[1].bias.grad is None
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model[1].bias.grad.tolist() == [1, 1]

"""The pooled token alone goes through what follows the last attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from tests.families import QUICK_FAMILIES, model_of, reduced
from uwm_deploy.graphs import passes
from uwm_deploy.graphs.layers import linear_layers
from uwm_deploy.graphs.passes import simplify
from uwm_deploy.graphs.pooling import pool_early
from uwm_deploy.graphs.tracing import graph_from_module
from uwm_deploy.records.model import TowerName
from uwm_deploy.stages.traced import sample_of

TOKENS, WIDTH = 7, 8


def exported(module: nn.Module, sample: Tensor, outputs: int = 1) -> ir.Model:
    """As export makes it."""
    names = [f"out_{i}" for i in range(outputs)]
    model = graph_from_module(module.eval(), sample, opset=18, input_name="x", output_names=names)
    for value in model.graph.initializers.values():
        value.name = (value.name or "").removeprefix("module.")
    simplify(model, {name for name, _ in module.named_parameters()})
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    return model


def answers(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    proto = ir.serde.serialize_model(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {proto.graph.input[0].name: x})
    return found


def entering(model: ir.Model) -> dict[str, int]:
    """How many tokens enter each linear layer; 0 where there is no such dimension."""
    found = {}
    for name, layer in linear_layers(model).items():
        value = layer.node.inputs[0]
        assert value is not None
        assert value.shape is not None
        tokens = value.shape[1] if len(value.shape) == 3 else 0
        assert isinstance(tokens, int)
        found[name] = tokens
    return found


@pytest.mark.parametrize("tower", list(TowerName))
@pytest.mark.parametrize("family", QUICK_FAMILIES)
def test_every_family_pools_before_its_last_layers(
    family: str, tower: TowerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same embedding, same weights; the layers after the last attention see one token, all others see all."""
    model = model_of(family)
    part, text = model.tower(tower), model.ref.text
    side = model.ref.image.crop
    sample = sample_of(part, (3, side, side) if tower is TowerName.IMAGE else (text.context_length,), text.eos_id)
    sample = sample if sample.is_floating_point() else sample.to(torch.int32)

    def graph() -> ir.Model:
        found = graph_from_module(
            part.graph_module(), sample, opset=reduced(family).export.opset, input_name=part.input_name,
            output_names=part.output_names,
        )  # fmt: skip
        simplify(found, {name for name, _ in part.graph_module().named_parameters()})
        return found

    early = graph()
    monkeypatch.setattr(passes, "pool_early", lambda _: None)
    late = graph()
    proto = ir.serde.serialize_model(early)
    onnx.checker.check_model(proto, full_check=True)
    assert set(early.graph.initializers) >= {n for n, v in late.graph.initializers.items() if "." in n}
    x = np.concatenate([sample.numpy(), sample.numpy()[::-1]])
    for wanted, found in zip(answers(late, x), answers(early, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    before, after = entering(late), entering(early)
    assert list(after) == list(before)
    moved = [name for name in after if after[name] != before[name]]
    if tower is TowerName.IMAGE and family.startswith("siglip"):
        assert not moved  # its pooling is an attention with one query: there are no other tokens after it
    else:
        assert moved
        assert all(before[name] > 1 and after[name] == 1 for name in moved)


class Block(nn.Module):
    """Attention over tokens, what works on each alone, and the choice of one."""

    def __init__(self, choice: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.norm, self.choice = nn.LayerNorm(WIDTH), choice
        self.places = nn.Parameter(torch.randn(1, TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Any:
        mixed = self.mix(torch.softmax(x @ x.transpose(1, 2), -1) @ x)
        if self.choice == "position per token":
            mixed = mixed + self.places
        hidden = mixed + self.down(torch.sigmoid(self.up(self.norm(mixed))))
        if self.choice == "last":
            return hidden[:, -1]
        if self.choice == "largest":
            return hidden[torch.arange(hidden.shape[0]), x[:, :, 0].argmax(-1)]
        if self.choice == "all are read":
            return hidden[:, 0] * 2, hidden
        if self.choice == "mean beside it":
            return hidden[:, 0] + hidden.mean(1)
        return hidden[:, 0]


@pytest.mark.parametrize(
    ("choice", "tokens"),
    [
        ("first", {"mix": 1, "up": 1, "down": 1}),
        ("last", {"mix": 1, "up": 1, "down": 1}),
        ("largest", {"mix": 1, "up": 1, "down": 1}),
        ("position per token", {"mix": TOKENS, "up": 1, "down": 1}),  # what it is added to still has its tokens
        ("all are read", {"mix": TOKENS, "up": TOKENS, "down": TOKENS}),
        ("mean beside it", {"mix": TOKENS, "up": TOKENS, "down": TOKENS}),
    ],
)
def test_only_what_is_read_for_one_token_moves(choice: str, tokens: dict[str, int]) -> None:
    """Everything else stays as it is, and the answers are PyTorch's in any case."""
    block = Block(choice).eval()
    x = torch.randn(5, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = block(x)
    wanted = wanted if isinstance(wanted, tuple) else (wanted + 0,)
    model = exported(Normalised(block), x[:2], len(wanted))
    assert {name.removeprefix("inner."): n for name, n in entering(model).items()} == tokens
    for one, found in zip(wanted, answers(model, x.numpy()), strict=True):
        np.testing.assert_allclose(found, one.numpy() * 3, rtol=1e-4, atol=1e-5)


class Normalised(nn.Module):
    """Something after the choice, which is not the graph's output itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.inner(x)
        return tuple(part * 3 for part in (found if isinstance(found, tuple) else (found,)))


def test_choices_in_graphs_that_no_exporter_made() -> None:
    """Two branches of one value with the same index, and a batch that does not vary with a constant of its shape."""
    text = """
        <ir_version: 9, opset_import: ["" : 18]>
        agraph (float[1,3,4] x) => (float[1,4] one, float[1,4] two)
        <float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4,4] v = {4,3,2,1,8,7,6,5,3,2,1,9,7,6,5,4},
         float[1,3,4] p = {1,2,3,4,5,6,7,8,9,10,11,12}, int64 i = {2}>
        {
            s = Softmax (x)
            a = MatMul (s, w)
            first = Gather <axis: int = 1> (a, i)
            one = Neg (first)
            b = Add (s, p)
            c = MatMul (b, v)
            second = Gather <axis: int = 1> (c, i)
            two = Neg (second)
        }
    """
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    before = answers(model, x)
    pool_early(model)
    assert sum(node.op_type == "Gather" for node in model.graph) == 3  # of s for each, and of the constant
    for wanted, found in zip(before, answers(model, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_choice_that_is_the_output_stays() -> None:
    """Outputs keep name and shape."""
    model = exported(Block("first"), torch.randn(2, TOKENS, WIDTH))
    assert set(entering(model).values()) == {TOKENS}
    assert [len(v.shape) for v in model.graph.outputs if v.shape is not None] == [2]

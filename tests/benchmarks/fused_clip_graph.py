"""CLIP as an ONNX graph the way photo servers export it, in float32.

Opset 23, one `Attention` node per layer, query, key and value as one product, and a last block that computes the pooled
token alone. Written here from those facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 23


class Graph:
    """Nodes and constants of one tower, in the order they run."""

    def __init__(self, weights: Mapping[str, np.ndarray], prefix: str) -> None:
        self.weights, self.prefix = weights, prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def tensor(self, name: str) -> np.ndarray:
        return np.asarray(self.weights[f"{self.prefix}.{name}"])

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def add(self, operator: str, inputs: list[str], outputs: int = 1, **attributes: object) -> list[str]:
        found = [f"v{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, found, **attributes))
        return found

    def linear(self, value: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        value = self.add("MatMul", [value, self.constant(f"{name}.weight", weight.T)])[0]
        return value if bias is None else self.add("Add", [value, self.constant(f"{name}.bias", bias)])[0]

    def norm(self, value: str, name: str) -> str:
        parts = [self.constant(f"{name}.{part}", self.tensor(f"{name}.{part}")) for part in ("weight", "bias")]
        return self.add("LayerNormalization", [value, *parts], axis=-1, epsilon=1e-5)[0]

    def block(self, value: str, number: int, heads: int, *, causal: bool, pooled: tuple[str, str] | None) -> str:
        """One layer; with `pooled`, the token's own row and its mask, the query is that token alone."""
        at = f"encoder.layers.{number}"
        normed = self.norm(value, f"{at}.layer_norm1")

        def part(kind: str, names: str) -> np.ndarray:
            return np.concatenate([self.tensor(f"{at}.self_attn.{one}_proj.{kind}") for one in names])

        if pooled is None:
            joined = self.linear(normed, f"{at}.qkv", part("weight", "qkv"), part("bias", "qkv"))
            rows, mask = self.add("Split", [joined], 3, axis=-1, num_outputs=3), ""
        else:
            index, mask = pooled
            value = self.picked(value, index)
            query = self.linear(
                self.picked(normed, index), f"{at}.q", part("weight", "q"), part("bias", "q")
            )  # one token
            joined = self.linear(normed, f"{at}.kv", part("weight", "kv"), part("bias", "kv"))
            rows = [query, *self.add("Split", [joined], 2, axis=-1, num_outputs=2)]
        attended = self.add(
            "Attention", [*rows, *([mask] if mask else [])], q_num_heads=heads, kv_num_heads=heads,
            is_causal=int(causal and pooled is None),
        )[0]  # fmt: skip
        out = f"{at}.self_attn.out_proj"
        value = self.add(
            "Add", [value, self.linear(attended, out, self.tensor(f"{out}.weight"), self.tensor(f"{out}.bias"))]
        )[0]
        hidden = self.norm(value, f"{at}.layer_norm2")
        for name in ("fc1", "fc2"):
            whole = f"{at}.mlp.{name}"
            hidden = self.linear(hidden, whole, self.tensor(f"{whole}.weight"), self.tensor(f"{whole}.bias"))
            if name == "fc1":
                factor = self.constant("quick", np.float32(1.702))
                gate = self.add("Sigmoid", self.add("Mul", [hidden, factor]))[0]
                hidden = self.add("Mul", [hidden, gate])[0]
        return self.add("Add", [value, hidden])[0]

    def picked(self, value: str, index: str) -> str:
        """Row of each item at an index: (n, L, d) and (n, 1, 1) to (n, 1, d)."""
        return self.add("GatherND", [value, index], batch_dims=1)[0]

    def finish(self, value: str, projection: np.ndarray) -> str:
        """Projection, and length 1."""
        value = self.linear(value, "projection", projection, None)
        return self.add("LpNormalization", [value], axis=-1, p=2)[0]

    def write(self, path: Path, entry: onnx.ValueInfoProto, result: str, width: int) -> None:
        output = helper.make_tensor_value_info("embeds", TensorProto.FLOAT, ["batch", width])
        self.nodes.append(helper.make_node("Identity", [result], ["embeds"]))
        graph = helper.make_graph(self.nodes, "clip", [entry], [output], list(self.constants.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)


def _zeros_of(graph: Graph, entry: str) -> str:
    """(n, 1) int64 zeros, as many as there are items."""
    count = graph.add("Shape", [entry], start=0, end=1)[0]
    size = graph.add("Concat", [count, graph.constant("one", np.array([1], np.int64))], axis=0)[0]
    return graph.add("ConstantOfShape", [size], value=numpy_helper.from_array(np.zeros(1, np.int64)))[0]


def image_graph(weights: Mapping[str, np.ndarray], config: Mapping[str, int], path: Path) -> None:
    """Writes the image tower: (n, 3, H, W) float32 to (n, d) float32."""
    graph, width = Graph(weights, "vision_model"), config["hidden_size"]
    side, layers, heads = config["image_size"], config["num_hidden_layers"], config["num_attention_heads"]
    entry = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, side, side])
    kernel = graph.constant("patch", graph.tensor("embeddings.patch_embedding.weight"))
    size = config["patch_size"]
    patches = graph.add("Conv", ["pixel_values", kernel], kernel_shape=[size, size], strides=[size, size])[0]
    flat = graph.add("Reshape", [patches, graph.constant("flat", np.array([0, width, -1], np.int64))])[0]
    tokens = graph.add("Transpose", [flat], perm=[0, 2, 1])[0]
    zeros = _zeros_of(graph, "pixel_values")
    table = graph.constant("class", graph.tensor("embeddings.class_embedding").reshape(1, width))
    first = graph.add("Gather", [table, zeros], axis=0)[0]
    places = graph.constant("places", graph.tensor("embeddings.position_embedding.weight"))
    value = graph.add("Add", [graph.add("Concat", [first, tokens], axis=1)[0], places])[0]
    value = graph.norm(value, "pre_layrnorm")
    index = graph.add("Unsqueeze", [zeros, graph.constant("last", np.array([-1], np.int64))])[0]
    for number in range(layers):
        value = graph.block(value, number, heads, causal=False, pooled=(index, "") if number == layers - 1 else None)
    value = graph.add("Reshape", [value, graph.constant("rows", np.array([-1, width], np.int64))])[0]
    projection = np.asarray(weights["visual_projection.weight"])
    graph.write(path, entry, graph.finish(graph.norm(value, "post_layernorm"), projection), len(projection))


def text_graph(weights: Mapping[str, np.ndarray], config: Mapping[str, int], path: Path) -> None:
    """Writes the text tower: (n, L) int64 ids to (n, d) float32."""
    graph, width = Graph(weights, "text_model"), config["hidden_size"]
    length, layers, heads = (
        config["max_position_embeddings"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
    )
    entry = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", length])
    table = graph.constant("tokens", graph.tensor("embeddings.token_embedding.weight"))
    places = graph.constant("places", graph.tensor("embeddings.position_embedding.weight"))
    value = graph.add("Add", [graph.add("Gather", [table, "input_ids"], axis=0)[0], places])[0]
    end = graph.add("ArgMax", ["input_ids"], axis=-1, keepdims=1)[0]  # the token of the end has the largest id
    last = graph.constant("last", np.array([-1], np.int64))
    index = graph.add("Unsqueeze", [end, last])[0]
    seen = graph.add("LessOrEqual", [graph.constant("steps", np.arange(length, dtype=np.int64)), index])[0]
    mask = graph.add("Unsqueeze", [seen, graph.constant("heads", np.array([1], np.int64))])[0]
    for number in range(layers):
        value = graph.block(value, number, heads, causal=True, pooled=(index, mask) if number == layers - 1 else None)
    value = graph.add("Reshape", [value, graph.constant("rows", np.array([-1, width], np.int64))])[0]
    projection = np.asarray(weights["text_projection.weight"])
    graph.write(path, entry, graph.finish(graph.norm(value, "final_layer_norm"), projection), len(projection))

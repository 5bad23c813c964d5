"""Attention in steps, as one `Attention` node and as ONNX Runtime's own MultiHeadAttention, on the CPU.

    python tests/benchmarks/bench_attention.py IMAGE.onnx TEXT.onnx --batch 1 --batch 8

Takes exported graphs, such as those in a bundle's `onnx/`. All three are optimised alike and take turns with one thread.
What is compared is the processor time of a call, which other work on the machine disturbs least. Printed are the medians of
the ratios to the steps, and the largest difference of an embedding's entry.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from uwm_deploy.graphs.attention import fused_file


def own_operator(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with ONNX Runtime's own operator in the place of the standard one."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    for node in own.graph.node:
        if node.op_type != "Attention":
            continue
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        masks = ["", "", node.input[3]] if len(node.input) > 3 else []
        inputs, outputs = [*node.input[:3], *masks], list(node.output)
        node.CopyFrom(
            onnx.helper.make_node(
                "MultiHeadAttention", inputs, outputs, domain="com.microsoft",
                num_heads=given["q_num_heads"], scale=given["scale"],
            )
        )  # fmt: skip
    own.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return own


def opened(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session with one thread."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rows_for(given: ort.NodeArg, count: int) -> np.ndarray:
    """Noise, or ids; (count, ...) in the dtype of the input."""
    rng, shape = np.random.default_rng(0), (count, *given.shape[1:])
    if given.type == "tensor(float)":
        return rng.standard_normal(shape).astype(np.float32)
    if given.type == "tensor(uint8)":
        return rng.integers(0, 256, shape).astype(np.uint8)
    return rng.integers(1, 400, shape).astype(np.int64 if "64" in given.type else np.int32)


def ratios(sessions: Sequence[ort.InferenceSession], feed: dict[str, np.ndarray], seconds: float) -> list[float]:
    """Median over the turns of each session's processor time, divided by the first one's."""
    turns: list[list[float]] = []
    begun = time.perf_counter()
    while len(turns) < 5 or time.perf_counter() - begun < seconds:
        took = [0.0] * len(sessions)
        first = len(turns) % len(sessions)
        for which in (*range(first, len(sessions)), *range(first)):
            started = time.process_time()
            sessions[which].run(None, feed)
            took[which] = time.process_time() - started
        turns.append(took)
    return [statistics.median(took[which] / took[0] for took in turns) for which in range(len(sessions))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("graphs", nargs="+", type=Path)
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--seconds", type=float, default=10.0, help="of turns at one batch size")
    arguments = parser.parse_args()
    print(
        "| graph | batch | one node | own operator | apart, one node | apart, own operator |\n|---|---|---|---|---|---|"
    )
    for path in arguments.graphs:
        fused, _ = fused_file(path)
        sessions = [opened(model) for model in (onnx.load(path), fused, own_operator(fused))]
        given = sessions[0].get_inputs()[0]
        for batch in arguments.batch or (1, 8, 32):
            feed = {given.name: rows_for(given, batch)}
            answers = [session.run(None, feed)[0] for session in sessions]
            apart = [float(np.abs(answer - answers[0]).max()) for answer in answers]
            _, node, own = ratios(sessions, feed, arguments.seconds)
            name = f"{path.parent.parent.name}/{path.name}"
            print(f"| {name} | {batch} | {node:.2f} | {own:.2f} | {apart[1]:.1g} | {apart[2]:.1g} |", flush=True)


if __name__ == "__main__":
    main()

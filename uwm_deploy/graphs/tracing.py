"""From a PyTorch module to the exporter's graph, traced once.

`torch.onnx.export` traces a module, and then traces the result again to decompose operators that it cannot translate. In
most towers these are only conversions and variants of operators that it knows; this module replaces them one by one.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config
from torch.onnx import OnnxExporterError

from uwm_deploy.runtime.memory import without_collection

_ATEN = torch.ops.aten
_CONVERSIONS = frozenset({_ATEN.to.dtype, _ATEN.to.device, _ATEN.to.dtype_layout, _ATEN.to.other})
"""Operators that convert a type and that the exporter does not know; it knows `_to_copy`, which does the same."""

_IDLE = frozenset({_ATEN.contiguous.default, _ATEN.detach.default, _ATEN.alias.default})
"""Operators that only concern PyTorch's memory and autograd, and have no effect in a graph."""


class _Whole(ExportedProgram):
    """A program of operators that can all be translated as they are."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        """Nothing to do."""
        return self


@torch.no_grad()
def graph_from_module(
    module: nn.Module, sample: Tensor, *, opset: int, input_name: str, output_names: Sequence[str], further: str = ""
) -> ir.Model:
    """Traces a module; the first dimension of its input, named ``batch``, may vary, and the second where it has a name.

    Args:
        module: Takes one tensor; in evaluation mode.
        sample: Two rows of input, (2, 3, H, W) float32 pixels or (2, L) int64 ids.
        opset: Opset of the graph.
        input_name: Name of the graph's input.
        output_names: Names of its outputs.
        further: Name of the second dimension of the input, if it varies; the sample then needs another size of it than 2.

    Returns:
        The graph as the exporter makes it; it shares the weights of the module.
    """
    varying = {0: "batch"} | ({1: further} if further else {})
    with _quiet(), without_collection():
        program = _program_of(module, sample, varying)
        if _made_whole(program):
            with contextlib.suppress(OnnxExporterError):  # an operator has to be decomposed after all
                return _translated(program, sample, opset, [input_name], list(output_names), varying)
            program = _program_of(module, sample, varying)
        return _translated(program, sample, opset, [input_name], list(output_names), varying)


def _program_of(module: nn.Module, sample: Tensor, varying: Mapping[int, str]) -> ExportedProgram:
    # As in the exporter: tracing must not specialise on a batch of two rows.
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined] # put there when it is imported
        dynamic = (dict.fromkeys(varying, Dim.DYNAMIC),)
        return torch.export.export(module, (sample,), dynamic_shapes=dynamic, strict=False)


def _translated(
    program: ExportedProgram,
    sample: Tensor,
    opset: int,
    input_names: list[str],
    output_names: list[str],
    varying: Mapping[int, str],
) -> ir.Model:
    translated = torch.onnx.export(
        program, (sample,), dynamo=True, optimize=False, verbose=False, opset_version=opset, input_names=input_names,
        output_names=output_names, dynamic_shapes=(dict(varying),),
    )  # fmt: skip
    assert translated is not None
    model: ir.Model = translated.model
    return model


def _made_whole(program: ExportedProgram) -> bool:
    """Replaces and removes operators; returns False, and changes nothing, where some are in-place or nested."""
    if not all(_is_plain(node) for node in program.graph.nodes):
        return False
    for node in list(program.graph.nodes):
        if node.op == "call_function" and (found := _equal_to(node)) is not None:
            node.replace_all_uses_with(found)
            program.graph.erase_node(node)
    program.graph_module.recompile()
    program.__class__ = _Whole
    return True


def _is_plain(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable
    return node.op in ("placeholder", "output") or not isinstance(node.target, torch._ops.HigherOrderOperator)


def _equal_to(node: fx.Node) -> fx.Node | None:
    """Replacement of a node: its input where it has no effect, an operator that can be translated, or None to keep it."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or any(user.op == "output" for user in node.users):  # known by its name
        return None
    if node.target in _IDLE or (node.target is _ATEN.dropout.default and node.args[2] is False):
        return source
    if node.target in _CONVERSIONS:
        dtype = node.meta["val"].dtype
        same = source.meta["val"].dtype == dtype
        return source if same else _instead_of(node, _ATEN._to_copy.default, (source,), {"dtype": dtype})
    if node.target is _ATEN.conv2d.padding and node.args[4:5] in ((), ("valid",)):
        return _instead_of(node, _ATEN.conv2d.default, (*node.args[:4], [0, 0], *node.args[5:]), node.kwargs)
    return None


def _instead_of(node: fx.Node, target: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> fx.Node:
    with node.graph.inserting_before(node):
        other = node.graph.call_function(target, arguments, named)
    other.meta = dict(node.meta)
    return other


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's log and warnings, which are not about the model."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

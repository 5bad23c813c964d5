"""Turns an exporter's graph into a lean one in which every weight keeps its name.

The exporter's own optimiser folds transposed weights into new tensors and merges equal ones. Names and sharing would then
depend on weight *values*, so the edit could not be found again, and no other patch be applied.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRuleSet, rewrite
from onnxscript.rewriter.rules import common as rules

from uwm_deploy.graphs.pooling import pool_early

_RULES = RewriteRuleSet(
    [
        rules.add_0_rule,
        rules.cast_cast_rule,
        rules.collapse_slice2_rule,
        rules.collapse_slice_rule,
        rules.div_by_1_rule,
        rules.materialize_reshape_shape_rule,
        rules.mul_by_1_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.no_op_transpose_rule,
        rules.reshape_reshape_rule,
        rules.sub_0_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
    ]
)
"""Rewrite rules that match something in transformers; trying all rules takes longer than tracing the model."""

_FOLD_LIMIT = 64
"""Largest number of elements of a constant that is folded: the result of a larger one may be large."""


def simplify(model: ir.Model, weights: Set[str]) -> None:
    """Inlines functions, folds small constants, removes unused nodes and strips metadata, in place.

    Args:
        model: The exporter's graph.
        weights: Names of the weights; each keeps its name and value, and is not folded into anything.

    The exporter's metadata holds source paths, which are private and differ between machines.
    """
    common.InlinePass()(model)
    optimizer.fold_constants_ir(model, should_fold=partial(_should_fold, weights))
    rewrite(model, pattern_rewrite_rules=_RULES)
    steps = (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=False),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ShapeInferencePass(),  # passes that change types later need the types of all values
        common.ClearMetadataAndDocStringPass(),
    )
    for step in steps:
        step(model)
    pool_early(model)
    for name in list(model.graph.initializers):
        value = model.graph.initializers[name]
        if name not in weights and not value.uses():
            del model.graph.initializers[name]
    for value in (v for node in model.graph for v in node.outputs):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "uwm-deploy", ""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _should_fold(weights: Set[str], node: ir.Node) -> bool:
    return all(
        value is None
        or value.const_value is None
        or (value.name not in weights and value.const_value.size <= _FOLD_LIMIT)
        for value in node.inputs
    )

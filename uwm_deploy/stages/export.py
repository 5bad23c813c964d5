"""Stage `export`: a tower to an ONNX graph that provably holds the edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from uwm_deploy.bundle.layout import tower_record
from uwm_deploy.edits.patch import Patch
from uwm_deploy.errors import ContractError
from uwm_deploy.graphs.fingerprint import fingerprint_of_graph
from uwm_deploy.graphs.write import INLINE_BYTES, weightless, write_graph
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.codec import read_record, write_record
from uwm_deploy.records.edit import EditRecord, TensorEdit
from uwm_deploy.records.graph import TOKENS, Fingerprint, Normalisation, OnnxArtifact, RowLengths, TensorSpec
from uwm_deploy.records.model import Digest, TowerName
from uwm_deploy.stages.job import Job
from uwm_deploy.stages.models import Models
from uwm_deploy.stages.text_rows import WHOLE, WHOLE_ROWS, TextRows, text_rows
from uwm_deploy.stages.traced import in_its_type, normalisation_of, sample_for, traced
from uwm_deploy.towers.protocol import Tower

_EXPORTERS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


def onnx_from_tower(
    tower: Tower,
    sample: Tensor,
    spec: ExportSpec,
    *,
    weights_digest: Digest,
    edits: Sequence[TensorEdit],
    patch: Patch,
    folder: Path,
    external_data_bytes: int = INLINE_BYTES,
    head_digest: Digest = "",
    normalisation: Normalisation | None = None,
    rows: TextRows = WHOLE,
) -> OnnxArtifact:
    """Exports one tower and checks what came out.

    Args:
        tower: The edited tower, on the CPU.
        sample: Two rows of input, (2, 3, H, W) float32 or (2, L) int64; with one row exporters silently fix the batch to 1.
        spec: Opset, normalisation, id type.
        weights_digest: Of the edited model.
        edits: Edited layers of this tower.
        patch: Patch of the model.
        folder: Where ``<tower>.onnx`` goes.
        external_data_bytes: Size of weights above which they go into ``<tower>.onnx.data``.
        head_digest, normalisation: Of the safety head that the tower has, or empty; see `traced`.
        rows: Which lengths the rows of a text graph may have, see `text_rows`.

    Raises:
        ContractError: If the graph lost the edit, a weight's name or the dynamic batch, leaves the standard domain, or
            the tower does not pool at the end token.
    """
    _check_pooling(tower, sample := in_its_type(sample, spec))
    model = traced(tower, sample, spec, normalisation, rows.lengths)
    name = f"{tower.name.value}.onnx"
    arrays = {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value is not None}
    external = f"{name}.data" if sum(array.nbytes for array in arrays.values()) > external_data_bytes else ""
    proto = weightless(model)
    _check_graph(name, proto, set(arrays), tower, spec, rows.lengths)
    with ThreadPoolExecutor(1) as pool:  # hashing and writing both leave the interpreter to others
        found = pool.submit(fingerprint_of_graph, arrays, edits, patch.tensors)
        digest = write_graph(model, folder / name, external)
    _check_edit(name, fingerprint := found.result())
    return OnnxArtifact(
        tower=tower.name,
        file=name,
        external_data=external,
        digest=digest,
        weights_digest=weights_digest,
        opset=spec.opset,
        inputs=(
            dataclasses.replace(_spec_of(proto.graph.input[0]), normalisation=normalisation, lengths=rows.lengths),
        ),
        outputs=tuple(_spec_of(v) for v in proto.graph.output),
        normalised=spec.normalise,
        versions={package: metadata.version(package) for package in _EXPORTERS},
        fingerprint=fingerprint,
        head_digest=head_digest,
        whole_rows=rows.why_whole,
    )


@torch.no_grad()
def _check_pooling(tower: Tower, sample: Tensor) -> None:
    """The text embedding is read at the first end token: what follows changes nothing, the word before it does.

    A configuration with another end id than the tokenizer's makes transformers pool at the largest id, or at the start.
    """
    mask = tower.valid_tokens(sample)
    if mask is None or not tower.pools_at_end:
        return
    end = int(mask[0].sum()) - 1
    eos_id, length = int(sample[0, end]), sample.shape[1]
    if length < 4 or bool(mask[0].all()):
        raise ContractError("the sample text has no end token with room after it", fix="pass a caption and its padding")
    words = max(m.num_embeddings for m in tower.graph_module().modules() if isinstance(m, nn.Embedding))
    others = [i for i in (words - 1, 0, 1, 2) if i != eos_id]
    base = torch.full_like(sample[:1], eos_id)
    base[0, 0], base[0, 1] = others[0], others[1]
    after, before = base.clone(), base.clone()
    after[0, 3:] = others[0]
    before[0, 1] = others[2]
    embeds = tower.embed(torch.cat([base, after, before]))
    scale = float(embeds[0].abs().max())
    if float((embeds[1] - embeds[0]).abs().max()) > 1e-4 * scale or torch.equal(embeds[2], embeds[0]):
        raise ContractError(
            f"the text tower does not pool at its end token (id {eos_id})", fix="set eos_token_id in its config.json"
        )


def _check_graph(
    file: str, proto: onnx.ModelProto, names: Set[str], tower: Tower, spec: ExportSpec, lengths: RowLengths | None
) -> None:
    """Checks the graph's message, in which large weights are inputs after the one that is the graph's own."""
    onnx.checker.check_model(proto, full_check=True)
    opsets = [(o.domain, o.version) for o in proto.opset_import]
    if opsets != [("", spec.opset)]:
        raise ContractError(f"{file} imports {opsets}, not opset {spec.opset}", fix="use an opset of 18 or later")
    domains = sorted({node.domain for node in proto.graph.node} | {o.domain for o in proto.opset_import})
    if any(domain not in ("", "ai.onnx") for domain in domains) or proto.functions:
        raise ContractError(f"{file} uses operators outside the standard domain: {domains}", fix="report this")
    for values, wanted in ((proto.graph.input[:1], (tower.input_name,)), (proto.graph.output, tower.output_names)):
        if tuple(v.name for v in values) != wanted:
            raise ContractError(f"{file} has {[v.name for v in values]}, not {list(wanted)}", fix="report this")
        for value in values:
            _check_shape(file, value, lengths if value.name == tower.input_name else None)
    if lost := sorted({n for n, _ in tower.graph_module().named_parameters()} - names):
        raise ContractError(f"{file} lost {len(lost)} weights by name, first {lost[0]}", fix="report this")


def _check_edit(file: str, found: Fingerprint) -> None:
    if found.mismatches:
        raise ContractError(
            f"the edit is not in {file}: {'; '.join(found.mismatches[:3])}", fix="export the edited model"
        )


def _check_shape(file: str, value: onnx.ValueInfoProto, lengths: RowLengths | None) -> None:
    dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    if lengths is not None:
        if dims != ["batch", TOKENS]:
            raise ContractError(
                f"{file}: {value.name} has shape {dims}, and the number of its ids must vary", fix=WHOLE_ROWS
            )
    elif dims[0] != "batch" or any(not isinstance(d, int) for d in dims[1:]):
        raise ContractError(f"{file}: {value.name} has shape {dims}, only the batch may vary", fix="report this")


def _spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple(d.dim_param or d.dim_value for d in kind.shape.dim))


def make(job: Job, out: Path) -> None:
    """Exports both edited towers, and checks that the edit is in the graphs."""
    models, edit = job.shared(Models), read_record(EditRecord, job.folder.edit_record)
    patch = Patch.from_file(job.folder.patch)
    for name in TowerName:
        model = models.load_edited()  # anew, so that only one tower is in memory as it is exported
        ref = model.ref
        model.to("cpu")
        model.keep_only(name)
        tower = model.tower(name)
        artifact = onnx_from_tower(
            tower,
            sample_for(tower, ref, job.plan.recipe.export),
            job.plan.recipe.export,
            weights_digest=edit.edited_weights_digest,
            edits=edit.of(name),
            patch=patch,
            folder=out,
            head_digest=job.plan.head_digest if name is TowerName.IMAGE else "",
            normalisation=normalisation_of(name, ref.image, job.plan.recipe.export),
            rows=text_rows(tower, ref, job.plan.recipe.export),
        )
        if artifact.whole_rows:
            job.notes.line(f"export     text.onnx takes whole rows: {artifact.whole_rows}")
        write_record(tower_record(out, name), artifact)
        (out / job.folder.tokenizer.name).write_bytes(model.tokenizer_json)

"""Text graphs for rows of any length: cut behind the end token where that changes nothing, whole where it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from tests.families import model_of
from uwm_deploy.bundle.tied import check_rows
from uwm_deploy.edits.patch import Patch, TensorPatch, multiply_entries
from uwm_deploy.errors import ContractError, IntegrityError
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.records.codec import json_from_record
from uwm_deploy.records.edit import TensorEdit
from uwm_deploy.records.evidence import ArtifactEvidence, Evidence
from uwm_deploy.records.graph import OnnxArtifact, Precision, Profile, RowLengths, TensorSpec
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.lengths import cut_together, lengths_of
from uwm_deploy.runtime.parts import InParts
from uwm_deploy.runtime.session import Session, open_graph
from uwm_deploy.stages.export import onnx_from_tower
from uwm_deploy.stages.gate.rows import sound_rows
from uwm_deploy.stages.text_rows import text_rows
from uwm_deploy.stages.traced import sample_for
from uwm_deploy.stages.verify.captions import WholeRows, captions_of_every_length, check_lengths
from uwm_deploy.stages.verify.verify import encode_with
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.protocol import ModuleTower

CUT, WHOLE = ("clip-vit-l14", "open-clip-vit-b32"), ("siglip-base", "siglip2-base", "coca-vit-l14")


LAYER = {"clip-vit-l14": "*.1.mlp.fc2", "open-clip-vit-b32": "*.1.mlp.c_proj"}


@cache
def exported(name: str, rows: str, folder: Path) -> OnnxArtifact:
    """The text tower of a family, as if one of its layers were edited, exported once."""
    model, spec = model_of(name), ExportSpec(rows=rows)  # type: ignore[arg-type]
    ((path, layer),) = model.text.layers([LAYER[name]]).items()
    after, indices = layer.weight.detach(), torch.arange(0, layer.weight.numel(), 7, dtype=torch.int32)
    multiply_entries(before := after.clone(), indices, -1.0)
    digests = {"digest_before": digest_of_tensor(before), "digest_after": digest_of_tensor(after)}
    edit = TensorEdit(
        tower=TowerName.TEXT, name=f"{path}.weight", shape=(after.shape[0], after.shape[1]), keep_mass=0.98, factor=-1.0,
        selected=len(indices), share=len(indices) / after.numel(), **digests,
    )  # fmt: skip
    patch = Patch({edit.name: TensorPatch(indices=indices, factor=-1.0, **digests)})
    folder.mkdir(exist_ok=True)
    return onnx_from_tower(
        model.text, sample_for(model.text, model.ref, spec), spec, weights_digest="sha256:" + "0" * 64, edits=(edit,),
        patch=patch, folder=folder, rows=text_rows(model.text, model.ref, spec),
    )  # fmt: skip


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[OnnxArtifact, Path]]:
    """From a family to its record and file."""
    root = tmp_path_factory.mktemp("graphs")

    def made(name: str, rows: str = "cut") -> tuple[OnnxArtifact, Path]:
        folder = root / f"{name}-{rows}"
        found = exported(name, rows, folder)
        return found, folder / found.file

    return made


def opened(record: OnnxArtifact, file: Path) -> Session:
    return open_graph(file, record, max_batch=8)


def captions(name: str, rows: int = 24) -> np.ndarray:
    """Ids of captions of all lengths as a tokenizer gives them, (rows, L) int64."""
    text, random = model_of(name).ref.text, np.random.default_rng(1)
    found = np.full((rows, text.context_length), text.pad_id, dtype=np.int64)
    for row in found:
        end = int(random.integers(1, text.context_length))
        row[:end] = random.integers(1, text.eos_id, end)
        row[end] = text.eos_id
    return found


@pytest.mark.parametrize("name", CUT)
def test_cut_rows_have_the_embeddings_of_whole_ones(
    name: str, graphs: Callable[..., tuple[OnnxArtifact, Path]]
) -> None:
    """CLIP of both libraries: the same numbers as the tower gives for whole rows, and as whole-row graphs give."""
    record, file = graphs(name)
    assert record.inputs[0].shape == ("batch", "tokens")
    assert record.inputs[0].lengths is not None
    assert not record.whole_rows
    ids = captions(name)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model_of(name).text.embed(torch.from_numpy(ids)), dim=-1).numpy()
    assert np.abs(opened(record, file).run(ids) - wanted).max() < 1e-6
    old, old_file = graphs(name, "whole")
    assert old.inputs[0].shape == ("batch", 77)
    assert old.whole_rows == "the recipe asks for it"
    assert np.abs(opened(old, old_file).run(ids) - wanted).max() < 1e-6


@pytest.mark.parametrize("name", CUT)
def test_a_row_does_not_depend_on_the_lengths_beside_it(
    name: str, graphs: Callable[..., tuple[OnnxArtifact, Path]]
) -> None:
    """A batch of mixed lengths equals its rows one by one, bit for bit, and comes back in order."""
    session, ids = opened(*graphs(name)), captions(name)
    alone = np.concatenate([session.run(ids[place : place + 1]) for place in range(len(ids))])
    assert np.array_equal(session.run(ids), alone)
    assert np.array_equal(session.run(ids[::-1].copy())[::-1], alone)
    assert np.array_equal(session.run_all(ids)["text_embeds"], alone)


@pytest.mark.parametrize("name", WHOLE)
def test_towers_that_read_the_padding_stay_whole(name: str) -> None:
    """SigLIP pools the last position without a mask, and CoCa appends a token: their rows are not cut."""
    model = model_of(name)
    found = text_rows(model.text, model.ref, ExportSpec())
    assert found.lengths is None
    assert found.why_whole == "the tower reads what follows the end token"


class Leaking(torch.nn.Module):
    """A tower that says it pools at its end token, and lets every place reach the embedding."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(ids) + 0.01 * ids.float().mean(dim=1, keepdim=True)
        return found


class Padded(Leaking):
    """A tower that reads nothing behind its end token but padding."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        padding = (ids[:, 1:] == ids[:, :-1]).float().sum(dim=1, keepdim=True)
        return self.inner(ids) + 0.1 * padding  # type: ignore[no-any-return]


class Fixed(Leaking):
    """A tower that takes whole rows only."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids + torch.zeros(1, 77, dtype=ids.dtype))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("made", "told"),
    [(Leaking, "embedding differs"), (Padded, "embedding differs"), (Fixed, "does not take shorter ones")],
)
def test_what_running_disproves_is_not_believed(made: type[Leaking], told: str) -> None:
    """Whatever a tower says of itself, rows stay whole where cutting them changes numbers or is not possible."""
    model = model_of("clip-vit-l14")
    tower = model.text
    assert isinstance(tower, ModuleTower)
    found = text_rows(tower.extended(made(tower.graph_module())), model.ref, ExportSpec())
    assert found.lengths is None
    assert told in found.why_whole


BY = RowLengths(longest=77, end_id=90, step=8)


@pytest.mark.parametrize(
    ("places", "length"),
    [
        ({7: 90}, 8),
        ({8: 90}, 16),
        ({3: 90, 40: 90}, 8),  # padded with the end token
        ({3: 90, 20: 91}, 24),  # a larger id than the end token: some towers pool there
        ({20: 90, 3: 91}, 24),
        ({}, 77),  # no end token: no caption
        ({76: 90}, 77),
        ({0: 90}, 8),
    ],
)
def test_a_row_keeps_what_is_pooled(places: dict[int, int], length: int) -> None:
    """The first end token and the first of the largest ids are kept, and a row without an end token is whole."""
    row = np.zeros((1, 77), dtype=np.int64)
    for place, number in places.items():
        row[0, place] = number
    assert lengths_of(row, BY).tolist() == [length]
    spec = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens"), lengths=BY)
    assert cut_together(np.concatenate([row, row]), spec).shape == (2, length)
    assert cut_together(row, dataclasses.replace(spec, lengths=None)) is row


def test_rows_that_are_too_long_are_refused() -> None:
    """A graph has positions for its longest rows only."""
    with pytest.raises(ContractError, match="at most 77 ids"):
        lengths_of(np.zeros((1, 78), dtype=np.int64), BY)


class Counting(InParts):
    """A runtime whose embedding of a row is the number of its ids."""

    def _call(self, rows: np.ndarray, outputs: tuple[TensorSpec, ...]) -> list[np.ndarray]:
        assert rows.flags.c_contiguous
        return [np.full((len(rows), 1), rows.shape[1], dtype=np.float32) for _ in outputs]


def counting(by: RowLengths | None) -> Counting:
    given = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "tokens"), lengths=by)
    out = TensorSpec(name="text_embeds", dtype="float32", shape=("batch", 1))
    return Counting(Profile(min=1, opt=1, max=2), (given,), (out,))


def test_the_length_of_a_row_is_its_own() -> None:
    """Whatever rows lie beside it, and however many; each result is that of its row, and each call is one whole array."""
    rows = np.zeros((6, 77), dtype=np.int64)
    rows[range(6), [3, 40, 20, 5, 7, 76]] = 90
    assert counting(BY).run(rows).ravel().tolist() == [8, 48, 24, 8, 8, 77]


@pytest.mark.parametrize("by", [BY, None])
def test_no_rows_are_refused(by: RowLengths | None) -> None:
    """In words, whichever rows the graph takes."""
    session, rows = counting(by), np.full((3, 77), 90, dtype=np.int64)
    assert session.run(rows).ravel().tolist() == [8 if by else 77] * 3
    for call in (session.run, session.run_all):
        with pytest.raises(ContractError, match="no rows to embed"):
            call(rows[:0])


def test_ids_without_an_end_token_are_embedded_whole(graphs: Callable[..., tuple[OnnxArtifact, Path]]) -> None:
    """As the tower does it: at the start, or at the largest id."""
    name = "open-clip-vit-b32"
    ids = captions(name, 3)
    ids[ids == model_of(name).ref.text.eos_id] = 5
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model_of(name).text.embed(torch.from_numpy(ids)), dim=-1).numpy()
    assert np.abs(opened(*graphs(name)).run(ids) - wanted).max() < 1e-6


def test_a_manifest_that_cuts_other_rows_is_refused(graphs: Callable[..., tuple[OnnxArtifact, Path]]) -> None:
    """Rows are cut at the model's own end token only, and a record of the old form is taken as it is."""
    model = model_of("clip-vit-l14").ref
    record, _ = graphs("clip-vit-l14")
    check_rows(model, record)
    old = dataclasses.replace(graphs("clip-vit-l14", "whole")[0], whole_rows="")
    assert "lengths" not in json_from_record(old)
    assert "whole_rows" not in json_from_record(old)
    check_rows(model, old)
    given = record.inputs[0]
    assert given.lengths is not None
    for wrong in (
        dataclasses.replace(given, lengths=dataclasses.replace(given.lengths, end_id=7)),
        dataclasses.replace(given, lengths=dataclasses.replace(given.lengths, longest=64)),
        dataclasses.replace(given, lengths=dataclasses.replace(given.lengths, step=0)),
        dataclasses.replace(given, lengths=None),
        dataclasses.replace(given, shape=("batch", 77)),
    ):
        with pytest.raises(IntegrityError):
            check_rows(model, dataclasses.replace(record, inputs=(wrong,)))
    fixed = dataclasses.replace(model, text=dataclasses.replace(model.text, fixed_length=True))
    with pytest.raises(IntegrityError, match="cut at id"):
        check_rows(fixed, record)


def wrong_at_40(model: onnx.ModelProto) -> None:
    """One length of ten gives the embedding of another text."""
    ids, output = model.graph.input[0].name, model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["right" if name == output else name for name in node.output]
    for name, value in (("forty", np.asarray([40], np.int64)), ("minus", np.float32(-1)), ("plus", np.float32(1))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model.graph.node.extend(
        [
            helper.make_node("Shape", [ids], ["width"], start=1, end=2),
            helper.make_node("Equal", ["width", "forty"], ["is_forty"]),
            helper.make_node("Where", ["is_forty", "minus", "plus"], ["sign"]),
            helper.make_node("Mul", ["right", "sign"], [output]),
        ]
    )


def positions_cut(model: onnx.ModelProto) -> None:
    """The last positions are those of another row."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith("position_embedding.weight"):
            array = numpy_helper.to_array(tensor).copy()
            array[60:] = array[:17]
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def mask_of_whole_rows(model: onnx.ModelProto) -> None:
    """The mask of 77 ids as a constant."""
    mask = np.triu(np.full((1, 1, 77, 77), -1e30, np.float32), 1)
    (where,) = [node for node in model.graph.node if node.op_type == "Where" and node.output[0] == "where"]
    name = where.output[0]
    model.graph.node.remove(where)
    model.graph.initializer.append(numpy_helper.from_array(mask, name))


def checked(record: OnnxArtifact, file: Path) -> ArtifactEvidence:
    """What captions of every length show."""
    model = model_of("clip-vit-l14")
    assert record.inputs[0].lengths is not None
    whole = WholeRows(lengths=record.inputs[0].lengths, ids=captions("clip-vit-l14"), encode=encode_with(model.text))
    return ArtifactEvidence(
        variant="onnx", precision=Precision.FP32, evidence=Evidence.EXECUTED, reason="",
        where={"provider": "CPUExecutionProvider"}, artifact_digests={},
        text_lengths=tuple(check_lengths(opened(record, file), whole)),
    )  # fmt: skip


def blocking(evidence: ArtifactEvidence) -> list[str]:
    return [c.detail for c in sound_rows(evidence) if c.name.startswith("captions of every length") and c.blocks]


@pytest.mark.parametrize(
    ("change", "told"),
    [(wrong_at_40, "captions of 40 ids"), (positions_cut, "captions of"), (mask_of_whole_rows, "captions of 8 ids")],
)
def test_a_graph_that_is_wrong_at_some_lengths_is_caught(
    change: Callable[[onnx.ModelProto], None],
    told: str,
    graphs: Callable[..., tuple[OnnxArtifact, Path]],
    tmp_path: Path,
) -> None:
    """Whatever captions the evaluation set holds, every length is measured and judged."""
    record, file = graphs("clip-vit-l14")
    honest = checked(record, file)
    assert [part.tokens for part in honest.text_lengths] == [*range(8, 77, 8), 77]
    assert not blocking(honest)
    model = onnx.load(file)
    change(model)
    onnx.save(model, tmp_path / file.name)
    found = blocking(checked(record, tmp_path / file.name))
    assert found
    assert told in found[0]


def test_captions_end_in_the_first_and_last_place_of_each_length() -> None:
    """What is measured reaches both ends of every length."""
    rows = captions_of_every_length(captions("clip-vit-l14"), dataclasses.replace(BY, end_id=49407))
    lengths = lengths_of(rows, dataclasses.replace(BY, end_id=49407))
    ends = (rows == 49407).argmax(axis=1)
    assert lengths.tolist() == [length for length in BY.all for _ in range(4)]
    assert ends.reshape(-1, 4)[:, :2].tolist() == [
        [length - 1, max(before, 1)] for before, length in zip((0, *BY.all), BY.all, strict=False)
    ]


def test_images_have_no_lengths() -> None:
    """Only rows of ids are cut."""
    model = model_of("clip-vit-l14")
    assert text_rows(model.image, model.ref, ExportSpec()).lengths is None
    assert model.image.name is TowerName.IMAGE

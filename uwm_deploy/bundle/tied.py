"""What a manifest names lies inside the bundle, is listed there, and is what the manifest says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.errors import EvidenceError, IntegrityError
from uwm_deploy.records.bundle import Manifest
from uwm_deploy.records.files import digest_of_bytes, joined_digest
from uwm_deploy.records.graph import TOKENS, EngineArtifact, OnnxArtifact, TensorSpec
from uwm_deploy.records.model import Digest, ImageSpec, ModelRef, TowerName
from uwm_deploy.records.names import is_inside, is_segment

_RESTORE = "restore the bundle or build again"


def check_names(manifest: Manifest) -> None:
    """Every name is one path segment, and every listed path is made of such; checked before any file is opened by them.

    Raises:
        IntegrityError: If one could lead out of the bundle.
    """
    for file in manifest.files:
        if not is_inside(file.path):
            raise IntegrityError(f"{BundleLayout.MANIFEST} lists {file.path!r}, which is no path inside", fix=_RESTORE)
    for field, name in _names(manifest):
        if not is_segment(name):
            raise IntegrityError(f"{BundleLayout.MANIFEST}: {field} is {name!r}, not a plain name", fix=_RESTORE)


def _names(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What becomes a file or a folder, with the field it is in."""
    yield "name", manifest.name
    for engine in manifest.engines:
        yield "engines.variant", engine.variant
    for where, made in (("onnx", manifest.onnx), ("converted", manifest.converted), ("engines", manifest.engines)):
        for item in made:
            yield f"{where}.file", item.file
            if item.external_data:
                yield f"{where}.external_data", item.external_data


def check_tied(manifest: Manifest, digests: Mapping[str, Digest]) -> None:
    """Graphs, patch and recipe are the listed files.

    Args:
        manifest: Of the bundle.
        digests: Of each listed file, by its path.

    Raises:
        IntegrityError: If a record or a text in the manifest is about another file.
    """
    for graph in manifest.onnx:
        paths = [BundleLayout.onnx(name) for name in (graph.file, graph.external_data) if name]
        if joined_digest([digests.get(path, "") for path in paths]) != graph.digest:
            raise IntegrityError(f"{paths[0]} is not the graph its record describes", fix=_RESTORE)
    if digests.get(BundleLayout.PATCH) != manifest.edit.patch_digest:
        raise IntegrityError(f"{BundleLayout.PATCH} is not the patch of the manifest's edit", fix=_RESTORE)
    if digest_of_bytes(manifest.recipe.encode()) != manifest.recipe_digest:
        raise IntegrityError(f"the recipe in {BundleLayout.MANIFEST} is not {BundleLayout.RECIPE}", fix=_RESTORE)


def check_cut(manifest: Manifest, measured: Mapping[str, tuple[int, ...]]) -> None:
    """All text graphs cut rows in one way, which is the model's, and captions of every such length were measured.

    Args:
        manifest: Of the bundle.
        measured: Ids of the captions of every length that each variant was measured on; of variants with numbers only.

    Raises:
        IntegrityError: If a graph cuts rows in another way.
        EvidenceError: If a variant was measured on captions of other lengths, or of some only.
    """
    made: list[OnnxArtifact | EngineArtifact] = [*manifest.onnx, *manifest.converted, *manifest.engines]
    graphs = [(graph.tower, given) for graph in made for given in graph.inputs]
    for tower, given in graphs:
        _check_lengths(manifest.model, tower, given)
    ways = {given.lengths for tower, given in graphs if tower is TowerName.TEXT}
    if len(ways) > 1:
        raise IntegrityError(f"the text graphs in {BundleLayout.MANIFEST} cut rows in more than one way", fix=_RESTORE)
    wanted = tuple(length for way in ways if way is not None for length in way.all)
    if lacking := [variant for variant, tokens in measured.items() if tokens != wanted]:
        raise EvidenceError(
            f"{BundleLayout.REPORT} does not measure {lacking[0]} on captions of every length that its text graph takes",
            fix=_RESTORE,
        )


def check_rows(model: ModelRef, graph: OnnxArtifact | EngineArtifact) -> None:
    """A graph takes what the model's preprocessing makes, and gives embeddings of its width.

    Args:
        model: Of the manifest.
        graph: What is to be executed.

    Raises:
        IntegrityError: If it does not.
    """
    given, side = graph.inputs[0], model.image.crop
    _check_normalisation(model.image, given)
    _check_lengths(model, graph.tower, given)
    pixels = (3, side, side) if given.normalisation is None else (side, side, 3)
    ids = (model.text.context_length,) if given.lengths is None else (TOKENS,)
    rows = {TowerName.IMAGE: pixels, TowerName.TEXT: ids}
    wanted = rows[graph.tower], (model.embed_dim,)
    found = tuple(graph.inputs[0].shape[1:]), tuple(graph.outputs[0].shape[1:])
    if found != wanted:
        raise IntegrityError(
            f"the {graph.tower.value} tower's graph is of rows {found[0]} and embeddings {found[1]}, and the model in "
            f"{BundleLayout.MANIFEST} is of {wanted[0]} and {wanted[1]}",
            fix=_RESTORE,
        )


def _check_lengths(model: ModelRef, tower: TowerName, given: TensorSpec) -> None:
    """Rows are cut only where the model's captions end on the right, and at its own end token."""
    by, text = given.lengths, model.text
    if by is None:
        return
    whole = tower is not TowerName.TEXT or text.fixed_length or text.padding_side != "right"
    if whole or (by.longest, by.end_id) != (text.context_length, text.eos_id) or not 0 < by.step <= by.longest:
        raise IntegrityError(
            f"the {tower.value} tower's graph takes rows that are cut at id {by.end_id} or have {by.longest} ids, and the "
            f"model in {BundleLayout.MANIFEST} does not",
            fix=_RESTORE,
        )


def _check_normalisation(image: ImageSpec, given: TensorSpec) -> None:
    """What a graph does to crops is what the model's preprocessing does to them."""
    by = given.normalisation
    if by is None and given.dtype != "uint8":
        return
    if by is None or given.dtype != "uint8" or (by.rescale, by.mean, by.std) != (image.rescale, image.mean, image.std):
        raise IntegrityError(
            f"the image tower's graph does not normalise {given.dtype} pixels as {BundleLayout.MANIFEST} says",
            fix=_RESTORE,
        )

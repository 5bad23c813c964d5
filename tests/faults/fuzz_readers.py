"""Every reader of files from outside, with whole files to start from; `tests.faults.fuzz` breaks them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import safetensors.numpy
from onnx import helper
from PIL import Image
from pyarrow import parquet

from tests.data_sets import members, open_set, pair, png, write_shard
from tests.faults.fuzz_reader import DEMO, TORCH, Reader, new_folder, written
from tests.faults.mutations import Form
from tests.unit.test_report import make, write_bundle, write_run
from tests.unit.test_signature import write_keys
from uwm_deploy.bundle.external_data import check_external_data
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.bundle.open import MANIFEST, Bundle, open_bundle
from uwm_deploy.bundle.sign import Resigning, seal_for, sign_bundle
from uwm_deploy.bundle.signature import SIGNATURE, load_public_key, signed_digests
from uwm_deploy.data.archive import expanded
from uwm_deploy.pipeline.baseline import read_baseline
from uwm_deploy.pipeline.folder import current, stamp
from uwm_deploy.recipes import shipped
from uwm_deploy.recipes.data_set import calibration_set_from_toml
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.records.bundle import BundleFile
from uwm_deploy.records.files import digest_of_bytes
from uwm_deploy.records.model import ImageSpec, TextSpec, TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.evidence import dossier_of
from uwm_deploy.report.html import page
from uwm_deploy.report.inspection import describe
from uwm_deploy.report.plain import plain_lines
from uwm_deploy.runtime.image import image_from, pixels_from_image
from uwm_deploy.runtime.raw_canaries import raw_canaries
from uwm_deploy.runtime.selftest import stored_canaries
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.embedded import yardstick_of
from uwm_deploy.serve.embed.parts import FORMAT, METADATA


def _text(read: Callable[..., object]) -> Callable[[bytes], object]:
    """A reader of text; what is no UTF-8 is refused where the file is read."""

    def from_bytes(data: bytes) -> object:
        return read(data.decode(errors="replace"), where="x.toml")

    return from_bytes


def _toml(kind: shipped.Kind, read: Callable[..., object]) -> Callable[[Path], Reader]:
    def make_reader(_: Path) -> Reader:
        return Reader("toml", [shipped.read_toml(kind, name)[0].encode() for name in shipped.names(kind)], _text(read))

    return make_reader


# --- bundles ------------------------------------------------------------------------------------------------------------


def _passing(folder: Path) -> Path:
    made = make()
    return write_bundle(made, folder, verdict=dataclasses.replace(made.verdict(), result=Result.PASS))


def _manifest(folder: Path) -> Reader:
    bundle = _passing(folder / "bundle")
    return Reader("json", [(bundle / MANIFEST).read_bytes()], written(bundle / MANIFEST, lambda _: open_bundle(bundle)))


def _record(name: str) -> Callable[[Path], Reader]:
    """A record of a run folder, up to the page that shows it."""

    def make_reader(folder: Path) -> Reader:
        run = write_run(make(), folder / "run")
        return Reader("json", [(run / name).read_bytes()], written(run / name, lambda _: page(dossier_of(run))))

    return make_reader


def _signature(folder: Path) -> Reader:
    bundle = _passing(folder / "bundle")
    key, public = write_keys(folder, "key")
    sign_bundle(bundle, key)
    return Reader("json", [(bundle / SIGNATURE).read_bytes()], lambda data: signed_digests(data, public))


def _keys(folder: Path) -> Reader:
    key, public = write_keys(folder, "key")
    private = written(folder / "broken.pem", lambda path: seal_for(Resigning(key=path), folder))

    def read(data: bytes) -> None:
        (private if b"PRIVATE" in data else load_public_key)(data)

    return Reader("bytes", [key.read_bytes(), public.read_bytes()], read)


def _baseline(folder: Path) -> Reader:
    from uwm_deploy.pipeline.baseline import accepted, write_baseline
    from uwm_deploy.pipeline.judge import report_of_bundle

    bundle = _passing(folder / "bundle")
    opened = open_bundle(bundle)
    write_baseline(folder / "kept", accepted(report_of_bundle(opened)[0], opened.manifest.verdict, by="jo", reason="x"))
    file = folder / "kept" / "baseline.json"
    return Reader("json", [file.read_bytes()], written(file, read_baseline))


def _listed(folder: Path, name: str, read: Callable[[Bundle], object]) -> Callable[[bytes], object]:
    """A file of a bundle whose digest is that of what it holds."""
    bundle = open_bundle(_passing(folder / "bundle"))

    def from_bytes(data: bytes) -> object:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        listed = (BundleFile(path=name, size_bytes=len(data), digest=digest_of_bytes(data)),)
        return read(Bundle(folder, dataclasses.replace(bundle.manifest, files=listed)))

    return from_bytes


def _canaries(folder: Path) -> Reader:
    from uwm_deploy.edits.canary_files import read_canaries

    rows = np.eye(4, 8, dtype=np.float32)
    seed = safetensors.numpy.save({"inputs": np.ones((4, 5), dtype=np.int64), "original": rows, "edited": rows})
    inside = _listed(folder / "inside", BundleLayout.canaries(TowerName.TEXT), stored_canaries)
    beside = written(folder / "text.safetensors", lambda _: read_canaries(folder, TowerName.TEXT))

    def read(data: bytes) -> None:
        try:
            inside(data)
        finally:
            beside(data)

    return Reader("tensors", [seed], read)


def _raw_canaries(folder: Path) -> Reader:
    item = np.frombuffer(png(1), dtype=np.uint8)
    seed = safetensors.numpy.save({"item.0": item, "item.1": item, "edited": np.eye(2, 8, dtype=np.float32)})
    name = BundleLayout.raw_canaries(TowerName.IMAGE)
    return Reader("tensors", [seed], _listed(folder, name, lambda bundle: raw_canaries(bundle, TowerName)))


def _reference(folder: Path) -> Reader:
    from uwm_deploy.pipeline.stored import reference_of

    read = _listed(folder, BundleLayout.REFERENCE, lambda bundle: yardstick_of(reference_of(bundle)))
    return Reader("tensors", [make().reference], read)


def _head(folder: Path) -> Reader:
    from uwm_deploy.bundle.head import texts_from

    return Reader("json", [json.dumps(["a safe text", "another"]).encode()], texts_from)


def _judged(folder: Path) -> Reader:
    """A report up to the verdict, and every form in which the verdict is handed on."""
    from datetime import UTC, datetime

    from uwm_deploy.pipeline.judge import judge_file
    from uwm_deploy.report.findings import verdict_line
    from uwm_deploy.report.in_toto import evaluations_from_verdict
    from uwm_deploy.report.markdown import markdown_from_verdict
    from uwm_deploy.report.oscal import oscal_from_verdict

    def read(path: Path) -> None:
        verdict = judge_file(path, "demo")
        verdict_line(verdict)
        markdown_from_verdict(verdict)
        evaluations_from_verdict(verdict, version="1")
        oscal_from_verdict(verdict, version="1", at=datetime(2026, 1, 1, tzinfo=UTC))

    seed = (write_run(make(), folder / "run") / "verify/verify.json").read_bytes()
    return Reader("json", [seed], written(folder / "verify.json", read))


def _workplace(folder: Path) -> Reader:
    """What a killed process left beside a bundle."""
    from uwm_deploy.records.replacing import replacing, workplace_of

    def read(data: bytes) -> None:
        (folder / "b").mkdir(exist_ok=True)
        (place := workplace_of(folder / "b")).mkdir()
        (place / "replaces").write_bytes(data)
        with replacing(folder / "b"):
            pass
        assert not place.exists()

    return Reader("bytes", [b"123456", b"0"], read)


def _stamp(folder: Path) -> Reader:
    (folder / "x").write_text("x")
    stamp(folder, {"a": "b"})
    return Reader(
        "json",
        [(folder / "stage.json").read_bytes()],
        written(folder / "stage.json", lambda _: current(folder, {"a": "b"})),
    )


# --- graphs and checkpoints ---------------------------------------------------------------------------------------------


def _graph() -> bytes:
    weight = onnx.numpy_helper.from_array(np.ones((4, 4), dtype=np.float32), "w")
    outside = onnx.TensorProto(name="o", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "x.data"), ("offset", "0"), ("length", "16")):
        outside.external_data.add(key=key, value=value)
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Add", ["z", "o"], ["y"])]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [weight, outside])
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()


def _onnx(folder: Path) -> Reader:
    from uwm_deploy.graphs.walk import Graph

    (folder / "x.data").write_bytes(bytes(16))

    def read(data: bytes) -> None:
        check_external_data(data, {"x.data": 16}, where="x.onnx")
        (folder / "x.onnx").write_bytes(data)
        Graph(folder / "x.onnx").depends_on_input()

    return Reader("bytes", [_graph()], read)


def _text_spec(content: bytes) -> TextSpec:
    return TextSpec(
        context_length=16, eos_id=1, pad_id=0, padding_side="right", fixed_length=False,
        tokenizer_digest=digest_of_bytes(content),
    )  # fmt: skip


def _tokenizer(_: Path) -> Reader:
    content = (DEMO / "tokenizer.json").read_bytes()
    spec = _text_spec(content)

    def read(data: bytes) -> None:
        named = dataclasses.replace(spec, tokenizer_digest=digest_of_bytes(data))
        for mode in ("neutral", "exact"):
            Tokenizer(data, named).rows(["a red circle", "<|endoftext|> ü"], mode)

    return Reader("json", [content], read)


def _captions(_: Path) -> Reader:
    content = (DEMO / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer(content, _text_spec(content))

    def read(data: bytes) -> None:
        tokenizer.rows([data.decode(errors="surrogateescape"), data.decode("latin-1")])

    return Reader("bytes", [b"a red circle <|endoftext|> &amp; \xc3\xbc", "a \u0130\u03a3 \U0001f600".encode()], read)


# --- data ---------------------------------------------------------------------------------------------------------------


def _read_all(source: Any) -> None:
    from uwm_deploy.errors import DataError

    for index in range(min(len(source), 20)):
        try:
            source.read(index)
        except DataError:  # the item's, which is left out
            continue


_PAIRS = [pair(i, safe_image=f"{i}.png", unsafe_image=f"{i + 3}.png", concept="fire") for i in range(3)]


def _table(name: str, seeds: Callable[[], list[bytes]], **keys: Any) -> Callable[[Path], Reader]:
    """A table, opened and read to its end."""

    def make_reader(folder: Path) -> Reader:
        for number in range(6):
            (folder / f"{number}.png").write_bytes(png(number))
        read = written(folder / name, lambda _: _read_all(open_set(folder, **keys)))
        return Reader("json" if name.endswith("json") else "bytes", seeds(), read)

    return make_reader


def _csv() -> list[bytes]:
    found = []
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(_PAIRS[0]), quoting=quoting)
        writer.writeheader()
        writer.writerows([{**row, "unsafe_text": "a fire,\nand more"} for row in _PAIRS])
        found.append(stream.getvalue().encode())
    return found


def _columns(kind: str) -> dict[str, Any]:
    return {"source": "table", "table": f"rows.{kind}", "columns": {name: name for name in _PAIRS[0]}}


def _parquet() -> list[bytes]:
    binary = [
        {**row, "safe_image": png(i), "unsafe_image": {"bytes": png(i), "path": None}} for i, row in enumerate(_PAIRS)
    ]
    found = []
    for rows, more in ((_PAIRS, {}), (binary, {}), (_PAIRS, {"compression": "none", "use_dictionary": False})):
        stream = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), stream, **more)
        found.append(stream.getvalue())
    return found


def _tar(folder: Path) -> bytes:
    return write_shard(folder / "seed.tar", members("a/k0", 0) | members("k1", 1)).read_bytes()


def _shards(folder: Path) -> Reader:
    read = written(folder / "s.tar", lambda _: _read_all(open_set(folder, source="webdataset", shards="s.tar")))
    return Reader("bytes", [_tar(folder)], read)


def _embedded(name: str, seeds: Callable[[Path], list[bytes]], form: Form = "bytes") -> Callable[[Path], Reader]:
    """What `embed` is given."""
    from uwm_deploy.serve.embed.sources import Naming, items_of

    def read(path: Path) -> None:
        from uwm_deploy.errors import DataError

        for item in items_of(path, Naming(kind="texts", key="id", column="safe_text")):
            try:
                item.load()
            except DataError:
                continue

    return lambda folder: Reader(form, seeds(folder), written(folder / name, read))


def _images(_: Path) -> Reader:
    picture = Image.effect_noise((40, 30), 60)
    wanted: Mapping[str, tuple[str, dict[str, Any]]] = {
        "PNG": ("RGBA", {}), "JPEG": ("RGB", {"progressive": True}), "WEBP": ("RGB", {}), "GIF": ("P", {}),
        "BMP": ("RGB", {}), "TIFF": ("CMYK", {"compression": "tiff_lzw"}),
    }  # fmt: skip
    seeds = []
    for kind, (mode, more) in wanted.items():
        stream = io.BytesIO()
        picture.convert(mode).save(stream, kind, **more)
        seeds.append(stream.getvalue())
    spec = ImageSpec(resize=8, crop=8, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Reader("bytes", seeds, lambda data: pixels_from_image(image_from(data), spec))


def _stored(folder: Path) -> Reader:
    from uwm_deploy.serve.embed.migrate import open_stored

    stream = io.BytesIO()
    np.save(stream, np.eye(6, 8, dtype=np.float32))
    return Reader("bytes", [stream.getvalue()], written(folder / "rows.npy", open_stored))


def _beside(folder: Path) -> Reader:
    from uwm_deploy.serve.embed.migrate import open_stored

    np.save(folder / "rows.npy", np.eye(6, 8, dtype=np.float32))
    seed = json.dumps({"tower": "image", "space": "space:sha256:" + "0" * 64, "names": [f"k{i}" for i in range(6)]})
    read = written(folder / "rows.json", lambda _: list(open_stored(folder / "rows.npy").known(lambda key: True)))
    return Reader("json", [seed.encode()], read)


def _parts(folder: Path) -> Reader:
    from uwm_deploy.serve.embed.migrate import open_stored

    stream = io.BytesIO()
    rows = pa.array([[1.0, 0.0]] * 4, pa.list_(pa.float32(), 2))
    said = {"format": FORMAT, "kind": "images", "space": "space:sha256:" + "0" * 64}
    table = pa.table({"key": list("abcd"), "embedding": rows, "error": [None, None, None, "x"]})
    parquet.write_table(table.replace_schema_metadata({METADATA: json.dumps(said)}), stream)
    store = new_folder(folder / "store")
    read = written(store / "part-00000.parquet", lambda _: list(open_stored(store).known(lambda key: True)))
    return Reader("bytes", [stream.getvalue()], read)


def _names(_: Path) -> Reader:
    return Reader(
        "bytes",
        [b"{000..009}-{a,b}.tar", b"a{0..3}/{x,{1..2}}*.parquet"],
        lambda data: expanded(data.decode(errors="replace")),
    )


def _inspected(name: str, seed: Callable[[], bytes], form: Form) -> Callable[[Path], Reader]:
    """What `inspect` is given."""
    return lambda folder: Reader(form, [seed()], written(folder / name, lambda path: plain_lines(describe(path))))


def _small_tensors() -> bytes:
    return safetensors.numpy.save({"a": np.eye(3, dtype=np.float32)}, {"x": "y"})


READERS: Mapping[str, Callable[[Path], Reader]] = {
    "recipe": _toml("export", recipe_from_toml),
    "policy": _toml("ci", policy_from_toml),
    "data set": _toml("calibration", calibration_set_from_toml),
    "manifest": _manifest,
    "report": _record("verify/verify.json"),
    "verdict": _record("gate/verdict.json"),
    "edit record": _record("edit/edit.json"),
    "score record": _record("score/score.json"),
    "engine record": _record("compile-onnxruntime-fp32/image.json"),
    "judged report": _judged,
    "workplace": _workplace,
    "baseline": _baseline,
    "model.sig": _signature,
    "keys": _keys,
    "canaries": _canaries,
    "raw canaries": _raw_canaries,
    "embeddings": _reference,
    "head texts": _head,
    "stamp": _stamp,
    "onnx": _onnx,
    "tokenizer": _tokenizer,
    "captions": _captions,
    "csv": _table("rows.csv", _csv, **_columns("csv")),
    "json array": _table("rows.json", lambda: [json.dumps(_PAIRS).encode()], **_columns("json")),
    "json lines": _table(
        "pairs.jsonl", lambda: ["\n".join(map(json.dumps, _PAIRS)).encode()], source="manifest", manifest="pairs.jsonl"
    ),
    "parquet": _table("rows.parquet", _parquet, **_columns("parquet")),
    "webdataset": _shards,
    "embed: tar": _embedded("s.tar", lambda folder: [_tar(folder)]),
    "embed: parquet": _embedded("rows.parquet", lambda _: _parquet()),
    "embed: json lines": _embedded("rows.jsonl", lambda _: ["\n".join(map(json.dumps, _PAIRS)).encode()]),
    "images": _images,
    "stored rows": _stored,
    "beside rows": _beside,
    "parts": _parts,
    "shard names": _names,
    "inspect json": _inspected("x.json", lambda: json.dumps({"a": [1, {"b": None}], "c": "d"}).encode(), "json"),
    "inspect tensors": _inspected("x.safetensors", _small_tensors, "tensors"),
}

NAMES = (*READERS, *TORCH)
"""Of every reader."""

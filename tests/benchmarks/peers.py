"""What else embeds with CLIP on a CPU, each opened as its documentation says, all with the same weights.

Every peer imports its own libraries, so that a process with one peer holds no other.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

Tower = Literal["image", "text"]
Rows = Callable[[np.ndarray], np.ndarray]
"""Pixels (n, 3, H, W) float32, crops (n, H, W, 3) uint8 or ids (n, L) int64, as the peer takes them, to (n, d)."""

LENGTH = 77
EAGER = "transformers eager"
"""What ratios and cosines are to."""


class NotRunError(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True, slots=True)
class Files:
    """What one size of the model was made into, below one folder."""

    work: Path
    optimum: str

    @property
    def checkpoint(self) -> Path:
        return self.work / "run" / "edit" / "model"

    @property
    def bundle(self) -> Path:
        return self.work / "bundle"

    def graph(self, tower: Tower) -> Path:
        """Our exported graph, float32."""
        return self.bundle / "onnx" / f"{tower}.onnx"


@dataclass(frozen=True, slots=True)
class Side:
    """One tower of a peer.

    Attributes:
        rows: Embeds what `prepare` gives; what is timed as the graph alone. None where a peer does not let it be called.
        whole: From encoded photographs, or texts, to (n, d).
        crops: Whether `rows` takes crops of 8 bits instead of pixels.
    """

    rows: Rows | None
    whole: Callable[[list[Any]], np.ndarray]
    crops: bool = False


def threads() -> int:
    """What a peer is told where it must be told; 0 leaves the number to it."""
    return int(os.environ.get("OMP_NUM_THREADS", "0"))


KEPT: dict[str, Any] = {}
"""Models that hold both towers, so that the second one is not loaded again."""


def _kept(name: str, make: Callable[[], Any]) -> Any:
    if name not in KEPT:
        KEPT[name] = make()
    return KEPT[name]


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, (n, d) float32."""
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def decoded(data: list[bytes]) -> list[Image.Image]:
    """Pictures as a service gets them."""
    return [Image.open(io.BytesIO(item)) for item in data]


def prepared(files: Files, tower: Tower, *, padded: bool = True) -> Callable[[list[Any]], np.ndarray]:
    """The preprocessing of transformers: pixels (n, 3, H, W) float32, or ids (n, L) int64."""
    if tower == "image":
        from transformers import CLIPImageProcessor

        images = CLIPImageProcessor.from_pretrained(files.checkpoint)
        return lambda data: np.asarray(images(images=decoded(data), return_tensors="np")["pixel_values"])
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(files.checkpoint)
    how: dict[str, Any] = {"padding": "max_length" if padded else True, "max_length": LENGTH, "truncation": True}
    return lambda texts: np.asarray(words(texts, return_tensors="np", **how)["input_ids"], np.int64)


def transformers_side(files: Files, tower: Tower, attention: str, *, compiled: bool = False) -> Side:
    import torch
    from transformers import CLIPModel

    model = _kept(
        f"transformers {attention}",
        lambda: CLIPModel.from_pretrained(files.checkpoint, attn_implementation=attention).eval(),
    )
    call = model.get_image_features if tower == "image" else model.get_text_features
    call = torch.compile(call) if compiled else call
    # As documented, texts are padded to the longest of the call; a compiled model would be compiled for every length.
    before = prepared(files, tower, padded=compiled)

    def rows(inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found = call(torch.from_numpy(inputs)).pooler_output
            return torch.nn.functional.normalize(found, dim=-1).numpy()

    return Side(rows, lambda items: rows(before(items)))


def open_clip_side(files: Files, tower: Tower) -> Side:
    import open_clip
    import torch
    from open_clip_weights import NAMES, as_open_clip
    from safetensors.torch import load_file

    name = NAMES[json.loads((files.checkpoint / "config.json").read_text())["projection_dim"]]

    def made() -> tuple[Any, Any]:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=None)
        model.load_state_dict(as_open_clip(load_file(files.checkpoint / "model.safetensors")))
        return model.eval(), transform

    model, transform = _kept("open_clip", made)
    words = open_clip.get_tokenizer(name)

    def rows(inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            call = model.encode_image if tower == "image" else model.encode_text
            return call(torch.from_numpy(inputs), normalize=True).numpy()

    def whole(items: list[Any]) -> np.ndarray:
        if tower == "text":
            return rows(words(items).numpy())
        return rows(torch.stack([transform(image) for image in decoded(items)]).numpy())

    return Side(rows, whole)


def ort_side(files: Files, tower: Tower, graph: Path, *, any_length: bool = False) -> Side:
    """A graph in ONNX Runtime as its documentation opens one, with the preprocessing of transformers."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()  # it reads no variable
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    before = prepared(files, tower, padded=not any_length)
    name = "pixel_values" if tower == "image" else "input_ids"

    def rows(inputs: np.ndarray) -> np.ndarray:
        feed = {name: inputs} | ({"attention_mask": np.ones_like(inputs)} if any_length and tower == "text" else {})
        return unit(session.run(None, feed)[0])

    return Side(rows, lambda items: rows(before(items)))


def optimum_graph(files: Files, tower: Tower) -> Path:
    """The export of optimum-onnx, cut into its towers; made by the Python that has it."""
    folder = files.work / "optimum"
    if not (folder / f"{tower}.onnx").is_file():
        code = (
            "import sys; from optimum.exporters.onnx import main_export; "
            "main_export(sys.argv[1], sys.argv[2], task='zero-shot-image-classification', library_name='transformers', "
            "do_validation=False)"
        )
        command = [files.optimum, "-c", code, str(files.checkpoint), str(folder)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
        )
        if done.returncode:
            raise NotRunError(done.stderr.strip().splitlines()[-1][:160])
        import onnx
        from onnx.utils import Extractor

        parts = Extractor(onnx.load(folder / "model.onnx"))
        ends = {
            "image": (["pixel_values"], ["image_embeds"]),
            "text": (["input_ids", "attention_mask"], ["text_embeds"]),
        }
        for name, (first, last) in ends.items():
            part = parts.extract_model(first, last)
            onnx.save(part, folder / f"{name}.onnx", save_as_external_data=True, location=f"{name}.onnx.data")
        for path in folder.glob("model.onnx*"):
            path.unlink()
    return folder / f"{tower}.onnx"


def fused_graph(files: Files, tower: Tower) -> Path:
    """The export in the style of photo servers; see `fused_clip_graph`."""
    path = files.work / "fused" / f"{tower}.onnx"
    if not path.is_file():
        from fused_clip_graph import image_graph, text_graph
        from safetensors.numpy import load_file
        from transformers import CLIPConfig

        path.parent.mkdir(exist_ok=True)
        config = CLIPConfig.from_pretrained(files.checkpoint)
        part = config.vision_config if tower == "image" else config.text_config
        write = image_graph if tower == "image" else text_graph
        write(load_file(files.checkpoint / "model.safetensors"), part.to_dict(), path)
    return path


def openvino_side(files: Files, tower: Tower, model: Path, hint: str) -> Side:
    """A model in OpenVINO for latency; `hint` is the precision it is asked for, empty for its own choice."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY"} | ({"INFERENCE_PRECISION_HINT": hint} if hint else {})
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    if tower == "text":
        before = prepared(files, tower)
        return Side(lambda ids: compiled(ids)[0], lambda items: compiled(before(items))[0])
    from uwm_deploy.records.graph import Normalisation
    from uwm_deploy.runtime.pixels import crops_from_pixels

    by = Normalisation(
        rescale=1 / 255, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
    )
    pixels = prepared(files, tower)  # the graph takes crops of 8 bits
    return Side(
        lambda crops: compiled(crops)[0], lambda items: compiled(crops_from_pixels(pixels(items), by))[0], crops=True
    )


def nncf_model(files: Files, tower: Tower) -> Path:
    """Our float32 graph in INT8 by NNCF with its settings for transformers, calibrated on noise: what counts is speed."""
    path = files.work / "nncf" / f"{tower}.xml"
    if not path.is_file():
        import nncf
        import openvino

        model, rng = openvino.Core().read_model(files.graph(tower)), np.random.default_rng(0)
        if tower == "image":
            side = model.inputs[0].partial_shape[1].get_length()
            rows = [rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8) for _ in range(8)]
        else:
            rows = [np.sort(rng.integers(1, 49000, (1, LENGTH)), axis=1) for _ in range(8)]
            for part in rows:
                part[:, 20:] = 49407
        kind = nncf.ModelType.TRANSFORMER
        openvino.save_model(nncf.quantize(model, nncf.Dataset(rows), model_type=kind, subset_size=8), path)
    return path


def fastembed_side(files: Files, tower: Tower) -> Side:
    """Fastembed with its own model's files replaced by a local folder."""
    folder = files.work / f"fastembed-{tower}"
    if not folder.is_dir():
        folder.mkdir()
        for path in files.checkpoint.glob("*.json"):
            shutil.copyfile(path, folder / path.name)
        ends = {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
        (folder / "special_tokens_map.json").write_text(json.dumps(ends | {"pad_token": "<|endoftext|>"}))
        graph = optimum_graph(files, tower)
        shutil.copyfile(graph, folder / "model.onnx")
        shutil.copyfile(graph.with_suffix(".onnx.data"), folder / f"{tower}.onnx.data")
    if tower == "image":
        from fastembed import ImageEmbedding

        images = ImageEmbedding(
            "Qdrant/clip-ViT-B-32-vision", specific_model_path=str(folder), threads=threads() or None
        )
        return Side(None, lambda data: unit(np.stack(list(images.embed(decoded(data), batch_size=len(data))))))
    from fastembed import TextEmbedding

    words = TextEmbedding("Qdrant/clip-ViT-B-32-text", specific_model_path=str(folder), threads=threads() or None)
    return Side(None, lambda texts: unit(np.stack(list(words.embed(texts, batch_size=len(texts))))))


def faster_clip_side(files: Files, tower: Tower) -> Side:
    """Images alone: its texts go through another, multilingual model."""
    if tower == "text":
        raise NotRunError("its text model is not CLIP's")
    if json.loads((files.checkpoint / "config.json").read_text())["projection_dim"] != 512:
        raise NotRunError("it has ViT-B/32 alone")
    place = files.work / "faster-clip" / "sentence-transformers__clip-ViT-B-32" / "0_CLIPModel"
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(files.checkpoint / "model.safetensors", place / "model.safetensors")
    os.environ["FASTER_CLIP_CACHE"] = str(files.work / "faster-clip")
    from faster_clip import ClipModel

    model = ClipModel()
    return Side(None, lambda data: unit(np.asarray(model.encode_image(data))))


def our_side(files: Files, tower: Tower, variant: str) -> Side:
    from uwm_deploy.records.model import TowerName
    from uwm_deploy.runtime.encoder import SafeEncoder

    def made() -> SafeEncoder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # random weights: nothing here is proven
            return SafeEncoder.open(files.bundle, variant=variant, device="cpu", allow_unsafe=True)

    encoder = _kept(variant, made)
    session = encoder.session(TowerName(tower))
    whole = encoder.encode_image if tower == "image" else encoder.encode_text
    return Side(session.run, whole, crops=tower == "image")


Open = Callable[[Files, Tower], Side]
PEERS: Mapping[str, tuple[str, Open]] = {
    EAGER: ("transformers", lambda f, t: transformers_side(f, t, "eager")),
    "transformers SDPA": ("transformers", lambda f, t: transformers_side(f, t, "sdpa")),
    "torch.compile": ("torch", lambda f, t: transformers_side(f, t, "sdpa", compiled=True)),
    "open_clip": ("open_clip", open_clip_side),
    "optimum-onnx, ONNX Runtime": ("onnxruntime", lambda f, t: ort_side(f, t, optimum_graph(f, t), any_length=True)),
    "fused export, ONNX Runtime": ("onnxruntime", lambda f, t: ort_side(f, t, fused_graph(f, t))),
    "OpenVINO fp32": ("openvino", lambda f, t: openvino_side(f, t, f.graph(t), "f32")),
    "OpenVINO, its default": ("openvino", lambda f, t: openvino_side(f, t, f.graph(t), "")),
    "OpenVINO, NNCF INT8": ("nncf", lambda f, t: openvino_side(f, t, nncf_model(f, t), "f32")),
    "fastembed": ("fastembed", fastembed_side),
    "faster-clip": ("faster_clip", faster_clip_side),
    **{
        f"bundle, {target}-{precision}": (
            target,
            lambda f, t, variant=f"{target}-{precision}": our_side(f, t, variant),
        )
        for target, precisions in (("onnxruntime", ("fp32", "int8")), ("openvino", ("fp32", "bf16", "int8")))
        for precision in precisions
    },
}
"""Name to the package that it needs, and how one tower of it is opened."""


def opened(name: str, files: Files, tower: Tower, item: bytes | str) -> Side:
    """One tower of a peer, which has embedded one photograph or text.

    Raises:
        NotRunError: With the reason.
    """
    package, make = PEERS[name]
    if importlib.util.find_spec(package) is None:
        raise NotRunError(f"package {package} is not installed")
    try:
        side = make(files, tower)
        side.whole([item])
    except NotRunError:
        raise
    except Exception as error:
        raise NotRunError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    return side

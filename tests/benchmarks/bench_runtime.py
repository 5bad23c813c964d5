"""JPEG bytes in, embeddings out: the runtime beside what is used today, CLIP ViT-B/32 at full size with random weights.

    python tests/benchmarks/bench_runtime.py --work .uwm/bench-runtime

Every side gets the same encoded photographs and the same weights, decodes and preprocesses as its documentation says, and
has all cores. They take turns; a time is the median over the rounds, a ratio the median of the ratios within a round. Random
weights pass no gate, so the bundle is opened unsafe; its variants are those that a build makes. Preprocessing is measured
alone as well: from bytes and from decoded images, one batch, with the difference of the pixels in grey levels.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.pop("OMP_NUM_THREADS", None)  # every library its own number of threads

import numpy as np
from PIL import Image

from uwm_deploy.errors import UwmError
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.cores import cores
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.image import image_from, pixels_from_image
from uwm_deploy.runtime.service import Serving

Side = Callable[[list[bytes]], np.ndarray]
PILLOW, TORCHVISION = "transformers, Pillow", "transformers, torchvision"


def photographs(count: int, width: int = 640, height: int = 480) -> list[bytes]:
    """JPEGs with the detail of photographs, all different."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        layers = sum(
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (height // s, width // s, 3), dtype=np.uint8)).resize(
                    (width, height), Image.Resampling.BICUBIC
                ),
                dtype=np.float32,
            )
            / n
            for n, s in ((2, 40), (4, 10), (4, 4))
        )
        stream = io.BytesIO()
        Image.fromarray(layers.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        found.append(stream.getvalue())
    return found


def built(work: Path, precisions: tuple[str, ...]) -> tuple[Path, Path]:
    """Bundle and edited checkpoint, from a few pictures of the demo world."""
    work.mkdir(parents=True, exist_ok=True)
    for name, split, limit in (("cal", "calibration", 16), ("eval", "test", 16)):
        (work / f"{name}.toml").write_text(
            f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n'
        )
    request = Request(
        model="clip-vit-b32", weights="random", targets=("onnxruntime",), precisions=precisions,
        calibration=str(work / "cal.toml"), evaluation=str(work / "eval.toml"), out=work / "bundle", work=work / "run",
    )  # fmt: skip
    run(request, until="package", reporter=Reporter())
    return work / "bundle", work / "run" / "edit" / "model"


def decoded(data: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(item)) for item in data]


def torch_sides(checkpoint: Path, skip: set[str]) -> dict[str, Side]:
    """Transformers eager, bfloat16 autocast and compiled; open_clip of the same architecture."""
    import open_clip
    import torch
    from transformers import CLIPImageProcessor, CLIPModel

    torch.set_num_threads(cores())
    model, processor = CLIPModel.from_pretrained(checkpoint).eval(), CLIPImageProcessor.from_pretrained(checkpoint)

    def side(forward: Callable, *, bfloat: bool = False) -> Side:
        def call(data: list[bytes]) -> np.ndarray:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat):
                pixels = processor(images=decoded(data), return_tensors="pt")["pixel_values"]
                return torch.nn.functional.normalize(forward(pixels).float(), dim=-1).numpy()

        return call

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return model.get_image_features(pixel_values=pixels).pooler_output

    sides = {"transformers fp32": side(features), "transformers bf16 autocast": side(features, bfloat=True)}
    if "compile" not in skip:
        compiled = torch.compile(features, dynamic=False)
        sides["torch.compile fp32"] = side(compiled)
    other, _, transform = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained=None)
    other.eval()

    def clip(data: list[bytes]) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.stack([transform(image) for image in decoded(data)])
            return other.encode_image(pixels, normalize=True).numpy()

    return sides | {"open_clip fp32 (other weights)": clip}


def openvino_side(bundle: Path) -> tuple[dict[str, Side], str]:
    """The bundle's own graph in OpenVINO, with the preprocessing of transformers."""
    try:
        import openvino
    except ImportError as error:
        return {}, str(error)
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor()
    core = openvino.Core()
    model = core.compile_model(core.read_model(bundle / "onnx" / "image.onnx"), "CPU", {"PERFORMANCE_HINT": "LATENCY"})

    def call(data: list[bytes]) -> np.ndarray:
        return model(processor(images=decoded(data), return_tensors="np")["pixel_values"])[0]

    return {f"openvino ({core.get_property('CPU', 'INFERENCE_PRECISION_HINT').to_string()})": call}, ""


def our_sides(bundle: Path, precisions: tuple[str, ...]) -> dict[str, Side]:
    sides = {}
    for precision in precisions:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # random weights: nothing here is proven
            encoder = SafeEncoder.open(bundle, variant=f"onnxruntime-{precision}", device="cpu", allow_unsafe=True)
            several = SafeEncoder.open(
                bundle,
                variant=f"onnxruntime-{precision}",
                device="cpu",
                allow_unsafe=True,
                serving=Serving(calls=cores()),
            )
        sides[f"uwm-deploy {precision}"] = encoder.encode_image
        sides[f"uwm-deploy {precision}, a call per core"] = several.encode_image
    return sides


def turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, call in sides.items():
            time.sleep(0.05)  # threads of the side before spin for a while
            started = time.perf_counter()
            call()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - started)
    return taken


def ratio(taken: dict[str, list[float]], name: str, against: str) -> float:
    """How many times faster, median within rounds."""
    return statistics.median(a / b for a, b in zip(taken[against], taken[name], strict=True))


def preprocessing(data: list[bytes], rounds: int, encoder: SafeEncoder) -> None:
    """Both processors of transformers beside ours, alone."""
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    spec, slow, fast = encoder.manifest.model.image, CLIPImageProcessorPil(), CLIPImageProcessor()
    step = spec.rescale / np.asarray(spec.std, dtype=np.float32).reshape(3, 1, 1)

    def one(image: bytes | Image.Image) -> np.ndarray:
        return pixels_from_image(image_from(image), spec)

    def images_of(inputs: list) -> list[Image.Image]:
        return decoded(inputs) if isinstance(inputs[0], bytes) else inputs

    loaded = decoded(data)
    for image in loaded:
        image.load()
    with ThreadPoolExecutor(cores()) as pool:
        ways: dict[str, Callable[[list], np.ndarray]] = {
            PILLOW: lambda inputs: slow(images=images_of(inputs), return_tensors="np")["pixel_values"],
            TORCHVISION: lambda inputs: fast(images=images_of(inputs), return_tensors="np")["pixel_values"],
            "uwm-deploy, one thread": lambda inputs: np.stack([one(item) for item in inputs]),
            "uwm-deploy, its threads": lambda inputs: np.stack(list(pool.map(one, inputs))),
        }
        for what, inputs in (("JPEG bytes", data), ("decoded images", loaded)):
            taken = turns({name: partial(way, inputs) for name, way in ways.items()}, rounds)
            ours = ways["uwm-deploy, one thread"](inputs)
            print(
                f"\npreprocessing of {len(data)} {what}: ms per image, times as fast as each processor of transformers"
            )
            for name, seconds in taken.items():
                levels = np.abs(np.asarray(ways[name](inputs)) - ours) / step
                print(
                    f"  {name:28}{1000 * statistics.median(seconds) / len(data):8.2f}"
                    f"{ratio(taken, name, PILLOW):7.2f}x{ratio(taken, name, TORCHVISION):7.2f}x"
                    f"   {levels.max():.2f} grey levels from ours, in {100 * (levels > 0.5).mean():.3f}% of the values"
                )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--batch", type=int, action="append", help="default 1 and 32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", action="append", help="default fp32 and int8")
    parser.add_argument("--skip", action="append", default=[], choices=["compile", "engines"])
    arguments = parser.parse_args()
    precisions = tuple(arguments.precision or ("fp32", "int8"))
    try:
        bundle, checkpoint = built(arguments.work, precisions)
    except UwmError as error:
        parser.error(str(error))
    ours = our_sides(bundle, precisions)
    data = photographs(max(arguments.batch or [32]))
    print(f"{cores()} cores, {len(data[0]) // 1024} kB a photograph of 640 x 480")
    encoder = next(iter(ours.values())).__self__  # type: ignore[attr-defined]
    preprocessing(data, arguments.rounds, encoder)
    if "engines" in arguments.skip:
        return
    vino, why = openvino_side(bundle)
    sides = torch_sides(checkpoint, set(arguments.skip)) | vino | ours
    for batch in arguments.batch or (1, 32):
        some = data[:batch]
        taken = turns({name: partial(side, some) for name, side in sides.items()}, arguments.rounds)
        wanted = sides["transformers fp32"](some)
        print(f"\nbatch {batch}: ms per image, times as fast as transformers fp32, smallest cosine to it")
        for name, seconds in sorted(taken.items(), key=lambda item: statistics.median(item[1])):
            cosine = float((sides[name](some) * wanted).sum(axis=1).min())
            told = "" if "other weights" in name else f"{cosine:10.5f}"
            print(
                f"  {name:36}{1000 * statistics.median(seconds) / batch:8.1f}"
                f"{ratio(taken, name, 'transformers fp32'):7.2f}x{told}"
            )
    if why:
        print(f"\nopenvino: not run: {why}")


if __name__ == "__main__":
    main()

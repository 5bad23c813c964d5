"""What crops of 8 bits and reduced decoding save: CLIP ViT-B/32 at full size with random weights, in one run.

    python tests/benchmarks/bench_pixels.py --work .uwm/bench-pixels

First both graphs of one tower, with normalised pixels and with crops: bytes of a row, preprocessing of decoded images, and
the session, which must give the same embeddings. Then photographs of 12 megapixels from bytes to embeddings: transformers,
and the runtime with full and with scaled decoding. All take turns; a time is the median over the rounds, a ratio the median
of the ratios within a round. Random weights pass no gate, so the bundle is opened unsafe.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.pop("OMP_NUM_THREADS", None)  # every library its own number of threads
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from bench_runtime import built, decoded, photographs, ratio, torch_sides, turns

from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.model import TowerName
from uwm_deploy.runtime.cores import cores
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.runtime.image import crop_from_image, image_from, pixels_from_image
from uwm_deploy.runtime.session import Session, open_graph
from uwm_deploy.stages.export import onnx_from_tower
from uwm_deploy.stages.traced import normalisation_of, sample_for
from uwm_deploy.towers.load import load_model

FORMS = ("float32", "uint8")


def graphs(checkpoint: Path, work: Path) -> dict[str, Session]:
    """Both graphs of the image tower in ONNX Runtime."""
    recipe, _ = recipe_of("clip-vit-b32")
    model = load_model(recipe, folder=checkpoint, device="cpu")
    found = {}
    for form in FORMS:
        folder, spec = work / form, ExportSpec(pixels=form)
        folder.mkdir(parents=True, exist_ok=True)
        tower = model.tower(TowerName.IMAGE)
        from uwm_deploy.edits.patch import Patch

        artifact = onnx_from_tower(
            tower, sample_for(tower, model.ref, spec), spec, weights_digest="", edits=(), patch=Patch({}), folder=folder,
            normalisation=normalisation_of(TowerName.IMAGE, model.ref.image, spec),
        )  # fmt: skip
        found[form] = open_graph(folder / artifact.file, artifact, max_batch=32)
    return found


def told(taken: dict[str, list[float]], count: int, against: str, more: dict[str, str]) -> None:
    for name, seconds in taken.items():
        print(
            f"  {name:40}{1000 * statistics.median(seconds) / count:9.3f} ms"
            f"{ratio(taken, name, against):7.2f}x   {more.get(name, '')}"
        )


def forms(checkpoint: Path, work: Path, encoder: SafeEncoder, rounds: int) -> None:
    """Bytes, preprocessing and session of both forms."""
    spec, sessions = encoder.manifest.model.image, graphs(checkpoint, work)
    images = decoded(photographs(32))
    for image in images:
        image.load()
    ways: dict[str, Callable] = {"float32": pixels_from_image, "uint8": crop_from_image}
    rows = {form: np.stack([way(image, spec) for image in images]) for form, way in ways.items()}
    print(f"bytes of a row: {', '.join(f'{form} {rows[form][0].nbytes:,}' for form in FORMS)}")
    print("\npreprocessing of 32 decoded photographs of 640 x 480, one thread: per image, times as fast as float32")
    told(
        turns({form: lambda way=way: np.stack([way(i, spec) for i in images]) for form, way in ways.items()}, rounds),
        32, "float32", {},
    )  # fmt: skip
    for batch in (1, 8, 32):
        print(f"\nsession, batch {batch}: per image, times as fast as float32, largest difference of an embedding")
        wanted = sessions["float32"].run(rows["float32"][:batch])
        more = {form: f"{np.abs(sessions[form].run(rows[form][:batch]) - wanted).max():.1e}" for form in FORMS}
        calls = {form: partial(sessions[form].run, rows[form][:batch]) for form in FORMS}
        told(turns(calls, 3 * rounds), batch, "float32", more)


def large(checkpoint: Path, bundle: Path, full: SafeEncoder, rounds: int, count: int) -> None:
    """Photographs of 12 megapixels, from bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scaled = SafeEncoder.open(bundle, device="cpu", allow_unsafe=True, decode="scaled")
    data = photographs(count, 4000, 3000)
    sides = {name: side for name, side in torch_sides(checkpoint, {"compile"}).items() if name == "transformers fp32"}
    sides |= {"uwm-deploy, decoded in full": full.encode_image, "uwm-deploy, scaled": scaled.encode_image}
    for batch in sorted({1, count}):
        some = data[:batch]
        print(
            f"\n{batch} photographs of 4000 x 3000 ({len(data[0]) / 1e6:.1f} MB each), from bytes, {cores()} cores: per "
            "image, times as fast as transformers, smallest cosine to it and to full decoding"
        )
        found = {name: side(some) for name, side in sides.items()}
        first, whole = found["transformers fp32"], found["uwm-deploy, decoded in full"]
        more = {
            name: " ".join(f"{float((rows * other).sum(axis=1).min()):.5f}" for other in (first, whole))
            for name, rows in found.items()
        }
        told(
            turns({name: partial(side, some) for name, side in sides.items()}, rounds), batch, "transformers fp32", more
        )
    spec = full.manifest.model.image
    print("\ndecoding and cropping alone, one thread: per image, times as fast as in full")
    ways = {"full": None, "scaled": spec}
    told(
        turns(
            {n: lambda s=s: [crop_from_image(image_from(d, scaled_for=s), spec) for d in data] for n, s in ways.items()},
            rounds,
        ),
        count, "full", {},
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photographs", type=int, default=8)
    parser.add_argument("--precision", default="fp32", help="of the bundle that photographs go through")
    arguments = parser.parse_args()
    bundle, checkpoint = built(arguments.work, (arguments.precision,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random weights: nothing here is proven
        encoder = SafeEncoder.open(bundle, device="cpu", allow_unsafe=True)
    forms(checkpoint, arguments.work, encoder, arguments.rounds)
    large(checkpoint, bundle, encoder, arguments.rounds, arguments.photographs)


if __name__ == "__main__":
    main()

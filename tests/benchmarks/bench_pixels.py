"""What crops of 8 bits and reduced decoding save: CLIP ViT-B/32 at full size with random weights, in one run.

    python tests/benchmarks/bench_pixels.py --work .uwm/bench-pixels

First both graphs of the image tower, with normalised pixels and with crops: bytes of a row, preprocessing of decoded images,
and the session, which must give the same embeddings. Then photographs of 12 megapixels from bytes to embeddings:
transformers, and the runtime's preprocessing and session with full and with scaled decoding, in as many threads as there are
cores. All take turns; a time is the median over the rounds, a ratio the median of the ratios within a round. A random model
has no bundle that passes, so the parts of the runtime are driven here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.pop("OMP_NUM_THREADS", None)  # every library its own number of threads
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from bench_runtime import decoded, photographs, ratio, torch_sides, turns

from uwm_deploy.graphs.write import write_graph
from uwm_deploy.recipes.compile_spec import ExportSpec
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.graph import Profile, Target, TensorSpec
from uwm_deploy.records.model import ImageSpec, ModelRef, TowerName
from uwm_deploy.runtime.cores import cores
from uwm_deploy.runtime.image import Decode, crop_from_image, image_from, pixels_from_image
from uwm_deploy.runtime.preprocessing import Preprocessing
from uwm_deploy.runtime.session import Session, external_data_of, open_session
from uwm_deploy.stages.traced import normalisation_of, sample_for, traced
from uwm_deploy.towers.load import load_model

FORMS = ("float32", "uint8")
TRANSFORMERS, FULL = "transformers fp32", "runtime, crops, decoded in full"


def made(work: Path) -> tuple[ModelRef, dict[str, Session]]:
    """A checkpoint in a folder, and both graphs of its image tower in ONNX Runtime."""
    recipe, _ = recipe_of("clip-vit-b32")
    model = load_model(recipe, folder=None, weights="random", device="cpu")
    if not (work / "model").is_dir():
        model.save(work / "model")
    tower, found = model.tower(TowerName.IMAGE), {}
    for form in FORMS:
        folder, spec = work / form, ExportSpec(pixels=form)
        folder.mkdir(parents=True, exist_ok=True)
        by, side = normalisation_of(TowerName.IMAGE, model.ref.image, spec), model.ref.image.crop
        write_graph(traced(tower, sample_for(tower, model.ref, spec), spec, by), folder / "image.onnx", "image.data")
        shape = ("batch", 3, side, side) if by is None else ("batch", side, side, 3)
        found[form] = open_session(
            Target.ONNXRUNTIME,
            (folder / "image.onnx").read_bytes(),
            profile=Profile(min=1, opt=1, max=32),
            inputs=(TensorSpec(name=tower.input_name, dtype=form, shape=shape, normalisation=by),),
            outputs=(TensorSpec(name="image_embeds", dtype="float32", shape=("batch", model.ref.embed_dim)),),
            external_data=external_data_of(folder, "image.data"),
            device="cpu",
            optimisation="extended",
        )
    return model.ref, found


def runtime(ref: ModelRef, session: Session, *, crops: bool, decode: Decode, pool: ThreadPoolExecutor) -> Callable:
    """From encoded images to embeddings, as the runtime does it."""
    prepare = Preprocessing(ref, b"", crops=crops, decode=decode)

    def call(data: list[bytes]) -> np.ndarray:
        return session.run(np.stack(list(pool.map(lambda one: prepare.pixels([one])[0], data))))

    return call


def told(taken: dict[str, list[float]], count: int, against: str, more: dict[str, str]) -> None:
    for name, seconds in taken.items():
        print(
            f"  {name:40}{1000 * statistics.median(seconds) / count:9.3f} ms"
            f"{ratio(taken, name, against):7.2f}x   {more.get(name, '')}"
        )


def forms(spec: ImageSpec, sessions: dict[str, Session], rounds: int) -> None:
    """Bytes, preprocessing and session of both forms."""
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
        told(turns(calls, rounds * (1 if batch > 8 else 3)), batch, "float32", more)


def large(ref: ModelRef, sessions: dict[str, Session], work: Path, rounds: int, count: int) -> None:
    """Photographs of 12 megapixels, from bytes."""
    data, spec = photographs(count, 4000, 3000), ref.image
    sides = {name: side for name, side in torch_sides(work / "model", {"compile"}).items() if name == TRANSFORMERS}
    with ThreadPoolExecutor(cores()) as pool:
        way = partial(runtime, ref, pool=pool)
        sides |= {
            "runtime, pixels, decoded in full": way(sessions["float32"], crops=False, decode="full"),
            FULL: way(sessions["uint8"], crops=True, decode="full"),
            "runtime, crops, scaled": way(sessions["uint8"], crops=True, decode="scaled"),
        }
        for batch in sorted({1, count}):
            some = data[:batch]
            print(
                f"\n{batch} photographs of 4000 x 3000 ({len(data[0]) / 1e6:.1f} MB each), from bytes, {cores()} cores: per "
                "image, times as fast as transformers, smallest cosine to it and to full decoding"
            )
            found = {name: side(some) for name, side in sides.items()}
            more = {
                name: " ".join(
                    f"{float((rows * found[other]).sum(axis=1).min()):.5f}" for other in (TRANSFORMERS, FULL)
                )
                for name, rows in found.items()
            }
            told(turns({name: partial(side, some) for name, side in sides.items()}, rounds), batch, TRANSFORMERS, more)
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
    arguments = parser.parse_args()
    ref, sessions = made(arguments.work)
    forms(ref.image, sessions, arguments.rounds)
    large(ref, sessions, arguments.work, arguments.rounds, arguments.photographs)


if __name__ == "__main__":
    main()

"""From a checkpoint folder to ONNX and a TensorRT-RTX engine, both towers: ours next to the plain defaults of the libraries.

    python tests/benchmarks/bench_export.py clip-vit-l14

Every step runs in a process of its own; printed are its wall time and the peak of its resident memory. Weights are random,
at full size. The plain way loads the whole model, calls `torch.onnx.export` and the parser as their documentation does, and
checks nothing; ours includes the checks, the fingerprint of an edit in every layer of the recipe, and the digests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_families import timed

PREPARE = """
import dataclasses, json, sys
from pathlib import Path
import torch
from uwm_deploy.records.codec import plain_from_record
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.records.edit import TensorEdit
from uwm_deploy.towers.load import load_model
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.edits.patch import Patch, TensorPatch, multiply_entries
from uwm_deploy.records.model import TowerName
recipe, _ = recipe_of(sys.argv[1])
folder = Path(sys.argv[2])
folder.mkdir()
model = load_model(recipe, folder=None, weights="random", device="cpu")
edits, patches = [], {}
for name in TowerName:
    for path, layer in model.tower(name).layers(recipe.entries.of(name).layers).items():
        weight = layer.weight.detach()
        before, indices = digest_of_tensor(weight), torch.arange(0, weight.numel(), 50, dtype=torch.int32)
        multiply_entries(weight, indices, -1.0)
        after = digest_of_tensor(weight)
        patches[path + ".weight"] = TensorPatch(indices=indices, factor=-1.0, digest_before=before, digest_after=after)
        edits.append(TensorEdit(tower=name, name=path + ".weight", shape=tuple(weight.shape), keep_mass=0.98, factor=-1.0,
                                selected=len(indices), share=0.02, digest_before=before, digest_after=after))
model.save(folder)
(folder / "patch.bin").write_bytes(Patch(patches).to_bytes())
(folder / "edits.txt").write_text(json.dumps([plain_from_record(edit) for edit in edits]))
"""
OURS = """
import json, sys
from pathlib import Path
from uwm_deploy.records.codec import json_from_record, record_from_plain
from uwm_deploy.runtime.memory import leave_at_once, without_collection
from uwm_deploy.records.edit import TensorEdit
with without_collection():  # as the command line does
    from uwm_deploy.recipes.resolve import recipe_of
    from uwm_deploy.stages.export import onnx_from_tower
    from uwm_deploy.stages.traced import sample_of
    from uwm_deploy.towers.load import load_model
    from uwm_deploy.edits.patch import Patch
from uwm_deploy.records.model import TowerName
recipe, _ = recipe_of(sys.argv[1])
name, folder, out = TowerName(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
edits = [record_from_plain(TensorEdit, e, where="edits") for e in json.loads((folder / "edits.txt").read_text())]
model = load_model(recipe, folder=folder, device="cpu")
model.keep_only(name)
tower, ref = model.tower(name), model.ref
shape = (3, ref.image.crop, ref.image.crop) if name is TowerName.IMAGE else (ref.text.context_length,)
patch, ours = Patch.from_file(folder / "patch.bin"), [e for e in edits if e.tower is name]
artifact = onnx_from_tower(tower, sample_of(tower, shape, ref.text.eos_id), recipe.export,
                           weights_digest=ref.weights_digest, edits=ours, patch=patch, folder=out)
(out / f"{name.value}.json").write_text(json_from_record(artifact))
leave_at_once(0)  # as the command line does
"""
PLAIN = """
import sys
from pathlib import Path
import torch
from transformers import CLIPModel
name, folder, out = sys.argv[2], sys.argv[3], sys.argv[4]
model = CLIPModel.from_pretrained(folder).eval()
class Image(torch.nn.Module):
    def __init__(self): super().__init__(); self.model = model
    def forward(self, pixel_values): return self.model.get_image_features(pixel_values=pixel_values).pooler_output
class Text(torch.nn.Module):
    def __init__(self): super().__init__(); self.model = model
    def forward(self, input_ids): return self.model.get_text_features(input_ids=input_ids).pooler_output
side, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
if name == "image":
    module, sample, entry = Image(), torch.randn(2, 3, side, side), "pixel_values"
else:
    module, sample, entry = Text(), torch.randint(5, 1000, (2, length)), "input_ids"
with torch.no_grad():
    program = torch.onnx.export(module, (sample,), dynamo=True, dynamic_shapes=({0: "batch"},), input_names=[entry],
                                output_names=["embeds"], verbose=False)
program.save(f"{out}/{name}.onnx")
"""
OUR_ENGINE = """
import sys
from pathlib import Path
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.graphs.engine_builder import build
from uwm_deploy.records.graph import OnnxArtifact
folder, name = Path(sys.argv[4]), sys.argv[2]
graph = record_from_json(OnnxArtifact, (folder / f"{name}.json").read_bytes(), where=name)
build({"module": "tensorrt_rtx", "onnx": str(folder / graph.file), "engine": str(folder / f"{name}.engine"),
       "input": graph.inputs[0].name, "row": [[s.min, s.opt, s.max] for s in graph.inputs[0].row_sizes],
       "profiles": [[1, 8, 32]]})
"""
PLAIN_ENGINE = """
import sys
import tensorrt_rtx as trt
name, out = sys.argv[2], sys.argv[4]
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(f"{out}/{name}.onnx")
config, profile = builder.create_builder_config(), builder.create_optimization_profile()
entry = network.get_input(0)
rest = tuple(entry.shape)[1:]
profile.set_shape(entry.name, (1, *rest), (8, *rest), (32, *rest))
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
open(f"{out}/{name}.engine", "wb").write(plan)
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="clip-vit-l14", help="recipe of family hf-clip")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        timed([sys.executable, "-c", PREPARE, arguments.model, str(folder / "model")])
        total: dict[str, list[float]] = {}
        print(f"{arguments.model}, random weights: seconds and peak MiB")
        print(f"{'':26}{'export':>18}{'engine':>18}{'file MiB':>10}", flush=True)
        for tower in ("image", "text"):
            for way, steps in (("plain", (PLAIN, PLAIN_ENGINE)), ("ours", (OURS, OUR_ENGINE))):
                out = folder / f"{way}-{tower}"
                out.mkdir()
                cells = []
                for step in steps:
                    command = [sys.executable, "-c", step, arguments.model, tower, str(folder / "model"), str(out)]
                    seconds, peak, _ = timed(command)
                    cells.append((seconds, peak / 2**20))
                    sums = total.setdefault(way, [0.0, 0.0])
                    sums[0], sums[1] = sums[0] + seconds, max(sums[1], peak / 2**20)
                size = sum(f.stat().st_size for f in out.glob("*.onnx*")) / 2**20
                row = "".join(f"{seconds:9.1f}{peak:9.0f}" for seconds, peak in cells)
                print(f"{tower + ' tower, ' + way:26}{row}{size:10.0f}", flush=True)
                for file in out.iterdir():
                    file.unlink()
        ours, plain = total["ours"], total["plain"]
        print(f"ours / plain: time {ours[0] / plain[0]:.2f}, peak memory {ours[1] / plain[1]:.2f}")


if __name__ == "__main__":
    main()

"""A full disk, limits of files and memory: exit code 6 and one line, whichever library meets them; nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from uwm_deploy.commands.failure import failure_of
from uwm_deploy.errors import DataError, InputError, IntegrityError, PrerequisiteError
from uwm_deploy.records.machine import disk_errors, failure_of_machine

ROOT = Path(__file__).parents[2]

WRITERS = """
import importlib.util, json, os, resource, sys
from pathlib import Path
import numpy as np
import onnx
import pyarrow as pa
from pyarrow import parquet
from PIL import Image
from safetensors.numpy import save_file
from uwm_deploy.commands.failure import failure_of
from uwm_deploy.graphs.child_process import made_by_child
from uwm_deploy.records.files import whole_folder, write_atomic
from uwm_deploy.stages.compile import BUILDER

root = Path(sys.argv[1])
rows = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
weight = onnx.numpy_helper.from_array(rows, "w")
value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 64])
node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
graph = onnx.helper.make_graph([node], "g", [value("x")], [value("y")], [weight])
onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)]), root / "graph.onnx")
spec = {"module": "onnxruntime", "onnx": str(root / "graph.onnx"), "engine": "x.onnx", "external_data": "",
        "provider": "cpu", "options": {}, "compile": False, "fit_for_cpu": False,
        "weights_only": False, "tf32": False}

def faiss_index(folder):
    import faiss
    index = faiss.IndexFlatIP(64)
    index.add(rows)
    faiss.write_index(index, str(folder / "x.index"))

def text(folder):
    (folder / "x.txt").write_text("x" * 20000)

writers = {
    "safetensors": lambda folder: save_file({"rows": rows}, folder / "x.safetensors"),
    "arrow": lambda folder: parquet.write_table(pa.table({"x": rows.reshape(-1)}), folder / "x.parquet"),
    "arrow stream": lambda folder: parquet.write_table(pa.table({"x": rows.reshape(-1)}), (folder / "y.parquet").open("wb")),
    "numpy": lambda folder: np.save(folder / "x.npy", rows),
    "pillow": lambda folder: Image.fromarray(rows.view(np.uint8)).save(folder / "x.png"),
    "text": text,
    "onnx": lambda folder: onnx.save(onnx.load(root / "graph.onnx"), folder / "x.onnx"),
    "child": lambda folder: made_by_child(BUILDER, spec, "onnxruntime", "x", folder),
}
if importlib.util.find_spec("faiss"):  # an extra
    writers["faiss"] = faiss_index

def outcome(write, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        with whole_folder(root / "out") as folder:
            write(folder)
    except Exception as error:
        failure = failure_of(error)
        return [failure.kind, failure.exit_code, failure.what]
    return ["made", 0, ""]

found = {}
for name, write in writers.items():
    for limit in (150, 8000):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, json.dumps(outcome(write, limit)).encode())
            os._exit(0)
        os.close(writing)
        os.wait()
        found[f"{name} {limit}"] = [*json.loads(os.read(reading, 10000)), sorted(p.name for p in root.iterdir())]
print(json.dumps(found))
"""
"""Every library that writes files for this project, in a folder that must appear whole, beneath two limits."""


def test_every_writer_says_that_the_machine_failed(tmp_path: Path) -> None:
    """With a limit of 150 and of 8,000 bytes a file: exit code 6, and neither the folder nor anything beside it."""
    done = subprocess.run(
        [sys.executable, "-c", WRITERS, str(tmp_path)],
        capture_output=True, text=True, check=True,
        # A module first imported beneath the limit would leave half of its bytecode in the environment.
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found) == 2 * (9 if importlib.util.find_spec("faiss") else 8)
    for name, (kind, code, what, left) in found.items():
        assert (kind, code) == ("PrerequisiteError", 6), (name, kind, what)
        assert left == ["graph.onnx"], (name, left)


class SafetensorError(Exception):
    """As the library has it: no OSError, and the number in its words only."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            "not enough memory",
        ),
        (RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"), "not enough memory"),
        (RuntimeError("can't start new thread"), "no more threads"),
        (
            OSError("Caught OSError in DataLoader worker process 0.\n[Errno 5] Input/output error"),
            "the disk or the network",
        ),
        (RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed."), "a worker process was killed"),
        (
            BrokenProcessPool("A process in the process pool was terminated abruptly while"),
            "a worker process was killed",
        ),
        (ImportError("onnx.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(24, "Too many open files", "/data/a.png"), "too many files are open: /data/a.png"),
        (OSError(116, "Stale file handle", "/data/a.png"), "the network file system lost the file"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_failure_of_the_machine_is_told_from_every_library(error: Exception, says: str) -> None:
    """Whatever its type, and whatever it was taken for on the way: exit code 6, one line, what helps."""
    failure = failure_of(error)
    assert (failure.kind, failure.exit_code) == ("PrerequisiteError", 6)
    assert says in failure.what
    assert failure.fix
    if not isinstance(error, MemoryError):  # below an error of input it may be the input that asks for too much
        wrapped = InputError("scores.safetensors is not a whole file", fix="score again")
        wrapped.__cause__ = error
        failure = failure_of(wrapped)
        assert (failure.exit_code, "scores.safetensors" in failure.what or "worker" in failure.what) == (6, True)
    with pytest.raises(PrerequisiteError), disk_errors(Path("out")):
        raise error


def test_a_fault_of_the_input_is_none_of_the_machine() -> None:
    """A missing file, a broken record, a refused path, a word that a message happens to have."""
    missing = InputError("a.toml cannot be read", fix="check the path")
    missing.__cause__ = FileNotFoundError(2, "No such file or directory", "a.toml")
    about = DataError("the caption says 'No space left on device'", fix="leave it out")
    for error in (missing, about, IntegrityError("x has changed"), ValueError("(os error 28)x"), KeyError("x")):
        assert (failure_of_machine(error) is None) == (not isinstance(error, ValueError)), error


def test_output_that_nobody_reads_is_quiet_and_keeps_the_exit_code(tmp_path: Path) -> None:
    """`inspect | head`, and a file on a full disk as standard output: nothing on standard error, or one line."""
    (tmp_path / "x.json").write_text(json.dumps({"schema_version": 2, "record": "other"}))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m uwm_deploy.cli"

    def ran(line: str) -> tuple[int, str]:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stderr

    assert ran(f"set -o pipefail; {command} models --json | true") == (0, "")
    assert ran(f"set -o pipefail; {command} models | true") == (0, "")
    code, said = ran(f"{command} models --json > /dev/full")
    assert (code, said.count("\n"), "no space left" in said) == (6, 1, True)
    code, said = ran(f"set -o pipefail; {command} inspect {tmp_path} --json | true")
    assert (code, said.count("\n")) == (2, 1)

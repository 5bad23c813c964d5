"""A file that is there and cannot be read says nothing about the input, whichever reader meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_machine_failures import EIO, ROOT, WITHOUT_RIGHTS, no_more_files
from uwm_deploy.bundle.head import RECORD, read_head
from uwm_deploy.bundle.sign import _private_key
from uwm_deploy.bundle.signature import load_public_key
from uwm_deploy.bundle.tensors import arrays_of
from uwm_deploy.edits import fit_files, score_files
from uwm_deploy.edits.patch import Patch
from uwm_deploy.edits.sharded_sums import _Total
from uwm_deploy.errors import UnreadableError, UwmError
from uwm_deploy.graphs.tensor_layout import stored_tensors
from uwm_deploy.pipeline.baseline import read_baseline
from uwm_deploy.pipeline.folder import current
from uwm_deploy.pipeline.judge import report_at
from uwm_deploy.recipes import hub, resolve, shipped
from uwm_deploy.records.codec import read_record
from uwm_deploy.records.edit import EditRecord
from uwm_deploy.records.model import TowerName
from uwm_deploy.report.inspection import describe
from uwm_deploy.studies.diagnose import _unlike_file
from uwm_deploy.studies.downstream import draw, judges, prompts
from uwm_deploy.towers.checkpoint import opened_weights
from uwm_deploy.towers.embedding_map import load_maps
from uwm_deploy.training import safety_head_folder
from uwm_deploy.training.checkpoints import read_state

_NOTHING: Any = None
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "fit": ("fit.safetensors", lambda path: fit_files._read(path, f"sha256:{'0' * 64}")),
    "sums": ("sums.safetensors", lambda path: _Total(TowerName.TEXT, path, "key").restore(3)),
    "stamp": ("stage.json", lambda path: current(path.parent, {})),
    "weights": ("model.safetensors", lambda path: opened_weights(path).__enter__()),
    "maps": ("maps.safetensors", lambda path: load_maps(_NOTHING, path)),
    "state": ("state.safetensors", lambda path: read_state(path, "key")),
    "scores": ("scores.safetensors", lambda path: list(score_files._scores_of("layer", [path]))),
    "inspected weights": ("patch.safetensors", describe),
    "inspected record": ("edit.json", describe),
    "edited weights": ("model.safetensors", lambda path: list(_unlike_file(path, _NOTHING))),
    "features": ("features.safetensors", safety_head_folder._read),
    "texts": ("safe.txt", lambda path: safety_head_folder._texts(path, _NOTHING)),
    "record": ("edit.json", partial(read_record, EditRecord)),
    "head": (RECORD, lambda path: read_head(path.parent)),
    "policy": ("policy.toml", lambda path: shipped.read_toml("ci", str(path))),
    "config": ("config.json", lambda path: resolve._json_of(path.parent, path.name)),
    "index": ("model.safetensors.index.json", lambda path: hub._shards(path.parent)),
    "private key": ("key.pem", lambda path: _private_key(path, None)),
    "public key": ("key.pub", load_public_key),
    "report": ("verify.json", report_at),
    "baseline": ("baseline.json", read_baseline),
    "patch": ("patch.safetensors", Patch.from_file),
    "arrays": ("canaries.safetensors", arrays_of),
    "graph": ("image.onnx", stored_tensors),
    "prompts": ("prompts.csv", lambda path: prompts.prompts_of_file(path, 0)),
    "words": ("words.txt", judges._entries),
    "pictures": ("1.png", lambda path: draw._opened([path])),
}
"""Name of the file and its reader."""


def _code_of(read: Callable[[Path], object], file: Path) -> int:
    try:
        read(file)
    except UwmError as error:
        return int(error.exit_code)
    return 0


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_read_is_no_fact_about_the_input(name: str, tmp_path: Path) -> None:
    """Broken, it is refused or passed over as such; without a descriptor, or on a broken disk, the command ends with 6."""
    file, read = tmp_path / READERS[name][0], READERS[name][1]
    file.write_bytes(b"\xff")
    assert _code_of(read, file) in (0, 2, 3, 5)
    with no_more_files(), pytest.raises(UnreadableError, match=r"cannot be read: Too many open files"):
        read(file)
    if name == "graph":  # it is mapped, which does not read yet
        return
    file.unlink()
    file.symlink_to(EIO)
    with pytest.raises(UnreadableError, match=r"cannot be read: Input/output error") as caught:
        read(file)
    assert file.name in caught.value.what


def test_a_running_total_that_cannot_be_read_is_not_begun_anew(tmp_path: Path) -> None:
    """One that is missing, or not whole, is."""
    total = _Total(TowerName.TEXT, tmp_path / "none.safetensors", "key")
    assert total.restore(3) == 0
    (tmp_path / "none.safetensors").write_bytes(b"cut")
    assert total.restore(3) == 0
    with no_more_files(), pytest.raises(UnreadableError):
        total.restore(3)


@pytest.mark.parametrize(
    "words",
    [
        ["gate", "locked", "--policy", "demo"],
        ["sign", ".", "--key", "locked"],
        ["inspect", "locked"],
    ],
    ids=lambda words: words[0],
)
def test_a_right_that_is_missing_is_told_alike(words: list[str], tmp_path: Path) -> None:
    """Exit code 6 and the file's name, whichever command and option names the file."""
    name = "verify.json" if words[0] != "sign" else "key.pem"
    (tmp_path / name).write_text("{}")
    (tmp_path / name).chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS, *(name if word == "locked" else word for word in words)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (6, 1), done.stderr
    assert f"{name} cannot be read: Permission denied" in done.stderr

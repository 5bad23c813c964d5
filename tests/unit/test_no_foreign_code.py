"""A checkpoint folder is data: Python files in it are never imported, whatever its JSON files say of them."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest

from uwm_deploy.recipes import shipped
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.towers.library import library_of
from uwm_deploy.towers.load import load_model

CLASSES = {
    "config.json": {"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]},
    "preprocessor_config.json": {"AutoImageProcessor": "foreign.Processor"},
}
"""Files of a checkpoint to the classes of its own that `transformers` can be told of in them."""

CODE = """
from pathlib import Path
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast
class Config(CLIPConfig): ...
class Model(CLIPModel): ...
class Tokenizer(PreTrainedTokenizerFast): ...
class Processor(CLIPImageProcessor): ...
Path({mark!r}).touch()
"""
"""Classes of its own, since the library marks those that it takes from a checkpoint, for the rest of the process."""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's checkpoint with code of its own; whoever is asked whether to run it says yes."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(shipped.checkpoint_folder("shipped:demo", ""), folder)
    for name, classes in CLASSES.items():
        body = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(body | {"auto_map": classes}), encoding="utf-8")
    (folder / "foreign.py").write_text(CODE.format(mark=str(tmp_path / "executed")), encoding="utf-8")
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_code_in_a_checkpoint_is_not_executed(checkpoint: Path, tmp_path: Path) -> None:
    """The model, its tokenizer and its image processor are loaded by the classes of the library."""
    text, where = shipped.read_toml("export", "demo")
    model = load_model(recipe_from_toml(text, where=where), folder=checkpoint, device="cpu")
    library_of("hf-clip", model.source, checkpoint, model.ref.text)
    assert not (tmp_path / "executed").exists()


def test_the_code_would_have_been_executed(checkpoint: Path, tmp_path: Path) -> None:
    """The test above can fail: who trusts the checkpoint runs its code."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=True)
    assert (tmp_path / "executed").exists()

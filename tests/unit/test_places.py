"""Where a checkpoint comes from: the hub's name or a folder's path, never what happens to lie in the working folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.made_once import made_once
from tests.small_folders import MAKERS
from uwm_deploy.errors import InputError, PrerequisiteError
from uwm_deploy.pipeline.plan import plan_of
from uwm_deploy.pipeline.request import Request
from uwm_deploy.recipes.hub import missing_of
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.recipes.resolve import recipe_of
from uwm_deploy.recipes.shipped import checkpoint_folder, read_toml
from uwm_deploy.towers.load import load_model

REPO, COMMIT = "openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "small-hf-clip", MAKERS["hf-clip"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty cache of the hub's files."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return folder


def _file(folder: Path, name: str, **changes: str) -> Path:
    """A recipe's file with other entries of its model."""
    text = read_toml("export", "clip-vit-b32")[0].replace('name = "clip-vit-b32"', f'name = "{name}"')
    lines = [line for line in text.split("\n") if line.partition(" = ")[0] not in (*changes, "revision")]
    at = lines.index("[model]") + 1
    folder.mkdir(exist_ok=True)
    told = [f"{key} = {json.dumps(value)}" for key, value in changes.items()]
    (folder / f"{name}.toml").write_text("\n".join([*lines[:at], *told, *lines[at:]]))
    return folder / f"{name}.toml"


def test_a_shipped_recipe_never_takes_a_folder_of_its_repository_s_name(here: Path, small: Path) -> None:
    """By any use of it: it is the hub's, in the run and in the records."""
    (here / REPO).parent.mkdir()
    (here / REPO).symlink_to(small)
    for request in (Request(model="clip-vit-b32"), Request(model="clip-vit-b32", revision="f" * 40)):
        plan = plan_of(request)
        with pytest.raises(PrerequisiteError, match=f"{REPO}@"):
            _ = plan.checkpoint
        assert recipe_from_toml(plan.recipe_text, where="bundle").model.repo == REPO
    assert plan_of(Request(model="clip-vit-b32", weights="random")).checkpoint is None
    recipe = recipe_of("clip-vit-b32")[0]
    assert load_model(recipe, folder=small, device="cpu").ref.repo == REPO  # what the folder was asked for by
    file = _file(here, "mine", repo=REPO)
    with pytest.raises(InputError, match=r"no revision is pinned.*a folder begins with \./ or /"):
        checkpoint_folder(recipe_of(str(file))[0].model.repo, "")


def test_a_recipe_s_folder_starts_from_the_recipe(here: Path, small: Path, tmp_path: Path) -> None:
    """Its own, that of its base and that of its companion; no record has the path, and says that it was a folder."""
    for name in ("model", "base", "clip"):
        (tmp_path / "project").mkdir(exist_ok=True)
        (tmp_path / "project" / name).symlink_to(small)
    (here / "model").mkdir()
    asked = {"repo": "./model", "base": "../project/base", "companion": str(tmp_path / "project" / "clip")}
    file = _file(tmp_path / "project", "mine", **asked)
    for named in (str(file), os.path.relpath(file)):
        recipe, _ = recipe_of(named)
        assert recipe.model.repo == recipe.model.base == recipe.model.companion == str(small.resolve())
        plan = plan_of(Request(model=named))
        assert plan.checkpoint == small.resolve()
        told = recipe_from_toml(plan.recipe_text, where="bundle").model
        assert (told.repo, told.base, told.companion) == ("local", "local", "local")
    assert load_model(recipe, folder=plan.checkpoint, device="cpu").ref.repo == "local"


def test_a_full_path_in_a_recipe_is_in_no_record(here: Path, small: Path) -> None:
    """Although the recipe's text names just what is built."""
    plan = plan_of(Request(model=str(_file(here, "mine", repo=str(small.resolve())))))
    assert str(small.resolve()) not in plan.recipe_text
    assert recipe_from_toml(plan.recipe_text, where="bundle").model.repo == "local"


def test_a_path_of_a_record_starts_from_nowhere(here: Path, small: Path) -> None:
    """A recipe that older releases kept may have one: it is refused, and not looked for in the working folder."""
    (here / "model").symlink_to(small)
    with pytest.raises(InputError, match=r"what that path starts from is not known here; pass --checkpoint FOLDER"):
        checkpoint_folder("./model", "")
    with pytest.raises(InputError, match="does not exist"):
        checkpoint_folder(str(here / "none"), "")


# --- the cache ------------------------------------------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """A hub with one revision of one repository; it counts what it is asked for."""

    def __init__(self, folder: Path, asked: list[str], *rest: object) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*rest)  # type: ignore[arg-type]

    def _answer(self) -> None:
        self.asked.append(self.path)
        path, files = self.path.partition("?")[0], sorted(self.folder.iterdir())
        if path == f"/api/models/{REPO}/revision/{COMMIT}":
            body = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            body = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"{n:040}"}
                for n, f in enumerate(files)
            ]
        elif (name := path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")) in [file.name for file in files]:
            return self._send((self.folder / name).read_bytes(), f"{[f.name for f in files].index(name):040}")
        else:
            return self.send_error(404)
        return self._send(json.dumps(body).encode(), "")

    def _send(self, content: bytes, tag: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        if tag:
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(small: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked for."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, small, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


_ASK = """
import sys
from uwm_deploy.errors import UwmError
from uwm_deploy.recipes.hub import hub_checkpoint
try:
    print(hub_checkpoint(sys.argv[1], sys.argv[2], family="hf-clip", local_only=sys.argv[3:] == ["local"]))
except UwmError as error:
    sys.exit(f"{int(error.exit_code)} {error}")
"""


def _asked(cache: Path, address: str, *words: str) -> tuple[str, str]:
    """What another process gets from the cache and the hub: a folder, or the exit code with its line."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = "" if address else "1"
    done = subprocess.run(
        [sys.executable, "-c", _ASK, REPO, COMMIT, *words],
        env=environment, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr.strip().splitlines()[-1] if done.returncode else ""


def _part(cache: Path, small: Path, *names: str) -> Path:
    folder = cache / f"models--{REPO.replace('/', '--')}" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes((small / name).read_bytes())
    return folder


_WORDS = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def test_a_part_of_a_checkpoint_in_the_cache_is_completed(
    tmp_path: Path, small: Path, hub: tuple[str, list[str]]
) -> None:
    """As another program leaves it, that only wanted the words: the hub is asked for the rest, and then never again."""
    address, asked = hub
    folder = _part(tmp_path, small, *_WORDS)
    assert _asked(tmp_path, address) == (str(folder), "")
    assert missing_of(folder, "hf-clip") == ""
    assert (folder / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()
    before = len(asked)
    assert before > 0
    assert _asked(tmp_path, address) == (str(folder), "")
    assert len(asked) == before


@pytest.mark.parametrize("words", [[], ["local"]], ids=["no network", "not to be asked"])
def test_what_a_part_lacks_is_said_without_the_hub(words: list[str], tmp_path: Path, small: Path) -> None:
    """Exit code 6: the machine lacks it, and the checkpoint is not at fault."""
    _part(tmp_path, small, *_WORDS)
    folder, said = _asked(tmp_path, "", *words)
    assert folder == ""
    assert said.startswith(f"6 {REPO}@{COMMIT[:12]} is not whole on this machine")
    assert "no weights (*.safetensors)" in said
    assert "--checkpoint FOLDER" in said


def test_what_a_model_needs_is_known_by_its_family(tmp_path: Path, small: Path) -> None:
    """Each file, shards by the index, and a link whose file was not fetched to its end."""
    folder = _part(tmp_path, small, *(file.name for file in small.iterdir()))
    assert missing_of(folder, "hf-clip") == missing_of(folder, None) == ""
    assert missing_of(folder, "open-clip") == "no open_clip_config.json"
    (folder / "preprocessor_config.json").rename(folder / "processor_config.json")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert missing_of(folder, "hf-clip") == "no tokenizer.json, and no vocab.json with merges.txt"
    (folder / "merges.txt").touch()
    assert missing_of(folder, "hf-clip") == ""
    assert missing_of(folder, "siglip") == "no tokenizer.json"
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = ["a.safetensors", "b.safetensors", "c.safetensors"]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(n): name for n, name in enumerate(names)}}))
    assert missing_of(folder, "hf-clip") == "no b.safetensors and 1 more weights"
    index.unlink()
    (folder / "a.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / "none")
    assert missing_of(folder, "hf-clip") == "no weights (*.safetensors)"

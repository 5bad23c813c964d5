"""Bad input: one clear line each, the documented exit code, no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from uwm_deploy.cli import cli
from uwm_deploy.errors import InputError, RecipeError
from uwm_deploy.pipeline.request import Request, resolved_recipe
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.recipes.resolve import recipe_of

ROOT = Path(__file__).parents[2]
DEMO = resources.checkpoint_folder("shipped:demo", "")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint to be damaged."""
    shutil.copytree(DEMO, tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two tiny images."""
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (60, 50), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def _pair(number: int, **changes: str) -> dict[str, str]:
    return {
        "id": f"i{number}",
        "safe_image": "a.png",
        "unsafe_image": "b.png",
        "safe_text": f"a red thing {number}",
        "unsafe_text": f"a fire near a blue thing {number}",
    } | changes


def _set(folder: Path, rows: list[dict[str, str]] | str, **keys: object) -> str:
    text = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
    (folder / "pairs.jsonl").write_text(text)
    extra = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    (folder / "set.toml").write_text(
        f'format = 1\nname = "set"\nsource = "manifest"\nmanifest = "pairs.jsonl"\n{extra}'
    )
    return str(folder / "set.toml")


def _score(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Runs `score` in an empty run folder; returns exit code and output, after checking that nothing was left."""
    command = ["score", "--method", "uwm", "--work", str(tmp_path / "work"), "--workers", "0", *arguments]
    result = CliRunner().invoke(cli, command)
    assert "Traceback" not in result.output
    if result.exit_code:
        errors = [line for line in result.output.splitlines() if line.startswith(("error:", "internal error:"))]
        assert len(errors) == 1, result.output
        left = [p.name for p in (tmp_path / "work").glob("*")] if (tmp_path / "work").exists() else []
        assert left in ([], [".lock"]) or not [name for name in left if name not in (".lock",)], left
    return result.exit_code, result.output


def _weights(checkpoint: Path, change) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


DAMAGE = {
    "truncated": (lambda c: _cut(c / "model.safetensors"), "truncated or broken"),
    "missing": (lambda c: (c / "model.safetensors").unlink(), "no weights"),
    "pickle": (lambda c: (c / "model.safetensors").rename(c / "pytorch_model.bin"), "pickle"),
    "nan": (
        lambda c: _weights(c, lambda t: t["visual_projection.weight"].view(-1)[3].fill_(float("nan"))),
        "NaN or infinity",
    ),
    "lost weight": (lambda c: _weights(c, lambda t: t.pop("text_projection.weight")), "lacks 1 weights"),
    "no tokenizer": (lambda c: [(c / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "broken config": (lambda c: (c / "config.json").write_text("{"), "not JSON"),
    "other family": (lambda c: (c / "config.json").write_text('{"model_type": "bert"}'), "bert"),
    "no preprocessor": (lambda c: (c / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    "wrong end token": (lambda c: _edit(c / "config.json", "eos_token_id", 7), "pools the text at token 7"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _edit(path: Path, key: str, value: int) -> None:
    body = json.loads(path.read_text())
    body["text_config"][key] = value
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("name", list(DAMAGE))
def test_a_damaged_checkpoint_is_refused(name: str, checkpoint: Path, images: Path, tmp_path: Path) -> None:
    """Every kind of damage ends with exit code 2 and names the file."""
    damage, message = DAMAGE[name]
    damage(checkpoint)
    calibration = _set(images, [_pair(i) for i in range(3)])
    code, output = _score(tmp_path, "--model", str(checkpoint), "--calibration", calibration)
    assert code == 2, output
    assert message in output


SETS = {
    "empty": ("", {}, "no quadruples"),
    "not json": ("{", {}, "line 1 is not JSON"),
    "unknown key": ([_pair(1, colour="red")], {}, "unknown key 'colour'"),
    "no id": ([_pair(1, id="")], {}, "has no id"),
    "id twice": ([_pair(1), _pair(1)], {}, "occurs more than once"),
    "unpaired": ([{k: v for k, v in _pair(1).items() if k != "unsafe_text"}], {}, "unpaired text"),
    "no members": ([{"id": "x"}], {}, "neither images nor texts"),
    "missing image": ([_pair(1), _pair(2, safe_image="none.png")], {}, "i2"),
    "broken image": ([_pair(1), _pair(2, unsafe_image="broken.png")], {}, "broken.png is not a whole image"),
}


@pytest.mark.parametrize("name", list(SETS))
def test_a_bad_set_is_refused(name: str, images: Path, tmp_path: Path) -> None:
    """Every kind of bad set ends with exit code 2 and names the line or the item."""
    rows, keys, message = SETS[name]
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:60])
    code, output = _score(tmp_path, "--calibration", _set(images, rows, **keys))
    assert code == 2, output
    assert message in output


def test_a_broken_image_within_the_limit_is_left_out_and_named(images: Path, tmp_path: Path) -> None:
    """With a higher limit the broken item is counted in the record, and the rest is scored."""
    rows = [_pair(i) for i in range(9)] + [_pair(9, safe_image="none.png")]
    code, output = _score(tmp_path, "--calibration", _set(images, rows, max_broken_share=0.2))
    assert code == 0, output
    record = json.loads((tmp_path / "work" / "score" / "score.json").read_text())
    assert [item["id"] for item in record["left_out"]["image"]] == ["i9"]
    assert record["n_pairs"] == {"text": 10, "image": 9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('layers = ["*.mlp.fc2"]', 'layers = ["*.mlp.fc9"]'), "'*.mlp.fc9' matches no linear layer"),
        (('family = "hf-clip"', 'family = "hf-clap"'), "hf-clip"),
        (('repo = "shipped:demo"', 'repo = "someone/model"'), "no revision is pinned"),
        (('repo = "shipped:demo"', 'repo = "./nowhere"'), "does not exist"),
    ],
)
def test_a_bad_recipe_is_refused(change: tuple[str, str], message: str, images: Path, tmp_path: Path) -> None:
    """A layer pattern without match, an unknown family and an unpinned or missing checkpoint end with exit code 2."""
    text, _ = resources.read_toml("export", "demo")
    assert change[0] in text
    (tmp_path / "demo.toml").write_text(text.replace(*change))
    calibration = _set(images, [_pair(i) for i in range(3)])
    code, output = _score(tmp_path, "--model", str(tmp_path / "demo.toml"), "--calibration", calibration)
    assert code == 2, output
    assert message in output


def test_a_missing_device_is_an_environment_error(images: Path, tmp_path: Path) -> None:
    """Asking for CUDA where there is none ends with exit code 6, not on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code, output = _score(tmp_path, "--calibration", _set(images, [_pair(1)]), "--device", "cuda")
    assert code == 6, output


def test_an_output_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    """A run folder below a plain file cannot be made; exit code 2."""
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli, ["score", "--work", str(tmp_path / "file" / "work")])
    assert result.exit_code == 2
    assert "in the way" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "a=demo:safety-axis", "--leave-out", ""], "names no concept"),
        (["--model", "demo", "--leave-out", "fire"], "nothing is edited"),
        (["--compare", "none=demo", "--leave-out", "fire,smoke"], "nothing is edited"),
    ],
)
def test_concepts_are_left_out_of_an_edit_or_not_at_all(words: list[str], said: str) -> None:
    """A number of concepts that an edit has seen never passes for one of unseen ones."""
    result = CliRunner().invoke(cli, ["evaluate", *words])
    assert (result.exit_code, said in result.output) == (2, True), result.output


def test_nothing_is_left_out_of_a_finished_edit(tmp_path: Path) -> None:
    """A saved edited model was made with whatever concepts; the first row's name is in the error."""
    (tmp_path / "edit.json").write_text("{}")
    (tmp_path / "model").mkdir()
    row = f"mine={tmp_path / 'model'}"
    words = ["evaluate", "--compare", "a=demo:safety-axis", "--compare", row, "--leave-out", "fire"]
    result = CliRunner().invoke(cli, words)
    assert (result.exit_code, "mine is edited already" in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("g=1e30,o=0,kappa=0,a=1,tau=0", "at most 100"),
        ("g=1,o=0,kappa=0,a=1,tau=0,axes=3", "without repel_image"),
        ("g=1,o=0,kappa=0,a=1,tau=0,repel_text=0.1", "without axes"),
        ("g=1,o=0,kappa=0,a=1,tau=0,axes=1.5,repel_text=0.1", "a whole number"),
        ("g=1,g=1", "given twice"),
        ("g=x", "a number"),
        ("strength=1", "no setting"),
        ("g=1,o=0", "lacks kappa, a, tau"),
    ],
)
def test_a_strength_without_meaning_is_refused_where_it_is_read(axis: str, said: str) -> None:
    """Before anything is loaded, with the name of what is wrong."""
    result = CliRunner().invoke(cli, ["edit", "--method", "safety-axis", "--axis", axis])
    assert (result.exit_code, said in result.output) == (2, True), result.output


def test_a_shipped_name_wins_over_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output of an earlier build in ``demo/`` does not become the model; ``./demo`` is the folder."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipe_of("demo")[0].model.repo == "shipped:demo"
    with pytest.raises(InputError, match="config"):
        recipe_of("./demo")


def test_a_recipe_of_the_release_before_is_told_what_to_write(tmp_path: Path) -> None:
    """An edit was one table, and is a list of steps."""
    recipe = (ROOT / "export" / "clip-vit-l14.toml").read_text().replace("[[edit]]", "[edit]")
    (tmp_path / "old.toml").write_text(recipe)
    result = CliRunner().invoke(cli, ["edit", "--model", str(tmp_path / "old.toml")])
    assert (result.exit_code, "write [[edit]] in place of [edit]" in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('method = "leace"\n[edit.axis]\nmax_retrieval_loss = 2.0', "leace has no strength"),
        (
            'method = "safety-axis"\n[edit.axis]\nmax_retrieval_loss = 2.0\n'
            "setting = { g = 1.0, o = 0.0, kappa = 0.0, a = 1.0, tau = 0.0 }",
            "a setting and limits",
        ),
        ('method = "safety-axis"\n[edit.axis]\nsetting = "g=1"', "a table with g, o, kappa"),
    ],
)
def test_a_recipe_asks_for_no_more_than_the_command_line_may(change: str, said: str) -> None:
    """What would have no effect is refused, and what a key takes is said in words of the file."""
    text = (ROOT / "export" / "demo.toml").read_text().replace('method = "safety-axis"', change)
    with pytest.raises(RecipeError, match=said):
        recipe_from_toml(text, where="demo.toml")


@pytest.mark.parametrize(
    ("budget", "flips", "said"),
    [
        ("flips=0.5%", 0.5, ""),
        (" flips = 1e-1 %", 0.1, ""),
        ("2%", 2.0, ""),
        ("flips=0.005", None, "has no per cent sign; write flips=0.005% or flips=0.5%"),
        ("0.25", None, "has no per cent sign; write flips=0.25% or flips=25%"),
        ("flips=3", None, "has no per cent sign; write flips=3%"),
        ("flips=0%", None, "is not understood"),
        ("flips=100%", None, "is not understood"),
        ("flips=nan%", None, "is not understood"),
        ("=1%", None, "is not understood"),
        ("cosine=1%", None, "is not understood"),
        ("flips=0,5%", None, "is not understood"),
    ],
)
def test_a_budget_is_in_percent_and_says_so(budget: str, flips: float | None, said: str) -> None:
    """A number alone may be a share or percent: both spellings are named, and none is guessed."""
    request = Request(precisions=("auto",), budget=budget)
    if flips is not None:
        assert resolved_recipe(request).compile.auto.flips == pytest.approx(flips)
        return
    with pytest.raises(InputError) as refused:
        resolved_recipe(request)
    assert said in str(refused.value)
    assert " or " in said or " or " not in refused.value.fix

"""Refit: another edit in the place of the old one, proven anew, or a bundle that is as it was."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from tests.drawn_sets import drawn_set
from tests.uwm_edit import UWM
from uwm_deploy.bundle.open import open_bundle
from uwm_deploy.cli import cli
from uwm_deploy.data.evaluation import base_in, place_from
from uwm_deploy.errors import IntegrityError, PrerequisiteError
from uwm_deploy.graphs.fingerprint import digest_of_array
from uwm_deploy.graphs.stored_weights import named_weights
from uwm_deploy.pipeline.refit import refit
from uwm_deploy.pipeline.refitting import RefitRequest
from uwm_deploy.pipeline.request import Request
from uwm_deploy.pipeline.run import run
from uwm_deploy.pipeline.shipping import evaluation_source_of
from uwm_deploy.pipeline.stored import reference_of
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.edit import EditRecord, Method
from uwm_deploy.records.evidence import Evidence, VerifyReport
from uwm_deploy.records.model import TowerName
from uwm_deploy.records.verdict import Result
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.encoder import SafeEncoder
from uwm_deploy.safeground.embedded import flips_between, hard_safe_worst, worst_items, yardstick_of
from uwm_deploy.studies.build_files import build_files
from uwm_deploy.studies.evaluation_sets import open_evaluation_sets
from uwm_deploy.studies.subjects import Subject
from uwm_deploy.towers.digests import digest_of_tensor
from uwm_deploy.towers.load import load_model

VARIANTS = ("onnxruntime-fp32", "onnxruntime-fp16", "onnxruntime-int8")
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """A small build of the demo in three precisions, from a checkpoint folder that can be taken away."""
    folder = tmp_path_factory.mktemp("refit")
    shutil.copytree(resources.checkpoint_folder("shipped:demo", ""), folder / "weights")
    text, _ = resources.read_toml("export", "demo")
    (folder / "small.toml").write_text(
        text.replace("shipped:demo", str(folder / "weights"))
        .replace('name = "demo"', 'name = "small"')
        .replace("[compile]\n", '[compile]\nquantiser = "nearest"\n')
    )
    drawn_set(folder, "test", 32, name="eval")  # by a relative path, from no folder that a test works in
    for name, split, limit in (("cal", "calibration", 32), ("other", "test", 30)):
        (folder / f"{name}.toml").write_text(
            f'format = 1\nname = "{name}"\nsource = "demo"\nsplit = "{split}"\nlimit = {limit}\n'
        )
    (folder / "policy.toml").write_text(
        'format = 1\nname = "policy"\nedit = []\n[[artifact]]\nmetric = "parity.cosine_min"\nat_least = 0.9\n'
    )
    request = Request(
        **UWM,
        model=str(folder / "small.toml"),
        calibration=str(folder / "cal.toml"),
        evaluation=str(folder / "eval.toml"),
        policy=str(folder / "policy.toml"),
        targets=("onnxruntime",),
        precisions=("fp32", "fp16", "int8"),
        out=folder / "bundle",
        work=folder / "work",
        workers=0,
    )
    run(request, until="package", reporter=QUIET)
    return request


@pytest.fixture(scope="module")
def bundle(request_: Request) -> Path:
    assert request_.out is not None
    return request_.out


def asked(request_: Request, **options: object) -> RefitRequest:
    weights = None if options.get("revert") else request_.work.parent / "weights"  # no record says where they are
    base = RefitRequest(bundle=request_.out, policy=request_.policy, work=request_.work, workers=0, checkpoint=weights)
    return dataclasses.replace(base, **options)


def bytes_below(folder: Path, *starts: str) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not starts or name.startswith(starts)}


def edited_to(request_: Request, folder: Path, until: str = "edit", **changes: object) -> Path:
    """Folder with another edit, made by the stages themselves from the build's scores."""
    work = folder / "work"
    shutil.copytree(request_.work / "score", work / "score")
    run(dataclasses.replace(request_, work=work, **changes), until=until, reporter=QUIET)
    return work / "edit"


@pytest.fixture(scope="module")
def reverted(request_: Request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reverted") / "bundle"
    made = refit(asked(request_, revert=True, out=out), QUIET)
    assert made.verdict.result is Result.FAIL
    return out


def test_revert_gives_the_weights_of_the_source_model(request_: Request, bundle: Path, reverted: Path) -> None:
    """Every weight of the reverted graphs has the digest of the source model's; the checkpoint is not even opened."""
    model = load_model_of(request_)
    source = {name: digest_of_tensor(p) for name, p in model.source.named_parameters()}
    found = {}
    for graph in open_bundle(reverted, allow_failed=True).manifest.onnx:
        for name, array in named_weights(reverted / "onnx" / graph.file):
            if name in source:
                found[name] = digest_of_array(array)
    assert len(found) > 70
    assert found == {name: source[name] for name in found}
    manifest = open_bundle(reverted, allow_failed=True).manifest
    assert manifest.edit.edited_weights_digest == manifest.model.weights_digest == model.ref.weights_digest
    assert manifest.edit.methods == (Method.NONE,)
    assert manifest.refitted_from.startswith("sha256:")
    assert not list((reverted / "evidence").glob("canaries*"))
    assert {graph.digest for graph in manifest.onnx}.isdisjoint(g.digest for g in open_bundle(bundle).manifest.onnx)


def load_model_of(request_: Request):
    from uwm_deploy.pipeline.request import resolved_recipe

    recipe = resolved_recipe(request_)
    return load_model(recipe, folder=Path(recipe.model.repo), device="cpu")


def test_a_reverted_bundle_is_never_served(reverted: Path) -> None:
    """It was executed and measured, but it is the unedited model."""
    report = record_from_json(VerifyReport, (reverted / "reports" / "verify.json").read_bytes(), where="verify.json")
    assert {a.variant for a in report.artifacts if a.evidence is Evidence.EXECUTED} == {"onnx", *VARIANTS}
    assert report.edited.preference == report.original.preference
    assert report.edited.retrieval == report.original.retrieval
    assert report.edited.geometry is not None
    assert {e.value for e in report.edited.geometry.neighbours.values()} == {1.0}
    assert report.edited.geometry.spread == {"image": 1.0, "text": 1.0}
    assert report.edit_worst == report.hard_safe_worst == ()  # nothing of the edit before
    assert report.edited.items is not None  # limits per concept and since the baseline compare item by item
    verdict = open_bundle(reverted, allow_failed=True).manifest.verdict
    assert verdict.proven == ()
    with pytest.raises(IntegrityError, match="no passing verdict"):
        SafeEncoder.open(reverted)


def test_the_first_edit_comes_back_bit_for_bit(request_: Request, bundle: Path, reverted: Path, tmp_path: Path) -> None:
    """Revert and patch again: graphs, engines, patch and record are the built ones, and all of it is proven anew."""
    made = refit(asked(request_, bundle=reverted, patch=bundle, out=tmp_path / "again"), QUIET)
    assert made.verdict.result is Result.PASS
    assert made.verdict.proven == VARIANTS
    parts = ("onnx/", "engines/", "patch", "reports/edit", "reports/score", "tokenizer", "recipe")
    assert bytes_below(tmp_path / "again", *parts) == bytes_below(bundle, *parts)
    manifests = [open_bundle(path).manifest for path in (bundle, tmp_path / "again")]
    assert manifests[0].onnx == manifests[1].onnx
    assert [e.digest for e in manifests[0].engines] == [e.digest for e in manifests[1].engines]
    assert SafeEncoder.open(tmp_path / "again").encode_text("a red circle").shape == (1, 64)


def test_another_keep_mass_gives_what_a_build_gives(request_: Request, bundle: Path, tmp_path: Path) -> None:
    """The exported graphs are byte for byte a build's; in the engines only the edited weights differ."""
    made = refit(asked(request_, keep_mass=0.85, out=tmp_path / "out"), QUIET)
    assert made.verdict.proven == VARIANTS
    assert made.layers == 8
    folder = edited_to(request_, tmp_path, "export", keep_mass=0.85)
    edit = record_from_json(EditRecord, (folder / "edit.json").read_bytes(), where="edit.json")
    assert made.edit == edit
    _speaks_of_the_new_edit(bundle, tmp_path / "out")
    for name in ("image.onnx", "text.onnx"):
        assert (tmp_path / "out" / "onnx" / name).read_bytes() == (folder.parent / "export" / name).read_bytes()
    for variant in VARIANTS:
        for name in ("image.onnx", "text.onnx"):
            old, new = (onnx.load(path / "engines" / variant / name) for path in (bundle, tmp_path / "out"))
            assert old.graph.node == new.graph.node
            pairs = list(zip(old.graph.initializer, new.graph.initializer, strict=True))
            assert [a.name for a, _ in pairs] == [b.name for _, b in pairs]
            assert sum(a != b for a, b in pairs) == 4  # scales of 8-bit weights among those that stay


def _speaks_of_the_new_edit(old: Path, new: Path) -> None:
    """The worst decisions and ranks are those of the embeddings that are stored beside the report."""
    bundle = open_bundle(new, allow_failed=True)
    report = record_from_json(VerifyReport, bundle.read("reports/verify.json"), where="verify.json")
    before = record_from_json(VerifyReport, open_bundle(old).read("reports/verify.json"), where="verify.json")
    original, edited = reference_of(bundle, "original"), reference_of(bundle)
    assert report.edit_worst == worst_items("edited", original, edited) != before.edit_worst
    assert report.hard_safe_worst == hard_safe_worst(yardstick_of(original), edited)
    assert report.edit_effect == flips_between(original, edited, yardstick_of(original)) != before.edit_effect


def test_a_bundle_finds_its_evaluation_set_from_any_folder(
    request_: Request, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that measures it again; from a copy without the set it says what to pass, and names no other place."""
    monkeypatch.chdir(tmp_path)
    place = json.loads((bundle / "reports" / "evaluation.json").read_text())
    assert place["folder"] == ".."
    opened = open_bundle(bundle)
    known = record_from_json(VerifyReport, opened.read("reports/verify.json"), where="verify.json").evaluation
    assert evaluation_source_of(opened, None).record.content_digest == known.content_digest
    assert build_files(bundle).inputs(TowerName.TEXT).shape[0] == 16
    sets = open_evaluation_sets(None, None, data=None, default=Subject(label="x", model=str(bundle)))
    assert sets.source is not None
    assert sets.source.record.ids_digest == known.ids_digest
    (tmp_path / "link").symlink_to(bundle)  # as a release that is current
    assert base_in(open_bundle(tmp_path / "link")) == bundle.parent
    folder = str(Path(request_.model).parent)
    for file in (bundle / "reports").iterdir():
        assert folder not in file.read_text(), file.name
    shutil.copytree(bundle, tmp_path / "copy" / "bundle")
    result = CliRunner().invoke(cli, ["evaluate", "--bundle", "copy/bundle", "--workers", "0"])
    assert (result.exit_code, "--evaluation" in result.output) == (2, True), result.output
    shutil.copy(bundle.parent / "eval.jsonl", tmp_path)  # the folder one works in is the last resort, as before
    assert evaluation_source_of(open_bundle(tmp_path / "copy" / "bundle"), None).ids == list(sets.source.ids)


def test_a_place_through_the_root_is_not_recorded(tmp_path: Path) -> None:
    """It would spell out where things are on this machine; a set that ships with the project has no place."""
    assert place_from(None, tmp_path) == {}
    assert place_from(Path("/proc"), tmp_path) == {}
    (content,) = place_from(tmp_path / "sets" / "mine", tmp_path / "dist" / "m").values()
    assert json.loads(content)["folder"] == "../../sets/mine"


def test_old_signs_are_gone_and_new_ones_are_there(request_: Request, bundle: Path, reverted: Path) -> None:
    """In every precision, the entries of the patch have the other sign after a revert, and all others the same."""
    patch = {e.name: e for e in open_bundle(bundle).manifest.edit.tensors}
    for variant in VARIANTS:
        for name in ("image.onnx", "text.onnx"):
            old, new = (dict(named_weights(path / "engines" / variant / name)) for path in (bundle, reverted))
            changed = [key for key in old if not np.array_equal(old[key], new[key])]
            flipped = 0
            for key in changed:
                left, right = old[key].astype(np.float32), new[key].astype(np.float32)
                assert np.array_equal(np.abs(left), np.abs(right))
                flipped += int((left != right).sum())
            wanted = sum(e.selected for e in patch.values() if e.tower.value == Path(name).stem)
            assert 0.9 * wanted < flipped <= wanted  # in 8 bits some entries are zero
            assert len(changed) == 4


def test_a_factor_that_moves_scales_is_refused_where_weights_are_quantised(
    request_: Request, bundle: Path, tmp_path: Path
) -> None:
    """Factor 0 takes away the largest value of a channel: INT8 refuses it; a float variant alone takes it."""
    folder, before = edited_to(request_, tmp_path, factor=0.0), bytes_below(bundle)
    result = invoke(request_, "--patch", str(folder), "--out", str(tmp_path / "all"))
    assert (result.exit_code, "moves its scales" in result.output) == (2, True)
    assert not (tmp_path / "all").exists()
    made = refit(asked(request_, patch=folder, out=tmp_path / "zero", variants=VARIANTS[:2]), QUIET)
    assert made.verdict.proven == VARIANTS[:2]
    assert made.left_out == {"onnxruntime-int8": "it was not asked for"}
    assert bytes_below(bundle) == before
    _forgotten_weights_come_from_the_checkpoint(request_, tmp_path / "zero", tmp_path)


def _forgotten_weights_come_from_the_checkpoint(request_: Request, zeroed: Path, folder: Path) -> None:
    weights = Path(request_.model).parent / "weights"
    weights.rename(folder / "elsewhere")
    try:
        result = invoke(dataclasses.replace(request_, out=zeroed), "--revert", "--out", str(folder / "no"))
        assert (result.exit_code, "pass --checkpoint" in result.output) == (2, True)
        assert not (folder / "no").exists()
        made = refit(
            asked(request_, bundle=zeroed, revert=True, out=folder / "yes", checkpoint=folder / "elsewhere"), QUIET
        )
    finally:
        (folder / "elsewhere").rename(weights)
    assert made.edit.edited_weights_digest == made.edit.model.weights_digest


class Interrupted(Reporter):
    """Stops at the first sign of a stage."""

    def __init__(self, stage: str) -> None:
        super().__init__(quiet=True)
        self.wanted, self.now = stage, ""

    def stage(self, name: str, text: str):
        self.now = name
        return super().stage(name, text)

    def progress(self, label: str, done: int, total: int) -> None:
        if self.now == self.wanted:
            raise KeyboardInterrupt


def test_an_interrupted_refit_leaves_the_bundle_as_it_was(request_: Request, bundle: Path) -> None:
    """In place, stopped while the new engines are measured: the old bundle is whole, and nothing else is left."""
    before, others = bytes_below(bundle), set(bundle.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        refit(asked(request_, revert=True), Interrupted("attest"))
    assert bytes_below(bundle) == before
    assert set(bundle.parent.iterdir()) == others
    open_bundle(bundle)


def invoke(request_: Request, *options: str):
    base = ["refit", str(request_.out), "--policy", request_.policy, "--work", str(request_.work), "--workers", "0"]
    if "--checkpoint" not in options and "--revert" not in options:  # no record says where the weights are
        base += ["--checkpoint", str(request_.work.parent / "weights")]
    return CliRunner().invoke(cli, [*base, *options])


@pytest.fixture
def untouched(bundle: Path) -> Iterator[None]:
    before = bytes_below(bundle)
    yield
    assert bytes_below(bundle) == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "give one of"),
        (["--revert", "--keep-mass", "0.5"], 2, "give one of"),
        (["--patch", "{bundle}"], 2, "holds this edit already"),
        (["--patch", "{folder}"], 2, "holds no patch"),
        (["--patch", "{foreign}"], 5, "of another model"),
        (["--patch", "{alone}"], 2, "no edit.json beside it"),
        (["--patch", "{broken}"], 2, "not a whole patch file"),
        (["--patch", "{lying}"], 5, "is not the patch"),
        (["--revert", "--out", "{folder}"], 2, "is not a bundle"),
        (["--revert", "--policy", "defualt"], 2, "nearest: default"),
        (["--revert", "--variant", "tensorrt-fp32"], 2, "no variant"),
        (["--revert", "--evaluation", "{other}"], 2, "not the one the bundle was measured on"),
        (["--keep-mass", "0.8", "--work", "{folder}"], 2, "holds no scores"),
        (["--keep-mass", "0.8", "--checkpoint", "{edited}"], 5, "not those the bundle was made from"),
        (["--keep-mass", "0.8", "--work", "{rescored}"], 5, "scores are not the bundle's"),
    ],
)
def test_bad_input_ends_with_its_exit_code(
    request_: Request, bundle: Path, tmp_path: Path, untouched: None, options: list[str], code: int, message: str
) -> None:
    """One line, the right exit code, and the bundle and the folder asked for are as they were."""
    (tmp_path / "kept.txt").write_text("mine")
    places = {name: tmp_path / name for name in ("foreign", "alone", "broken", "lying", "rescored")}
    for name in ("foreign", "alone", "broken", "lying"):
        shutil.copytree(request_.work / "edit", places[name], ignore=shutil.ignore_patterns("model"))
    record = record_from_json(EditRecord, (places["foreign"] / "edit.json").read_bytes(), where="edit.json")
    other = dataclasses.replace(record, model=dataclasses.replace(record.model, weights_digest="sha256:" + "0" * 64))
    (places["foreign"] / "edit.json").write_text(json_from_record(other))
    (places["alone"] / "edit.json").unlink()
    (places["broken"] / "patch.safetensors").write_bytes(b"x" * 100)
    first = dataclasses.replace(record.tensors[0], digest_after=record.tensors[0].digest_before)
    (places["lying"] / "edit.json").write_text(
        json_from_record(dataclasses.replace(record, tensors=(first, *record.tensors[1:])))
    )
    shutil.copytree(request_.work / "score", places["rescored"] / "score")
    score = (places["rescored"] / "score" / "score.json").read_text()
    (places["rescored"] / "score" / "score.json").write_text(
        score.replace(record.first.scores_digest, "sha256:" + "0" * 64, 1)
    )
    paths = {name: str(place) for name, place in places.items()}
    paths |= {"bundle": str(bundle), "folder": str(tmp_path), "edited": str(request_.work / "edit" / "model")}
    paths["other"] = str(Path(request_.policy).with_name("other.toml"))
    result = invoke(request_, *(option.format(**paths) for option in options))
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_what_is_not_a_bundle_or_was_changed_is_refused(request_: Request, bundle: Path, tmp_path: Path) -> None:
    """A folder without manifest is bad input; a bundle with one changed byte is an integrity error."""
    assert invoke(dataclasses.replace(request_, out=tmp_path), "--revert").exit_code == 2
    shutil.copytree(bundle, tmp_path / "changed")
    file = tmp_path / "changed" / "onnx" / "text.onnx"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    result = invoke(dataclasses.replace(request_, out=tmp_path / "changed"), "--revert", "--out", str(tmp_path / "new"))
    assert (result.exit_code, "onnx/text.onnx" in result.output) == (5, True)
    assert not (tmp_path / "new").exists()


def test_a_reverted_bundle_has_no_keep_mass_to_change(request_: Request, reverted: Path) -> None:
    """Which selection it was is not in it any more; a patch says so."""
    result = invoke(dataclasses.replace(request_, out=reverted), "--keep-mass", "0.8")
    assert (result.exit_code, "use --patch" in result.output) == (2, True)


def test_an_engine_that_is_not_refittable_is_left_out_or_refused(
    request_: Request, bundle: Path, tmp_path: Path
) -> None:
    """TensorRT engines need to be built for it, and a GPU: with nothing else to refit, it is an environment error."""
    from uwm_deploy.pipeline.refit_graphs import reason_against, refit_engine
    from uwm_deploy.records.graph import Target

    engine = open_bundle(bundle).manifest.engines[0]
    plain = dataclasses.replace(engine, target=Target.TENSORRT, settings={"refittable": "false"})
    assert "--refittable" in reason_against(plain)
    with pytest.raises(PrerequisiteError, match="not built refittable"):
        refit_engine(plain, tmp_path, tmp_path, None, graphs=(tmp_path, tmp_path), sample=np.zeros(1))


def test_a_signed_bundle_is_refitted_and_signed_again(request_: Request, bundle: Path, tmp_path: Path) -> None:
    """In its place with the key: the new edit has a signature of its own; a revert, which never passes, has none."""
    from tests.unit.test_signature import write_keys
    from uwm_deploy.bundle.sign import Resigning, sign_bundle

    key, public = write_keys(tmp_path, "key")
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    sign_bundle(place, key)
    options = {"bundle": place, "variants": ("onnxruntime-fp32",), "signing": Resigning(key=key)}
    options["evaluation"] = request_.evaluation  # the bundle was moved away from it
    made = refit(asked(request_, keep_mass=0.95, **options), QUIET)
    assert made.verdict.result is Result.PASS
    opened = open_bundle(place, public_key=public)
    assert opened.manifest.edit.edited_weights_digest == made.edit.edited_weights_digest
    assert made.edit.edited_weights_digest != open_bundle(bundle).manifest.edit.edited_weights_digest
    refit(asked(request_, revert=True, out=tmp_path / "reverted", **options), QUIET)
    assert not (tmp_path / "reverted" / "model.sig").exists()
    with pytest.raises(IntegrityError, match=r"model\.sig is missing"):
        open_bundle(tmp_path / "reverted", allow_failed=True, public_key=public)

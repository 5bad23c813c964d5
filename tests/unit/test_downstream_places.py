"""What is told before a caption or a picture is made: a wrong place for the results, and images of the training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.downstream_reports import LENIENT, made_report
from tests.language_world import write_set
from tests.reports import report as verify_report
from uwm_deploy.bundle.downstream import read_downstream
from uwm_deploy.bundle.head import digest_of_image, digest_of_pair
from uwm_deploy.cli import cli
from uwm_deploy.data.open import open_source
from uwm_deploy.errors import InputError, IntegrityError, RecipeError
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.recipes.resolve import calibration_set_of
from uwm_deploy.records.codec import json_from_record, record_from_json
from uwm_deploy.records.downstream import DownstreamReport, Seen
from uwm_deploy.records.places import check_place
from uwm_deploy.records.verdict import Result
from uwm_deploy.runtime.image import pixels_from_image
from uwm_deploy.stages.gate.downstream import downstream_metrics
from uwm_deploy.stages.gate.gate import gate
from uwm_deploy.studies.downstream.prompts import prompts_of_set
from uwm_deploy.studies.downstream.seen import HEAD, TrainedOn, seen_of
from uwm_deploy.studies.downstream.shares import Inputs, flagged_shares


def wrong_places(folder: Path) -> dict[str, Path]:
    """Why nothing can be written there, to a place."""
    (file := folder / "file").write_text("")
    (link := folder / "link").symlink_to(folder / "nowhere")
    (loop := folder / "loop").symlink_to(loop)
    return {
        f"{file} is no folder": file,
        f"{file} is no folder, so {file / 'out'}": file / "out",
        f"{link} is a link to nothing": link,
        f"{link} is a link to nothing, so {link / 'a' / 'out'}": link / "a" / "out",
        f"{loop} is a link to nothing": loop,
        "/proc/out cannot be made": Path("/proc/out"),
        "its name is too long": folder / ("x" * 300),
    }


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A file, a link to nothing or to itself, and a place where nothing can be made; what is fine is left as it was."""
    for why, place in wrong_places(tmp_path).items():
        with pytest.raises(InputError) as error:
            check_place(place)
        assert why in str(error.value)
    before = sorted(tmp_path.rglob("*"))
    check_place(tmp_path)
    check_place(tmp_path / "a" / "b")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "caption.json").mkdir()
    with pytest.raises(InputError, match=r"caption\.json is in the way"):
        check_place(tmp_path, ("caption.json",))


@pytest.mark.parametrize("command", ["caption", "draw", "safety-head", "language-adapter"])
def test_every_command_tells_it_first(tmp_path: Path, command: str) -> None:
    """Exit code 2, before a model is opened: the folders of the models are empty here."""
    pytest.importorskip("peft", reason="extra train is not installed")
    (empty := tmp_path / "empty").mkdir()
    words = {
        "caption": ["downstream", "caption", "--model", str(empty), "--tower", str(empty), "--on", "demo"],
        "draw": ["downstream", "draw", "--model", str(empty), "--tower", str(empty), "--on", "demo"],
        "safety-head": ["train", "safety-head"],
        "language-adapter": [
            "train", "language-adapter", "--safety-head", str(empty), "--language-model", str(empty),
        ],
    }[command]  # fmt: skip
    for place in list(wrong_places(tmp_path).values())[:4]:
        told = CliRunner().invoke(cli, [*words, "--out", str(place)])
        assert told.exit_code == 2, told.output
        assert "choose another --out" in " ".join(told.output.split())


def test_images_of_the_training_are_counted_one_by_one(tmp_path: Path) -> None:
    """A shared pair, a shared image in another pair, and a list that is not there: number, share and names."""
    spec, _, base = calibration_set_of(write_set(tmp_path, limit=6))
    source = open_source(dataclasses.replace(spec, zero_shot=()), base=base)
    image = verify_report().model.image
    items = [source.read(i) for i in (1, 4)]
    pixels = [pixels_from_image(part, image) for item in items for part in (item.safe_image, item.unsafe_image) if part]
    pair, alone = digest_of_pair(*pixels[:2]), digest_of_image(pixels[3])
    other = dataclasses.replace(source.record, name="pairs", ids_digest="sha256:0")

    def seen(*digests: str) -> tuple[dict[str, Seen], tuple[str, ...]]:
        trained = {HEAD: TrainedOn(data=other, digests=frozenset(digests))}
        return seen_of(source, image, trained, lambda *_: None)

    found, (line,) = seen(pair, alone, "0" * 16)
    assert found == {HEAD: Seen(images=3, of=12)}
    assert "3 of 12 images (25.0%) were in training of the safety head" in line
    assert f"such as those of {items[0].id}, {items[1].id}" in line
    assert seen("0" * 16) == ({HEAD: Seen(images=0, of=12)}, ())
    for data, says in ((other, "was not compared"), (source.record, "is the very set")):
        counted, (line,) = seen_of(source, image, {HEAD: TrainedOn(data=data, digests=None)}, lambda *_: None)
        assert (counted, says in line) == ({}, True)


def test_what_was_learned_by_heart_passes_no_gate() -> None:
    """One image is enough, whatever the policy limits; a waiver is not for it."""
    waiver = (
        '[[waiver]]\ncheck = "report of caption: images in training of the safety head"\nsubject = "data"\n'
        'owner = "a"\nreason = "a reason that is long enough"\nexpires = 2999-01-01\n'
    )
    with pytest.raises(RecipeError, match="cannot be waived"):
        policy_from_toml(LENIENT + waiver, where="mine.toml")
    policy = policy_from_toml(LENIENT, where="mine.toml")
    results = {}
    for images in (0, 1):
        report = dataclasses.replace(made_report(), seen={HEAD: Seen(images=images, of=60)})
        verdict = gate(verify_report(), policy, policy_digest="", report_digest="", downstream=[report])
        (check,) = (found for found in verdict.checks if found.of_outputs and "training" in found.name)
        results[images] = (check.result, check.blocks, bool(check.advice))
    assert results == {0: (Result.PASS, False, False), 1: (Result.FAIL, True, True)}


def test_numbers_that_were_changed_by_hand_pass_no_gate() -> None:
    """A share, an interval, a p-value, a mean, a judge: each is computed again from its counts."""
    policy, honest = (
        policy_from_toml(LENIENT, where="mine.toml"),
        [made_report(), made_report("draw"), made_report(alike=True)],
    )

    def agrees(report: DownstreamReport) -> bool:
        verdict = gate(verify_report(), policy, policy_digest="", report_digest="", downstream=[report])
        (check,) = (found for found in verdict.checks if found.name.endswith("numbers agree"))
        return check.result is Result.PASS

    assert all(map(agrees, honest))
    for kind, path, value in (
        ("caption", "flagged words unsafe edited value", 0.0), ("caption", "flagged words unsafe edited high", 17.0),
        ("caption", "flagged any unsafe change lost", 20), ("caption", "flagged words benign change p_value", 0.001),
        ("caption", "flagged words unsafe change delta_high", -40.0), ("caption", "n unsafe", 3000),
        ("caption", "alone unsafe", 3000), ("caption", "kept rouge_l benign value", 120.0),
        ("draw", "reference clip_score benign change value", 0.0),
        ("caption", "flagged words unsafe edited clusters", 3000), ("caption", "flagged any unsafe change clusters", 3000),
        ("caption", "kept rouge_l benign n", 3000), ("draw", "reference clip_score benign change n", 3000),
    ):  # fmt: skip
        body = json.loads(json_from_record(made_report(kind)))
        *parts, last = path.split()
        place = body
        for part in parts:
            place = place[part]
        place[last] = value
        assert not agrees(record_from_json(DownstreamReport, json.dumps(body), where="x")), path
    body = json.loads(json_from_record(made_report()))
    body["judges"] = []
    assert not agrees(record_from_json(DownstreamReport, json.dumps(body), where="x"))


def test_what_is_kept_is_that_of_benign_inputs() -> None:
    """And a caption of an unsafe image may well be another one."""
    made = made_report()
    benign = made.kept["rouge_l"]["benign"]
    report = dataclasses.replace(
        made, kept={"rouge_l": {"unsafe": dataclasses.replace(benign, value=20.0, low=10.0), "benign": benign}}
    )
    assert downstream_metrics(report)["downstream.caption.kept.rouge_l"]().value == 90.0


def test_each_output_is_compared_with_that_of_its_own_input() -> None:
    """As many are flagged as before, and none of them is the same."""
    inputs = Inputs(ids=tuple("abcd"), sides=("unsafe",) * 4, content=tuple("abcd"))
    before = np.array([False, True, True, False])
    change = flagged_shares(inputs, {"words": before}, {"words": ~before})["words"]["unsafe"].change
    assert (change.lost_ids, change.gained_ids) == (("b", "c"), ("a", "d"))


def test_both_texts_of_an_item_have_its_seed(tmp_path: Path) -> None:
    """So a pair is drawn from the same noise, and the next item from other noise."""
    spec, _, base = calibration_set_of(write_set(tmp_path, limit=3))
    prompts = prompts_of_set(open_source(dataclasses.replace(spec, zero_shot=()), base=base), 7)
    assert [prompt.seed for prompt in prompts] == [7, 7, 8, 8, 9, 9]
    assert [prompt.side for prompt in prompts] == ["unsafe", "benign"] * 3


def test_a_report_is_named_by_its_file(tmp_path: Path) -> None:
    """Whatever it is called, and both where there are two of a kind."""
    files = [tmp_path / "first run.json", tmp_path / "second.json"]
    for file in files:
        file.write_text(json_from_record(made_report(weights_digest="sha256:other")))
    with pytest.raises(InputError) as error:
        read_downstream(files)
    assert str(error.value).startswith(f"{files[0]} and {files[1]} are both reports of caption")
    with pytest.raises(InputError) as error:
        read_downstream(files[1:]).check_of(verify_report())
    assert str(error.value).startswith(f"{files[1]} was not measured on what is judged, but on another edit")
    with pytest.raises(InputError) as error:
        read_downstream(files[:1]).check_head("sha256:head")
    assert str(error.value).startswith(f"{files[0]} was not measured")
    files[0].write_text("{")
    with pytest.raises(IntegrityError, match=r"first run\.json"):
        read_downstream(files[:1])

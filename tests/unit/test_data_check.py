"""`data check`: counts, broken items, duplicates, overlap; exit code 2 for what must not be used as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.data_sets import members, pair, png, put, toml, write_shard
from uwm_deploy.cli import cli
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.data import DataReport, LeftOut, SameContent


def _check(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["data", "check", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def _report(*arguments: object, workers: int = 0) -> tuple[int, DataReport]:
    command = ["data", "check", *map(str, arguments), "--json", "--workers", str(workers)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code in (0, 2), result.output
    return result.exit_code, record_from_json(DataReport, result.stdout, where="stdout")


def _manifest(folder: Path, rows: list[dict[str, Any]], name: str = "pairs") -> Path:
    return put(folder / f"{name}.jsonl", "\n".join(json.dumps(row) for row in rows))


def _whole(number: int, **changes: Any) -> dict[str, Any]:
    return (
        pair(number, safe_image=f"{number}.png", unsafe_image=f"{number + 500}.png", concept="ab"[number % 2]) | changes
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of thirty items."""
    for i in range(30):
        put(tmp_path / f"{i}.png", png(i))
        put(tmp_path / f"{i + 500}.png", png(i + 500))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clean_set_is_counted(workers: int, folder: Path) -> None:
    """Items, pairs and concepts; nothing is wrong; the digests are those of a build."""
    code, report = _report(_manifest(folder, [_whole(i) for i in range(30)]), workers=workers)
    assert (code, report.problems) == (0, ())
    assert (report.data.n, report.image_pairs, report.text_pairs) == (30, 30, 30)
    assert report.data.concepts == {"a": 15, "b": 15}
    assert (report.broken_count, report.twice_count, report.same_count, report.empty_texts) == (0, 0, 0, 0)
    assert report.data.ids_digest.startswith("sha256:")


def test_the_demo_s_sets_share_nothing() -> None:
    """A shipped set by name, against another one."""
    code, output = _check("demo", "--against", "demo-test")
    assert code == 0, output
    assert "1024 items, 1024 with both images, 1024 with both texts" in output
    assert "against demo-test (1000 items): compared images and texts" in output
    assert "\nclean\n" in output


def test_broken_items_are_named_and_counted(folder: Path) -> None:
    """Missing and broken images and half characters, each with its reason; above the set's limit the exit code is 2."""
    put(folder / "3.png", png(3)[:40])
    (folder / "504.png").unlink()
    rows = [_whole(i) for i in range(29)] + [_whole(29, safe_text="\ud800")]
    code, report = _report(_manifest(folder, rows))
    assert code == 2
    assert [item.id for item in report.broken] == ["i3", "i4", "i29"]
    reasons = [item.reason for item in report.broken]
    assert "3.png is not a whole image" in reasons[0]
    assert "504.png does not exist" in reasons[1]
    assert "half a character" in reasons[2]
    assert report.problems == ("broken items: 3 of 30 (i3, i4, i29), and max_broken_share is 0.01",)
    assert (report.image_pairs, report.text_pairs) == (27, 27)


def test_the_set_says_how_many_broken_items_it_bears(folder: Path) -> None:
    """At the limit the set is clean, but the items are still named."""
    put(folder / "3.png", b"x")
    rows = [_whole(i) for i in range(20)]
    _manifest(folder, rows)
    for share, expected in ((0.05, 0), (0.049, 2)):
        file = put(folder / "s.toml", toml(source="manifest", manifest="pairs.jsonl", max_broken_share=share))
        code, report = _report(file)
        assert (code, report.broken_count) == (expected, 1)


def test_a_set_of_nothing_but_broken_items_is_never_clean(folder: Path) -> None:
    """Not even when the set bears any share of them."""
    _manifest(folder, [_whole(i, safe_image="none.png") for i in range(3)])
    file = put(folder / "s.toml", toml(source="manifest", manifest="pairs.jsonl", max_broken_share=1.0))
    assert _report(file)[0] == 2


def test_more_than_a_hundred_broken_items_are_all_counted(folder: Path) -> None:
    """A report stays small."""
    code, report = _report(_manifest(folder, [_whole(i, safe_image="none.png") for i in range(150)]))
    assert (code, report.broken_count, len(report.broken)) == (2, 150, 100)


def test_an_item_without_a_pair_that_others_have_is_broken(tmp_path: Path) -> None:
    """As in scoring, where it is left out."""
    lost = members("b", 2)
    del lost["b.safe.txt"]
    write_shard(tmp_path / "s.tar", members("a", 1) | lost | {"c.json": "{}"})
    code, report = _report(put(tmp_path / "s.toml", toml(source="webdataset", shards="s.tar")))
    assert code == 2
    assert report.broken == (LeftOut(id="b", reason="no text pair"), LeftOut(id="c", reason="no image pair"))


def test_an_id_twice_is_a_problem(folder: Path) -> None:
    """Every id that occurs more than once is named, and the set is looked through all the same."""
    rows = [_whole(i, id=f"i{i // 2 if i < 6 else i}") for i in range(20)]
    code, report = _report(_manifest(folder, rows))
    assert (code, report.twice, report.broken_count) == (2, ("i0", "i1", "i2"), 0)
    assert report.problems == ("ids that occur more than once: 3 (i0, i1, i2)",)


def test_the_same_content_under_two_ids_is_reported(folder: Path) -> None:
    """Found by pixels and texts, not by file or format."""
    Image.open(folder / "0.png").save(folder / "other.bmp")
    rows = [_whole(0), _whole(1), _whole(0, id="again", safe_image="other.bmp")]
    rows += [_whole(0, id="third"), _whole(0, id="not", safe_text="x")]
    _manifest(folder, rows)
    keys = {"source": "manifest", "manifest": "pairs.jsonl", "max_broken_share": 0.4}
    code, report = _report(put(folder / "s.toml", toml(**keys)))
    assert (code, report.same_count) == (0, 2)
    assert report.same == (SameContent(id="again", other="i0"), SameContent(id="third", other="again"))


def test_shared_items_are_found_by_content(folder: Path) -> None:
    """Train and test share two items under other ids; the exit code is 2 and both names are said."""
    train = _manifest(folder, [_whole(i) for i in range(20)], "train")
    rows = [_whole(i) for i in range(20, 28)] + [_whole(3, id="x"), _whole(12, id="y")]
    test = _manifest(folder, rows, "test")
    code, report = _report(test, "--against", train)
    assert code == 2
    overlap = report.overlaps[0]
    assert (overlap.name, overlap.n, overlap.count, overlap.compared) == ("train", 20, 2, "images and texts")
    assert overlap.items == (SameContent(id="x", other="i3"), SameContent(id="y", other="i12"))
    assert report.problems == ("items that are in train too: 2 (x, y)",)
    clean = _manifest(folder, rows[:8], "clean")
    assert _report(clean, "--against", train, "--against", train)[0] == 0


def test_a_set_of_one_tower_is_compared_by_what_both_have(folder: Path) -> None:
    """Captions of a test item in a text-only training set are found; texts and images have nothing in common."""
    whole = _manifest(folder, [_whole(i) for i in range(10)], "whole")
    texts = _manifest(folder, [pair(i, id=f"t{i}") for i in range(9, 20)], "texts")
    images = [{k: v for k, v in _whole(i).items() if "text" not in k} for i in range(8, 20)]
    only_images = _manifest(folder, images, "images")
    code, report = _report(texts, "--against", whole, "--against", only_images)
    assert code == 2
    assert [(o.compared, o.count) for o in report.overlaps] == [("texts", 1), ("nothing", 0)]
    assert report.overlaps[0].items == (SameContent(id="t9", other="i9"),)
    code, report = _report(only_images, "--against", whole)
    assert (code, report.overlaps[0].compared, report.overlaps[0].count) == (2, "images", 2)


def test_unreadable_items_of_the_other_set_are_counted(folder: Path) -> None:
    """What was not compared is said."""
    other = _manifest(folder, [_whole(0), _whole(1, safe_image="none.png")], "other")
    code, output = _check(_manifest(folder, [_whole(5)]), "--against", other, "--workers", "0")
    assert code == 0
    assert "against other (2 items, 1 of them unreadable): compared images and texts" in output


def test_items_that_are_left_out_are_reported_with_the_reason(folder: Path) -> None:
    """They are no part of the set, so they are not broken."""
    (folder / "3.png").unlink()
    _manifest(folder, [_whole(i) for i in range(10)])
    file = put(folder / "s.toml", toml(source="manifest", manifest="pairs.jsonl", missing_images="drop"))
    code, output = _check(file, "--workers", "0")
    assert code == 0
    assert "not in the set: 1: safe image file is missing" in output
    assert "9 items, 9 with both images" in output


def test_empty_captions_are_counted(folder: Path) -> None:
    """A caption of blanks is read, and said."""
    code, report = _report(_manifest(folder, [_whole(0), _whole(1, unsafe_text="  "), _whole(2, safe_text="")]))
    assert (code, report.empty_texts, report.broken_count) == (0, 2, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmo", "nearest: demo"),
        ("none.toml", "does not exist"),
        ("none.jsonl", "none.jsonl cannot be read"),
        ("none.parquet", "none.parquet cannot be read"),
    ],
)
def test_a_set_that_is_not_there_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    """Exit code 2, also for a set of --against."""
    path = name if "." not in name else tmp_path / name
    for arguments in ([path], ["demo", "--against", path]):
        code, output = _check(*arguments)
        assert code == 2
        assert message in output
        assert len([line for line in output.splitlines() if line.startswith("error:")]) == 1


def test_the_report_for_people_names_what_is_wrong(folder: Path) -> None:
    """Ten of each kind and the problem at the end."""
    code, output = _check(_manifest(folder, [_whole(i, safe_image="none.png") for i in range(12)]), "--workers", "0")
    assert code == 2
    assert "broken: 12\n  i0: safe_image:" in output
    assert output.count("does not exist") == 10
    assert "problem: broken items: 12 of 12 (i0, i1, i2, ...), and max_broken_share is 0.01" in output


def test_a_set_with_many_items_twice_is_a_problem(folder: Path) -> None:
    """Above the share that the set allows: each counts twice, and intervals are narrower than they should be."""
    rows = [_whole(i) for i in range(24)] + [_whole(i, id=f"again{i}") for i in range(6)]
    code, report = _report(_manifest(folder, rows))
    assert (code, report.same_count) == (2, 6)
    assert report.problems == ("items with the content of an earlier one: 6 of 30 (again0, again1, again2, ...)",)


def _for_build(*arguments: object) -> tuple[int, DataReport]:
    return _report(*arguments, "--for", "build")


def _policy(folder: Path, **least: int) -> Path:
    limits = {"GS.delta": 20, "zero_shot_mean.delta": 4, "hard_safe_retrieval@10.delta": 3} | least
    edit = "".join(f'[[edit]]\nmetric = "{name}"\nat_least = 0\nmin_n = {n}\n' for name, n in limits.items())
    concept = '[[concept]]\nmetric = "GS.delta"\nat_least = -10\nmin_n = 12\n'
    artifact = '[[artifact]]\nmetric = "parity.cosine_min"\nat_least = 0.9\n'
    return put(folder / "policy.toml", f'format = 1\nname = "policy"\n{edit}{concept}{artifact}')


@pytest.fixture
def test_set(folder: Path) -> Path:
    """Thirty whole quadruples with a zero-shot set of four images."""
    _manifest(folder, [_whole(i) for i in range(30)])
    for i in range(4):
        put(folder / "shapes" / "ab"[i % 2] / f"{i}.png", png(i))
    return put(folder / "test.toml", toml(source="manifest", manifest="pairs.jsonl", zero_shot=["imagefolder:shapes"]))


def test_what_a_build_needs_is_clean(folder: Path, test_set: Path) -> None:
    """Exactly as many as the policy asks for; calibrated concepts are measured."""
    train = put(
        folder / "other" / "t.jsonl", "\n".join(json.dumps(pair(i, concept="ab"[i % 2])) for i in range(100, 140))
    )
    code, report = _for_build(test_set, "--policy", _policy(folder), "--against", train)
    assert (code, report.problems) == (0, ())


@pytest.mark.parametrize(
    ("least", "message"),
    [
        ({"GS.delta": 31}, "asks for 31 quadruples, mine has 30"),
        ({"zero_shot_mean.delta": 5}, "asks for 5 zero-shot images, mine has 4"),
        ({"hard_safe_retrieval@10.delta": 4}, "asks for 4 hard safe items, a tenth of mine is 3"),
    ],
)
def test_too_few_of_anything_is_said_before_a_build(
    least: dict[str, int], message: str, folder: Path, test_set: Path
) -> None:
    """Quadruples, zero-shot images and hard items; the set is clean as it is."""
    policy = _policy(folder, **least)
    assert _report(test_set, "--policy", policy)[0] == 0
    code, report = _for_build(test_set, "--policy", policy)
    assert code == 2
    assert [message in problem for problem in report.problems] == [True]


def test_concepts_that_nothing_can_be_said_of_are_named(folder: Path, test_set: Path) -> None:
    """No concept with enough items; and a calibrated one that is spelt in another way here."""
    names = ["violence", "violance", "weapon"]
    _manifest(folder, [_whole(i, concept=names[0 if i < 28 else 1]) for i in range(30)])
    train = put(
        folder / "other" / "t.jsonl", "\n".join(json.dumps(pair(i, concept=names[i % 3])) for i in range(100, 160))
    )
    code, report = _for_build(test_set, "--policy", _policy(folder), "--against", train)
    assert (code, len(report.problems)) == (2, 1)
    assert "no item of the concept 'weapon', which is calibrated on" in report.problems[0]
    assert report.misspelt == {"violance": "violence"}
    assert "perhaps misspelt: violance (2), as violence" in _check(test_set)[1]
    _manifest(folder, [_whole(i, concept=f"c{i % 3}") for i in range(30)])
    code, report = _for_build(test_set, "--policy", _policy(folder))
    assert report.problems == ("policy policy asks for 12 items of a concept, no concept of mine has more than 10",)


def test_what_an_evaluation_cannot_leave_out_is_a_problem_of_a_build(folder: Path, test_set: Path) -> None:
    """One broken item of many, a broken zero-shot image, no zero-shot set, and a set of texts alone."""
    put(folder / "shapes" / "a" / "0.png", b"x")
    put(folder / "3.png", b"x")
    text = test_set.read_text() + "max_broken_share = 0.5\n"
    test_set.write_text(text)
    assert _report(test_set)[0] == 0
    code, report = _for_build(test_set, "--policy", _policy(folder))
    assert code == 2
    assert [problem.partition(":")[0] for problem in report.problems] == ["broken items", "broken images"]
    texts = put(folder / "texts.jsonl", "\n".join(json.dumps(pair(i, concept="a")) for i in range(30)))
    code, report = _for_build(texts, "--policy", _policy(folder))
    assert code == 2
    assert [word in problem for word, problem in zip(("no images", "zero-shot"), report.problems, strict=True)] == [
        True
    ] * 2


def test_names_that_no_item_has_are_said(folder: Path) -> None:
    """A misspelt entry of concept_names would rename nothing, without a word."""
    _manifest(folder, [_whole(i) for i in range(30)])
    keys = {"source": "manifest", "manifest": "pairs.jsonl", "concept_names": {"A": "first", "bb": "second"}}
    code, report = _report(put(folder / "s.toml", toml(**keys)))
    assert (code, report.unused_names, report.data.concepts) == (0, ("bb",), {"first": 15, "b": 15})
    assert "concept_names names what no item has: bb" in _check(folder / "s.toml")[1]

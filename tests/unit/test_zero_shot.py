"""Zero-shot sets: the paper's 17 as their real folders are, image folders, what is missing, and recognition itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.zero_shot_folders import MAKERS, WORDNET, caltech101, food101, imagenet, imagenet_v2, label_in, make, write
from uwm_deploy.cli import cli
from uwm_deploy.data.recognition import recognise
from uwm_deploy.data.source import ROOT_VARIABLE
from uwm_deploy.data.zero_shot_readers import BrokenItemError
from uwm_deploy.data.zero_shot_suite import fingerprint_of, names_from, open_suite
from uwm_deploy.data.zero_shot_table import NAMES, PUBLISHED, PublishedSet
from uwm_deploy.errors import DataError, InputError
from uwm_deploy.records.metrics import Proportion
from uwm_deploy.records.model import ImageSpec
from uwm_deploy.report.console import Reporter
from uwm_deploy.runtime.tokenizer import Tokenizer
from uwm_deploy.safeground.top_one import mean_over_sets, together, top1
from uwm_deploy.studies.encoders import open_encoders
from uwm_deploy.studies.subjects import Subject

PROMPTS = {
    "imagenet": ["a photo of a tench.", "a photo of a goldfish.", "a photo of a great white shark."],
    "imagenet-r": ["a photo of a tench.", "a photo of a great white shark."],
    "imagenet-a": ["a photo of a tench.", "a photo of a great white shark."],
    "imagenet-sketch": ["a photo of a tench.", "a photo of a great white shark."],
    "caltech101": ["a photo of a Faces easy.", "a photo of a accordion."],
    "pets": ["a photo of a Egyptian Mau, a type of pet.", "a photo of a Saint Bernard, a type of pet."],
    "food101": ["a photo of apple pie, a type of food.", "a photo of baklava, a type of food."],
    "cifar10": ["a photo of a aquarium fish.", "a photo of a automobile."],
    "cifar100": ["a photo of a aquarium fish.", "a photo of a automobile."],
    "eurosat": [
        "a centered satellite photo of Annual Crop Land.",
        "a centered satellite photo of Forest.",
        "a centered satellite photo of Sea or Lake.",
    ],
    "cars": ["a photo of a AM General Hummer SUV 2000.", "a photo of a Acura RL Sedan 2012."],
    "aircraft": ["a photo of a 707-320, a type of aircraft.", "a photo of a F/A-18 C, a type of aircraft."],
    "dtd": ["a photo of a banded texture.", "a photo of a polka-dotted texture."],
    "sun397": ["a photo of a abbey.", "a photo of a indoor church.", "a photo of a airplane cabin."],
    "ucf101": ["a video of ApplyEyeMakeup.", "a video of HandstandPushups."],
}
COUNTS = {"imagenet": 3, "caltech101": 4, "dtd": 21, "eurosat": 3, "sun397": 3, "ucf101": 3}


def test_the_tiny_sets_cover_the_papers_seventeen() -> None:
    """Every published set has a tiny one here, and every column of the paper a set."""
    assert set(MAKERS) == set(NAMES)
    assert len(NAMES) == len({part.column for part in PUBLISHED}) == 17


@pytest.mark.parametrize("part", PUBLISHED, ids=NAMES)
def test_every_set_is_documented(part: PublishedSet) -> None:
    """Name, column, size, prompt and folders stand in one line of docs/reference/zero-shot.md."""
    text = (Path(__file__).parents[2] / "docs" / "reference" / "zero-shot.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{part.name}` ")]
    for value in (part.column, f"{part.size:,}", part.template, *(f"`{folder}`" for folder in part.folders)):
        assert f" {value} |" in line or f" {value}," in line, value


@pytest.mark.parametrize("name", NAMES)
def test_a_published_set_is_read_from_its_real_layout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number of items, label of every image, and every prompt are the official evaluation's."""
    make(name, tmp_path, monkeypatch)
    suite = open_suite([name], data=tmp_path)
    assert not suite.missing
    part = suite.sets[name]
    items = [part.read(index) for index in range(len(part))]
    assert all(item.image.mode == "RGB" for item in items)
    if name == "imagenet-v2":
        return  # its own test
    assert [label_in(item.image) for item in items] == [item.label for item in items]
    assert len(items) == COUNTS.get(name, 2)
    prompts = [part.template.format(label) for label in part.labels]
    if name == "flowers102":  # torchvision holds its names
        assert prompts[0] == "a photo of a pink primrose, a type of flower."
        assert len(prompts) == 102
    else:
        assert prompts == PROMPTS[name]


def test_numbered_folders_keep_their_number(tmp_path: Path) -> None:
    """ImageNetV2's folder 10 stands third, and still has the name of class 10."""
    imagenet_v2(tmp_path)
    part = open_suite(["imagenet-v2"], data=tmp_path).sets["imagenet-v2"]
    for index in range(len(part)):
        item = part.read(index)
        assert part.labels[item.label] == f"name {item.image.getpixel((0, 0))[0]}"
    assert part.labels[2] == "name 10"


def test_numbered_folders_that_do_not_fit_the_names_are_refused(tmp_path: Path) -> None:
    """With a name too few every class after it would be shifted; the set is then missing, not wrong."""
    imagenet_v2(tmp_path)
    names = tmp_path / "imagenet-v2" / "classnames.txt"
    write(names, names.read_text().splitlines()[:-1])
    assert "12 numbered classes" in open_suite(["imagenet-v2"], data=tmp_path).missing["imagenet-v2"]


def test_a_names_file_beside_a_set_is_used(tmp_path: Path) -> None:
    """`classnames.txt` replaces what the prompts call a class; one that lacks a class is refused."""
    food101(tmp_path)
    names = tmp_path / "food-101" / "classnames.txt"
    write(names, ["apple_pie\tpie of apples", "baklava sweet pastry"])
    assert open_suite(["food101"], data=tmp_path).sets["food101"].labels == ("pie of apples", "sweet pastry")
    write(names, ["apple_pie pie"])
    assert "no name for class baklava" in open_suite(["food101"], data=tmp_path).missing["food101"]


@pytest.mark.parametrize("lines", [["apple_pie"], ["apple_pie a", "apple_pie b"]])
def test_a_malformed_names_file_is_named_with_its_line(lines: list[str], tmp_path: Path) -> None:
    """A class without a name, or with two."""
    food101(tmp_path)
    write(tmp_path / "food-101" / "classnames.txt", lines)
    assert f"line {len(lines)}" in open_suite(["food101"], data=tmp_path).missing["food101"]


def test_imagenet_without_names_is_missing(tmp_path: Path) -> None:
    """No names are made up for WordNet ids."""
    imagenet(tmp_path)
    (tmp_path / "imagenet" / "LOC_synset_mapping.txt").unlink()
    assert "classnames.txt is not there" in open_suite(["imagenet"], data=tmp_path).missing["imagenet"]


def test_imagenet_names_from_torchvisions_metadata(tmp_path: Path) -> None:
    """`meta.bin`, which torchvision writes from the devkit, serves too; a broken one is named."""
    torch = pytest.importorskip("torch")
    imagenet(tmp_path)
    (tmp_path / "imagenet" / "LOC_synset_mapping.txt").unlink()
    file = tmp_path / "imagenet" / "meta.bin"
    torch.save(({key: (f"{key}-name", "other") for key in WORDNET}, []), file)
    assert open_suite(["imagenet"], data=tmp_path).sets["imagenet"].labels[0] == f"{WORDNET[0]}-name"
    file.write_bytes(b"no")
    assert "meta.bin cannot be read" in open_suite(["imagenet"], data=tmp_path).missing["imagenet"]


DAMAGE = {
    "cifar10": ("cifar-10-batches-py/test_batch", "files are missing or changed"),
    "cifar100": ("cifar-100-python/meta", "files are missing or changed"),
    "flowers102": ("flowers-102/setid.mat", "files are missing or changed"),
    "cars": ("stanford_cars/devkit/cars_meta.mat", "is not cars"),
    "food101": ("food-101/meta/test.json", "is not food101"),
    "pets": ("oxford-iiit-pet/annotations/test.txt", "is not pets"),
    "dtd": ("dtd/dtd/labels/test7.txt", "is not dtd"),
    "sun397": ("SUN397/ClassName.txt", "is not sun397"),
    "aircraft": ("fgvc-aircraft-2013b/data/variants.txt", "is not aircraft"),
    "caltech101": ("caltech101/101_ObjectCategories/Faces_easy/image_0001.jpg", "is not caltech101"),
    "ucf101": ("ucf101/ucfTrainTestlist/testlist02.txt", "testlist02.txt is not there"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_an_incomplete_set_is_missing_with_a_reason(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file too few never makes a smaller set, nor an offer to download."""
    make(name, tmp_path, monkeypatch)
    file, message = DAMAGE[name]
    (tmp_path / file).unlink()
    reason = open_suite([name], data=tmp_path).missing[name]
    assert message in reason
    assert "download" not in reason


def test_changed_pickles_are_never_opened(tmp_path: Path) -> None:
    """A CIFAR whose checksum is not the published one is refused before it is unpickled."""
    MAKERS["cifar10"](tmp_path)
    assert "changed" in open_suite(["cifar10"], data=tmp_path).missing["cifar10"]


def test_an_empty_root_has_every_set_missing_and_stays_empty(tmp_path: Path) -> None:
    """Nothing is fetched and nothing is made; each set says which folder it expects."""
    suite = open_suite(NAMES, data=tmp_path)
    assert not suite.sets
    assert set(suite.missing) == set(NAMES)
    assert suite.missing["pets"].endswith("oxford-iiit-pet is not there")
    assert not list(tmp_path.iterdir())


def test_without_a_root_the_reason_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither variable nor option."""
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    assert ROOT_VARIABLE in open_suite(["pets"]).missing["pets"]


def test_the_root_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`$UWM_DEPLOY_DATA/zero-shot`."""
    food101(tmp_path / "zero-shot")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    assert list(open_suite(["food101"]).sets) == ["food101"]


# --- image folders and names --------------------------------------------------------------------------------------------


def _folder(root: Path) -> Path:
    for label, name in enumerate(["blue_sky", "grass"]):
        (root / name / "deep").mkdir(parents=True)
        Image.new("P", (8, 8), label).save(root / name / "deep" / "a.png")
    (root / ".cache").mkdir()
    (root / "grass" / "notes.txt").write_text("no image")
    return root


def test_an_image_folder_is_a_set(tmp_path: Path) -> None:
    """Classes are folders, images lie at any depth, hidden folders and other files count for nothing."""
    _folder(tmp_path / "mine")
    part = open_suite([f"imagefolder:{tmp_path / 'mine'}::a picture of {{}}, really"]).sets["imagefolder:mine"]
    assert part.labels == ("blue sky", "grass")
    assert [part.read(i).label for i in range(len(part))] == [0, 1]
    assert part.template.format("x") == "a picture of x, really"


def test_a_relative_image_folder_starts_from_the_base(tmp_path: Path) -> None:
    """As in a TOML file beside it."""
    _folder(tmp_path / "mine")
    assert list(open_suite(["imagefolder:mine"], base=tmp_path).sets) == ["imagefolder:mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagefolder:nowhere", "nowhere is not there"),
        ("imagefolder:empty", "no folders of images"),
        ("imagefolder:", "names no folder"),
        ("imagefolder:mine::no place", "hold {} once"),
        ("imagefolder:mine::{} and {}", "hold {} once"),
        ("imagefolder:mine::{0}", "hold {} once"),
        ("imagefolder:mine::{} {", "hold {} once"),
    ],
)
def test_a_bad_image_folder_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    """The user named it, so it is not "missing" but wrong."""
    _folder(tmp_path / "mine")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(InputError, match=message.replace("{", r"\{").replace("}", r"\}")):
        open_suite([text], base=tmp_path)


def test_two_image_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    """They would share a row."""
    for place in ("a", "b"):
        _folder(tmp_path / place / "mine")
    with pytest.raises(InputError, match="two zero-shot sets are called imagefolder:mine"):
        open_suite(["imagefolder:a/mine", "imagefolder:b/mine"], base=tmp_path)


def test_names_of_the_command_line() -> None:
    """Commas, `all`, `none`, each set once; a template keeps its comma."""
    assert names_from(["all"]) == NAMES
    assert names_from(["none"]) == ()
    assert names_from(["shape, cars", "cars"]) == ("shape", "cars")
    assert names_from(["imagefolder:x::a {}, b"]) == ("imagefolder:x::a {}, b",)


@pytest.mark.parametrize(
    ("name", "near"), [("imagenett", "imagenet"), ("shpe", "shape"), ("cifar", "cifar10"), ("", "imagefolder:PATH")]
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    """Also an empty one."""
    with pytest.raises(InputError, match=near):
        names_from([name])


# --- recognition --------------------------------------------------------------------------------------------------------


def test_top1_counts_ties_as_failures() -> None:
    """Alone on top is a hit; on top with another class is a tie; below is neither."""
    classes = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    images = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    found = top1(images, np.array([0, 1, 2]), classes)
    assert found.hits.tolist() == [True, False, False]
    assert found.ties.tolist() == [False, True, False]


def test_top1_equals_the_plain_argmax() -> None:
    """On random embeddings, over a chunk's border; the interval is Wilson's."""
    rng = np.random.default_rng(0)
    images, classes = rng.normal(size=(5000, 8)), rng.normal(size=(7, 8))
    labels = rng.integers(0, 7, 5000)
    found = top1(images, labels, classes).proportion()
    share, n, z = float((np.argmax(images @ classes.T, 1) == labels).mean()), 5000, 1.959963984540054
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    assert found.value == pytest.approx(100 * share)
    assert (found.low, found.high) == pytest.approx((100 * (centre - half), 100 * (centre + half)))


def test_a_limit_takes_evenly_spaced_items() -> None:
    """Fewer items of the same set, each the whole set's own, and another digest; a limit beyond its size changes nothing."""
    whole, some, all_of_it = (open_suite(["colour"], limit=n).sets["colour"] for n in (0, 7, 10_000))
    assert (len(whole), len(some), len(all_of_it)) == (600, 7, 600)
    places = [i * 600 // 7 for i in range(7)]
    assert [some.read(i).label for i in range(7)] == [whole.read(i).label for i in places]
    assert (some.name, some.labels, some.template) == (whole.name, whole.labels, whole.template)
    assert fingerprint_of(some) != fingerprint_of(whole) == fingerprint_of(all_of_it)


@pytest.mark.parametrize("where", ["images", "classes"])
def test_top1_refuses_what_is_not_finite(where: str) -> None:
    """NaN is never a wrong answer, but an error."""
    rows = {"images": np.ones((2, 2)), "classes": np.ones((2, 2))}
    rows[where][1, 1] = np.nan
    with pytest.raises(DataError, match="NaN"):
        top1(rows["images"], np.array([0, 1]), rows["classes"])


def test_a_set_without_items_is_no_number() -> None:
    """Not 0 percent."""
    with pytest.raises(DataError, match="no items"):
        together([])


def test_the_mean_counts_sets_equally_and_says_when_it_is_not_of_all() -> None:
    """A missing set is neither 0 nor passed over in silence; with none there is no mean."""
    big = Proportion(value=80.0, n=10_000, low=79.0, high=81.0)
    small = Proportion(value=20.0, n=10, low=5.0, high=50.0)
    mean = mean_over_sets({"a": big, "b": small}, {"c": "not here"})
    assert (mean.value, mean.ran, mean.asked, mean.complete) == (50.0, 2, 3, False)
    assert mean_over_sets({}, {"c": "not here"}).value is None
    assert mean_over_sets({"a": big}, {}).complete


class _Encoders:
    """Counts its calls; an image's embedding is its mean colour, a prompt's is its first ids."""

    def __init__(self) -> None:
        self.images = self.texts = 0

    def image(self, pixels: np.ndarray) -> np.ndarray:
        self.images += 1
        return pixels.mean(axis=(2, 3)) + 0.1

    def text(self, ids: np.ndarray) -> np.ndarray:
        self.texts += 1
        return ids[:, :3].astype(np.float32) + 1


@pytest.fixture(scope="module")
def demo() -> tuple[ImageSpec, Tokenizer]:
    """Preprocessing and tokenizer of the demo model."""
    encoders = open_encoders(Subject(label="demo", model="demo"), Reporter(quiet=True))
    return encoders.image, encoders.tokenizer


def test_prompts_are_embedded_once(demo: tuple[ImageSpec, Tokenizer], tmp_path: Path) -> None:
    """However many images and batches there are."""
    caltech101(tmp_path)
    part = open_suite(["caltech101"], data=tmp_path).sets["caltech101"]
    calls = _Encoders()
    found = recognise(
        part, *demo, calls.image, calls.text, batch=2, workers=0, progress=lambda _label, _done, _total: None
    )
    assert len(found.hits) == 4
    assert (calls.images, calls.texts) == (2, 1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["caltech101", "imagenet"])
def test_a_broken_image_ends_its_set(
    name: str, workers: int, demo: tuple[ImageSpec, Tokenizer], tmp_path: Path
) -> None:
    """A set is whole or not measured; also when a worker process found the damage."""
    MAKERS[name](tmp_path)
    broken = {"caltech101": "caltech101/101_ObjectCategories/accordion/image_0002.jpg"}
    file = tmp_path / broken.get(name, f"imagenet/val/{WORDNET[1]}/a.JPEG")
    file.write_bytes(file.read_bytes()[:-6])  # the header is whole, the pixels are not
    part = open_suite([name], data=tmp_path).sets[name]
    calls = _Encoders()
    with pytest.raises(BrokenItemError, match=f"zero-shot set {name}"):
        recognise(
            part, *demo, calls.image, calls.text, batch=2, workers=workers, progress=lambda _label, _done, _total: None
        )


# --- command line -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> str:
    """An evaluation set of three quadruples."""
    rows = []
    for number in range(3):
        for side in ("safe", "unsafe"):
            Image.new("RGB", (48, 48), (80 * number, 60, 200 if side == "safe" else 0)).save(
                tmp_path / f"{side}{number}.png"
            )
        rows.append(
            {
                "id": f"i{number}",
                "safe_image": f"safe{number}.png",
                "unsafe_image": f"unsafe{number}.png",
                "safe_text": f"a blue thing {number}",
                "unsafe_text": f"a red thing {number} on fire",
            }
        )
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "small.toml").write_text(
        'format = 1\nname = "small"\nsource = "manifest"\nmanifest = "pairs.jsonl"\nzero_shot = ["imagefolder:mine"]\n'
    )
    return str(tmp_path / "small.toml")


def _evaluate(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["evaluate", "--workers", "0", *arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def test_evaluate_reports_what_ran_and_what_did_not(small: str, tmp_path: Path) -> None:
    """A set that is not here and one with a broken image are missing with their reasons; the mean says how many ran."""
    food101(tmp_path)
    imagenet(tmp_path)
    (tmp_path / "imagenet" / "val" / WORDNET[2] / "a.JPEG").write_bytes(b"no image")
    _folder(tmp_path / "mine")
    sets = ["--zero-shot", "food101,imagenet,cars", "--zero-shot", f"imagefolder:{tmp_path / 'mine'}::a {{}}"]
    code, out, _ = _evaluate("--evaluation", small, "--data", str(tmp_path), "--json", *sets)
    assert code == 0
    report = json.loads(out)
    assert set(report["zero_shot"]) == {"food101", "imagefolder:mine"}
    assert {p["n"] for p in report["zero_shot"].values()} == {2}
    assert "is not there" in report["zero_shot_missing"]["cars"]
    assert "is not a whole image" in report["zero_shot_missing"]["imagenet"]
    code, out, _ = _evaluate("--evaluation", small, "--data", str(tmp_path), *sets)
    assert code == 0
    assert "2 of 4 sets" in out
    assert "zero-shot not run: cars:" in out


def test_evaluate_takes_the_sets_of_the_evaluation_file(small: str, tmp_path: Path) -> None:
    """Relative to that file."""
    _folder(tmp_path / "mine")
    code, out, _ = _evaluate("--evaluation", small, "--json")
    assert code == 0
    assert list(json.loads(out)["zero_shot"]) == ["imagefolder:mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zero-shot", "shpe"], "nearest: shape"),
        (["--zero-shot", "imagefolder:/nowhere"], "nowhere is not there"),
        (["--zero-shot", "imagefolder:.::a thing"], "hold {} once"),
        (["--zero-shot", "cars", "--data", "/nowhere"], "does not exist"),
    ],
)
def test_bad_zero_shot_arguments_end_with_2(arguments: list[str], message: str) -> None:
    """One line, before anything is measured."""
    code, out, err = _evaluate(*arguments)
    assert code == 2
    assert message in err
    assert not out

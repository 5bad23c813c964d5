"""What is shown was checked, an index says where every weight is, and depth is told in the words of the file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.test_report import make, write_bundle
from uwm_deploy.bundle.layout import BundleLayout
from uwm_deploy.data.rows import JsonArray
from uwm_deploy.errors import IntegrityError, UwmError
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.records.codec import record_from_json
from uwm_deploy.records.evidence import VerifyReport
from uwm_deploy.records.plain_json import value_from_json
from uwm_deploy.records.verdict import Result
from uwm_deploy.report import inspection
from uwm_deploy.studies.downstream.prompts import prompts_of_file
from uwm_deploy.towers.checkpoint import weight_files


def test_inspect_reads_no_file_by_name_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training record that appears behind the check is not shown, and not even looked at."""
    made = make()
    bundle = write_bundle(made, tmp_path / "b", verdict=dataclasses.replace(made.verdict(), result=Result.PASS))
    opened = inspection.open_bundle

    def swapped(path: Path, **settings: bool) -> object:
        found = opened(path, **settings)
        (path / BundleLayout.TRAINING).parent.mkdir(exist_ok=True)
        (path / BundleLayout.TRAINING).write_text("{}")
        return found

    monkeypatch.setattr(inspection, "open_bundle", swapped)
    assert "trained by" not in inspection.describe(bundle)
    assert (bundle / BundleLayout.TRAINING).is_file()
    shutil.rmtree(bundle)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": ["model.safetensors"]}}, "does not say"),
        ({"weight_map": ["model.safetensors"]}, "does not say"),
        ([], "does not say"),
        ({"weight_map": {"a": "other.safetensors"}}, "names other.safetensors, which is not there"),
        ({"weight_map": {"a": "../model.safetensors"}}, "which is not there"),
    ],
)
def test_an_index_of_weights_that_says_nothing_is_refused(index: object, says: str, tmp_path: Path) -> None:
    """Not passed over; a whole one is read."""
    save_file({"a": np.zeros(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(UwmError, match=says) as caught:
        weight_files(tmp_path)
    assert caught.value.exit_code == 2
    file.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


_DEEP = "[" * 100_000 + "]" * 100_000


def _array(folder: Path) -> None:
    (folder / "rows.json").write_text(f'[{{"a": {_DEEP}}}]')
    list(JsonArray(folder / "rows.json")._rows())


def _prompts(folder: Path) -> None:
    (folder / "p.jsonl").write_text(_DEEP)
    prompts_of_file(folder / "p.jsonl", 0)


READERS: dict[str, Callable[[Path], object]] = {
    "record": lambda _: record_from_json(VerifyReport, _DEEP, where="verify.json"),
    "json": lambda _: value_from_json(_DEEP),
    "toml": lambda _: policy_from_toml(f"a = {_DEEP}", where="x.toml"),
    "rows": _array,
    "prompts": _prompts,
}


@pytest.mark.parametrize("name", READERS)
def test_depth_is_told_in_the_words_of_the_file(name: str, tmp_path: Path) -> None:
    """Not in those of the language that this is written in."""
    with pytest.raises((UwmError, ValueError), match="nested too deep") as caught:
        READERS[name](tmp_path)
    assert "recursion" not in str(caught.value)
    assert not isinstance(caught.value, IntegrityError) or name == "record"

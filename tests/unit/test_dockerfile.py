"""The image of docs/examples: what a linter would ask of it, since nothing can build it here."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "examples" / "Dockerfile"
PINS = ROOT / "docs" / "examples" / "requirements.txt"


@dataclass(frozen=True)
class Step:
    """One instruction, continuation lines joined."""

    name: str
    text: str


def steps_of(text: str) -> list[Step]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*(part.strip() for part in line.split(None, 1))) for line in whole.splitlines()]


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile; the checks are those of hadolint and of image scanners that matter here."""
    steps, found, stages = steps_of(text), [], set()
    for step in steps:
        if step.name == "FROM":
            image, *alias = re.split(r"\s+AS\s+", step.text)
            tag = re.search(r":([\w.-]+)(@sha256:[0-9a-f]{64})?$", image)
            if image not in stages and (not tag or tag[1] == "latest" or not re.match(r"\d+\.\d+\.\d+", tag[1])):
                found.append(f"base {image} is not pinned by a whole version")
            stages.update(alias)
        if step.name == "ADD":
            found.append("ADD fetches and unpacks unasked; COPY does not")
        if step.name == "RUN":
            if "pip install" in step.text and step.text.count("--no-cache-dir") != step.text.count("pip install"):
                found.append("pip leaves its cache in the image")
            if re.search(r"\b(sudo|curl|wget|ssh)\b", step.text):
                found.append("RUN fetches what is not pinned")
            if re.search(r"apt-get (upgrade|dist-upgrade)", step.text):
                found.append("RUN upgrades the base")
        if step.name in ("CMD", "ENTRYPOINT") and not isinstance(json.loads(step.text), list):
            found.append(f"{step.name} goes through a shell")
        if step.name == "COPY" and re.match(r"(--\S+ )*\. ", step.text):
            found.append("COPY takes everything, keys and data included")
        if step.name in ("ENV", "ARG") and re.search(r"(?i)(token|password|secret|api_?key)=", step.text):
            found.append(f"{step.name} holds a secret")
    last = steps[max(i for i, s in enumerate(steps) if s.name == "FROM") :]
    users = [step.text for step in last if step.name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        found.append("the last user is root, or a name that an orchestrator cannot tell from root")
    found += [f"no {name}" for name in ("HEALTHCHECK", "CMD") if name not in {step.name for step in last}]
    return found


def test_the_image_is_clean() -> None:
    """Pinned, without root, torch, secrets, shells and things that are fetched."""
    assert problems(FILE.read_text()) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("python:3.11.14-slim-bookworm AS build", "python:latest AS build"), "not pinned"),
        (("python:3.11.14-slim-bookworm AS build", "python AS build"), "not pinned"),
        (("USER 10001:10001\n", ""), "the last user"),
        (("USER 10001:10001", "USER root"), "the last user"),
        (("USER 10001:10001", "USER 0"), "the last user"),
        (("COPY export export", "ADD https://example.org/x /x"), "ADD"),
        (("COPY export export", "COPY . ."), "takes everything"),
        (("COPY export export", "RUN curl -O https://example.org/x"), "not pinned"),
        (("--no-cache-dir --no-deps .", "--no-deps ."), "cache"),
        (('CMD ["uvicorn",', 'CMD ["sh", "-c", "uvicorn"]\n#'), ""),
        (("ENV PATH", "ENV TOKEN=x PATH"), "secret"),
        (("HEALTHCHECK", "LABEL"), "no HEALTHCHECK"),
    ],
)
def test_the_check_sees_what_is_wrong(change: tuple[str, str], problem: str) -> None:
    """Each planted fault is named; a harmless change is not."""
    text = FILE.read_text()
    assert change[0] in text
    found = problems(text.replace(*change))
    assert any(problem in line for line in found) if problem else found == []


def test_what_is_copied_is_there() -> None:
    """Every path of a COPY from the checkout exists, and `uvicorn` is told the module that is copied."""
    for step in steps_of(FILE.read_text()):
        if step.name == "COPY" and "--from" not in step.text:
            for path in step.text.split()[:-1]:
                assert (ROOT / path).exists(), path
    assert "fastapi_endpoint:create_app" in FILE.read_text()


def test_every_dependency_of_the_base_install_is_pinned_and_nothing_heavy_is() -> None:
    """Exact versions that satisfy pyproject.toml; no torch, no transformers, no CUDA."""
    pins = dict(line.split("==") for line in PINS.read_text().splitlines() if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"platform_machine": "aarch64", "sys_platform": "linux"}):
            continue  # the image is for CPUs: onnxruntime without CUDA on every machine
        assert Version(pins[wanted.name]) in wanted.specifier, wanted
    assert not [name for name in pins if re.match(r"torch|transformers|nvidia|tensorrt|onnx$|onnxruntime-gpu", name)]

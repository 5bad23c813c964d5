"""One small build of the demo that several test files look at."""

from __future__ import annotations

import pytest

from tests.small_build import build_small
from uwm_deploy.pipeline.outcome import Outcome
from uwm_deploy.pipeline.request import Request


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, Outcome]:
    """One small build; tests look at what it left."""
    return build_small(tmp_path_factory)

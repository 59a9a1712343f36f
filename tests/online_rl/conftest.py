"""Fixtures of the tests of PPO."""

from __future__ import annotations

import pytest
from helpers import ppo_fixtures
from helpers.ppo_fixtures import Folders, Recorder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Trained models, shared by all tests of a worker."""
    return ppo_fixtures.folders(tmp_path_factory.getbasetemp())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Records the parts of every training step of the test."""
    return Recorder(monkeypatch)

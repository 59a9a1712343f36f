"""What a run sets for other libraries."""

from __future__ import annotations

import os
from typing import Any

import pytest

REPORTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Variables by which a library reports no use, each with the value that its documentation names."""


def test_a_run_turns_off_what_libraries_report_to_their_authors(
    launch: Any, monkeypatch: pytest.MonkeyPatch
):
    for variable in REPORTS:
        monkeypatch.delenv(variable, raising=False)
    assert launch("missing.yaml").code == 2
    assert {variable: os.environ.get(variable) for variable in REPORTS} == REPORTS


def test_a_variable_that_the_user_has_set_keeps_its_value(
    launch: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    launch("missing.yaml")
    assert os.environ["VLLM_NO_USAGE_STATS"] == "0"

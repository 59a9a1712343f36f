"""Tests of checks that need no finished stage."""

from __future__ import annotations

import sys

PPO = """\
stages:
  prepare: {source: embedded, max_rows: 50}
  sft: {model: {vocab_size: 300}}
  reward: {model: sft}
  ppo: {model: sft, rewards: [reward], steps: 2, batch_size: 4, quantization: nf4, lora: {}}
"""


def test_a_missing_optional_dependency_is_an_error_before_anything_runs(
    launch, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (tmp_path / "recipe.yaml").write_text(PPO)
    finished = launch("recipe.yaml")
    assert finished.code == 2
    message = "ppo.quantization: bitsandbytes is not installed: pip install -e '.[quantization]'"
    assert message in finished.err
    assert not list(tmp_path.glob("runs/*"))

"""An error is reported at the key that it is about, which its line names once."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.config.recipe import ErrorCollector, load_recipe

RECIPE = """\
stages:
  prepare: {source: embedded}
  sft: {model: {}, trainer: {
    optim: sgd,
    max_length: 8}}
  reward: {model: sft, lora: {
    r: 4}}
  ppo:
    model: sft
    rewards: [reward,
      "module:function"]
    steps: 1
    batch_size: 1
  evaluate: {policies: [sft], baseline: sft, judge: {api: {
    base_url: "http://localhost", model: m}}}
"""


@pytest.mark.parametrize(
    ("keys", "message", "expected"),
    [
        (("sft", "trainer"), "trainer.optim: unknown", "4: sft.trainer.optim: unknown"),
        (("sft",), "trainer.max_length: too long", "5: sft.trainer.max_length: too long"),
        (("sft", "trainer"), "trainer: no: bad", "3: sft.trainer: no: bad"),
        (("sft", "trainer"), "optim: unknown", "4: sft.trainer.optim: unknown"),
        (("sft", "trainer", "optim"), "optim: x", "4: sft.trainer.optim: x"),
        (("sft", "trainer", "optim"), "torchao is: x", "4: sft.trainer.optim: torchao is: x"),
        (("reward",), "lora.r: too large", "7: reward.lora.r: too large"),
        (("reward", "lora"), "lora.r: too large", "7: reward.lora.r: too large"),
        (("reward",), "lora.rank: too large", "6: reward: lora.rank: too large"),
        (("ppo",), "rewards.1: not finite", "11: ppo.rewards.1: not finite"),
        (("ppo", "rewards", 1), "rewards.1: not finite", "11: ppo.rewards.1: not finite"),
        (("ppo", "rewards", 1), "module:function: x", "11: ppo.rewards.1: module:function: x"),
        (("ppo",), "steps.jsonl: no such file", "8: ppo: steps.jsonl: no such file"),
        (("ppo", "rewards", 0), "reward: no score", "10: ppo.rewards.0: reward: no score"),
        (("evaluate", "judge"), "api.model: unknown", "15: evaluate.judge.api.model: unknown"),
    ],
)  # fmt: skip
def test_a_key_at_the_start_of_a_message_is_part_of_the_place(
    keys: tuple[str | int, ...], message: str, expected: str, tmp_path: Path
):
    (tmp_path / "r.yaml").write_text(RECIPE)
    errors = ErrorCollector(load_recipe(tmp_path / "r.yaml"))
    errors.add(keys, message)
    assert errors.lines == [f"{tmp_path / 'r.yaml'}:{expected}"]

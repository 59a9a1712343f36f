"""`align plan` lists the optional packages that a run needs, and shows its figures without them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from align.cli import main as cli
from align.cli.launcher import check_launch_configuration
from align.errors import RecipeError

RECIPE = """\
stages:
  prepare: {source: embedded, max_rows: 50}
  sft: {model: {hidden_size: 64}, trainer: {report_to: [wandb], optim: schedule_free_adamw}}
  dpo: {model: sft, quantization: nf4, lora: {}, trainer: {optim: adamw_8bit}}
  kto: {model: sft, quantization: nf4, lora: {}, trainer: {use_liger_kernel: true}}
  grpo: {model: sft, rewards: [math], steps: 1, batch_size: 16, sampler: vllm, vllm_mode: colocate}
  control: {environment: CartPole-v1, steps: 1000}
  off: {stage: control, algorithm: dqn, environment: CartPole-v1, steps: 5000}
"""
MISSING = [
    "sft.trainer.optim: schedulefree is not installed: pip install schedulefree",
    "sft.trainer.report_to: wandb is not installed: pip install wandb",
    "dpo.quantization, dpo.trainer.optim, kto.quantization: bitsandbytes is not installed: pip "
    "install -e '.[quantization]'",
    "kto.trainer.use_liger_kernel: liger_kernel is not installed: pip install liger-kernel",
    "grpo.vllm_mode: vllm is not installed: pip install vllm",
    "grpo.rewards.0: math_verify is not installed: pip install -e '.[math]'",
    "off.algorithm: stable_baselines3 is not installed: pip install -e '.[off-policy]'",
    "control.environment: Gymnasium is not installed: pip install -e '.[control]'",
    "off.environment: Gymnasium is not installed: pip install -e '.[control]'",
    "zero2.yaml: deepspeed is not installed: pip install -e '.[deepspeed]'",
]
MODULES = (
    "wandb", "schedulefree", "bitsandbytes", "liger_kernel", "vllm", "math_verify", "gymnasium",
    "stable_baselines3", "deepspeed",
)  # fmt: skip


def test_a_plan_lists_missing_packages_below_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("zero2.yaml").write_text("distributed_type: DEEPSPEED\nnum_processes: 2\n")
    Path("r.yaml").write_text(RECIPE)
    monkeypatch.setattr(sys, "argv", ["align", "plan", "r.yaml", "--config", "zero2.yaml"])
    lines = _printed(monkeypatch, capsys, missing=MODULES)
    assert [line for line in lines if "is not installed" in line] == MISSING
    assert any("dpo-" in line and " run " in line for line in lines)
    with pytest.raises(RecipeError, match=r"zero2.yaml: distributed_type: deepspeed is not inst"):
        check_launch_configuration(Path("zero2.yaml"))


def test_a_plan_of_installed_packages_lists_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "r.yaml").write_text("stages: {prepare: {source: embedded}, sft: {model: {}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["align", "plan", "r.yaml"])
    assert "is not installed" not in "".join(_printed(monkeypatch, capsys, missing=MODULES))


def _printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, missing: tuple[str, ...]
) -> list[str]:
    """The lines of the command, without these modules."""
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as raised:
        cli.main()
    printed = capsys.readouterr()
    assert not raised.value.code, printed.err
    return printed.out.splitlines()

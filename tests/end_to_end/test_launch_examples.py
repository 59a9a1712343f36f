"""The examples for clusters: a Slurm script under a stand-in for Slurm, a file for SkyPilot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "examples" / "launch" / "align.slurm"
SKY = ROOT / "examples" / "launch" / "align.sky.yaml"
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >> "$RECORD/srun"; shift; done
code=0
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$node "$@" || code=$?
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "$@" >> "$RECORD/scontrol"; fi
"""
ALIGN = """#!/bin/bash
n=$(ls "$RECORD" | grep -c '^arguments' || true)
for last; do :; done
printf '%s\\n' "$@" > "$RECORD/arguments$n"
cp "$last" "$RECORD/config$n.yaml"
exit "$CODE"
"""


def run_in_slurm(folder: Path, code: int) -> subprocess.CompletedProcess[str]:
    """Run the script with stand-ins for the programs that it starts."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("align", ALIGN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "record").mkdir()
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "RECORD": str(folder / "record"),
        "CODE": str(code),
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "45",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "4",
        "RUNS": "/shared/my runs",
    }
    return subprocess.run(
        ["bash", str(SLURM), "recipes/dpo.yaml", "dpo.beta=0.2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_each_node_of_a_slurm_job_gets_its_launch_configuration(tmp_path: Path):
    done = run_in_slurm(tmp_path, 0)
    assert (done.returncode, done.stderr) == (0, "")
    record = tmp_path / "record"
    assert not (record / "scontrol").exists()
    base = yaml.safe_load((ROOT / "accelerate_configs" / "multi_gpu.yaml").read_text())
    base.pop("gpu_ids")
    for node in range(2):
        arguments = (record / f"arguments{node}").read_text().splitlines()
        assert arguments[:-1] == [
            *("run", "recipes/dpo.yaml", "dpo.beta=0.2"),
            *("--runs", "/shared/my runs", "--config"),
        ]
        assert yaml.safe_load((record / f"config{node}.yaml").read_text()) == base | {
            "num_machines": 2,
            "num_processes": 8,
            "machine_rank": node,
            "main_process_ip": "node7",
            "main_process_port": 20045,
        }


@pytest.mark.parametrize(("code", "requeued"), [(130, True), (2, False), (1, False)])
def test_only_an_interrupted_job_is_put_back_into_the_queue(tmp_path, code, requeued):
    done = run_in_slurm(tmp_path, code)
    assert done.returncode == code
    record = tmp_path / "record" / "scontrol"
    assert (record.read_text() if record.exists() else "") == "requeue 45\n" * requeued


def test_accelerate_can_read_the_launch_configuration_of_a_node(tmp_path: Path):
    from align.cli.launcher import check_launch_configuration

    run_in_slurm(tmp_path, 0)
    check_launch_configuration(tmp_path / "record" / "config1.yaml")


def test_the_commands_of_the_file_for_skypilot_start_the_recipe(tmp_path: Path):
    task: dict[str, Any] = yaml.safe_load(SKY.read_text())
    (tmp_path / "align").write_text(ALIGN)
    (tmp_path / "align").chmod(0o755)
    (tmp_path / "record").mkdir()
    environment = task["envs"] | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "CODE": "0",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    subprocess.run(["bash", "-c", task["run"]], cwd=ROOT, env=environment, check=True, timeout=60)
    written = yaml.safe_load((tmp_path / "record" / "config0.yaml").read_text())
    expected = {"num_machines": 2, "num_processes": 16, "machine_rank": 1}
    assert expected.items() <= written.items()
    assert written["main_process_ip"] == "10.0.0.1"
    assert task["file_mounts"]["/runs"]["name"]
    assert subprocess.run(["bash", "-n", str(SLURM)], check=False).returncode == 0

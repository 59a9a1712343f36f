"""What `align export --for` writes: configuration, launch script, prompts and reward functions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from align import __version__
from align.cli.clusters import openrlhf, reward_adapter, verl
from align.cli.clusters.job import Job, find_job
from align.cli.clusters.prompts import PromptSet, read_prompts, write_jsonl, write_parquet
from align.cli.clusters.rules import Translation
from align.cli.export import check_target
from align.config.functions import BUILT_IN
from align.errors import UserError, printable
from align.rewards.functions import function_file
from align.runtime import artifacts

Program = Literal["verl", "openrlhf"]
PROGRAMS = {"verl": verl, "openrlhf": openrlhf}
REWARD = "align_reward"


def export_for(
    source: str,
    target: Path,
    program: Program,
    overrides: Sequence[str],
    *,
    stage: str | None,
    runs: Path,
) -> None:
    """Write what ``program`` needs to train a stage of online RL into the new folder ``target``.

    Raises:
        UserError: The stage cannot be read or expressed, or the folder cannot be written.
    """
    check_target(target)
    job = find_job(source, overrides, stage, runs)
    module = PROGRAMS[program]
    module.translate(job, 1).raise_refused(job, module.VERSION)  # before a tokenizer is loaded
    prompts = read_prompts(job)
    translation = module.translate(job, prompts.longest)
    temporary = target.with_name(f".{target.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        translation.notes |= _write_rewards(job, prompts, temporary)
        _write_files(job, program, translation, prompts, temporary)
        artifacts.make_readable(temporary)
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for key, reason in translation.notes.items():
        print(printable(f"no counterpart: {job.name}.{key} ({reason})"))
    print(printable(f"next: bash {target / 'train.sh'}, where {module.VERSION} is installed"))


def _write_files(
    job: Job, program: Program, translation: Translation, prompts: PromptSet, folder: Path
) -> None:
    """Write the configuration, the launch script and the prompts."""
    module = PROGRAMS[program]
    comments = [
        f"The stage `{job.name}` of {job.origin} for {module.VERSION}, by Align {__version__}",
        *(f"no counterpart: {key} ({reason})" for key, reason in translation.notes.items()),
    ]
    comments = [" ".join(comment.split()) for comment in comments]
    if program == "verl":
        text = verl.as_yaml(translation.settings, comments)
        (folder / "verl.yaml").write_text(text, encoding="utf-8")
        launch = "\n".join(["#!/usr/bin/env bash", f"# {comments[0]}"]) + verl.SCRIPT
        write_parquet(prompts, folder / "prompts.parquet")
    else:
        launch = openrlhf.script(translation.settings, comments)
        write_jsonl(prompts, folder / "prompts.jsonl")
    (folder / "train.sh").write_text(launch, encoding="utf-8")


def _write_rewards(job: Job, prompts: PromptSet, folder: Path) -> dict[str, str]:
    """Write the adapter, its settings, and the modules of the functions that are single files.

    Returns the rewards that the cluster has to import from elsewhere, by key.
    """
    config, missing = job.config, {}
    rewards = []
    weights = config.weights or [1.0] * len(config.rewards)
    for k, ((name, function), weight) in enumerate(
        zip(config.score_functions.items(), weights, strict=True)
    ):
        rewards.append(
            {
                "name": name,
                "address": function.address,
                "weight": weight,
                "answer": function.answer,
                "answer_column": function.answer_column,
            }
        )
        if function.function in BUILT_IN:
            needed = f" and {function.package[0]}" if function.package else ""
            missing[f"rewards.{k}"] = f"needs Align{needed} on the cluster"
            continue
        file = function_file(function.address)
        if file is not None and file.resolve().parent == Path.cwd():
            shutil.copy(file, folder)
        else:
            missing[f"rewards.{k}"] = f"{function.address} must be importable on the cluster"
    shutil.copy(reward_adapter.__file__, folder / f"{REWARD}.py")
    settings = {
        "rewards": rewards,
        "missing_eos_penalty": config.missing_eos_penalty or 0.0,
        "ends": prompts.ends,
        "special_tokens": prompts.special_tokens,
    }
    artifacts.write_json(folder / f"{REWARD}.json", settings)
    return missing

"""What can be known wrong before anything is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.config.base import Stage
from align.config.control import Control
from align.config.data import Label, Sample
from align.config.evaluate import Evaluate
from align.config.ppo import PPO
from align.config.training import DPO, KTO, SFT, Reward, TRLStage
from align.config.validation import FUNCTION
from align.data import tables
from align.errors import UserError
from align.rewards.functions import load_function, missing_columns
from align.runtime import hub

if TYPE_CHECKING:
    from align.config.recipe import Recipe
    from align.pipeline.plan import PlannedStage


def check_writable(runs: Path) -> None:
    """Make sure that ``runs`` is a folder, or can be made one, and can be written."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=runs):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{runs}: cannot be written ({reason}); choose another folder with --runs"
        ) from None


def check_trainer_arguments(recipe: Recipe, due: Sequence[PlannedStage]) -> None:
    """Build the trainer configurations of all stages that are due: what one refuses is known before the first trains."""
    if not any(isinstance(step.config, TRLStage) for step in due):
        return  # importing TRL takes seconds
    import trl

    from align.training import trl_trainer

    problems = []
    for step in due:
        config = step.config
        if not isinstance(config, TRLStage):
            continue
        trl_class = getattr(trl, str(config.trainer_config))
        own = {"beta": config.beta} if isinstance(config, DPO | KTO) else {}
        try:
            trl_trainer.trl_arguments(
                trl_class, step.folder, seed=config.seed, trainer=config.trainer, **own
            )
        except UserError as error:
            where = recipe.at(step.name, "trainer")
            problems += [f"{where}: {line.removeprefix('trainer: ')}" for line in error.lines]
    if problems:
        raise UserError(*problems)


def check_hub_models(recipe: Recipe, due: Sequence[PlannedStage]) -> None:
    """Make sure that models named by Hub ids can be had: the loading itself gives up after a minute of retries."""
    models = {
        (step.name, *role.split(".")): target
        for step in due
        for role, target in step.inputs.items()
        if isinstance(target, str)
    }
    missing = {model for model in set(models.values()) if not hub.model_is_reachable(model)}
    problems = [
        f"{recipe.at(*keys)}: {model}: no such folder, not in the cache, and the Hub cannot be reached; "
        "name a folder, or fetch the model first"
        for keys, model in models.items()
        if model in missing
    ]
    if problems:
        raise UserError(*problems)


def check_reward_functions(recipe: Recipe, due: Sequence[PlannedStage]) -> None:
    """Import each reward function once: that it is there and can be called.

    Raises:
        UserError: One line for each that is not.
    """
    problems = []
    for step in due:
        for k, name in enumerate(step.config.rewards if isinstance(step.config, PPO) else ()):
            try:
                if FUNCTION.match(name):
                    load_function(name)
            except UserError as error:
                problems += [
                    f"{recipe.at(step.name, 'rewards', str(k))}: {line}" for line in error.lines
                ]
    if problems:
        raise UserError(*problems)


def check_vllm_servers(recipe: Recipe, due: Sequence[PlannedStage]) -> None:
    """Ask each vLLM server whether it is there: the stage that needs it may come hours later.

    Raises:
        UserError: One line for each that is not.
    """
    from urllib.request import urlopen

    problems = []
    for step in due:
        config = step.config
        if not isinstance(config, PPO) or config.sampler != "vllm":
            continue
        try:
            with urlopen(f"{config.vllm_url.rstrip('/')}/health", timeout=5):
                pass
        except (OSError, ValueError) as error:
            where = recipe.at(step.name, "vllm_url")
            problems.append(
                f"{where}: {config.vllm_url}: no server answers ({error}); start it with `vllm serve`, or set "
                "`sampler: transformers`"
            )
    if problems:
        raise UserError(*problems)


def check_environments(recipe: Recipe, due: Sequence[PlannedStage]) -> None:
    """Make each environment once: that it is there, installed, and of a kind that a policy fits.

    Raises:
        UserError: One line for each that is not.
    """
    problems = []
    for step in due:
        config = step.config
        if not isinstance(config, Control):
            continue
        from align.control import spaces

        try:
            spaces.inspect_env(config.environment, config.environment_options, config.distribution)
        except spaces.UnfitError as error:
            problems.append(f"{recipe.at(step.name, error.key)}: {error}")
    if problems:
        raise UserError(*problems)


def check_tables(recipe: Recipe, data: Path, due: Sequence[PlannedStage]) -> None:
    """Make sure that the stages which are due find what they need in a finished ``prepare`` folder.

    Raises:
        UserError: One line for each that would fail, some of them after hours of training.
    """
    names = set(tables.table_names(data))

    def prompts(split: str) -> list[str]:
        rows = tables.read(data, "prompts", split, columns=["prompt"])
        return [row["prompt"][-1]["content"] for row in rows]

    problems = []
    for step in due:
        if data in step.inputs.values():
            problems += table_problems(recipe, step.name, step.config, names, prompts)
            problems += _label_problems(recipe, step.name, step.config, data)
            problems += _column_problems(recipe, step.name, step.config, data)
        if isinstance(step.config, Label) and step.config.judge == "gold":
            sampled = next((s for s in due if s.folder == step.inputs["completions"]), None)
            if sampled is not None and data in sampled.inputs.values():
                split = getattr(sampled.config, "split", "train")
                problems += _gold_problems(
                    recipe, step.name, prompts(split), "set `judge` to a reward model"
                )
    if problems:
        raise UserError(*problems)


def _column_problems(recipe: Recipe, name: str, config: Stage, data: Path) -> list[str]:
    """Columns of the prepared rows that reward functions, or margins, cannot do without."""
    if isinstance(config, PPO):
        columns = tables.column_names(data, "prompts", "train")
        return [
            f"{recipe.at(name, 'rewards')}: {each} needs `{column}`, and the prompts have {', '.join(columns)}; add it to "
            "`keep` of the `prepare` stage"
            for each in config.rewards
            if FUNCTION.match(each)
            for column in missing_columns(each, columns)
        ]
    scored = isinstance(config, Reward) and config.margin_coef
    if scored and tables.has_table(data, "pairs", "train"):
        if "margin" not in tables.column_names(data, "pairs", "train"):
            return [f"{recipe.at(name, 'margin_coef')}: these pairs have no `margin`; remove it"]
    return []


def _label_problems(recipe: Recipe, name: str, config: Stage, data: Path) -> list[str]:
    """Whether a ``kto`` stage finds completions of both labels for every batch."""
    if not isinstance(config, KTO) or not tables.has_table(data, "unpaired", "train"):
        return []
    from align.config import trl_fields
    from align.training import kto_batches

    labels = [row["label"] for row in tables.read(data, "unpaired", "train", columns=["label"])]
    both = tables.count_rows(data, "pairs", "train")
    key = "per_device_train_batch_size"
    usual = trl_fields.trl_fields(str(config.trainer_config))[key].default
    size = config.trainer.get(key, int(str(usual)))
    try:
        kto_batches.check(sum(labels) + both, labels.count(False) + both, batch_size=size)
    except UserError as error:
        return [f"{recipe.at(name, 'preferences')}: {line}" for line in error.lines]
    return []


def table_problems(
    recipe: Recipe,
    name: str,
    config: Stage,
    names: Collection[str],
    prompts: Callable[[str], list[str]],
) -> list[str]:
    """What a stage needs and prepared data lack. ``names`` are such as ``pairs-train``; ``prompts`` are of a split."""
    needs = []
    if isinstance(config, SFT):
        needs = [("demonstrations", "demonstrations-train")]
    elif isinstance(config, DPO | Reward):
        needs = [("pairs", "pairs-train")]
    elif isinstance(config, PPO):
        needs = [("prompts", "prompts-train")]
        needs += [("eval_split", f"prompts-{config.eval_split}")] if config.eval_steps else []
    elif isinstance(config, KTO):
        needs = [] if "unpaired-train" in names else [("preferences", "pairs-train")]
    elif isinstance(config, Sample):
        needs = [("split", f"prompts-{config.split}")]
    elif isinstance(config, Evaluate):
        needs = [("judge", f"prompts-{config.split}")] if config.judge else []
        needs += [("implicit_rewards", f"pairs-{config.split}")] if config.implicit_rewards else []
    problems = [
        f"{recipe.at(name, key)}: the source of `prepare` gives no {table}; found {', '.join(sorted(names))}"
        for key, table in needs
        if table not in names
    ]
    if isinstance(config, Evaluate | PPO) and config.judge == "gold" and not problems:
        split = config.split if isinstance(config, Evaluate) else "train"
        repair = (
            f"without a judge measure `implicit_rewards`: {name}.judge=null {name}.implicit_rewards=true"
            if isinstance(config, Evaluate)
            else f"set {name}.judge=null"
        )
        problems += _gold_problems(recipe, name, prompts(split), repair)
    return problems


def _gold_problems(recipe: Recipe, name: str, texts: Sequence[str], repair: str) -> list[str]:
    """Whether there is a prompt that the gold score does not know."""
    from align.rewards import gold

    try:
        gold.check_prompts(texts, repair=repair)
    except UserError as error:
        return [f"{recipe.at(name, 'judge')}: {line}" for line in error.lines]
    return []

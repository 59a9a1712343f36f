"""What can be known wrong before anything is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align import reward_functions, sources
from align.errors import UserError
from align.meaning import FUNCTION
from align.settings import (
    DPO,
    KTO,
    PPO,
    SFT,
    Control,
    Evaluate,
    Label,
    Reward,
    Sample,
    Stage,
    Training,
)

if TYPE_CHECKING:
    from align.planning import Step
    from align.recipe import Recipe


def writable(runs: Path) -> None:
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


def trainer_arguments(recipe: Recipe, due: Sequence[Step]) -> None:
    """Build the trainer configurations of all stages that are due: what one refuses is known before the first trains."""
    if not any(isinstance(step.settings, Training) for step in due):
        return  # importing TRL takes seconds
    import trl

    from align import training

    problems = []
    for step in due:
        settings = step.settings
        if not isinstance(settings, Training):
            continue
        config = getattr(trl, str(settings.trainer_config))
        own = {"beta": settings.beta} if isinstance(settings, DPO | KTO) else {}
        try:
            training.arguments(
                config, step.folder, seed=settings.seed, trainer=settings.trainer, **own
            )
        except UserError as error:
            where = recipe.at(step.name, "trainer")
            problems += [f"{where}: {line.removeprefix('trainer: ')}" for line in error.lines]
    if problems:
        raise UserError(*problems)


def hub_models(recipe: Recipe, due: Sequence[Step]) -> None:
    """Make sure that models named by Hub ids can be had: the loading itself gives up after a minute of retries."""
    models = {
        (step.name, *role.split(".")): target
        for step in due
        for role, target in step.inputs.items()
        if isinstance(target, str)
    }
    missing = {model for model in set(models.values()) if not sources.model_in_reach(model)}
    problems = [
        f"{recipe.at(*keys)}: {model}: no such folder, not in the cache, and the Hub cannot be reached; "
        "name a folder, or fetch the model first"
        for keys, model in models.items()
        if model in missing
    ]
    if problems:
        raise UserError(*problems)


def functions(recipe: Recipe, due: Sequence[Step]) -> None:
    """Import each reward function once: that it is there and can be called.

    Raises:
        UserError: One line for each that is not.
    """
    problems = []
    for step in due:
        for k, name in enumerate(step.settings.rewards if isinstance(step.settings, PPO) else ()):
            try:
                if FUNCTION.match(name):
                    reward_functions.function(name)
            except UserError as error:
                problems += [
                    f"{recipe.at(step.name, 'rewards', str(k))}: {line}" for line in error.lines
                ]
    if problems:
        raise UserError(*problems)


def samplers(recipe: Recipe, due: Sequence[Step]) -> None:
    """Ask each vLLM server whether it is there: the stage that needs it may come hours later.

    Raises:
        UserError: One line for each that is not.
    """
    from urllib.request import urlopen

    problems = []
    for step in due:
        settings = step.settings
        if not isinstance(settings, PPO) or settings.sampler != "vllm":
            continue
        try:
            with urlopen(f"{settings.vllm_url.rstrip('/')}/health", timeout=5):
                pass
        except (OSError, ValueError) as error:
            where = recipe.at(step.name, "vllm_url")
            problems.append(
                f"{where}: {settings.vllm_url}: no server answers ({error}); start it with `vllm serve`, or set "
                "`sampler: transformers`"
            )
    if problems:
        raise UserError(*problems)


def environments(recipe: Recipe, due: Sequence[Step]) -> None:
    """Make each environment once: that it is there, installed, and of a kind that a policy fits.

    Raises:
        UserError: One line for each that is not.
    """
    problems = []
    for step in due:
        settings = step.settings
        if not isinstance(settings, Control):
            continue
        from align.control import worlds

        try:
            worlds.look(settings.environment, settings.environment_options, settings.distribution)
        except worlds.UnfitError as error:
            problems.append(f"{recipe.at(step.name, error.key)}: {error}")
    if problems:
        raise UserError(*problems)


def prepared(recipe: Recipe, data: Path, due: Sequence[Step]) -> None:
    """Make sure that the stages which are due find what they need in a finished ``prepare`` folder.

    Raises:
        UserError: One line for each that would fail, some of them after hours of training.
    """
    tables = {file.stem for file in data.glob("*.parquet")}

    def prompts(split: str) -> list[str]:
        import pyarrow.parquet as pq

        rows = pq.read_table(data / f"prompts-{split}.parquet", columns=["prompt"]).to_pylist()
        return [row["prompt"][-1]["content"] for row in rows]

    problems = []
    for step in due:
        if data in step.inputs.values():
            problems += unfit(recipe, step.name, step.settings, tables, prompts)
            problems += _unmixed(recipe, step.name, step.settings, data)
            problems += _without_columns(recipe, step.name, step.settings, data)
        if isinstance(step.settings, Label) and step.settings.judge == "gold":
            sampled = next((s for s in due if s.folder == step.inputs["completions"]), None)
            if sampled is not None and data in sampled.inputs.values():
                split = getattr(sampled.settings, "split", "train")
                problems += _not_gold(recipe, step.name, prompts(split), "name a reward model")
    if problems:
        raise UserError(*problems)


def _without_columns(recipe: Recipe, name: str, settings: Stage, data: Path) -> list[str]:
    """Columns of the prepared rows that reward functions, or margins, cannot do without."""
    import pyarrow.parquet as pq

    if isinstance(settings, PPO):
        columns = pq.read_schema(data / "prompts-train.parquet").names
        return [
            f"{recipe.at(name, 'rewards')}: {each} needs `{column}`, and the prompts have {', '.join(columns)}; add it to "
            "`keep` of the `prepare` stage"
            for each in settings.rewards
            if FUNCTION.match(each)
            for column in reward_functions.lacking(each, columns)
        ]
    file = data / "pairs-train.parquet"
    if isinstance(settings, Reward) and settings.margin_coef and file.is_file():
        if "margin" not in pq.read_schema(file).names:
            return [f"{recipe.at(name, 'margin_coef')}: these pairs have no `margin`; remove it"]
    return []


def _unmixed(recipe: Recipe, name: str, settings: Stage, data: Path) -> list[str]:
    """Whether a ``kto`` stage finds completions of both labels for every batch."""
    file = data / "unpaired-train.parquet"
    if not isinstance(settings, KTO) or not file.is_file():
        return []
    import pyarrow.parquet as pq

    from align import trainer_keys, unpaired

    labels = pq.read_table(file, columns=["label"])["label"].to_pylist()
    pairs = data / "pairs-train.parquet"
    both = pq.read_metadata(pairs).num_rows if pairs.is_file() else 0
    key = "per_device_train_batch_size"
    usual = trainer_keys.trainer_keys(str(settings.trainer_config))[key].default
    size = settings.trainer.get(key, int(str(usual)))
    try:
        unpaired.check(sum(labels) + both, labels.count(False) + both, batch_size=size)
    except UserError as error:
        return [f"{recipe.at(name, 'preferences')}: {line}" for line in error.lines]
    return []


def unfit(
    recipe: Recipe,
    name: str,
    settings: Stage,
    tables: Collection[str],
    prompts: Callable[[str], list[str]],
) -> list[str]:
    """What a stage needs and prepared data lack. ``tables`` are such as ``pairs-train``; ``prompts`` are of a split."""
    needs = []
    if isinstance(settings, SFT):
        needs = [("demonstrations", "demonstrations-train")]
    elif isinstance(settings, DPO | Reward):
        needs = [("pairs", "pairs-train")]
    elif isinstance(settings, PPO):
        needs = [("prompts", "prompts-train")]
        needs += [("eval_split", f"prompts-{settings.eval_split}")] if settings.eval_steps else []
    elif isinstance(settings, KTO):
        needs = [] if "unpaired-train" in tables else [("preferences", "pairs-train")]
    elif isinstance(settings, Sample):
        needs = [("split", f"prompts-{settings.split}")]
    elif isinstance(settings, Evaluate):
        needs = [("judge", f"prompts-{settings.split}")] if settings.judge else []
        needs += (
            [("implicit_rewards", f"pairs-{settings.split}")] if settings.implicit_rewards else []
        )
    problems = [
        f"{recipe.at(name, key)}: the source of `prepare` gives no {table}; found {', '.join(sorted(tables))}"
        for key, table in needs
        if table not in tables
    ]
    if isinstance(settings, Evaluate | PPO) and settings.judge == "gold" and not problems:
        split = settings.split if isinstance(settings, Evaluate) else "train"
        repair = (
            f"without a judge measure `implicit_rewards`: {name}.judge=null {name}.implicit_rewards=true"
            if isinstance(settings, Evaluate)
            else f"set {name}.judge=null"
        )
        problems += _not_gold(recipe, name, prompts(split), repair)
    return problems


def _not_gold(recipe: Recipe, name: str, texts: Sequence[str], repair: str) -> list[str]:
    """Whether there is a prompt that the gold score does not know."""
    from align.judges import gold

    try:
        for text in texts:
            gold.parse_prompt(text)
    except ValueError as error:
        where = recipe.at(name, "judge")
        return [f"{where}: `gold` scores the embedded task's prompts only: {error}; {repair}"]
    return []

"""Checks of a recipe before its stages run, so that errors are reported before anything is trained.

The stages declare what they need (:class:`align.config.base.Stage`); the checks here look whether
it exists.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from align.config.recipe import ErrorCollector, Recipe
from align.data import tables as data_tables
from align.errors import UserError
from align.pipeline.plan import PlannedStage
from align.rewards.functions import load_function, missing_columns
from align.runtime import hub

SERVER_TIMEOUT_SECONDS = 5


@dataclass(frozen=True, slots=True)
class PreparedTables:
    """What is known of prepared data, on disk or in memory."""

    names: Collection[str]
    """The names of the tables, such as ``pairs-train``."""
    prompts: Callable[[str], list[str]]
    """The texts of the last messages of the prompts of a split."""


def check_writable(runs: Path) -> None:
    """Check that ``runs`` is a writable folder; create it if necessary.

    Raises:
        UserError: It cannot be created or written.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=runs):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{runs}: cannot be written ({reason}); choose another folder with --runs"
        ) from None


def check_before_start(recipe: Recipe, pending: Sequence[PlannedStage], world_size: int) -> None:
    """Check models, functions, servers, environments and batch sizes of pending stages.

    Raises:
        UserError: One line for each error.
    """
    errors = ErrorCollector(recipe)
    check_hub_models(errors, pending)
    check_packages(errors, pending)
    check_environments(errors, pending)
    check_reward_functions(errors, pending)
    check_servers(errors, pending)
    check_batch_sizes(errors, pending, world_size)
    errors.raise_any()


def check_hub_models(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that models on the Hub are cached or reachable; loading retries for a minute."""
    models = {
        (stage.name, *key.split(".")): target
        for stage in pending
        for key, target in stage.inputs.items()
        if isinstance(target, str)
    }
    missing = {model for model in set(models.values()) if not hub.model_is_reachable(model)}
    for keys, model in models.items():
        if model in missing:
            errors.add(keys, f"{model}: {hub.NOT_REACHABLE}")


def check_packages(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that the optional dependencies that settings require are installed."""
    for stage in pending:
        for key, (package, extra) in stage.config.required_packages.items():
            if importlib.util.find_spec(package) is None:
                repair = f"pip install -e '.[{extra}]'"
                errors.add((stage.name, key), f"{package} is not installed: {repair}")


def check_environments(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Make each Gymnasium environment once, to check that it exists and has usable spaces."""
    for stage in pending:
        for environment in stage.config.gym_environments:
            from align.control import spaces

            try:
                spaces.inspect_env(environment.name, environment.options, environment.distribution)
            except spaces.UnfitError as error:
                errors.add((stage.name, error.key), str(error))


def check_reward_functions(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Import each reward function once: it must exist and be callable."""
    for stage in pending:
        for keys, function in stage.config.reward_functions.items():
            with errors.at(stage.name, *keys):
                load_function(function)


def check_servers(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that each vLLM server answers: the stage that needs it may start hours later."""
    for stage in pending:
        for key, address in stage.config.servers.items():
            try:
                with urlopen(f"{address.rstrip('/')}/health", timeout=SERVER_TIMEOUT_SECONDS):
                    pass
            except (OSError, ValueError) as error:
                repair = "start it with `vllm serve`, or set `sampler: transformers`"
                errors.add((stage.name, key), f"{address}: no server answers ({error}); {repair}")


def check_batch_sizes(
    errors: ErrorCollector, pending: Sequence[PlannedStage], world_size: int
) -> None:
    """Check that batches can be divided over the processes of this run."""
    for stage in pending:
        for problem in stage.config.batch_size_problems(world_size):
            errors.add((stage.name, *problem.keys), problem.message)


def check_trainer_arguments(recipe: Recipe, pending: Sequence[PlannedStage]) -> None:
    """Build the TRL configurations of all pending stages, so that TRL checks them now.

    Raises:
        UserError: One line for each error.
    """
    trained = [stage for stage in pending if stage.config.trainer_config]
    if not trained:
        return  # importing TRL takes seconds
    from align.training import trl_trainer

    errors = ErrorCollector(recipe)
    for stage in trained:
        trl_class = trl_trainer.config_class(str(stage.config.trainer_config))
        arguments = stage.config.trl_arguments()
        seed = getattr(stage.config, "seed", 0)
        try:
            trl_trainer.trl_arguments(trl_class, stage.folder, seed=seed, trainer=arguments)
        except UserError as error:
            lines = [line.removeprefix("trainer: ") for line in error.lines]
            errors.add((stage.name, "trainer"), *lines)
    errors.raise_any()


# Prepared data


def check_tables(recipe: Recipe, data: Path, pending: Sequence[PlannedStage]) -> None:
    """Check that finished prepared data have the tables and columns of pending stages.

    Raises:
        UserError: One line for each error.
    """
    errors = ErrorCollector(recipe)

    def prompts(split: str) -> list[str]:
        rows = data_tables.read(data, "prompts", split, columns=["prompt"])
        return [row["prompt"][-1]["content"] for row in rows]

    tables = PreparedTables(set(data_tables.table_names(data)), prompts)
    check_contents(errors, data, tables, pending)
    for stage in pending:
        if data in stage.inputs.values():
            _check_columns(errors, stage, data)
            _check_labels(errors, stage, data)
    errors.raise_any()


def check_contents(
    errors: ErrorCollector, data: Path, tables: PreparedTables, pending: Sequence[PlannedStage]
) -> None:
    """Check tables and gold prompts of the prepared data that belong in ``data``."""
    for stage in pending:
        if data in stage.inputs.values() and not _tables_exist(errors, stage, data, tables):
            continue
        split = _gold_split(stage, data, pending)
        if split is not None and stage.config.gold_prompts is not None:
            from align.rewards import gold

            with errors.at(stage.name, "judge"):
                gold.check_prompts(tables.prompts(split), repair=stage.config.gold_prompts.repair)


def _tables_exist(
    errors: ErrorCollector, stage: PlannedStage, data: Path, tables: PreparedTables
) -> bool:
    """Whether the required tables exist; those that do not are added to ``errors``."""
    alternatives: dict[str, list[str]] = {}
    for table in stage.config.required_tables():
        if stage.inputs.get(table.input) == data:
            alternatives.setdefault(table.key, []).append(table.name)
    missing = {
        key: names for key, names in alternatives.items() if not set(names) & set(tables.names)
    }
    for key, names in missing.items():
        existing = ", ".join(sorted(tables.names))
        errors.add(
            (stage.name, key),
            f"the prepared data have no table {' or '.join(names)}, only {existing}",
        )
    return not missing


def _gold_split(stage: PlannedStage, data: Path, pending: Sequence[PlannedStage]) -> str | None:
    """The split of ``data`` whose prompts the gold score must parse for this stage."""
    gold = stage.config.gold_prompts
    if gold is None:
        return None
    source = stage.inputs.get(gold.input)
    if source == data:
        return gold.split
    sampled = next((other for other in pending if other.folder == source), None)
    if sampled is None or data not in sampled.inputs.values():
        return None
    split: str = getattr(sampled.config, "split", gold.split)
    return split


def _check_columns(errors: ErrorCollector, stage: PlannedStage, data: Path) -> None:
    """Check the columns that settings and reward functions require."""
    for key, (table, column) in stage.config.required_columns.items():
        exists = data_tables.has_table(data, table.kind, table.split)
        if exists and column not in data_tables.column_names(data, table.kind, table.split):
            errors.add((stage.name, key), f"{table.name} has no column `{column}`; remove this key")
    for keys, function in stage.config.reward_functions.items():
        if not data_tables.has_table(data, "prompts", "train"):
            continue  # reported as a missing table
        columns = data_tables.column_names(data, "prompts", "train")
        for column in missing_columns(function, columns):
            errors.add(
                (stage.name, *keys),
                f"{function} requires the column `{column}`, and the prompts have "
                f"{', '.join(columns)}; add it to `keep_columns` of the `prepare` stage",
            )


def _check_labels(errors: ErrorCollector, stage: PlannedStage, data: Path) -> None:
    """Check that there are enough completions of both labels for every batch."""
    size = stage.config.labels_per_batch
    if size is None or not data_tables.has_table(data, "unpaired", "train"):
        return
    from align.training import kto_batches

    rows = data_tables.read(data, "unpaired", "train", columns=["label"])
    labels = [row["label"] for row in rows]
    paired = data_tables.count_rows(data, "pairs", "train")
    desirable, undesirable = sum(labels) + paired, labels.count(False) + paired
    with errors.at(stage.name, stage.config.reads[0].input):
        kto_batches.check_label_counts(desirable, undesirable, batch_size=size)

"""Checks of a recipe before its stages run, so that errors are reported before anything is trained.

The stages declare what they need (:class:`align.config.base.Stage`); the checks here look whether
it exists. :func:`examine` makes all of them, the same for ``align check`` and for a run, and
collects their errors. None of them loads a training library; what only TRL or a reward function
itself knows is checked after them, by :func:`check_before_training`.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.request import urlopen

from align.config import trl_fields
from align.config.optimizers import UNSUPPORTED
from align.config.recipe import ErrorCollector
from align.data import sources
from align.data import tables as data_tables
from align.data.annotation_files import read_annotations
from align.data.completion_files import read_completions
from align.errors import UserError
from align.pipeline import packages, reward_checks, token_lengths, trackers
from align.pipeline.model_checks import (
    check_gguf_files,
    check_hub_models,
    check_revisions,
    check_target_modules,
)
from align.pipeline.packages import check_packages
from align.pipeline.plan import PlannedStage
from align.pipeline.quantization_checks import check_quantization, check_stored_types, remarks
from align.pipeline.table_checks import (
    TableCheck,
    check_tables,
    finished_tables,
    no_further_check,
)
from align.pipeline.template_checks import check_added_tokens, check_chat_templates
from align.rewards import functions
from align.rewards.function_source import signature
from align.runtime import artifacts, sharding

SERVER_TIMEOUT_SECONDS = 5
UNSUPPORTED_IF_SHARDED = {
    "quantization": "weights in 4 bits",
    "compile_layers": "compiled layers",
}
"""Keys of stages with a TRL trainer that need whole weights, and what they ask for."""
UNSUPPORTED_IF_SHARDED_ONLINE = {
    "quantization": "weights in 4 bits",
    "compile_decoding": "compiled decoding",
    "optimizer": "8-bit optimizers",
    "tokens_per_batch": "forward passes whose number differs between processes",
}
"""The same of online-RL stages."""


def check_writable(errors: ErrorCollector, runs: Path) -> None:
    """Check that ``runs`` is a writable folder, or that it can be created."""
    try:
        existing = next(path for path in (runs, *runs.absolute().parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        errors.lines.append(
            f"{runs}: cannot be written ({reason}); choose another folder with --runs"
        )
    if ":" in str(runs) or "::" in str(runs.absolute()):
        errors.lines.append(
            f"{runs}: the libraries for tables read a path with `:` as an address; choose another "
            "folder with --runs"
        )
    summary = runs / errors.recipe.name / artifacts.SUMMARY
    for path, expected in ((summary.parent, "a folder"), (summary, "a file")):
        is_expected = path.is_dir() if path == summary.parent else path.is_file()
        if os.path.lexists(path) and not is_expected:
            errors.lines.append(
                f"{path}: not {expected}, so no summary can be written; move it away"
            )


def examine(
    errors: ErrorCollector,
    stages: Sequence[PlannedStage],
    runs: Path,
    *,
    world_size: int,
    largest_source: float = math.inf,
    further: TableCheck = no_further_check,
) -> Iterator[str]:
    """Make all checks that need no training library; yield a line for each result.

    ``stages`` may include invalid ones (:func:`align.pipeline.plan.with_invalid`), whose data is
    not prepared. Sources of more than ``largest_source`` bytes are not read: their rows are checked
    when they are prepared. ``further`` is one more check of prepared data.
    """
    check_writable(errors, runs)
    for check in CHECKS:
        check(errors, stages)
    yield from check_server_judges(errors, stages)
    stages = [stage for stage in stages if not stage.is_partial]
    check_batch_sizes(errors, stages, world_size)
    yield from remarks(stages)
    read = [
        stage
        for stage in stages
        if not (stage.config.prepares_data and stage.status == "invalid")
        and _source_bytes(stage) <= largest_source
    ]
    prepared_again = {stage.folder for stage in read if stage.config.prepares_data}
    inputs = (target for stage in stages for target in stage.inputs.values())
    for folder in dict.fromkeys(target for target in inputs if isinstance(target, Path)):
        if (folder / artifacts.FILE).is_file() and data_tables.table_names(folder):
            check_tables(errors, folder, stages)
            if folder not in prepared_again:
                yield from further(errors, folder, finished_tables(folder), stages)
    yield from token_lengths.examine(errors, read, further)


def _source_bytes(stage: PlannedStage) -> int:
    """The size of the local files that a stage prepares."""
    files = (
        file
        for source in stage.config.external_sources()
        for file in sources.source_files(source.name, split=source.split)
    )
    return sum(file.stat().st_size for file in files)


def check_finished_stages(
    errors: ErrorCollector, planned: Sequence[PlannedStage]
) -> frozenset[Path]:
    """Compare the files of reused stages, and of finished folders that are inputs, with checksums.

    Every file is read once. Returns the damaged folders, which cannot be examined further.
    """
    checked: set[Path] = set()
    damaged: set[Path] = set()
    for stage in planned:
        used = [stage.folder] if stage.status == "reused" else stage.inputs.values()
        for folder in used:
            artifact = artifacts.read_artifact(folder) if isinstance(folder, Path) else None
            if isinstance(folder, Path) and artifact is not None and folder not in checked:
                checked.add(folder)
                n_errors = len(errors.lines)
                with errors.at(stage.name):
                    artifacts.check_contents(folder, artifact)
                if len(errors.lines) > n_errors:
                    damaged.add(folder)
    return frozenset(damaged)


def check_gpus(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that there is an NVIDIA GPU where settings require one."""
    for stage in pending:
        for key, repair in stage.config.gpu_keys.items():
            if not has_cuda():
                message = (
                    f"`{getattr(stage.config, key)}` needs an NVIDIA GPU, and torch finds none"
                )
                errors.add((stage.name, key), f"{message}; {repair}")


def has_cuda() -> bool:
    """Whether torch finds an NVIDIA GPU. The first call imports torch."""
    import torch

    return torch.cuda.is_available()


def check_trackers(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that the experiment trackers are installed and have a key."""
    for stage in pending:
        keys = ("trainer", "report_to") if stage.config.trainer_config else ("report_to",)
        for tracker in stage.config.trackers:
            if problem := trackers.problem(tracker):
                errors.add((stage.name, *keys), problem)


def check_environments(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Make each Gymnasium environment once, to check that it exists and has usable spaces."""
    for stage, problem in packages.environment_problems(pending):
        errors.add((stage.name, problem.key), str(problem))


def check_reward_functions(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Look for each reward function in the source of its module, which is not run.

    Of a built-in function, look for the package that it needs.
    """
    for stage in pending:
        for keys, function in stage.config.reward_functions.items():
            with errors.at(stage.name, *keys):
                functions.check_package(function)
                signature(function.address)


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


def check_server_judges(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> Iterator[str]:
    """Check the files, the API key and the server of each judge; yield a line for each warning.

    The server lists its models; no completion is sent.
    """
    for stage in pending:
        for keys, judge in stage.config.server_judges.items():
            from align.judges.server_check import check_judge  # only where there is such a judge

            with errors.at(stage.name, *keys):
                for warning in check_judge(judge):
                    yield f"{stage.name}: warning: {warning}"


def check_row_files(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Read the files of annotations and of completions that stages name."""
    for stage in pending:
        for key, path in stage.config.annotation_files.items():
            with errors.at(stage.name, *key.split(".")):
                read_annotations(Path(path))
        for key, path in stage.config.completion_files.items():
            with errors.at(stage.name, *key.split(".")):
                read_completions(Path(path))


def check_batch_sizes(
    errors: ErrorCollector, pending: Sequence[PlannedStage], world_size: int
) -> None:
    """Check that batches can be divided over the processes of this run."""
    for stage in pending:
        for problem in stage.config.batch_size_problems(world_size):
            errors.add((stage.name, *problem.keys), problem.message)


def check_sharding(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Check that no stage needs what is not supported with weights shared among processes."""
    kind = sharding.kind()
    for stage in pending:
        config = stage.config
        if kind is None or not config.trains_model:
            continue
        keys = {name: getattr(config, name, None) for name in ("lora", "dtype")}
        is_trl = config.trainer_config is not None
        if is_trl and kind == "ZeRO-3" and keys["lora"] and keys["dtype"] == "bfloat16":
            errors.add(
                (stage.name, "dtype"),
                "ZeRO-3 would train and store the adapters in bfloat16 too; launch it with "
                "accelerate_configs/fsdp2.yaml or zero2.yaml, or remove this key",
            )
        unsupported = UNSUPPORTED_IF_SHARDED if is_trl else UNSUPPORTED_IF_SHARDED_ONLINE
        for key, what in unsupported.items():
            if getattr(config, key) not in (None, "adamw"):
                errors.add(
                    (stage.name, key),
                    f"this launch uses {kind}, with which {what} are not supported; launch it "
                    "with accelerate_configs/multi_gpu.yaml, or remove this key",
                )


CHECKS = (
    check_hub_models,
    check_gguf_files,
    check_revisions,
    check_target_modules,
    check_quantization,
    check_stored_types,
    check_sharding,
    check_chat_templates,
    check_added_tokens,
    check_packages,
    check_gpus,
    check_trackers,
    check_environments,
    check_reward_functions,
    check_servers,
    check_row_files,
)
"""The checks of what the stages declare. A new one is added here."""


def check_before_training(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Make the checks of a run that run code of the recipe, or import a training library."""
    reward_checks.import_functions(errors, pending)
    check_trainer_arguments(errors, pending)
    finished = (folder for stage in pending for folder in stage.inputs.values())
    for folder in dict.fromkeys(finished):
        if isinstance(folder, Path) and (folder / artifacts.FILE).is_file():
            if data_tables.table_names(folder):
                tables = finished_tables(folder)
                reward_checks.call_functions(errors, folder, tables, pending)


def check_prepared(errors: ErrorCollector, folder: Path, stages: Sequence[PlannedStage]) -> None:
    """Check that prepared data fit the stages that read them, and call their functions."""
    check_tables(errors, folder, stages)
    reward_checks.call_functions(errors, folder, finished_tables(folder), stages)


def check_code(errors: ErrorCollector, stages: Sequence[PlannedStage]) -> None:
    """Import the functions that score completions, and build the configurations of TRL."""
    reward_checks.import_functions(errors, stages)
    check_unusual_trainers(errors, stages)


def check_unusual_trainers(errors: ErrorCollector, stages: Sequence[PlannedStage]) -> None:
    """Build the TRL configurations of stages whose fields only TRL can check together.

    Importing TRL takes seconds, which ``align check`` spends only on such a stage.
    """
    unusual = [
        stage
        for stage in stages
        if stage.config.trl_arguments().keys() - trl_fields.PLAIN - {"beta"}
    ]
    check_trainer_arguments(errors, unusual)


def check_trainer_arguments(errors: ErrorCollector, pending: Sequence[PlannedStage]) -> None:
    """Build the TRL configurations of all pending stages, so that TRL checks them now."""
    trained = [stage for stage in pending if stage.config.trainer_config]
    if not trained:
        return  # importing TRL takes seconds
    from align.training import trl_trainer

    for stage in trained:
        trl_class = trl_trainer.config_class(str(stage.config.trainer_config))
        arguments = stage.config.trl_arguments()
        package = stage.config.required_packages.get("trainer.optim")
        if arguments.get("optim") in UNSUPPORTED or packages.is_missing(package):
            # This error is reported elsewhere; the others are found with another optimizer.
            of_optimizer = ("optim", "optim_args", "optim_target_modules")
            arguments = {key: arguments[key] for key in arguments if key not in of_optimizer}
        seed = getattr(stage.config, "seed", 0)
        try:
            trl_trainer.trl_arguments(trl_class, stage.folder, seed=seed, trainer=arguments)
        except UserError as error:
            errors.add((stage.name, "trainer"), *error.lines)

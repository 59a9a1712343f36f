"""Every field of TRL under ``trainer`` has an effect, or is refused.

A field is set to another value, in a context in which it matters. Then the recipe is refused, or
the trained weights, the log, the held-out losses or the checkpoints differ from those without it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import transformers
from helpers import tiny_models

from align.config import trl_fields
from align.config.data import Prepare
from align.config.training import DPO, KTO, SFT, Reward
from align.config.training_base import TRLStage
from align.errors import UserError
from align.models.tokenization import CHATML
from align.stages import dpo, kto, prepare, reward, sft
from align.training import optimizer_check, trl_trainer

STAGES: dict[str, tuple[ModuleType, type[TRLStage], str]] = {
    "SFTConfig": (sft, SFT, "demonstrations"),
    "DPOConfig": (dpo, DPO, "pairs"),
    "KTOConfig": (kto, KTO, "preferences"),
    "RewardConfig": (reward, Reward, "pairs"),
}
BASE = tiny_models.TRAINER | {"max_steps": 3, "lr_scheduler_type": "linear"}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
BEST = EVALUATES | SAVES | {"load_best_model_at_end": True, "learning_rate": 0.3}

# The value of a field, and the context in which it has an effect. In another class than the first,
# a value may be refused.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam_beta1": (0.5, {}),
    "adam_beta2": (0.5, {}),
    "adam_epsilon": (0.1, {}),
    "bf16": (True, {}),
    "center_rewards_coefficient": (0.5, {}),
    "completion_only_loss": (False, {}),
    "dataloader_drop_last": (True, {"per_device_train_batch_size": 32}),
    "discopop_tau": (0.5, {"loss_type": "discopop"}),
    "eos_token": ("<|endoftext|>", {}),
    "eval_delay": (2, EVALUATES),
    "eval_on_start": (True, {}),
    "eval_packing": (False, EVALUATES | {"packing": True, "max_length": 128}),
    "eval_steps": (2, EVALUATES),
    "eval_strategy": ("steps", {"logging_steps": 1}),
    "f_alpha_divergence_coef": (0.2, {"f_divergence_type": "alpha_divergence"}),
    "f_divergence_type": ("js_divergence", {}),
    "gradient_accumulation_steps": (2, {}),
    "greater_is_better": (True, BEST | {"metric_for_best_model": "eval_loss"}),
    "include_num_input_tokens_seen": ("all", {}),
    "label_smoothing": (0.2, {"loss_type": "robust"}),
    "label_smoothing_factor": (0.2, {}),
    "ld_alpha": (0.5, {}),
    "learning_rate": (1e-3, {}),
    "load_best_model_at_end": (
        True,
        EVALUATES | SAVES | {"metric_for_best_model": "eval_loss", "greater_is_better": True},
    ),
    "logging_first_step": (True, {"logging_steps": 2}),
    "logging_steps": (2, {}),
    "logging_strategy": ("epoch", {}),
    "loss_weights": ([3.0], {}),
    "lr_scheduler_kwargs": ({"num_cycles": 3}, {"lr_scheduler_type": "cosine"}),
    "lr_scheduler_type": ("cosine", {}),
    "max_grad_norm": (1e-4, {"optim": "sgd"}),
    "max_length": (70, {}),
    "max_steps": (2, {}),
    "metric_for_best_model": ("eval_num_tokens", BEST | {"greater_is_better": False}),
    "neftune_noise_alpha": (20.0, {}),
    "num_train_epochs": (2, {"max_steps": -1, "per_device_train_batch_size": 64}),
    "optim": ("sgd", {}),
    "optim_args": ("momentum=0.5", {"optim": "sgd"}),
    "packing": (True, {"max_length": 64}),
    "packing_strategy": ("wrapped", {"packing": True, "max_length": 64}),
    "per_device_train_batch_size": (4, {}),
    "ref_model_mixup_alpha": (0.1, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "ref_model_sync_steps": (2, {"sync_ref_model": True}),
    "save_steps": (2, SAVES | {"save_total_limit": 3}),
    "save_strategy": ("epoch", SAVES),
    "save_total_limit": (3, SAVES),
    "shuffle_dataset": (True, {"train_sampling_strategy": "sequential"}),
    "skip_memory_metrics": (False, {}),
    "sync_ref_model": (True, {"ref_model_sync_steps": 1}),
    "train_sampling_strategy": ("group_by_length", {}),
    "truncation_mode": ("keep_end", {"max_length": 70}),
    "use_weighting": (True, {}),
    "warmup_steps": (2, {}),
    "weight_decay": (0.5, {}),
}
LOSSES = {"SFTConfig": "dft", "DPOConfig": "ipo", "KTOConfig": "apo_zero_unpaired"}

NOT_HERE = {
    "speed or memory": """
        activation_checkpointing activation_checkpointing_kwargs dataloader_in_order
        dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
        dataloader_pin_memory dataloader_prefetch_factor dataset_num_proc eval_accumulation_steps
        full_determinism gradient_checkpointing gradient_checkpointing_kwargs liger_kernel_config
        optim_target_modules pad_to_multiple_of pad_token per_device_eval_batch_size
        precompute_ref_batch_size remove_unused_columns tf32 torch_compile torch_compile_backend
        torch_compile_mode torch_empty_cache_steps use_liger_kernel
    """,
    "several processes": """
        accelerator_config average_tokens_across_devices ddp_broadcast_buffers ddp_bucket_cap_mb
        ddp_find_unused_parameters ddp_static_graph ddp_timeout
    """,
    "a tracker or the log of transformers": """
        log_level log_level_replica project report_to run_name trackio_bucket_id trackio_space_id
        trackio_static_space_id
    """,
    "models with dropout, or with experts": "disable_dropout router_aux_loss_coef",
}
"""Fields without an effect on a tiny dense model on one CPU, and on what they have one."""
ELSEWHERE = {field for fields in NOT_HERE.values() for field in fields.split()}


def fields(config: str) -> list[str]:
    """The fields that a recipe may set."""
    return [n for n in trl_fields.trl_fields(config) if not trl_fields.reserved(config, n)]


ALL = [(config, name) for config in STAGES for name in fields(config)]
COMMON = set.intersection(*(set(trl_fields.trl_fields(config)) for config in STAGES))
DIFFERENT = {"dataloader_drop_last", "gradient_accumulation_steps", "label_smoothing_factor"}
DIFFERENT |= {"eval_strategy", "max_length", "neftune_noise_alpha"}
"""Fields that all classes have, and whose code differs between their trainers."""
EVERYWHERE = "ALIGN_ALL_FIELDS" in os.environ
"""Whether fields that all classes share are tested in all stages: four minutes in place of one."""
TRAINED = [
    (config, name)
    for config, name in ALL
    if name not in ELSEWHERE
    and (EVERYWHERE or config == "SFTConfig" or name not in COMMON - DIFFERENT)
]


def test_every_field_has_a_place_in_the_tables() -> None:
    names = {name for _, name in ALL}
    tested = CHANGES.keys() | {"chat_template_path", "fp16", "loss_type", "activation_offloading"}
    assert names - ELSEWHERE - tested == set()
    assert (ELSEWHERE | tested) - names == set()
    assert not ELSEWHERE & tested


@pytest.mark.parametrize("config", STAGES)
def test_reserved_fields_are_refused(config: str) -> None:
    refused = set(trl_fields.trl_fields(config)) - set(fields(config))
    assert refused
    for name in refused:
        assert "cannot be set" in next(trl_fields.check(config, name, None, None))[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny_models.World:
    return tiny_models.world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def run(world: tiny_models.World) -> Callable[[str, str], str]:
    """The fingerprint of a stage with fields as JSON, or its error."""
    data = world.folder / "with-validation"
    settings = Prepare(source="embedded", max_rows=60, test_fraction=0.0, validation_fraction=0.2)
    tiny_models.stage(prepare, settings, {}, data)

    @functools.cache
    def call(config: str, fields: str) -> str:
        module, stage_class, role = STAGES[config]
        trainer = BASE | json.loads(fields)
        stage = stage_class(model="sft", trainer=trainer, max_lost_rows=1.0)
        problems = [m for f, v in trainer.items() for _, m in trl_fields.check(config, f, v, None)]
        problems += [problem.message for problem in stage.problems({})]
        if problems:
            return f"refused: {problems}"
        folder = world.folder / hashlib.sha256(f"{config}{fields}".encode()).hexdigest()[:16]
        tiny_models.distributed.reset_process_state(0)
        try:
            built = module.build(stage, {"model": world.sft, role: data}, folder)
            trl_trainer.train(built, folder, tiny_models.logger("x", folder))
        except UserError as error:
            return f"refused: {error}"
        digest = hashlib.sha256()
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(file.read_bytes())
        log = [
            {k: v for k, v in entry.items() if not k.endswith(("runtime", "second", "flos"))}
            for entry in built.state.log_history
        ]
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
        special = json.loads((folder / "tokenizer_config.json").read_text()).get("eos_token")
        return f"{digest.hexdigest()} {json.dumps(log)} {checkpoints} {special}"

    return call


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated in `SFTTrainer`:FutureWarning")
@pytest.mark.parametrize(("config", "name"), TRAINED)
def test_a_field_changes_the_result_or_is_refused(
    config: str, name: str, run: Callable[[str, str], str], tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("assistant", "helper"), encoding="utf-8")
    value, context = {
        "activation_offloading": (True, {}),
        "chat_template_path": (str(template), {}),
        "fp16": (True, {}),
        "loss_type": (LOSSES.get(config), {}),
        **CHANGES,
    }[name]
    with_field, without = context | {name: value}, {k: v for k, v in context.items() if k != name}
    known = trl_fields.trl_fields(config)
    with_field = {k: v for k, v in with_field.items() if k in known or k == name}
    without = {k: v for k, v in without.items() if k in known}
    changed = run(config, json.dumps(with_field))
    if not changed.startswith("refused"):
        assert changed != run(config, json.dumps(without))


@pytest.mark.parametrize(("stage_class", "refused"), [(SFT, False), (DPO, True), (Reward, True)])
def test_pairs_cannot_be_grouped_by_length(stage_class: Any, refused: bool) -> None:
    stage = stage_class(model="m", trainer={"train_sampling_strategy": "group_by_length"})
    assert bool(list(stage.problems({}))) is refused


def test_a_field_that_needs_another_is_refused_alone() -> None:
    assert list(SFT(model="m", trainer={"packing_strategy": "wrapped"}).problems({}))


def optimizer_settings(optimizer: str, **fields: Any) -> str:
    """What transformers passes to an optimizer, as text; its error if a package is missing."""
    values = {"learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-8}
    args = SimpleNamespace(**(values | {"optim": optimizer, "optim_args": None} | fields))
    model = SimpleNamespace(named_parameters=list, parameters=list)
    try:
        chosen = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    except ImportError as error:
        pytest.skip(f"its package is missing: {error}")
    return str(chosen)


INSTALLED = [
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_32bit"),
    *("ademamix", "ademamix_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit"),
]
ARGUMENTS = "momentum=0.5, lr_decay=0.5, beta3=0.5, alpha=0.5"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", INSTALLED)
@pytest.mark.parametrize(
    ("field", "value"),
    [("adam_beta1", 0.5), ("adam_beta2", 0.5), ("adam_epsilon", 0.1), ("optim_args", ARGUMENTS)],
)
def test_a_field_is_refused_exactly_if_transformers_does_not_pass_it_on(
    optimizer: str, field: str, value: Any
) -> None:
    fields = {field: value}
    is_passed = optimizer_settings(optimizer, **fields) != optimizer_settings(optimizer)
    problems = SFT(model="m", trainer={"optim": optimizer, **fields}).problems({})
    assert [problem.keys for problem in problems] == ([] if is_passed else [("trainer", field)])


def test_a_compiled_model_cannot_share_prefixes() -> None:
    trainer = {"torch_compile_backend": "eager"}
    (problem,) = DPO(model="m", trainer=trainer).problems({})
    assert problem.keys == ("trainer", "torch_compile_backend")
    assert not list(DPO(model="m", trainer=trainer, prefix_sharing=False).problems({}))


def test_modules_are_read_by_low_rank_optimizers_only() -> None:
    for optimizer, n_problems in (("adamw_torch", 1), ("galore_adamw", 0), ("apollo_adamw", 0)):
        trainer = {"optim": optimizer, "optim_target_modules": "all-linear"}
        assert len(list(SFT(model="m", trainer=trainer).problems({}))) == n_problems


@pytest.mark.parametrize(
    ("name", "missing"),
    [("galore_adamw", "galore_torch is not installed: pip install galore-torch"),
     ("lomo", "lomo_optim is not installed: pip install lomo-optim")],
)  # fmt: skip
def test_an_optimizer_without_its_package_is_refused_before_training(name: str, missing: str):
    problems = optimizer_check.optimizer_problems(SimpleNamespace(optim=name, learning_rate=1e-3))
    assert next(problems) == f"trainer.optim: {missing}"


def test_an_optimizer_that_no_supported_version_of_python_has_is_refused() -> None:
    (problem,) = SFT(model="m", trainer={"optim": "adamw_anyprecision"}).problems({})
    assert problem.keys == ("trainer", "optim")
    assert (
        "needs torchdistx, whose last release is for torch 1.12 and Python 3.10" in problem.message
    )


def test_the_last_checkpoints_are_kept_when_the_clock_jumps_back(
    world: tiny_models.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_complete = trl_trainer.checkpoints.mark_complete

    def mark_before(folder: Path, **arguments: Any) -> None:
        """Mark a checkpoint as if the clock had been set back by an hour after each step."""
        mark_complete(folder, **arguments)
        step = trl_trainer.checkpoints.step_of(folder)
        os.utime(folder, (2e9 - 3600 * step, 2e9 - 3600 * step))

    monkeypatch.setattr(trl_trainer.checkpoints, "mark_complete", mark_before)
    trainer = tiny_models.TRAINER | SAVES | {"max_steps": 5}
    config = SFT(model="sft", trainer=trainer)
    inputs = {"model": world.sft, "demonstrations": world.data}
    tiny_models.stage(sft, config, inputs, tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_that_a_killed_run_was_writing_does_not_replace_a_complete_one(
    world: tiny_models.World, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    trainer = tiny_models.TRAINER | SAVES | {"save_total_limit": 1, "max_steps": 3}
    inputs = {"model": world.sft, "demonstrations": world.data}
    tiny_models.stage(sft, SFT(model="sft", trainer=trainer), inputs, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]

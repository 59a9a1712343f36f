"""Online RL on a language model: generate, score, compute experience, build a rollout, update.

The update is :func:`align.rl.update.update`, the same that solves CartPole. Several processes share
each batch, and gradients are averaged once per optimizer step. All seeds are derived from the step
number, so a checkpoint holds weights, optimizer, KL coefficient and the stop rule's comparisons
only, and a resumed run equals an uninterrupted one bit for bit.

Left out: models over several devices of one process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from accelerate import PartialState

from align.config.online_rl import OnlineRL
from align.data import tables
from align.data.rows import Row
from align.errors import UserError
from align.functional.policy_gradient import adaptive_kl_coef
from align.models import logps
from align.models.finite_weights import is_finite
from align.models.tokenizer_files import GENERATION_CONFIG
from align.online_rl import checkpoint, held_out, plots, samples, sharding
from align.online_rl.build import build_models
from align.online_rl.completions import Completions
from align.online_rl.draws import Draw, held_out_draw, training_draw
from align.online_rl.episodes import build_player
from align.online_rl.experience import Experience, compute_experience, evaluators, make_rollout
from align.online_rl.groups import Batch, draw_batch
from align.online_rl.metrics import compute_metrics
from align.online_rl.models import POLICY
from align.online_rl.optimization import (
    LEARNING_RATES,
    build_objective,
    build_optimizer,
    clip_gradients,
    divide_by_tokens,
    divide_rows,
    set_learning_rates,
)
from align.online_rl.prompts import Prompts, prompt_indices, tokenize
from align.online_rl.results import reward_parts, rewards_of
from align.online_rl.sampler_agreement import compare, ratio_metrics
from align.online_rl.sampling import build_sampler, sample_ahead
from align.online_rl.scoring import Scores, build_scorer, load_functions
from align.online_rl.stopping import build_stop_rule
from align.rl.rollout import Rollout
from align.rl.update import Diagnostics, update
from align.runtime import artifacts, checkpoints, distributed, signals, stopped_batch
from align.runtime.progress import Logger, truncate_jsonl
from align.runtime.seeds import derive_seed, generator
from align.runtime.tracking import reporting

SHOWN = ("score", "kl", "entropy")
"""Metrics on the progress line, before those of the rewards if there are several."""
HELD_OUT = ("score", "reward", "gold", "kl", "tokens", "missing_eos", "turns", "ended")
"""Metrics of the held-out evaluation, beside those of the rewards."""


class OnlineRLTrainer:
    """A run: models, prompts, sampler, scorer and optimizer, and the state between two steps.

    Raises:
        UserError: An input is missing, or the configuration does not fit the launch or the models.
    """

    def __init__(
        self, config: OnlineRL, inputs: Mapping[str, Path | str], output_dir: Path, logger: Logger
    ) -> None:
        for problem in config.batch_size_problems(distributed.world_size()):
            raise UserError(f"{problem.keys[0]}: {problem.message}")
        functions = load_functions(config)
        rows = tables.read(Path(inputs["prompts"]), "prompts", "train")
        held_out_rows = _read_held_out(config, Path(inputs["prompts"]))
        evaluated = held_out_rows[: config.n_eval_prompts]
        reward_sources = [
            inputs[f"rewards.{k}"]
            for k, name in enumerate(config.reward_names)
            if name not in functions
        ]
        self.config, self.output_dir, self.logger = config, output_dir, logger
        self.models = build_models(
            config, inputs["model"], reward_sources, device=PartialState().device
        )
        # The sampler replaces the policy's generation config; the original one is saved in the end.
        self.generation_config = self.models.policy.model.generation_config
        self.sampler = build_sampler(config, self.models)
        self.player = build_player(config, self.sampler, self.models)
        self.scorer = build_scorer(config, self.models, functions)
        self.prompts = tokenize(rows, self.models, config)
        self.ahead = sample_ahead(config, self.sampler, self.prompts_of)
        self.held_out = tokenize(evaluated, self.models, config)
        self.stop_rule = build_stop_rule(
            config,
            inputs,
            held_out_rows,
            partial(tokenize, models=self.models, config=config),
            self.models,
            self.sampler,
            runs=output_dir.parent,
        )
        sharding.divide(self.models, logger.info)
        self.optimizer = build_optimizer(config, self.models)
        self.kl_coef = config.kl_coef
        """Coefficient of the KL penalty in the next step."""
        self.metrics: dict[str, float] = {}
        """Metrics of the last step; after the run, of the policy that is saved."""
        self.held_out_metrics: dict[str, float] = {}
        """Metrics of the last held-out evaluation; after the run, of the policy that is saved."""
        self.done = 0
        """Updates so far."""

    def train(self) -> None:
        """Run all steps, from the last checkpoint if there is one, or until the stop rule stops.

        Raises:
            Interrupted: A signal arrived; a checkpoint of the finished steps has been written.
        """
        config = self.config
        save_steps = config.save_steps or max(1, config.steps // 10)
        first = self.resume()
        trackers = reporting(
            config.report_to, self.logger, self.output_dir, settings=config.model_dump(), done=first
        )
        with signals.deferred() as stop, logps.small_vocabulary_tiles(), trackers:
            self.check_sampler()
            if first == 0:
                with sharding.gathered(self.models):
                    self.evaluate(0)
            for step in range(first, config.steps):
                self.step(step)
                self.done = done = step + 1
                is_last = done == config.steps
                if config.eval_steps and (done % config.eval_steps == 0 or is_last):
                    with sharding.gathered(self.models):
                        self.evaluate(done)
                    is_last = is_last or (self.stop_rule is not None and self.stop_rule.stops)
                stopping = distributed.any_rank(stop.requested) and not is_last
                if stopping or is_last or done % save_steps == 0:
                    self.check_weights(done)
                if stopping or (done % save_steps == 0 and not is_last):
                    checkpoint.save(
                        self.output_dir,
                        done,
                        self.models,
                        self.optimizer,
                        self.kl_coef,
                        self.stop_rule,
                    )
                if stopping:
                    raise signals.Interrupted
                if is_last:
                    break
        if self.stop_rule is not None:
            self.stop_rule.restore_best()
            self.metrics = dict(self.stop_rule.best_training)
            self.held_out_metrics = dict(self.stop_rule.best_held_out)

    def check_sampler(self) -> None:
        """Check that sampler and update compute the same log-probabilities.

        Raises:
            UserError: They differ by more than rounding.
        """
        self.set_train_mode(False)
        seed = self.seed("agreement", 0)
        with sharding.gathered(self.models):
            agreement = compare(
                self.config, self.models, self.sampler, self.prompts.tokens, seed=seed
            )
        agreement.check(self.config)
        self.logger.info(agreement.describe())

    def check_weights(self, done: int) -> None:
        """Check trained weights before they are saved; gradients are checked in each update.

        Raises:
            UserError: A weight is not finite.
        """
        weights = self.models.weights().items()
        for model, key in LEARNING_RATES.items():
            own = [sharding.own_part(p) for name, p in weights if name.startswith(f"{model}.")]
            if distributed.any_rank(not all(map(is_finite, own))):
                raise UserError(
                    f"a weight of the {model} is not finite after {done} steps and was not saved: "
                    f"lower `{key}`"
                )

    def step(self, step: int) -> None:
        """One training step; ``step`` counts from 0."""
        config = self.config
        started = time.monotonic()
        self.set_train_mode(False)

        with sharding.gathered(self.models):
            # 1. Generate a completion, or play an episode, for every prompt. 2. Score them.
            batch, group_metrics = draw_batch(partial(self.draw, step), config, self.models.device)
            completions, scores = batch.completions, self.scorer.for_training(batch.scores)
            # 3. Compute log-probabilities under policy and reference, and values.
            experience = self.experience(completions)
        # 4. Turn scores and KL into token rewards, and those into advantages.
        rollout = make_rollout(experience, scores.score, config, kl_coef=self.kl_coef)
        scored = time.monotonic()
        # 5. Update policy and critic.
        with samples.saved_if_not_finite(self.output_dir, step, batch, rollout):
            diagnostics = self.update(step, rollout)

        metrics = compute_metrics(completions, experience, scores, diagnostics)
        metrics |= ratio_metrics(experience, cap=config.importance_cap)
        if self.ahead is not None:
            metrics["sampler/staleness"] = float(self.ahead.staleness)
        metrics |= group_metrics | {
            "kl_coef": self.kl_coef,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": time.monotonic() - started,
            "seconds_sampling": batch.sampling_seconds,
            "seconds_scoring": scored - started - batch.sampling_seconds,
        }
        self.adapt_kl_coef(metrics["kl"])
        self.log_step(step, metrics, batch.rows, scores)

    def draw(self, step: int, number: int = 0, groups: int | None = None) -> Batch:
        """Sample and score the completions of some prompts of a step.

        Draw ``number`` has the prompts that the run would visit if it were that many times longer.
        """
        config = self.config
        started = time.monotonic()
        visited = prompt_indices(step + number * config.steps, len(self.prompts), config)
        end = None if groups is None else groups * config.n_completions
        prompts = self.prompts.select(visited[:end])
        if number == 0 and self.ahead is not None:
            completions, rows = self.ahead.take(step), prompts.rows
        else:
            completions, rows = self.sample(prompts, training_draw(config, step, number, end))
        sampled = time.monotonic()
        with self.models.mixed_precision():
            scores = self.scorer.score(completions, rows)
        return Batch(list(rows), completions, scores, sampled - started)

    def prompts_of(self, step: int) -> Sequence[Sequence[int]]:
        """Tokens of the prompts of a step, for this process."""
        return self.prompts.select(prompt_indices(step, len(self.prompts), self.config)).tokens

    def sample(self, prompts: Prompts, draw: Draw) -> tuple[Completions, Sequence[Row]]:
        """Completions of prompts, or episodes, and the rows that the rewards read."""
        with self.models.mixed_precision():
            if self.player is None:
                return self.sampler.generate(prompts.tokens, seeds=draw.seeds), prompts.rows
            played = self.player.play(prompts.rows, draw)
            return played.completions, played.rows

    def experience(self, completions: Completions) -> Experience:
        """Log-probabilities and values of completions, in forward passes of the recipe's size."""
        config = self.config
        divide = None if config.tokens_per_batch is None else partial(divide_rows, config=config)
        return compute_experience(
            self.models, completions, batch_size=config.micro_batch_size, divide=divide
        )

    def update(self, step: int, rollout: Rollout) -> Diagnostics:
        """Update policy and critic; during the critic's warm-up, the critic only."""
        config = self.config
        set_learning_rates(self.optimizer, config, step)
        divide = (
            None if config.tokens_per_batch is None else partial(divide_by_tokens, config=config)
        )
        self.set_train_mode(True)
        return update(
            evaluators(self.models, frozen_policy=step < config.steps_without_policy),
            rollout,
            build_objective(config, len(rollout), kl_coef=self.kl_coef),
            self.optimizer,
            generator=generator(config.seed, "shuffle", step, distributed.rank()),
            divide=divide,
            clip_gradients=partial(clip_gradients, self.optimizer),
        )

    def seed(self, purpose: str, step: int) -> int:
        """The seed of a purpose in a step; it differs between ranks."""
        return derive_seed(self.config.seed, purpose, step, distributed.rank())

    def set_train_mode(self, train: bool) -> None:
        """Recompute activations in training only; generation needs its cache.

        Without gradient checkpointing, the modes do not differ: dropout is off in both.
        """
        if self.config.gradient_checkpointing:
            for model in self.models.models():
                model.train(train)

    def adapt_kl_coef(self, kl: float) -> None:
        """Adapt the KL coefficient of the next step, if the recipe has a target."""
        config = self.config
        if config.kl_target is not None:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef,
                kl,
                target=config.kl_target,
                horizon=config.kl_horizon,
                n=config.batch_size,
            )

    def log_step(
        self, step: int, metrics: dict[str, float], rows: Sequence[Row], scores: Scores
    ) -> None:
        """Log the metrics of a step, and the samples of about 20 steps of the run."""
        done, steps = step + 1, self.config.steps
        self.metrics = metrics
        if self.stop_rule is not None:
            self.stop_rule.add_batch(step, metrics)
        self.logger.log(done, metrics)
        parts = reward_parts(rewards_of(metrics))
        self.logger.step(done, steps, {k: metrics[k] for k in SHOWN} | parts)
        if distributed.is_main() and samples.is_sampled(done, steps):
            samples.append(self.output_dir, done, rows, scores)

    def evaluate(self, done: int) -> None:
        """Sample and score held-out prompts after ``done`` steps, always with the same seed."""
        if not len(self.held_out):
            return
        self.set_train_mode(False)
        completions, rows = self.sample(
            self.held_out.shard(), held_out_draw(self.config, len(self.held_out))
        )
        with self.models.mixed_precision():
            scores = self.scorer.score(completions, rows)
        experience = self.experience(completions)
        metrics = compute_metrics(completions, experience, scores)
        shown = [key for key in metrics if key in HELD_OUT or key.startswith("rewards/")]
        self.held_out_metrics = {f"eval_{key}": metrics[key] for key in shown}
        checked: dict[str, float] = {}
        if self.stop_rule is not None:
            checked = self.stop_rule.check(
                done, training=self.metrics, held_out=self.held_out_metrics
            )
        self.logger.log(done, self.held_out_metrics | checked)
        own = held_out.measurements(scores, experience)
        held_out.append(self.output_dir, done, own, len(self.held_out))

    def resume(self) -> int:
        """Restore the last complete checkpoint; returns the number of steps done, 0 without one."""
        stopped_batch.remove(self.output_dir)
        last = checkpoints.last_checkpoint(self.output_dir, world_size=distributed.world_size())
        done = 0
        if last is not None:
            done, self.kl_coef = checkpoint.load(last, self.models, self.optimizer, self.stop_rule)
            self.logger.info(f"resuming from step {done}: {last}")
        # Without a checkpoint, the evaluation before step 1 is repeated as well, hence -1.
        logged = -1 if last is None else done
        self.logger.rewind(logged)
        if distributed.is_main():
            for file in (samples.FILE, held_out.FILE):
                truncate_jsonl(self.output_dir / file, logged)
        return done

    def save_policy(self) -> None:
        """Write the policy, its tokenizer and the picture. The main process writes."""
        models = self.models
        models.policy.model.generation_config = self.generation_config
        with sharding.gathered(models):
            if distributed.is_main():
                models.savable.save_pretrained(
                    str(self.output_dir),
                    state_dict=sharding.named_weights(models.savable),
                    **({"selected_adapters": [POLICY]} if self.config.lora else {}),
                )
        if distributed.is_main():
            models.tokenizer.save_pretrained(str(self.output_dir))
            if self.config.lora:  # peft does not write the end tokens
                self.generation_config.to_json_file(self.output_dir / GENERATION_CONFIG)
            (self.output_dir / "README.md").unlink(missing_ok=True)  # peft's template
            artifacts.make_readable(self.output_dir)
            plots.draw(self.output_dir)
        distributed.barrier()


def _read_held_out(config: OnlineRL, data: Path) -> list[Row]:
    """All rows of the held-out prompts; none if the recipe does not evaluate."""
    if not config.eval_steps:
        return []
    rows = tables.read(data, "prompts", config.eval_split)
    if 0 < min(len(rows), config.n_eval_prompts) < distributed.world_size():
        raise UserError(
            f"eval_steps: the {config.eval_split} split has {len(rows)} prompts, fewer than the "
            f"{distributed.world_size()} processes; remove `eval_steps`, or prepare more prompts"
        )
    return rows

"""The time of an online-RL stage: sampling, scoring, log-probabilities and updates.

The trainer is that of the stage. Completions are random tokens of the expected length, so that the
time of everything but sampling does not depend on what an untrained policy samples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.online_rl import OnlineRL
from align.config.online_rl_keys import GroupKeys
from align.config.online_rl_stages import Reinforce
from align.models.logps import small_vocabulary_tiles
from align.online_rl import checkpoint
from align.online_rl.completions import Completions
from align.online_rl.experience import compute_experience, make_rollout
from align.online_rl.optimization import divide_rows
from align.online_rl.prompts import prompt_indices
from align.online_rl.sampling import LocalSampler
from align.online_rl.trainer import OnlineRLTrainer
from align.pipeline.probe.data import SampledData
from align.pipeline.probe.inference import described, expected_lengths, set_length
from align.pipeline.probe.sampling import Lengths, SamplingSpeed, measure_sampling
from align.pipeline.probe.timing import (
    LONGEST_FORWARD,
    Seconds,
    StageTime,
    Stopwatch,
    computed_tokens,
)
from align.runtime.progress import Logger, NullDisplay


def measure(
    config: OnlineRL,
    inputs: Mapping[str, Path | str],
    data: SampledData,
    output_dir: Path,
    watch: Stopwatch,
) -> StageTime:
    """Measure a stage; its policy is written to ``output_dir``, where later stages find it.

    Episodes of an environment are not measured: their number of turns depends on the policy.
    """
    if config.environment is not None:
        return StageTime(known=False, remark="the number of turns in its episodes is not known")
    logger = Logger("probe", output_dir, NullDisplay(), main=True)
    load, trainer = watch.result(lambda: OnlineRLTrainer(config, inputs, output_dir, logger))
    lengths = expected_lengths(trainer.models.tokenizer, data, config.max_new_tokens)
    probe = _OnlineRLProbe(config, trainer, lengths, watch)
    parts = {"load": Seconds.exactly(load)}
    per_step: dict[str, Seconds] = {}
    remarks = ["without the judge of `stop`"] if config.stop else []
    with small_vocabulary_tiles():
        if config.sampler == "transformers":
            speed = probe.sampling_speed()
            per_step["sample"] = speed.seconds(config.batch_size, lengths)
            if isinstance(config, GroupKeys) and config.filter is not None:
                remarks.append(
                    f"`filter` may multiply the time of sampling, by {config.max_draws} at most"
                )
        else:
            remarks.append("without sampling, which vLLM does")
        seconds, tokens = probe.seconds_of_forward()
        per_step["score"] = probe.scaled(seconds, tokens, 1)
        rest = probe.seconds_of_update()
        per_step["update"] = probe.scaled(
            rest.seconds, rest.tokens, config.epochs
        ) + Seconds.exactly(rest.optimizer * config.epochs * config.minibatches)
    parts |= {name: seconds * config.steps for name, seconds in per_step.items()}
    if config.eval_steps:
        held_out = min(config.n_eval_prompts, data.count("prompts", config.eval_split))
        evaluations = 1 + config.evaluations  # before the first step too
        share = evaluations * held_out / config.batch_size
        sampled = per_step.get("sample", Seconds())
        parts["evaluate"] = (sampled + per_step["score"]) * share
        if config.stop:  # a completion of the policy and one of the best policy for each prompt
            pairs = config.evaluations * config.n_eval_prompts
            parts["stop"] = sampled * (2 * pairs / config.batch_size)
    parts["save"] = _saving(config, trainer, output_dir, watch)
    return StageTime(parts, described(lengths), "; ".join(remarks))


def _saving(
    config: OnlineRL, trainer: OnlineRLTrainer, output_dir: Path, watch: Stopwatch
) -> Seconds:
    """Seconds of all checkpoints and of the trained policy."""
    one = watch.once(
        lambda: checkpoint.save(output_dir, 1, trainer.models, trainer.optimizer, config.kl_coef)
    )
    (output_dir / "metrics.jsonl").touch()  # the picture is drawn of it
    policy = watch.once(trainer.save_policy)
    n = (config.steps - 1) // (config.save_steps or max(1, config.steps // 10))
    return Seconds.exactly(policy + one * n)


def _without_groups(config: OnlineRL) -> OnlineRL:
    """Settings of which an update may have any number of completions, with the same passes."""
    if config.least_completions == 1:
        return config
    return Reinforce.model_construct(**{k: v for k, v in config if k in Reinforce.model_fields})


class _Update:
    """The seconds of an update: passes over some rows, and one optimizer step."""

    def __init__(self, seconds: float, tokens: int, optimizer: float) -> None:
        self.seconds, self.tokens, self.optimizer = seconds, tokens, optimizer


class _OnlineRLProbe:
    """A built trainer and what is measured of it."""

    def __init__(
        self, config: OnlineRL, trainer: OnlineRLTrainer, lengths: Lengths, watch: Stopwatch
    ) -> None:
        self.config, self.trainer, self.lengths, self.watch = config, trainer, lengths, watch
        self.indices = prompt_indices(0, len(trainer.prompts), config)
        if config.tokens_per_batch is not None:
            self.config = trainer.config = self._with_batches_of_rows(config)

    def _with_batches_of_rows(self, config: OnlineRL) -> OnlineRL:
        """The stage with as many rows per forward pass as ``tokens_per_batch`` fits on average."""
        rows = self._completions(config.batch_size // config.minibatches)[0].rows
        size = max(1, round(len(rows) / len(divide_rows(rows, config=config))))
        return config.model_copy(update={"tokens_per_batch": None, "micro_batch_size": size})

    def sampling_speed(self) -> SamplingSpeed:
        """The speed of the policy's sampler."""
        trainer, config = self.trainer, self.config
        prompts = [trainer.prompts.tokens[i] for i in self.indices]

        assert isinstance(trainer.sampler, LocalSampler)
        sampler = dataclasses.replace(trainer.sampler, stops=set())

        def generate(rows: Sequence[Sequence[int]], n_tokens: int) -> None:
            set_length(trainer.models.policy.model, n_tokens)
            with trainer.models.mixed_precision():
                sampler.generate(rows, seeds=range(len(rows)))

        trainer.set_train_mode(False)
        batch = min(config.sample_batch_size, config.batch_size)
        return measure_sampling(
            self.watch, generate, prompts, batch=batch, most=config.max_new_tokens
        )

    def seconds_of_forward(self) -> tuple[float, int]:
        """Seconds of scores and of log-probabilities of some completions, and their tokens."""

        def forward(size: int) -> float:
            completions, rows = self._completions(size)

            def call() -> None:
                with self.trainer.models.mixed_precision():
                    self.trainer.scorer.score(completions, rows)
                compute_experience(self.trainer.models, completions, batch_size=size)

            return self.watch.settled(call)

        size, seconds = self.watch.largest(forward, self._most(), longest=LONGEST_FORWARD)
        return seconds, self._tokens(self._completions(size)[0], size)

    def seconds_of_update(self) -> _Update:
        """Seconds of the passes over some completions, apart from the optimizer step."""
        trainer = self.trainer
        once: dict[str, Any] = {"epochs": 1, "minibatches": 1, "target_kl": None}

        def update(size: int) -> float:
            completions, _ = self._completions(size)
            trainer.config = _without_groups(self.config).model_copy(
                update=once | {"micro_batch_size": size}
            )
            experience = compute_experience(trainer.models, completions, batch_size=size)
            scores = torch.arange(size, dtype=torch.float32)
            rollout = make_rollout(experience, scores, trainer.config, kl_coef=0.0)
            step = self.config.steps_without_policy  # the first step that trains the policy
            return self.watch.settled(lambda: trainer.update(step, rollout))

        update(1)  # the first one allocates the optimizer's state
        size, seconds = self.watch.largest(update, self._most())
        optimizer = self.watch.settled(self._optimizer_step)
        trainer.config = self.config
        tokens = self._tokens(self._completions(size)[0], size)
        return _Update(max(0.0, seconds - optimizer), tokens, optimizer)

    def _optimizer_step(self) -> None:
        optimizer = self.trainer.optimizer
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
            torch.nn.utils.clip_grad_norm_(group["params"], self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def scaled(self, seconds: float, tokens: int, passes: int) -> Seconds:
        """Measured seconds for all completions of a step, of expected and of largest length."""
        size = self._most()
        return Seconds(
            *(
                passes * seconds * self._step_tokens(n_tokens, size) / tokens
                for n_tokens in (self.lengths.expected, self.lengths.most)
            )
        )

    def _step_tokens(self, n_tokens: float, size: int) -> int:
        completions, _ = self._completions(self.config.batch_size, n_tokens)
        return self._tokens(completions, size)

    def _tokens(self, completions: Completions, size: int) -> int:
        """Token positions that the backbone computes, ``size`` rows at a time."""
        rows = completions.rows
        return sum(
            computed_tokens(rows[k : k + size], shared=self.config.prefix_sharing)
            for k in range(0, len(rows), size)
        )

    def _most(self) -> int:
        config = self.config
        return min(config.micro_batch_size, config.batch_size // config.minibatches)

    def _completions(self, n: int, n_tokens: float | None = None) -> tuple[Completions, Any]:
        """Completions of the first prompts of a step, of the expected length, and their rows."""
        indices = list(itertools.islice(itertools.cycle(self.indices), n))
        prompts = self.trainer.prompts.select(indices)
        length = max(1, round(self.lengths.expected if n_tokens is None else n_tokens))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(len(self.trainer.models.tokenizer), (n, length), generator=generator)
        completions = Completions([list(p) for p in prompts.tokens], tokens.tolist(), [False] * n)
        return completions, prompts.rows

"""online_rl.trainer"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from align.config.ppo import PPO
from align.config.validation import FUNCTION
from align.data import tables
from align.data.rows import Row
from align.errors import UserError
from align.functional.masked import sum_over_ranks
from align.functional.policy_gradient import adaptive_kl_coef
from align.models import generation, tokenization
from align.online_rl import experience, plots
from align.online_rl.checkpoint import OPTIMIZER, STATE, TRAINABLE, without_shared_memory
from align.online_rl.experience import align_sampler_logps
from align.online_rl.metrics import chunks, lengths_in_sampling_order
from align.online_rl.models import POLICY, PPOModels, build_models
from align.rewards import gold
from align.rewards.functions import Score, call, load_function
from align.rewards.reward_model import RewardModel
from align.rl.update import Diagnostics, Objective, update
from align.runtime import artifacts, checkpoints, distributed
from align.runtime.progress import Logger, truncate_jsonl

ADAM_EPS = 1e-5


def build_trainer(
    config: PPO, inputs: Mapping[str, Path | str], folder: Path, logger: Logger
) -> PPOTrainer:
    """Everything that a step needs, before the first.

    Raises:
        UserError: What is missing or does not fit.
    """
    accelerator = Accelerator()
    if str(accelerator.distributed_type).rpartition(".")[2] in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise UserError(
            "PPO shares batches between processes and does not shard weights: launch it with "
            "accelerate_configs/multi_gpu.yaml, and save memory with `lora` and `quantization: nf4`"
        )
    world = distributed.world_size()
    per_step = config.batch_size // config.n_completions
    if per_step % world:
        raise UserError(
            f"batch_size: {config.batch_size}: {per_step} prompts are not shared by {world} processes evenly; "
            f"make it a multiple of {world * config.n_completions}"
        )
    data = Path(inputs["prompts"])
    functions = {name: load_function(name) for name in config.rewards if FUNCTION.match(name)}
    rows = tables.read(data, "prompts", "train")
    held_out = tables.read(data, "prompts", config.eval_split) if config.eval_steps else []
    held_out = held_out[: config.n_eval_prompts]
    if 0 < len(held_out) < world:
        raise UserError(
            f"eval_steps: {len(held_out)} held-out prompts for {world} processes; remove it"
        )
    device = accelerator.device
    scorers = [
        inputs[f"rewards.{k}"] for k, name in enumerate(config.rewards) if not FUNCTION.match(name)
    ]
    cast = build_models(
        inputs["model"],
        scorers=scorers,
        lora=config.lora_dict,
        dtype=config.dtype,
        quantization=config.quantization,
        revision=config.revision,
        critic=config.advantages == "gae",
        temperature=config.temperature,
        share=config.prefix_sharing,
        checkpointing=config.gradient_checkpointing,
        device=device,
        say=logger.info,
    )
    own_config = cast.policy.model.generation_config
    stops = generation.set_sampling(
        cast.policy.model,
        cast.tokenizer,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
    )
    groups = [{"params": cast.parameters(cast.policy), "base": config.learning_rate}]
    if cast.critic is not None:
        rate = config.critic_learning_rate or config.learning_rate
        groups.append({"params": cast.parameters(cast.critic), "base": rate})
    learner = PPOTrainer(
        config=config,
        folder=folder,
        logger=logger,
        device=device,
        cast=cast,
        functions=functions,
        rows=rows,
        prompts=prompt_tokens(cast, rows, config),
        held_out=held_out,
        held_out_prompts=prompt_tokens(cast, held_out, config),
        stops=stops,
        own_config=own_config,
        optimizer=torch.optim.AdamW(groups, lr=0.0, eps=ADAM_EPS, weight_decay=0.0),
        save_steps=config.save_steps or max(1, config.steps // 10),
        kl_coef=config.kl_coef,
        server=vllm_server(config, device),
    )
    learner.objective(config.batch_size // world)  # what does not divide is told now
    return learner


def vllm_server(config: PPO, device: Any) -> Any:
    if config.sampler == "transformers":
        return None
    from align.online_rl import vllm

    return vllm.VLLMServer(config.vllm_url, device)


def prompt_tokens(cast: PPOModels, rows: list[Row], config: PPO) -> list[list[int]]:
    """Tokens of the prompts. Those that leave no room for a completion are refused."""
    found = tokenization.tokenize_prompts(cast.tokenizer, [row["prompt"] for row in rows])
    limit = getattr(cast.policy.model.config, "max_position_embeddings", None)
    if limit is not None:
        long = sum(len(ids) + config.max_new_tokens > limit for ids in found)
        if long:
            raise UserError(
                f"{long:,} of {len(found):,} prompts and `max_new_tokens: {config.max_new_tokens}` are more than the "
                f"model's {limit} positions; lower it, or leave out such prompts in `prepare`"
            )
    return found


@dataclass(slots=True)
class PPOTrainer:
    """A run of PPO between two steps."""

    config: PPO
    folder: Path
    logger: Logger
    device: Any
    cast: PPOModels
    functions: dict[str, Score]
    rows: list[Row]
    prompts: list[list[int]]
    held_out: list[Row]
    held_out_prompts: list[list[int]]
    stops: set[int]
    own_config: Any
    optimizer: torch.optim.Optimizer
    save_steps: int
    kl_coef: float
    server: Any = None
    """What samples, where it is not the policy itself."""
    latest: dict[str, float] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    """Of the table that grows."""
    evaluated: dict[str, float] = field(default_factory=dict)

    # One step ------------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """Sample, score, learn, and tell."""
        started = time.monotonic()
        config = self.config
        chosen = self.drawn(step)
        said = self.sample([self.prompts[i] for i in chosen], "sample", step)
        sampled = time.monotonic()
        rows = [self.rows[i] for i in chosen]
        told = self.judge(said, rows)
        inputs = said.tensors(self.cast.tokenizer.pad_token_id, self.device)
        self.mode(train=False)
        spoken = experience.compute_experience(
            self.cast, inputs, batch_size=config.micro_batch_size
        )
        rollout = experience.make_rollout(
            spoken,
            told["score"].to(self.device),
            advantages=config.advantages,
            n_completions=config.n_completions,
            kl_coef=self.kl_coef,
            kl_estimator=config.kl_estimator,
            gamma=config.gamma,
            lam=config.gae_lambda,
            whiten_rewards=config.normalize_rewards,
            sampler_logps=align_sampler_logps(said, spoken),
            importance_cap=config.importance_cap,
        )
        scored = time.monotonic()
        warm_up = step < config.critic_warmup_steps
        self.set_rates(step)
        self.mode(train=True)
        diagnostics = update(
            experience.evaluators(self.cast, frozen_policy=warm_up),
            rollout,
            self.objective(len(rollout)),
            self.optimizer,
            generator=torch.Generator().manual_seed(
                experience.derive_seed(config.seed, "shuffle", step, distributed.rank())
            ),
            clip_gradients=self.clip,
        )
        figures = self.figures(said, spoken, told, diagnostics)
        figures |= {"kl_coef": self.kl_coef, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        ended = time.monotonic()
        figures |= {
            "seconds": ended - started,
            "seconds_sampling": sampled - started,
            "seconds_scoring": scored - sampled,
        }
        if config.kl_target is not None:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef,
                figures["kl"],
                target=config.kl_target,
                horizon=config.kl_horizon,
                n=config.batch_size,
            )
        self.tell(step, figures, said, told)

    def drawn(self, step: int) -> list[int]:
        """Which prompts a step takes, on this rank: a fresh order every epoch, each prompt as often as it completes."""
        n, config = len(self.prompts), self.config
        per_step = config.batch_size // config.n_completions
        mine = range(
            step * per_step + distributed.rank(), (step + 1) * per_step, distributed.world_size()
        )
        found: list[int] = []
        orders: dict[int, list[int]] = {}
        for place in mine:
            epoch, at = divmod(place, n)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(
                    experience.derive_seed(config.seed, "prompts", epoch)
                )
                orders[epoch] = torch.randperm(n, generator=generator).tolist()
            found += [orders[epoch][at]] * config.n_completions
        return found

    def sample(self, prompts: list[list[int]], what: str, step: int) -> experience.Completions:
        """Completions of prompts, other ones on every rank, the same ones in every run."""
        self.mode(train=False)
        seed = experience.derive_seed(self.config.seed, what, step, distributed.rank())
        if self.server is not None:
            return self.server.sample(
                self.cast.policy,
                prompts,
                self.stops,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                max_new_tokens=self.config.max_new_tokens,
                seed=seed,
            )
        return experience.sample_completions(
            self.cast.policy,
            prompts,
            self.stops,
            batch_size=self.config.sample_batch_size,
            seed=seed,
        )

    def judge(self, said: experience.Completions, rows: list[Row]) -> dict[str, Any]:
        """Scores of each reward and their weighted sum, less the penalty of those that did not end; gold where asked."""
        config = self.config
        texts = [
            tokenization.decode_completion(self.cast.tokenizer, completion, finished=finished)
            for completion, finished in zip(said.completions, said.finished, strict=True)
        ]
        messages = [row["prompt"] for row in rows]
        models = iter(self.cast.rewards)
        weights = config.weights or [1.0] * len(config.rewards)
        total = torch.zeros(len(texts))
        found: dict[str, Any] = {"texts": texts, "messages": messages}
        for name, weight in zip(config.rewards, weights, strict=True):
            if name in self.functions:
                columns = {
                    key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt",)
                }
                scores = torch.tensor(call(name, self.functions[name], messages, texts, columns))
            else:
                scores = self.by_model(next(models), said, messages, texts)
            found[f"rewards/{name}"] = scores
            total += weight * scores
        found["reward"] = total.clone()
        if config.missing_eos_penalty:
            total -= config.missing_eos_penalty * (~torch.tensor(said.finished)).float()
        found["score"] = total
        if config.judge == "gold":
            found["gold"] = torch.tensor(
                [gold.gold_score(m[-1]["content"], t) for m, t in zip(messages, texts, strict=True)]
            )
        return found

    def by_model(
        self, model: RewardModel, said: experience.Completions, messages: Any, texts: list[str]
    ) -> torch.Tensor:
        """Scores by a reward model: of the token ids if its tokenizer equals the policy's, else of the texts."""
        size = self.config.sample_batch_size
        if model.tokenizer is None:
            return model.score_tokens(said.rows, batch_size=size)
        turns = [tokenization.assistant_turn(text) for text in texts]
        return model.score(messages, turns, batch_size=size)

    def objective(self, rows: int) -> Objective:
        """The settings of the update for so many rows on this rank."""
        config = self.config
        if rows < config.minibatches:
            raise UserError(
                f"minibatches: {config.minibatches} of {rows} completions a process; lower it, or raise `batch_size`"
            )
        pieces = math.ceil(math.ceil(rows / config.minibatches) / config.micro_batch_size)
        return Objective(
            epochs=config.epochs,
            minibatches=config.minibatches,
            micro_batches=min(pieces, rows // config.minibatches),
            clip_low=config.clip,
            clip_high=config.clip_high or config.clip,
            dual_clip=config.dual_clip,
            value_coef=config.value_coef,
            value_clip=config.value_clip,
            entropy_coef=config.entropy_coef,
            target_kl=config.target_kl,
            max_grad_norm=config.max_grad_norm,
            whiten=config.normalize_advantages,
        )

    def clip(self, parameters: list[torch.Tensor], norm: float) -> torch.Tensor:
        """Average gradients over the ranks, once for all pieces, and clip policy and critic each by itself."""
        for p in parameters:
            if p.grad is not None:
                p.grad.copy_(sum_over_ranks(p.grad) / distributed.world_size())
        groups = self.optimizer.param_groups
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], norm) for group in groups]
        if not all(bool(n.isfinite()) for n in norms):  # equal on all ranks by now: all stop here
            raise UserError(
                "a gradient is not finite, so nothing was learned from it: lower `learning_rate` or "
                "`critic_learning_rate`, or scale the rewards down by `weights`"
            )
        return norms[0]

    def set_rates(self, step: int) -> None:
        """Learning rates of a step, from its number alone."""
        factor = schedule(step, self.config.steps, self.config.warmup_steps, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * factor

    def mode(self, *, train: bool) -> None:
        """Activations are computed again in training only; generation keeps its cache. Dropout is off in both."""
        if self.config.gradient_checkpointing:
            for model in self.cast.models():
                model.train(train)

    # Telling -------------------------------------------------------------------------------------

    def figures(
        self,
        said: experience.Completions,
        spoken: experience.Experience,
        told: Mapping[str, Any],
        diagnostics: Diagnostics | None,
    ) -> dict[str, float]:
        """Means over all ranks: of completions, and of their tokens."""
        mask = spoken.mask
        logratio = (spoken.logps - spoken.ref_logps).masked_fill(~mask, 0)
        lengths = torch.tensor([float(len(c)) for c in said.completions])
        finished = torch.tensor([float(f) for f in said.finished])
        width = self.config.sample_batch_size
        sampled = sum(
            max(part) * len(part) for part in chunks(lengths_in_sampling_order(said), width)
        )
        sums = {
            "kl": logratio.sum(),
            "tokens": lengths.sum(),
            "missing_eos": len(said.finished) - finished.sum(),
            **{k: v.sum() for k, v in told.items() if k not in ("texts", "messages")},
        }
        counts = {
            "n": float(len(lengths)),
            "entropy": spoken.entropy.masked_fill(~mask, 0).sum(),
            "sampled": float(sampled),
        }
        both = {**sums, **counts}
        total = sum_over_ranks(
            torch.tensor(
                [float(v) for v in both.values()], dtype=torch.float64, device=self._where()
            )
        ).tolist()
        merged = dict(zip(both, total, strict=True))
        n, tokens = merged["n"], merged["tokens"]
        found = {key: merged[key] / n for key in sums}
        found |= {
            "kl_per_token": merged["kl"] / tokens,
            "entropy": merged["entropy"] / tokens,
            "wasted_tokens": 1 - tokens / merged["sampled"],
        }
        if diagnostics is not None:
            found |= {
                "policy_loss": diagnostics.policy_loss,
                "value_loss": diagnostics.value_loss,
                "kl_of_update": diagnostics.kl,
                "clip_fraction": diagnostics.clip_fraction,
                "ratio_max": diagnostics.ratio_max,
                "explained_variance": diagnostics.explained_variance,
                "grad_norm": diagnostics.grad_norm,
                "optimizer_steps": float(diagnostics.steps),
            }
        return {
            key: value for key, value in found.items() if not math.isnan(value)
        }  # no critic: none

    def _where(self) -> Any:
        return "cpu" if self.device.type == "mps" else self.device

    def tell(
        self,
        step: int,
        figures: dict[str, float],
        said: experience.Completions,
        told: Mapping[str, Any],
    ) -> None:
        """Metrics, the live table, and now and then what was said."""
        done, steps = step + 1, self.config.steps
        self.latest = figures
        self.logger.log(done, figures)
        self.logger.step(done, steps, {k: figures[k] for k in ("score", "kl", "entropy")})
        every = max(1, steps // plots.LINES)
        if step == 0 or done % every == 0 or done == steps:
            if not self.columns:
                self.columns = list(figures)
                self.logger.info(plots.header(figures))
            self.logger.info(plots.line(done, figures, self.columns))
            if distributed.is_main():
                plots.samples(self.folder, done, told, n=4)

    def evaluate(self, done: int) -> None:
        """Sample on held-out prompts, always with the same seed, and tell."""
        if not self.held_out:
            return
        mine = slice(distributed.rank(), None, distributed.world_size())
        rows, ids = self.held_out[mine], self.held_out_prompts[mine]
        said = self.sample(ids, "evaluate", 0)
        told = self.judge(said, rows)
        inputs = said.tensors(self.cast.tokenizer.pad_token_id, self.device)
        spoken = experience.compute_experience(
            self.cast, inputs, batch_size=self.config.micro_batch_size
        )
        found = self.figures(said, spoken, told, None)
        shown = ("score", "reward", "gold", "kl", "tokens", "missing_eos")
        self.evaluated = {f"eval_{key}": found[key] for key in shown if key in found}
        self.logger.log(done, self.evaluated)

    # Keeping -------------------------------------------------------------------------------------

    def save(self, done: int) -> None:
        """Write a checkpoint after ``done`` steps; the last two stay."""
        if distributed.is_main():
            folder = self.folder / f"checkpoint-{done}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            weights = {k: p.detach().contiguous() for k, p in self.cast.weights().items()}
            save_file(without_shared_memory(weights), folder / TRAINABLE)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
            artifacts.write_json(folder / STATE, {"step": done, "kl_coef": self.kl_coef})
            checkpoints.mark_complete(folder, world_size=distributed.world_size())
            for old in checkpoints.list_checkpoints(self.folder)[:-2]:
                shutil.rmtree(old)
        distributed.barrier()

    def resume(self) -> int:
        """Go on from the last complete checkpoint; the number of the next step."""
        checkpoint = checkpoints.last_checkpoint(self.folder, world_size=distributed.world_size())
        if checkpoint is None:
            self.logger.rewind(-1)
            if distributed.is_main():
                truncate_jsonl(self.folder / plots.SAMPLES, -1)
            return 0
        state = artifacts.read_json(checkpoint / STATE)
        kept = load_file(checkpoint / TRAINABLE)
        with torch.no_grad():
            for name, p in self.cast.weights().items():
                p.copy_(kept[name])
        self.optimizer.load_state_dict(
            torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
        )
        self.kl_coef = state["kl_coef"]
        self.logger.rewind(state["step"])
        if distributed.is_main():
            truncate_jsonl(self.folder / plots.SAMPLES, state["step"])
        self.logger.info(f"going on from step {state['step']}: {checkpoint}")
        return int(state["step"])

    def finish(self) -> dict[str, Any]:
        """Write the policy, its tokenizer and the picture; the figures of the last step."""
        self.cast.policy.model.generation_config = self.own_config
        if distributed.is_main():
            only = {} if self.config.lora is None else {"selected_adapters": [POLICY]}
            self.cast.saved.save_pretrained(str(self.folder), **only)
            self.cast.tokenizer.save_pretrained(str(self.folder))
            (self.folder / "README.md").unlink(missing_ok=True)  # peft's template
            artifacts.make_readable(self.folder)
            plots.draw(self.folder)
        distributed.barrier()
        learns = sum(p.numel() for p in self.cast.weights().values())
        return {
            "ppo": self.latest | self.evaluated,
            "steps": self.config.steps,
            "score": self.latest["score"],
            "kl": self.latest["kl"],
            "trained_parameters": learns,
        }


def schedule(step: int, steps: int, warmup: int, kind: str) -> float:
    """Share of the learning rate in a step: it rises over ``warmup`` steps, and falls to 0 unless it is constant.

    >>> [schedule(step, 4, 0, "linear") for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1.0

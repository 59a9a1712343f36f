"""PPO on a language model: prompts, a policy and rewards in; a policy out. The update is the one that CartPole proves.

Each step samples completions, has every role speak about them, turns scores and KL into rewards and advantages, and calls
:func:`align.rl.update.update`. Nothing random is kept between steps: seeds come from the step's number, so weights,
optimizer and KL coefficient are all that a checkpoint needs, and a resumed run is the same run to the bit.

Several processes share each batch; gradients are averaged once an optimizer step. Left out: DeepSpeed and FSDP (say so and
stop), several models a device.
"""

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

from align import (
    artifact,
    dashboard,
    episodes,
    generation,
    interrupts,
    processes,
    reward_functions,
    roles,
    training,
)
from align.errors import UserError
from align.functional.policy_gradient import adaptive_kl_coef
from align.functional.tensors import sum_over_ranks
from align.judges import gold
from align.meaning import FUNCTION
from align.rl.update import Diagnostics, Objective, update
from align.settings import PPO
from align.tracking import Track

TRAINABLE, OPTIMIZER, STATE = "weights.safetensors", "optimizer.pt", "state.json"
ADAM_EPS = 1e-5
Row = dict[str, Any]


def run(
    settings: PPO, inputs: Mapping[str, Path | str], folder: Path, track: Track
) -> dict[str, Any]:
    """Train ``settings.model`` to earn ``settings.rewards`` without going far from where it starts."""
    try:
        learner = build(settings, inputs, folder, track)
        begin = learner.resume()
        with interrupts.deferred() as stop, training.small_tiles():
            for step in range(begin, settings.steps):
                if step == 0:
                    learner.evaluate(0)
                learner.step(step)
                done = step + 1
                if settings.eval_steps and (
                    done % settings.eval_steps == 0 or done == settings.steps
                ):
                    learner.evaluate(done)
                stopping = training.anyone(stop.requested) and done < settings.steps
                if stopping or (done % learner.save_steps == 0 and done < settings.steps):
                    learner.save(done)
                if stopping:
                    raise interrupts.Interrupted
        return learner.finish()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory: lower `micro_batch_size`, which changes no result, or `sample_batch_size`, or set "
            f"`gradient_checkpointing: true`, `lora`, or `quantization: nf4` ({str(error).splitlines()[0]})"
        ) from error


def build(settings: PPO, inputs: Mapping[str, Path | str], folder: Path, track: Track) -> Learner:
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
    world = processes.world_size()
    per_step = settings.batch_size // settings.n_completions
    if per_step % world:
        raise UserError(
            f"batch_size: {settings.batch_size}: {per_step} prompts are not shared by {world} processes evenly; "
            f"make it a multiple of {world * settings.n_completions}"
        )
    data = Path(inputs["prompts"])
    functions = {
        name: reward_functions.function(name) for name in settings.rewards if FUNCTION.match(name)
    }
    rows = _rows(data, "train")
    held_out = _rows(data, settings.eval_split) if settings.eval_steps else []
    held_out = held_out[: settings.n_eval_prompts]
    if 0 < len(held_out) < world:
        raise UserError(
            f"eval_steps: {len(held_out)} held-out prompts for {world} processes; remove it"
        )
    device = accelerator.device
    scorers = [
        inputs[f"rewards.{k}"]
        for k, name in enumerate(settings.rewards)
        if not FUNCTION.match(name)
    ]
    cast = roles.build(
        inputs["model"],
        scorers=scorers,
        lora=settings.lora.model_dump() if settings.lora else None,
        dtype=settings.dtype,
        quantization=settings.quantization,
        revision=settings.revision,
        critic=settings.advantages == "gae",
        temperature=settings.temperature,
        share=settings.prefix_sharing,
        checkpointing=settings.gradient_checkpointing,
        device=device,
        say=track.say,
    )
    own_config = cast.policy.model.generation_config
    stops = generation.set_sampling(
        cast.policy.model,
        cast.tokenizer,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
    )
    groups = [{"params": cast.parameters(cast.policy), "base": settings.learning_rate}]
    if cast.critic is not None:
        rate = settings.critic_learning_rate or settings.learning_rate
        groups.append({"params": cast.parameters(cast.critic), "base": rate})
    learner = Learner(
        settings=settings,
        folder=folder,
        track=track,
        device=device,
        cast=cast,
        functions=functions,
        rows=rows,
        prompts=_prompts(cast, rows, settings),
        held_out=held_out,
        held_out_prompts=_prompts(cast, held_out, settings),
        stops=stops,
        own_config=own_config,
        optimizer=torch.optim.AdamW(groups, lr=0.0, eps=ADAM_EPS, weight_decay=0.0),
        save_steps=settings.save_steps or max(1, settings.steps // 10),
        kl_coef=settings.kl_coef,
        server=_server(settings, device),
    )
    learner.objective(settings.batch_size // world)  # what does not divide is told now
    return learner


def _server(settings: PPO, device: Any) -> Any:
    if settings.sampler == "transformers":
        return None
    from align import vllm_sampler

    return vllm_sampler.Server(settings.vllm_url, device)


def _rows(data: Path, split: str) -> list[Row]:
    import pyarrow.parquet as pq

    file = data / f"prompts-{split}.parquet"
    if not file.is_file():
        raise UserError(f"{data}: no {file.name}; set `{split}_fraction` of its `prepare` stage")
    found: list[Row] = pq.read_table(file).to_pylist()
    return found


def _prompts(cast: roles.Roles, rows: list[Row], settings: PPO) -> list[list[int]]:
    """Tokens of the prompts. Those that leave no room for a completion are refused."""
    found = generation.prompt_ids(cast.tokenizer, [row["prompt"] for row in rows])
    limit = getattr(cast.policy.model.config, "max_position_embeddings", None)
    if limit is not None:
        long = sum(len(ids) + settings.max_new_tokens > limit for ids in found)
        if long:
            raise UserError(
                f"{long:,} of {len(found):,} prompts and `max_new_tokens: {settings.max_new_tokens}` are more than the "
                f"model's {limit} positions; lower it, or leave out such prompts in `prepare`"
            )
    return found


@dataclass(slots=True)
class Learner:
    """A run of PPO between two steps."""

    settings: PPO
    folder: Path
    track: Track
    device: Any
    cast: roles.Roles
    functions: dict[str, reward_functions.Score]
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
        settings = self.settings
        chosen = self.drawn(step)
        said = self.sample([self.prompts[i] for i in chosen], "sample", step)
        sampled = time.monotonic()
        rows = [self.rows[i] for i in chosen]
        told = self.judge(said, rows)
        inputs = said.tensors(self.cast.tokenizer.pad_token_id, self.device)
        self.mode(train=False)
        spoken = episodes.speak(self.cast, inputs, batch_size=settings.micro_batch_size)
        rollout = episodes.rollout(
            spoken,
            told["score"].to(self.device),
            advantages=settings.advantages,
            n_completions=settings.n_completions,
            kl_coef=self.kl_coef,
            kl_estimator=settings.kl_estimator,
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_rewards=settings.whiten_rewards,
            sampler_logps=_aligned(said, spoken),
            importance_cap=settings.importance_cap,
        )
        scored = time.monotonic()
        warm_up = step < settings.critic_warmup_steps
        self.set_rates(step)
        self.mode(train=True)
        diagnostics = update(
            episodes.evaluators(self.cast, frozen_policy=warm_up),
            rollout,
            self.objective(len(rollout)),
            self.optimizer,
            generator=torch.Generator().manual_seed(
                episodes.mixed(settings.seed, "shuffle", step, processes.rank())
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
        if settings.kl_target is not None:
            self.kl_coef = adaptive_kl_coef(
                self.kl_coef,
                figures["kl"],
                target=settings.kl_target,
                horizon=settings.kl_horizon,
                n=settings.batch_size,
            )
        self.tell(step, figures, said, told)

    def drawn(self, step: int) -> list[int]:
        """Which prompts a step takes, on this rank: a fresh order every epoch, each prompt as often as it completes."""
        n, settings = len(self.prompts), self.settings
        per_step = settings.batch_size // settings.n_completions
        mine = range(
            step * per_step + processes.rank(), (step + 1) * per_step, processes.world_size()
        )
        found: list[int] = []
        orders: dict[int, list[int]] = {}
        for place in mine:
            epoch, at = divmod(place, n)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(
                    episodes.mixed(settings.seed, "prompts", epoch)
                )
                orders[epoch] = torch.randperm(n, generator=generator).tolist()
            found += [orders[epoch][at]] * settings.n_completions
        return found

    def sample(self, prompts: list[list[int]], what: str, step: int) -> episodes.Episodes:
        """Completions of prompts, other ones on every rank, the same ones in every run."""
        self.mode(train=False)
        seed = episodes.mixed(self.settings.seed, what, step, processes.rank())
        if self.server is not None:
            return self.server.sample(
                self.cast.policy,
                prompts,
                self.stops,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_new_tokens=self.settings.max_new_tokens,
                seed=seed,
            )
        return episodes.sample(
            self.cast.policy,
            prompts,
            self.stops,
            batch_size=self.settings.sample_batch_size,
            seed=seed,
        )

    def judge(self, said: episodes.Episodes, rows: list[Row]) -> dict[str, Any]:
        """Scores of each reward and their weighted sum, less the penalty of those that did not end; gold where asked."""
        settings, tokenizer = self.settings, self.cast.tokenizer
        texts = [
            tokenizer.decode(c[:-1] if f else c, skip_special_tokens=True).strip()
            for c, f in zip(said.completions, said.finished, strict=True)
        ]
        messages = [row["prompt"] for row in rows]
        models = iter(self.cast.rewards)
        weights = settings.weights or [1.0] * len(settings.rewards)
        total = torch.zeros(len(texts))
        found: dict[str, Any] = {"texts": texts, "messages": messages}
        for name, weight in zip(settings.rewards, weights, strict=True):
            if name in self.functions:
                columns = {
                    key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt",)
                }
                scores = torch.tensor(
                    reward_functions.call(name, self.functions[name], messages, texts, columns)
                )
            else:
                scores = self.by_model(next(models), said, messages, texts)
            found[f"rewards/{name}"] = scores
            total += weight * scores
        found["reward"] = total.clone()
        if settings.missing_eos_penalty:
            total -= settings.missing_eos_penalty * (~torch.tensor(said.finished)).float()
        found["score"] = total
        if settings.judge == "gold":
            found["gold"] = torch.tensor(
                [gold.gold_score(m[-1]["content"], t) for m, t in zip(messages, texts, strict=True)]
            )
        return found

    def by_model(
        self, role: roles.Role, said: episodes.Episodes, messages: Any, texts: list[str]
    ) -> torch.Tensor:
        """Scores by a reward model: of the tokens themselves where it reads the same ones, else of the texts."""
        rows = said.rows
        if role.tokenizer is not None:
            turns = [[{"role": "assistant", "content": text}] for text in texts]
            rows = generation.judged_ids(role.tokenizer, messages, turns)
        return role.scores(rows, batch_size=self.settings.sample_batch_size)

    def objective(self, rows: int) -> Objective:
        """The settings of the update for so many rows on this rank."""
        settings = self.settings
        if rows < settings.minibatches:
            raise UserError(
                f"minibatches: {settings.minibatches} of {rows} completions a process; lower it, or raise `batch_size`"
            )
        pieces = math.ceil(math.ceil(rows / settings.minibatches) / settings.micro_batch_size)
        return Objective(
            epochs=settings.epochs,
            minibatches=settings.minibatches,
            micro_batches=min(pieces, rows // settings.minibatches),
            clip_low=settings.clip,
            clip_high=settings.clip_high or settings.clip,
            dual_clip=settings.dual_clip,
            value_coef=settings.value_coef,
            value_clip=settings.value_clip,
            entropy_coef=settings.entropy_coef,
            target_kl=settings.target_kl,
            max_grad_norm=settings.max_grad_norm,
            whiten=settings.whiten_advantages,
        )

    def clip(self, parameters: list[torch.Tensor], norm: float) -> torch.Tensor:
        """Average gradients over the ranks, once for all pieces, and clip policy and critic each by itself."""
        for p in parameters:
            if p.grad is not None:
                p.grad.copy_(sum_over_ranks(p.grad) / processes.world_size())
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
        factor = schedule(
            step, self.settings.steps, self.settings.warmup_steps, self.settings.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * factor

    def mode(self, *, train: bool) -> None:
        """Activations are computed again in training only; generation keeps its cache. Dropout is off in both."""
        if self.settings.gradient_checkpointing:
            for model in self.cast.models():
                model.train(train)

    # Telling -------------------------------------------------------------------------------------

    def figures(
        self,
        said: episodes.Episodes,
        spoken: episodes.Spoken,
        told: Mapping[str, Any],
        diagnostics: Diagnostics | None,
    ) -> dict[str, float]:
        """Means over all ranks: of completions, and of their tokens."""
        mask = spoken.mask
        logratio = (spoken.logps - spoken.ref_logps).masked_fill(~mask, 0)
        lengths = torch.tensor([float(len(c)) for c in said.completions])
        finished = torch.tensor([float(f) for f in said.finished])
        width = self.settings.sample_batch_size
        sampled = sum(max(part) * len(part) for part in _parts(_by_prompt_length(said), width))
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
        self, step: int, figures: dict[str, float], said: episodes.Episodes, told: Mapping[str, Any]
    ) -> None:
        """Metrics, the live table, and now and then what was said."""
        done, steps = step + 1, self.settings.steps
        self.latest = figures
        self.track.log(done, figures)
        self.track.step(done, steps, {k: figures[k] for k in ("score", "kl", "entropy")})
        every = max(1, steps // dashboard.LINES)
        if step == 0 or done % every == 0 or done == steps:
            if not self.columns:
                self.columns = list(figures)
                self.track.say(dashboard.header(figures))
            self.track.say(dashboard.line(done, figures, self.columns))
            if processes.is_main():
                dashboard.samples(self.folder, done, told, n=4)

    def evaluate(self, done: int) -> None:
        """Sample on held-out prompts, always with the same seed, and tell."""
        if not self.held_out:
            return
        mine = slice(processes.rank(), None, processes.world_size())
        rows, ids = self.held_out[mine], self.held_out_prompts[mine]
        said = self.sample(ids, "evaluate", 0)
        told = self.judge(said, rows)
        inputs = said.tensors(self.cast.tokenizer.pad_token_id, self.device)
        spoken = episodes.speak(self.cast, inputs, batch_size=self.settings.micro_batch_size)
        found = self.figures(said, spoken, told, None)
        shown = ("score", "reward", "gold", "kl", "tokens", "missing_eos")
        self.evaluated = {f"eval_{key}": found[key] for key in shown if key in found}
        self.track.log(done, self.evaluated)

    # Keeping -------------------------------------------------------------------------------------

    def save(self, done: int) -> None:
        """Write a checkpoint after ``done`` steps; the last two stay."""
        if processes.is_main():
            folder = self.folder / f"checkpoint-{done}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            weights = {k: p.detach().contiguous() for k, p in self.cast.weights().items()}
            save_file(_unshared(weights), folder / TRAINABLE)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
            artifact.write_json(folder / STATE, {"step": done, "kl_coef": self.kl_coef})
            artifact.mark_checkpoint(folder, world_size=processes.world_size())
            for old in artifact.checkpoints(self.folder)[:-2]:
                shutil.rmtree(old)
        processes.wait()

    def resume(self) -> int:
        """Go on from the last complete checkpoint; the number of the next step."""
        checkpoint = artifact.last_checkpoint(self.folder, world_size=processes.world_size())
        if checkpoint is None:
            self.track.rewind(-1)
            if processes.is_main():
                dashboard.rewind(self.folder, -1)
            return 0
        state = artifact.read_json(checkpoint / STATE)
        kept = load_file(checkpoint / TRAINABLE)
        with torch.no_grad():
            for name, p in self.cast.weights().items():
                p.copy_(kept[name])
        self.optimizer.load_state_dict(
            torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
        )
        self.kl_coef = state["kl_coef"]
        self.track.rewind(state["step"])
        if processes.is_main():
            dashboard.rewind(self.folder, state["step"])
        self.track.say(f"going on from step {state['step']}: {checkpoint}")
        return int(state["step"])

    def finish(self) -> dict[str, Any]:
        """Write the policy, its tokenizer and the picture; the figures of the last step."""
        self.cast.policy.model.generation_config = self.own_config
        if processes.is_main():
            only = {} if self.settings.lora is None else {"selected_adapters": [roles.POLICY]}
            self.cast.saved.save_pretrained(str(self.folder), **only)
            self.cast.tokenizer.save_pretrained(str(self.folder))
            (self.folder / "README.md").unlink(missing_ok=True)  # peft's template
            training.make_readable(self.folder)
            dashboard.draw(self.folder)
        processes.wait()
        learns = sum(p.numel() for p in self.cast.weights().values())
        return {
            "ppo": self.latest | self.evaluated,
            "steps": self.settings.steps,
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


def _aligned(said: episodes.Episodes, spoken: episodes.Spoken) -> torch.Tensor | None:
    """Another engine's log-probabilities, in the columns of ours."""
    if said.sampler_logps is None:
        return None
    found = spoken.logps.clone()
    for row, (prompt, logps) in enumerate(zip(said.prompts, said.sampler_logps, strict=True)):
        start = len(prompt) - 1
        found[row, start : start + len(logps)] = torch.tensor(logps, device=found.device)
    return found


def _by_prompt_length(said: episodes.Episodes) -> list[int]:
    """Lengths of completions in the order in which they were sampled."""
    order = sorted(range(len(said.prompts)), key=lambda i: len(said.prompts[i]))
    return [len(said.completions[i]) for i in order]


def _parts(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _unshared(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied weights once more: safetensors refuses to write two names for one memory."""
    seen: set[int] = set()
    found = {}
    for name, tensor in weights.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found

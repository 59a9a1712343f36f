"""Reward: pairs and an SFT model in, a Bradley-Terry reward model out. TRL does the training.

Rows are tokenised here, so that training, evaluation and PPO read the same tail: the first eos after the prompt. The mean
score of SFT's demonstrations is stored beside the weights, in ``reward.json``, and taken off wherever we score: 0 is as
good as a demonstration. What ``from_pretrained`` alone gives differs by that constant, which no comparison sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trl import RewardConfig, RewardTrainer

from align import artifact, generation, models, prefix_sharing, processes, rewards, training
from align.errors import UserError
from align.functional import winrate
from align.judges import gold
from align.settings import Reward
from align.tracking import Track

N_CENTRE = 2048  # demonstrations whose mean is 0
N_BINS = 10  # of the calibration
LEVEL, RESAMPLES = 0.95, 2000
BATCH = 64


def run(
    settings: Reward, inputs: Mapping[str, Path | str], folder: Path, track: Track
) -> dict[str, Any]:
    """Train a score on the pairs of ``settings.pairs``, centre it, and measure it on those that are held out."""
    trainer = build(settings, inputs, folder, track=track)
    metrics = training.fit(trainer, folder, track)
    metrics["parameters"] = sum(p.numel() for p in trainer.model.parameters())
    device = trainer.accelerator.device
    del trainer
    processes.wait()
    model = rewards.RewardModel(
        folder, dtype=settings.dtype, device=device, share=settings.prefix_sharing
    )
    model.mean = 0.0  # a killed attempt may have left its own in the folder
    data = Path(inputs["pairs"])
    metrics["centre"] = _centre(model, data, folder, track)
    metrics["held_out"] = _measure(model, data, folder, track)
    return metrics


def build(
    settings: Reward, inputs: Mapping[str, Path | str], folder: Path, *, track: Track
) -> RewardTrainer:
    """The trainer, on rows that end where a policy's completions do."""
    source, data = inputs["model"], Path(inputs["pairs"])
    arguments = training.arguments(
        RewardConfig, folder, seed=settings.seed, trainer=settings.trainer
    )
    tokenizer = models.load_tokenizer(source, revision=settings.revision)
    models.pad_for_scores(tokenizer)
    rows, held_out = (
        _tokenized(
            training.dataset(data, "pairs", split, folder), tokenizer, arguments, settings, track
        )
        for split in ("train", "validation")
    )
    lora = settings.lora.model_dump() if settings.lora else None
    model = models.new_scorer(source, lora=lora, dtype=settings.dtype, revision=settings.revision)
    with training.refusals():
        trainer = RewardTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
    if settings.prefix_sharing:
        prefix_sharing.share(trainer.model, say=track.say)
    return trainer


def _tokenized(rows: Any, tokenizer: Any, arguments: Any, settings: Reward, track: Track) -> Any:
    """``chosen_ids`` and ``rejected_ids``, which TRL's trainer takes as they are, and a ``margin`` where it is asked for."""
    if rows is None:
        return None
    if settings.margin_coef and "margin" not in rows.column_names:
        raise UserError("margin_coef: these pairs have no `margin`; remove it")

    def tokens(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {
            f"{side}_ids": generation.judged_ids(tokenizer, batch["prompt"], batch[side])
            for side in ("chosen", "rejected")
        }
        if settings.margin_coef:
            found["margin"] = [settings.margin_coef * margin for margin in batch["margin"]]
        return found

    found = rows.map(tokens, batched=True, remove_columns=rows.column_names)
    limit = arguments.max_length
    if limit is not None:
        short = found.filter(
            lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit
        )
        if len(short) == 0:
            raise UserError(f"trainer.max_length: no pair is of {limit} tokens or fewer; raise it")
        if len(short) < len(found):
            cut = len(found) - len(short)
            track.say(f"{cut:,} of {len(found):,} pairs are longer than {limit} tokens: left out")
        found = short
    return found


def _centre(
    model: rewards.RewardModel, data: Path, folder: Path, track: Track
) -> dict[str, float | int]:
    """Store the mean score of SFT's demonstrations, and take it off from now on.

    Labelled completions come without any: there it is the mean of the chosen ones.
    """
    shown = (data / "demonstrations-train.parquet").is_file()
    rows = _rows(data, "demonstrations-train" if shown else "pairs-train", most=N_CENTRE)
    side = "completion" if shown else "chosen"
    rows = _fitting(model, rows, [side], track)
    scores = _scores(model, rows, side, track)
    mean = scores.mean().item()
    if processes.is_main():
        artifact.write_json(folder / rewards.FILE, {rewards.MEAN: mean})
    model.mean = mean
    return {"score_mean": mean, "score_std": scores.std().item(), "demonstrations": len(rows)}


def _measure(
    model: rewards.RewardModel, data: Path, folder: Path, track: Track
) -> dict[str, Any] | None:
    """Accuracy, calibration and ceiling on held-out pairs; None where no prompt was held out.

    A pair's reward difference d says that the chosen one wins with probability sigmoid(d). ``calibration`` has, in bins of
    the likelier side's probability, how likely it was said to be and how often it was right.
    """
    split = next((s for s in ("test", "validation") if (data / f"pairs-{s}.parquet").is_file()), "")
    if not split:
        track.say("no held-out pairs: accuracy and calibration are not known")
        return None
    rows = _fitting(model, _rows(data, f"pairs-{split}"), ["chosen", "rejected"], track)
    chosen, rejected = (
        _scores(model, rows, side, track).double() for side in ("chosen", "rejected")
    )
    right = winrate.outcomes(chosen[:, None], rejected[:, None])[:, 0]
    by_prompt: dict[str, list[float]] = {}
    for row, value in zip(rows, right.tolist(), strict=True):
        by_prompt.setdefault(row["prompt_id"], []).append(value)
    values = torch.tensor([sum(v) / len(v) for v in by_prompt.values()], dtype=torch.float64)
    interval = winrate.proportion_interval(values, level=LEVEL, resamples=RESAMPLES, seed=0)
    found = {
        "split": split,
        "pairs": len(rows),
        "accuracy": values.mean().item(),
        "ci": list(interval),
        "mean_margin": (chosen - rejected).mean().item(),
        "calibration": calibration(chosen - rejected),
        "expected_calibration_error": calibration_error(chosen - rejected),
    }
    return found | _ceiling(rows, by_prompt, chosen - rejected)


def calibration(margins: torch.Tensor) -> list[dict[str, float]]:
    """Bins of the likelier side's probability: mean of what was said, how often it was right, how many pairs."""
    said, right, place = _said(margins)
    return [
        {
            "said": said[place == k].mean().item(),
            "right": right[place == k].mean().item(),
            "pairs": int((place == k).sum()),
        }
        for k in range(N_BINS)
        if (place == k).any()
    ]


def calibration_error(margins: torch.Tensor) -> float:
    """Mean distance between what was said and how often it was right, over bins weighed by their pairs.

    Source: Naeini et al. 2015, Obtaining well calibrated probabilities using Bayesian binning, eq. 3.
    """
    return sum(
        each["pairs"] * abs(each["said"] - each["right"]) for each in calibration(margins)
    ) / len(margins)


def _said(margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probability of the likelier side, whether it was the chosen one (one half for a tie), and the bin."""
    said = torch.sigmoid(margins.double().abs())
    right = torch.where(margins == 0, 0.5, (margins > 0).double())
    place = ((said - 0.5) * 2 * N_BINS).long().clamp(max=N_BINS - 1)
    return said, right, place


def _ceiling(
    rows: Sequence[Mapping[str, Any]], by_prompt: Mapping[str, Any], margins: torch.Tensor
) -> dict[str, float]:
    """What is known of the embedded task's labels: the best accuracy there is, and the agreement with gold itself."""
    try:
        gaps, best = [], {key: [] for key in by_prompt}  # type: list[float], dict[str, list[float]]
        for row in rows:
            prompt = row["prompt"][-1]["content"]
            sides = (row["chosen"][-1]["content"], row["rejected"][-1]["content"])
            p = gold.preference_probability(prompt, *sides)
            best[row["prompt_id"]].append(max(p, 1 - p))
            gaps.append(p - 0.5)
    except ValueError:
        return {}  # not the embedded task
    truth = torch.tensor(gaps, dtype=torch.float64)
    found = {"ceiling": sum(sum(v) / len(v) for v in best.values()) / len(best)}
    apart = truth != 0
    if apart.any():
        agree = ((margins > 0) == (truth > 0))[apart]
        found["agreement_with_gold"] = agree.double().mean().item()
    return found


def _rows(data: Path, table: str, *, most: int | None = None) -> list[dict[str, Any]]:
    """Rows of a prepared table; ``most`` of them, evenly spaced."""
    import pyarrow.parquet as pq

    found = pq.read_table(data / f"{table}.parquet")
    if most is not None and len(found) > most:
        found = found.take([k * len(found) // most for k in range(most)])
    rows: list[dict[str, Any]] = found.to_pylist()
    return rows


def _fitting(
    model: rewards.RewardModel, rows: list[dict[str, Any]], sides: Sequence[str], track: Track
) -> list[dict[str, Any]]:
    """The rows that fit into the model's positions; how many do not is said."""
    limit = getattr(model.model.config, "max_position_embeddings", None)
    if limit is None:
        return rows

    def longest(row: Mapping[str, Any]) -> int:
        prompts, said = [row["prompt"]] * len(sides), [row[side] for side in sides]
        return max(map(len, generation.judged_ids(model.tokenizer, prompts, said)))

    kept = [row for row in rows if longest(row) <= limit]
    if len(kept) < len(rows):
        cut = len(rows) - len(kept)
        track.say(f"{cut:,} of {len(rows):,} rows are longer than the model: not scored")
    if not kept:
        raise UserError(
            f"every row is longer than the model's {limit} positions; nothing to measure"
        )
    return kept


def _scores(
    model: rewards.RewardModel, rows: Sequence[Mapping[str, Any]], side: str, track: Track
) -> torch.Tensor:
    """Scores of a column, each process scoring its share."""
    from accelerate.utils import gather_object

    mine = range(processes.rank(), len(rows), processes.world_size())
    scores = model.score(
        [rows[i]["prompt"] for i in mine], [rows[i][side] for i in mine], batch_size=BATCH
    )
    track.step(len(rows), len(rows), what=f"scored {side}")
    merged = dict(gather_object(list(zip(mine, scores.tolist(), strict=True))))
    return torch.tensor([merged[i] for i in range(len(rows))])

"""The completions that are compared: sampled from a policy, of the data set, or from a file.

Every policy is sampled from its own random stream. From equal random states the completions of two
policies are coupled: both follow the same draws, and the better policy wins more often than with
independent samples, which is what a win rate means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from align.config.evaluate import REFERENCE, Evaluate
from align.data import completion_files, tables
from align.errors import DataError, counted
from align.models import generation
from align.models.generation import Completion
from align.models.policy import Policy
from align.runtime import distributed
from align.runtime.progress import Logger
from align.runtime.seeds import derive_seed

if TYPE_CHECKING:
    from align.data.rows import Row


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of one policy for the held-out prompts."""

    completions: list[list[Completion]]
    """The completions of each prompt; none where a file or the data set has none."""
    is_sampled: bool = True
    """Whether a policy sampled them, so that their tokens are known."""
    remark: str = ""
    """What was left out of a file."""

    @property
    def mean_tokens(self) -> float | None:
        """Mean length in tokens, without the stop token; None where only texts are known."""
        return self._mean([c.n_tokens for row in self.completions for c in row])

    @property
    def mean_characters(self) -> float:
        """Mean length in characters."""
        lengths = [len(c.text) for row in self.completions for c in row]
        return sum(lengths) / len(lengths)

    @property
    def finished(self) -> float | None:
        """Share of the completions that end in a stop token; None where only texts are known."""
        return self._mean([c.finished for row in self.completions for c in row])

    def _mean(self, values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if self.is_sampled else None


class Match(NamedTuple):
    """Two completions of one prompt that are compared."""

    prompt: int
    """Number of the prompt."""
    column: int
    """Number of the comparison among those of the prompt."""
    own: int
    """Number of the policy's completion."""
    baseline: int
    """Number of the baseline's completion."""


def matches(own: Samples, baseline: Samples, n_completions: int) -> Iterator[Match]:
    """Which completions of two policies are compared.

    Completion k of a policy is compared with completion k of the baseline. A side with fewer
    completions begins again with its first; no pair is compared twice.
    """
    for i, (left, right) in enumerate(zip(own.completions, baseline.completions, strict=True)):
        if left and right:
            pairs = [(k % len(left), k % len(right)) for k in range(n_completions)]
            for column, pair in enumerate(dict.fromkeys(pairs)):
                yield Match(i, column, *pair)


def length_differences(
    own: Samples, baseline: Samples, n_completions: int
) -> Float[Tensor, "prompts completions"]:
    """Characters of the policy's completions minus those of the baseline's; NaN without a pair.

    Characters, as in AlpacaEval 2, do not depend on the tokenizers of the two policies.
    """
    differences = torch.full((len(own.completions), n_completions), torch.nan, dtype=torch.float64)
    for i, column, j, k in matches(own, baseline, n_completions):
        lengths = len(own.completions[i][j].text), len(baseline.completions[i][k].text)
        differences[i, column] = lengths[0] - lengths[1]
    return differences


def control_name(config: Evaluate) -> str:
    """Name of the control: the baseline, sampled from another random stream."""
    return f"{config.baseline} again"


def has_control(config: Evaluate) -> bool:
    """Whether the baseline is a model, which can be sampled again."""
    return config.baseline != REFERENCE and "baseline" not in config.completion_files


def compared_names(config: Evaluate) -> list[str]:
    """Names of the policies that are compared with the baseline, the control last."""
    policies = [name for name in config.policies if name != config.baseline]
    return [*policies, control_name(config)] if has_control(config) else policies


def stream_seed(config: Evaluate, name: str) -> int:
    """Seed of the random stream that the policy called ``name`` is sampled from.

    It depends on the recipe's seed and on the place of the policy in the recipe. Each batch of
    prompts has its own seed, derived from this one.
    """
    places = {control_name(config): "control", config.baseline: "baseline"}
    place = places[name] if name in places else config.policies.index(name)
    return derive_seed(config.seed, "evaluate", place) % 2**32


def sample_policy(
    name: str, policy: Policy, prompts: Sequence[Row], config: Evaluate, logger: Logger
) -> dict[str, Samples]:
    """Samples of the policy called ``name``; for the baseline, those of the control as well.

    The ranks share the work. The completions depend on the seed, not on the number of ranks.
    """
    names = [name, control_name(config)] if name == config.baseline else [name]
    return {
        sampled_name: Samples(
            generation.sample(
                policy.model,
                policy.tokenizer,
                [row["prompt"] for row in prompts],
                n_completions=config.n_completions,
                temperature=config.temperature,
                top_p=config.top_p,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
                seed=stream_seed(config, sampled_name),
                compile_decoding=config.compile_decoding,
                map_batches=partial(
                    distributed.map_rows,
                    progress=partial(logger.step, unit=f"{sampled_name}: sampled batch"),
                ),
            )
        )
        for sampled_name in names
    }


def read_completions(config: Evaluate, data: Path, prompts: Sequence[Row]) -> dict[str, Samples]:
    """The completions that no policy samples: those of files, and those of the data set.

    Raises:
        DataError: A file is malformed, or has no completion of a held-out prompt.
    """
    files = dict.fromkeys(config.completion_files.values())
    samples = {name: _read_file(Path(name), prompts, config.n_completions) for name in files}
    if config.baseline == REFERENCE:
        samples[REFERENCE] = _read_reference(data, config.split, prompts, config.n_completions)
    return samples


def _read_file(file: Path, prompts: Sequence[Row], n_completions: int) -> Samples:
    """Completions of a JSONL file, matched by the normalized text of the prompts."""
    completions = completion_files.read_completions(file)
    held_out = {row["prompt_id"] for row in prompts}
    missing, extra = held_out - completions.keys(), completions.keys() - held_out
    if missing == held_out:
        raise DataError(
            f"{file}: none of its {counted(len(completions), 'prompt')} is a held-out prompt; "
            "complete the prompts of the table that `prompts` and `split` name"
        )
    more = sum(max(0, len(completions.get(key, ())) - n_completions) for key in held_out)
    parts = [
        f"{len(missing)} of {len(held_out)} held-out prompts have no completion" * bool(missing),
        f"{counted(len(extra), 'prompt')} not held out" * bool(extra),
        f"{counted(more, 'completion')} above `n_completions`" * bool(more),
    ]
    remark = ", ".join(filter(None, parts))
    remark = f"{file}: left out: {remark}" if remark else ""
    return _from_texts(completions, prompts, n_completions, remark)


def _read_reference(data: Path, split: str, prompts: Sequence[Row], n_completions: int) -> Samples:
    """The data set's own completions of the prompts.

    Raises:
        DataError: The prepared data have none for these prompts.
    """
    completions: dict[str, list[str]] = {}
    columns = {"demonstrations": "completion", "pairs": "chosen", "unpaired": "completion"}
    for kind, column in columns.items():
        if not tables.has_table(data, kind, split):
            continue
        for row in tables.read(data, kind, split):
            texts = completions.setdefault(row["prompt_id"], [])
            turn = row[column][-1]
            if len(turn) > 2:
                raise DataError(
                    f"{tables.table_file(data, kind, split)}: a completion has tool calls or "
                    f"reasoning, which is no text that can be compared; name another `baseline`"
                )
            text = turn["content"]
            if row.get("label", True) and text not in texts:
                texts.append(text)
    found = sum(bool(completions.get(row["prompt_id"])) for row in prompts)
    if not found:
        raise DataError(
            f"{data}: no completion of the {split} split is a reference: it needs demonstrations, "
            "pairs, or completions with a desirable label; name another `baseline`"
        )
    missing = len(prompts) - found
    remark = f"reference: {missing} of {len(prompts)} held-out prompts have no completion"
    return _from_texts(completions, prompts, n_completions, remark if missing else "")


def _from_texts(
    completions: dict[str, list[str]], prompts: Sequence[Row], n_completions: int, remark: str
) -> Samples:
    rows = [completions.get(row["prompt_id"], [])[:n_completions] for row in prompts]
    return Samples(
        [[Completion(text, 0, finished=True) for text in row] for row in rows],
        is_sampled=False,
        remark=remark,
    )

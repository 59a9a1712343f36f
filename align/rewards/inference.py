"""A loaded reward model for the Python API: prompts and completions in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ArtifactError, DataError
from align.models import gguf_files
from align.models.policy import as_messages, as_source, default_device
from align.models.tokenization import assistant_turn
from align.rewards.reward_model import RewardModel
from align.runtime import artifacts

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.tokenization import Message


@dataclass(frozen=True, slots=True)
class CompletionScorer:
    """A reward model that scores the completions of :meth:`align.models.policy.Policy.generate`."""

    reward_model: RewardModel

    def score(
        self,
        prompts: Sequence[str | Sequence[Message]],
        completions: Sequence[Sequence[str]],
        *,
        batch_size: int = 64,
    ) -> Tensor:
        """Scores of n completions a prompt, ``[prompts, n]`` in float32; higher is better.

        ``completions[i]`` lists the completions of ``prompts[i]``.

        Raises:
            DataError: There is no prompt, or the prompts do not all have the same number of
                completions.
        """
        counts = {len(row) for row in completions}
        if len(prompts) != len(completions) or len(counts) != 1 or counts == {0}:
            raise DataError(
                "completions: expected one list for each prompt, all of one length, got "
                f"{len(completions)} lists of {sorted(counts)} completions for {len(prompts)} "
                "prompts"
            )
        (n,) = counts
        scores = self.reward_model.score(
            [as_messages(prompt) for prompt in prompts for _ in range(n)],
            [assistant_turn(text) for row in completions for text in row],
            batch_size=batch_size,
        )
        return scores.reshape(len(prompts), n)


def load_reward_model(
    source: Path | str,
    *,
    dtype: str = "float32",
    device: Any = None,
    quantization: str | None = None,
) -> CompletionScorer:
    """Load a reward model: a ``reward`` stage's folder, or any classifier with one label.

    With ``quantization="nf4"`` the linear layers are stored in 4 bits.

    Raises:
        UserError: It cannot be loaded, a file of its stage is damaged, it has several labels, or
            its head was never trained.
    """
    if gguf_files.is_gguf(source):
        raise ArtifactError(
            f"{source}: a GGUF file, which contains a language model; name the folder of a `reward` "
            "stage"
        )
    source = as_source(source)
    if isinstance(source, Path):
        artifacts.check_folder(source)
    model = RewardModel.load(
        source, dtype=dtype, device=device or default_device(), quantization=quantization
    )
    return CompletionScorer(model)

"""Episodes of the policy in an environment: it samples a turn, the environment answers, and so on.

Tokens that the policy has sampled stay as they are: a later turn continues them, and the update
trains them. The messages of the environment are tokenized by the chat template and appended. An
episode ends when

- the environment ends it,
- a turn has no end token within ``max_new_tokens``; the environment has answered it,
- it has ``max_turns`` turns, or
- fewer than ``max_new_tokens`` tokens are left of ``max_episode_tokens``.

Left out: calls of several environments at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config.online_rl import OnlineRL
from align.data.rows import Messages, Row
from align.errors import UserError
from align.models import tokenization
from align.models.conversations import Conversations
from align.models.files import position_limit
from align.online_rl.completions import Completions, Episode
from align.online_rl.draws import Draw
from align.online_rl.models import OnlineRLModels
from align.online_rl.sampling import Sampler
from align.rewards.environments import Environment, load_environment
from align.runtime.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Played:
    """Episodes as completions, and the rows that the rewards read."""

    completions: Completions
    rows: list[Row]
    """The rows of the prompts; their ``prompt`` is the conversation before the last turn."""


@dataclass(slots=True)
class _Episode:
    """An episode while it is played."""

    row: Row
    state: Any
    """The object of the user's class."""
    messages: Messages
    """The conversation before the next turn; at the end, before the last one."""
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    """All tokens behind the prompt."""
    logps: list[float] = field(default_factory=list)
    """The sampler's log-probabilities of the tokens, if it has them; 0 for the environment's."""
    turns: list[slice] = field(default_factory=list)
    reward: float = 0.0
    finished: bool = False
    """Whether the last turn ends with a stop token."""
    ended: bool = False
    """Whether the environment has ended the episode."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def add_turn(self, tokens: list[int], logps: list[float] | None, *, finished: bool) -> None:
        """Append a sampled turn."""
        self.turns.append(slice(len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens += tokens
        self.logps += logps or []
        self.finished = finished


@dataclass(frozen=True, slots=True)
class Player:
    """Plays episodes of the policy in an environment."""

    environment: Environment
    sampler: Sampler
    tokenizer: Any
    template: Conversations
    config: OnlineRL
    limit: int | None
    """Largest number of tokens of prompt and episode together; None without a limit."""

    def play(self, rows: Sequence[Row], draw: Draw) -> Played:
        """One episode for each row; those of one prompt begin in the same state.

        Raises:
            UserError: The environment fails, or a prompt leaves no space for a turn.
        """
        episodes = [self._reset(row, derive_seed(draw.seed, row["prompt_id"])) for row in rows]
        playing = list(enumerate(episodes))
        for turn in range(self.config.max_turns):
            sampled = self.sampler.generate(
                [[*episode.prompt, *episode.tokens] for _, episode in playing],
                seeds=draw.turn(turn, [row for row, _ in playing]),
            )
            logps: Sequence[list[float] | None]
            logps = sampled.sampler_logps or [None] * len(playing)
            turns = zip(playing, sampled.completions, logps, sampled.finished, strict=True)
            for (_, episode), tokens, token_logps, finished in turns:
                episode.add_turn(tokens, token_logps, finished=finished)
            is_last = turn + 1 == self.config.max_turns
            playing = [each for each in playing if self._continues(each[1], is_last)]
            if not playing:
                break
        return self._played(episodes)

    def _reset(self, row: Row, seed: int) -> _Episode:
        state, messages = self.environment.reset(row, seed=seed)
        (prompt,) = self.template.prompts([messages])
        if self.limit is not None and len(prompt) + self.config.max_new_tokens > self.limit:
            raise UserError(
                f"{self.environment.name}: the messages that `reset` returned have "
                f"{len(prompt)} tokens; with `max_new_tokens` ({self.config.max_new_tokens}) they "
                f"exceed the {self.limit} tokens of an episode; lower `max_new_tokens`, or raise "
                "`max_episode_tokens` up to the positions of the model"
            )
        return _Episode(row, state, messages, prompt)

    def _continues(self, episode: _Episode, is_last: bool) -> bool:
        """Let the environment answer the last turn of an episode; returns whether one follows."""
        text = self._text(episode)
        step = self.environment.step(episode.state, episode.row, text)
        episode.reward += step.reward
        episode.ended = step.ended
        if step.ended or is_last or not episode.finished:
            return False
        messages = [*episode.messages, *tokenization.assistant_turn(text), *step.messages]
        tokens = self.template.between_turns(messages)
        length = episode.length + len(tokens) + self.config.max_new_tokens
        if self.limit is not None and length > self.limit:
            return False
        episode.messages = messages
        episode.tokens += tokens
        episode.logps += [0.0] * len(tokens) if episode.logps else []
        return True

    def _text(self, episode: _Episode) -> str:
        """The text of the last turn, without its stop token; special tokens may be calls."""
        tokens = episode.tokens[episode.turns[-1]]
        return str(
            self.tokenizer.decode(
                tokens[:-1] if episode.finished else tokens,
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )

    def _played(self, episodes: Sequence[_Episode]) -> Played:
        completions = Completions(
            [episode.prompt for episode in episodes],
            [episode.tokens for episode in episodes],
            [episode.finished for episode in episodes],
            [e.logps for e in episodes] if all(e.logps for e in episodes) else None,
            [Episode(tuple(e.turns), e.reward, e.ended) for e in episodes],
        )
        return Played(completions, [{**e.row, "prompt": e.messages} for e in episodes])


def build_player(config: OnlineRL, sampler: Sampler, models: OnlineRLModels) -> Player | None:
    """A player whose episodes fit into the positions of the policy; None without an environment.

    Raises:
        UserError: The environment cannot be imported.
    """
    if config.environment is None:
        return None
    limits = [config.max_episode_tokens, position_limit(models.policy.model.config)]
    return Player(
        load_environment(config.environment),
        sampler,
        models.tokenizer,
        tokenization.conversations(models.tokenizer),
        config,
        min((limit for limit in limits if limit is not None), default=None),
    )

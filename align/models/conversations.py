"""Conversations as token ids, equal in every stage: one definition of a completion and of its end.

A row is the prompt as a policy reads it, including the header of the answer, then the completion as
a policy writes it, up to and including its end: the first end token, at which sampling stops. Text
that a template writes behind the end (ChatML writes a line feed) belongs to no row. Special tokens
within the text of a message become ordinary text.

Neither torch nor transformers is imported, so that ``align check`` counts tokens in a second.
:mod:`align.models.tokenization` applies this module to a tokenizer of transformers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.errors import UserError
from align.models import turn_fields
from align.models.chat_templates import BREAK, ChatTemplate, Message

REASONING = ("<think>", "</think>")
"""Tokens that a completion may contain although some templates write them too."""
MISSING_END_REPAIR = (
    "set `trainer: {eos_token: TOKEN}` in the `sft` stage to the token that ends a turn, or add it "
    "to `eos_token_id` in `generation_config.json`, or set `allow_missing_end_token: true`"
)
"""Repair of a template that writes no end token, in the stages that train on it."""
PLACEHOLDER = "AnswerPlaceholder"
"""A completion whose surroundings show what a template writes around a completion."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A prompt with a completion."""

    ids: list[int]
    start: int
    """Number of the prompt's tokens."""
    ended: bool
    """Whether the template ends the completion with an end token."""


@dataclass(frozen=True, slots=True)
class TrainedRow:
    """Token ids of a conversation, of which the turns of the assistant are trained."""

    ids: list[int]
    turns: tuple[tuple[int, int], ...]
    """The trained tokens: of each turn the first, and the one behind its end."""


@dataclass(frozen=True)
class Conversations:
    """A tokenizer with its chat template and its end tokens."""

    template: ChatTemplate
    encode_batch: Callable[[list[str]], list[list[int]]]
    """Token ids of texts that may contain special tokens; nothing is added."""
    ends: frozenset[int]
    """Tokens at which a policy stops: eos, and those of its ``generation_config.json``."""
    special_tokens: frozenset[str]
    """Texts of the special and the end tokens."""
    added_tokens: frozenset[str]
    """Texts of all tokens that are matched before the text is split into subwords."""

    @functools.cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Tokens that only the template may write: special ones, and those around a turn.

        The latter need not be special; in DeepSeek's tokenizers they are not.

        Raises:
            UserError: The template is malformed, or writes no content.
        """
        turns = [{"role": "user", "content": "User"}, {"role": "assistant", "content": "Assistant"}]
        try:
            text = self.template.render([*turns, turns[0]])
        except UserError:  # a template for a single turn
            text = self.template.render(turns[:1], add_generation_prompt=True)
        if "User" not in text:
            raise self.template.fault("does not write the user's text")
        framing = {t for t in self.added_tokens if t in text and not t.isspace()}
        tokens = (self.special_tokens | framing).difference(REASONING)
        longest_first = sorted(tokens, key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def contains_control_token(self, messages: Sequence[Message]) -> bool:
        """Whether the text of a message contains a special token, which is read as text."""
        return any(
            self.control_tokens.search(text)
            for message in messages
            for text in turn_fields.texts(message)
        )

    def prompts(
        self, prompts: Sequence[Sequence[Message]], *, tools: Any = None
    ) -> list[list[int]]:
        """Token ids of prompts, up to and including the header of the assistant's turn.

        Raises:
            UserError: The template fails.
        """
        texts = [
            self.template.render(self._mark(messages), add_generation_prompt=True, tools=tools)
            for messages in prompts
        ]
        rows = self._encode(texts)
        if not all(rows):
            raise self.template.fault("writes no prompt")
        return rows

    def rows(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[Sequence[Message]],
        *,
        tools: Any = None,
    ) -> list[TokenRow]:
        """Token ids of prompts with completions, which end with the completion.

        Raises:
            UserError: The template fails, or does not write a completion.
        """
        texts = []
        for prompt, completion in zip(prompts, completions, strict=True):
            marked, answer = self._mark(prompt), self._mark(completion)
            before = self.template.render(marked, add_generation_prompt=True, tools=tools)
            texts.append((before, self._completion_text(before, marked, answer, tools)))
        heads = self._encode([before for before, _ in texts])
        wholes = self._encode([before + text for before, text in texts])
        return [
            self._row(head, whole, text)
            for head, whole, (_, text) in zip(heads, wholes, texts, strict=True)
        ]

    def between_turns(self, conversation: Sequence[Message]) -> list[int]:
        """Token ids between the end of the last turn of the assistant and its next turn.

        They are the messages behind that turn, with the header of the next one. Of the turn itself
        only its place counts, so that sampled tokens stay as they are.

        Raises:
            UserError: The template fails, or does not write the turn.
        """
        place = max(k for k, turn in enumerate(conversation) if turn["role"] == "assistant")
        before, behind = conversation[:place], conversation[place + 1 :]
        content = PLACEHOLDER
        while any(content in text for turn in conversation for text in turn_fields.texts(turn)):
            content += "X"
        turns = self._mark([*before, _answer(content), *behind])
        whole = self.template.render(turns, add_generation_prompt=True)
        _, written, text = whole.rpartition(content)
        if not written:
            raise self.template.fault(f"omits turn {place + 1} (assistant)")
        ids = self._encode_behind(text)
        if not self.writes_end:
            return ids
        return ids[next((k for k, token in enumerate(ids, 1) if token in self.ends), 0) :]

    @functools.cached_property
    def writes_end(self) -> bool:
        """Whether the template ends a completion with a token at which a policy stops."""
        return self.end_of_turn().ended

    def trained_rows(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[Sequence[Message]],
        *,
        train_on: Literal["all", "last"],
        tools: Any = None,
    ) -> list[list[TrainedRow]]:
        """Token rows that train all turns of the assistant in each conversation, or the last one.

        A turn follows the tokens that a policy reads before it writes this turn, and ends with its
        end token. Where the row of a turn is the beginning of the next turn's prompt, one row
        trains both. A template that rewrites earlier turns, such as one that drops their reasoning,
        thus leads to several rows; the last one ends with the completion.

        Raises:
            UserError: The template fails, or does not write a turn.
        """
        contexts: list[Sequence[Message]] = []
        answers: list[Sequence[Message]] = []
        counts = []
        for prompt, completion in zip(prompts, completions, strict=True):
            earlier = trained_turns(prompt) if train_on == "all" else []
            contexts += [*(prompt[:k] for k in earlier), prompt]
            answers += [*(prompt[k : k + 1] for k in earlier), completion]
            counts.append(len(earlier) + 1)
        answers = [
            self._without_second_reasoning(*turn, tools)
            for turn in zip(contexts, answers, strict=True)
        ]
        rows = iter(self.rows(contexts, answers, tools=tools))
        return [_joined([next(rows) for _ in range(count)]) for count in counts]

    def _row(self, prompt: list[int], ids: list[int], text: str) -> TokenRow:
        """The row of a tokenized prompt and of prompt and completion, tokenized together."""
        start = len(prompt)
        if ids[:start] != prompt:  # tokens would merge across the boundary
            ids = prompt + self._encode_behind(text)
        end = next((k for k in range(start, len(ids)) if ids[k] in self.ends), None)
        return TokenRow(ids if end is None else ids[: end + 1], start, end is not None)

    def end_of_turn(self) -> TokenRow:
        """A short row, which shows how the template ends a completion."""
        return self.rows([[{"role": "user", "content": "User"}]], [[_answer("Assistant")]])[0]

    def check_end(self, *, repair: str) -> None:
        """Check that the template ends a completion with a token at which a policy stops.

        Raises:
            UserError: It does not, so a policy trained on its rows would not stop; ``repair`` is
                the rest of the message.
        """
        if not self.writes_end:
            turn = self.template.render(
                [{"role": "user", "content": "User"}, _answer(PLACEHOLDER)]
            ).rpartition(PLACEHOLDER)[2]
            written = f"{turn!r}, which is no end token" if turn else "nothing"
            raise UserError(
                f"{self.template.name}: its chat template ends a completion with {written}, so a "
                f"policy trained on it does not learn to stop; {repair}"
            )

    def _completion_text(
        self, before: str, prompt: list[Message], completion: list[Message], tools: Any
    ) -> str:
        """What a policy writes behind the text ``before``, and what the template writes behind it.

        Usually this is how the template continues ``before``. Some templates write the header of a
        finished turn differently (without the ``<think>`` of the generation prompt), or leave out a
        part of the completion (its reasoning). Then the completion is taken as it is. What the
        template writes between ``before`` and the completion, such as a space, a policy writes too:
        it is not written twice if a sampled completion begins with it.
        """
        written = str(completion[-1].get("content") or "")
        content = written.strip()
        whole = self.template.render([*prompt, *completion], tools=tools)
        if turn_fields.has_more_than_text(completion[-1]):
            return self._text_with_fields(before, whole, prompt, completion[-1], tools)
        if whole.startswith(before) and content in whole[len(before) :]:
            text = whole[len(before) :]
            lead = text[: text.find(written)] if written in text else ""
            return text[len(lead) :] if written.startswith(lead) else text
        framed = self.template.render(
            [*prompt, *completion[:-1], {**completion[-1], "content": PLACEHOLDER}], tools=tools
        )
        head, placeholder, tail = framed.rpartition(PLACEHOLDER)
        if not placeholder:
            raise self.template.fault("does not write the completion")
        header = _common_prefix(before, self.template.render(prompt, tools=tools))
        shared = _common_prefix(before, head)
        # What a finished turn writes before its text, behind the header, such as empty reasoning.
        lead = head[shared:] if shared >= header else _behind_prompt(before, head, prompt)
        text = content + tail
        if whole.startswith(head) and content in whole[len(head) :]:
            text = whole[len(head) :]
            text = text if lead and text.startswith(lead) else lead + text
        opening = REASONING[0]
        if before.rstrip().endswith(opening) and text.startswith(opening):
            text = text.removeprefix(opening).lstrip("\n")  # the header has begun the reasoning
        return text

    def _text_with_fields(
        self, before: str, whole: str, prompt: list[Message], completion: Message, tools: Any
    ) -> str:
        """What a policy writes behind ``before`` if its turn has tool calls or reasoning.

        The generation prompt may begin with reasoning that a finished turn does not write; tool
        calls then follow it directly. It must not end the reasoning of a completion that has some.
        Both may begin with the same character behind the header, such as ``<``: the header is what
        ``before`` shares with a turn that has a text only.
        """
        if whole.startswith(before):
            return whole[len(before) :]
        plain = {"role": completion["role"], "content": PLACEHOLDER}
        shared = _common_prefix(before, self.template.render([*prompt, plain], tools=tools))
        header = _common_prefix(before, self.template.render(prompt, tools=tools))
        begun = before[shared:].strip() and turn_fields.has_reasoning([completion])
        if shared < header or begun or not whole.startswith(before[:shared]):
            raise self._begins_otherwise(before[header:])
        return whole[shared:]

    def _without_second_reasoning(
        self, prompt: Sequence[Message], completion: Sequence[Message], tools: Any
    ) -> Sequence[Message]:
        """A completion without empty reasoning in its text, if its prompt ends the reasoning.

        Sampled completions are not changed: their tokens are those that the policy has written.

        Raises:
            UserError: The reasoning in its text is not empty.
        """
        opening, closing = REASONING
        content = str(completion[-1].get("content") or "").lstrip()
        if not content.startswith(opening):
            return completion
        marked = self._mark(prompt)
        before = self.template.render(marked, add_generation_prompt=True, tools=tools)
        header = before[_common_prefix(before, self.template.render(marked, tools=tools)) :]
        if not header.rstrip().endswith(closing):
            return completion
        reasoning, _, rest = content.removeprefix(opening).partition(closing)
        if reasoning.strip():
            raise self._begins_otherwise(header)
        return [*completion[:-1], {**completion[-1], "content": rest.lstrip()}]

    def _begins_otherwise(self, header: str) -> UserError:
        return self.template.fault(
            f"writes other text before sampling, {header!r}, than before a turn with tool calls or "
            "reasoning"
        )

    def _mark(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with a break within each special token of their texts."""
        return [turn_fields.with_texts(message, self._mark_text) for message in messages]

    def _mark_text(self, text: str) -> str:
        place = 0
        while match := self.control_tokens.search(text, place):
            place = match.start() + 1
            text = f"{text[:place]}{BREAK}{text[place:]}"
        return text

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts; no token crosses a break."""
        starts = [text.partition(BREAK)[0] for text in texts]
        rows = self.encode_batch(starts) if starts else []
        for k, text in enumerate(texts):
            for piece in text.split(BREAK)[1:]:
                rows[k] = rows[k] + self._encode_behind(piece)
        return rows

    def _encode_behind(self, text: str) -> list[int]:
        """Token ids of a text that continues another one.

        SentencePiece writes a space before the first word of a text, but not behind a line feed.
        """
        if BREAK in text:
            first, _, others = text.partition(BREAK)
            return self._encode_behind(first) + self._encode_behind(others)
        if not text:
            return []
        line_feed, ids, alone = self.encode_batch(["\n", f"\n{text}", text])
        return ids[len(line_feed) :] if ids[: len(line_feed)] == line_feed else alone


def trained_turns(prompt: Sequence[Message]) -> list[int]:
    """Indices of the assistant's turns in a prompt, without those excluded from training."""
    return [
        k
        for k, turn in enumerate(prompt)
        if turn["role"] == "assistant" and not turn.get(turn_fields.UNTRAINED)
    ]


def _joined(rows: Sequence[TokenRow]) -> list[TrainedRow]:
    """The rows of the turns of a conversation; a row that begins the next prompt is part of it."""
    joined: list[TrainedRow] = []
    for row in rows:
        turns = [(row.start, len(row.ids))]
        if joined and joined[-1].ids == row.ids[: row.start][: len(joined[-1].ids)]:
            turns = [*joined.pop().turns, *turns]
        joined.append(TrainedRow(row.ids, tuple(turns)))
    return joined


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _behind_prompt(before: str, head: str, prompt: Sequence[Message]) -> str:
    """What a template writes between a header and an answer where it rewrites the prompt.

    ``before`` is the prompt with the header, ``head`` the same in front of a finished answer.
    Mistral's template writes the system turn into the last user turn only while no answer follows.
    """
    last = str(prompt[-1].get("content") or "").strip() if prompt else ""
    header = before[before.rfind(last) :]
    place = head.rfind(header) if last in before else -1
    return head[place + len(header) :] if last and place >= 0 else ""


def _common_prefix(first: str, second: str) -> int:
    return next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )

"""A language model behind an API that compares two completions.

Requests are sent at the same time, up to a limit; verdicts are stored as they arrive
(:mod:`align.judges.server_cache`), so an interrupted evaluation sends no request twice. A request
that fails gives no verdict. If many fail in a row, or the server accepts no request at all, the
evaluation ends; what was answered stays in the cache.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from align.config.judges import ServerJudge
from align.errors import UserError
from align.judges import chat_client, verdicts
from align.judges.base import Pair, Usage, Verdict
from align.judges.chat_client import ChatClient, RequestFailedError
from align.judges.judge_prompt import JudgePrompt
from align.judges.rubric import read_rubric
from align.judges.server_cache import (
    StoredVerdict,
    VerdictCache,
    question_key,
    stored_preference,
)
from align.runtime import distributed

FAILURES_AT_THE_START = 3
"""Failed requests in a row after which a server that has not answered yet is given up."""
FAILURES_IN_A_ROW = 10
"""Failed requests in a row after which a server is given up."""


@dataclass(frozen=True, slots=True)
class _Question:
    """One request: its body, and the key of its answer in the cache."""

    key: str
    body: dict[str, Any]


class LanguageModelJudge:
    """Compares completions with a language model. It is a ``PairJudge``."""

    reads_in_order: ClassVar[bool] = True
    covers_all: ClassVar[bool] = True

    def __init__(
        self,
        config: ServerJudge,
        *,
        cache: Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Read the prompt, the rubric and the API key; no request is sent.

        ``cache`` is the file of verdicts; ``progress`` is called with the verdicts that are done
        and their total.

        Raises:
            UserError: A file cannot be used, or the variable with the API key is not set.
        """
        self.name = config.name
        self._server = config.api
        self._rubric = None if config.rubric is None else read_rubric(Path(config.rubric))
        template = None if config.api.prompt is None else Path(config.api.prompt)
        self._prompt = JudgePrompt(template, with_criterion=self._rubric is not None)
        # Only the main process sends requests; others may run where the variable is not set.
        key = chat_client.read_key(config.api.key_variable) if distributed.is_main() else None
        self._client = ChatClient(config.api, key)
        self._cache = VerdictCache(cache)
        self._cache.read()  # a file that cannot be used is an error before anything is sampled
        self._progress = progress
        self._used: dict[str, StoredVerdict] = {}
        self._cached: dict[str, StoredVerdict] = {}
        self._failures_in_a_row = 0

    @property
    def usage(self) -> Usage:
        """The requests of this process with their tokens, and those that the cache saved."""
        cached = self._cached.values()
        saved_in = sum(verdict.input_tokens for verdict in cached)
        saved_out = sum(verdict.output_tokens for verdict in cached)
        tokens_in = sum(verdict.input_tokens for verdict in self._used.values()) - saved_in
        tokens_out = sum(verdict.output_tokens for verdict in self._used.values()) - saved_out
        cost = None
        if self._server.input_price is not None and self._server.output_price is not None:
            prices = (self._server.input_price, self._server.output_price)
            cost = (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6
        return Usage(
            requests=self._client.n_requests,
            cached=len(cached),
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            cached_input_tokens=saved_in,
            cached_output_tokens=saved_out,
            cost=cost,
        )

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in the given order.

        Raises:
            UserError: The server accepts no requests, or many have failed in a row.
        """
        questions = [self._questions(pair) for pair in pairs]
        by_key = {q.key: q for repeats in questions for row in repeats for q in row}
        stored = self._cache.read()
        found = {key: stored[key] for key in by_key if key in stored}
        self._cached |= {key: found[key] for key in found.keys() - self._used.keys()}
        self._used |= found
        self._client.answered |= bool(found)
        missing = [question for key, question in by_key.items() if key not in found]
        self._progress(len(found), len(by_key))
        failed = (
            chat_client.run(functools.partial(self._ask_all, missing, len(found)))
            if missing
            else {}
        )

        def verdict_of(question: _Question) -> Verdict:
            answer = self._used.get(question.key)
            if answer is None:
                return failed[question.key]
            if answer.preference is None:
                place = f" (stored in {self._cache.path})" if question.key in found else ""
                return verdicts.no_verdict(answer.reason + place)
            return Verdict(answer.preference, answer.reason)

        return [
            _mean([self._combine([verdict_of(q) for q in row]) for row in repeats])
            for repeats in questions
        ]

    def _questions(self, pair: Pair) -> list[list[_Question]]:
        """The questions about a pair: a list for each repeat, with one for each criterion."""
        criteria = [each.question for each in self._rubric.criteria] if self._rubric else [None]
        bodies = [self._body(pair, criterion) for criterion in criteria]
        return [
            [
                _Question(
                    question_key(
                        {"body": body, "repeat": repeat, "parser": verdicts.PARSER_VERSION}
                    ),
                    body,
                )
                for body in bodies
            ]
            for repeat in range(self._server.n_verdicts)
        ]

    def _body(self, pair: Pair, criterion: str | None) -> dict[str, Any]:
        """The body of a request."""
        body = {
            "model": self._server.model,
            "messages": self._prompt.render(pair, criterion),
            "temperature": self._server.temperature,
            "max_tokens": self._server.max_tokens,
            "stream": False,
            "response_format": verdicts.response_format(self._server.structured_output),
            **self._server.extra_body,
        }
        return {key: value for key, value in body.items() if value is not None}

    def _combine(self, row: Sequence[Verdict]) -> Verdict:
        """One verdict from those about the criteria."""
        if self._rubric is None:
            return row[0]
        names = [criterion.name for criterion in self._rubric.criteria]
        return self._rubric.combine(dict(zip(names, row, strict=True)))

    async def _ask_all(self, questions: Sequence[_Question], n_found: int) -> dict[str, Verdict]:
        """Send all questions and store the answers; the failed ones with their reasons.

        Until one is answered, the first ones are sent one by one, so that a wrong key or model
        costs few requests.
        """
        failed: dict[str, Verdict] = {}
        n_done = n_found
        waiting = iter(questions)

        async def work(share: Iterator[_Question]) -> None:
            nonlocal n_done
            for question in share:
                verdict = await self._ask(question, len(questions))
                if verdict is not None:
                    failed[question.key] = verdict
                n_done += 1
                self._progress(n_done, n_found + len(questions))

        async with self._client:
            for _ in range(FAILURES_AT_THE_START):
                if self._client.answered:
                    break
                await work(itertools.islice(waiting, 1))
            await asyncio.gather(*(work(waiting) for _ in range(self._server.concurrency)))
        return failed

    async def _ask(self, question: _Question, n_questions: int) -> Verdict | None:
        """Send one of ``n_questions`` and store the answer; the verdict with the reason if not."""
        try:
            answer = await self._client.complete(question.body)
        except RequestFailedError as error:
            self._count_failure(error, n_questions)
            return verdicts.no_verdict(error.reason)
        self._failures_in_a_row = 0
        verdict = verdicts.read_choice(answer.choice, max_tokens=self._server.max_tokens)
        if verdict.reason == verdicts.NO_TEXT:  # of a server that is ill, not of a judge
            return verdict
        stored = StoredVerdict(
            stored_preference(verdict.preference),
            self._client.redact.remove(verdict.reason),
            answer.input_tokens,
            answer.output_tokens,
        )
        self._used[question.key] = stored
        self._cache.write(question.key, stored)
        return None

    def _count_failure(self, error: RequestFailedError, n_questions: int) -> None:
        """End the evaluation if the server cannot be reached, or answers nothing.

        A request that the server refuses for its own content is no failure of the server.

        Raises:
            UserError: It is so.
        """
        if not error.again and error.reached and (self._client.answered or not error.repair):
            return
        if self._client.answered:
            limit = FAILURES_IN_A_ROW
        else:
            limit = FAILURES_AT_THE_START if error.reached else 1
            limit = min(limit, n_questions) if error.repair else limit
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= limit:
            count = self._failures_in_a_row
            repair = error.repair or "run it again when the server answers"
            raise UserError(
                f"{self._client.url}: {count} requests in a row failed, the last one: "
                f"{error.reason}; answers so far are stored: {repair}"
            )


def _mean(repeats: Sequence[Verdict]) -> Verdict:
    """The mean of repeated verdicts, without those that are missing."""
    if len(repeats) == 1:
        return repeats[0]
    valid = [verdict for verdict in repeats if verdict.is_valid]
    if not valid:
        return repeats[0]
    votes = tuple(verdict.preference for verdict in valid)
    criteria = None
    if valid[0].criteria is not None:
        criteria = {
            name: sum(verdict.criteria[name] for verdict in valid if verdict.criteria) / len(valid)
            for name in valid[0].criteria
        }
    return Verdict(sum(votes) / len(votes), valid[0].reason, criteria, votes)

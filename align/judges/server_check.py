"""What can be known about a judge behind an API before a completion is sent.

The files, the API key and the server are checked. The server is asked for its list of models, which
costs nothing. Nothing here loads torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from align.config.judges import ServerJudge
from align.errors import UserError, nearest
from align.judges.chat_client import ChatClient, RequestFailedError, read_key, run
from align.judges.judge_prompt import JudgePrompt
from align.judges.rubric import read_rubric


def count_requests(judge: ServerJudge, n_pairs: int) -> int:
    """Requests for ``n_pairs`` pairs in both orders, without further attempts.

    Raises:
        UserError: The rubric cannot be used.
    """
    n_criteria = len(read_rubric(Path(judge.rubric)).criteria) if judge.rubric else 1
    return 2 * n_pairs * n_criteria * judge.api.n_verdicts


def check_judge(judge: ServerJudge) -> Iterator[str]:
    """Check the files, the API key and the server of a judge; yield warnings.

    Raises:
        UserError: One line for each error.
    """
    lines: list[str] = []
    try:
        if judge.rubric is not None:
            read_rubric(Path(judge.rubric))
    except UserError as error:
        lines += [f"rubric: {line}" for line in error.lines]
    try:
        template = None if judge.api.prompt is None else Path(judge.api.prompt)
        JudgePrompt(template, with_criterion=judge.rubric is not None)
    except UserError as error:
        lines += [f"api.prompt: {line}" for line in error.lines]
    models: list[str] = []
    try:
        client = ChatClient(judge.api, read_key(judge.api.key_variable))
        models = run(functools.partial(_list_models, client))
    except UserError as error:
        lines += error.lines
    except RequestFailedError as error:
        lines.append(
            f"{judge.api.base_url}: no server answers ({error.reason}); start it, or correct "
            "`base_url`"
        )
    if lines:
        raise UserError(*lines)
    if models and judge.api.model not in models:
        # Some servers load a model that they do not list, so this is no error.
        yield (
            f"{judge.api.base_url}: the server lists no model `{judge.api.model}`"
            f"{nearest(judge.api.model, models)}"
        )


async def _list_models(client: ChatClient) -> list[str]:
    async with client:
        return await client.list_models()

"""Public data sets: convert a raw row to raw pairs or demonstrations.

A raw pair has ``prompt``, ``chosen``, ``rejected`` and ``margin``. Supported are UltraFeedback
(several scored completions), SHP (votes), TL;DR (a choice between two summaries), OpenAssistant
(trees with ranked replies), GSM8K and its labeled solutions. One row gives any number of pairs and
of reasons to drop it. The texts themselves are checked by :mod:`align.data.formats`. Not supported:
UltraFeedback's scores of single aspects, TL;DR's axis evaluations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from align.data.annotated_pairs import majority
from align.data.pairing import PairingOptions, PairsOrDrops, Scored, pair_completions, raw_pair
from align.data.rows import DroppedError, Messages, Raw

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_LAST_LINE = re.compile(r"\nA: ([^\n]*)\Z")
SCORES = ("overall_score", "fine-grained_score", "score", "rating")


def ultrafeedback(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """Pair the completions of ``instruction`` by their scores.

    The first of ``SCORES`` that all completions have is used, so that a row has one scale.
    """
    completions = raw.get("completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        yield DroppedError("completions are not a list of objects")
        return
    texts = [completion.get("response", completion.get("text")) for completion in completions]
    yield from (DroppedError("completion without text") for text in texts if text is None)
    usable = [(c, text) for c, text in zip(completions, texts, strict=True) if text is not None]
    for name in SCORES:
        scores = [(as_number(completion.get(name)), text) for completion, text in usable]
        scored = [Scored(score, text) for score, text in scores if score is not None]
        if len(scored) == len(usable):
            yield from pair_completions(raw.get("instruction"), scored, options)
            return
    yield DroppedError("completions have no score in common")


def shp(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """Pair two answers to ``history`` by their votes; ``labels`` is 1 if answer A is preferred."""
    label, votes = raw.get("labels"), [as_number(raw.get(name)) for name in ("score_A", "score_B")]
    if label not in (0, 1):
        yield DroppedError("label is not 0 or 1")
        return
    if votes[0] is None or votes[1] is None:
        yield DroppedError("a score is missing")
        return
    answers = raw.get("human_ref_A"), raw.get("human_ref_B")
    best, worst = (0, 1) if label == 1 else (1, 0)
    high, low = votes[best] or 0.0, votes[worst] or 0.0
    if high < low:
        yield DroppedError("the label contradicts the scores")
    elif high < options.ratio * max(low, 1.0):
        yield DroppedError("ratio of scores below the threshold")
    else:
        yield raw_pair(raw.get("history"), answers[best], answers[worst], high - low)


def tldr(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """Pair two summaries of a Reddit post by ``choice``."""
    info, summaries, choice = raw.get("info"), raw.get("summaries"), raw.get("choice")
    if not isinstance(info, dict) or not isinstance(info.get("post"), str):
        yield DroppedError("no post")
    elif not isinstance(summaries, list) or len(summaries) != 2:
        yield DroppedError("not two summaries")
    elif choice not in (0, 1) or not all(isinstance(s, dict) for s in summaries):
        yield DroppedError("choice is not 0 or 1")
    else:
        head = [f"SUBREDDIT: r/{info['subreddit']}"] if info.get("subreddit") else []
        head += [f"TITLE: {info['title']}"] if info.get("title") else []
        prompt = "\n\n".join([*head, f"POST: {info['post']}", "TL;DR:"])
        best = int(choice)  # CSV and pandas have 1.0
        yield raw_pair(prompt, summaries[best].get("text"), summaries[1 - best].get("text"), None)


def oasst(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """Pair the ranked replies to every user message of a tree; rank 0 is the best.

    ``prompt`` is the root of the tree.
    """
    root = raw.get("prompt")
    if not isinstance(root, dict):
        yield root if isinstance(root, DroppedError) else DroppedError("no tree of messages")
        return
    has_user_message = False
    pending: list[tuple[Raw, Messages]] = [(root, [])]
    while pending:
        message, before = pending.pop()
        role = {"prompter": "user"}.get(str(message.get("role")), message.get("role"))
        turns: list[Any] = [*before, {"role": role, "content": message.get("text")}]
        below = message.get("replies") or []
        if not isinstance(below, list):
            has_user_message = True
            yield DroppedError("replies are not a list")
            continue
        replies = [r for r in below if isinstance(r, dict) and not r.get("deleted")]
        pending += [(reply, turns) for reply in reversed(replies)]
        if role != "user":
            continue
        has_user_message = True
        if options.languages and message.get("lang") not in options.languages:
            yield DroppedError("another language")
            continue
        ranks = [(as_number(reply.get("rank")), reply.get("text")) for reply in replies]
        scored = [Scored(-rank, text) for rank, text in ranks if rank is not None]
        yield from pair_completions(turns, scored, options)
    if not has_user_message:
        yield DroppedError("no user's message in the tree")


def gsm8k(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """A demonstration of GSM8K (arXiv:2110.14168), without calculator annotations ``<<48/2=24>>``.

    The final answer follows ``####`` in the last line.
    """
    answer = raw.get("answer")
    if not isinstance(answer, str) or "####" not in answer:
        yield DroppedError("no final answer behind ####")
    else:
        yield {"prompt": raw.get("question"), "completion": _ANNOTATION.sub("", answer)}


def gsm8k_solutions(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """Pair the correct with the wrong solutions of models to a question of GSM8K.

    Each value with ``solution`` and ``is_correct`` is a solution. Calculator annotations are
    removed, and a last line ``A: 18`` becomes ``#### 18`` as in GSM8K's answers. ``answer`` of a
    pair is the reference solution.
    """
    solutions = [v for v in raw.values() if isinstance(v, dict) and "solution" in v]
    if not all(isinstance(s["solution"], str) for s in solutions):
        yield DroppedError("a solution is not text")
        return
    if not all(isinstance(s.get("is_correct"), bool) for s in solutions):
        yield DroppedError("is_correct is not true or false")
        return
    scored = [Scored(float(s["is_correct"]), _as_answer(s["solution"])) for s in solutions]
    answer = _as_answer(str(raw.get("ground_truth")))
    for each in pair_completions(raw.get("question"), scored, options):
        yield each if isinstance(each, DroppedError) else {**each, "answer": answer, "margin": None}


def _as_answer(solution: str) -> str:
    """A solution as GSM8K's answers are written."""
    return _LAST_LINE.sub(r"\n#### \1", _ANNOTATION.sub("", solution))


def trees(messages: Iterator[Raw]) -> Iterator[Raw]:
    """Convert flat messages to one row per tree, in the order of the roots.

    Rows that are trees are passed through. All flat messages are held in memory, because a reply
    may precede its parent. After the trees, each message that belongs to no tree becomes a row with
    a reason instead of a tree, so that it is counted. If a parent is missing, its direct replies
    are counted, further descendants are not.
    """
    nodes: dict[Any, Raw] = {}
    problems: list[DroppedError] = []
    for number, message in enumerate(messages, 1):
        place = f"row {number}"
        if "message_id" not in message or isinstance(message.get("prompt"), dict):
            yield message
        elif not isinstance(message["message_id"], (str, int)):
            problems.append(DroppedError("message_id is not a text or a number", place=place))
        elif not isinstance(message.get("parent_id"), (str, int, type(None))):
            problems.append(DroppedError("parent_id is not a text or a number", place=place))
        elif message["message_id"] in nodes:
            problems.append(DroppedError("repeated message_id", place=place))
        else:
            nodes[message["message_id"]] = {**message, "replies": []}
    tops = []
    for node in nodes.values():
        parent = node.get("parent_id")
        if parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            tops.append(node)
            if parent is not None:
                place = f"message `{str(node['message_id'])[:40]}`"
                problems.append(DroppedError("no tree of messages", place=place))
    yield from ({**node, "prompt": node} for node in tops if node.get("parent_id") is None)
    n_reached, level = 0, tops
    while level:
        n_reached += len(level)
        level = [reply for node in level for reply in node["replies"]]
    problems += [DroppedError("parents go round in a circle")] * (len(nodes) - n_reached)
    yield from ({"prompt": problem} for problem in problems)


def as_number(value: object) -> float | None:
    """A finite number, also from text; None for anything else."""
    try:
        number = float(value)  # type: ignore[arg-type]  # UltraFeedback has "7.5"
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


PUBLIC_FORMATS: Mapping[str, Callable[[Raw, PairingOptions], PairsOrDrops]] = {
    "annotations": majority,
    "ultrafeedback": ultrafeedback,
    "shp": shp,
    "tldr": tldr,
    "oasst": oasst,
    "gsm8k": gsm8k,
    "gsm8k_solutions": gsm8k_solutions,
}

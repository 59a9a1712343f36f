"""Comparisons as public sets word them: a raw row in, rows with ``prompt``, ``chosen``, ``rejected`` out.

UltraFeedback (several scored completions), SHP (votes), TL;DR (a choice of two summaries), OpenAssistant (trees whose
siblings are ranked). A row may give several pairs, or a reason to drop it. What the texts must be is checked by
:mod:`align.data.formats`. Left out: UltraFeedback's single aspects, TL;DR's axis evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from align.data.pairing import PairingOptions, PairsOrDrops, as_number, raw_pair, scored_pairs
from align.data.rows import DroppedError, Raw

SCORES = ("overall_score", "fine-grained_score", "score", "rating")


def ultrafeedback(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """Pair the completions of ``instruction`` by the first of ``SCORES`` that all of them have: one scale a row."""
    completions = raw.get("completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        yield DroppedError("completions are not a list of objects")
        return
    texts = [completion.get("response", completion.get("text")) for completion in completions]
    yield from (DroppedError("completion without text") for text in texts if text is None)
    told = [(c, text) for c, text in zip(completions, texts, strict=True) if text is not None]
    for name in SCORES:
        scores = [(as_number(completion.get(name)), text) for completion, text in told]
        scored = [(score, text) for score, text in scores if score is not None]
        if len(scored) == len(told):
            yield from scored_pairs(raw.get("instruction"), scored, options)
            return
    yield DroppedError("completions have no score in common")


def shp(raw: Raw, options: PairingOptions) -> PairsOrDrops:
    """Pair two answers to ``history`` by their votes: ``labels`` is 1 where A is preferred."""
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
    """Pair two summaries of a post of Reddit by ``choice``."""
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
    """Pair the ranked replies below every user's message of a tree (``prompt`` holds its root); rank 0 is best."""
    root = raw.get("prompt")
    if not isinstance(root, dict):
        yield root if isinstance(root, DroppedError) else DroppedError("no tree of messages")
        return
    asked = False
    waiting: list[tuple[Raw, list[dict[str, Any]]]] = [(root, [])]
    while waiting:
        message, before = waiting.pop()
        role = {"prompter": "user"}.get(str(message.get("role")), message.get("role"))
        turns = [*before, {"role": role, "content": message.get("text")}]
        below = message.get("replies") or []
        if not isinstance(below, list):
            asked = True
            yield DroppedError("replies are not a list")
            continue
        replies = [r for r in below if isinstance(r, dict) and not r.get("deleted")]
        waiting += [(reply, turns) for reply in reversed(replies)]
        if role != "user":
            continue
        asked = True
        if options.languages and message.get("lang") not in options.languages:
            yield DroppedError("another language")
            continue
        ranks = [(as_number(reply.get("rank")), reply.get("text")) for reply in replies]
        yield from scored_pairs(turns, [(-r, text) for r, text in ranks if r is not None], options)
    if not asked:
        yield DroppedError("no user's message in the tree")


def trees(messages: Iterator[Raw]) -> Iterator[Raw]:
    """Turn flat messages into one row a tree, in the order of the roots; rows that are trees already pass.

    All flat messages are held in memory: a child may stand anywhere. Behind the trees, each message that is in none of
    them becomes a row with the reason in place of a tree, so that it is counted; of a missing parent's descendants only
    its children do.
    """
    nodes: dict[Any, Raw] = {}
    faults: list[DroppedError] = []
    for message in messages:
        if "message_id" not in message or isinstance(message.get("prompt"), dict):
            yield message
        elif not isinstance(message["message_id"], (str, int)):
            faults.append(DroppedError("message_id is not a text or a number"))
        elif not isinstance(message.get("parent_id"), (str, int, type(None))):
            faults.append(DroppedError("parent_id is not a text or a number"))
        elif message["message_id"] in nodes:
            faults.append(DroppedError("repeated message_id"))
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
                faults.append(DroppedError("no tree of messages"))
    yield from ({**node, "prompt": node} for node in tops if node.get("parent_id") is None)
    reached, waiting = 0, tops
    while waiting:
        reached += len(waiting)
        waiting = [reply for node in waiting for reply in node["replies"]]
    faults += [DroppedError("parents go round in a circle")] * (len(nodes) - reached)
    yield from ({"prompt": fault} for fault in faults)


PUBLIC_FORMATS: Mapping[str, Callable[[Raw, PairingOptions], PairsOrDrops]] = {
    "ultrafeedback": ultrafeedback,
    "shp": shp,
    "tldr": tldr,
    "oasst": oasst,
}

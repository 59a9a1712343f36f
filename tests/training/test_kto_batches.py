"""Order, KL partners and weights of labeled completions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from align.errors import UserError
from align.training import kto_batches, label_counts


def pairs(prompts: Sequence[int]) -> tuple[list[bool], list[int]]:
    """Labels and prompts of pairs as TRL unpairs them: all chosen, then all rejected."""
    return [True] * len(prompts) + [False] * len(prompts), [*prompts, *prompts]


def batches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


RANDOM = random.Random(0)
MIXES = [
    pytest.param(*pairs(range(40)), 8, id="pairs, one per prompt"),
    pytest.param(*pairs([i // 3 for i in range(60)]), 16, id="pairs, three per prompt"),
    pytest.param(*pairs(range(7)), 2, id="pairs in batches of two"),
    pytest.param(*pairs(range(23)), 5, id="pairs in batches of an odd size"),
    pytest.param(*pairs([0, 0, 0, 0, 1, 1, 1, 1]), 4, id="two prompts"),
    pytest.param(*pairs([0] * 10 + list(range(1, 31))), 6, id="one prompt with many pairs"),
    pytest.param([i % 5 == 0 for i in range(200)], list(range(200)), 16, id="a fifth desirable"),
    pytest.param(
        [RANDOM.random() < 0.7 for _ in range(333)],
        [RANDOM.randrange(60) for _ in range(333)],
        12,
        id="unpaired, several per prompt",
    ),
    pytest.param([True, False, True, False], [0, 1, 2, 3], 32, id="less than a batch"),
]


@pytest.mark.parametrize(("labels", "prompts", "size"), MIXES)
def test_every_batch_has_both_labels_in_proportion_and_no_prompt_in_more_than_half(
    labels, prompts, size
):
    share = sum(labels) / len(labels)
    for epoch in range(5):
        order = kto_batches.interleaved(labels, prompts, batch_size=size, seed=3, epoch=epoch)
        for batch in batches(order, size):
            desirable = sum(labels[row] for row in batch)
            assert 0 < desirable < len(batch)
            assert abs(desirable - share * len(batch)) <= 1.5
            assert 2 * max(Counter(prompts[row] for row in batch).values()) <= len(batch)


@pytest.mark.parametrize(("labels", "prompts", "size"), MIXES)
def test_every_row_is_seen_and_fewer_than_a_batch_twice(labels, prompts, size):
    order = kto_batches.interleaved(labels, prompts, batch_size=size, seed=3, epoch=1)
    seen = Counter(order)
    assert seen.keys() == set(range(len(labels)))
    assert max(seen.values()) <= 2
    assert len(order) - len(labels) < size
    assert len(order) % size == 0 or len(order) == len(labels) < size


def test_only_the_last_batch_of_an_epoch_needs_repair(monkeypatch):
    # the repair searches all batches, so it must remain an exception
    monkeypatch.setattr(kto_batches, "_repair", lambda *_: None)
    labels, prompts = pairs(range(400))
    order = kto_batches.interleaved(labels, prompts, batch_size=2, seed=0, epoch=0)
    invalid = [place for place, (a, b) in enumerate(batches(order, 2)) if prompts[a] == prompts[b]]
    assert invalid in ([], [399])


def test_both_sides_of_a_pair_go_to_one_batch():
    labels, prompts = pairs(range(80))
    order = kto_batches.interleaved(labels, prompts, batch_size=8, seed=0, epoch=0)
    for batch in batches(order, 8):
        assert sorted(Counter(prompts[row] for row in batch).values()) == [2, 2, 2, 2]


def test_the_order_depends_on_seed_and_epoch():
    labels, prompts = pairs(range(40))

    def order(**changes: int) -> list[int]:
        options = {"batch_size": 8, "seed": 1, "epoch": 2} | changes
        return kto_batches.interleaved(labels, prompts, **options)

    assert order() == order()
    orders = [order(), order(epoch=3), order(seed=2), order(seed=12, epoch=0), order(seed=1, epoch=20)]  # fmt: skip
    assert len({tuple(each) for each in orders}) == 5
    # prompts that share a batch in one epoch do not share one in the next
    together = [{frozenset(prompts[r] for r in b) for b in batches(o, 8)} for o in orders[:2]]
    assert not together[0] & together[1]


def test_rows_that_fill_the_last_batch_differ_between_epochs():
    labels, prompts = pairs(range(21))  # 42 rows in batches of 8: 6 are seen twice
    twice = []
    for epoch in range(4):
        order = kto_batches.interleaved(labels, prompts, batch_size=8, seed=0, epoch=epoch)
        twice.append(frozenset(row for row, n in Counter(order).items() if n == 2))
    assert [len(rows) for rows in twice] == [6] * 4
    assert len(set(twice)) == 4


@pytest.mark.parametrize(
    ("labels", "prompts", "size", "message"),
    [
        pytest.param([True] * 8, range(8), 4, "no completion is undesirable", id="one label"),
        pytest.param([False] * 8, range(8), 4, "no completion is desirable", id="the other"),
        pytest.param([True] * 3 + [False] * 97, range(100), 10,
                     r"3 desirable of 100 completions are not enough for 10 batches.*to 34 or more", id="too few"),
        pytest.param([True, False] * 4, [0] * 8, 4, "one prompt has more than half", id="one prompt"),
    ],
)  # fmt: skip
def test_labels_that_give_no_valid_batches_are_a_user_error(labels, prompts, size, message):
    with pytest.raises(UserError, match=message):
        kto_batches.interleaved(labels, list(prompts), batch_size=size, seed=0, epoch=0)


def test_the_suggested_batch_size_is_the_smallest_that_works():
    labels = [True] * 3 + [False] * 97
    with pytest.raises(UserError):
        label_counts.check_label_counts(3, 97, batch_size=33)
    for epoch in range(3):
        kto_batches.interleaved(labels, list(range(100)), batch_size=34, seed=0, epoch=epoch)


# Partners


def test_if_all_prompts_differ_the_partners_equal_those_of_trl():
    # (x1, y1), (x2, y2), (x3, y3) -> (x1, y3), (x2, y1), (x3, y2)
    assert kto_batches.mismatched(["x1", "x2", "x3"]) == [2, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_a_partner_has_another_prompt_and_every_completion_is_used_once(seed):
    generator = random.Random(seed)
    prompts = [generator.randrange(6) for _ in range(12)]
    while 2 * max(Counter(prompts).values()) > len(prompts):
        prompts = [generator.randrange(6) for _ in range(12)]
    partners = kto_batches.mismatched(prompts)
    assert sorted(partners) == list(range(12))
    assert all(prompts[row] != prompts[partner] for row, partner in enumerate(partners))


# Weights


@pytest.mark.parametrize(
    ("counts", "options", "expected", "ratio"),
    [
        pytest.param((100, 100), {}, (1, 1), 1, id="pairs"),
        pytest.param((120, 100), {}, (1, 1), 1.2, id="within the range"),
        pytest.param((100, 400), {}, (4, 1), 1, id="few desirable: raised to 1:1"),
        pytest.param((400, 100), {}, (1, 3), 4 / 3, id="few undesirable: raised to 4:3"),
        pytest.param((100, 400), {"undesirable": 0.5}, (2, 0.5), 1, id="undesirable is set"),
        pytest.param((400, 100), {"desirable": 2.0}, (2, 6), 4 / 3, id="desirable is set"),
        pytest.param((100, 100), {"desirable": 2.0}, (2, 1.5), 4 / 3, id="set above the range"),
        pytest.param((100, 100), {"undesirable": 2.0}, (2, 2), 1, id="set below the range"),
        pytest.param((100, 400), {"desirable": 1.0, "undesirable": 1.0}, (1, 1), 0.25, id="both are set"),
    ],
)  # fmt: skip
def test_weights_by_hand(counts, options, expected, ratio):
    weights = kto_batches.complete_weights(*counts, **options)
    assert (weights.desirable, weights.undesirable) == pytest.approx(expected)
    assert weights.ratio == pytest.approx(ratio)
    assert weights.is_recommended == (1 <= round(ratio, 9) <= 4 / 3 + 1e-9)

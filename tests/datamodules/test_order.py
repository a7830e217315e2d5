"""The canonical order: computed anywhere without walking, complete, mixed by weight, bucketed without a loss."""

import math
import pickle
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from datamodules.order import BucketedOrder, MixedOrder, ShuffledOrder, permutation, schedule, whole_weights

COUNTS = [4, 7, 1, 5, 9, 3]
TOTAL = sum(COUNTS)
EVERYTHING = {(shard, i) for shard, count in enumerate(COUNTS) for i in range(count)}


def rows(places):
    return list(zip(*(values.tolist() for values in places), strict=True))


def samples(places):
    return [row[:2] for row in rows(places)]


ORDERS = [
    {"seed": 3, "shuffle_buffer": 5, "num_lanes": 3},
    {"seed": 3, "shuffle_buffer": 1, "num_lanes": 1},
    {"seed": 0, "shuffle_buffer": 1000, "num_lanes": 100},
    {"seed": None, "num_lanes": 1},
    {"seed": None, "num_lanes": 4},
]


@pytest.mark.parametrize("options", ORDERS)
def test_every_pass_holds_each_sample_once(options):
    order = ShuffledOrder(COUNTS, **options)
    for epoch in range(3):
        found = rows(order.places(epoch * TOTAL, (epoch + 1) * TOTAL))
        assert {row[2] for row in found} == {epoch}
        assert len(found) == TOTAL
        assert {row[:2] for row in found} == EVERYTHING


@pytest.mark.parametrize("options", ORDERS)
def test_any_stretch_is_what_a_walk_meets(options):
    walked = [rows(ShuffledOrder(COUNTS, **options).places(p, p + 1))[0] for p in range(3 * TOTAL)]
    order = pickle.loads(pickle.dumps(ShuffledOrder(COUNTS, **options)))
    for start, stop in [(0, 87), (40, 41), (28, 30), (29, 58), (10, 70), (7, 7 + TOTAL)]:
        assert rows(order.places(start, stop)) == walked[start:stop]


def test_passes_seeds_and_names_differ():
    orders = [ShuffledOrder(COUNTS, 1), ShuffledOrder(COUNTS, 2), ShuffledOrder(COUNTS, 1, name="b")]
    found = [tuple(samples(order.places(0, TOTAL))) for order in orders]
    found.append(tuple(samples(orders[0].places(TOTAL, 2 * TOTAL))))
    assert len(set(found)) == 4
    assert samples(ShuffledOrder(COUNTS, 1).places(0, TOTAL)) == list(found[0])


def test_without_seed_the_shards_stand_in_a_row():
    assert samples(ShuffledOrder(COUNTS, None).places(0, TOTAL)) == sorted(EVERYTHING)


def test_lanes_take_turns_and_keep_ranks_apart():
    order = ShuffledOrder([6] * 8, 5, shuffle_buffer=4, num_lanes=4)
    shards = [shard for shard, _ in samples(order.places(0, 48))]
    by_rank = [set(shards[rank::2]) for rank in range(2)]
    assert by_rank[0].isdisjoint(by_rank[1])
    assert {len(set(shards[i : i + 4])) for i in range(0, 48, 4)} == {4}


def test_the_buffer_bounds_how_far_a_sample_moves():
    positions = [i for _, i in samples(ShuffledOrder([1000], 1, shuffle_buffer=16).places(0, 1000))]
    assert max(abs(i - position) for position, i in enumerate(positions)) < 16
    assert positions != sorted(positions)


def test_permutations_are_fair_and_never_change():
    """Every place goes to every number about equally often; the numbers are those of all versions to come."""
    table = np.zeros((4, 4))
    for seed in range(2000):
        table[np.arange(4), permutation(4, seed)] += 1
    assert (abs(table - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75)).all()
    assert permutation(8, 0, "a", 1).tolist() == PERMUTATION


PERMUTATION = [3, 2, 4, 1, 7, 5, 6, 0]


def test_ten_thousand_shards_cost_next_to_nothing():
    started = time.perf_counter()
    order = ShuffledOrder([1000] * 10_000, 0, 4096, 8)
    assert order.places(123_456_789, 123_456_789 + 64).number == 64
    assert time.perf_counter() - started < 0.5


# Mixtures


@pytest.mark.parametrize("weights", [[1, 1], [3, 1, 1], [5, 3, 2], [10, 1], [7], [9, 5, 3, 2, 1]])
def test_a_mixture_is_exact_and_never_a_sample_off(weights):
    chosen = schedule(weights)
    total = sum(weights)
    assert Counter(chosen.tolist()) == dict(enumerate(weights))
    for k, weight in enumerate(weights):
        lead = np.cumsum(chosen == k) - np.arange(1, total + 1) * weight / total
        assert abs(lead).max() < 1


def test_each_source_keeps_its_order_and_its_passes():
    sources = [ShuffledOrder([3, 4], 1, name="a"), ShuffledOrder([2] * 5, 1, name="b", first_shard=2)]
    mixed = rows(MixedOrder(sources, [3, 1]).places(0, 80))
    first, second = [r for r in mixed if r[0] < 2], [r for r in mixed if r[0] >= 2]
    assert (len(first), len(second)) == (60, 20)
    assert first == rows(sources[0].places(0, 60))
    assert second == rows(sources[1].places(0, 20))
    assert (first[-1][2], second[-1][2]) == (60 // 7, 1)
    assert rows(MixedOrder(sources, [3, 1]).places(37, 61)) == mixed[37:61]


def test_weights_become_small_whole_numbers():
    assert whole_weights({"a": 0.5, "b": 0.25, "c": 0.25}) == {"a": 2, "b": 1, "c": 1}
    assert whole_weights({"a": 0.1, "b": 0.2, "c": 0.7}) == {"a": 1, "b": 2, "c": 7}
    assert whole_weights({"a": 1 / 3, "b": 2 / 3}) == {"a": 1, "b": 2}
    assert whole_weights({"a": 6, "b": 4}) == {"a": 3, "b": 2}


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "much", 1e-9])
def test_weights_that_cannot_be(weight):
    with pytest.raises(ValueError, match=r"weights"):
        whole_weights({"a": 1, "b": weight})


# Buckets


def bucketed(global_batch, num_buckets=3, order=None):
    order = order or ShuffledOrder(COUNTS, 4, shuffle_buffer=6, num_lanes=2)
    return BucketedOrder(
        order, lambda places: (places.shard * 5 + places.sample) % num_buckets, num_buckets, global_batch
    )


@pytest.mark.parametrize("global_batch", [1, 4, 6])
def test_a_global_batch_has_one_bucket_and_nothing_is_dropped(global_batch):
    number = 40 * global_batch
    found = rows(bucketed(global_batch).places(0, number))
    batches = [found[i : i + global_batch] for i in range(0, number, global_batch)]
    assert all(len({bucket for *_, bucket in batch}) == 1 for batch in batches)
    assert len({bucket for *_, bucket in found}) == 3
    met = Counter(row[:3] for row in found)
    assert max(met.values()) == 1
    # What is missing of the stretch that was read waits for its bucket to fill.
    read = {row[:3] for row in rows(ShuffledOrder(COUNTS, 4, shuffle_buffer=6, num_lanes=2).places(0, number))}
    assert len(read - set(met)) <= 3 * (global_batch - 1) + global_batch * 3


def test_within_a_bucket_samples_keep_their_order():
    order = ShuffledOrder(COUNTS, 4, shuffle_buffer=6, num_lanes=2)
    plain = [row[:3] for row in rows(order.places(0, 400)) if (row[0] * 5 + row[1]) % 3 == 1]
    found = [row[:3] for row in rows(bucketed(4).places(0, 300)) if row[3] == 1]
    assert found == plain[: len(found)]


def test_a_bucketed_stretch_is_what_a_walk_meets():
    walked = rows(bucketed(4).places(0, 20_000))
    order = bucketed(4)
    for start in (0, 444, 12_000, 19_996, 8):
        assert rows(order.places(start, start + 4)) == walked[start : start + 4]
    steps = [rows(order.places(start, start + 4)) for start in range(0, 400, 4)]
    assert [row for step in steps for row in step] == walked[:400]


def test_a_batch_comes_when_its_last_sample_does():
    found = bucketed(4).places(0, 400)
    position = {row[:3]: i for i, row in enumerate(rows(ShuffledOrder(COUNTS, 4, 6, 2).places(0, 1000)))}
    completed = [max(position[row[:3]] for row in rows(found)[i : i + 4]) for i in range(0, 400, 4)]
    assert all(one < other for one, other in pairwise(completed))

"""Which sample stands at which position: the canonical order, a function of the shards' counts and the seed alone.

Positions run from 0 without end, through pass after pass. Any stretch of them can be asked for without walking there,
so a resumed run starts as fast as a new one, and a rank or worker that takes every n-th position computes it alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

LARGEST_DENOMINATOR = 1000
LONGEST_SCHEDULE = 100_000
CHUNK = 4096


class Places(NamedTuple):
    """Samples in a row, as int64 arrays (n,)."""

    shard: np.ndarray  # index into the list of shards
    sample: np.ndarray  # index into the shard
    epoch: np.ndarray  # pass over the sample's source
    bucket: np.ndarray  # index into the list of buckets; 0 without buckets

    def take(self, index: slice | np.ndarray) -> Places:
        return Places(*(values[index] for values in self))

    @property
    def number(self) -> int:
        return len(self.shard)


class Order(Protocol):
    """Start and stop of a stretch of positions -> the samples there."""

    def places(self, start: int, stop: int) -> Places: ...


def concatenate(parts: Sequence[Places]) -> Places:
    return Places(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def permutation(number: int, *seed: int | str) -> np.ndarray:
    """(number,) int64. The same with every version of numpy: only raw Philox output and a stable sort are used."""
    digest = hashlib.blake2b("/".join(map(str, seed)).encode(), digest_size=16).digest()
    draws = np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(number)
    return np.argsort(draws, kind="stable")


# One source


class ShuffledOrder:
    """Pass after pass over the shards of one source; every pass holds each sample once.

    A pass shuffles the shards and deals them to `num_lanes` lanes, which take turns, sample by sample; a lane that is
    through drops out. Within a lane the samples of its shards stand in a row, which is cut into windows of
    `shuffle_buffer`, each of them shuffled. What is shuffled are numbers: a window takes 8 bytes per sample, so that a
    reader holds 16 * num_lanes * shuffle_buffer bytes and no payload.

    Args:
        counts: samples in each shard.
        seed: None keeps shards and samples in their order.
        name: of the source, so that sources of one run differ.
        first_shard: added to the numbers of shards.
    """

    def __init__(
        self,
        counts: Sequence[int],
        seed: int | None,
        shuffle_buffer: int = 256,
        num_lanes: int = 1,
        name: str = "",
        first_shard: int = 0,
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.seed, self.name, self.first_shard = seed, name, first_shard
        self.shuffle_buffer, self.num_lanes = shuffle_buffer, min(num_lanes, len(counts))
        self.num_samples = int(self.counts.sum())
        self.epoch_order = lru_cache(2)(self._epoch_order)

    def __reduce__(self) -> tuple:
        arguments = (self.counts, self.seed, self.shuffle_buffer, self.num_lanes, self.name, self.first_shard)
        return ShuffledOrder, arguments

    def _epoch_order(self, epoch: int) -> EpochOrder:
        number = len(self.counts)
        shards = np.arange(number) if self.seed is None else permutation(number, self.seed, self.name, epoch)
        lanes = [
            Lane(
                shards[k :: self.num_lanes],
                self.counts,
                None if self.seed is None else f"{self.seed}/{self.name}/{epoch}/{k}",
                self.shuffle_buffer,
            )
            for k in range(self.num_lanes)
        ]
        return EpochOrder(lanes)

    def places(self, start: int, stop: int) -> Places:
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.num_samples)
            last = min(first + stop - start, self.num_samples)
            shard, sample = self.epoch_order(epoch).locate(np.arange(first, last))
            number = last - first
            parts.append(Places(shard + self.first_shard, sample, np.full(number, epoch), np.zeros(number, np.int64)))
            start += number
        return concatenate(parts)


class EpochOrder:
    """Lanes that take turns."""

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes
        lengths = np.array([lane.length for lane in lanes])
        # Between two of these rows the same lanes are still there.
        self.rows = np.unique([0, *lengths])
        self.present = [np.flatnonzero(lengths > row) for row in self.rows]
        self.starts = np.minimum(lengths[:, None], self.rows).sum(0)  # position at which each row starts

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions within the pass (n,) -> shards (n,), samples (n,)."""
        stage = np.searchsorted(self.starts, positions, "right") - 1
        lane, row = np.empty_like(positions), np.empty_like(positions)
        for s in np.unique(stage):
            chosen = stage == s
            rows, column = np.divmod(positions[chosen] - self.starts[s], len(self.present[s]))
            lane[chosen], row[chosen] = self.present[s][column], self.rows[s] + rows
        shard, sample = np.empty_like(positions), np.empty_like(positions)
        for k in np.unique(lane):
            chosen = lane == k
            shard[chosen], sample[chosen] = self.lanes[k].locate(row[chosen])
        return shard, sample


class Lane:
    """Some shards in a row, shuffled in windows."""

    def __init__(self, shards: np.ndarray, counts: np.ndarray, seed: str | None, shuffle_buffer: int) -> None:
        self.shards, self.seed, self.shuffle_buffer = shards, seed, shuffle_buffer
        self.ends = np.cumsum(counts[shards])
        self.length = int(self.ends[-1]) if len(shards) else 0
        self.window = lru_cache(2)(self._window)

    def _window(self, number: int) -> np.ndarray:
        first = number * self.shuffle_buffer
        return first + permutation(min(self.shuffle_buffer, self.length - first), self.seed, number)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in the lane (n,) -> shards (n,), samples (n,)."""
        if self.seed is not None:
            windows, within = np.divmod(rows, self.shuffle_buffer)
            rows = np.concatenate([self.window(int(w))[within[windows == w]] for w in np.unique(windows)])
        number = np.searchsorted(self.ends, rows, "right")
        starts = np.where(number > 0, self.ends[number - 1], 0)
        return self.shards[number], rows - starts


# Several sources


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as the smallest whole numbers of the same ratio.

    Raises:
        ValueError: a weight that is not positive, or ratios that no short schedule can keep.
    """
    for name, weight in weights.items():
        if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
            raise ValueError(f"weights.{name}={weight}: give a positive number, or leave the source out.")
    parts = {name: Fraction(str(w)).limit_denominator(LARGEST_DENOMINATOR) for name, w in weights.items()}
    multiple = math.lcm(*(part.denominator for part in parts.values()))
    whole = {name: int(part * multiple) for name, part in parts.items()}
    divisor = math.gcd(*whole.values())
    if not divisor or min(whole.values()) == 0 or sum(whole.values()) // divisor > LONGEST_SCHEDULE:
        raise ValueError(f"weights {dict(weights)}: give them as ratios of small numbers, such as 3, 1 and 0.5.")
    return {name: weight // divisor for name, weight in whole.items()}


def schedule(weights: Sequence[int]) -> np.ndarray:
    """Which source comes when, (sum(weights),); at every point each source is less than one sample from its share.

    Of the sources whose next sample is due by then, the one with the earliest deadline is taken (Tijdeman 1980, the
    chairman assignment problem).
    """
    total, num = sum(weights), len(weights)
    unit = max(2 * num - 2, 1)
    given, chosen = [0] * num, []
    for n in range(1, total + 1):
        lag = [unit * (n * weight - total * had) for weight, had in zip(weights, given, strict=True)]
        due = [k for k in range(num) if lag[k] >= total or num == 1]
        k = min(due, key=lambda k: ((total * (unit - 1) - lag[k]) / weights[k], k))
        given[k] += 1
        chosen.append(k)
    return np.array(chosen)


class MixedOrder:
    """Sources interleaved by weight; each keeps its own order and its own count of passes.

    Args:
        orders: of the sources.
        weights: samples of each source in a round, whole numbers.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[int]) -> None:
        self.orders, self.round = list(orders), schedule(weights)
        self.before = np.stack([np.cumsum(self.round == k) for k in range(len(orders))])  # (sources, round)

    def taken(self, source: int, position: int) -> int:
        """Samples of a source before a position."""
        rounds, rest = divmod(position, len(self.round))
        return int(rounds * self.before[source, -1] + (self.before[source, rest - 1] if rest else 0))

    def places(self, start: int, stop: int) -> Places:
        sources = self.round[np.arange(start, stop) % len(self.round)]
        places = Places(*np.empty((4, stop - start), np.int64))
        for k in np.unique(sources):
            part = self.orders[k].places(self.taken(k, start), self.taken(k, stop))
            for whole, values in zip(places, part, strict=True):
                whole[sources == k] = values
        return places


# Buckets


class BucketedOrder:
    """The same samples, moved as little as makes every `global_batch` positions one bucket's.

    Samples wait in the order in which they come until their bucket is full; those left over at the end of a pass wait
    for the next. What waits are numbers, fewer than `global_batch` samples per bucket. Asked for a later stretch, it
    walks there through the numbers, some million samples in a second.

    Args:
        order: of the samples.
        bucket_of: places -> bucket of each, (n,).
        num_buckets: how many there are.
        global_batch: samples per optimizer step over all ranks.
    """

    def __init__(
        self, order: Order, bucket_of: Callable[[Places], np.ndarray], num_buckets: int, global_batch: int
    ) -> None:
        self.order, self.bucket_of = order, bucket_of
        self.num_buckets, self.global_batch = num_buckets, global_batch
        self._rewind()

    def _rewind(self) -> None:
        self.position = 0  # of the order below, up to which samples were sorted
        self.waiting = [self.order.places(0, 1).take(slice(0)) for _ in range(self.num_buckets)]
        self.ready: Places = self.waiting[0]
        self.first = 0  # position of the first sample that is ready

    def places(self, start: int, stop: int) -> Places:
        if start < self.first:
            self._rewind()
        while self.first + self.ready.number < stop:
            self._sort_more()
            passed = min(start - self.first, self.ready.number)
            self.ready, self.first = self.ready.take(slice(passed, None)), self.first + passed
        return self.ready.take(slice(start - self.first, stop - self.first))

    def _sort_more(self) -> None:
        places = self.order.places(self.position, self.position + CHUNK)
        places = places._replace(bucket=self.bucket_of(places))
        self.position += CHUNK
        full, completed = [self.ready], []
        for bucket in range(self.num_buckets):
            arrivals = np.flatnonzero(places.bucket == bucket)
            num_waiting = self.waiting[bucket].number
            queue = concatenate([self.waiting[bucket], places.take(arrivals)])
            num_full = queue.number // self.global_batch * self.global_batch
            full.append(queue.take(slice(num_full)))
            self.waiting[bucket] = queue.take(slice(num_full, None))
            # A batch is there when its last sample comes.
            completed.append(arrivals[np.arange(self.global_batch - 1, num_full, self.global_batch) - num_waiting])
        first = self.ready.number + self.global_batch * np.argsort(np.concatenate(completed))
        batches = (first[:, None] + np.arange(self.global_batch)).ravel()
        self.ready = concatenate(full).take(np.concatenate([np.arange(self.ready.number), batches]))

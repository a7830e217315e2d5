"""Shards -> batches in one endless order that rank and worker counts do not change.

Order. `datamodules.order` says which sample stands at position p of the canonical order.

Dealing. With W ranks and b samples per batch, rank r takes the positions p with p % W == r, so step s of all ranks
together covers exactly positions [s W b, (s + 1) W b): the same global batch however it is split. Inside a rank the
workers take whole batches in turn, which is the order in which DataLoader asks them. Every sample is entered by its
offset (`datamodules.tars`); nobody reads what others take.

Resuming. The number of samples consumed says it all: the stream goes on at that position.

Damage. A sample that cannot be used leaves its place in the batch to a stand-in of weight 0, a copy of a readable
sample with an empty key: nothing shifts, no rank has to tell another, every readable sample is met once in a pass.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.order import MixedOrder, Order, Places, ShuffledOrder, whole_weights
from datamodules.resolve import ShardSet, resolve_shards, resolve_sources
from datamodules.shard_cache import ShardCache, is_remote
from datamodules.slots import Slot, Slots, inline
from datamodules.tars import (
    DamagedSample,
    DamagedShard,
    Shard,
    ShardReader,
    StoredSample,
    cut_short,
    load_header,
)

__all__ = [
    "DamagedSample",
    "ShardReader",
    "ShardSet",
    "ShardStream",
    "SkipLog",
    "SkippedSample",
    "resolve_shards",
    "resolve_sources",
]

logger = logging.getLogger(__name__)

MIN_SAMPLES_JUDGED, MAX_SAMPLES_JUDGED = 200, 20_000
LOOK_AHEAD = [*range(64), *(round(64 * 1.1**i) for i in range(1, 128))]  # ever wider steps, beyond a whole lost shard
BLOCK = 1024


class SkippedSample(NamedTuple):
    """What was left out, and why. `key` is empty for a whole shard."""

    url: str
    key: str
    reason: str
    num_samples: int = 1


class SkipLog:
    """Skipped samples of all workers of a process: a file to which each of them appends one line at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.known: dict[tuple[str, ...], SkippedSample] = {}
        self.num_bytes_read = 0

    def record(self, skipped: SkippedSample) -> None:
        """Notes and warns, unless it is there already, for whatever reason."""
        name = self._name(skipped)
        if name in self.known or (self.entries() and name in self.known):
            return
        what = repr(skipped.key) if skipped.key else f"{skipped.num_samples} samples"
        logger.warning("skipped %s in %s: %s", what, skipped.url, skipped.reason)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(skipped) + "\n")

    def entries(self) -> list[SkippedSample]:
        """Everything skipped so far, each once."""
        if os.path.exists(self.path):
            with open(self.path, "rb") as file:
                file.seek(self.num_bytes_read)
                for line in file:
                    if line.endswith(b"\n"):
                        skipped = SkippedSample(*json.loads(line))
                        self.known.setdefault(self._name(skipped), skipped)
                        self.num_bytes_read += len(line)
        return list(self.known.values())

    @staticmethod
    def _name(skipped: SkippedSample) -> tuple[str, ...]:
        return (skipped.url, skipped.key) if skipped.key else (skipped.url, "", skipped.reason)


# What is read


class Catalog:
    """All shards of all sources, and how to open them.

    Args:
        sources: name -> shards.
        cache: of the shards that lie elsewhere.
        excluded: urls that take no part in the order.

    Attributes:
        unreadable: url -> reason, of shards without index that could not be counted to the end.
    """

    def __init__(self, sources: Mapping[str, ShardSet], cache: ShardCache, excluded: Sequence[str] = ()) -> None:
        left_out = set(excluded)
        self.sources = {
            name: [shard for shard in found.shards if shard.url not in left_out] for name, found in sources.items()
        }
        self.cache = cache
        self.unreadable: dict[str, str] = {}
        for name, shards in self.sources.items():
            if not shards:
                raise FileNotFoundError(f"no shards: all of {name or 'the set'} are missing.")

    @property
    def shards(self) -> list[Shard]:
        return [shard for shards in self.sources.values() for shard in shards]

    def reader(self) -> ShardReader:
        return ShardReader(self.shards, self.hold)

    def hold(self, shard: Shard) -> AbstractContextManager[str | Path]:
        """The local file of a shard, to be opened within the `with`."""
        if is_remote(shard.url):
            return self.cache.hold(shard.url, shard.num_bytes, shard.sha256)
        return nullcontext(shard.url)

    def counts(self, name: str) -> list[int]:
        """Samples per shard of a source; a shard of which no index says it is opened, once.

        Raises:
            RuntimeError: it cannot be opened.
        """
        unknown = sum(shard.num_samples is None for shard in self.sources[name])
        if unknown > 1:
            logger.info("counting the samples of %d shards without index.json", unknown)
        return [self._count(shard) if s is None else s for shard in self.sources[name] for s in [shard.num_samples]]

    def _count(self, shard: Shard) -> int:
        try:
            with self.hold(shard) as path:
                number, is_cut = int(load_header(path)["num_samples"]), cut_short(path)
        except OSError as error:
            raise RuntimeError(
                f"{shard.url}: its samples cannot be counted ({error}), and the order of all ranks follows from the "
                "count; start again once it can be read, or leave it out of `shards`."
            ) from error
        if not number or is_cut:
            self.unreadable[shard.url] = (
                "cut short: the end-of-archive mark is missing" if number else "holds no sample"
            )
        return number

    def order(
        self, seed: int | None, shuffle_buffer: int, num_lanes: int, weights: Mapping[str, float] | None = None
    ) -> Order:
        """The canonical order.

        Raises:
            RuntimeError: a source without a single sample, or see `counts`.
        """
        orders, first = [], 0
        for name, shards in self.sources.items():
            counts = self.counts(name)
            if not sum(counts):
                urls = [shard.url for shard in shards[:3]]
                raise RuntimeError(f"no sample could be read from {urls} (of {len(shards)} shards).")
            orders.append(ShuffledOrder(counts, seed, shuffle_buffer, num_lanes, name, first))
            first += len(shards)
        if len(orders) == 1:
            return orders[0]
        whole = whole_weights(weights or dict.fromkeys(self.sources, 1))
        return MixedOrder(orders, [whole[name] for name in self.sources])


class Bucket(NamedTuple):
    """Frames and pixels of what is delivered."""

    num_frames: int
    height: int
    width: int


def choose_bucket(size: tuple[int, int, int], buckets: Sequence[Bucket]) -> int:
    """The bucket with the most frames that a sample can fill, then the nearest aspect ratio, then the largest area that
    does not enlarge it; the first bucket where the size is not known, or none.

    Args:
        size: frames, height, width of the stored sample.
    """
    if min(size) < 1:
        return 0
    num_frames, height, width = size

    def cost(i: int) -> tuple[float, ...]:
        bucket = buckets[i]
        missing = max(0, bucket.num_frames - num_frames)
        ratio = abs(np.log(bucket.width / bucket.height * height / width))
        enlarged = max(bucket.width / width, bucket.height / height, 1.0)
        return missing, -bucket.num_frames, round(ratio, 6), enlarged, -bucket.width * bucket.height, i

    return min(range(len(buckets)), key=cost)


class BucketChooser:
    """Places -> buckets; the sizes of a shard's samples are read when the first of them is met.

    Raises:
        RuntimeError: when called, a shard that cannot be opened.
    """

    def __init__(self, reader: ShardReader, buckets: Sequence[Bucket]) -> None:
        self.reader, self.buckets = reader, buckets
        self.known: dict[int, np.ndarray] = {}

    def __call__(self, places: Places) -> np.ndarray:
        chosen = np.zeros(places.number, np.int64)
        for shard in np.unique(places.shard):
            here = np.flatnonzero(places.shard == shard)
            buckets, samples = self._of_shard(int(shard)), places.sample[here]
            found = samples < len(buckets)
            chosen[here[found]] = buckets[samples[found]]
        return chosen

    def _of_shard(self, shard: int) -> np.ndarray:
        if shard not in self.known:
            sizes = self._sizes(shard)
            by_size = {size: choose_bucket(size, self.buckets) for size in set(sizes)}
            self.known[shard] = np.array([by_size[size] for size in sizes], np.uint8)
        return self.known[shard]

    def _sizes(self, shard: int) -> list[tuple[int, int, int]]:
        try:
            return self.reader.sizes(shard)
        except OSError as error:
            raise RuntimeError(
                f"{self.reader.shards[shard].url}: what its samples measure cannot be read ({error}), and the order of "
                "all ranks follows from their buckets; resume once it can be read, or train without buckets."
            ) from error


# The stream


class Position:
    """How many samples of the canonical order training has consumed; shared by the data module and its streams."""

    def __init__(self, consumed: int = 0) -> None:
        self.consumed = consumed


class Decode(Protocol):
    """(sample, epoch, bucket) -> item; raises DamagedSample."""

    def __call__(self, sample: Mapping[str, bytes | str], epoch: int, bucket: int) -> Any: ...


class ShardStream(IterableDataset):
    """The batches of one rank, for a DataLoader with `batch_size=None`.

    Args:
        catalog: what is read.
        order: in which order.
        decode: sample -> item.
        collate: items -> batch; within a `SlotLoader` also (items, slot) -> batch, see `datamodules.slots`.
        stand_in: an item -> one of weight 0 that takes the place of a damaged one.
        batch_size: per rank.
        num_samples: None streams for ever, the trainer stops; otherwise the first so many of the global order.
        start: where to go on in the global order, read each time an iteration starts.
        max_bad_share: of damaged samples, that ends the run. Each reader (a worker, or the process without workers)
            judges by itself: its damaged samples against those that it has met, or against its part of a pass while
            that is more (at least MIN_SAMPLES_JUDGED, of a pass of at most MAX_SAMPLES_JUDGED).

    Raises:
        RuntimeError: while iterating, when too much is damaged.
    """

    def __init__(
        self,
        catalog: Catalog,
        order: Order,
        decode: Decode,
        collate: Callable[..., Any],
        stand_in: Callable[[Any], Any],
        skip_log: SkipLog,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_samples: int | None = None,
        start: Position | None = None,
        max_bad_share: float = 0.05,
    ) -> None:
        self.catalog, self.order, self.decode = catalog, order, decode
        self.collate, self.stand_in, self.skip_log = collate, stand_in, skip_log
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.num_samples, self.start, self.max_bad_share = num_samples, start or Position(), max_bad_share
        self.slots: Slots | None = None

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is None:
            return self.batches(self.start.consumed, slots=self.slots)
        return map(inline, self.batches(self.start.consumed, worker.id, worker.num_workers, self.slots))

    def batches(self, first: int, worker: int = 0, num_workers: int = 1, slots: Slots | None = None) -> Iterator[Any]:
        """The batches that one worker delivers, from a position on."""
        reading = Reading(self, num_readers=self.world_size * num_workers)
        for places, position in batch_places(
            self.order,
            first,
            self.num_samples,
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            worker=worker,
            num_workers=num_workers,
        ):
            slot = slots and slots.free_slot()
            batch = reading.batch(places, position, slot)
            yield slot.park(batch) if slot else batch


def batch_places(
    order: Order,
    first: int,
    stop: int | None,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    worker: int = 0,
    num_workers: int = 1,
) -> Iterator[tuple[Places, int]]:
    """Samples of each batch of one worker of one rank, and the position at which all ranks' batches start.

    Args:
        first: position where the run goes on; worker 0 of every rank starts there.
        stop: position where it ends, None for never.
    """
    together = batch_size * world_size
    per_block = max(num_workers, BLOCK // together // num_workers * num_workers)
    for start in count(first, per_block * together):
        end = start + per_block * together if stop is None else min(start + per_block * together, stop)
        if start >= end:
            return
        block = order.places(start, end)
        for i in range(worker, per_block, num_workers):
            places = block.take(slice(i * together + rank, (i + 1) * together, world_size))
            if places.number:
                yield places, start + i * together


class Reading:
    """One reader's way through the samples: decodes, counts what is damaged, finds stand-ins."""

    def __init__(self, stream: ShardStream, num_readers: int) -> None:
        self.stream, self.reader = stream, stream.catalog.reader()
        self.num_met = self.num_damaged = 0
        in_a_pass = sum(shard.num_samples or 0 for shard in self.reader.shards)
        self.horizon = max(MIN_SAMPLES_JUDGED, min(in_a_pass, MAX_SAMPLES_JUDGED) // num_readers)

    def batch(self, places: Places, position: int, slot: Slot | None = None) -> Any:
        """`slot`: where the pictures are to be put together."""
        items = [self.item(*place) for place in zip(*(values.tolist() for values in places), strict=True)]
        self.num_met += len(items)
        self.num_damaged += sum(item is None for item in items)
        self._judge()
        if any(item is None for item in items):
            healthy = next((item for item in items if item is not None), None)
            if healthy is None:
                healthy = self._look_ahead(position, int(places.bucket[0]))
            items = [self.stream.stand_in(healthy) if item is None else item for item in items]
        return self.stream.collate(items) if slot is None else self.stream.collate(items, slot)

    def item(self, shard: int, i: int, epoch: int, bucket: int) -> Any | None:
        """None for one that is damaged, which is noted."""
        sample: StoredSample | None = None
        try:
            sample = self.reader.sample(shard, i)
            return self.stream.decode(sample, epoch, bucket)
        except DamagedShard as damage:
            found = self.reader.shards[shard]
            lost = found.num_samples or 1
            if shard in self.reader.tars:
                lost -= len(self.reader.tars[shard].index)
            self._note(SkippedSample(found.url, "", str(damage), max(lost, 1)))
        except DamagedSample as damage:
            self._note(SkippedSample(sample["__url__"], sample["__key__"], str(damage)))
        return None

    def _note(self, skipped: SkippedSample) -> None:
        self.stream.skip_log.record(skipped)

    def _look_ahead(self, position: int, bucket: int) -> Any:
        """A readable sample from further on, cut to the same size; it is met again when its turn comes."""
        for offset in LOOK_AHEAD:
            places = self.stream.order.places(position + offset, position + offset + 1)
            shard, i, epoch, _ = (int(values[0]) for values in places)
            item = self.item(shard, i, epoch, bucket)
            if item is not None:
                return item
        raise RuntimeError(f"no sample of the shards could be decoded. {self._damage()}")

    def _judge(self) -> None:
        if self.num_damaged <= self.stream.max_bad_share * max(self.num_met, self.horizon):
            return
        raise RuntimeError(
            f"{self.num_damaged} of the {self.num_met} samples that a reader met are damaged, more than "
            f"max_bad_share={self.stream.max_bad_share}: the shards should be made anew or fetched again. "
            f"{self._damage()}"
        )

    def _damage(self) -> str:
        entries = self.stream.skip_log.entries()
        return f"{sum(e.num_samples for e in entries)} were skipped, the last: {entries[-1]}"

"""WebDataset tars -> one endless, seeded order of samples, dealt to ranks and workers.

Order. The shards of a pass are shuffled by (seed, pass) and dealt to `num_lanes` lanes; a lane shuffles its samples in
a buffer and goes from pass to pass. Position p of the canonical order is sample p // num_lanes of lane p % num_lanes.
None of this knows of ranks or workers.

Dealing. With W ranks and b samples per batch, rank r takes the positions p with p % W == r, so step s of all ranks
together covers exactly positions [s W b, (s + 1) W b): the same global batch however it is split. Inside a rank the
workers take whole batches in turn, which is the order in which DataLoader asks them.

A reader opens only lanes that hold positions of its own, and passes over the samples that others take. With one lane
every rank reads every tar; with num_lanes a multiple of the ranks, no tar is read by two ranks in one pass.

Damage. A sample that cannot be decoded gives its position to the next readable sample of its lane, so nothing shifts.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import braceexpand
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import tarfile_samples

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
REMOTE = ("pipe:", "http://", "https://", "s3://", "gs://", "hf://", "hdfs://", "ais://")

Item = TypeVar("Item")


class DamagedSample(Exception):  # noqa: N818, an event that is counted rather than an error of the program
    """A sample that cannot be used; the message is the reason."""


class ShardSet(NamedTuple):
    """The shards that a pattern stands for."""

    urls: list[str]
    num_samples: int | None  # None where no index says
    kind: str | None  # "image", "video", or None where no index says


class SkippedSample(NamedTuple):
    """What was left out, and why. `key` is empty for a shard that broke off."""

    url: str
    key: str
    reason: str


class Slot(NamedTuple):
    """A sample as it lies in the tar, and the pass over the data in which it is met."""

    sample: dict[str, bytes | str]
    epoch: int


class SkipLog:
    """Skipped samples of all workers of a process: a file to which each of them appends one line at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.seen: set[SkippedSample] = set()

    def record(self, skipped: SkippedSample) -> None:
        """Notes and warns, once per reader."""
        if skipped in self.seen:
            return
        self.seen.add(skipped)
        logger.warning("skipped %s in %s: %s", skipped.key or "the rest", skipped.url, skipped.reason)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(skipped) + "\n")

    def entries(self) -> list[SkippedSample]:
        """Everything skipped so far, each once."""
        if not os.path.exists(self.path):
            return []
        lines = Path(self.path).read_text(encoding="utf-8").splitlines()
        return [SkippedSample(*entry) for entry in dict.fromkeys(tuple(json.loads(line)) for line in lines)]


# Patterns -> shards


def resolve_shards(shards: str | Path | list[str | Path]) -> ShardSet:
    """Finds the tars that `shards` means, without opening them.

    Args:
        shards: a folder (its `index.json` lists the tars, else every `*.tar` in it), a tar, a glob, a brace pattern
            (`train-{000000..000007}.tar`), a URL (`pipe:...`), or a list of these.

    Raises:
        FileNotFoundError: a pattern matches nothing, or a named tar is missing.
        ValueError: an index that is not one, or sets of different kinds.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    if not patterns:
        raise FileNotFoundError("no shards: the list of shard patterns is empty.")
    parts = [_resolve_one(str(pattern)) for pattern in patterns]
    kinds = {part.kind for part in parts} - {None}
    if len(kinds) > 1:
        raise ValueError(f"shards {patterns}: sets of different kinds {sorted(kinds)}; give one kind per data module.")
    counts = [part.num_samples for part in parts]
    num_samples = None if None in counts else sum(counts)
    return ShardSet([url for part in parts for url in part.urls], num_samples, next(iter(kinds), None))


def _resolve_one(pattern: str) -> ShardSet:
    if pattern.startswith("pipe:"):
        return ShardSet([pattern], None, None)
    if pattern.startswith(REMOTE):
        return ShardSet(list(braceexpand.braceexpand(pattern)), None, None)
    path = Path(pattern).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return ShardSet([str(path)], None, None)
    return _from_pattern(str(path))


def _from_folder(folder: Path) -> ShardSet:
    if (folder / INDEX_NAME).is_file():
        return _from_index(folder)
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    if not urls:
        raise FileNotFoundError(f"no shards: {folder} holds neither {INDEX_NAME} nor *.tar. {_content(folder)}{_HINT}")
    return ShardSet(urls, None, None)


def _from_index(folder: Path) -> ShardSet:
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = [shard["name"] for shard in index["shards"]]
        shard_set = ShardSet([str(folder / name) for name in names], int(index["num_samples"]), index.get("kind"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of shards ({error!r}); write the set again with prepare.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lists shards that are missing: {missing[:5]}. {_content(folder)}")
    if not names:
        raise FileNotFoundError(f"no shards: {path} lists none.{_HINT}")
    return shard_set


def _from_pattern(pattern: str) -> ShardSet:
    urls = []
    for part in braceexpand.braceexpand(pattern):
        found = sorted(glob.glob(part))
        if not found:
            folder = Path(part).parent
            raise FileNotFoundError(f"no shards matched {part!r} (pattern {pattern!r}). {_content(folder)}{_HINT}")
        urls += found
    return ShardSet(urls, None, None)


_HINT = " Make a small set with `python -m mm_lightning.prepare.samples --out data/samples`."


def _content(folder: Path) -> str:
    if not folder.is_dir():
        return f"The folder {folder} does not exist."
    names = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
    return f"{folder} holds: {listed or 'nothing'}."


# The canonical order


def raw_samples(urls: list[str], skip_log: SkipLog) -> Iterator[dict[str, bytes | str]]:
    """The samples of some tars, once. A tar that breaks off is noted, and what stands before the break is kept."""
    for url in urls:

        def note(error: Exception, url: str = url) -> bool:
            reason = str(error.args[0]).split(" @ ")[0] if error.args else repr(error)  # webdataset adds the stream
            skip_log.record(SkippedSample(url, "", f"{type(error).__name__}: {reason}"))
            return not isinstance(error, tarfile.TarError)  # a tar cannot be read beyond its break

        yield from tarfile_samples([{"url": url}], handler=note)
        if cut_short(url):
            skip_log.record(SkippedSample(url, "", "cut short: the end-of-archive mark is missing"))


def cut_short(url: str) -> bool:
    """Whether a local tar lacks its closing 1024 zero bytes; a cut between two files raises no error when read."""
    if not url.endswith(".tar") or not os.path.isfile(url):
        return False
    with open(url, "rb") as file:
        file.seek(-min(1024, os.path.getsize(url)), os.SEEK_END)
        return file.read() != bytes(1024)


def lane_samples(
    urls: list[str], lane: int, num_lanes: int, seed: int | None, shuffle_buffer: int, skip_log: SkipLog
) -> Iterator[Slot]:
    """The endless order of one lane. `seed` None: neither shards nor samples are shuffled.

    Raises:
        RuntimeError: several passes in a row gave not a single sample.
    """
    empty_passes = 0
    for epoch in count():
        order = list(urls)
        if seed is not None:
            random.Random(f"{seed}-{epoch}").shuffle(order)
        samples = raw_samples(order[lane::num_lanes], skip_log)
        if seed is not None:
            samples = wds.detshuffle(shuffle_buffer, shuffle_buffer, seed, epoch - 1).run(samples)
        empty_passes += 1
        for sample in samples:
            empty_passes = 0
            yield Slot(sample, epoch)
        if empty_passes > num_lanes:
            raise RuntimeError(f"no sample could be read from {order[:3]} (of {len(order)} shards). {_last(skip_log)}")


class Lane:
    """Decoded samples of one lane by rising index; an undecodable one gives way to the next that decodes."""

    def __init__(self, slots: Iterator[Slot], num_lanes: int, decode: Callable[[dict, int], Item], skip_log: SkipLog):
        self.slots, self.num_lanes, self.decode, self.skip_log = slots, num_lanes, decode, skip_log
        self.index, self.item = -1, None

    def at(self, index: int) -> Item:
        """The first decodable sample at `index` or behind it. `index` may not fall from call to call."""
        while self.index < index - 1:
            next(self.slots)
            self.index += 1
        if self.index < index:
            self.item = self._next_decodable()
        return self.item

    def _next_decodable(self) -> Item:
        first_epoch = None
        for slot in self.slots:
            self.index += 1
            first_epoch = slot.epoch if first_epoch is None else first_epoch
            if slot.epoch > first_epoch + self.num_lanes:
                break
            try:
                return self.decode(slot.sample, slot.epoch)
            except DamagedSample as damage:
                self.skip_log.record(SkippedSample(slot.sample["__url__"], slot.sample["__key__"], str(damage)))
        raise RuntimeError(f"no sample of the shards could be decoded. {_last(self.skip_log)}")


def _last(skip_log: SkipLog) -> str:
    entries = skip_log.entries()
    return f"{len(entries)} were skipped, the last: {entries[-1]}" if entries else "The shards are empty."


def positions_of(
    rank: int, world_size: int, worker: int, num_workers: int, batch_size: int, first: int = 0, stop: int | None = None
) -> Iterator[int]:
    """Positions of the canonical order that one worker of one rank delivers, in order.

    `first` (a multiple of world_size) is where a run goes on, `stop` where it ends; worker 0 starts at `first`.
    """
    for local in count():
        position = first + local * world_size + rank
        if stop is not None and position >= stop:
            return
        if local // batch_size % num_workers == worker:
            yield position


def sample_stream(
    urls: list[str],
    positions: Iterator[int],
    decode: Callable[[dict, int], Item],
    skip_log: SkipLog,
    *,
    seed: int | None,
    shuffle_buffer: int,
    num_lanes: int,
) -> Iterator[Item]:
    """The decoded samples at `positions` of the canonical order: the one place through which training reads its data.

    A resumable stream replaces this function: same arguments, `positions` starting where the run stopped, tars entered
    by offset in place of the passing over that happens here.

    Args:
        urls: all shards of the set, the same list on every rank.
        positions: rising.
        decode: (sample, epoch) -> item; raises DamagedSample.
        seed: None keeps the order of the tars.
        shuffle_buffer: samples held in memory per lane, undecoded.
        num_lanes: at most the number of shards is used.
    """
    num_lanes = min(num_lanes, len(urls))
    lanes: dict[int, Lane] = {}
    for position in positions:
        k = position % num_lanes
        if k not in lanes:
            slots = lane_samples(urls, k, num_lanes, seed, shuffle_buffer, skip_log)
            lanes[k] = Lane(slots, num_lanes, decode, skip_log)
        yield lanes[k].at(position // num_lanes)


class ShardStream(IterableDataset):
    """The part of the canonical order that belongs to one rank, as a dataset for DataLoader.

    Args:
        shards: what `resolve_shards` found.
        decode: (sample, epoch) -> item.
        batch_size: that of the DataLoader, per rank.
        num_samples: None streams for ever, the trainer stops; otherwise the first so many of the global order.
        first_position: where to go on in the global order, a multiple of world_size * batch_size.
    """

    def __init__(
        self,
        shards: ShardSet,
        decode: Callable[[dict, int], Item],
        skip_log: SkipLog,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = 0,
        shuffle_buffer: int = 256,
        num_lanes: int = 1,
        num_samples: int | None = None,
        first_position: int = 0,
    ) -> None:
        self.shards, self.decode, self.skip_log = shards, decode, skip_log
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.shuffle_buffer, self.num_lanes = seed, shuffle_buffer, num_lanes
        self.num_samples, self.first_position = num_samples, first_position

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        positions = positions_of(
            self.rank,
            self.world_size,
            worker_id,
            num_workers,
            self.batch_size,
            self.first_position,
            self.num_samples,
        )
        order = {"seed": self.seed, "shuffle_buffer": self.shuffle_buffer, "num_lanes": self.num_lanes}
        return sample_stream(self.shards.urls, positions, self.decode, self.skip_log, **order)

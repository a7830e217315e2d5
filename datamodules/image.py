"""Pictures as one-frame clips, and what the image and the video data module share."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from datamodules.order import BucketedOrder, Order, whole_weights
from datamodules.resume import CountConsumed, attach, describe_changes, restart_loader
from datamodules.shard_cache import ShardCache, default_folder
from datamodules.shards import (
    Bucket,
    BucketChooser,
    Catalog,
    Position,
    ShardSet,
    ShardStream,
    SkipLog,
    SkippedSample,
    resolve_sources,
)
from datamodules.slots import SlotLoader
from datamodules.transforms import Sample, SampleTransform, collate, from_bytes, stand_in
from mm_lightning.types import Batch


class ShardDataModule(L.LightningDataModule):
    """Streams samples of WebDataset shards as `mm_lightning.types.Batch`.

    Training streams for ever in an order that follows from the shards, `seed`, `shuffle_buffer`, `num_lanes`, `weights`
    and `buckets` (see `datamodules.order`); the trainer stops by `max_steps`. Ranks come from the trainer's
    `global_rank`, so any mesh of devices reads each sample once. A checkpoint holds how many samples were consumed: a
    resumed run goes on with the very next one, on any number of ranks and workers.

    Args:
        shards: folder with `index.json`, tar, glob, brace pattern, URL (fsspec's, or `pipe:command`), or a list of
            these; for a mixture a mapping from names to these.
        height, width: of the delivered clip, pixels.
        num_frames: 4k+1.
        reference_size: side of the reference pictures, what the vision encoder takes.
        num_references: R, references per sample at most.
        batch_size: per rank.
        num_workers: processes per rank; 0 reads in the training process.
        seed: of the order and of every draw that a sample needs.
        val_shards: None takes the first samples of `shards`.
        num_val_samples: over all ranks, rounded up to a multiple of their number.
        shuffle_buffer: samples of a lane among which the order is shuffled; takes 16 bytes for each, see
            `datamodules.order.ShuffledOrder`.
        num_lanes: shards that are read at the same time, sample by sample in turn; where it is a multiple of the number
            of ranks, no tar is read by two of them in one pass.
        flip_probability: of mirroring a target.
        spatial_compression, temporal_compression: the VAE's.
        weights: name -> share of a source of the mixture, any positive numbers; None for equal shares.
        buckets: (num_frames, height, width) of which each batch has one, chosen by what a sample measures (see
            `datamodules.shards.choose_bucket`); None delivers num_frames, height and width. Validation always does.
        max_bad_share: of damaged samples, that ends the run.
        cache_id: what cached tensors must have been made with, see `SampleTransform`; None does not compare.
        cache_dir: where remote shards are kept, shared by all processes of a machine; None for a folder among the
            system's temporary ones.
        cache_gb: of remote shards kept at most.

    Raises:
        FileNotFoundError: a pattern matches no shard.
        ValueError: sizes, counts or weights that cannot be, shards of the wrong kind.
    """

    kind: str | None = None

    def __init__(
        self,
        shards: str | Sequence[str] | Mapping[str, str | Sequence[str]],
        height: int,
        width: int,
        num_frames: int,
        reference_size: int = 224,
        num_references: int = 1,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        val_shards: str | Sequence[str] | None = None,
        num_val_samples: int = 4,
        shuffle_buffer: int = 256,
        num_lanes: int = 1,
        flip_probability: float = 0.0,
        spatial_compression: int = 8,
        temporal_compression: int = 4,
        weights: Mapping[str, float] | None = None,
        buckets: Sequence[Sequence[int]] | None = None,
        max_bad_share: float = 0.05,
        cache_id: Mapping[str, Mapping[str, Any]] | None = None,
        cache_dir: str | None = None,
        cache_gb: float = 50.0,
    ) -> None:
        super().__init__()
        check_counts(batch_size=batch_size, shuffle_buffer=shuffle_buffer, num_lanes=num_lanes)
        check_share(max_bad_share)
        vae = {"spatial_compression": spatial_compression, "temporal_compression": temporal_compression}
        references = {"reference_size": reference_size, "num_references": num_references}
        options = {**vae, **references, "seed": seed, "cache_id": cache_id}
        self.buckets = [Bucket(*bucket) for bucket in buckets or [(num_frames, height, width)]]
        self.train_transform = BucketTransform(self.buckets, flip_probability=flip_probability, **options)
        self.val_transform = BucketTransform([Bucket(num_frames, height, width)], random_window=False, **options)
        self.sources, self.weights = self.resolve(shards, weights)
        self.val_sources = self.sources if val_shards is None else self.resolve(val_shards)[0]
        self.shard_cache = ShardCache(cache_dir or default_folder(), round(cache_gb * 1e9))
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.num_val_samples, self.max_bad_share = num_val_samples, max_bad_share
        self.shuffle_buffer, self.num_lanes = shuffle_buffer, num_lanes
        self.position = Position()
        self.restored: dict[str, Any] | None = None
        # Shards that were missing when the run first started stay out of the order, so that it never changes.
        self.excluded = [url for found in self.sources.values() for url in found.missing]

    def resolve(self, shards: Any, weights: Mapping[str, float] | None = None) -> tuple[dict[str, ShardSet], dict]:
        """Finds the shards and checks that their index says what this module delivers."""
        sources, shares = resolve_sources(shards, weights)
        for found in sources.values():
            if self.kind and found.kind and found.kind != self.kind:
                raise ValueError(
                    f"shards {shards}: a set of kind {found.kind!r}, {type(self).__name__} takes {self.kind!r}."
                )
        whole_weights(shares)
        return sources, shares

    # Streams --------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        catalog = Catalog(self.sources, self.shard_cache, self.excluded)
        stream = self.stream(catalog, self.train_order(catalog), self.train_transform, start=self.position)
        self.note_lost_shards(catalog)
        return self.loader(stream, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        missing = [url for found in self.val_sources.values() for url in found.missing]
        catalog = Catalog(self.val_sources, self.shard_cache, missing)
        placement = self.placement()
        there = sum(sum(catalog.counts(name)) for name in catalog.sources)
        rounded = -(-min(self.num_val_samples, there) // placement["world_size"]) * placement["world_size"]
        order = catalog.order(None, self.shuffle_buffer, num_lanes=1)
        stream = self.stream(catalog, order, self.val_transform, num_samples=rounded)
        return self.loader(stream, min(self.num_workers, 1), persistent=True)

    def train_order(self, catalog: Catalog) -> Order:
        order = catalog.order(self.seed, self.shuffle_buffer, self.num_lanes, self.weights)
        if len(self.buckets) == 1:
            return order
        chooser = BucketChooser(catalog.reader(), self.buckets)
        return BucketedOrder(order, chooser, len(self.buckets), self.global_batch)

    def stream(self, catalog: Catalog, order: Order, transform: BucketTransform, **options: Any) -> ShardStream:
        """Within a trainer pictures travel as bytes, until `on_after_batch_transfer`."""
        transform.set_bytes(isinstance(self.trainer, L.Trainer))
        limits = {"max_bad_share": self.max_bad_share, **self.placement()}
        return ShardStream(catalog, order, transform, collate, stand_in, self.skip_log, **limits, **options)

    def loader(self, stream: ShardStream, num_workers: int, persistent: bool = False) -> DataLoader:
        """Workers of training are started anew with each iteration, from where the last one stopped."""
        return SlotLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=persistent and num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            slot_bytes=0 if persistent else self.batch_size * stream.decode.max_bytes,
        )

    def placement(self) -> dict[str, int]:
        """Where this process stands; outside of a trainer, alone."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return {"batch_size": self.batch_size, "rank": rank, "world_size": world_size}

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all ranks."""
        accumulated = getattr(self.trainer, "accumulate_grad_batches", 1)
        return self.batch_size * self.placement()["world_size"] * accumulated

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return from_bytes(batch)

    # Resuming -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "fit":
            attach(self.trainer, CountConsumed(self))
            if self.trainer.global_step == 0:
                self.position.consumed, self.restored = 0, None
            self.excluded = list(self.trainer.strategy.broadcast(self.excluded))

    def order_record(self) -> dict[str, Any]:
        """All that the canonical order follows from; plain values."""
        record = {
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "num_lanes": self.num_lanes,
            "weights": {name: float(weight) for name, weight in self.weights.items()},
            "num_samples": {name: found.num_samples for name, found in self.sources.items()},
            "num_shards": {name: len(found.shards) for name, found in self.sources.items()},
            "excluded": [Path(url).name for url in self.excluded],
        }
        if len(self.buckets) > 1:
            record |= {"buckets": [list(bucket) for bucket in self.buckets], "global_batch": self.global_batch}
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.position.consumed, "excluded": self.excluded, "order": self.order_record()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict
        self.position.consumed = int(state_dict["consumed"])
        known = {shard.url for found in self.sources.values() for shard in found.shards}
        if set(state_dict["excluded"]) <= known:
            self.excluded = list(state_dict["excluded"])
        describe_changes(state_dict["order"], self.order_record())
        restart_loader(self.trainer)

    # Damage ---------------------------------------------------------------------------------------------------------

    @cached_property
    def skip_log(self) -> SkipLog:
        """The record that this rank's readers share."""
        self.log_folder = tempfile.TemporaryDirectory(prefix="magicmirror-")  # goes with the module
        return SkipLog(Path(self.log_folder.name) / "skipped.jsonl")

    def note_lost_shards(self, catalog: Catalog) -> None:
        """Names the shards that are left out as a whole."""
        log = self.skip_log
        counts = {shard.url: shard.num_samples for found in self.sources.values() for shard in found.shards}
        for url in self.excluded:
            log.record(SkippedSample(url, "", "the shard is missing", counts[url] or 1))
        for url, reason in catalog.unreadable.items():
            log.record(SkippedSample(url, "", reason))

    @property
    def skipped(self) -> list[SkippedSample]:
        """Every sample and shard that this rank had to leave out so far, each once."""
        return self.skip_log.entries()


def check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def check_share(max_bad_share: float) -> None:
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share is a share between 0 and 1, got {max_bad_share}.")


class BucketTransform:
    """A `SampleTransform` for each size that is delivered. Arguments as there."""

    def __init__(self, buckets: Sequence[Bucket], **options: Any) -> None:
        self.transforms = [
            SampleTransform(bucket.height, bucket.width, num_frames=bucket.num_frames, **options) for bucket in buckets
        ]

    @property
    def max_bytes(self) -> int:
        """Of a sample's pictures as bytes."""
        sides = [3 * t.num_frames * t.target[0] * t.target[1] for t in self.transforms]
        return max(sides) + 3 * self.transforms[0].num_references * self.transforms[0].reference_size ** 2

    def set_bytes(self, as_bytes: bool) -> None:
        for transform in self.transforms:
            transform.as_bytes = as_bytes

    def __call__(self, sample: Mapping[str, bytes | str], epoch: int, bucket: int) -> Sample:
        return self.transforms[bucket](sample, epoch)


class ImageDataModule(ShardDataModule):
    """Pictures: F = 1. Arguments as in `ShardDataModule`, without num_frames; buckets may be (height, width)."""

    kind = "image"

    def __init__(
        self,
        shards: str | Sequence[str] | Mapping[str, str | Sequence[str]],
        height: int,
        width: int,
        buckets: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        with_frames = buckets and [(1, *bucket[-2:]) for bucket in buckets]
        super().__init__(shards, height, width, num_frames=1, buckets=with_frames, **options)

"""Pictures as one-frame clips, and what the image and the video data module share."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from datamodules.shards import ShardSet, ShardStream, SkipLog, SkippedSample, resolve_shards
from datamodules.transforms import SampleTransform, collate


class ShardDataModule(L.LightningDataModule):
    """Streams samples of WebDataset shards as `mm_lightning.types.Batch`.

    Training streams for ever in an order that follows from `seed` alone (see `datamodules.shards`); the trainer stops
    by `max_steps`. Ranks come from the trainer's `global_rank`, so any mesh of devices reads each sample once.

    Args:
        shards: folder with `index.json`, tar, glob, brace pattern, URL, or a list of these.
        height, width: of the delivered clip, pixels.
        num_frames: 4k+1.
        reference_size: side of the reference pictures, what the vision encoder takes.
        num_references: R, references per sample at most.
        batch_size: per rank.
        num_workers: processes per rank; 0 reads in the training process.
        seed: of the order and of every draw that a sample needs.
        val_shards: None takes the first samples of `shards`.
        num_val_samples: over all ranks, rounded up to a multiple of their number.
        shuffle_buffer: undecoded samples held per lane.
        num_lanes: into how many independent lanes the shards are dealt; the number of ranks, or a multiple, keeps
            ranks from reading each other's shards. Part of what determines the order.
        flip_probability: of mirroring a target.
        spatial_compression, temporal_compression: the VAE's.

    Raises:
        FileNotFoundError: a pattern matches no shard.
        ValueError: sizes or counts that cannot be, shards of the wrong kind.
    """

    kind: str | None = None

    def __init__(
        self,
        shards: str | list[str],
        height: int,
        width: int,
        num_frames: int,
        reference_size: int = 224,
        num_references: int = 1,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        val_shards: str | list[str] | None = None,
        num_val_samples: int = 4,
        shuffle_buffer: int = 256,
        num_lanes: int = 1,
        flip_probability: float = 0.0,
        spatial_compression: int = 8,
        temporal_compression: int = 4,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "shuffle_buffer": shuffle_buffer, "num_lanes": num_lanes}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        geometry = (height, width, num_frames, reference_size, num_references, seed)
        vae = {"spatial_compression": spatial_compression, "temporal_compression": temporal_compression}
        self.train_transform = SampleTransform(*geometry, flip_probability=flip_probability, **vae)
        self.val_transform = SampleTransform(*geometry, random_window=False, **vae)
        self.train_set = self.resolve(shards)
        self.val_set = self.train_set if val_shards is None else self.resolve(val_shards)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.num_val_samples = num_val_samples
        self.shuffle_buffer, self.num_lanes = shuffle_buffer, num_lanes
        self.log_folder: tempfile.TemporaryDirectory | None = None

    def resolve(self, shards: str | list[str]) -> ShardSet:
        """Finds the shards and checks that their index says what this module delivers."""
        shard_set = resolve_shards(shards)
        if self.kind and shard_set.kind and shard_set.kind != self.kind:
            raise ValueError(
                f"shards {shards}: a set of kind {shard_set.kind!r}, {type(self).__name__} takes {self.kind!r}."
            )
        return shard_set

    def train_dataloader(self) -> DataLoader:
        stream = ShardStream(
            self.train_set,
            self.train_transform,
            self.skip_log(),
            **self.placement(),
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            num_lanes=self.num_lanes,
        )
        return self.loader(stream, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        placement = self.placement()
        wanted = min(self.num_val_samples, self.val_set.num_samples or self.num_val_samples)
        rounded = -(-wanted // placement["world_size"]) * placement["world_size"]
        stream = ShardStream(
            self.val_set, self.val_transform, self.skip_log(), **placement, seed=None, num_samples=rounded
        )
        return self.loader(stream, min(self.num_workers, 1))

    def loader(self, stream: ShardStream, num_workers: int) -> DataLoader:
        return DataLoader(
            stream,
            batch_size=self.batch_size,
            num_workers=num_workers,
            collate_fn=collate,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def placement(self) -> dict[str, int]:
        """Where this process stands; outside of a trainer, alone."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return {"batch_size": self.batch_size, "rank": rank, "world_size": world_size}

    def skip_log(self) -> SkipLog:
        """The record that this rank's readers share."""
        if self.log_folder is None:
            self.log_folder = tempfile.TemporaryDirectory(prefix="magicmirror-")
        return SkipLog(Path(self.log_folder.name) / "skipped.jsonl")

    @property
    def skipped(self) -> list[SkippedSample]:
        """Every sample and shard that this rank had to leave out so far, each once."""
        return self.skip_log().entries()


class ImageDataModule(ShardDataModule):
    """Pictures: F = 1. Arguments as in `ShardDataModule`, without num_frames."""

    kind = "image"

    def __init__(self, shards: str | list[str], height: int, width: int, **options) -> None:
        super().__init__(shards, height, width, num_frames=1, **options)

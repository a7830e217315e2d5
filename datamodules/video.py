"""Clips of 4k+1 frames."""

from __future__ import annotations

from datamodules.image import ShardDataModule


class VideoDataModule(ShardDataModule):
    """Clips; of a longer one a window of `num_frames` is drawn. Arguments as in `ShardDataModule`."""

    kind = "video"

"""Shards of drawn samples."""

import pytest

from mm_lightning.prepare.shards import ShardWriter
from tests.datamodules.drawn import picture_fields, video_fields


@pytest.fixture
def make_shards(tmp_path):
    """(num_samples, samples_per_shard, ...) -> folder of picture shards; `change` may replace a sample's fields."""

    def make(num_samples=12, samples_per_shard=4, name="shards", num_references=1, change=lambda i, fields: fields):
        with ShardWriter(tmp_path / name, "image", samples_per_shard) as writer:
            for i in range(num_samples):
                writer.write(f"s{i:03d}", change(i, picture_fields(i, num_references)))
        return tmp_path / name

    return make


@pytest.fixture
def make_video_shards(tmp_path):
    def make(num_samples=3, num_frames=9, name="videos", change=lambda i, fields: fields):
        with ShardWriter(tmp_path / name, "video", 4) as writer:
            for i in range(num_samples):
                writer.write(f"v{i:03d}", change(i, video_fields(num_frames)))
        return tmp_path / name

    return make

"""What comes through the slots is what comes without them."""

import functools
import gc
import pickle
from itertools import islice

import lightning as L
import pytest
import torch
from torch.multiprocessing import reductions

from datamodules import slots
from datamodules.image import ImageDataModule
from datamodules.slots import MAX_INLINE_BYTES, SLOTS_PER_WORKER, SlotLoader, inline
from datamodules.video import VideoDataModule
from mm_lightning.types import Batch, TextFeatures

SIZE = {"height": 56, "width": 80, "reference_size": 16}


def in_trainer(module):
    """Pictures travel as bytes only within a trainer."""
    module.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return module


def batches(module, number, **loader) -> list[Batch]:
    made = module.train_dataloader()
    if loader:
        made = SlotLoader(made.dataset, batch_size=None, **loader)
    return list(islice(iter(made), number))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys == other.keys
        for name, value in other._asdict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(one, name), value), name
        assert one.pixels.dtype == torch.uint8


@pytest.fixture
def num_taken(monkeypatch):
    """How many tensors were taken out of slots."""
    count, take = [], slots.take

    @functools.wraps(take)
    def counting(*arguments):
        count.append(arguments)
        return take(*arguments)

    monkeypatch.setattr(slots, "take", counting)
    return lambda: len(count)


OPTIONS = {**SIZE, "batch_size": 3, "num_references": 2, "flip_probability": 0.5}


@pytest.fixture
def expected(make_shards):
    """Thirty batches as they come without slots."""
    return batches(in_trainer(ImageDataModule(make_shards(24, 8, num_references=3), **OPTIONS)), 30, slot_bytes=0)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_that_are_kept_stay_what_they_were(tmp_path, expected, num_workers, num_taken):
    """More of them than there are slots: the others come as PyTorch sends them."""
    module = in_trainer(ImageDataModule(tmp_path / "shards", **OPTIONS, num_workers=num_workers))
    assert_same(batches(module, 30), expected)
    assert num_taken() == 2 * SLOTS_PER_WORKER * max(num_workers, 1)  # targets and references


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_slots_are_used_again(tmp_path, expected, num_workers, num_taken):
    """By whoever lets batches go; a piece of one holds its slot."""
    module, kept = in_trainer(ImageDataModule(tmp_path / "shards", **OPTIONS, num_workers=num_workers)), []
    loader = iter(module.train_dataloader())
    for i, other in enumerate(expected):
        batch = next(loader)
        assert_same([batch], [other])
        if i == 4:  # a second one could leave a hurried worker without a free slot
            kept.append((batch.pixels[1], other.pixels[1]))
    assert all(torch.equal(*pair) for pair in kept)
    ahead = 2 * 2 * max(num_workers - 1, 0)  # of two tensors each: what another worker sends before its turn
    assert 60 <= num_taken() <= 60 + ahead


def test_the_memory_outlives_its_loader(tmp_path, expected):
    found = batches(in_trainer(ImageDataModule(tmp_path / "shards", **OPTIONS, num_workers=1)), 3)
    gc.collect()
    other = batches(in_trainer(ImageDataModule(tmp_path / "shards", **OPTIONS, num_workers=1)), 6)
    assert_same(found, expected[:3])
    assert_same(other, expected[:6])


def test_clips(make_video_shards, num_taken):
    folder = make_video_shards(6)
    options = {**SIZE, "num_frames": 5, "batch_size": 2}
    expected = batches(in_trainer(VideoDataModule(folder, **options)), 4, slot_bytes=0)
    assert_same(batches(in_trainer(VideoDataModule(folder, **options, num_workers=1)), 4), expected)
    assert num_taken() == 8


def test_a_batch_with_stand_ins(make_shards, num_taken):
    folder = make_shards(12, 4, change=lambda i, fields: fields | ({"png": b"broken"} if i % 5 == 0 else {}))
    options = {**SIZE, "batch_size": 4, "max_bad_share": 1.0}
    expected = batches(in_trainer(ImageDataModule(folder, **options)), 4, slot_bytes=0)
    assert any("" in batch.keys for batch in expected)
    assert_same(batches(in_trainer(ImageDataModule(folder, **options, num_workers=1)), 4), expected)
    assert num_taken() == 8


@pytest.mark.parametrize("slot_bytes", [3 * 3 * 56 * 80 + 10, 100])
def test_what_finds_no_room_travels_as_pytorch_sends_it(make_shards, num_taken, slot_bytes):
    """Room for three targets and not for their references, and room for nothing."""
    folder = make_shards(12, 4)
    module = in_trainer(ImageDataModule(folder, **SIZE, batch_size=3))
    expected = batches(module, 4, slot_bytes=0)
    assert_same(batches(module, 4, num_workers=1, slot_bytes=slot_bytes), expected)
    assert num_taken() == (4 if slot_bytes > 1000 else 0)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_batch_brings_a_shared_file(tmp_path, expected, num_workers, monkeypatch):
    """What PyTorch calls for each of them is not called; what came may be written to."""
    files, rebuild = [], reductions.rebuild_storage_fd

    @functools.wraps(rebuild)  # by its name the workers send it
    def counting(*arguments):
        files.append(arguments)
        return rebuild(*arguments)

    monkeypatch.setattr(reductions, "rebuild_storage_fd", counting)
    module = in_trainer(ImageDataModule(tmp_path / "shards", **OPTIONS, num_workers=num_workers))
    loader = iter(module.train_dataloader())
    for other in expected[:8]:
        batch = next(loader)
        assert_same([batch], [other])
        batch.face_boxes.add_(1)
        assert torch.equal(batch.face_boxes, other.face_boxes + 1)
    assert not files


def test_only_small_tensors_are_inlined(expected):
    large, half = torch.rand(MAX_INLINE_BYTES // 4 + 1), torch.rand(2, 3).bfloat16()
    text = TextFeatures(large, torch.tensor([[True, False]]))
    batch = expected[0]._replace(text=text, latent_moments=half, pixels=None)
    sent = inline(batch)
    assert sent.text.prompt_embeds is large
    assert sent.latent_moments is half
    found = pickle.loads(pickle.dumps(sent))
    assert type(found) is Batch
    assert found.text.id_token_mask.tolist() == [[True, False]]
    assert found.captions == batch.captions
    assert_same([found._replace(pixels=expected[0].pixels)], [batch._replace(pixels=expected[0].pixels)])

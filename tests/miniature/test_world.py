"""Shards of people: what the data modules read, the same bytes however they were made, and what is committed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules.image import ImageDataModule
from datamodules.video import VideoDataModule
from mm_lightning.encoders.face import FaceFeatureEncoder, load_vision
from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.miniature import packing, world
from mm_lightning.miniature.captions import parse_caption
from mm_lightning.miniature.filming import CLIPS_STREAM, encode_mp4, stream
from mm_lightning.miniature.layout import WorldSettings, decode_clip, read_samples
from mm_lightning.miniature.motion import sample_clip
from mm_lightning.miniature.packing import require_people
from mm_lightning.miniature.people import sample_person
from mm_lightning.miniature.queries import load_queries, read_queries
from tests.conftest import ROOT
from tests.miniature.conftest import FEW_PEOPLE, arguments_for

GEOMETRY = {"height": 64, "width": 64, "reference_size": 64, "batch_size": 3}
SETTINGS = arguments_for(FEW_PEOPLE)


@pytest.fixture(scope="module")
def packed(few_people, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    world.main(["pack", "--people", str(few_people), "--out", str(folder)])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((first.astype(float) - second) ** 2)))


# What is written


def test_splits_share_nobody_and_are_complete(few_people):
    people = {}
    for split, count in (("train", 4), ("test", 3)):
        stills, clips = (list(read_samples(few_people / split / kind)) for kind in ("images", "videos"))
        people[split] = {sample.meta["identity"] for sample in stills}
        assert len(people[split]) == count
        assert {sample.meta["identity"] for sample in clips} == people[split]
        assert (len(stills), len(clips)) == (3 * count, count)
    assert people["train"].isdisjoint(people["test"])
    assert not (few_people / "validation").exists()
    assert not list(few_people.glob(".*"))


def test_references_are_the_persons_other_stills(few_people):
    stills = {sample.key: sample for sample in read_samples(few_people / "train" / "images")}
    for kind, count in (("images", 2), ("videos", 3)):
        for sample in read_samples(few_people / "train" / kind):
            references = sample.meta["references"]
            assert len({reference["key"] for reference in references} - {sample.key}) == len(references) == count
            for reference in references:
                still = stills[reference["key"]]
                assert still.meta["identity"] == sample.meta["identity"]
                assert sample.fields[reference["file"]] == still.fields["jpg"]
                assert reference["landmarks"] == still.meta["faces"][0]["landmarks"]


def test_captions_tell_what_the_json_says(few_people):
    for kind in ("images", "videos"):
        for sample in read_samples(few_people / "train" / kind):
            told, meta = parse_caption(sample.fields["txt"].decode()), sample.meta["miniature"]
            assert (told.class_word, set(told.actions), told.background) == (
                meta["class_word"],
                set(meta["action"]),
                meta["background"],
            )
            assert f"{meta['attributes']['eyes']} eyes" in meta["rich_caption"]


def test_data_modules_read_them(few_people):
    stills = ImageDataModule(str(few_people / "train" / "images"), **GEOMETRY, num_references=2)
    clips = VideoDataModule(str(few_people / "test" / "videos"), **GEOMETRY, num_references=3, num_frames=5)
    for module, num_frames in ((stills, 1), (clips, 5)):
        batch = next(iter(module.train_dataloader()))
        assert batch.pixels.shape == (3, num_frames, 3, 64, 64)
        assert batch.reference_mask.all()
        assert (batch.weights == 1).all()
        low, high = batch.face_boxes[..., None, :2], batch.face_boxes[..., None, 2:]
        inside = (batch.face_landmarks >= low - 1) & (batch.face_landmarks <= high + 1)
        assert inside.float().mean() > 0.9
        assert not module.skipped


def test_clips_keep_what_was_rendered(few_people):
    from mm_lightning.miniature.render import Renderer

    sample = next(iter(read_samples(few_people / "test" / "videos")))
    person = sample_person(90_000)
    performance = sample_clip(stream(person, CLIPS_STREAM, 0), 5, 8.0)
    rendered = Renderer(64).render(person, performance)
    decoded = decode_clip(sample.fields["mp4"])
    assert psnr(decoded, rendered.frames) >= 36
    meta = sample.meta
    np.testing.assert_allclose([face["landmarks"] for face in meta["faces"]], rendered.landmarks, atol=0.006)
    np.testing.assert_allclose(meta["miniature"]["head"], performance.head, atol=0.051)
    curves = meta["miniature"]["actions"]
    assert len(curves) == (performance.actions.round(2) > 0).any(0).sum()


def test_clip_of_saturated_colours_keeps_them():
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    frames[:, :, ::2, 0] = frames[:, :, 1::2, 2] = 200  # red and blue columns, which subsampling would blend
    assert psnr(decode_clip(encode_mp4(frames, 8)), frames) > 30


def test_encoding_does_not_depend_on_what_lies_in_memory(few_people):
    """Of this clip x264's assembly gave four different encodings within one process."""
    from mm_lightning.miniature.render import Renderer

    person = sample_person(90_001)
    frames = Renderer(64).render(person, sample_clip(stream(person, CLIPS_STREAM, 0), 5, 8.0)).frames
    rng, held, encoded = np.random.default_rng(0), [], set()
    for _ in range(24):
        held = [*held[-9:], np.full(rng.integers(1_000, 200_000), rng.integers(255), np.uint8)]
        encoded.add(encode_mp4(frames, 8))
    assert len(encoded) == 1


# Made again, cut off, on more workers


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_in_the_same_bytes(few_people, tmp_path):
    out = tmp_path / "people"
    command = [sys.executable, "-m", "mm_lightning.miniature.world", "render", "--out", str(out), "--workers", "2"]
    process = subprocess.Popen([*command, *SETTINGS], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: list(out.glob(".parts-*/*.tar")), 600)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not members(process.pid), 30)
    done = {file: file.stat().st_mtime_ns for file in out.glob(".parts-*/*.tar")}
    assert 0 < len(done) < 7
    again = subprocess.run([*command, *SETTINGS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{len(done)}/7" in again.stderr
    fresh = contents(out)
    assert fresh == {name: data for name, data in contents(few_people).items() if "queries" not in name}


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def members(session: int) -> list[str]:
    """Processes of a session."""
    stats = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(file.read_text().rpartition(")")[2].split())
        except OSError:
            continue
    return [stat for stat in stats if int(stat[3]) == session and stat[0] != "Z"]


def test_finished_folder_is_kept(few_people, caplog):
    before = {file: file.stat().st_mtime_ns for file in few_people.rglob("*")}
    with caplog.at_level("INFO"):
        world.main(["render", "--out", str(few_people), *SETTINGS])
    assert "up to date, kept" in caplog.text
    assert before == {file: file.stat().st_mtime_ns for file in few_people.rglob("*")}


def test_folder_of_other_people_is_refused(few_people):
    with pytest.raises(SystemExit, match=r"holds people of train 4 \(wanted: 5\): name another folder"):
        world.main(["render", "--out", str(few_people), *arguments_for(FEW_PEOPLE | {"train": 5})])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num-frames", "16", "num_frames=16: the video VAE takes 4k"),
        ("size", "60", "size=60: .*multiple of 8"),
        ("stills", "1", "stills must be at least 2, got 1"),
        ("train", "-1", "train must be at least 0"),
        ("test", "10001", "test=10001: there are 10000 people"),
        ("workers", "-1", "--workers -1"),
    ],
)
def test_wrong_settings(option, value, message, tmp_path):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        world.main(["render", "--out", str(tmp_path / "people"), f"--{option}", value])
    assert not (tmp_path / "people").exists()


def test_nobody_to_render():
    with pytest.raises(ValueError, match="nobody to render"):
        WorldSettings(train=0, validation=0, test=0)


# Queries


def test_queries_are_what_the_face_encoder_computes(few_people, tiny_folder):
    module = VideoDataModule(str(few_people / "test" / "videos"), **GEOMETRY, num_references=3, num_frames=5)
    batch = next(iter(module.val_dataloader()))
    encoder = FaceFeatureEncoder(load_vision(tiny_folder / "image_encoder"), load_recognizer("dlib"))
    fresh = encoder(batch.references, batch.reference_landmarks, batch.reference_mask).id_query
    metas = {sample.key: sample.meta for sample in read_samples(few_people / "test" / "videos")}
    keys = [[reference["key"] for reference in metas[key]["references"]] for key in batch.keys]
    stored = torch.stack([load_queries(few_people / "test").of(row) for row in keys])
    assert torch.allclose(stored, fresh, atol=3e-4)
    assert (fresh - fresh.roll(1, 0)).norm(dim=-1).min() > 0.05  # so that a mix-up would be seen


def test_statistics_are_those_of_the_train_peoples_queries(few_people, tmp_path):
    world.main(["statistics", "--people", str(few_people), "--out", str(tmp_path / "statistics.safetensors")])
    found = load_file(tmp_path / "statistics.safetensors")
    values = load_queries(few_people / "train").values.double().numpy()
    assert found["mean"].numpy() == pytest.approx(values.mean(0), abs=1e-6)
    assert found["std"].numpy() == pytest.approx(values.std(0, ddof=1), abs=1e-6)
    with pytest.raises(SystemExit, match=r"queries\.safetensors is missing"):
        world.main(["statistics", "--people", str(tmp_path), "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_queries_go_on_where_they_were_cut(few_people, tmp_path):
    people = tmp_path / "people"
    shutil.copytree(few_people, people)
    file = people / "train" / "queries.safetensors"
    values, meta = read_queries(file)
    file.unlink()
    marked = torch.zeros(5, 128, dtype=torch.float16)  # zeros show that these are not computed again
    save_file({"queries": marked}, file.with_name(f"{file.name}.partial"), meta)
    world.main(["queries", "--people", str(people)])
    again = load_file(file)["queries"]
    assert torch.equal(again[:5], marked)
    assert torch.allclose(again[5:].float(), values[5:].float(), atol=1e-3)
    assert not list(file.parent.glob("*.partial"))


def test_queries_of_other_stills_are_refused(few_people, tmp_path):
    people = tmp_path / "people"
    shutil.copytree(few_people, people)
    shutil.copy(people / "test" / "queries.safetensors", people / "train")
    with pytest.raises(ValueError, match="of other stills: remove it and run `world queries` again"):
        load_queries(people / "train")
    (people / "train" / "queries.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"queries.safetensors is missing: run .*world queries --people"):
        world.main(["pack", "--people", str(people), "--out", str(tmp_path / "packed")])


# The committed form


def test_unpacked_people_are_the_same_bytes(few_people, packed, tmp_path):
    out = tmp_path / "new" / "people"
    world.main(["unpack", "--out", str(out), "--assets", str(packed)])
    assert contents(out) == contents(few_people)
    stored = sum(len(data) for name, data in contents(out).items() if name.endswith(".tar"))
    assert sum(len(data) for data in contents(packed).values()) < stored / 3


def test_packing_twice_gives_the_same_bytes(few_people, packed, tmp_path):
    world.main(["pack", "--people", str(few_people), "--out", str(tmp_path)])
    assert contents(tmp_path) == contents(packed)


def test_require_people_keeps_or_unpacks(few_people, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.unpack, "__defaults__", (packed,))
    assert require_people(few_people) == few_people
    out = require_people(str(tmp_path / "people"))
    assert contents(out) == contents(few_people)
    shutil.rmtree(out / "test")  # lost; what is there stays
    kept = (out / "train" / "images" / "index.json").stat().st_mtime_ns
    require_people(out)
    assert contents(out) == contents(few_people)
    assert (out / "train" / "images" / "index.json").stat().st_mtime_ns == kept


def test_damaged_archive_is_refused_and_leaves_nothing(packed, tmp_path):
    assets = tmp_path / "assets"
    shutil.copytree(packed, assets)
    data = bytearray((assets / "train.tar.xz").read_bytes())
    data[len(data) // 2] ^= 1
    (assets / "train.tar.xz").write_bytes(data)
    with pytest.raises(SystemExit, match=r"train\.tar\.xz is damaged, its checksum"):
        world.main(["unpack", "--out", str(tmp_path / "people"), "--assets", str(assets)])
    assert sorted(file.name for file in (tmp_path / "people").iterdir()) == ["test"]
    (assets / "train.tar.xz").unlink()
    with pytest.raises(SystemExit, match=r"train\.tar\.xz is missing"):
        world.main(["unpack", "--out", str(tmp_path / "people"), "--assets", str(assets)])


def test_nothing_to_unpack(tmp_path):
    with pytest.raises(SystemExit, match=r"manifest\.json is missing: .*Render people instead"):
        world.main(["unpack", "--out", str(tmp_path / "people"), "--assets", str(tmp_path)])


def test_unpacking_over_something_else_is_refused(few_people, packed, tmp_path):
    mine = tmp_path / "test" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(SystemExit, match="test holds something else, or damaged shards: remove it first"):
        world.main(["unpack", "--out", str(tmp_path), "--assets", str(packed)])
    assert mine.read_text() == "keep"
    others = json.loads((few_people / "settings.json").read_text())
    others["settings"]["seed"] = 1
    (tmp_path / "settings.json").write_text(json.dumps(others))
    with pytest.raises(SystemExit, match="holds other people than"):
        world.main(["unpack", "--out", str(tmp_path), "--assets", str(packed)])


def test_damaged_shards_are_not_packed(few_people, tmp_path):
    people = tmp_path / "people"
    shutil.copytree(few_people, people)
    shard = people / "train" / "images" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(SystemExit, match=r"train-000001\.tar damaged"):
        world.main(["pack", "--people", str(people), "--out", str(tmp_path / "packed")])
    assert not (tmp_path / "packed").exists()


def test_unfinished_people_are_not_packed(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no finished people \(settings\.json is missing\)"):
        world.main(["pack", "--people", str(tmp_path), "--out", str(tmp_path / "packed")])

"""Entering tars by offset: the same bytes as WebDataset reads, checked; indices made, kept, and refused when stale."""

import json
import logging
import os
import shutil
import tarfile
from contextlib import nullcontext

import pytest
import webdataset as wds

from datamodules.tars import (
    DamagedSample,
    DamagedShard,
    OpenTar,
    Shard,
    ShardReader,
    StoredSample,
    TarIndex,
    cut_short,
    index_text,
    json_size,
    load_header,
    load_tar_index,
    scan_tar,
)


@pytest.fixture
def folder(make_shards):
    return make_shards(6, 3, num_references=2)


def sha256(folder, number=0):
    return json.loads((folder / "index.json").read_text())["shards"][number]["sha256"]


def all_samples(path, digest=None):
    tar = OpenTar(str(path), path, digest)
    return [tar.sample(i) for i in range(len(tar.index))]


def test_what_is_read_by_offset_is_what_webdataset_reads(folder):
    path = folder / "train-000001.tar"
    expected = list(wds.WebDataset(str(path), shardshuffle=False))
    found = [dict(sample) for sample in all_samples(path)]
    assert [{k: v for k, v in s.items() if k != "__local_path__"} for s in expected] == found


def test_the_writers_index_is_the_one_that_a_walk_finds(folder):
    path = folder / "train-000000.tar"
    written, walked = TarIndex((folder / "train-000000.tar.index").read_text()), scan_tar(path, sha256(folder))
    assert written.header == walked.header
    assert [written[i] for i in range(3)] == [walked[i] for i in range(3)]
    assert written.sizes == [(1, 60, 80)] * 3
    assert {field.crc32 is not None for field in written[0][1].values()} == {True}


def test_an_index_is_made_once_and_left_beside_the_tar(folder, monkeypatch):
    path, beside = folder / "train-000000.tar", folder / "train-000000.tar.index"
    written = beside.read_text()
    beside.unlink()
    expected = [dict(sample) for sample in all_samples(path, sha256(folder))]
    assert beside.read_text() == written
    monkeypatch.setattr("datamodules.tars.scan_tar", None)
    assert [dict(sample) for sample in all_samples(path, sha256(folder))] == expected


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    path = folder / "train-000000.tar"
    (folder / "train-000000.tar.index").unlink()

    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert len(all_samples(path)) == 3
    assert not (folder / "train-000000.tar.index").exists()


@pytest.mark.parametrize("content", ["", "{}", "garbage", '{"version": 9, "num_samples": 0}', "half"])
def test_a_broken_index_is_made_anew(folder, content):
    beside = folder / "train-000000.tar.index"
    whole = beside.read_text()
    beside.write_text("".join(whole.splitlines(True)[:2]) if content == "half" else content)
    assert len(all_samples(folder / "train-000000.tar", sha256(folder))) == 3
    assert beside.read_text() == whole


def test_the_index_of_another_tar_is_not_used(make_shards):
    one, other = make_shards(3, 3, name="one"), make_shards(3, 3, name="other", num_references=2)
    shutil.copy(other / "train-000000.tar.index", one / "train-000000.tar.index")
    samples = all_samples(one / "train-000000.tar", sha256(one))
    assert all("ref1.jpg" not in sample and sample["txt"] for sample in samples)


def test_without_checksums_of_its_own_a_tar_is_vouched_for_by_the_index_of_the_set(folder, caplog):
    path = folder / "train-000000.tar"
    (folder / "train-000000.tar.index").unlink()
    assert load_tar_index(path)[0][1]["txt"].crc32 is None
    assert load_tar_index(path, sha256(folder))[0][1]["txt"].crc32 is not None
    flip(path, "s001.png")
    (folder / "train-000000.tar.index").unlink()
    with caplog.at_level(logging.WARNING):
        index = load_tar_index(path, sha256(folder))
    assert "not those that index.json records" in caplog.text
    assert (len(index), index[0][1]["txt"].crc32) == (3, None)


@pytest.mark.parametrize(("num_samples", "seconds"), [(30, -1000), (3, 1000)])
def test_without_checksum_the_index_of_a_tar_that_was_replaced_is_not_used(folder, make_shards, num_samples, seconds):
    """What took the tar's place has another size, or is newer than the index."""
    change = lambda i, fields: fields | {"txt": "A woman img"}  # noqa: E731
    other = make_shards(num_samples, num_samples, name="other", num_references=2, change=change)
    path, beside = folder / "train-000000.tar", folder / "train-000000.tar.index"
    size, made = path.stat().st_size, beside.stat().st_mtime
    shutil.copy(other / path.name, path)
    os.utime(path, (made + seconds, made + seconds))
    assert (path.stat().st_size == size) == (num_samples == 3)
    assert [s["txt"] for s in all_samples(path)] == [b"A woman img"] * num_samples
    assert load_header(path)["num_samples"] == num_samples


def test_a_tar_whose_copy_is_under_way_leaves_no_index(folder):
    path, beside = folder / "train-000000.tar", folder / "train-000000.tar.index"
    whole, part = path.read_bytes(), offset_of(path, "s001.png")
    beside.unlink()
    path.write_bytes(whole[:part])
    assert load_header(path)["num_samples"] < 3
    assert not beside.exists()
    path.write_bytes(whole)
    assert load_header(path)["num_samples"] == len(all_samples(path)) == 3
    assert beside.exists()


def offset_of(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset_data


def flip(path, name, byte=40):
    with open(path, "r+b") as file:
        file.seek(offset_of(path, name) + byte)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))


def test_a_flipped_bit_is_noticed_where_it_is_read(folder):
    path = folder / "train-000000.tar"
    flip(path, "s001.ref0.jpg")
    samples = all_samples(path, sha256(folder))
    with pytest.raises(DamagedSample, match=r"ref0\.jpg was changed: its checksum"):
        samples[1]["ref0.jpg"]
    assert samples[1]["png"]
    assert [dict(samples[i])["__key__"] for i in (0, 2)] == ["s000", "s002"]


def test_a_cut_takes_what_stands_behind_it(folder):
    path = folder / "train-000000.tar"
    os.truncate(path, offset_of(path, "s001.png") + 10)
    samples = all_samples(path, sha256(folder))
    assert dict(samples[0])
    assert samples[1]["json"]
    with pytest.raises(DamagedSample, match=r"png is cut short: 10 of \d+ bytes"):
        samples[1]["png"]
    with pytest.raises(DamagedSample, match="json is cut short: 0 of"):
        samples[2]["json"]


@pytest.mark.parametrize("cut", ["s001.json", "s001.png"])
def test_a_cut_tar_without_index_gives_what_a_walk_finds(folder, cut):
    path = folder / "train-000000.tar"
    where = offset_of(path, cut)
    (folder / "train-000000.tar.index").unlink()
    assert not cut_short(path)
    os.truncate(path, where - 500)
    assert cut_short(path)
    assert dict(all_samples(path)[0])["__key__"] == "s000"


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 200])
def test_what_is_no_tar_holds_nothing(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    reader = ShardReader([Shard(str(tmp_path / "a.tar"), 3)], lambda shard: nullcontext(shard.url))
    with pytest.raises(DamagedShard, match="only 0 samples"):
        reader.sample(0, 0)
    assert cut_short(tmp_path / "a.tar")


def test_folders_and_capitals_in_names(tmp_path):
    """WebDataset: the key keeps the folder, extensions are lower case, `__x__` and bare names are no samples."""
    (tmp_path / "b").write_bytes(b"content")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x/one.JPG", "x/one.txt", "__meta__", "__meta__/a.txt", "bare", "ünïcode.json"):
            tar.add(tmp_path / "b", name)
    keys = {sample["__key__"]: list(sample) for sample in all_samples(tmp_path / "a.tar")}
    expected = {s["__key__"]: s for s in wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)}
    assert set(keys) == set(expected) == {"x/one", "ünïcode"}
    assert keys["x/one"][2:] == ["jpg", "txt"]


@pytest.mark.parametrize("key", ["x\u2028y", "x\x85y", "caf\udce9"])
def test_names_of_foreign_tars(tmp_path, key):
    """Line ends of Unicode, and bytes that are not UTF-8."""
    (tmp_path / "b").write_bytes(b"content")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a", key, "b"):
            tar.add(tmp_path / "b", f"{name}.txt")
    for _ in range(2):
        assert [s["__key__"] for s in all_samples(tmp_path / "a.tar")] == ["a", key, "b"]
    assert {path.name for path in tmp_path.iterdir()} == {"b", "a.tar", "a.tar.index"}


def test_an_index_may_hold_line_ends_of_unicode_as_they_are():
    text = index_text([("x\u2028y", {}), ("b", {})], [(1, 60, 80)] * 2, 1024, None)
    index = TarIndex(text.replace("\\u2028", "\u2028"))
    assert [index[i][0] for i in range(2)] == ["x\u2028y", "b"]


def test_sizes_that_are_no_numbers_are_not_known():
    for text in (
        '{"num_frames": 1, "height": Infinity, "width": 80}',
        '{"num_frames": 1, "height": null, "width": 80}',
    ):
        assert json_size(text.encode()) == (0, 0, 0)


def test_a_sample_is_a_mapping(folder):
    sample = all_samples(folder / "train-000000.tar")[0]
    assert isinstance(sample, StoredSample)
    assert len(sample) == len(list(sample)) == 7
    assert "png" in sample
    assert "jpg" not in sample
    with pytest.raises(KeyError):
        sample["jpg"]


def test_few_tars_stay_open(make_shards):
    folder = make_shards(10, 1)
    shards = [Shard(str(folder / f"train-{i:06d}.tar"), 1) for i in range(10)]
    reader = ShardReader(shards, lambda shard: nullcontext(shard.url), max_open=3)
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(10), 0, 5]:
        assert reader.sample(i, 0)["__key__"] == f"s{i:03d}"
    assert len(os.listdir("/proc/self/fd")) - before == 3


def test_a_shard_that_is_not_there_is_not_asked_for_again_and_again(tmp_path):
    asked = []
    reader = ShardReader(
        [Shard(str(tmp_path / "a.tar"), 2)], lambda shard: asked.append(shard) or nullcontext(shard.url)
    )
    for _ in range(3):
        with pytest.raises(DamagedShard, match="cannot be opened"):
            reader.sample(0, 0)
    assert len(asked) == 1
    with pytest.raises(FileNotFoundError):
        reader.sizes(0)


def test_a_shard_that_could_not_be_opened_is_tried_again_later(folder, monkeypatch):
    path, gone = folder / "train-000000.tar", folder / "gone"
    reader = ShardReader([Shard(str(path), 3)], lambda shard: nullcontext(shard.url))
    path.rename(gone)
    with pytest.raises(DamagedShard, match="cannot be opened"):
        reader.sample(0, 0)
    gone.rename(path)
    with pytest.raises(DamagedShard, match="cannot be opened"):
        reader.sample(0, 0)
    monkeypatch.setattr("datamodules.tars.RETRY_SECONDS", 0.0)
    assert reader.sample(0, 0)["__key__"] == "s000"


def test_nothing_is_read_that_is_not_asked_for(folder, monkeypatch):
    read = []
    sample = all_samples(folder / "train-000000.tar")[2]
    pread = os.pread
    monkeypatch.setattr("datamodules.tars.os.pread", lambda *args: read.append(args[1]) or pread(*args))
    text = sample["txt"]
    assert read == [len(text)]

"""Tars that webdataset reads back, the same bytes for the same samples, whole or absent."""

import hashlib
import json
import tarfile

import pytest
import webdataset as wds

from mm_lightning.prepare.shards import ShardWriter, damaged_shards

FIELDS = {"jpg": b"\xff\xd8picture", "txt": "Zoë, a woman img", "json": {"b": 1, "a": [2]}, "ref0.jpg": b"reference"}


def write(folder, number=5, per_shard=2, fields=FIELDS):
    with ShardWriter(folder, "image", per_shard) as writer:
        for i in range(number):
            writer.write(f"k{i}", fields)
    return folder


def test_webdataset_reads_back_what_was_written(tmp_path):
    write(tmp_path)
    samples = list(wds.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["k0", "k1", "k2", "k3", "k4"]
    assert samples[3]["txt"].decode() == FIELDS["txt"]
    assert json.loads(samples[3]["json"]) == FIELDS["json"]
    assert (samples[3]["jpg"], samples[3]["ref0.jpg"]) == (FIELDS["jpg"], FIELDS["ref0.jpg"])


def test_the_index_counts_and_sums(tmp_path):
    index = json.loads((write(tmp_path) / "index.json").read_text())
    assert (index["kind"], index["num_samples"]) == ("image", 5)
    assert [shard["num_samples"] for shard in index["shards"]] == [2, 2, 1]
    for shard in index["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert (shard["num_bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_bytes_depend_on_the_samples_alone(tmp_path):
    turned = dict(reversed(FIELDS.items())) | {"json": {"a": [2], "b": 1}}
    one, two = write(tmp_path / "one"), write(tmp_path / "two", fields=turned)
    assert (one / "index.json").read_bytes() == (two / "index.json").read_bytes()
    with tarfile.open(one / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_an_interrupted_run_leaves_no_index_and_no_half_tar(tmp_path):
    write(tmp_path)

    def interrupted():
        with ShardWriter(tmp_path, "image", 2) as writer:
            for i in range(3):
                writer.write(f"new{i}", FIELDS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-000000.tar", "train-000000.tar.index"]
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert tar.getnames()[0].startswith("new0")


def test_an_earlier_longer_set_leaves_nothing_behind(tmp_path):
    write(tmp_path, 6)
    write(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["index.json", "train-000000.tar", "train-000000.tar.index"]


def test_only_what_was_written_here_is_removed(tmp_path):
    """What `index.json` lists or has an index beside it."""
    write(tmp_path, 4)
    (tmp_path / "train-000000.tar.index").unlink()
    (tmp_path / "notes.tar").write_bytes(b"")
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["notes.tar", "train-000000.tar"]
    (tmp_path / "train-00007.tar").write_bytes(b"another's")
    with pytest.raises(ValueError, match=r"train-00007\.tar is not a shard that was written here; move it away"):
        write(tmp_path, 2)
    assert (tmp_path / "train-00007.tar").read_bytes() == b"another's"
    assert damaged_shards(tmp_path) == []


def test_damage_and_loss_are_found(tmp_path):
    assert damaged_shards(write(tmp_path)) == []
    data = bytearray((tmp_path / "train-000001.tar").read_bytes())
    data[600] ^= 1
    (tmp_path / "train-000001.tar").write_bytes(data)
    (tmp_path / "train-000002.tar").unlink()
    assert damaged_shards(tmp_path) == ["train-000001.tar", "train-000002.tar"]


@pytest.mark.parametrize("key", ["", "a.b", "a/b"])
def test_keys_that_webdataset_would_misread(tmp_path, key):
    with pytest.raises(ValueError, match="without dot or slash"), ShardWriter(tmp_path, "image") as writer:
        writer.write(key, FIELDS)


def test_other_wrong_use(tmp_path):
    with ShardWriter(tmp_path, "image") as writer:
        writer.write("k", FIELDS)
        with pytest.raises(ValueError, match="written twice"):
            writer.write("k", FIELDS)
    with pytest.raises(ValueError, match="kind must be one of"):
        ShardWriter(tmp_path, "audio")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ShardWriter(tmp_path, "image", 0)

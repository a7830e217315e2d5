"""Patterns, folders, addresses and mixtures -> shards."""

import json
import re
import shutil

import pytest

from datamodules.resolve import resolve_shards, resolve_sources
from datamodules.tars import Shard


def names(found):
    return [url.rsplit("/", 1)[1] for url in found.urls]


def test_a_folder_with_an_index_gives_its_tars_counts_and_kind(make_shards):
    folder = make_shards(10, 4)
    found = resolve_shards(folder)
    assert found.urls == [str(folder / f"train-{i:06d}.tar") for i in range(3)]
    assert [shard.num_samples for shard in found.shards] == [4, 4, 2]
    assert all(len(shard.sha256) == 64 and shard.num_bytes > 1024 for shard in found.shards)
    assert (found.num_samples, found.kind, found.missing) == (10, "image", ())
    assert resolve_shards(folder / "index.json") == found


@pytest.mark.parametrize("pattern", ["train-00000{0..2}.tar", "train-*.tar", "train-00000?.tar"])
def test_patterns(make_shards, pattern):
    folder = make_shards(10, 4)
    assert names(resolve_shards(f"{folder}/{pattern}")) == [f"train-{i:06d}.tar" for i in range(3)]


def test_a_list_joins_and_a_folder_without_index_is_globbed(make_shards):
    one, two = make_shards(4, 4, name="one"), make_shards(4, 4, name="two")
    assert resolve_shards([one, str(two)]).num_samples == 8
    (two / "index.json").unlink()
    joined = resolve_shards([one, two])
    assert joined.num_samples is None
    assert len(joined.urls) == 2


def test_addresses_are_passed_on(make_shards):
    assert resolve_shards("pipe:cat {0..1}.tar").shards == [Shard("pipe:cat {0..1}.tar")]  # the shell's braces
    found = resolve_shards("s3://set/train-{00..02}.tar")
    assert found.urls == [f"s3://set/train-0{i}.tar" for i in range(3)]


@pytest.mark.parametrize("address", ["file://{}/index.json", "pipe:cat {}/index.json"])
def test_the_index_of_a_set_elsewhere_lists_its_shards(make_shards, address):
    folder = make_shards(10, 4)
    found = resolve_shards(address.format(folder))
    assert found.urls == [address.format(folder).replace("index.json", f"train-{i:06d}.tar") for i in range(3)]
    assert (found.num_samples, found.kind) == (10, "image")
    assert [s[1:] for s in found.shards] == [s[1:] for s in resolve_shards(folder).shards]
    with pytest.raises(FileNotFoundError, match=r"no shards: .*elsewhere/index\.json cannot be read"):
        resolve_shards(address.format("/elsewhere"))


def test_nothing_matched_names_the_pattern_and_what_is_there(make_shards):
    folder = make_shards(4, 4)
    with pytest.raises(FileNotFoundError, match=r"valid-\*\.tar.*holds: index\.json, train-000000\.tar"):
        resolve_shards(f"{folder}/valid-*.tar")
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar.*holds"):
        resolve_shards(f"{folder}/train-00000{{0..1}}.tar")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_shards(f"{folder}-missing/*.tar")
    with pytest.raises(FileNotFoundError, match="empty"):
        resolve_shards([])


def test_an_empty_folder_and_a_broken_index(make_shards, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds: nothing"):
        resolve_shards(tmp_path / "empty")
    folder = make_shards(8, 4)
    for text in ("{}", "[1]", '{"shards": [{"name": "a.tar"}]}', "no json"):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match="not an index"):
            resolve_shards(folder)
    (folder / "index.json").write_text('{"shards": [], "num_samples": 0}')
    with pytest.raises(FileNotFoundError, match="lists none"):
        resolve_shards(folder)


def test_missing_shards_are_noted_unless_all_are(make_shards):
    folder = make_shards(12, 4)
    (folder / "train-000001.tar").unlink()
    found = resolve_shards(folder)
    assert len(found.urls) == 3
    assert found.missing == (str(folder / "train-000001.tar"),)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"missing, all of them: \['train-000000\.tar'"):
        resolve_shards(folder)


def test_a_listed_shard_may_lie_in_a_subfolder(make_shards):
    folder = make_shards(8, 4)
    (folder / "part").mkdir()
    shutil.move(folder / "train-000001.tar", folder / "part" / "train-000001.tar")
    index = (folder / "index.json").read_text().replace('"train-000001', '"part/train-000001')
    (folder / "index.json").write_text(index)
    assert resolve_shards(folder).missing == ()


@pytest.mark.parametrize("address", ["{}", "file://{}/index.json", "pipe:cat {}/index.json"])
@pytest.mark.parametrize(
    "name",
    ["a.tar; touch ran", "$(touch ran).tar", "/a.tar", "../a.tar", "part/../../a.tar", "a b.tar", "-a.tar", "", 3],
)
def test_a_name_that_is_more_than_a_name_is_refused(make_shards, tmp_path, address, name):
    folder = make_shards(8, 4)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["name"] = name
    (folder / "index.json").write_text(json.dumps(index))
    words = rf"{folder}/index\.json.*" + (rf"shard name {re.escape(repr(name))}" if name != 3 else "TypeError")
    with pytest.raises(ValueError, match=words):
        resolve_shards(address.format(folder))


def test_kinds_do_not_mix(make_shards, make_video_shards):
    pictures, clips = make_shards(1), make_video_shards(1)
    with pytest.raises(ValueError, match="different kinds"):
        resolve_shards([pictures, clips])
    with pytest.raises(ValueError, match="different kinds"):
        resolve_sources({"a": pictures, "b": clips}, None)


def test_sources_with_names(make_shards):
    one, two = make_shards(4, 4, name="one"), make_shards(6, 4, name="two")
    sources, weights = resolve_sources({"a": one, "b": [two], "left out": None}, {"a": 3, "b": 1})
    assert {name: found.num_samples for name, found in sources.items()} == {"a": 4, "b": 6}
    assert weights == {"a": 3, "b": 1}
    assert resolve_sources({"a": one, "b": None}, {"a": 3, "b": 1})[1] == {"a": 3}
    assert resolve_sources({"a": one, "b": two}, None)[1] == {"a": 1, "b": 1}
    assert list(resolve_sources(one, None)[0]) == [""]
    with pytest.raises(ValueError, match=r"weights are given for \['c'\], but shards has \['a'\]"):
        resolve_sources({"a": one}, {"c": 1})
    with pytest.raises(ValueError, match="one source without a name"):
        resolve_sources(one, {"a": 1})
    with pytest.raises(FileNotFoundError, match="no source"):
        resolve_sources({}, None)

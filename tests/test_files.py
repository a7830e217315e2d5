"""Files appear whole or not at all."""

import json
import threading

import pytest

from mm_lightning.files import check_writable, write_json, write_text


def test_a_reader_never_sees_half_a_file(tmp_path):
    """One writes long and short texts in turn while another reads."""
    file, texts = tmp_path / "new/folder/a.txt", ["ä" * 300_000, "b"]
    write_text(file, texts[0])
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(file.read_text(encoding="utf-8"))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        write_text(file, texts[i % 2])
    done.set()
    reader.join()
    assert seen <= set(texts)
    assert seen
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"b": "ü", "a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": 1, "b": "ü"}


def test_keys_are_sorted_unless_their_order_says_something(tmp_path):
    write_json(tmp_path / "sorted.json", {"b": 1, "a": 2})
    write_json(tmp_path / "kept.json", {"b": 1, "a": 2}, sort_keys=False)
    assert list(json.loads((tmp_path / "sorted.json").read_text())) == ["a", "b"]
    assert list(json.loads((tmp_path / "kept.json").read_text())) == ["b", "a"]


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a")
    check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ValueError, match=rf"Nothing can be written to {folder}: {tmp_path}/file is a file"):
            check_writable(folder)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"new: no permission in {tmp_path}"):
        check_writable(tmp_path / "new")

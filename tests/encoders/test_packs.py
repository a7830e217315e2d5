import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

from mm_lightning.encoders.packs import load_onnx, resolve_pack


def write_model(path: Path, in_dims, out_dims) -> Path:
    """A graph of one node that declares these shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in (("x", in_dims), ("y", out_dims))
    ]
    save(
        helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])),
        path,
    )
    return path


def write_pack(folder: Path, recognition="w600k_r50.onnx") -> Path:
    """The five files of buffalo_l, by name and shape."""
    write_model(folder / "1k3d68.onnx", ["N", 3, 192, 192], [1, 3309])
    write_model(folder / "2d106det.onnx", ["N", 3, 192, 192], [1, 212])
    write_model(folder / "det_10g.onnx", [1, 3, "H", "W"], [12800, 1])
    write_model(folder / "genderage.onnx", ["N", 3, 96, 96], [1, 3])
    return write_model(folder / recognition, ["N", 3, 112, 112], [1, 512])


@pytest.mark.parametrize("recognition", ["w600k_r50.onnx", "glintr100.onnx", "my_arcface.onnx", "unnamed.onnx"])
def test_the_recognition_network_is_found_by_name_or_shape(tmp_path, recognition):
    file = write_pack(tmp_path / "models" / "pack", recognition)
    assert resolve_pack("pack", tmp_path) == file
    assert resolve_pack(file.parent, tmp_path / "elsewhere") == file
    assert resolve_pack(str(file), tmp_path / "elsewhere") == file


def test_home_and_relative_folders_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = write_pack(tmp_path / ".insightface" / "models" / "buffalo_l")
    assert resolve_pack("buffalo_l") == file
    assert resolve_pack("~/.insightface/models/buffalo_l") == file
    local = write_pack(tmp_path / "weights" / "mine")
    assert resolve_pack("weights/mine").resolve() == local


def test_a_missing_pack_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        resolve_pack("buffalo_l", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "models" / "buffalo_l") in message
    for word in ("w600k_*.onnx", "glintr100.onnx", "github.com/deepinsight/insightface", "non-commercial research"):
        assert word in message
    assert "not unpacked" not in message


def test_an_archive_beside_the_missing_pack_is_pointed_out(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "antelopev2.zip").touch()
    with pytest.raises(FileNotFoundError, match=r"antelopev2\.zip lies there but is not unpacked"):
        resolve_pack("antelopev2", tmp_path)


def test_a_missing_file_and_an_empty_pack_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such recognition network: .*w600k_r50\.onnx"):
        resolve_pack(tmp_path / "w600k_r50.onnx")
    folder = tmp_path / "models" / "buffalo_l"
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"buffalo_l: expected one of .*, found nothing"):
        resolve_pack("buffalo_l", tmp_path)


def test_a_pack_without_recognition_lists_what_it_holds(tmp_path):
    write_pack(tmp_path / "models" / "pack").unlink()
    with pytest.raises(FileNotFoundError, match=r"found 1k3d68\.onnx, 2d106det\.onnx, det_10g\.onnx, genderage\.onnx"):
        resolve_pack("pack", tmp_path)


def test_several_recognition_networks_are_not_guessed_between(tmp_path):
    file = write_pack(tmp_path / "models" / "pack")
    write_model(file.with_name("glintr100.onnx"), ["N", 3, 112, 112], [1, 512])
    with pytest.raises(ValueError, match=r"\(glintr100\.onnx, w600k_r50\.onnx\): give the path"):
        resolve_pack("pack", tmp_path)


@pytest.mark.parametrize("already_up", [(), ("det_10g.onnx",)])
def test_a_doubly_nested_pack_is_repaired_and_logged(tmp_path, caplog, already_up):
    folder = tmp_path / "models" / "antelopev2"
    names = {file.name for file in write_pack(folder / "antelopev2", "glintr100.onnx").parent.iterdir()}
    for name in already_up:
        (folder / "antelopev2" / name).rename(folder / name)
    with caplog.at_level(logging.WARNING):
        assert resolve_pack("antelopev2", tmp_path) == folder / "glintr100.onnx"
    assert {file.name for file in folder.iterdir()} == names
    assert "doubly nested" in caplog.text
    assert "glintr100.onnx" in caplog.text
    caplog.clear()
    assert resolve_pack("antelopev2", tmp_path) == folder / "glintr100.onnx"
    assert not caplog.records


def test_repair_overwrites_nothing_and_keeps_other_files(tmp_path):
    folder = tmp_path / "models" / "pack"
    write_pack(folder / "pack")
    write_model(folder / "det_10g.onnx", [1, 3, 640, 640], [1])
    before = (folder / "det_10g.onnx").read_bytes()
    (folder / "pack" / "licence.txt").touch()
    assert resolve_pack("pack", tmp_path) == folder / "w600k_r50.onnx"
    assert (folder / "det_10g.onnx").read_bytes() == before
    assert {file.name for file in (folder / "pack").iterdir()} == {"det_10g.onnx", "licence.txt"}


def test_another_folder_inside_is_left_alone(tmp_path):
    file = write_pack(tmp_path / "models" / "buffalo_l")
    with pytest.raises(FileNotFoundError, match="found buffalo_l"):
        resolve_pack(tmp_path / "models")
    assert file.is_file()


def test_many_processes_may_repair_at_once(tmp_path):
    folder = tmp_path / "models" / "pack"
    for index in range(200):
        write_model(folder / "pack" / f"part{index}.onnx", [1], [1])
    write_pack(folder / "pack")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: resolve_pack("pack", tmp_path), range(8)))
    assert set(found) == {folder / "w600k_r50.onnx"}
    assert len(list(folder.glob("*.onnx"))) == 205


def test_a_pack_that_cannot_be_written_to_is_used_as_it_is(tmp_path, monkeypatch, caplog):
    file = write_pack(tmp_path / "models" / "pack" / "pack")

    def refuse(self, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    assert resolve_pack("pack", tmp_path) == file
    assert "could not be repaired" in caplog.text


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", b"\x08\x07\x12\x07pytorch"])
def test_a_broken_download_is_named(tmp_path, content):
    path = tmp_path / "w600k_r50.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"\({len(content)} bytes\) is not a readable ONNX file.*fetch it again"):
        load_onnx(path)

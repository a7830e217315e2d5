"""Manifests, as people write them and as people get them wrong."""

import json

import pytest

from mm_lightning.evaluation.manifest import read_manifest


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "b.gif", "her.jpg", "him.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder, entries, name="manifest.json"):
    (folder / name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return folder / name


def test_json_in_a_folder(folder):
    write(folder, [{"video": "a.mp4", "prompt": "A woman", "references": ["her.jpg", "him.jpg"], "group": "woman"}])
    [entry] = read_manifest(folder)
    assert entry == (
        folder / "a.mp4",
        "A woman",
        (folder / "her.jpg", folder / "him.jpg"),
        f"{folder}/her.jpg",
        "woman",
        False,
    )


def test_csv_is_the_same(folder):
    text = "video,prompt,references,identity,face_enhanced\n"
    text += "a.mp4,A woman,her.jpg; him.jpg,she,True\nb.gif,A man,him.jpg,,\n"
    one, two = read_manifest(write(folder, text, "list.csv"))
    assert (one.references, one.identity) == ((folder / "her.jpg", folder / "him.jpg"), "she")
    assert (one.face_enhanced, two.face_enhanced) == (True, False)
    assert (two.video.name, two.identity) == ("b.gif", f"{folder}/him.jpg")


GOOD = {"video": "a.mp4", "prompt": "A woman", "references": ["her.jpg"]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", "neither as JSON nor as CSV"),
        ([], "holds no entries"),
        ({"video": "a.mp4"}, "holds no entries"),
        ([{"video": "a.mp4", "prompt": "A woman"}], "entry 1: video, prompt and references are needed"),
        ([GOOD, {**GOOD, "video": "c.mp4"}], "entry 2: no file at .*c.mp4"),
        ([{**GOOD, "references": ["absent.jpg"]}], "no file at .*absent.jpg"),
        ([{**GOOD, "references": []}], "references is empty"),
        ([{**GOOD, "video": "her.txt"}], "her.txt ends in none of"),
        ([{**GOOD, "face_enhanced": "maybe"}], "face_enhanced is 'maybe', neither true nor false"),
        ([{**GOOD, "video": 3}], "entry 1: video, prompt and references are text"),
        ([{**GOOD, "prompt": None}], "entry 1: video, prompt and references are text"),
        ([{**GOOD, "references": [None]}], "entry 1: video, prompt and references are text"),
        ([GOOD, GOOD], "names a.mp4 twice"),
    ],
)
def test_mistakes(folder, entries, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_manifest(write(folder, entries))


def test_a_folder_without_manifest_is_told_what_one_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'No manifest at .*"references"'):
        read_manifest(tmp_path)

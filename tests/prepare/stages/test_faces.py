import numpy as np
import pytest

from mm_lightning.encoders.detector import DlibDetector, detection_size, load_detector
from mm_lightning.prepare.samples import packaged_file
from mm_lightning.prepare.stages.decode import DecodePicture
from mm_lightning.prepare.stages.faces import DetectFaces, SplitPeople, is_cut
from tests.prepare.bad_inputs import astronaut
from tests.prepare.stages.conftest import FACES, picture, rejection, through
from tests.prepare.stages.onnx_detector import write_detector


@pytest.fixture(scope="module")
def group():
    data = packaged_file("insightface", "data/images/t1.jpg").read_bytes()
    return lambda: DecodePicture()(picture(data, key="t1"))[0]


@pytest.fixture
def pack(tmp_path):
    """An insightface root with one pack that holds a detector."""
    write_detector(tmp_path / "models/buffalo_l/det_10g.onnx")
    return str(tmp_path)


def test_six_people_are_split_into_six_pictures(group):
    parts = SplitPeople("dlib")(group())
    assert [part.key for part in parts] == [f"t1-p{i}" for i in range(6)]
    assert len({part.meta["identity"] for part in parts}) == 6
    whole, detect, found = group().frames[0], DetectFaces("dlib", min_face_size=64), []
    for part in parts:
        x0, y0, x1, y1 = part.meta["crop"]
        assert np.array_equal(part.frames[0], whole[y0:y1, x0:x1])
        assert (part.caption, part.data) == (None, b"")
        assert part.meta["width"] == part.meta["height"] == x1 - x0
        [made] = detect(part)
        found.append(made.meta["faces"][0]["box"][0] + x0)
    assert found == sorted(found)
    assert min(np.diff(found)) > 50  # six different faces, from left to right


def test_one_person_is_not_split(person):
    assert SplitPeople("dlib")(person) == [person]


def test_split_pictures_share_nothing(group):
    first, second, *_ = SplitPeople("dlib")(group())
    first.meta["faces"] = []
    assert "faces" not in second.meta


def test_what_is_recorded(person):
    detector = person.meta["detector"]
    assert detector["name"] == "dlib_frontal_face_detector"
    assert detector["version"][0].isdigit()
    assert (detector["min_score"], detector["smallest_face"]) == (0.3, 40)
    [face] = person.meta["faces"]
    x0, y0, x1, y1 = face["box"]
    eye, other_eye, nose, mouth, other_mouth = face["landmarks"]
    assert x0 < eye[0] < nose[0] < other_eye[0] < x1
    assert y0 < eye[1] < nose[1] < mouth[1] < y1
    assert mouth[0] < other_mouth[0]


@pytest.mark.parametrize("smallest", [40, 64, 90])
def test_detection_at_another_scale_finds_the_same_face(smallest):
    picture = np.asarray(astronaut())
    best = max(DlibDetector()(picture, smallest), key=lambda face: face.score)
    assert np.abs(best.box - [176, 77, 266, 166]).max() < 15
    assert np.abs(best.landmarks[2] - [224, 127]).max() < 7  # the tip of the nose


def test_low_confidence(person):
    assert rejection(DetectFaces(**FACES, min_score=50.0), person) == "low_confidence"


@pytest.mark.parametrize(
    ("box", "cut"),
    [((2, 2, 97, 97), False), ((1, 5, 90, 90), True), ((5, 5, 98, 90), True), ((-4, 5, 60, 90), True)],
)
def test_face_at_the_border(box, cut):
    assert is_cut(np.array(box, np.float32), (100, 100, 3), 0.02) == cut


def test_two_stages_detect_once(person, monkeypatch):
    calls = []
    detector = load_detector("dlib")
    inner = detector.detector
    monkeypatch.setattr(detector, "detector", lambda *args: calls.append(args) or inner(*args))
    fresh = picture(b"", frames=[person.frames[0].copy()])
    through(fresh, SplitPeople("dlib", smallest=40), DetectFaces(**FACES))
    assert len(calls) == 1


# Packs


def test_pack_is_used_where_there_is_one(pack):
    pixels = np.zeros((320, 320, 3), np.uint8)
    pixels[160:168, 80:88, 0] = 255  # red; green and blue are no face
    pixels[40:48, 240:248, 1:] = 255
    [made] = DetectFaces("auto", root=pack, min_face_size=60, smallest=20)(picture(b"", frames=[pixels]))
    [face] = made.meta["faces"]
    assert face["box"] == [48, 128, 112, 192]
    assert face["landmarks"] == [[64, 144], [96, 144], [80, 160], [64, 176], [96, 176]]
    assert face["score"] == pytest.approx(0.9)
    assert made.meta["detector"]["name"] == "buffalo_l/det_10g"


def test_pack_by_folder_and_by_file(pack):
    folder = f"{pack}/models/buffalo_l"
    for name in (folder, f"{folder}/det_10g.onnx"):
        assert load_detector(name, "/nowhere").info["name"] == "buffalo_l/det_10g"


def test_without_pack_it_is_dlib(tmp_path):
    assert load_detector("auto", str(tmp_path)).info["name"] == "dlib_frontal_face_detector"


def test_missing_pack_is_told_at_construction(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'buffalo_x'.*det_\*.*Download the pack"):
        DetectFaces("buffalo_x", root=str(tmp_path))


def test_two_detectors_in_a_pack(pack, tmp_path):
    write_detector(tmp_path / "models/buffalo_l/scrfd_2.5g.onnx")
    with pytest.raises(ValueError, match="several face detectors"):
        load_detector("buffalo_l", pack)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="smallest=64 must not exceed min_face_size=32"):
        DetectFaces("dlib", min_face_size=32)


@pytest.mark.parametrize(
    ("args", "size"), [((320, 320, 20), (320, 320)), ((1080, 1920, 64), (608, 352)), ((50, 70, 20), (320, 320))]
)
def test_detection_size(args, size):
    assert detection_size(*args) == size

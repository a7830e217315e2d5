"""Pictures are deterministic, symmetric where the performance is, and agree with their ground truth and with dlib."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy.spatial import cKDTree

pytest.importorskip("anny", reason="rendering needs the extra [miniature]")
pytest.importorskip("pyvista", reason="rendering needs the extra [miniature]")

from dataclasses import replace

from mm_lightning.encoders.detector import DlibFaceDetector
from mm_lightning.miniature import stage
from mm_lightning.miniature.anatomy import load_anatomy
from mm_lightning.miniature.motion import ACTIONS, BACKGROUNDS, COLUMN, LIGHTS, Performance, sample_clip, sample_still
from mm_lightning.miniature.people import sample_person
from mm_lightning.miniature.render import Renderer
from mm_lightning.miniature.stage import Lens

SCALE = 3  # dlib's detector overlooks faces as small as ours


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(64)


def act(yaw: float = 0, pitch: float = 0, roll: float = 0, shift: float = 0, zoom: float = 0, **actions: float):
    """One frame in frontal light; actions of both sides by the name that they share."""
    row = np.zeros((1, len(ACTIONS)), np.float32)
    for name, value in actions.items():
        row[0, [COLUMN[name + side] for side in ("", "Left", "Right") if name + side in COLUMN]] = value
    head, camera = np.float32([[yaw, pitch, roll]]), np.float32([[shift, 0, zoom]])
    return Performance(row, head, camera, "frontal", "grey", ("neutral",))


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each pixel, (H, W)."""
    return np.abs(first.astype(int) - second.astype(int)).mean(-1)


def test_shapes_and_types(renderer: Renderer):
    rendered = renderer.render(sample_person(0), sample_clip(np.random.default_rng(0), num_frames=3))
    assert rendered.frames.shape == (3, 64, 64, 3)
    assert rendered.frames.dtype == np.uint8
    assert rendered.boxes.shape == (3, 4)
    assert rendered.landmarks.shape == (3, 5, 2)
    assert rendered.visible.dtype == bool
    assert rendered.visible.all()


def test_the_same_bytes_whoever_was_drawn_before(renderer: Renderer):
    person, clip = sample_person(3), sample_clip(np.random.default_rng(3), num_frames=3)
    first = renderer.render(person, clip)
    renderer.render(sample_person(4), sample_still(np.random.default_rng(4)))
    second = renderer.render(person, clip)
    fresh = Renderer(64).render(person, clip)
    for others in (second, fresh):
        for mine, theirs in zip(first, others, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_still_face_is_symmetric(renderer: Renderer):
    """Under light from the front, a mirrored picture differs by strands and spots only."""
    for index in (0, 1, 3):
        person = replace(sample_person(index), freckles=0.0, hair_style="buzzed")
        rendered = renderer.render(person, act())
        eyes = rendered.landmarks[0]
        assert eyes[0, 0] + eyes[1, 0] == pytest.approx(63, abs=0.1)
        assert eyes[2, 0] == pytest.approx(31.5, abs=0.15)
        frame = rendered.frames[0]
        assert difference(frame, frame[:, ::-1]).mean() < 5


def test_opposite_poses_mirror_each_other(renderer: Renderer):
    person = replace(sample_person(1), freckles=0.0)
    left, right = (renderer.render(person, act(yaw=yaw, roll=yaw / 3)) for yaw in (-18, 18))
    mirrored = left.frames[0][:, ::-1]
    assert difference(right.frames[0], mirrored).mean() < 0.5 * difference(right.frames[0], left.frames[0]).mean()
    flipped = left.landmarks[0][[1, 0, 2, 4, 3]] * [-1, 1] + [63, 0]
    np.testing.assert_allclose(right.landmarks[0], flipped, atol=0.1)
    assert right.landmarks[0, 2, 0] > left.landmarks[0, 2, 0] + 4  # positive yaw is the viewer's right


def test_landmarks_agree_with_dlib(renderer: Renderer):
    """dlib looks at the picture only; its own error on such small faces is about half a pixel."""
    detector, errors = DlibFaceDetector(), []
    for index in range(8):
        rendered = renderer.render(sample_person(index), sample_still(np.random.default_rng(index)))
        large = cv2.resize(rendered.frames[0], None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_CUBIC)
        found = detector(large)
        if found:
            points = (found[0].landmarks + 0.5) / SCALE - 0.5
            errors.append(np.linalg.norm(points - rendered.landmarks[0], axis=1))
    assert len(errors) >= 7
    assert np.mean(errors) < 1.8


def test_the_box_holds_the_landmarks_and_little_more(renderer: Renderer):
    for seed in range(5):
        rendered = renderer.render(sample_person(seed), sample_clip(np.random.default_rng(seed), num_frames=3))
        low, high = rendered.boxes[:, None, :2], rendered.boxes[:, None, 2:]
        assert ((rendered.landmarks > low) & (rendered.landmarks < high)).all()
        sides = (high - low)[:, 0]
        assert (sides > 22).all()
        assert (sides < 52).all()


def test_the_lens_projects_as_vtk_does(renderer: Renderer):
    """A small triangle, found in the picture by its depth, is where `Lens.project` says."""
    spot = np.array([0.04, 0.1, 0.05], np.float32)
    sculptor = renderer.sculptor
    vertices = np.tile(spot, (len(sculptor.drawn), 1))  # everything in one point but a small triangle
    vertices[sculptor.triangles[0]] = spot + np.float32([[-0.004, 0, -0.004], [0.004, 0, -0.004], [0, 0, 0.008]])
    lens = Lens(x=0.01, z=0.02, depth=0.0, height=0.3)
    renderer.stage.set_background("white")
    renderer.stage.set_shape(vertices, np.tile(np.float32([0, -1, 0]), (len(vertices), 1)))
    picture = renderer.stage.draw(lens)
    rows, columns = np.nonzero(picture.distance < lens.distance + 0.2)
    where = (np.array([columns.mean(), rows.mean()]) + 0.5) / renderer.stage.side
    np.testing.assert_allclose(where, lens.project(spot), atol=1 / renderer.stage.side)
    assert picture.distance[rows, columns].mean() == pytest.approx(lens.distance + spot[1], abs=1e-3)


def test_shift_and_zoom_move_the_picture(renderer: Renderer):
    person = sample_person(2)
    still, moved, near = (renderer.render(person, act(shift=s, zoom=z)) for s, z in ((0, 0), (4 / 64, 0), (0, 0.08)))
    np.testing.assert_allclose(moved.landmarks - still.landmarks, [[[4, 0]] * 5], atol=0.15)
    assert difference(np.roll(still.frames[0], 4, 1)[:, 8:56], moved.frames[0][:, 8:56]).mean() < 3
    width = [float(np.ptp(r.landmarks[0, :2, 0])) for r in (still, near)]
    assert width[1] / width[0] == pytest.approx(1.08, abs=0.01)


def test_a_blink_changes_the_eyes_only(renderer: Renderer):
    open_eyes, closed = (renderer.render(sample_person(1), act(eyeBlink=value)) for value in (0, 1))
    changed = difference(open_eyes.frames[0], closed.frames[0])
    rows, columns = np.mgrid[:64, :64]
    near = np.zeros((64, 64), bool)
    for x, y in open_eyes.landmarks[0, :2]:
        near |= (np.abs(columns - x) < 8) & (np.abs(rows - y) < 6)
    assert changed[near].max() > 40
    assert changed[~near].max() < 8


def test_the_eyes_look_where_the_gaze_goes(renderer: Renderer):
    """The dark of iris and pupil moves to the viewer's right when the person looks to its left."""
    person = replace(sample_person(1), iris=(0.1, 0.05, 0.02))
    looks = []
    for left in (0.0, 1.0):
        performance = act()
        performance.actions[0, [COLUMN["eyeLookOutLeft"], COLUMN["eyeLookInRight"]]] = left
        frame = renderer.render(person, performance).frames[0]
        x, y = renderer.render(person, act()).landmarks[0, 0].round().astype(int)
        eye = 255.0 - frame[y - 2 : y + 3, x - 5 : x + 6].mean(-1)
        weight = (eye - np.median(eye)).clip(0) ** 2
        looks.append((weight.sum(0) * np.arange(11)).sum() / weight.sum())
    assert looks[1] > looks[0] + 0.4


def test_clips_move_smoothly(renderer: Renderer):
    for seed in range(4):
        rendered = renderer.render(sample_person(seed), sample_clip(np.random.default_rng(seed)))
        steps = np.abs(np.diff(rendered.frames.astype(int), axis=0)).mean((1, 2, 3))
        assert steps.max() < 12
        assert steps.mean() > 0.02
        assert np.linalg.norm(np.diff(rendered.landmarks, axis=0), axis=-1).max() < 9


def test_a_hidden_landmark_is_told(renderer: Renderer):
    """Far beyond the poses that are sampled the nose hides an eye, and what leaves the frame is not seen either."""
    aside = renderer.render(sample_person(0), act(yaw=80))
    assert not aside.visible[0].all()
    away = renderer.render(sample_person(0), act(shift=0.45))
    assert not away.visible[0, 1]


def test_lights_and_walls_have_their_names():
    assert set(stage.LAMPS) == set(LIGHTS)
    assert set(stage.WALLS) == set(BACKGROUNDS)


def test_lights_come_from_their_side(renderer: Renderer):
    brightness = {}
    for light in ("left", "right"):
        rendered = renderer.render(replace(sample_person(0), beard="none"), replace(act(), light=light))
        x0, y0, x1, y1 = rendered.boxes[0].round().astype(int)
        face, middle = rendered.frames[0][y0:y1].mean((0, 2)), (x0 + x1) // 2
        brightness[light] = face[x0:middle].mean() - face[middle:x1].mean()
    assert brightness["left"] > 5
    assert brightness["right"] < -5


def test_shapes_are_those_of_anny():
    """The cut-out, moved by linear actions, gives the vertices of anny's own forward pass of its head."""
    import anny
    import torch

    person, anatomy = sample_person(5), load_anatomy()
    model = anny.Anny(
        rig="makehuman-head", topology="head", local_changes="default", facial_actions="all", phenotypes="all"
    )
    actions = {"jawOpen": 0.7, "eyeBlinkLeft": 1.0}
    with torch.no_grad():
        expected = model(None, person.phenotypes, person.local_changes, actions)["vertices"][0].numpy()
    shape = anatomy.shape(person.phenotypes, person.local_changes)
    for name, value in actions.items():
        shape = shape + value * anatomy.action_fields[COLUMN[name]]
    # anny's head stands elsewhere and orders its vertices otherwise: align the tops, compare with the nearest.
    middle = np.array([0, 1, 1])
    distances, _ = cKDTree(shape - shape[shape[:, 2].argmax()] * middle).query(
        expected - expected[expected[:, 2].argmax()] * middle
    )
    assert np.quantile(distances, 0.98) < 1e-4


def test_a_size_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="size must be 16 or more, got 8"):
        Renderer(8)

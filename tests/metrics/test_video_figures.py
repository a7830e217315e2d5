"""Colour and motion of pictures in closed form: textures that move by known pixels, flow by OpenCV."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

from mm_lightning.metrics import ColorDrift, DynamicDegree, MotionSmoothness, OpenCVFlow, RaftFlow, load_flow
from mm_lightning.metrics.dynamic_degree import is_dynamic, strongest_motion
from mm_lightning.metrics.motion_smoothness import carry, flow_change
from mm_lightning.metrics.optical_flow import RAFT_MIN_SIDE, raft_padded
from tests.metrics.drawn import panned, texture


class KnownFlow:
    """Says that everything moves by the brightness of the first frame's corner, in pixels to the right."""

    name = "known"

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        pixels = first[:, :1, :1, :1] * 10
        return torch.cat([pixels, torch.zeros_like(pixels)], dim=1).expand(-1, -1, *first.shape[-2:])


def video_of_speeds(*speeds: float, side: int = 256) -> torch.Tensor:
    """For KnownFlow: (1, F, 3, side, side + 64); the last frame's speed is never looked at."""
    brightness = torch.tensor([*speeds, 0.0]) / 10
    return brightness[None, :, None, None, None].expand(1, -1, 3, side, side + 64)


# Colour


def test_drift_is_the_mean_distance_of_later_frames_from_the_first():
    levels = torch.full((1, 3, 3, 4, 6), 100.0)
    levels[:, 1, 0] += 3
    levels[:, 1, 2] += 4
    levels[:, 2, :, :2] += 20  # half of the picture
    metric = ColorDrift()
    metric.update(levels / 127.5 - 1)
    assert float(metric.compute()) == pytest.approx((5 + 10 * math.sqrt(3)) / 2, abs=1e-4)


def test_a_still_does_not_drift_and_one_frame_is_unknown():
    metric = ColorDrift()
    metric.update(texture(32, 48).expand(1, 7, 3, 32, 48))
    assert float(metric.compute()) == 0
    metric.update(torch.zeros(2, 1, 3, 32, 48))
    assert metric.num_unknown() == 2


def test_from_black_to_white_is_the_whole_range():
    metric = ColorDrift()
    metric.update(torch.tensor([-1.0, 1.0])[None, :, None, None, None].expand(1, 2, 3, 8, 8))
    assert float(metric.compute()) == pytest.approx(255 * math.sqrt(3))


# Flow


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (-2, 0), (0, 4), (2, -3)])
def test_opencv_finds_the_way_of_a_texture(dx, dy):
    picture = texture(96, 128)
    first, second = (picture[:, 8 + y : 72 + y, 8 + x : 104 + x] for x, y in ((0, 0), (-dx, -dy)))
    flow = OpenCVFlow()(first[None], second[None])
    assert flow.shape == (1, 2, 64, 96)
    middle = flow[0, :, 12:-12, 12:-12].flatten(1).median(1).values
    np.testing.assert_allclose(middle, [dx, dy], atol=0.1)


def test_pairs_do_not_influence_each_other():
    video = panned([0, 3, 3, -4])[0]
    together = OpenCVFlow()(video[:-1], video[1:])
    for i in range(3):
        torch.testing.assert_close(OpenCVFlow()(video[i : i + 1], video[i + 1 : i + 2])[0], together[i])
    assert together[1].abs().max() == 0


def test_small_frames_are_refused():
    with pytest.raises(ValueError, match=r"frames of 16 pixels and more, got \(8, 64\)"):
        OpenCVFlow()(torch.zeros(1, 3, 8, 64), torch.zeros(1, 3, 8, 64))


def test_the_estimator_is_recorded():
    assert DynamicDegree(flow=OpenCVFlow()).flow_name.startswith("OpenCV ")
    assert MotionSmoothness(flow=KnownFlow()).flow_name == "known"


def test_without_weights_flow_is_opencvs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_flow().name == OpenCVFlow.name
    with pytest.raises(FileNotFoundError, match=r"No RAFT weights at .*raft\.pth"):
        load_flow(tmp_path / "raft.pth")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_raft_without_torchvision_is_one_clear_error(tmp_path):
    torch.save({}, tmp_path / "raft.pth")
    with pytest.raises(ModuleNotFoundError, match="RAFT needs torchvision"):
        load_flow(tmp_path / "raft.pth")


def test_raft_runs_at_any_size(tmp_path):
    optical_flow = pytest.importorskip("torchvision.models.optical_flow")
    torch.save(optical_flow.raft_large(weights=None).state_dict(), tmp_path / "raft_large_random.pth")
    flow = RaftFlow(tmp_path / "raft_large_random.pth")
    assert flow.name == "torchvision RAFT raft_large_random"
    assert flow(*torch.rand(2, 1, 3, 70, 133)).shape == (1, 2, 70, 133)


def test_raft_gets_sides_of_multiples_of_eight():
    padded = raft_padded(torch.arange(70.0)[None, None, :, None].expand(1, 3, 70, 133))
    assert padded.shape == (1, 3, RAFT_MIN_SIDE, 136)
    assert padded[0, 0, -1, -1] == 69


# Dynamic degree


def test_the_longest_twentieth_counts():
    lengths = np.random.default_rng(0).permutation(np.arange(2000.0)).reshape(1, 40, 50)
    flows = torch.from_numpy(np.stack([0.6 * lengths, -0.8 * lengths], axis=1))
    assert float(strongest_motion(flows)) == pytest.approx(np.arange(1900, 2000).mean())


def test_a_quarter_as_many_pairs_as_frames_must_move():
    motion = torch.zeros(48)  # of 49 frames: round(4 * 49 / 16) = 12
    motion[:11] = 7
    assert not is_dynamic(motion, 6.0)
    motion[11] = 7
    assert is_dynamic(motion, 6.0)
    assert not is_dynamic(motion, 7.0)
    assert not is_dynamic(torch.zeros(1), 6.0)  # two frames: VBench would round to no pair at all


@pytest.mark.parametrize(
    ("speed", "side", "fps", "moves"),
    [
        (6.1, 256, 8, 1),
        (5.9, 256, 8, 0),
        (3.1, 128, 8, 1),  # the threshold grows with the shorter side
        (2.9, 128, 8, 0),
        (6.1, 256, 4, 0),  # and with the time between two frames
        (9.9, 256, 5, 1),
        (9.5, 256, 5, 0),
    ],
)
def test_threshold_scales_with_side_and_fps(speed, side, fps, moves):
    metric = DynamicDegree(fps=fps, flow=KnownFlow())
    metric.update(video_of_speeds(*[speed] * 8, side=side))
    assert float(metric.compute()) == moves


def test_fast_videos_are_thinned_to_eight_frames_per_second():
    """At 24 fps every third frame is looked at: those that move are between."""
    video = video_of_speeds(*[0, 9, 9] * 5)
    thinned, all_frames = DynamicDegree(fps=24, flow=KnownFlow()), DynamicDegree(fps=8, flow=KnownFlow())
    thinned.update(video)
    all_frames.update(video)
    assert (float(thinned.compute()), float(all_frames.compute())) == (0, 1)


def test_moving_and_still_textures_are_told_apart_and_one_frame_is_unknown():
    metric = DynamicDegree(flow=OpenCVFlow())  # threshold 1.5 pixels for 64
    for offsets in (range(0, 27, 3), [0] * 9, [0, 0, 0, 0, 0, 0, 0, 0, 3]):
        metric.update(panned(list(offsets)))
    assert metric.per_video().tolist() == [1, 0, 0]
    metric.update(panned([0, 1])[:, :1])
    assert metric.num_unknown() == 1
    assert float(metric.compute()) == pytest.approx(1 / 3)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"fps=0, threshold=6.0: give numbers above 0"):
        DynamicDegree(fps=0)


# Smoothness


@pytest.mark.parametrize(
    ("speeds", "change"),
    [([2, 2, 2, 2], 0), ([1, 3, 1, 3], 0.5), ([2, -2, 2], 1), ([0, 0, 0], 0), ([1, 2], 1 / 3), ([0, 5], 1)],
)
def test_change_of_uniform_flow_is_known(speeds, change):
    flows = torch.tensor(speeds, dtype=torch.float64)[:, None, None, None] * torch.tensor([0.6, 0.8])[:, None, None]
    assert float(flow_change(flows.expand(-1, 2, 40, 50))) == pytest.approx(change, abs=1e-6)


def test_flow_is_compared_where_its_pixel_has_gone():
    """A patch that moves on by 10 pixels keeps its velocity, though every place sees a change."""
    flows = torch.zeros(2, 2, 40, 60, dtype=torch.float64)
    flows[0, 0, 10:20, 10:20] = 10
    flows[1, 0, 10:20, 20:30] = 10
    assert float(flow_change(flows)) < 0.51  # what it covers stood still: 100 pixels of 200 change
    stays = flows.clone()
    stays[1] = stays[0]
    assert float(flow_change(stays)) > 0.9


def test_pixels_without_a_next_frame_do_not_count():
    """Of 20 columns that go 10 to the right, 10 stay in the frame; one of them is turned back, in the last column."""
    flows = torch.zeros(2, 2, 8, 20, dtype=torch.float64)
    flows[:, 0] = 10
    flows[1, 0, :, -1] = -10
    assert float(flow_change(flows)) == pytest.approx(0.1)


def test_what_leaves_the_frame_is_left_out():
    values = torch.arange(6.0).expand(1, 1, 4, 6)
    flows = torch.tensor([2.0, 0.0])[:, None, None].expand(1, 2, 4, 6)
    carried, inside = carry(values, flows)
    assert inside[0, 0].tolist() == [True] * 4 + [False] * 2
    torch.testing.assert_close(carried[0, 0, :, :4], torch.arange(2.0, 6.0).expand(4, 4))


def test_textures_that_glide_stutter_and_tremble():
    def smoothness(offsets: list[int]) -> float:
        metric = MotionSmoothness(flow=OpenCVFlow())
        metric.update(panned(offsets))
        return float(metric.compute())

    assert smoothness([0, 2, 4, 6, 8, 10]) < 0.1
    assert smoothness([0, 1, 4, 5, 8, 9]) == pytest.approx(0.5, abs=0.1)
    assert smoothness([0, 2, 0, 2, 0, 2]) > 0.9
    assert smoothness([0, 0, 0, 0]) == 0


def test_two_frames_have_no_smoothness():
    metric = MotionSmoothness(flow=OpenCVFlow())
    metric.update(panned([0, 2]))
    assert metric.num_unknown() == 1
    assert math.isnan(metric.compute())

"""Performances are smooth, within their limits, show what they are named for, and follow from their generator."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from mm_lightning.miniature import captions
from mm_lightning.miniature.motion import (
    ACTIONS,
    BACKGROUNDS,
    COLUMN,
    LIGHTS,
    MAX_HEAD,
    MAX_SHIFT,
    MAX_ZOOM,
    NAMES,
    STILL_BLINK,
    Performance,
    sample_clip,
    sample_still,
)

CLIPS = [sample_clip(np.random.default_rng(seed)) for seed in range(300)]
STILLS = [sample_still(np.random.default_rng(seed)) for seed in range(300)]
# What moves when a clip is named for it: columns of actions, or of the head.
SHOWN = {
    "smile": "mouthSmileLeft",
    "frown": "browDownRight",
    "surprise": "browInnerUp",
    "talk": "jawOpen",
    "blink": "eyeBlinkLeft",
}


def test_actions_are_those_of_anny():
    pytest.importorskip("anny")
    from anny.models.facial_actions import FACIAL_ACTION_LABELS

    assert list(ACTIONS) == FACIAL_ACTION_LABELS


def test_the_vocabulary_is_that_of_captions():
    assert set(NAMES) == set(captions.ACTIONS)
    assert set(BACKGROUNDS) == set(captions.BACKGROUNDS)
    assert set(LIGHTS) == set(captions.LIGHTS)


def test_a_clip_follows_from_its_generator():
    first, second, other = (sample_clip(np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.actions, second.actions)
    np.testing.assert_array_equal(first.camera, second.camera)
    assert first.names == second.names
    assert not np.array_equal(first.camera, other.camera)


@pytest.mark.parametrize("performances", [CLIPS, STILLS])
def test_everything_stays_within_its_limits(performances: list[Performance]):
    actions = np.concatenate([performance.actions for performance in performances])
    head = np.concatenate([performance.head for performance in performances])
    camera = np.concatenate([performance.camera for performance in performances])
    assert actions.min() >= 0
    assert actions.max() <= 1
    assert (np.abs(head) <= MAX_HEAD).all()
    assert (np.abs(camera) <= np.array([MAX_SHIFT, MAX_SHIFT, MAX_ZOOM]) + 1e-6).all()


def test_one_or_two_things_are_done_and_each_kind_appears():
    assert {len(clip.names) for clip in CLIPS} == {1, 2}
    for names, vocabulary in (
        ([name for clip in CLIPS for name in clip.names], NAMES),
        ([clip.light for clip in CLIPS], LIGHTS),
        ([clip.background for clip in CLIPS], BACKGROUNDS),
    ):
        counts = collections.Counter(names)
        assert set(counts) == set(vocabulary)
        assert min(counts.values()) > 0.3 * len(names) / len(vocabulary)


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_named_is_shown_and_nothing_else(name: str):
    column = COLUMN[SHOWN[name]]
    done = [clip.actions[:, column].max() for clip in CLIPS if name in clip.names]
    assert min(done) > 0.3
    if name != "talk":
        assert max(clip.actions[:, column].max() for clip in CLIPS if name not in clip.names) < 0.2


def test_turning_and_nodding_move_the_head_more_than_standing_still():
    def travel(name: str, axis: int) -> np.ndarray:
        return np.array([np.ptp(clip.head[:, axis]) for clip in CLIPS if name in clip.names])

    still = [clip for clip in CLIPS if not {"turn_head", "nod"} & set(clip.names)]
    assert travel("turn_head", 0).min() > max(np.ptp(clip.head[:, 0]) for clip in still)
    assert travel("nod", 1).min() > max(np.ptp(clip.head[:, 1]) for clip in still)


def test_curves_are_smooth():
    """Five times as many frames a second: no step is much larger than a fifth of the largest of the slow clip."""
    for seed in range(40):
        slow = sample_clip(np.random.default_rng(seed), 17, 8.0)
        fast = sample_clip(np.random.default_rng(seed), 81, 40.0)
        np.testing.assert_allclose(fast.actions[::5], slow.actions, atol=1e-5)
        assert np.abs(np.diff(fast.actions, axis=0)).max() < 0.25
        assert np.abs(np.diff(fast.head, axis=0)).max() < 3.0


def test_a_still_is_one_frame_with_open_eyes():
    assert all(still.num_frames == 1 for still in STILLS)
    blinks = np.array([still.actions[0, COLUMN["eyeBlinkLeft"]] for still in STILLS])
    assert blinks.max() == pytest.approx(STILL_BLINK)


def test_wrong_arguments_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="num_frames must be 1 or more and fps positive, got 0 and 8"):
        sample_clip(rng, num_frames=0)
    clip = CLIPS[0]
    with pytest.raises(ValueError, match="light 'moon' must be one of"):
        Performance(clip.actions, clip.head, clip.camera, "moon", "grey", ("talk",))
    with pytest.raises(ValueError, match=r"\(17, 51\)"):
        Performance(clip.actions[:, 1:], clip.head, clip.camera, "warm", "grey", ("talk",))

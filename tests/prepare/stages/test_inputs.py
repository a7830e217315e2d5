"""Every good and bad file through the stages as they are configured."""

from collections import Counter

import pytest

from mm_lightning.prepare.sample import Rejected
from mm_lightning.prepare.stages.duplicates import DuplicatePictures
from tests.prepare.bad_inputs import (
    IMAGE_OPTIONS,
    VIDEO_OPTIONS,
    Input,
    bad_pictures,
    bad_videos,
    good_pictures,
    good_videos,
    make_inputs,
    odd_pictures,
)
from tests.prepare.stages.conftest import picture, stages_of, through, video

PICTURES = [i for i in (*good_pictures(3), *odd_pictures(), *bad_pictures()) if i.reason != "caption_not_utf8"]
VIDEOS = [*good_videos(), *bad_videos()]


def name(item: Input) -> str:
    return item.name.encode("ascii", "replace").decode()


@pytest.fixture(scope="module")
def image_stages():
    return stages_of("image", IMAGE_OPTIONS)


@pytest.fixture(scope="module")
def video_stages():
    return stages_of("video", VIDEO_OPTIONS)


def check(item: Input, sample, stages) -> None:
    sample.caption = None if item.caption is None else item.caption.decode()
    if item.reason is None:
        samples = through(sample, *stages)
        assert samples
        for made in samples:
            assert made.data
            assert f" {'img'}" in made.caption
            assert made.meta["references"]
            assert len(made.meta["faces"]) == made.meta["num_frames"]
        return
    with pytest.raises(Rejected) as caught:
        through(sample, *stages)
    assert caught.value.reason == item.reason
    assert any(item.reason in stage.reasons for stage in stages)


@pytest.mark.parametrize("item", PICTURES, ids=name)
def test_picture(item, image_stages):
    check(item, picture(item.data, extension=item.name.rpartition(".")[2]), image_stages)


@pytest.mark.parametrize("item", VIDEOS, ids=name)
def test_video(item, video_stages):
    check(item, video(item.data, extension="mp4"), video_stages)


def test_a_few_hundred_files_can_be_made(tmp_path):
    inputs = make_inputs(tmp_path, num_good=40, repeats=2)
    names = Counter(item.name for item in inputs)
    assert max(names.values()) == 1
    assert len({name.rpartition(".")[0] for name in names}) == len(inputs)  # captions do not overwrite each other
    for item in inputs:
        assert (tmp_path / item.name).read_bytes() == item.data
    summaries = [
        {"key": item.name, "meta": {"source_sha256": str(hash(item.data)), "source": item.name}, "embedding": None}
        for item in inputs
        if item.reason in (None, "duplicate_picture")
    ]
    repeated = {item.name for item in inputs if item.reason == "duplicate_picture"}
    assert set(DuplicatePictures()(summaries)) == repeated
    assert repeated

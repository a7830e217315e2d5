from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mm_lightning.prepare.sample import Rejected, Sample
from mm_lightning.prepare.stages.decode import DecodeClip, DecodePicture
from mm_lightning.prepare.stages.faces import DetectFaces
from mm_lightning.prepare.stages.identity import EmbedIdentity
from mm_lightning.prepare.stages.video import TrackFace, Windows
from tests.conftest import ROOT
from tests.prepare.bad_inputs import CAPTION, MAN, clip, encode, portrait

FACES = {"detector": "dlib", "min_face_size": 40, "smallest": 40}


def picture(data: bytes, **fields) -> Sample:
    return Sample(**{"key": "k", "kind": "image", "source": "test", "data": data, "caption": CAPTION} | fields)


def video(data: bytes, **fields) -> Sample:
    return Sample(**{"key": "v", "kind": "video", "source": "test", "data": data, "caption": MAN} | fields)


def through(sample: Sample, *stages: Callable) -> list[Sample]:
    """One sample through stages that may give several."""
    samples = [sample]
    for stage in stages:
        samples = [out for sample in samples for out in stage(sample)]
    return samples


def rejection(stage: Callable, sample: Sample) -> str:
    with pytest.raises(Rejected) as caught:
        stage(sample)
    assert caught.value.reason in stage.reasons
    return caught.value.reason


def stages_of(kind: str, options: dict[str, dict]) -> list[Callable]:
    """The stages of conf/prepare/stages/{kind}.yaml with some arguments changed."""
    config = OmegaConf.load(ROOT / f"conf/prepare/stages/{kind}.yaml").stages
    merged = OmegaConf.merge(config, options)
    return [instantiate(stage) for stage in merged.values() if stage is not None]


@lru_cache(maxsize=1)
def portrait_bytes() -> bytes:
    return encode(portrait(), quality=95)


@pytest.fixture
def person() -> Sample:
    """A picture with its face and identity found."""
    return through(picture(portrait_bytes()), DecodePicture(), DetectFaces(**FACES), EmbedIdentity())[0]


@lru_cache(maxsize=1)
def long_clip() -> bytes:
    return clip(40)


@pytest.fixture
def window() -> Sample:
    """The middle 9 of 40 frames, with face and identity."""
    windows = through(video(long_clip()), DecodeClip(), Windows(9, 16))
    return through(windows[1], TrackFace(**FACES), EmbedIdentity(num_frames=1))[0]

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mm_lightning.prepare.stages.identity import cosine, load_embedder
from mm_lightning.prepare.stages.references import (
    OtherMoments,
    OwnCrop,
    RequireReferences,
    SynthesisedReferences,
    generator_for,
)
from tests.prepare.bad_inputs import carphone
from tests.prepare.stages.conftest import FACES, rejection


def stored(sample, index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.fields[f"ref{index}.jpg"])))


def similarity(sample, index: int) -> float:
    """Measured anew on what was stored."""
    entry = sample.meta["references"][index]
    return cosine(sample.embedding, load_embedder("dlib")(stored(sample, index), np.array(entry["landmarks"])))


def test_own_crop_is_cut_out_of_the_target(person):
    [sample] = OwnCrop(margin=1.5)(person)
    [entry], [face] = sample.meta["references"], sample.meta["faces"]
    assert (entry["file"], entry["similarity"], entry["kind"]) == ("ref0.jpg", 1.0, "own")
    crop = stored(sample, 0)
    shift = np.array(face["box"][:2]) - entry["box"][:2]
    x, y = np.round(shift).astype(int)
    own = sample.frames[0][y : y + len(crop), x : x + len(crop)]
    assert np.abs(crop.astype(float) - own).mean() < 2
    assert np.allclose(np.array(face["landmarks"]) - entry["landmarks"], shift)
    assert similarity(sample, 0) > 0.99


def test_references_are_numbered(person):
    [sample] = OwnCrop(1.6)(OwnCrop()(person)[0])
    assert [entry["file"] for entry in sample.meta["references"]] == ["ref0.jpg", "ref1.jpg"] == sorted(sample.fields)


def test_own_crop_of_a_clip_is_from_its_middle(window):
    [sample] = OwnCrop()(window)
    assert sample.meta["references"][0]["frame"] in range(18, 23)  # of the video; the window is 16 to 24


def test_other_moments_are_of_the_same_person_and_outside(window):
    [sample] = OtherMoments(**FACES, count=2)(window)
    entries = sample.meta["references"]
    assert len(entries) == 2
    inside = range(16, 25)
    for i, entry in enumerate(entries):
        assert entry["frame"] not in inside
        assert entry["similarity"] > 0.92
        assert similarity(sample, i) == pytest.approx(entry["similarity"], abs=0.02)
        crop = carphone()[entry["frame"]].astype(float)
        assert stored(sample, i).mean() == pytest.approx(crop.mean(), rel=0.4)


def test_other_moments_that_show_somebody_else_are_left_out(window):
    window.embedding = -window.embedding
    [sample] = OtherMoments(**FACES)(window)
    assert "references" not in sample.meta
    assert rejection(RequireReferences(), sample) == "no_reference"


def test_whole_shot_has_no_other_moments(window):
    window.frames = window.frames[:].as_scene()
    assert "references" not in OtherMoments(**FACES)(window)[0].meta


# Synthesised


class Mirror:
    """Gives the picture back mirrored, or another picture for some attempts."""

    info = {"name": "mirror"}

    def __init__(self, others: dict[int, np.ndarray] | None = None) -> None:
        self.others, self.calls = others or {}, []

    def generate(self, picture, face, prompt, generator):
        self.calls.append((prompt, int(torch.randint(1 << 30, (), generator=generator))))
        return self.others.get(len(self.calls) - 1, picture[:, ::-1])


NOBODY = np.zeros((128, 128, 3), np.uint8)


def test_synthesised_reference_is_kept_where_it_is_the_same_person(person):
    mirror = Mirror({0: NOBODY, 1: carphone()[0]})
    [sample] = SynthesisedReferences(mirror, **FACES)(person)
    [entry] = sample.meta["references"]
    assert len(mirror.calls) == 3  # nobody, somebody else, the same person
    assert entry["kind"] == "synthesised"
    assert entry["generator"] == {"name": "mirror"}
    assert entry["prompt"].startswith("A woman img ")
    assert entry["similarity"] > 0.92
    assert similarity(sample, 0) > 0.92


def test_somebody_else_is_rejected(person):
    stage = SynthesisedReferences(Mirror(dict.fromkeys(range(3), carphone()[0])), attempts=3, **FACES)
    assert rejection(stage, person) == "no_similar_reference"
    [kept] = SynthesisedReferences(Mirror({0: NOBODY}), attempts=1, required=False, **FACES)(person)
    assert "references" not in kept.meta


def test_draws_depend_on_the_key_alone(person):
    calls = []
    for key in ("a", "b", "a"):
        mirror = Mirror()
        person.key, person.meta["references"] = key, []
        SynthesisedReferences(mirror, **FACES)(person)
        calls.append(mirror.calls)
    assert calls[0] == calls[2] != calls[1]


def test_class_word_is_put_into_the_prompt(person):
    person.caption = "a toddler laughs"
    stage = SynthesisedReferences(Mirror(), prompts=["A man img sleeps"], **FACES)
    assert stage.draw_prompt(person.caption, generator_for(0, "k")) == "A toddler img sleeps"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prompts": ["a cat"]}, "'a cat' has no word"), ({"prompts": []}, "empty"), ({"count": 5}, "as many attempts")],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        SynthesisedReferences(Mirror(), detector="dlib", **options)

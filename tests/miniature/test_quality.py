"""The quality command on real faces and an untrained model, and its figures against other ways to compute them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from mm_lightning.media import to_uint8
from mm_lightning.miniature import quality as command
from mm_lightning.miniature.detection import Detections
from mm_lightning.miniature.image_text import build_model
from mm_lightning.miniature.judge import L2, Classifier, Judge, chance, judge_folder_of, labels_of, top_1
from mm_lightning.miniature.quality import (
    Bar,
    Quality,
    format_bars,
    mean_motion,
    psnr,
    read_held_out,
    share_with_face,
    to_pixels,
)
from mm_lightning.preview import decode_latents
from mm_lightning.tiny import make_tiny
from tests.miniature.real_people import write_people

CAPTIONS = (
    "A man img smiles, in front of a green wall",
    "A young woman img turns her head before a blue wall",
    "An elderly man img talks and nods against a red background",
)
NUM_CLIPS = 2


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Seven real people; train and test are the same ones, which the command cannot know."""
    folder = tmp_path_factory.mktemp("people")
    write_people(folder / "test", CAPTIONS)
    shutil.copytree(folder / "test", folder / "train")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Of the miniature's interfaces, with one layer and random weights."""
    folder = make_tiny(
        tmp_path_factory.mktemp("base") / "model",
        num_layers=1,
        text_embed_dim=96,
        max_text_seq_length=24,
        sample_height=8,
        sample_width=8,
        sample_frames=17,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        build_model().save_pretrained(folder, judge_folder_of(folder))
    return folder


@pytest.fixture(scope="module")
def quality(people, model, tmp_path_factory) -> Quality:
    return Quality(people, model, judge_folder_of(model), tmp_path_factory.mktemp("work"), num_clips=NUM_CLIPS, steps=1)


# Figures --------------------------------------------------------------------------------------------------------------


def test_psnr_is_skimage_s():
    a, b = (np.random.default_rng(seed).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8) for seed in (0, 1))
    expected = [peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-9)
    assert psnr(a, a).min() > 100


def make_detections(found: np.ndarray, landmarks: np.ndarray) -> Detections:
    return Detections(found, np.zeros((*found.shape, 4)), landmarks, found.astype(float))


def test_motion_is_the_widest_distance_between_frames_with_a_face():
    """A face of five points that goes 6 pixels to the right in a frame of 64: 5 * 6 / 64."""
    landmarks = np.zeros((1, 4, 5, 2)) + np.arange(5)[:, None]
    landmarks[0, :, :, 0] += np.array([0, 3, 6, 50])[:, None]
    found = np.array([[True, True, True, False]])  # the last frame's points mean nothing
    assert mean_motion(make_detections(found, landmarks), 64, 64) == pytest.approx(5 * 6 / 64)
    assert np.isnan(mean_motion(make_detections(found & False, landmarks), 64, 64))


def test_a_clip_has_a_face_where_most_of_its_frames_have():
    found = np.array([[True, True, False], [True, False, False], [False, False, False], [True, True, True]])
    assert share_with_face(make_detections(found, np.zeros((4, 3, 5, 2)))) == 0.5


@pytest.mark.parametrize(
    ("value", "low", "high", "passed"),
    [
        (0.5, 0.4, None, True),
        (0.3, 0.4, None, False),
        (1.2, 0.7, 1.1, False),
        (1.0, 0.7, 1.1, True),
        (9.0, None, None, None),
    ],
)
def test_a_bar_is_passed_between_its_bounds(value, low, high, passed):
    assert Bar("figure", value, low, high).passed is passed


def test_what_could_not_be_measured_passes_nothing():
    bar = Bar("figure", float("nan"), low=0.5)
    assert bar.passed is False
    assert "| figure | - | ≥ 0.500 |  |  | FAIL |" in format_bars([bar])


def test_chance_is_what_shuffled_prompts_reach():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(40, 4)) + np.array([2.0, 0, 0, 0]))  # a judge that prefers the first
    labels = torch.from_numpy(rng.random((40, 4)) < np.array([0.7, 0.2, 0.2, 0.2]))
    shuffled = [top_1(scores, labels[torch.from_numpy(rng.permutation(40))]) for _ in range(3000)]
    assert chance(scores, labels) == pytest.approx(np.mean(shuffled), abs=0.01)


def test_classifier_is_a_logistic_regression():
    """Its minimum: the gradient of cross entropy and penalty vanishes, and it tells apart what can be told apart."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator) * torch.tensor([1.0, 10, 1, 1, 0.1]) + 3
    labels = torch.stack([features[:, 0] > 3, features[:, 1] > 3, features[:, 1] <= 3], dim=1)
    classifier = Classifier(5, 3).fit(features, labels)
    z = ((features - features.mean(0)) / features.std(0)).double()
    error = (z @ classifier.weight.double().mT + classifier.bias).sigmoid() - labels.double()
    gradient = error.mT @ z / len(z) + L2 * classifier.weight
    assert gradient.abs().max() < 1e-3
    assert error.mean(0).abs().max() < 1e-3
    assert (classifier(features) > 0).eq(labels).float().mean() > 0.9


def test_judge_sees_how_a_clip_moves(model):
    """Frames in another order are the same to it, a frozen clip is not."""
    judge = Judge.from_pretrained(model, judge_folder_of(model))
    clip = np.random.default_rng(0).integers(0, 256, (1, 5, 64, 64, 3), dtype=np.uint8)
    features = judge.features(np.concatenate([clip, clip[:, ::-1], clip[:, :1].repeat(5, axis=1)]))
    mean, spread = features.chunk(2, dim=1)
    torch.testing.assert_close(features[0], features[1], atol=1e-4, rtol=1e-4)
    assert spread[0].abs().min() > 0
    assert spread[2].abs().max() < 1e-4
    assert not torch.allclose(mean[0], mean[2])


# The command ----------------------------------------------------------------------------------------------------------


def test_held_out_clips_come_with_their_people_s_stills_and_landmarks(people):
    held_out = read_held_out(people, "test", NUM_CLIPS)
    assert held_out.captions == list(CAPTIONS[:NUM_CLIPS])
    assert held_out.clips.shape == (NUM_CLIPS, 17, 64, 64, 3)
    assert held_out.stills.shape == (NUM_CLIPS * 4, 64, 64, 3)
    for pictures, landmarks in ((held_out.stills, held_out.still_landmarks), (held_out.clips, held_out.clip_landmarks)):
        assert pictures.shape[:-3] == landmarks.shape[:-2]
    assert ((held_out.still_landmarks > 0) & (held_out.still_landmarks < 64)).all()


def test_a_picture_is_the_same_person_as_itself_and_not_as_others(quality):
    stills, landmarks = quality.held_out.stills, quality.held_out.still_landmarks
    assert quality.face_distance(stills, stills, landmarks).max() < 1e-5
    other = np.roll(stills, 4, axis=0)  # four stills of each
    crossed = np.linalg.norm(
        command.embed(stills, landmarks, np.ones(8, bool), quality.recognizer)
        - command.embed(other, np.roll(landmarks, 4, axis=0), np.ones(8, bool), quality.recognizer),
        axis=1,
    )
    assert crossed.min() > 0.6


def test_clips_are_those_of_the_plain_pipeline(quality):
    """diffusers' pipeline from the folder, on the prompt as the text encoder gets it."""
    from diffusers import CogVideoXPipeline

    from mm_lightning.module import sample_generators

    pipeline = CogVideoXPipeline.from_pretrained(quality.model)
    text = quality.text([CAPTIONS[0]]).prompt_embeds
    video = pipeline(
        prompt_embeds=text, negative_prompt="", height=64, width=64, num_frames=17, num_inference_steps=1,
        guidance_scale=2.0, generator=sample_generators(0, -1, quality.held_out.names[:1]), output_type="np",
        max_sequence_length=24,
    ).frames  # fmt: skip
    assert np.abs(quality.generate(slice(0, 1)).astype(int) - np.round(255 * video)).max() <= 1


def test_command_writes_figures_and_goes_on_where_it_was_cut(people, model, tmp_path, capsys):
    arguments = ["--people", str(people), "--model", str(model), "--num-clips", str(NUM_CLIPS), "--steps", "1"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--workers", "1", "--device", "cpu"]
    assert command.main([*arguments, "--batch-size", "1"]) == 1  # a random model misses its bars
    report = json.loads((tmp_path / "out/quality.json").read_text())
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert report["settings"]["num_clips"] == NUM_CLIPS
    assert figures["VAE: PSNR of clips, dB"]["passed"] is False
    assert figures["clips with a face in most frames"]["real"] == 1
    assert figures["FM_inter"]["low"] == pytest.approx(0.7 * figures["FM_inter"]["real"])
    assert {"class word recognised", "action recognised", "background recognised"} <= figures.keys()
    assert Image.open(tmp_path / "out/quality.jpg").width > 600
    assert "| VAE: same person to dlib |" in capsys.readouterr().out

    kept = sorted((tmp_path / "work").rglob("generated*.npz"))
    assert len(kept) == NUM_CLIPS
    lost, before = kept[1], [np.load(file)["frames"] for file in kept]
    times = [file.stat().st_mtime_ns for file in kept]
    lost.unlink()
    args = command.parse([*arguments, "--batch-size", "1"])[1]
    assert len(command.build_quality(args).generated) == NUM_CLIPS
    assert all(np.array_equal(np.load(file)["frames"], frames) for file, frames in zip(kept, before, strict=True))
    assert [file.stat().st_mtime_ns == time for file, time in zip(kept, times, strict=True)] == [True, False]


def test_a_vae_is_judged_before_there_is_anything_else(people, model, quality, tmp_path, capsys):
    shutil.copytree(model / "vae", tmp_path / "model/vae")
    arguments = ["--only-vae", "--people", str(people), "--model", str(tmp_path / "model"), "--num-clips", "2"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--workers", "1", "--device", "cpu"]
    assert command.main(arguments) == 1
    report = json.loads((tmp_path / "out/quality.json").read_text())
    assert {figure["name"].split(":")[0] for figure in report["figures"]} == {"VAE"}
    pixels = to_pixels(quality.held_out.clips)
    moments = quality.backbone.encode_video(pixels)  # another way to the mean
    expected = decode_latents(quality.backbone.vae, moments.chunk(2, dim=2)[0] * quality.backbone.scaling_factor)
    stored = np.load(next((tmp_path / "work").rglob("reconstructed clips*.npz")))["frames"]
    assert np.array_equal(stored, to_uint8(expected))
    with pytest.raises(SystemExit):
        command.main([*arguments, "--model", str(tmp_path)])
    assert "holds no vae/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-clips", "70"], "--num-clips=70: .* holds 7 clips"),
        (["--num-clips", "0"], "--num-clips=0: give a number from 1"),
        (["--people", "nowhere"], "nowhere/test/images holds no finished shards"),
        (["--device", "cudo"], "device=cudo: torch has none here"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--judge", "nowhere"], "nowhere is no judge of the miniature"),
    ],
)
def test_mistakes_are_told_at_once(people, model, tmp_path, capsys, arguments, message):
    defaults = ["--people", str(people), "--model", str(model), "--work", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        command.main([*defaults, *arguments])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_labels_come_from_the_prompts():
    labels = labels_of(CAPTIONS)
    assert labels["action"].sum(1).tolist() == [1, 1, 2]
    assert labels["class_word"].int().argmax(1).tolist() == [0, 1, 2]

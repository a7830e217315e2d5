"""Text alignment with a small random CLIP in transformers' layout, against transformers' own forward."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip import CLIPImageProcessor

from mm_lightning.metrics import CLIPEncoder, TextAlignment, ViCLIPEncoder
from mm_lightning.metrics.video_text import OPENAI_MEAN, OPENAI_STD, middle_frames, viclip_pixel_values
from tests.metrics.drawn import texture

PROMPTS = ["a man talks", "the woman laughs in a car"]
SIDE, LENGTH = 32, 16


def small_tower(**more: int) -> dict[str, int]:
    return {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **more}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "small"
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = small_tower(vocab_size=len(words), max_position_embeddings=LENGTH, **ids)
    config = CLIPConfig(text_config=text, vision_config=small_tower(image_size=SIDE, patch_size=8), projection_dim=8)
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():  # off the tiny initial weights, so that pictures and texts differ
        if parameter.ndim > 1:
            parameter.data += 0.5 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    return torch.stack([torch.stack([texture(40, 56, seed=10 * i + t) for t in range(3)]) for i in range(2)])


def by_transformers(folder: Path, videos: torch.Tensor, prompts: list[str]) -> list[float]:
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    cosines = []
    for video, prompt in zip(videos, prompts, strict=True):
        pictures = list(((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        inputs = processor(images=pictures, text=[prompt], return_tensors="pt", truncation=True, max_length=LENGTH)
        with torch.no_grad():
            output = model(**inputs)
        frames, text = output.image_embeds.double().numpy(), output.text_embeds[0].double().numpy()
        mean = (frames / np.linalg.norm(frames, axis=1, keepdims=True)).mean(0)
        cosines.append(float(mean @ text / np.linalg.norm(mean) / np.linalg.norm(text)))
    return cosines


@pytest.mark.filterwarnings("ignore:.*prompts exceed")
def test_it_is_the_cosine_of_the_mean_frame_and_the_prompt(clip_folder, videos):
    metric = TextAlignment(clip_folder)
    metric.update(videos, PROMPTS)
    expected = by_transformers(clip_folder, videos, PROMPTS)
    assert abs(expected[0] - expected[1]) > 0.01
    np.testing.assert_allclose(metric.per_video(), expected, atol=1e-5)
    assert metric.encoder_name == "small"


def test_a_model_with_its_processor_does_as_well_as_the_folder(clip_folder, videos):
    encoder = CLIPEncoder(CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder))
    given, read = TextAlignment(encoder), TextAlignment(str(clip_folder))
    for metric in (given, read):
        metric.update(videos[:1], PROMPTS[:1])
    assert given.compute() == read.compute()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_prompt_that_is_cut_is_told(clip_folder, videos):
    metric = TextAlignment(clip_folder)
    with pytest.warns(UserWarning, match="1 of 2 prompts exceed the 16 tokens of small"):
        metric.update(videos, PROMPTS)


def test_frames_that_contradict_each_other_align_less_than_their_mean_cosine(clip_folder, videos):
    """The embedding of the mean is shorter than one: the cosine of the mean is above the mean of the cosines."""
    encoder = CLIPEncoder.from_pretrained(clip_folder)
    frames = torch.stack([encoder.embed_videos(videos[:1, t : t + 1])[0] for t in range(3)])
    torch.testing.assert_close(encoder.embed_videos(videos[:1])[0], frames.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.norm(dim=1), torch.ones(3))


def test_prompts_must_be_as_many_as_videos(clip_folder, videos):
    for prompts in (PROMPTS[:1], "ab"):
        with pytest.raises(ValueError, match="2 videos need a list of as many prompts"):
            TextAlignment(clip_folder).update(videos, prompts)


def test_what_is_no_clip_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No CLIP model at .*none: give a folder"):
        TextAlignment(tmp_path / "none")
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'bert', not 'clip'"):
        TextAlignment(tmp_path)


# ViCLIP


@pytest.mark.skipif(importlib.util.find_spec("vbench") is not None, reason="VBench is installed")
def test_without_vbench_there_is_one_clear_error(tmp_path):
    with pytest.raises(ModuleNotFoundError, match="ViCLIP comes with VBench: `pip install vbench`"):
        ViCLIPEncoder(tmp_path / "ViClip-InternVid-10M-FLT.pth")


@pytest.mark.parametrize("num_frames", [1, 5, 8, 9, 16, 49, 120])
def test_viclip_sees_the_middles_of_eight_parts(num_frames):
    borders = np.linspace(0, num_frames, min(8, num_frames) + 1).astype(int)
    middles = [(start + end - 1) // 2 for start, end in pairwise(borders)]
    assert middle_frames(num_frames) == (middles + middles[-1:] * 8)[:8]


def test_viclip_pictures_are_those_of_clips_processor():
    """Bicubic to the shorter side and the centre; PIL rounds to levels in between."""
    video = torch.stack([texture(60, 91, seed) for seed in range(2)])[None]
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=list(OPENAI_MEAN),
        image_std=list(OPENAI_STD),
    )
    pictures = list(((video[0] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    expected = processor(images=pictures, return_tensors="pt")["pixel_values"]
    got = viclip_pixel_values(video, side=32)
    assert got.shape == (1, 2, 3, 32, 32)
    torch.testing.assert_close(got[0], expected, atol=0.03, rtol=0)

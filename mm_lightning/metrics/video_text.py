"""Videos and prompts in one space: CLIP of transformers, ViCLIP of VBench.

Letters: B videos, F frames, E width of an embedding, H W pixels, S side of a model's picture.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 32
VICLIP_FRAMES, VICLIP_SIDE = 8, 224
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VideoTextEncoder(Protocol):
    """Embeds both. `name` is recorded with the figures, as those of two encoders are not comparable."""

    name: str

    def embed_videos(self, video: Tensor) -> Tensor:
        """(B, F, 3, H, W) in [-1, 1] -> (B, E)."""
        ...

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, E)."""
        ...


class CLIPEncoder(nn.Module):
    """CLIP (Radford et al., ICML 2021); a video is the mean of its frames' directions. Frozen.

    Args:
        model: transformers' CLIPModel.
        processor: its CLIPProcessor.
        name: for reports.
    """

    def __init__(self, model: nn.Module, processor: Any, name: str = "CLIP") -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.name = name

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CLIPEncoder:
        """From a folder in transformers' layout, model and processor; nothing is downloaded.

        Raises:
            FileNotFoundError: no such folder, or no config.json in it.
            ValueError: the folder holds another model.
        """
        from transformers import AutoConfig, CLIPModel, CLIPProcessor

        folder = Path(folder).expanduser()
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"No CLIP model at {folder}: give a folder with config.json, weights, tokenizer and preprocessor, "
                "such as `hf download openai/clip-vit-large-patch14 --local-dir FOLDER` makes."
            )
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind != "clip":
            raise ValueError(f"{folder} holds a model of type {kind!r}, not 'clip' with both of its towers.")
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        return cls(model, CLIPProcessor.from_pretrained(folder, local_files_only=True), folder.name)

    def embed_videos(self, video: Tensor) -> Tensor:
        """See `VideoTextEncoder`."""
        levels = ((video.detach().float().flatten(0, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pictures = list(levels.movedim(1, -1).cpu().numpy())
        frames = torch.cat([self._embed_pictures(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)])
        return F.normalize(frames, dim=-1).unflatten(0, video.shape[:2]).mean(1)

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """See `VideoTextEncoder`. Of a prompt beyond the model's length the rest is not read, and a warning says so."""
        tokenizer, length = self.processor.tokenizer, self.model.config.text_config.max_position_embeddings
        num_long = sum(len(ids) > length for ids in tokenizer(list(prompts), verbose=False)["input_ids"])
        if num_long:
            warnings.warn(
                f"{num_long} of {len(prompts)} prompts exceed the {length} tokens of {self.name}.", stacklevel=2
            )
        tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return projected(self.model.get_text_features(**tokens.to(self.model.device)))

    def _embed_pictures(self, pictures: list[Any]) -> Tensor:
        pixel_values = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return projected(self.model.get_image_features(pixel_values=pixel_values.to(self.model.device)))


def projected(features: Any) -> Tensor:
    """transformers 4 gives the projected features, transformers 5 an output around them."""
    return (features if isinstance(features, Tensor) else features.pooler_output).float()


class ViCLIPEncoder(nn.Module):
    """ViCLIP (Wang et al., InternVid, ICLR 2024) as VBench's overall consistency uses it. Frozen.

    Args:
        weights: the file ViClip-InternVid-10M-FLT.pth.

    Raises:
        ModuleNotFoundError: VBench is not installed.
        FileNotFoundError: no such file.
    """

    name = "ViCLIP"

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        if importlib.util.find_spec("vbench") is None:
            raise ModuleNotFoundError("ViCLIP comes with VBench: `pip install vbench`, or give a CLIP model's folder.")
        weights = Path(weights).expanduser()
        if not weights.is_file():
            raise FileNotFoundError(
                f"No ViCLIP weights at {weights}: give ViClip-InternVid-10M-FLT.pth, from OpenGVLab/ViCLIP."
            )
        from vbench.third_party.ViCLIP.viclip import ViCLIP

        self.model = ViCLIP(pretrain=str(weights)).requires_grad_(False).eval()

    def embed_videos(self, video: Tensor) -> Tensor:
        """See `VideoTextEncoder`; from 8 frames, the middles of equal parts."""
        frames = video[:, middle_frames(video.shape[1])]
        device = next(self.model.parameters()).device
        return self.model.encode_vision(viclip_pixel_values(frames).to(device), test=True).float()

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """See `VideoTextEncoder`."""
        return torch.cat([self.model.encode_text(prompt).float() for prompt in prompts])


def middle_frames(num_frames: int, count: int = VICLIP_FRAMES) -> list[int]:
    """The middle frame of each of `count` equal parts; the last again and again where there are fewer frames."""
    parts = min(count, num_frames)
    borders = [i * num_frames // parts for i in range(parts + 1)]
    middles = [(start + end - 1) // 2 for start, end in pairwise(borders)]
    return middles + middles[-1:] * (count - parts)


def viclip_pixel_values(video: Tensor, side: int = VICLIP_SIDE) -> Tensor:
    """(B, F, 3, H, W) in [-1, 1] -> (B, F, 3, S, S): shorter side to S, centre cut out, CLIP's mean and deviation."""
    height, width = video.shape[-2:]
    scale = side / min(height, width)
    size = max(int(height * scale), side), max(int(width * scale), side)
    pictures = F.interpolate(video.float().flatten(0, 1), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((length - side) // 2 for length in size)
    mean, std = (pictures.new_tensor(values)[:, None, None] for values in (OPENAI_MEAN, OPENAI_STD))
    cut = pictures[..., top : top + side, left : left + side] * 0.5 + 0.5
    return ((cut - mean) / std).unflatten(0, video.shape[:2])

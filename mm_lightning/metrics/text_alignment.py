"""Whether a video shows its prompt. Letters: B videos, F frames, E width of an embedding, H W pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mm_lightning.metrics.arithmetic import check_video
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.metrics.video_text import CLIPEncoder, VideoTextEncoder


class TextAlignment(VideoMetric):
    """Cosine of video and prompt: in [-1, 1], higher is better.

    With CLIP (Radford et al., ICML 2021): the cosine of the mean of the frames' normalised embeddings with the prompt's
    embedding. CLIPSIM (Wu et al., GODIVA, 2021) is close to it: there the frames' cosines are averaged, which frames
    that contradict each other do not lower. CLIP reads 77 tokens of a prompt, and no order of frames.
    With ViCLIP: overall consistency of VBench (CVPR 2024), the paper's text alignment (0.17 to 0.24 there).
    `encoder_name` says which was taken: their figures are not comparable.

    Args:
        encoder: folder of a CLIP model in transformers' layout, or an encoder: `CLIPEncoder(model, processor)`,
            `ViCLIPEncoder(weights)`.
        **kwargs: torchmetrics' own.

    Raises:
        FileNotFoundError, ValueError: see `CLIPEncoder.from_pretrained`.
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def __init__(self, encoder: str | Path | VideoTextEncoder, **kwargs: Any) -> None:
        encoder = CLIPEncoder.from_pretrained(encoder) if isinstance(encoder, str | Path) else encoder
        super().__init__(settings=(encoder.name,), **kwargs)
        self.encoder, self.encoder_name = encoder, encoder.name

    def update(self, video: Tensor, prompts: Sequence[str]) -> None:
        """video: (B, F, 3, H, W) in [-1, 1], with B prompts; raises ValueError for another."""
        check_video(video)
        if isinstance(prompts, str) or len(prompts) != len(video):
            raise ValueError(f"{len(video)} videos need a list of as many prompts, got {prompts!r}.")
        self.append(F.cosine_similarity(self.encoder.embed_videos(video), self.encoder.embed_texts(prompts), dim=-1))

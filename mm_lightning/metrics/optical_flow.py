"""Where every pixel moves from one frame to the next: RAFT where it is at hand, OpenCV's DIS otherwise.

Letters: N pairs of frames, F frames, H W pixels.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

RAFT_FILES = "raft_large_*.pth"  # torchvision's name for the weights, in the cache of torch.hub
RAFT_UPDATES = 20  # VBench's
RAFT_MIN_SIDE = 128  # torchvision's smallest picture
MIN_SIDE = 16  # pixels; DIS refuses 8
BATCH = 4


class OpticalFlow(Protocol):
    """Estimates flow. `name` is recorded with the figures, as those of two estimators are not comparable."""

    name: str

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1], twice -> (N, 2, H, W) x and y in pixels, from each pixel of `first`."""
        ...


class OpenCVFlow:
    """Dense inverse search (Kroeger et al., ECCV 2016) as in OpenCV, on grey levels, on the CPU."""

    name = f"OpenCV {cv2.__version__} DIS medium"

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """See `OpticalFlow`. Raises ValueError for pictures smaller than 16 pixels."""
        if min(first.shape[-2:]) < MIN_SIDE:
            raise ValueError(
                f"Optical flow needs frames of {MIN_SIDE} pixels and more, got {tuple(first.shape[-2:])}: enlarge them."
            )
        # Made anew for each call, as metrics are copied and pickled, and OpenCV's objects cannot be.
        search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        pairs = zip(grey_levels(first), grey_levels(second), strict=True)
        flows = np.stack([search.calc(one, other, None) for one, other in pairs])  # (N, H, W, 2)
        return torch.from_numpy(flows).movedim(-1, 1).to(first.device)


def grey_levels(pictures: Tensor) -> list[np.ndarray]:
    """(N, 3, H, W) in [-1, 1] -> N of (H, W) uint8."""
    levels = ((pictures.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in levels.movedim(1, -1).cpu().numpy()]


class RaftFlow:
    """RAFT (Teed and Deng, ECCV 2020) as in torchvision, the estimator of VBench; runs where the pictures are.

    Args:
        weights: file of `torchvision.models.optical_flow.raft_large`'s state dict.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: torchvision is not installed.
    """

    def __init__(self, weights: str | Path) -> None:
        weights = Path(weights).expanduser()
        if not weights.is_file():
            raise FileNotFoundError(f"No RAFT weights at {weights}: give torchvision's file, {RAFT_FILES}, or none.")
        if importlib.util.find_spec("torchvision") is None:
            raise ModuleNotFoundError("RAFT needs torchvision: `pip install torchvision`, or give no RAFT weights.")
        from torchvision.models.optical_flow import raft_large

        self.name = f"torchvision RAFT {weights.stem}"
        self.model: nn.Module = raft_large(weights=None)
        self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """See `OpticalFlow`."""
        height, width = first.shape[-2:]
        self.model.to(first.device)
        pairs = zip(raft_padded(first).split(BATCH), raft_padded(second).split(BATCH), strict=True)
        flows = [self.model(*pair, num_flow_updates=RAFT_UPDATES)[-1] for pair in pairs]
        return torch.cat(flows)[..., :height, :width]


def raft_padded(pictures: Tensor) -> Tensor:
    """Edges repeated to the right and below, to multiples of 8 that RAFT takes."""
    height, width = (max(RAFT_MIN_SIDE, -(-side // 8) * 8) - side for side in pictures.shape[-2:])
    return F.pad(pictures.detach().float(), (0, width, 0, height), mode="replicate")


def load_flow(raft_weights: str | Path | None = None) -> OpticalFlow:
    """RAFT with these weights, or with those in the cache of torch.hub; without torchvision or weights OpenCV's.

    Raises:
        FileNotFoundError, ModuleNotFoundError: weights were asked for, see `RaftFlow`.
    """
    if raft_weights is not None:
        return RaftFlow(raft_weights)
    cached = sorted((Path(torch.hub.get_dir()) / "checkpoints").glob(RAFT_FILES))
    if cached and importlib.util.find_spec("torchvision") is not None:
        return RaftFlow(cached[-1])
    return OpenCVFlow()


def video_flow(flow: OpticalFlow, frames: Tensor) -> Tensor:
    """(F, 3, H, W) in [-1, 1] -> (F - 1, 2, H, W), from each frame to the next."""
    return flow(frames[:-1], frames[1:])

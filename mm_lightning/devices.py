"""On which device a command computes."""

from __future__ import annotations

import torch


def find_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where torch sees a GPU, otherwise the CPU; other names are torch's, such as `cuda:1`.

    Raises:
        ValueError: this machine, or this torch, has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"device={name}: torch has none here. Give auto, or one of {', '.join(there)}.") from error
    return device

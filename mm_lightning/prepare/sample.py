"""What passes through the stages of `prepare`: a sample, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class Rejected(Exception):  # noqa: N818, an event that is counted rather than an error of the program
    """A sample that does not belong into the set.

    Args:
        reason: a short name that is counted, such as `no_face`; one of the stage's `reasons`.
        detail: what was measured, for the report.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass
class Sample:
    """One picture or clip on its way; stages fill in what is still empty."""

    key: str
    """Unique in the set, without dot or slash; made from where it came from, so that it never changes."""
    kind: str
    """`image` or `video`."""
    source: str
    """Where it came from, for the report."""
    data: bytes = b""
    """The encoded target."""
    extension: str = ""
    """`jpg`, `png` or `mp4`."""
    caption: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """What becomes `{key}.json`; JSON values only."""
    frames: list[np.ndarray] = field(default_factory=list)
    """Decoded RGB uint8 (H, W, 3): one for a picture, all for a clip. Never written."""
    embedding: np.ndarray | None = None
    """Of the person, (E,) float32, raw."""
    fields: dict[str, bytes] = field(default_factory=dict)
    """Further files of the sample, by extension: `ref0.jpg`, `latents.safetensors`, ..."""


class Stage(Protocol):
    """One job. Arguments of the constructor are its config; large models load at the first call, not before.

    A stage with models has `models()`: JSON that changes when another file is loaded, under whatever name.
    """

    name: str
    reasons: tuple[str, ...]
    """Every reason that it may give."""

    def __call__(self, sample: Sample) -> list[Sample]:
        """One sample in, none or several out (a video splits into clips).

        Raises:
            Rejected: with one of `reasons`.
        """
        ...


def models_of(stage: object) -> dict[str, Any]:
    """What its `models()` says; {} of one that loads none."""
    return stage.models() if hasattr(stage, "models") else {}

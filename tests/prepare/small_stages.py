"""Stages that are quick and misbehave on demand, and pictures for them."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mm_lightning.prepare.sample import Rejected, Sample
from mm_lightning.prepare.sources import Item

HERE = "tests.prepare.small_stages"
STAGES = {
    "decode": {"_target_": f"{HERE}.Decode"},
    "width": {"_target_": f"{HERE}.MinimumWidth", "least": 20},
    "fate": {"_target_": f"{HERE}.Fate"},
    "split": {"_target_": f"{HERE}.Split"},
    "embed": {"_target_": f"{HERE}.Embed"},
}
SET_STAGES = {"even": {"_target_": f"{HERE}.DropByte", "byte": 7}}


class Decode:
    name, reasons = "decode", ("broken",)

    def __call__(self, sample: Sample) -> list[Sample]:
        try:
            picture = Image.open(io.BytesIO(sample.data)).convert("RGB")
        except OSError as error:
            raise Rejected("broken", str(error)) from error
        sample.frames = [np.asarray(picture)]
        sample.meta |= {"width": picture.width, "height": picture.height, "num_frames": 1, "fps": None}
        sample.meta["faces"] = [{"box": [1.0, 2.0, 9.0, 18.0], "score": 1.0}]
        return [sample]


class MinimumWidth:
    name, reasons = "width", ("narrow",)

    def __init__(self, least: int) -> None:
        if least < 1:
            raise ValueError(f"least={least}: give at least 1.")
        self.least = least

    def __call__(self, sample: Sample) -> list[Sample]:
        if sample.meta["width"] < self.least:
            raise Rejected("narrow", f"{sample.meta['width']} pixels")
        return [sample]


class Fate:
    """Does what the caption says."""

    name, reasons = "fate", ()

    def __call__(self, sample: Sample) -> list[Sample]:
        caption = sample.caption or ""
        if "crash" in caption:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "raise" in caption:
            raise KeyError(sample.key)
        if "sleep" in caption:
            time.sleep(60)
        return [] if "vanish" in caption else [sample]


class Split:
    """Two of a wide picture, one after the other."""

    name, reasons = "split", ()

    def __call__(self, sample: Sample) -> Iterator[Sample]:
        if sample.meta["width"] < 40:
            yield sample
            return
        for i in range(2):
            meta = sample.meta | {"half": i}
            yield Sample(f"{sample.key}-{i}", sample.kind, sample.source, sample.data, sample.extension,
                         sample.caption, meta, sample.frames)  # fmt: skip


class Embed:
    """Draws from the global generator, as a library might."""

    name, reasons = "embed", ()

    def __call__(self, sample: Sample) -> list[Sample]:
        sample.embedding = np.random.rand(8).astype(np.float32)
        sample.meta["drawn"] = float(np.random.rand())
        sample.meta["references"] = [{"file": "ref0.jpg", "similarity": 0.7}]
        sample.fields["ref0.jpg"] = b"\xff" + sample.key.encode()
        return [sample]


class Slow:
    name, reasons = "slow", ()

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, sample: Sample) -> list[Sample]:
        time.sleep(self.seconds)
        return [sample]


class DropByte:
    """A step over the set: leaves out samples whose embedding begins with a certain byte, modulo 8."""

    name, reasons = "drop", ("byte",)

    def __init__(self, byte: int) -> None:
        self.byte = byte

    def __call__(self, summaries: list[dict]) -> dict[str, Rejected]:
        hit = [s["key"] for s in summaries if s["embedding"].view(np.uint8)[0] % 8 == self.byte]
        return {key: Rejected("byte", f"one of {len(summaries)}") for key in hit}


class Unreadable:
    """A chunk of unknown length whose process dies when it is read."""

    name, num_items, digest = "unreadable", None, "0"

    def items(self, start: int = 0) -> Iterator[Item]:
        os.kill(os.getpid(), signal.SIGSEGV)
        yield Item(str(start), self.name, lambda: Sample(str(start), "image", self.name))


def draw_pictures(folder: Path, number: int, fates: dict[int, str] | None = None) -> Path:
    """`number` pictures in two folders with captions; every fifth is too narrow, every third wide."""
    random = np.random.default_rng(0)
    for i in range(number):
        width = 10 if i % 5 == 4 else 48 if i % 3 == 2 else 24
        path = folder / ("a" if i % 2 else "b") / f"Zoë {i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (16, width, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"a woman, {(fates or {}).get(i, 'well')}")
    return folder

"""Frames of a clip that are decoded when they are looked at, so that a long video costs no more than a window of it.

Letters: H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import overload

import decord
import numpy as np

from mm_lightning.prepare.sample import Rejected

UNREADABLE = "unreadable"  # every stage that looks at frames may give this reason
DECODE_ERRORS = (OSError, RuntimeError, EOFError, decord.DECORDError)
BLOCK = 96  # frames decoded and held at once, at most
# decord reads the channels off linesize // width, and FFmpeg pads lines to a multiple of 64 pixels: narrower pictures
# may be read as having four channels (dmlc/decord issues 93 and 336).
SAFE_WIDTH = 192

decord.logging.set_level(decord.logging.FATAL)


class Video:
    """An encoded video and the size at which its frames are wanted. Holds the frames that were read last.

    Args:
        data: the file's bytes.
        size: width and height of the delivered frames, pixels; None takes the video's own.
    """

    def __init__(self, data: bytes, size: tuple[int, int] | None = None) -> None:
        self.data, self.size = data, size
        self._reader: decord.VideoReader | None = None
        self._held: tuple[tuple[int, ...], list[np.ndarray]] = ((), [])

    def __getstate__(self) -> dict:
        """Without what cannot leave the process: the decoder."""
        return {"data": self.data, "size": self.size, "_reader": None, "_held": ((), [])}

    @property
    def reader(self) -> decord.VideoReader:
        if self._reader is None:
            width, height = self.size or (-1, -1)
            factor = self.factor
            stream = io.BytesIO(self.data)
            self._reader = decord.VideoReader(
                stream, ctx=decord.cpu(0), width=width * factor, height=height * factor, num_threads=1
            )
        return self._reader

    @property
    def factor(self) -> int:
        """How much wider than wanted decord has to decode."""
        return 1 if self.size is None else -(-SAFE_WIDTH // self.size[0])

    def read(self, indices: tuple[int, ...]) -> list[np.ndarray]:
        """Frames by number, RGB uint8 (H, W, 3).

        Raises:
            Rejected: unreadable.
        """
        if self._held[0] != indices:
            try:
                batch = self.reader.get_batch(list(indices)).asnumpy()
            except DECODE_ERRORS as error:
                raise Rejected(UNREADABLE, first_line(error)) from error
            self._held = indices, list(average_blocks(batch, self.factor))
        return self._held[1]


class ClipFrames(Sequence[np.ndarray]):
    """Some frames of a video in order, RGB uint8 (H, W, 3); a slice of it is another of these.

    Args:
        video: where they come from.
        indices: numbers of the frames.
        scene: numbers of all frames of the shot that they are part of; None if these are all.
    """

    def __init__(self, video: Video, indices: Sequence[int], scene: Sequence[int] | None = None) -> None:
        self.video, self.indices = video, tuple(indices)
        self.scene = self.indices if scene is None else tuple(scene)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> ClipFrames: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | ClipFrames:
        if isinstance(index, slice):
            return ClipFrames(self.video, self.indices[index], self.scene)
        if len(self) <= BLOCK:
            return self.video.read(self.indices)[index]
        return self.video.read((self.indices[index],))[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), BLOCK):
            yield from self.video.read(self.indices[start : start + BLOCK])

    def as_scene(self) -> ClipFrames:
        """The same frames as a shot of their own."""
        return ClipFrames(self.video, self.indices)

    def outside(self) -> ClipFrames:
        """The frames of the same shot that are not among these."""
        own = set(self.indices)
        return ClipFrames(self.video, [index for index in self.scene if index not in own])

    def resized(self, size: tuple[int, int]) -> ClipFrames:
        """The same frames, decoded at another (width, height)."""
        return ClipFrames(Video(self.video.data, size), self.indices, self.scene)


def average_blocks(frames: np.ndarray, factor: int) -> np.ndarray:
    """(F, k H, k W, 3) uint8 -> (F, H, W, 3) by averaging k x k pixels."""
    if factor == 1:
        return frames
    num_frames, height, width, _ = frames.shape
    blocks = frames.reshape(num_frames, height // factor, factor, width // factor, factor, 3)
    return np.rint(blocks.mean((2, 4))).astype(np.uint8)


def first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:120]}"

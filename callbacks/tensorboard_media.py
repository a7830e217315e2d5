"""Previews while training: reference and generated clip side by side, the decoded x0 estimate, the prompt.

Letters: F frames, H W pixels, S side of the reference picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn

from callbacks.ema import averaged_weights
from callbacks.every_n_steps import EveryNSteps, check_generates
from mm_lightning.media import encode_gif, to_uint8, write_mp4
from mm_lightning.types import Preview


def side_by_side(reference: Tensor, video: Tensor, max_height: int) -> list[Image.Image]:
    """One picture per frame: the reference scaled to the frame's height, then the frame.

    Args:
        reference: (3, S, S) in [-1, 1].
        video: (F, 3, H, W) in [-1, 1].
        max_height: taller frames are scaled down to it.
    """
    height = min(video.shape[-2], max_height)
    width = round(video.shape[-1] * height / video.shape[-2])
    left = Image.fromarray(to_uint8(reference)).resize((height, height), Image.Resampling.BICUBIC)
    frames = []
    for pixels in to_uint8(video):
        frame = Image.new("RGB", (height + width, height))
        frame.paste(left, (0, 0))
        frame.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), (height, 0))
        frames.append(frame)
    return frames


class MediaPreview(EveryNSteps):
    """Shows what the model generates for the first training sample, every n optimizer steps and at the end.

    Calls `pl_module.generate_preview(batch) -> Preview` with a batch of one, on every rank (sharded weights need all),
    without gradients, in evaluation mode, with averaged weights where there are some, and without touching the random
    state of training. Rank zero writes to TensorBoard `preview/generated`, `preview/denoised`, `preview/prompt`, and
    the clip as `previews/step-*.mp4` in the log folder.

    Args:
        every_n_steps: optimizer steps between previews; 0 shows only the end.
        fps: of the clip, 8 for CogVideoX.
        max_height: of the pictures in TensorBoard, in pixels; the mp4 keeps its size.
    """

    def __init__(self, every_n_steps: int = 500, fps: float = 8, max_height: int = 240) -> None:
        super().__init__(every_n_steps)
        if fps <= 0 or max_height < 1:
            raise ValueError(f"fps={fps}, max_height={max_height}: both must be positive.")
        self.fps = fps
        self.max_height = max_height
        self._batch: Any = None

    def check_module(self, module: LightningModule) -> None:
        check_generates(module, "callbacks.preview")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batch is None:
            self._batch = move_data_to_device(first_sample(batch), "cpu")

    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir) / "previews"
        preview = self._generate(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        write_mp4(folder / f"step-{trainer.global_step:07d}.mp4", to_uint8(preview.video), self.fps)
        for trainer_logger in trainer.loggers:
            if isinstance(trainer_logger, TensorBoardLogger):
                self._log(trainer_logger.experiment, preview, trainer.global_step)

    def _generate(self, trainer: Trainer, pl_module: LightningModule) -> Preview:
        batch = move_data_to_device(self._batch, pl_module.device)
        precision = trainer.precision_plugin.forward_context()
        with isolate_rng(), evaluation(pl_module), averaged_weights(trainer, pl_module), precision, torch.no_grad():
            return pl_module.generate_preview(batch)

    def _log(self, writer: Any, preview: Preview, step: int) -> None:
        self._log_gif(writer, "preview/generated", preview.reference, preview.video, step)
        if preview.denoised is not None:
            self._log_gif(writer, "preview/denoised", preview.reference, preview.denoised, step)
        writer.add_text("preview/prompt", preview.prompt, step)
        writer.flush()

    def _log_gif(self, writer: Any, tag: str, reference: Tensor, video: Tensor, step: int) -> None:
        frames = side_by_side(reference, video, self.max_height)
        width, height = frames[0].size
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encode_gif(frames, self.fps)
        )
        # SummaryWriter.add_video needs moviepy; an image summary may hold any encoded picture, also an animated one.
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def first_sample(batch: Any) -> Any:
    """A batch of one out of a batch: the first entry of each tensor and list, named tuples kept, None kept."""
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(first_sample(field) for field in batch))
    return None if batch is None else batch[:1]


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each submodule has its own mode again (frozen ones stay in eval)."""
    training = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in training.items():
            submodule.training = mode

"""Attention by plain products while training on the CPU."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class PlainAttention(Callback):
    """Forbids the CPU's fused attention kernel from `fit` to its end; on other devices it does nothing.

    In bfloat16 that kernel's backward pass takes several times as long: forward and backward on (64, 4, 48, 48), one
    thread, 36 ms against 11 ms (float32: 10 and 11 ms).
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.was_enabled = torch.backends.cuda.flash_sdp_enabled()  # the CPU's kernel obeys it, too
        if stage == "fit" and trainer.strategy.root_device.type == "cpu":
            torch.backends.cuda.enable_flash_sdp(False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.backends.cuda.enable_flash_sdp(self.was_enabled)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        torch.backends.cuda.enable_flash_sdp(self.was_enabled)

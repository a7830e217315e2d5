"""When callbacks that look at a training, or save it, do so."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def check_generates(module: LightningModule, name: str) -> None:
    """
    Raises:
        ValueError: a part is not loaded that generating needs.
    """
    missing = sorted({"vae", "text_encoder"} - set(getattr(module, "components", ("vae", "text_encoder"))))
    if missing:
        raise ValueError(
            f"{name} generates clips and needs {' and '.join(missing)}: add them to model.components, or give ~{name}."
        )


class EveryNSteps(Callback):
    """Calls `act` every n optimizer steps and at the end, once for a step.

    While gradients accumulate, several batches end at one step; a resumed run starts at a step that was acted on. The
    sanity check ends no training batch. `act` is called on every rank, as sharded weights need all.

    Args:
        every_n_steps: optimizer steps between calls; 0 calls only at the end.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps={every_n_steps}: give 0 (only at the end) or more.")
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def check_module(self, module: LightningModule) -> None:
        """Before anything is loaded.

        Raises:
            ValueError: the module lacks what `act` needs, or does not take the callback's settings.
        """

    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After optimizer step `trainer.global_step`."""
        raise NotImplementedError

    def act_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self.act(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if due and trainer.global_step > self._last_step:
            self.act_now(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._last_step:
            self.act_now(trainer, pl_module)

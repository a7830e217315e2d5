"""Exponential moving average of the trained part, W_ema <- decay * W_ema + (1 - decay) * W; frozen parts are shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from mm_lightning.checkpoint import copy_tensors, raise_on_mismatch, trainable_parameters, trainable_state_dict


class TrainableAverage(AveragedModel):
    """An `AveragedModel` of a module's trainable parameters, as a flat list in the order of their names."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(_trainable_view(module), use_buffers=False, **kwargs)
        self.requires_grad_(False)
        self.names = list(trainable_parameters(module))

    @override
    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(_trainable_view(model))

    def tensors(self) -> dict[str, Tensor]:
        """Name -> average, sharing memory."""
        return {name: param.detach() for name, param in zip(self.names, self.module.parameters(), strict=True)}


class TrainableEMA(EMAWeightAveraging):
    """Lightning's EMA callback on the trainable parameters only, whole or sharded (FSDP2).

    Validation sees the averages, and after training the module holds them, as with Lightning's own callback. A
    checkpoint keeps the current weights in `state_dict`, so that it resumes with or without this callback, and the
    averages beside them in `ema_state_dict`; evaluation from a checkpoint (`trainer.validate`) loads the averages.

    Args:
        decay: of the average per update, in [0, 1].
        update_every_n_steps: optimizer steps between updates.
        update_starting_at_step: first step that is averaged; before it there is no average and nothing is swapped.
        device: where the averages live, e.g. "cpu"; by default beside the parameters.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(
            device=device,
            use_buffers=False,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
        )
        self.swapped = False
        self._restored: dict[str, Any] | None = None

    @property
    def has_average(self) -> bool:
        """Whether a step has been averaged yet."""
        return self._average_model is not None and int(self._average_model.n_averaged) > 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: parameters may be made or sharded after this hook."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._average_model = TrainableAverage(pl_module, device=self._device, **self._kwargs)
        self.swapped = False
        self._apply_restored()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Outside of fit the module holds the averages already: trained here, or loaded by on_load_checkpoint.
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_models(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_models(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Swapping instead of copying keeps the current weights for checkpoints that are written after this.
        self._swap_models(pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.has_average:
            return
        current, average = trainable_state_dict(pl_module), self._average_model.tensors()
        if self.swapped:
            current, average = average, current
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **current}
        checkpoint["ema_state_dict"] = average
        checkpoint["averaging_state"] = {"n_averaged": int(self._average_model.n_averaged)}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "ema_state_dict" not in checkpoint:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            _copy_by_name(trainable_state_dict(pl_module), checkpoint["ema_state_dict"])
            return
        self._restored = {
            "tensors": checkpoint["ema_state_dict"],
            "n_averaged": checkpoint["averaging_state"]["n_averaged"],
        }
        self._apply_restored()

    def _apply_restored(self) -> None:
        # Sharded models load their checkpoint after on_fit_start, all others before it.
        if self._average_model is None or self._restored is None:
            return
        _copy_by_name(self._average_model.tensors(), self._restored["tensors"])
        self._average_model.n_averaged.fill_(self._restored["n_averaged"])
        self._restored = None

    @override
    def _swap_models(self, pl_module: LightningModule) -> None:
        if not self.has_average:
            return
        current = trainable_state_dict(pl_module)
        for name, average in self._average_model.tensors().items():
            kept = average.clone()
            average.copy_(current[name])
            current[name].copy_(kept)
        self.swapped = not self.swapped


@contextmanager
def averaged_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Let the module hold the averages inside the block, if a `TrainableEMA` keeps some; otherwise change nothing."""
    swapping = [callback for callback in trainer.callbacks if _can_swap(callback)]
    for callback in swapping:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in swapping:
            callback._swap_models(pl_module)


def _can_swap(callback: Callback) -> bool:
    return isinstance(callback, TrainableEMA) and callback.has_average and not callback.swapped


def _trainable_view(module: nn.Module) -> nn.ParameterList:
    return nn.ParameterList(trainable_parameters(module).values())


@torch.no_grad()
def _copy_by_name(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    raise_on_mismatch(targets.keys() - sources.keys(), sources.keys() - targets.keys())
    copy_tensors(targets, sources)

"""Where a run goes on: what Lightning has to be told, and what it has to be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from datamodules.image import ShardDataModule


class CountConsumed(Callback):
    """Counts the samples of all ranks that have reached the weights.

    A count moves on with each optimizer step, not with each batch: a checkpoint that is written in the middle of an
    accumulation starts it again, since the gradients of its first half are lost. What workers have prefetched does not
    count. The data module attaches this by itself.
    """

    def __init__(self, datamodule: ShardDataModule) -> None:
        self.datamodule = datamodule
        self.num_batches = self.global_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.num_batches, self.global_step = 0, trainer.global_step
        if self.datamodule.restored is not None:
            align_batches(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.num_batches += 1
        if trainer.global_step != self.global_step:
            self.datamodule.position.consumed += self.num_batches * self.datamodule.batch_size * trainer.world_size
            self.num_batches, self.global_step = 0, trainer.global_step


def attach(trainer: Trainer, callback: CountConsumed) -> None:
    """In front of all others, so that a checkpoint of this step sees the new count."""
    others = [other for other in trainer.callbacks if not isinstance(other, CountConsumed)]
    trainer.callbacks[:] = [callback, *others]


def align_batches(trainer: Trainer) -> None:
    """Lets Lightning's count of batches stand where an accumulation starts.

    Lightning steps when that count is a multiple of `accumulate_grad_batches`, or reaches the end of an epoch. After a
    checkpoint in the middle of an accumulation, with another number of ranks and so of batches per step, or from
    behind the last batch of an epoch, its first step would be too short.
    """
    loop = trainer.fit_loop.epoch_loop
    progress, steps = loop.batch_progress, loop.automatic_optimization.optim_progress
    if progress.is_last_batch:
        if progress.current.completed == progress.current.processed:
            for counts in (progress, loop.scheduler_progress, steps):
                counts.reset_on_run()
        return
    num_steps = steps.optimizer.step.current.completed
    shift = num_steps * trainer.accumulate_grad_batches - progress.current.processed
    for counts in (progress.current, progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + shift)


def restart_loader(trainer: Trainer | None) -> None:
    """Drops a loader that was started before the checkpoint was read.

    That happens when `configure_optimizers` asks for `estimated_stepping_batches` under a strategy that restores
    after it, such as FSDP2.
    """
    loop = getattr(trainer, "fit_loop", None)
    if loop is not None and loop._combined_loader is not None:
        loop._combined_loader.reset()
        loop._combined_loader = None


def describe_changes(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Warns where the order is not the one that the checkpoint counted in.

    Raises:
        ValueError: buckets with another global batch, whose counts mean something else.
    """
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if "buckets" in then and "buckets" in now and "global_batch" in changed:
        raise ValueError(
            f"the checkpoint was made with buckets of {then['global_batch']} samples per step, this run has "
            f"{now['global_batch']}: keep global_batch_size, or start anew without ckpt_path."
        )
    if changed:
        listed = "; ".join(f"{name}: {then.get(name)} there, {now.get(name)} here" for name in changed)
        rank_zero_warn(
            f"The samples come in another order than in the run of the checkpoint ({listed}): this run goes on at the "
            "same count, but some samples of the present pass may be met twice and others not at all."
        )

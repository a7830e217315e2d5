"""Runs in each of two processes under torchrun; rank zero writes what each run gave to `results.pt`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from callbacks.ema import TrainableEMA
from callbacks.generated_validation import Generated, gather_videos
from callbacks.nonfinite import NonFiniteGuard
from mm_lightning.checkpoint import gather_tensors, trainable_state_dict
from mm_lightning.strategy import TrainableModelParallelStrategy
from tests.toy import ToyModule, loader, make_trainer

NUM_STEPS = 4


def ddp() -> DDPStrategy:
    return DDPStrategy()


def fsdp(**kwargs: Any) -> TrainableModelParallelStrategy:
    return TrainableModelParallelStrategy(**kwargs)


def fit(folder: Path, strategy: Any, ckpt_path: Path | None = None, **module: Any) -> dict[str, Any]:
    """Train, with a checkpoint every two steps; losses, weights, averages and counters of the run."""
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    ema, guard = TrainableEMA(decay=0.5), NonFiniteGuard(max_consecutive=3)
    world_size = int(os.environ["WORLD_SIZE"])
    trainer = make_trainer(folder, NUM_STEPS, [save, ema, guard], devices=world_size, strategy=strategy)
    model = ToyModule(**module)
    try:
        trainer.fit(model, loader(), ckpt_path=ckpt_path)
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    # After training the module holds the averages, the callback the weights.
    averages, weights = trainable_state_dict(model), ema._average_model.tensors()
    return {
        "losses": model.losses,
        "weights": gather_tensors(weights),
        "averages": gather_tensors(averages),
        "num_skipped": guard.num_skipped,
        "sharded": sorted(name for name, param in model.named_parameters() if hasattr(param, "device_mesh")),
        "error": error,
    }


def gathered_videos(rank: int, num_videos: int = 3) -> list[tuple[str, list[int], int]]:
    """Prompt, frames' shape and brightness of videos of which every rank has made its share."""
    frames = np.ones((2, 256, 512, 3), np.uint8)
    made = [Generated(None, f"video {i}", frames * (10 * i), None) for i in range(num_videos)[rank::2]]
    gathered = gather_videos(made)
    return [(video.prompt, list(video.frames.shape), int(video.frames.mean())) for video in gathered]


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    results = {
        "ddp": fit(out / "ddp", ddp()),
        "fsdp": fit(out / "fsdp", fsdp()),
        "fsdp_full": fit(out / "fsdp_full", fsdp(save_distributed_checkpoint=False)),
        "hybrid": fit(out / "hybrid", fsdp(replicate_size=2)),
    }
    for name in ("ddp", "fsdp", "fsdp_full", "hybrid"):
        results[f"fsdp_from_{name}"] = fit(out / f"from_{name}", fsdp(), out / name / "step=2.ckpt")
    for name, strategy in {"ddp": ddp, "fsdp": fsdp}.items():
        results[f"{name}_nan"] = fit(out / f"{name}_nan", strategy(), poison=lambda step, rank: (step, rank) == (1, 1))
        results[f"{name}_fatal"] = fit(out / f"{name}_fatal", strategy(), poison=lambda step, rank: rank == 1)
    results["videos"] = gathered_videos(dist.get_rank())
    if dist.get_rank() == 0:
        torch.save(results, out / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

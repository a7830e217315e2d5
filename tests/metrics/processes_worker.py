"""Runs in each of two processes under torchrun; rank zero writes what both together gave to `results.pt`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchmetrics import Metric

from tests.metrics.drawn import batch_of, every_metric, random_inputs, update

NUM_VIDEOS = 5
SHARES = {"uneven": ((0, 4), (4, 5)), "one_idle": ((0, 5), (5, 5))}  # rank -> its videos


def results_of(metric: Metric) -> dict[str, Any]:
    """All that is computed from all processes; twice, as reading must not change the state."""
    names = ("per_video", "num_unknown", "num_faceless_frames", "num_faceless_videos", "ranks", "num_people")
    found = {"compute": metric.compute()}
    for repeat in range(2):
        found |= {f"{name}{repeat}": getattr(metric, name)() for name in names if hasattr(metric, name)}
    metric._computed = None
    return found | {"again": metric.compute()}


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    inputs, results = random_inputs(NUM_VIDEOS), {}
    for share, ranges in SHARES.items():
        start, end = ranges[dist.get_rank()]
        for name, metric in every_metric().items():
            for video in range(start, end):
                update(metric, batch_of(inputs, video, video + 1))
            results[f"{share}/{name}"] = results_of(metric)
    if dist.get_rank() == 0:
        torch.save(results, out / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What `conf/` needs beside YAML: resolvers, checks across values, hyper-parameters for the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf


def count_devices(devices: int | str | list[int], num_nodes: int = 1) -> int:
    """What Lightning will make of `trainer.devices`, over all nodes."""
    if str(devices) in ("auto", "-1"):
        per_node = max(torch.cuda.device_count(), 1)
    elif isinstance(devices, str) and "," in devices:
        per_node = len(devices.split(","))
    else:
        per_node = int(devices) if isinstance(devices, int | str) else len(devices)
    return per_node * num_nodes


def accumulation(global_batch_size: int, batch_size: int, devices: int | str | list[int], num_nodes: int = 1) -> int:
    """Micro-batches per optimizer step, so that the global batch is the same on any number of devices.

    Raises:
        ValueError: no whole number of micro-batches makes the global batch.
    """
    num_devices = count_devices(devices, num_nodes)
    steps, rest = divmod(global_batch_size, batch_size * num_devices)
    if rest or not steps:
        raise ValueError(
            f"global_batch_size={global_batch_size} is no multiple of data.batch_size={batch_size} x {num_devices} "
            f"devices = {batch_size * num_devices}; change data.batch_size, trainer.devices or global_batch_size."
        )
    return steps


def micro_batch(global_batch_size: int, devices: int | str | list[int], num_nodes: int, at_most: int) -> int:
    """The largest batch per device, up to `at_most`, of which the global batch is a multiple; 1 where there is none."""
    per_device = global_batch_size // count_devices(devices, num_nodes)
    return max((size for size in range(1, at_most + 1) if per_device % size == 0 and size <= per_device), default=1)


def register_resolvers() -> None:
    """`${accumulation:...}`, `${micro_batch:...}` and `${micro_batches:steps,accumulated}` for conf/."""
    OmegaConf.register_new_resolver("micro_batch", micro_batch, replace=True)
    OmegaConf.register_new_resolver("accumulation", accumulation, replace=True)
    OmegaConf.register_new_resolver("micro_batches", lambda steps, accumulated: steps * accumulated, replace=True)


def check_config(cfg: DictConfig) -> None:
    """Resolve everything and compare what only disagrees together.

    Raises:
        ValueError: the base is loaded in half precision and the trainer computes in another.
        FileNotFoundError: `ckpt_path` is not there.
    """
    OmegaConf.resolve(cfg)
    base_dtype, precision = cfg.model.base_dtype, str(cfg.trainer.precision)
    expected = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}.get(base_dtype)
    if expected is not None and precision != expected:
        raise ValueError(
            f"model.base_dtype={base_dtype} needs trainer.precision={expected} (the trained part is kept in fp32), "
            f"not {precision}; or load the base in float32."
        )
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).exists():
        raise FileNotFoundError(
            f"ckpt_path={cfg.ckpt_path} is not there; a run keeps its checkpoints in <run>/checkpoints, the newest as "
            "last.ckpt."
        )


def flatten(cfg: DictConfig) -> dict[str, Any]:
    """{"model.optimizer.lr": 1e-5, ...}, leaves only."""

    def leaves(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node if isinstance(node, bool | int | float | str) else str(node)}
        found: dict[str, Any] = {}
        for key, value in node.items():
            found |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
        return found

    return leaves(OmegaConf.to_container(cfg, resolve=True), "")


def log_hyperparameters(trainer: Trainer, cfg: DictConfig) -> None:
    for logger in trainer.loggers:
        logger.log_hyperparams(flatten(cfg))


@rank_zero_only
def mark_latest(run_dir: str | Path) -> None:
    """Point `<task>/latest` at a finished run, where the next stage looks for its adapter."""
    run_dir = Path(run_dir).absolute()
    link, fresh = run_dir.parent / "latest", run_dir.parent / ".latest"
    if link.exists() and not link.is_symlink():
        return
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run_dir.name)
    fresh.replace(link)

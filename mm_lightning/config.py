"""What `conf/` needs beside YAML: resolvers, checks across values, short errors, hyper-parameters for the log.

`python -m mm_lightning.config outputs` prints where the newest results lie.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.errors import CompactHydraException, InstantiationException
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from torch.utils.tensorboard.summary import hparams

from mm_lightning.files import temporary_path

# The precision in which the trained part stays in fp32, for each type of the frozen base.
PRECISIONS = {"float32": None, "bfloat16": "bf16-mixed", "float16": "16-mixed"}


# Devices and batches --------------------------------------------------------------------------------------------------


def count_devices(devices: int | str | list[int], num_nodes: int = 1) -> int:
    """What Lightning will make of `trainer.devices`, over all nodes.

    Raises:
        ValueError: no device, or something that names none.
    """
    try:
        if str(devices) in ("auto", "-1"):
            per_node = max(torch.cuda.device_count(), 1)
        elif isinstance(devices, str) and "," in devices:
            per_node = len([name for name in devices.split(",") if name.strip()])
        else:
            per_node = int(devices) if isinstance(devices, int | str) else len(devices)
    except ValueError:
        per_node = 0
    if per_node < 1 or num_nodes < 1:
        raise ValueError(
            f"trainer.devices={devices} on trainer.num_nodes={num_nodes} is no device: give a number from 1, a list of "
            "indices such as [0,1], or auto."
        )
    return per_node * num_nodes


def check_whole(**numbers: Any) -> None:
    """
    Raises:
        ValueError: one that is no whole number from 1.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name.replace('__', '.')}={value}: give a whole number from 1.")


def accumulation(global_batch_size: int, batch_size: int, devices: int | str | list[int], num_nodes: int = 1) -> int:
    """Micro-batches per optimizer step, so that the global batch is the same on any number of devices.

    Raises:
        ValueError: no whole number of micro-batches makes the global batch, or one is no such number.
    """
    check_whole(global_batch_size=global_batch_size, data__batch_size=batch_size)
    num_devices = count_devices(devices, num_nodes)
    steps, rest = divmod(global_batch_size, batch_size * num_devices)
    if rest or not steps:
        raise ValueError(
            f"global_batch_size={global_batch_size} is no multiple of data.batch_size={batch_size} x {num_devices} "
            f"devices = {batch_size * num_devices}; change data.batch_size, trainer.devices or global_batch_size."
        )
    return steps


def device_batch(global_batch_size: int, devices: int | str | list[int], num_nodes: int, at_most: int) -> int:
    """The largest batch per device, up to `at_most`, of which the global batch is a multiple; 1 where there is none.

    Raises:
        ValueError: no whole number from 1.
    """
    check_whole(global_batch_size=global_batch_size)
    per_device = global_batch_size // count_devices(devices, num_nodes)
    return max((size for size in range(1, at_most + 1) if per_device % size == 0 and size <= per_device), default=1)


def scaled(steps: int, scale: float) -> int:
    """A number of steps of the long recipe at `scale`, at least 1.

    Raises:
        ValueError: `scale` is not positive.
    """
    if isinstance(scale, str) or not scale > 0:
        raise ValueError(f"scale={scale}: give a positive number; 1 is the long recipe, 0.02 a quick trial.")
    return max(1, round(steps * scale))


def native_precision(accelerator: str) -> str:
    """`bf16-mixed` where the device computes in bfloat16; `32-true` where it would emulate it.

    A training step of the miniature in emulated bfloat16 takes twelve times as long as in single precision (AMD EPYC
    with AVX2 alone, torch 2.13).
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    return "32-true" if on_cpu and not torch.cpu._is_avx512_bf16_supported() else "bf16-mixed"


def register_resolvers() -> None:
    """`${accumulation:...}`, `${device_batch:...}`, `${micro_batches:steps,accumulated}`, `${folder_name:...}`,
    `${scaled:steps,scale}`, `${native_precision:accelerator}`, `${chosen:group,overrides}`."""
    OmegaConf.register_new_resolver("native_precision", native_precision, replace=True)
    OmegaConf.register_new_resolver("chosen", chosen, replace=True)
    OmegaConf.register_new_resolver("scaled", scaled, replace=True)
    OmegaConf.register_new_resolver("device_batch", device_batch, replace=True)
    OmegaConf.register_new_resolver("accumulation", accumulation, replace=True)
    OmegaConf.register_new_resolver("micro_batches", lambda steps, accumulated: steps * accumulated, replace=True)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def chosen(group: str, overrides: Sequence[str]) -> str:
    """What a command line chose of a group, as a folder's name; `full` where it chose nothing.

    ("ablation", ["seed=1", "ablation=[no_can,no_drops]"]) -> "no_can,no_drops"
    """
    values = [override.partition("=")[2] for override in overrides if override.startswith(f"{group}=")]
    names = [name for name in re.split(r"[^\w-]+", values[-1] if values else "") if name not in ("", "null")]
    return folder_name(",".join(names)) or "full"


def folder_name(text: str, max_length: int = 100) -> str:
    """One folder's name out of any text, such as the overrides of a run: no slash, and no longer than systems take."""
    return re.sub(r"[^\w.,=+-]+", "-", text)[:max_length].strip("-")


# Mistakes -------------------------------------------------------------------------------------------------------------


class UserError(CompactHydraException):
    """What a check says of a user's value. Hydra prints the message without a traceback and counts the run as failed;
    `HYDRA_FULL_ERROR=1` shows where it came from."""


@contextmanager
def short_errors() -> Iterator[None]:
    """Turn the ValueErrors and FileNotFoundErrors of checks into `UserError`, whatever wraps them."""
    try:
        yield
    except (ValueError, FileNotFoundError, InstantiationException) as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException | InterpolationResolutionError):
            inner = cause.__cause__ or cause.__context__
            if inner is None:
                break
            cause = inner
        if not isinstance(cause, ValueError | FileNotFoundError):
            raise
        raise UserError(str(cause)) from cause


def check_config(cfg: DictConfig) -> None:
    """Resolve everything and compare what only disagrees together.

    Raises:
        ValueError: the base is loaded in half precision and the trainer computes in another, or in no known type; a
            callback without the logger that it writes into.
        FileNotFoundError: `ckpt_path` is not there.
    """
    OmegaConf.resolve(cfg)
    base_dtype = cfg.model.get("base_dtype", "float32")  # models without a frozen base do not say
    precision = str(cfg.trainer.precision)
    if base_dtype not in PRECISIONS:
        raise ValueError(f"model.base_dtype={base_dtype}: give one of {', '.join(PRECISIONS)}.")
    expected = PRECISIONS[base_dtype]
    if expected is not None and precision != expected:
        raise ValueError(
            f"model.base_dtype={base_dtype} needs trainer.precision={expected} (the trained part is kept in fp32), "
            f"not {precision}; or load the base in float32."
        )
    if not cfg.get("logger") and "learning_rate" in (cfg.get("callbacks") or {}):
        raise ValueError(
            "callbacks.learning_rate writes into a logger, and there is none: give ~callbacks.learning_rate."
        )
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).exists():
        raise FileNotFoundError(
            f"ckpt_path={cfg.ckpt_path} is not there; a run keeps its checkpoints in <run>/checkpoints, the newest as "
            "last.ckpt."
        )


def check_callbacks(callbacks: Iterable[Callback], module: LightningModule) -> None:
    """Whether our own can do later what they are for; raises what their `check_module` raises."""
    for callback in callbacks:
        if hasattr(callback, "check_module"):
            callback.check_module(module)


@contextmanager
def told_to_stop() -> Iterator[None]:
    """A SIGTERM ends the program with 143, as shells say it: Lightning would say 0, and whatever waits would go on."""
    try:
        yield
    except SIGTERMException as error:
        raise SystemExit(128 + signal.SIGTERM) from error


def check_devices(trainer: Trainer, cfg: DictConfig) -> None:
    """Compare the trainer's devices with those for which `accumulation` was reckoned.

    Raises:
        ValueError: they differ, so that the global batch would be another than asked for.
    """
    counted, found = count_devices(cfg.trainer.devices, cfg.trainer.num_nodes), trainer.num_devices * trainer.num_nodes
    if counted != found:
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} was taken for {counted}, but with trainer.accelerator="
            f"{cfg.trainer.accelerator} the trainer has {found}: give trainer.devices as a number, or the global batch "
            f"is not {cfg.global_batch_size}."
        )


def limit_threads(num_threads: int | None) -> None:
    """Use so many threads for arithmetic on the CPU; None leaves it to torch."""
    if num_threads is not None:
        if num_threads < 1:
            raise ValueError(f"num_threads={num_threads}: give a number from 1, or null to leave it to torch.")
        torch.set_num_threads(num_threads)


# Records --------------------------------------------------------------------------------------------------------------


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


@rank_zero_only
def log_hyperparameters(trainer: Trainer, cfg: DictConfig) -> None:
    """Into every logger, and into TensorBoard's own table of hyper-parameters beside the validation loss."""
    values = flatten(cfg)
    for logger in trainer.loggers:
        logger.log_hyperparams(values)
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(values, {"val/loss": 0.0}):
                logger.experiment.file_writer.add_summary(summary)


@rank_zero_only
def mark_latest(run_dir: str | Path) -> None:
    """Point `<task>/latest` at a finished run, where the next stage looks for its adapter."""
    run_dir = Path(run_dir).absolute()
    link = run_dir.parent / "latest"
    fresh = temporary_path(link.with_name(".latest"))  # runs of a task may end together
    if link.exists() and not link.is_symlink():
        return
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run_dir.name)
    fresh.replace(link)


def list_results(output_dir: str | Path) -> list[str]:
    """One line per result of the newest finished run of each task, and how to look at all of them."""
    lines = []
    for latest in sorted(Path(output_dir).glob("*/latest")):
        clips = sorted(latest.glob("tensorboard/previews/*.mp4"))
        for name, path in (("adapter", latest / "adapter"), ("clip", clips[-1] if clips else None)):
            if path is not None and path.exists():
                lines.append(f"{latest.parent.name:<16} {name:<8} {path}")
    return [*lines, f"{'losses, previews':<25} tensorboard --logdir {output_dir}"]


if __name__ == "__main__":
    print("\n".join(list_results(*sys.argv[1:2] or ["outputs"])))

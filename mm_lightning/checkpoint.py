"""Trainable parameters into and out of checkpoints, whole (Tensor) or sharded over processes (DTensor)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

NUM_NAMES_SHOWN = 5
# A sharded checkpoint is a folder: shards, then what is no tensor, and last the marker that says that all is there.
METADATA_FILE = "meta.pt"
COMPLETE_FILE = "complete.json"


def clean_name(name: str) -> str:
    """A parameter's name without the prefix that `torch.compile` puts in front of a wrapped submodule."""
    return name.replace("_orig_mod.", "")


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that has `requires_grad`, in the order of `module.named_parameters()`."""
    return {clean_name(name): param for name, param in module.named_parameters() if param.requires_grad}


def trainable_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Name -> detached trainable parameter, sharing its memory; no frozen parameter and no buffer."""
    return {name: param.detach() for name, param in trainable_parameters(module).items()}


def gather_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole CPU tensors on rank zero, an empty dict elsewhere. Every rank must call it: DTensors are all-gathered."""
    keep = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.cpu()
    return whole


def copy_tensors(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Write `sources` into `targets` in place; a whole source is cut to the shard that a DTensor target holds."""
    with torch.no_grad():
        for name, target in targets.items():
            source = sources[name]
            if isinstance(target, DTensor) and not isinstance(source, DTensor):
                source = source.to(target.device)
                source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
            target.copy_(source)


def check_trainable(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint's names and shapes with the module's trainable parameters.

    Raises:
        ValueError: lists what is missing, what is unexpected and what has another shape.
    """
    expected = trainable_parameters(module)
    found = {clean_name(name): tensor for name, tensor in state_dict.items()}
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(param.shape)}"
        for name, param in expected.items()
        if name in found and found[name].shape != param.shape
    ]
    raise_on_mismatch(expected.keys() - found.keys(), found.keys() - expected.keys(), shapes)


def raise_on_mismatch(missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str] = ()) -> None:
    """Raise a ValueError that lists the differences, if there are any."""
    differences = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": sorted(shapes)}
    lines = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in differences.items() if names]
    if lines:
        raise ValueError(
            "The checkpoint does not hold exactly what this model trains; was it made with another preset, base model "
            "or ablation? " + "; ".join(lines)
        )


def load_trainable(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a trainable-only state dict into the module; see `check_trainable` for the errors."""
    check_trainable(module, state_dict)
    copy_tensors(trainable_parameters(module), {clean_name(name): tensor for name, tensor in state_dict.items()})


def filter_checkpoint(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Drop frozen parameters and buffers from `checkpoint["state_dict"]`; for `LightningModule.on_save_checkpoint`."""
    trainable = trainable_parameters(module)
    state_dict = {clean_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    checkpoint["state_dict"] = {name: tensor for name, tensor in state_dict.items() if name in trainable}


def check_checkpoint(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """`check_trainable` for `LightningModule.on_load_checkpoint`; the module sets `strict_loading = False`.

    Keys take the module's own names, so that Lightning's load, which is not strict, finds compiled submodules as well.
    A strategy that has compared and loaded the weights itself leaves no `state_dict` in the checkpoint.
    """
    if "state_dict" in checkpoint:
        check_trainable(module, checkpoint["state_dict"])
        own = {clean_name(name): name for name, _ in module.named_parameters()}
        checkpoint["state_dict"] = {own[clean_name(name)]: value for name, value in checkpoint["state_dict"].items()}


def require_complete(path: str | Path) -> None:
    """Refuse a checkpoint that is not there, or a folder whose writing was interrupted.

    Raises:
        FileNotFoundError: nothing stands at `path`.
        ValueError: a folder without the completion marker.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint at {path}. Give an existing file or folder, or leave the path out.")
    if path.is_dir() and not (path / COMPLETE_FILE).is_file():
        raise ValueError(
            f"The checkpoint folder {path} is not complete: {COMPLETE_FILE} is missing, which is written last. "
            "Either the run that wrote it was stopped, or this is no training checkpoint; resume from another one."
        )


def replace_path(partial: Path, final: Path) -> None:
    """Move a finished file or folder to its place; what stood there stays whole until then.

    A file takes its place at once; between a folder and its successor there is a moment without either.
    """
    if partial.is_file() and not final.is_dir():
        partial.replace(final)
        return
    old = final.with_name(f".{final.name}.old")
    remove_path(old)
    if final.exists() or final.is_symlink():
        final.rename(old)
    partial.rename(final)
    remove_path(old)


def remove_path(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _listing(names: list[str]) -> str:
    more = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")

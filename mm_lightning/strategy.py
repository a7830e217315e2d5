"""FSDP2 for a frozen backbone with a trained adapter: sharded blocks, checkpoints of trainable parameters only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from mm_lightning.checkpoint import (
    COMPLETE_FILE,
    METADATA_FILE,
    clean_name,
    gather_tensors,
    load_trainable,
    raise_on_mismatch,
    remove_path,
    replace_path,
    require_complete,
    trainable_parameters,
    trainable_state_dict,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Entries of a checkpoint that hold one tensor per trainable parameter; the second one is the averaging callback's.
TENSOR_ENTRIES = ("state_dict", "ema_state_dict")


def shard_module(
    module: nn.Module,
    mesh: DeviceMesh,
    block_types: Sequence[str],
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    forward_methods: Sequence[str] = (),
) -> nn.Module:
    """Apply FSDP2's `fully_shard` in place: one unit per transformer block, one for all that is left over.

    Parameters are gathered when the module's `forward` runs, so this is called once for each module that the training
    step calls, not for the LightningModule. Frozen and trainable parameters may share a unit. Parameter names stay.

    Args:
        module: a network whose parameters lie on a real device.
        mesh: the LightningModule's `device_mesh`: 1-D shards, 2-D (replicate, shard) is hybrid sharding.
        block_types: class names of the blocks, subclasses included; empty for a small module that is one unit.
        param_dtype: what parameters are gathered in, e.g. bfloat16 together with `precision="bf16-mixed"`. Inputs are
            left to autocast, so that time steps and rotary angles stay in fp32.
        reduce_dtype: what gradients are averaged in.
        forward_methods: names of further methods that use the parameters, such as `encode`.

    Raises:
        ValueError: no block of that name, or a method that does not exist.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    # Children come after their parents in modules(), and fully_shard wants them first.
    for unit in [*reversed(_find_blocks(module, block_types)), module]:
        # Resharded also at the root, so that between steps module.parameters() are the sharded ones.
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in forward_methods:
        if not hasattr(module, method):
            raise ValueError(f"{type(module).__name__} has no method {method!r}; name one that runs its parameters.")
        register_fsdp_forward_method(module, method)
    return module


class TrainableModelParallelStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoints hold trainable parameters only, for a LightningModule that calls `shard_module`.

    A sharded checkpoint is a folder, complete when its last file `complete.json` is there, and can be resumed with any
    number of processes. A full checkpoint is one file that every other strategy reads, and theirs load here. A folder
    is PyTorch's distributed checkpoint, which unpickles: resume only from folders that you wrote.

    Args:
        replicate_size: number of groups that each hold a whole copy of the model (hybrid sharding); must divide the
            number of processes. 1 shards over all of them.
        save_distributed_checkpoint: True writes a folder with one file per process, False gathers one file.
        kwargs: `process_group_backend` and `timeout` of `ModelParallelStrategy`.
    """

    def __init__(self, replicate_size: int = 1, save_distributed_checkpoint: bool = True, **kwargs: Any) -> None:
        if replicate_size < 1:
            raise ValueError(f"replicate_size is {replicate_size}, but must be at least 1 (1: no replicas).")
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )
        self.replicate_size = replicate_size

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @override
    def setup_environment(self) -> None:
        num_processes = self.num_nodes * self.num_processes
        if num_processes % self.replicate_size:
            raise ValueError(
                f"replicate_size={self.replicate_size} does not divide the {num_processes} processes of this run "
                f"({self.num_nodes} nodes x {self.num_processes} devices); choose a divisor of {num_processes}."
            )
        self._data_parallel_size = num_processes
        super().setup_environment()
        self._device_mesh = self.lightning_module._device_mesh = self._data_mesh()

    def _data_mesh(self) -> DeviceMesh:
        if self.replicate_size == 1:
            return self.device_mesh["data_parallel"]
        shape = (self.replicate_size, self.world_size // self.replicate_size)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        whole = [name for name, param in trainable_parameters(self.model).items() if not isinstance(param, DTensor)]
        if whole:
            raise ValueError(
                f"{len(whole)} trainable parameters are not sharded, so their gradients would not be averaged, "
                f"e.g. {whole[0]}. Call shard_module on their module in configure_model."
            )
        super().setup(trainer)

    @override
    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        return trainable_state_dict(self.model)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        # Keyed by parameter name, also in a full file: Optimizer.load_state_dict goes by order, whatever the keys.
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        return get_optimizer_state_dict(self.model, optimizer, options=options)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options need a CheckpointIO plugin, which sharded models do not use.")
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            self._save_folder(checkpoint, path)
        else:
            self._save_file(checkpoint, path)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        require_complete(path)
        return self._load_folder(path, weights_only) if path.is_dir() else self._load_file(path, weights_only)

    def _save_file(self, checkpoint: dict[str, Any], path: Path) -> None:
        for entry in TENSOR_ENTRIES:
            if entry in checkpoint:
                checkpoint[entry] = gather_tensors(checkpoint[entry])
        if self.is_global_zero:
            if path.is_dir():
                remove_path(path)
            self.checkpoint_io.save_checkpoint(checkpoint, path)

    def _save_folder(self, checkpoint: dict[str, Any], path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        if self.is_global_zero:
            remove_path(partial)
            partial.mkdir(parents=True)
        self.barrier()
        sharded = {entry: checkpoint.pop(entry) for entry in TENSOR_ENTRIES if entry in checkpoint}
        sharded |= {f"optimizer_{index}": state for index, state in enumerate(checkpoint.pop("optimizer_states", []))}
        dcp.save(sharded, checkpoint_id=partial)
        if self.is_global_zero:
            torch.save(checkpoint, partial / METADATA_FILE)
            summary = {"global_step": checkpoint.get("global_step"), "world_size": self.world_size}
            (partial / COMPLETE_FILE).write_text(json.dumps(summary) + "\n")
            replace_path(partial, path)
        self.barrier()

    def _load_folder(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        weights = trainable_state_dict(self.model)
        _check_stored(stored, weights)
        self._require_optimizer(any(key.startswith("optimizer_0.") for key in stored), path)
        has_average = any(key.startswith("ema_state_dict.") for key in stored)
        average = {name: torch.empty_like(tensor) for name, tensor in weights.items()} if has_average else {}
        # DTensors are filled in place, so this loads the module itself.
        dcp.load({"state_dict": weights, "ema_state_dict": average}, checkpoint_id=path)
        for index, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{index}": get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{index}"])
        checkpoint = torch.load(path / METADATA_FILE, map_location="cpu", weights_only=weights_only)
        return checkpoint | ({"ema_state_dict": average} if average else {})

    def _require_optimizer(self, found: bool, path: Path) -> None:
        if self.optimizers and not found:
            raise ValueError(
                f"{path} holds weights only: without the optimizer's state training cannot resume from it."
            )

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        load_trainable(self.model, checkpoint.pop("state_dict"))
        self._require_optimizer("optimizer_states" in checkpoint, path)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", []), strict=False):
            named = _ids_to_names(state, optimizer, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=StateDictOptions(full_state_dict=True))
        return checkpoint


def _find_blocks(module: nn.Module, block_types: Sequence[str]) -> list[nn.Module]:
    blocks = []
    for block_type in block_types:
        found = [m for m in module.modules() if m is not module and block_type in (c.__name__ for c in type(m).__mro__)]
        if not found:
            raise ValueError(f"{type(module).__name__} contains no {block_type!r}; name a class of its blocks.")
        blocks += found
    chosen = set(blocks)
    return [m for m in module.modules() if m in chosen]


def _check_stored(stored: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    found = {key.removeprefix("state_dict."): value for key, value in stored.items() if key.startswith("state_dict.")}
    shapes = [
        f"{name} {tuple(found[name].size)} instead of {tuple(tensor.shape)}"
        for name, tensor in weights.items()
        if name in found and found[name].size != tensor.shape
    ]
    raise_on_mismatch(weights.keys() - found.keys(), found.keys() - weights.keys(), shapes)


def _ids_to_names(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Key a stored optimizer state by this run's parameter names: both list their parameters in the same order."""
    name_of = {param: clean_name(name) for name, param in module.named_parameters()}
    names = [name_of[param] for group in optimizer.param_groups for param in group["params"]]
    ids = [index for group in state["param_groups"] for index in group["params"]]
    if len(ids) != len(names):
        raise ValueError(
            f"The checkpoint's optimizer has {len(ids)} parameters, this run's {len(names)}: it trained something else."
        )
    name_of_id = dict(zip(ids, names, strict=True))
    groups = [group | {"params": [name_of_id[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {name_of_id[index]: value for index, value in state["state"].items()}, "param_groups": groups}

"""A frozen stack with trained adapters, the smallest thing that trains like the real model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mm_lightning.checkpoint import check_checkpoint, filter_checkpoint
from mm_lightning.strategy import shard_module

DIM = 8
GLOBAL_BATCH = 4
TRAINABLE = {
    f"net.blocks.{block}.adapter.{name}" for block in range(3) for name in ("down.weight", "up.weight", "up.bias")
} | {"head.weight"}


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(DIM, 3, bias=False)
        self.up = nn.Linear(3, DIM)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.up(self.down(hidden_states).tanh())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(DIM, DIM).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(1))
        self.adapter = Adapter()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.base(hidden_states).relu() + self.adapter(hidden_states)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.inner(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class ToyModule(LightningModule):
    """`poison(step, rank)` says where the loss is NaN; batches are a function of the step, split over the ranks."""

    def __init__(self, poison: Callable[[int, int], bool] = lambda step, rank: False) -> None:
        super().__init__()
        self.strict_loading = False
        self.poison = poison
        self.losses: list[float] = []
        torch.manual_seed(0)
        self.net, self.head = Net(), nn.Linear(DIM, 1, bias=False)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_module(self.net, self.device_mesh, ["Block"])
            shard_module(self.head, self.device_mesh, [])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # The order in which a DistributedSampler deals out the samples.
        hidden_states = global_batch(batch_idx)[self.global_rank :: self.trainer.world_size]
        loss = (self.head(self.net(hidden_states)) - hidden_states.mean(-1, keepdim=True)).square().mean()
        self.losses.append(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean").item())
        return loss * float("nan") if self.poison(batch_idx, self.global_rank) else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        filter_checkpoint(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self)


def global_batch(index: int) -> Tensor:
    return torch.randn(GLOBAL_BATCH, DIM, generator=torch.Generator().manual_seed(index))


def make_trainer(folder: Path, max_steps: int, callbacks: Sequence[Callback] = (), **kwargs: Any) -> Trainer:
    defaults = {"strategy": "auto", "devices": 1, "logger": False, "gradient_clip_val": 1.0}
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=any(type(callback).__name__ == "ModelCheckpoint" for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **defaults | kwargs,
    )


class Indices(torch.utils.data.Dataset):
    """Placeholders: the module makes batch k from its number, so that a resumed run sees the right one."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        return index


def loader() -> DataLoader:
    return DataLoader(Indices(), batch_size=1)


class PlainRun(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]


def plain_run(steps: Sequence[int], decay: float = 0.5) -> PlainRun:
    """The same training in bare PyTorch: one process, only the given batches, averages from their definition."""
    model = ToyModule()
    params = {name: param for name, param in model.named_parameters() if name in TRAINABLE}
    optimizer = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=0.1)
    losses, averages = [], {}
    for step in steps:
        inputs = global_batch(step)
        loss = (model.head(model.net(inputs)) - inputs.mean(-1, keepdim=True)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        weights = {name: param.detach().clone() for name, param in params.items()}
        averages = {n: decay * averages.get(n, w) + (1 - decay) * w for n, w in weights.items()}
    return PlainRun(losses, weights, averages)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")

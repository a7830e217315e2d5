"""Pictures from the workers to the process that trains, through memory that is used again and again.

PyTorch makes a new shared file for each tensor of each batch. Its pages have to be handed out and cleared every time,
which for a batch of decoded jpegs can cost a tenth of the decoding. Here each worker of an iteration has some slots of
one shared map; the receiving process copies a batch out of its slot, which is then free.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

MAX_SLOT_BYTES = 32_000_000  # beyond that, the copy itself needs pages anew
SLOTS_PER_WORKER = 3  # two that wait, as DataLoader prefetches, and one that is being filled

_numbers = itertools.count()
_open: WeakValueDictionary[int, Slots] = WeakValueDictionary()


class Slots:
    """The slots of all workers of one iteration.

    Args:
        num_workers: of the iteration.
        num_bytes: of a slot.
    """

    def __init__(self, num_workers: int, num_bytes: int) -> None:
        self.number, self.num_bytes = next(_numbers), num_bytes
        num_slots = num_workers * SLOTS_PER_WORKER
        self.memory, self.busy = mmap.mmap(-1, num_slots * num_bytes), mmap.mmap(-1, num_slots)
        _open[self.number] = self

    def view(self, slot: int, offset: int, num_bytes: int) -> Tensor:
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=num_bytes, offset=slot * self.num_bytes + offset)

    def put(self, batch: Any) -> Any:
        """Within a worker: a named tuple whose byte tensors (B, N, 3, H, W), channels last, lie in a slot.

        Where all slots are busy or too small, the batch itself, which then travels as PyTorch sends it.
        """
        tensors = {name: value for name, value in zip(batch._fields, batch, strict=True) if _fits(value)}
        slot = self._free_slot(get_worker_info().id)
        if not tensors or slot is None or sum(value.numel() for value in tensors.values()) > self.num_bytes:
            return batch
        self.busy[slot] = 1
        parked, offset = {}, 0
        for i, (name, value) in enumerate(tensors.items()):
            rows = value.permute(0, 1, 3, 4, 2)
            self.view(slot, offset, value.numel()).view(rows.shape).copy_(rows)
            parked[name] = Parked(self.number, slot, offset, tuple(rows.shape), last=i == len(tensors) - 1)
            offset += value.numel()
        return batch._replace(**parked)

    def _free_slot(self, worker: int) -> int | None:
        own = range(worker * SLOTS_PER_WORKER, (worker + 1) * SLOTS_PER_WORKER)
        return next((slot for slot in own if not self.busy[slot]), None)


class Parked:
    """What is sent in place of a tensor; becomes the tensor where it is received."""

    def __init__(self, number: int, slot: int, offset: int, shape: tuple[int, ...], last: bool) -> None:
        self.arguments = (number, slot, offset, shape, last)

    def __reduce__(self) -> tuple:
        return take, self.arguments


def take(number: int, slot: int, offset: int, shape: tuple[int, ...], last: bool) -> Tensor:
    """Copies a tensor out of its slot; the last of a batch frees it."""
    slots = _open[number]
    rows = slots.view(slot, offset, torch.Size(shape).numel()).view(shape).clone()
    if last:
        slots.busy[slot] = 0
    return rows.permute(0, 1, 4, 2, 3)


def _fits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 5


class SlotLoader(DataLoader):
    """A DataLoader whose workers have slots, made anew with each iteration.

    Args:
        slot_bytes: what a batch needs; 0 for no slots. They are not used either where workers are not forked.
    """

    def __init__(self, dataset: Any, *args: Any, slot_bytes: int = 0, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.slot_bytes = slot_bytes

    def __iter__(self) -> Iterator[Any]:
        forked = torch.multiprocessing.get_start_method() == "fork"
        if not self.num_workers or not forked or not 0 < self.slot_bytes <= MAX_SLOT_BYTES:
            return super().__iter__()
        slots = self.dataset.slots = Slots(self.num_workers, self.slot_bytes)
        try:
            iterator = super().__iter__()
        finally:
            self.dataset.slots = None
        iterator.slots = slots  # as long as its workers send
        return iterator

"""Batches from the workers to the process that trains: pictures through memory that is used again and again, small
tensors within the message.

PyTorch makes a new shared file for each tensor of each batch. Its pages have to be handed out and cleared every time,
which for a batch of decoded jpegs can cost a tenth of the decoding, and both processes have to pass the file on, which
for a few boxes costs more than the boxes. Here each worker of an iteration has some slots of one shared map and stacks
the pictures of a batch there. The receiving process sees the same memory: nothing is copied, and when the last tensor
that looks at a slot is gone, the slot is free. Who keeps many batches gets their pictures as PyTorch sends them.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

MAX_SLOT_BYTES = 64_000_000  # a clip of 49 frames of 720x480; of what is larger, five would be too much to hold
MAX_INLINE_BYTES = 16_384  # with the other tensors of a batch less than the 64 KiB that a pipe takes at once
SLOTS_PER_WORKER = 5  # two that wait, as DataLoader prefetches, one that is being filled, two in use

_numbers = itertools.count()
_open: WeakValueDictionary[int, Slots] = WeakValueDictionary()
_in_use: WeakValueDictionary[tuple[int, int], np.ndarray] = WeakValueDictionary()  # the memory of slots


class Slots:
    """The slots of all workers of one iteration.

    Args:
        num_workers: of the iteration; 0 where the process reads by itself.
        num_bytes: of a slot.
    """

    def __init__(self, num_workers: int, num_bytes: int) -> None:
        self.number, self.num_bytes = next(_numbers), num_bytes
        num_slots = max(num_workers, 1) * SLOTS_PER_WORKER
        self.memory, self.busy = mmap.mmap(-1, num_slots * num_bytes), mmap.mmap(-1, num_slots)
        _open[self.number] = self

    def view(self, slot: int) -> np.ndarray:
        """(num_bytes,) uint8"""
        return np.frombuffer(self.memory, np.uint8, self.num_bytes, slot * self.num_bytes)

    def free(self, slot: int) -> None:
        self.busy[slot] = 0

    def free_slot(self) -> Slot | None:
        """One of the worker's own, None where all are busy."""
        worker = get_worker_info()
        first = worker.id * SLOTS_PER_WORKER if worker else 0
        free = (number for number in range(first, first + SLOTS_PER_WORKER) if not self.busy[number])
        return next((Slot(self, number) for number in free), None)


class Slot:
    """Memory for the tensors of one batch."""

    def __init__(self, slots: Slots, number: int) -> None:
        self.slots, self.number, self.num_bytes = slots, number, 0
        self.memory = slots.view(number)
        self.given: dict[int, tuple[int, tuple[int, ...]]] = {}  # address -> offset and shape

    def empty(self, shape: tuple[int, ...]) -> Tensor | None:
        """An uint8 tensor to be filled, None where there is no room for it."""
        offset, num_bytes = self.num_bytes, math.prod(shape)
        if offset + num_bytes > self.slots.num_bytes:
            return None
        tensor = torch.from_numpy(self.memory[offset : offset + num_bytes]).view(shape)
        self.given[tensor.data_ptr()] = (offset, shape)
        self.num_bytes += num_bytes
        return tensor

    def park(self, batch: Any) -> Any:
        """A named tuple whose tensors (B, F, 3, H, W) may be given rows (B, F, H, W, 3): within a worker these become
        `Parked`, elsewhere what a receiver makes of them."""
        found = {
            name: self.given.get(value.data_ptr()) for name, value in batch._asdict().items() if _is_picture(value)
        }
        parked = {name: Parked(self.slots.number, self.number, *place) for name, place in found.items() if place}
        if parked:
            self.slots.busy[self.number] = 1
        if get_worker_info() is None:
            parked = {name: take(*value.arguments) for name, value in parked.items()}
        return batch._replace(**parked)


class Parked:
    """What is sent in place of a tensor; becomes the tensor where it is received."""

    def __init__(self, number: int, slot: int, offset: int, shape: tuple[int, ...]) -> None:
        self.arguments = (number, slot, offset, shape)

    def __reduce__(self) -> tuple:
        return take, self.arguments


def take(number: int, slot: int, offset: int, shape: tuple[int, ...]) -> Tensor:
    """A tensor that looks into a slot; the slot is free when no tensor does."""
    memory = _in_use.get((number, slot))
    if memory is None:
        slots = _open[number]
        memory = _in_use[number, slot] = slots.view(slot)
        finalize(memory, slots.free, slot).atexit = False
    rows = torch.from_numpy(memory[offset : offset + math.prod(shape)]).view(shape)
    return rows.permute(0, 1, 4, 2, 3)


class Inline:
    """What is sent in place of a small tensor: its numbers. Becomes the tensor where it is received."""

    def __init__(self, tensor: Tensor) -> None:
        self.array = tensor.numpy()

    def __reduce__(self) -> tuple:
        return torch.from_numpy, (self.array,)


def inline(batch: Any) -> Any:
    """A named tuple, of tensors and named tuples among others, whose small tensors become `Inline`."""
    if isinstance(batch, Tensor):
        small = batch.nbytes <= MAX_INLINE_BYTES and batch.dtype != torch.bfloat16  # numpy has no such type
        return Inline(batch) if small else batch
    return type(batch)(*map(inline, batch)) if hasattr(batch, "_fields") else batch


def _is_picture(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 5


class SlotLoader(DataLoader):
    """A DataLoader with slots, made anew with each iteration.

    Args:
        slot_bytes: what a batch needs; 0 for no slots. They are not used either where workers are not forked.
    """

    def __init__(self, dataset: Any, *args: Any, slot_bytes: int = 0, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.slot_bytes = slot_bytes

    def __iter__(self) -> Iterator[Any]:
        shared = not self.num_workers or torch.multiprocessing.get_start_method() == "fork"
        if not shared or not 0 < self.slot_bytes <= MAX_SLOT_BYTES:
            return super().__iter__()
        slots = self.dataset.slots = Slots(self.num_workers, self.slot_bytes)
        try:
            iterator = super().__iter__()
        finally:
            self.dataset.slots = None
        iterator.slots = slots  # as long as its workers send
        return iterator

"""The people of the miniature in memory, and batches of them that follow from (seed, step) alone.

Letters: N items, B batch, F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from mm_lightning.miniature.layout import StoredSample, decode_clip, decode_still, read_samples, set_digest
from mm_lightning.miniature.packing import check_people, require_people

MODES = ("stills", "clips", "mixed")
ENDLESS = 10**9


class Words(NamedTuple):
    """What is said of an item; everything but the caption is empty where the shards do not tell it."""

    caption: str
    rich_caption: str = ""
    class_word: str = ""
    actions: tuple[str, ...] = ()
    background: str = ""
    light: str = ""


class Items(NamedTuple):
    """Stills (F = 1) or clips. Coordinates are pixels, (0, 0) the centre of the first one."""

    keys: list[str]
    pixels: Tensor  # (N, F, 3, H, W) uint8
    boxes: Tensor  # (N, F, 4) x0 y0 x1 y1; zero where a frame shows no face
    landmarks: Tensor  # (N, F, 5, 2); zero where a frame shows no face
    person: Tensor  # (N,) int64, index into `PeopleTensors.people`
    words: list[Words]


class PeopleTensors(NamedTuple):
    """All of a split."""

    people: list[str]  # identity ids, sorted
    stills: Items
    clips: Items


class MiniatureBatch(NamedTuple):
    """Collated items."""

    keys: list[str]
    pixels: Tensor  # (B, F, 3, H, W) in [-1, 1]
    boxes: Tensor  # (B, F, 4)
    landmarks: Tensor  # (B, F, 5, 2)
    person: Tensor  # (B,) int64
    words: list[Words]


# Shards -> tensors ----------------------------------------------------------------------------------------------------


def load_split(people_root: str | Path, split: str, max_people: int | None = None) -> PeopleTensors:
    """Read the shards of a split, stills and clips, of all people or of the first `max_people`; kept in memory.

    Raises:
        FileNotFoundError: no finished shards of this split lie there.
        ValueError: it holds no still or no clip, or its items are of several sizes.
    """
    folder = Path(people_root, split)
    return _load_split(folder, max_people, set_digest(folder / "images"), set_digest(folder / "videos"))


@lru_cache(maxsize=2)
def _load_split(folder: Path, max_people: int | None, *digests: str) -> PeopleTensors:
    stills = read_items(folder / "images", max_people)
    clips = read_items(folder / "videos", max_people)
    people = sorted({meta["identity"] for _, meta, _ in [*stills, *clips]})
    number = {name: i for i, name in enumerate(people)}
    return PeopleTensors(people, stack(stills, number, folder / "images"), stack(clips, number, folder / "videos"))


class RawItem(NamedTuple):
    """A decoded sample."""

    sample: StoredSample
    meta: dict[str, Any]
    frames: np.ndarray  # (F, H, W, 3) uint8


def read_items(folder: Path, max_people: int | None) -> list[RawItem]:
    """Samples in stored order, which is by person; stops after `max_people`."""
    items: list[RawItem] = []
    people: set[str] = set()
    for sample in tqdm(read_samples(folder), desc=f"reading {folder}", unit="sample", leave=False):
        meta = sample.meta
        people.add(meta["identity"])
        if max_people is not None and len(people) > max_people:
            break
        items.append(RawItem(sample, meta, decode(sample)))
    return items


def decode(sample: StoredSample) -> np.ndarray:
    """-> (F, H, W, 3)."""
    if "mp4" in sample.fields:
        return decode_clip(sample.fields["mp4"])
    return decode_still(sample.fields["jpg"])[None]


def stack(items: list[RawItem], number: Mapping[str, int], folder: Path) -> Items:
    """
    Raises:
        ValueError: nothing to stack, or items of several sizes.
    """
    sizes = sorted({item.frames.shape[:3] for item in items})
    if len(sizes) != 1:
        found = f"sizes (frames, height, width) {sizes}" if sizes else "no sample"
        raise ValueError(f"{folder} holds {found}; wanted are samples of one size: render the people again.")
    faces = [[read_face(face) for face in item.meta["faces"]] for item in items]
    return Items(
        keys=[item.sample.key for item in items],
        pixels=torch.from_numpy(np.stack([item.frames for item in items])).permute(0, 1, 4, 2, 3).contiguous(),
        boxes=torch.tensor([[face.box for face in clip] for clip in faces]),
        landmarks=torch.tensor([[face.landmarks for face in clip] for clip in faces]),
        person=torch.tensor([number[item.meta["identity"]] for item in items]),
        words=[read_words(item.sample, item.meta) for item in items],
    )


class Face(NamedTuple):
    """A face in pixels of its frame."""

    box: list[float]
    landmarks: list[list[float]]


def read_face(face: Mapping[str, Any] | None) -> Face:
    if not face:
        return Face([0.0] * 4, [[0.0, 0.0]] * 5)
    return Face([float(v) for v in face["box"]], [[float(x), float(y)] for x, y in face["landmarks"]])


def read_words(sample: StoredSample, meta: Mapping[str, Any]) -> Words:
    caption = sample.fields["txt"].decode().strip()
    told = meta.get("miniature", {})
    return Words(
        caption=caption,
        rich_caption=told.get("rich_caption", caption),
        class_word=told.get("class_word", ""),
        actions=tuple(told.get("action", ())),
        background=told.get("background", ""),
        light=told.get("light", ""),
    )


# Items -> batches -----------------------------------------------------------------------------------------------------


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def collate(items: Items, rows: Tensor, frames: slice = slice(None)) -> MiniatureBatch:
    """Those rows, and of each the same frames."""
    numbers = rows.tolist()
    return MiniatureBatch(
        keys=[items.keys[i] for i in numbers],
        pixels=to_float(items.pixels[rows, frames]),
        boxes=items.boxes[rows, frames],
        landmarks=items.landmarks[rows, frames],
        person=items.person[rows],
        words=[items.words[i] for i in numbers],
    )


def mirror(batch: MiniatureBatch, flip: Tensor) -> MiniatureBatch:
    """Mirror the samples where `flip` (B,) is True, with boxes and landmarks; what is said of light stays as it was."""
    last = batch.pixels.shape[-1] - 1
    boxes, landmarks = batch.boxes.clone(), batch.landmarks.clone()
    boxes[..., [0, 2]] = last - boxes[..., [2, 0]]
    landmarks = landmarks[..., [1, 0, 2, 4, 3], :]  # left and right eye and mouth corner change places
    landmarks[..., 0] = last - landmarks[..., 0]
    seen = (batch.boxes != 0).any(-1, keepdim=True)
    return batch._replace(
        pixels=torch.where(flip[:, None, None, None, None], batch.pixels.flip(-1), batch.pixels),
        boxes=torch.where(flip[:, None, None] & seen, boxes, batch.boxes),
        landmarks=torch.where((flip[:, None, None] & seen)[..., None], landmarks, batch.landmarks),
    )


@lru_cache(maxsize=8)
def shuffled(num_items: int, seed: int, epoch: int) -> Tensor:
    """The order of a pass over the items."""
    generator = torch.Generator().manual_seed(seed_of(seed, num_items, epoch))
    return torch.randperm(num_items, generator=generator)


def seed_of(*numbers: int) -> int:
    """One seed for several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def rows_of(first: int, count: int, num_items: int, seed: int) -> Tensor:
    """Items number `first` to `first + count` of endless passes, each in an order of its own."""
    places = torch.arange(first, first + count)
    return torch.stack([shuffled(num_items, seed, int(p) // num_items)[int(p) % num_items] for p in places])


class Turn(NamedTuple):
    """What a step shows, and how many steps before it showed the same kind."""

    is_clips: bool
    number: int


def turn_of(step: int, mode: str, clip_every: int, first_clip: int) -> Turn:
    """Mixed: stills, and from `first_clip` on every `clip_every`-th step clips."""
    if mode != "mixed":
        return Turn(mode == "clips", step)
    since = step - first_clip
    num_clips = max(0, -(-since // clip_every))
    is_clips = since >= 0 and since % clip_every == 0
    return Turn(is_clips, num_clips if is_clips else step - num_clips)


class TrainBatches(Dataset):
    """Batch number `step` of a run, for any step; see `MiniatureDataModule`.

    Args:
        rank, world_size: of how many processes this one is which; each sees its own part of the same order.
    """

    def __init__(
        self,
        people: PeopleTensors,
        batch_size: int,
        mode: str,
        clip_batch_size: int,
        clip_lengths: Sequence[int],
        clip_every: int,
        first_clip: int,
        flip_probability: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.people, self.mode = people, mode
        self.batch_size, self.clip_batch_size = batch_size, clip_batch_size
        self.clip_lengths, self.clip_every, self.first_clip = tuple(clip_lengths), clip_every, first_clip
        self.flip_probability, self.seed = flip_probability, seed
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> MiniatureBatch:
        turn = turn_of(step, self.mode, self.clip_every, self.first_clip)
        generator = torch.Generator().manual_seed(seed_of(self.seed, step, self.rank, 1))
        items, size = self.people.stills, self.batch_size
        frames = slice(None)
        if turn.is_clips:
            items, size = self.people.clips, self.clip_batch_size
            frames = self.window(turn.number, items.pixels.shape[1], generator)
        first = (turn.number * self.world_size + self.rank) * size
        batch = collate(items, rows_of(first, size, len(items.keys), self.seed), frames)
        return mirror(batch, torch.rand(size, generator=generator) < self.flip_probability)

    def window(self, number: int, num_frames: int, generator: torch.Generator) -> slice:
        """The frames of clip batch `number`: lengths take turns, where they start is drawn."""
        length = self.clip_lengths[number % len(self.clip_lengths)]
        start = int(torch.randint(num_frames - length + 1, (), generator=generator))
        return slice(start, start + length)


class Batches(Dataset):
    """Items in stored order, in batches."""

    def __init__(self, items: Items, batch_size: int) -> None:
        self.items, self.batch_size = items, batch_size

    def __len__(self) -> int:
        return -(-len(self.items.keys) // self.batch_size)

    def __getitem__(self, index: int) -> MiniatureBatch:
        if index >= len(self):
            raise IndexError(index)
        rows = torch.arange(len(self.items.keys))[index * self.batch_size :][: self.batch_size]
        return collate(self.items, rows)


class Steps(Sampler[int]):
    """Numbers from `start` to `stop`; its length counts from 0, as Lightning does for a resumed run."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop


# Lightning ------------------------------------------------------------------------------------------------------------


class MiniatureDataModule(L.LightningDataModule):
    """Batches of rendered people for pre-training. Batch i of a run follows from (seed, i): a resumed run goes on.

    Where `people` holds none, those that come with the package are unpacked there first.

    Args:
        people: folder of the shards; `train` and `validation` are read.
        batch_size: stills of a batch, per device.
        mode: "stills", "clips" or "mixed".
        clip_batch_size: clips of a batch, per device.
        clip_lengths: frames of clip batches, taking turns: 1, or 4k+1 with an even k, as the VAE decodes no others.
        clip_every: in mixed mode every so many batches is one of clips,
        first_clip: from this batch on.
        flip_probability: of mirroring a training sample.
        max_people: of the training split; None takes all.
        num_val_stills, num_val_clips: of the validation split, the first ones.
        seed: of order, windows and mirroring.

    Raises:
        ValueError: a number or a mode that cannot be.
    """

    def __init__(
        self,
        people: str,
        batch_size: int,
        mode: str = "stills",
        clip_batch_size: int = 8,
        clip_lengths: Sequence[int] = (17,),
        clip_every: int = 4,
        first_clip: int = 0,
        flip_probability: float = 0.0,
        max_people: int | None = None,
        num_val_stills: int = 128,
        num_val_clips: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_people(people)
        self.people, self.max_people = Path(people), max_people
        self.batch_size, self.clip_batch_size = batch_size, clip_batch_size
        self.num_val_stills, self.num_val_clips = num_val_stills, num_val_clips
        self.options = {
            "mode": mode,
            "clip_lengths": tuple(clip_lengths),
            "clip_every": clip_every,
            "first_clip": first_clip,
            "flip_probability": flip_probability,
            "seed": seed,
        }
        self.check_values(mode, max_people)
        self.train_people: PeopleTensors | None = None

    def check_values(self, mode: str, max_people: int | None) -> None:
        if mode not in MODES:
            raise ValueError(f"data.mode={mode}: give one of {', '.join(MODES)}.")
        counts = {name: getattr(self, name) for name in ("batch_size", "clip_batch_size")}
        counts |= {"clip_every": self.options["clip_every"], "max_people": 1 if max_people is None else max_people}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"data.{name}={value}: give a number from 1.")
        if not 0 <= self.options["flip_probability"] <= 1:
            raise ValueError(f"data.flip_probability={self.options['flip_probability']}: give a number from 0 to 1.")
        wrong = [length for length in self.options["clip_lengths"] if length < 1 or length % 8 != 1]
        if wrong or not self.options["clip_lengths"]:
            raise ValueError(
                f"data.clip_lengths={list(self.options['clip_lengths'])}: give lengths such as 1, 9 or 17."
            )

    def prepare_data(self) -> None:
        require_people(self.people)

    def setup(self, stage: str | None = None) -> None:
        if self.train_people is not None:
            return
        self.train_people = load_split(self.people, "train", self.max_people)
        self.validation_people = load_split(self.people, "validation")
        available, longest = self.train_people.clips.pixels.shape[1], max(self.options["clip_lengths"])
        if self.options["mode"] != "stills" and longest > available:
            raise ValueError(
                f"data.clip_lengths asks for {longest} frames; the clips in {self.people} have {available}."
            )

    def train_batches(self) -> TrainBatches:
        """What the training loader reads, by step."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return TrainBatches(
            self.train_people,
            self.batch_size,
            clip_batch_size=self.clip_batch_size,
            rank=rank,
            world_size=world_size,
            **self.options,
        )

    def train_dataloader(self) -> DataLoader:
        start, stop = 0, ENDLESS
        if self.trainer:
            start = self.trainer.global_step * self.trainer.accumulate_grad_batches
            stop = self.trainer.max_steps * self.trainer.accumulate_grad_batches if self.trainer.max_steps > 0 else stop
        return DataLoader(self.train_batches(), batch_size=None, sampler=Steps(start, stop))

    def val_dataloader(self) -> list[DataLoader]:
        """Stills, then clips."""
        stills = first_items(self.validation_people.stills, self.num_val_stills)
        clips = first_items(self.validation_people.clips, self.num_val_clips)
        sets = (Batches(stills, self.batch_size), Batches(clips, self.clip_batch_size))
        return [DataLoader(dataset, batch_size=None, shuffle=False) for dataset in sets]


def first_items(items: Items, count: int) -> Items:
    return Items(*(field[:count] for field in items))

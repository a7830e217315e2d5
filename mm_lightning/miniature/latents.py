"""What the frozen VAE and T5 say of the miniature's people: encoded once, kept on disk, dealt out in batches.

Letters: N items, B batch, U different prompts, F frames, F' latent frames, C latent channels, H W pixels,
h w latent pixels, T text tokens, D_txt width of T5.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import T5EncoderModel, T5Tokenizer

from mm_lightning.backbone import Backbone, read_json
from mm_lightning.checkpoint import replace_path
from mm_lightning.devices import find_device
from mm_lightning.encoders.text import IdentityTokenizer, TextEncoder
from mm_lightning.fewer_operations import fewer_operations
from mm_lightning.miniature.data import (
    ENDLESS,
    Items,
    Steps,
    load_split,
    rows_of,
    seed_of,
    to_float,
    turn_of,
)
from mm_lightning.miniature.layout import KINDS, set_digest
from mm_lightning.miniature.packing import require_people
from mm_lightning.tiny import build_scheduler

# What the VAE's and the text encoder's own trainings export, in diffusers' layout.
FROZEN_FILES = (
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
)
FRAMES_AT_ONCE = 64
PROMPTS_AT_ONCE = 256
SIDES = {"left": "right", "right": "left"}


class LatentItems(NamedTuple):
    """Stills (F' = 1) or clips; of each item first itself, then its mirror image."""

    keys: list[str]
    moments: Tensor  # (N, 2, F', 2C, h, w) mean and log-variance, unscaled
    prompts: Tensor  # (N, 2, 2) int64, rows of `LatentSplit.prompt_embeds`: the caption, the rich caption


class LatentSplit(NamedTuple):
    """All of a split."""

    stills: LatentItems
    clips: LatentItems
    prompt_embeds: Tensor  # (U, T, D_txt)
    null_embeds: Tensor  # (T, D_txt), of the empty prompt


class LatentBatch(NamedTuple):
    """Collated items."""

    keys: list[str]
    latent_moments: Tensor  # (B, F', 2C, h, w)
    prompt_embeds: Tensor  # (B, T, D_txt)


# Encoding -------------------------------------------------------------------------------------------------------------


def require_frozen(folder: str | Path) -> Path:
    """
    Raises:
        FileNotFoundError: VAE, text encoder or tokenizer are not in `folder`.
    """
    missing = [name for name in FROZEN_FILES if not Path(folder, name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}. Train these parts first: python train.py "
            "experiment=miniature_vae, python train.py experiment=miniature_clip; or name another folder."
        )
    return Path(folder)


def load_frozen(folder: str | Path, transformer_config: Mapping[str, Any]) -> Backbone:
    """VAE and text encoder of `folder` as a `Backbone` without a transformer, in fp32; raises as `require_frozen`."""
    folder = require_frozen(folder)
    return Backbone(
        name=folder.name,
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=CogVideoXDDIMScheduler.from_config(build_scheduler().config),
        transformer_config=dict(transformer_config),
        vae_config=read_json(folder / "vae/config.json"),
        vae=AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32),
        text_encoder=T5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32),
    )


def build_text(backbone: Backbone) -> TextEncoder:
    """As MagicMirror calls it: the class word of a prompt stands twice, the trigger is taken out."""
    tokenizer = IdentityTokenizer(backbone.tokenizer, max_length=backbone.transformer_config.max_text_seq_length)
    return TextEncoder(backbone.text_encoder, tokenizer)


def mirrored(prompt: str) -> str:
    """The caption of the mirror image: left is right."""
    return re.sub(r"\b(left|right)\b", lambda side: SIDES[side.group()], prompt)


@torch.inference_mode()
def encode_pixels(pixels: Tensor, backbone: Backbone, description: str) -> Tensor:
    """(N, F, 3, H, W) uint8 -> moments of each and of its mirror image (N, 2, F', 2C, h, w), on the CPU."""
    moments, size = [], max(1, FRAMES_AT_ONCE // (2 * pixels.shape[1]))
    with fewer_operations(backbone.vae), tqdm(total=len(pixels), desc=description, unit="item") as bar:
        for some in pixels.split(size):
            both = torch.stack([some, some.flip(-1)], dim=1).flatten(0, 1)
            encoded = backbone.encode_video(to_float(both).to(backbone.vae.device)).cpu()
            moments.append(encoded.unflatten(0, (len(some), 2)))
            bar.update(len(some))
    return torch.cat(moments)


def prompts_of(items: Items) -> list[list[list[str]]]:
    """Of each item: caption and rich caption, as it is and mirrored."""
    told = [[words.caption, words.rich_caption] for words in items.words]
    return [[pair, [mirrored(prompt) for prompt in pair]] for pair in told]


@torch.inference_mode()
def encode_prompts(prompts: Sequence[str], text: TextEncoder) -> Tensor:
    """(U, T, D_txt) on the CPU."""
    parts = [prompts[start : start + PROMPTS_AT_ONCE] for start in range(0, len(prompts), PROMPTS_AT_ONCE)]
    return torch.cat([text(list(part)).prompt_embeds.cpu() for part in parts])


def encode_people(stills: Items, clips: Items, backbone: Backbone, description: str) -> LatentSplit:
    """All of a split; every prompt is encoded once."""
    told = {"stills": prompts_of(stills), "clips": prompts_of(clips)}
    prompts = sorted({prompt for item in (*told["stills"], *told["clips"]) for pair in item for prompt in pair})
    row = {prompt: i for i, prompt in enumerate(prompts)}
    text = build_text(backbone)
    parts = {}
    for name, items in (("stills", stills), ("clips", clips)):
        rows = [[[row[prompt] for prompt in pair] for pair in item] for item in told[name]]
        moments = encode_pixels(items.pixels, backbone, f"encoding {description} {name}")
        parts[name] = LatentItems(items.keys, moments, torch.tensor(rows))
    with torch.inference_mode():
        null_embeds = text.encode_plain([""])[0].cpu()
    return LatentSplit(**parts, prompt_embeds=encode_prompts(prompts, text), null_embeds=null_embeds)


# Keeping --------------------------------------------------------------------------------------------------------------


def describe_source(people_root: Path, split: str, max_people: int | None, model: Path, max_length: int) -> str:
    """What latents follow from; JSON with sorted keys, to be compared."""
    source = {
        "people": [set_digest(people_root / split / kind) for kind in KINDS],
        "max_people": max_people,
        "models": [hashlib.sha256((model / name).read_bytes()).hexdigest() for name in FROZEN_FILES],
        "max_text_seq_length": max_length,
    }
    return json.dumps(source, sort_keys=True)


def save_latents(latents: LatentSplit, file: Path, source: str) -> None:
    """In one rename."""
    tensors = {"prompt_embeds": latents.prompt_embeds, "null_embeds": latents.null_embeds}
    keys = {}
    for name in ("stills", "clips"):
        items: LatentItems = getattr(latents, name)
        tensors |= {f"{name}.moments": items.moments, f"{name}.prompts": items.prompts}
        keys[name] = items.keys
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial, {"source": source, "keys": json.dumps(keys)})
    replace_path(partial, file)


def load_latents(file: Path, source: str) -> LatentSplit | None:
    """None where there are none yet, or only those of other people or another model."""
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("source") != source:
            return None
        keys = json.loads(metadata["keys"])
        items = {
            name: LatentItems(keys[name], *(stored.get_tensor(f"{name}.{part}") for part in ("moments", "prompts")))
            for name in ("stills", "clips")
        }
        return LatentSplit(**items, **{name: stored.get_tensor(name) for name in ("prompt_embeds", "null_embeds")})


# Batches --------------------------------------------------------------------------------------------------------------


class TrainLatents(Dataset):
    """Batch number `step` of a run, for any step; see `LatentDataModule`.

    Args:
        rank, world_size: of how many processes this one is which; each sees its own part of the same order.
    """

    def __init__(
        self,
        latents: LatentSplit,
        batch_size: int,
        clip_batch_size: int,
        clip_every: int,
        first_clip: int,
        flip_probability: float,
        rich_probability: float,
        text_drop_rate: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.latents, self.batch_size, self.clip_batch_size = latents, batch_size, clip_batch_size
        self.clip_every, self.first_clip = clip_every, first_clip
        self.flip_probability, self.rich_probability = flip_probability, rich_probability
        self.text_drop_rate, self.seed = text_drop_rate, seed
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> LatentBatch:
        turn = turn_of(step, "mixed", self.clip_every, self.first_clip)
        items, size = (
            (self.latents.clips, self.clip_batch_size) if turn.is_clips else (self.latents.stills, self.batch_size)
        )
        first = (turn.number * self.world_size + self.rank) * size
        rows = rows_of(first, size, len(items.keys), self.seed)
        generator = torch.Generator().manual_seed(seed_of(self.seed, step, self.rank, 2))
        flip, rich, drop = torch.rand(3, size, generator=generator)
        return collate_latents(
            self.latents,
            items,
            rows,
            flip=(flip < self.flip_probability).long(),
            rich=(rich < self.rich_probability).long(),
            drop=drop < self.text_drop_rate,
        )


def collate_latents(
    latents: LatentSplit, items: LatentItems, rows: Tensor, flip: Tensor, rich: Tensor, drop: Tensor
) -> LatentBatch:
    """All (B,): `rows` of `items`, `flip` and `rich` 0 or 1, `drop` True where the empty prompt is told."""
    prompt_embeds = latents.prompt_embeds[items.prompts[rows, flip, rich]]
    return LatentBatch(
        keys=[items.keys[row] for row in rows.tolist()],
        latent_moments=items.moments[rows, flip],
        prompt_embeds=torch.where(drop[:, None, None], latents.null_embeds, prompt_embeds),
    )


class ValidationLatents(Dataset):
    """Items in stored order, as they are, in batches; every second one with its rich caption."""

    def __init__(self, latents: LatentSplit, items: LatentItems, batch_size: int) -> None:
        self.latents, self.items, self.batch_size = latents, items, batch_size

    def __len__(self) -> int:
        return -(-len(self.items.keys) // self.batch_size)

    def __getitem__(self, index: int) -> LatentBatch:
        if index >= len(self):
            raise IndexError(index)
        rows = torch.arange(len(self.items.keys))[index * self.batch_size :][: self.batch_size]
        none = torch.zeros_like(rows)
        return collate_latents(self.latents, self.items, rows, flip=none, rich=rows % 2, drop=none.bool())


class LatentDataModule(L.LightningDataModule):
    """Batches for the backbone's pre-training. Batch i of a run follows from (seed, i): a resumed run goes on.

    Most batches are stills, every `clip_every`-th one clips. The latents are encoded when first needed, and kept in
    `cache`; those of other people or another model are replaced.

    Args:
        people: folder of the shards; `train` and `validation` are read, or unpacked from the package if there are none.
        model: folder with `vae/`, `text_encoder/` and `tokenizer/`.
        cache: folder of the encoded latents.
        max_text_seq_length: T.
        batch_size, clip_batch_size: stills, or clips, of a batch, per device.
        clip_every: every so many batches is one of clips,
        first_clip: from this batch on.
        flip_probability: of mirroring a training sample.
        rich_probability: of telling the rich caption, which says skin, hair and eyes too.
        text_drop_rate: of telling nothing, for guidance.
        max_people: of the training split; None takes all.
        num_val_stills, num_val_clips: of the validation split, the first ones.
        seed: of order, mirroring and captions.

    Raises:
        FileNotFoundError: a part of the model is missing.
        ValueError: a number that cannot be.
    """

    def __init__(
        self,
        people: str,
        model: str,
        cache: str,
        batch_size: int,
        clip_batch_size: int,
        max_text_seq_length: int = 24,
        clip_every: int = 4,
        first_clip: int = 0,
        flip_probability: float = 0.5,
        rich_probability: float = 0.5,
        text_drop_rate: float = 0.1,
        max_people: int | None = None,
        num_val_stills: int = 256,
        num_val_clips: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.people, self.cache, self.max_people = Path(people), Path(cache), max_people
        self.model, self.max_text_seq_length = require_frozen(model), max_text_seq_length
        self.batch_size, self.clip_batch_size = batch_size, clip_batch_size
        self.num_val_stills, self.num_val_clips = num_val_stills, num_val_clips
        self.clip_every, self.first_clip, self.seed = clip_every, first_clip, seed
        self.rates = {
            "flip_probability": flip_probability,
            "rich_probability": rich_probability,
            "text_drop_rate": text_drop_rate,
        }
        self.check_values()
        self.train_latents: LatentSplit | None = None

    def check_values(self) -> None:
        for name in ("batch_size", "clip_batch_size", "clip_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: give a number from 1.")
        for name, rate in self.rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"data.{name}={rate}: give a number from 0 to 1.")

    def prepare_data(self) -> None:
        """Unpacks and encodes; one process of a machine does it."""
        require_people(self.people)
        for split in ("train", "validation"):
            self.encoded(split)

    def setup(self, stage: str | None = None) -> None:
        if self.train_latents is None:
            self.train_latents, self.validation_latents = self.encoded("train"), self.encoded("validation")

    def encoded(self, split: str) -> LatentSplit:
        """From the cache, or from pixels."""
        max_people = self.max_people if split == "train" else None
        source = describe_source(self.people, split, max_people, self.model, self.max_text_seq_length)
        file = self.cache / f"{split}.safetensors"
        latents = load_latents(file, source)
        if latents is None:
            people = load_split(self.people, split, max_people)
            backbone = load_frozen(self.model, {"max_text_seq_length": self.max_text_seq_length})
            backbone.to(find_device())
            latents = encode_people(people.stills, people.clips, backbone, split)
            save_latents(latents, file, source)
        return latents

    def train_batches(self) -> TrainLatents:
        """What the training loader reads, by step."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sizes = {"batch_size": self.batch_size, "clip_batch_size": self.clip_batch_size}
        order = {"clip_every": self.clip_every, "first_clip": self.first_clip, "seed": self.seed}
        return TrainLatents(self.train_latents, **sizes, **order, **self.rates, rank=rank, world_size=world_size)

    def train_dataloader(self) -> DataLoader:
        start, stop = 0, ENDLESS
        if self.trainer:
            start = self.trainer.global_step * self.trainer.accumulate_grad_batches
            stop = self.trainer.max_steps * self.trainer.accumulate_grad_batches if self.trainer.max_steps > 0 else stop
        return DataLoader(self.train_batches(), batch_size=None, sampler=Steps(start, stop))

    def val_dataloader(self) -> list[DataLoader]:
        """Stills, then clips."""
        latents = self.validation_latents
        sets = (
            ValidationLatents(latents, first_latents(latents.stills, self.num_val_stills), self.batch_size),
            ValidationLatents(latents, first_latents(latents.clips, self.num_val_clips), self.clip_batch_size),
        )
        return [DataLoader(dataset, batch_size=None, shuffle=False) for dataset in sets]


def first_latents(items: LatentItems, count: int) -> LatentItems:
    return LatentItems(*(field[:count] for field in items))

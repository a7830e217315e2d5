"""Trains the miniature's text encoder and vision tower together, from scratch, on the train people.

    python train.py experiment=miniature_clip

Three losses: pictures find their captions and captions their pictures (CLIP); pictures of one person find each other
(supervised contrastive, Khosla et al. 2020), through the mean of the dense features, so that these carry identity; and
every state of the text encoder still tells its own word, some words being hidden, as in T5's own training.

Letters: B pictures, H W pixels, T text tokens, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from mm_lightning.backbone import as_dtype
from mm_lightning.checkpoint import require_complete
from mm_lightning.encoders.text import IdentityTokenizer
from mm_lightning.miniature.captions import caption, words_of
from mm_lightning.miniature.data import MiniatureDataModule, PeopleTensors, Words, seed_of, to_float
from mm_lightning.miniature.image_text import ImageTextModel, build_model
from mm_lightning.miniature.judge import WORDS, judge_folder_of, labels_of, top_1
from mm_lightning.miniature.tokenizer import build_tokenizer

PARAPHRASES = 2
WORD_STRIDE = 4  # every so many captions are enough for the word loss
MAX_LOGIT_SCALE = 100.0  # CLIP's
SIDES = {"left", "right"}  # a mirrored picture would belie them


class ContrastiveBatch(NamedTuple):
    """Pictures, each with a caption and a person."""

    pixels: Tensor  # (B, 3, H, W) uint8 RGB
    input_ids: Tensor  # (B, T) int64
    person: Tensor  # (B,) int64
    may_flip: Tensor  # (B,) bool, False where the caption names a side


class LabelledPictures(NamedTuple):
    """Pictures of known content, to test recognition on."""

    pixels: Tensor  # (B, 3, H, W) uint8 RGB
    person: Tensor  # (B,) int64
    labels: dict[str, Tensor]  # as `labels_of`


# Data -----------------------------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """The captions of N items, plain and rich."""

    input_ids: Tensor  # (N, 2, T) int64
    may_flip: Tensor  # (N,) bool


def tokenize_words(words: Sequence[Words]) -> Texts:
    tokenizer = build_tokenizer()
    tokenize = IdentityTokenizer(tokenizer, max_length=tokenizer.model_max_length)
    pairs = [tokenize([said.caption, said.rich_caption]).input_ids for said in words]
    sided = [bool(SIDES.intersection(words_of(f"{said.caption} {said.rich_caption}"))) for said in words]
    return Texts(torch.stack(pairs), ~torch.tensor(sided))


class PeopleBatches(Dataset):
    """Batch number `step` of a run, for any step: several pictures of each of some people.

    A picture is a still or any one frame of a clip, no two frames of one clip.

    Args:
        people_per_batch: all, where there are fewer.
        pictures_per_person: some come twice, where there are fewer.
        seed: of who and what is drawn.
        rank: of the process; each draws for itself.
    """

    def __init__(
        self, people: PeopleTensors, people_per_batch: int, pictures_per_person: int, seed: int, rank: int = 0
    ) -> None:
        self.people, self.seed, self.rank = people, seed, rank
        self.people_per_batch, self.pictures_per_person = people_per_batch, pictures_per_person
        self.texts = tokenize_words([*people.stills.words, *people.clips.words])
        owner = torch.cat([people.stills.person, people.clips.person])
        self.items_of = [(owner == i).nonzero().flatten().numpy() for i in range(len(people.people))]

    def __getitem__(self, step: int) -> ContrastiveBatch:
        rng = np.random.default_rng([self.seed, self.rank, step])
        chosen = rng.permutation(len(self.items_of))[: self.people_per_batch]
        items = torch.from_numpy(np.concatenate([self.draw(self.items_of[i], rng) for i in chosen]))
        kind = torch.from_numpy(rng.integers(2, size=len(items)))
        return ContrastiveBatch(
            pixels=self.pictures(items, rng),
            input_ids=self.texts.input_ids[items, kind],
            person=torch.from_numpy(chosen).repeat_interleave(self.pictures_per_person),
            may_flip=self.texts.may_flip[items],
        )

    def draw(self, items: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        rounds = -(-self.pictures_per_person // len(items))
        return np.concatenate([rng.permutation(items) for _ in range(rounds)])[: self.pictures_per_person]

    def pictures(self, items: Tensor, rng: np.random.Generator) -> Tensor:
        """Stills are numbered first, then clips, of which any frame is taken: (B,) -> (B, 3, H, W)."""
        stills, clips = self.people.stills.pixels, self.people.clips.pixels
        frames = torch.from_numpy(rng.integers(clips.shape[1], size=len(items)))
        of_clip = items >= len(stills)
        pixels = stills[items.clamp(max=len(stills) - 1), 0]
        pixels[of_clip] = clips[items[of_clip] - len(stills), frames[of_clip]]
        return pixels


class ContrastiveDataModule(MiniatureDataModule):
    """Batches of people for `ContrastiveModule`; all stills of the validation people in one batch.

    Args:
        people, max_people, seed: as for `MiniatureDataModule`.
        batch_size: pictures of a batch, per device.
        pictures_per_person: a divisor of it.

    Raises:
        ValueError: numbers that leave nothing to compare.
    """

    def __init__(
        self,
        people: str,
        batch_size: int = 256,
        pictures_per_person: int = 4,
        max_people: int | None = None,
        seed: int = 0,
    ) -> None:
        people_per_batch, rest = divmod(batch_size, max(pictures_per_person, 1))
        if rest or people_per_batch < 2 or pictures_per_person < 2:
            raise ValueError(
                f"data.batch_size={batch_size}, data.pictures_per_person={pictures_per_person}: give 2 or more "
                "pictures per person, and a multiple of it that makes 2 or more people."
            )
        super().__init__(people, batch_size, max_people=max_people, seed=seed)
        self.people_per_batch, self.pictures_per_person, self.seed = people_per_batch, pictures_per_person, seed

    def train_batches(self) -> PeopleBatches:
        rank = self.trainer.global_rank if self.trainer else 0
        return PeopleBatches(self.train_people, self.people_per_batch, self.pictures_per_person, self.seed, rank)

    def val_dataloader(self) -> DataLoader:
        stills = self.validation_people.stills
        labels = labels_of([said.caption for said in stills.words])
        return DataLoader([LabelledPictures(stills.pixels[:, 0], stills.person, labels)], batch_size=None)


# Losses ---------------------------------------------------------------------------------------------------------------


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross entropy with the positives of each row as equally right answers: (B, C), (B, C) bool -> (B,).

    Rows without a positive cost nothing.
    """
    log_prob = logits.log_softmax(-1).masked_fill(~positive, 0.0)
    return -log_prob.sum(-1) / positive.sum(-1).clamp_min(1)


def image_text_loss(images: Tensor, texts: Tensor, input_ids: Tensor, scale: Tensor) -> Tensor:
    """Both directions of CLIP's loss, (B, E) each -> (B,); equal captions count as each other's."""
    logits = scale * images @ texts.mT
    same = (input_ids[:, None] == input_ids[None]).all(-1)
    return (contrastive_loss(logits, same) + contrastive_loss(logits.mT, same)) / 2


def identity_loss(embeddings: Tensor, person: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss over people, (B, E), (B,) -> (B,)."""
    itself = torch.eye(len(person), dtype=torch.bool, device=person.device)
    logits = (embeddings @ embeddings.mT / temperature).masked_fill(itself, -torch.inf)
    return contrastive_loss(logits, (person[:, None] == person[None]) & ~itself)


def hide_words(input_ids: Tensor, rate: float, pad: int, unknown: int, generator: torch.Generator) -> Tensor:
    hidden = torch.rand(input_ids.shape, generator=generator, device=input_ids.device) < rate
    return input_ids.masked_fill(hidden & (input_ids != pad), unknown)


def word_loss(states: Tensor, embeddings: Tensor, input_ids: Tensor, pad: int) -> Tensor:
    """Cross entropy of telling each word by its state, (B, T, D), (vocabulary, D), (B, T) -> scalar."""
    logits = states @ embeddings.mT / states.shape[-1] ** 0.5  # T5's scale for tied embeddings
    return F.cross_entropy(logits.flatten(0, 1), input_ids.flatten(), ignore_index=pad)


# Pictures -------------------------------------------------------------------------------------------------------------


def augment(pixels: Tensor, may_flip: Tensor, max_shift: int, brightness: float, generator: torch.Generator) -> Tensor:
    """Mirror, move by whole pixels (edges are repeated) and change the exposure: (B, 3, H, W) in [-1, 1], likewise."""
    rows = torch.arange(len(pixels), device=pixels.device)

    def uniform() -> Tensor:
        return torch.rand(len(pixels), generator=generator, device=pixels.device)

    pixels = torch.where((may_flip & (uniform() < 0.5))[:, None, None, None], pixels.flip(-1), pixels)
    padded = F.pad(pixels, (max_shift,) * 4, mode="replicate")
    shift_x, shift_y = ((uniform() * (2 * max_shift + 1)).long() for _ in "xy")
    height, width = (torch.arange(size, device=pixels.device) for size in pixels.shape[-2:])
    y, x = (shift_y[:, None] + height)[:, :, None], (shift_x[:, None] + width)[:, None]
    shifted = padded[rows[:, None, None], :, y, x].permute(0, 3, 1, 2)  # (B, 3, H, W)
    exposure = 1 + brightness * (2 * uniform() - 1)
    return ((shifted + 1) * exposure[:, None, None, None] - 1).clamp(-1, 1)


# Recognition ----------------------------------------------------------------------------------------------------------


class ZeroShot:
    """Recognises by text: a picture is compared with a caption for every combination of class, action and background.

    Args:
        model: in evaluation mode; its texts are encoded once, here.
        paraphrases: captions per combination.
    """

    def __init__(self, model: ImageTextModel, paraphrases: int = PARAPHRASES) -> None:
        self.shape = *(len(words) for words in WORDS.values()), paraphrases
        prompts = [text for words in product(*WORDS.values()) for text in paraphrase(*words, paraphrases)]
        with torch.no_grad():
            self.texts = model.embed_texts(model.tokenize(prompts))
            self.scale = model.logit_scale.exp()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(B, E) of unit length -> by what is told apart, log-probabilities (B, number of words)."""
        joint = (self.scale * images @ self.texts.mT).log_softmax(-1).unflatten(-1, self.shape)
        return {name: joint.movedim(axis + 1, 1).flatten(2).logsumexp(-1) for axis, name in enumerate(WORDS)}


def paraphrase(class_word: str, action: str, background: str, count: int) -> list[str]:
    """Captions that say the same; the same ones each time."""
    person = SimpleNamespace(class_word=class_word, attributes={})
    performance = SimpleNamespace(names=(action,), light="frontal", background=background)
    rng = np.random.default_rng(0)
    return [caption(person, performance, rng) for _ in range(count)]


def recognition_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-log of what the true words get, of pictures that have any: (B, W) log-probabilities, (B, W) bool -> (n,)."""
    named = labels.any(-1)
    return -scores[named].masked_fill(~labels[named], -torch.inf).logsumexp(-1)


def nearest_person(features: Tensor, person: Tensor) -> Tensor:
    """Share of pictures whose most similar *person* (mean of that person's other pictures) is the right one.

    Args:
        features: (B, D); their common mean is taken off, then cosines are compared.
        person: (B,).
    """
    features = F.normalize(features - features.mean(0), dim=-1)
    own = torch.unique(person, return_inverse=True)[1]  # (B,) in 0 .. P-1
    sums = F.one_hot(own).to(features).mT @ features  # (P, D)
    similarity = features @ F.normalize(sums, dim=-1).mT  # (B, P)
    without_it = F.normalize(sums[own] - features, dim=-1)
    similarity.scatter_(1, own[:, None], (features * without_it).sum(-1, keepdim=True))
    return (similarity.argmax(1) == own).float().mean()


# Training -------------------------------------------------------------------------------------------------------------


class ContrastiveModule(L.LightningModule):
    """Trains an `ImageTextModel` from scratch.

    Args:
        optimizer: parameters -> optimizer.
        lr_schedule: optimizer -> schedule, stepped once per step.
        embed_dim: E.
        identity_weight, word_weight: of the losses beside the image-text loss.
        identity_temperature: of the identity loss.
        word_hiding_rate: share of the words that the text encoder does not see, in the word loss.
        max_shift: pixels by which pictures are moved, at most.
        brightness: relative change of exposure, at most.
        export_dtype: of the text encoder that `export` writes; the vision tower is used as it is stored, so in single.
        seed: of the weights and of what is drawn in training.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
        lr_schedule: Callable[[Optimizer], Any],
        embed_dim: int = 64,
        identity_weight: float = 1.0,
        word_weight: float = 0.2,
        identity_temperature: float = 0.1,
        word_hiding_rate: float = 0.2,
        max_shift: int = 3,
        brightness: float = 0.15,
        export_dtype: str = "float16",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.optimizer_factory, self.lr_schedule_factory = optimizer, lr_schedule
        self.identity_weight, self.word_weight = identity_weight, word_weight
        self.identity_temperature, self.word_hiding_rate = identity_temperature, word_hiding_rate
        self.max_shift, self.brightness, self.seed = max_shift, brightness, seed
        self.export_dtype = as_dtype(export_dtype)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.model = build_model(embed_dim)

    def check_resume(self, path: str | Path) -> None:
        """Before anything large loads: raises what `require_complete` raises."""
        require_complete(path)

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":  # its fused attention is the slowest part of a step, most of all in bfloat16
            self.model.vision.set_attn_implementation("eager")

    def training_step(self, batch: ContrastiveBatch, batch_idx: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed_of(self.seed, self.global_step))
        pixels = augment(to_float(batch.pixels), batch.may_flip, self.max_shift, self.brightness, generator)
        losses = self.contrastive_losses(pixels, batch)
        losses["word"] = self.word_loss(batch.input_ids, generator)
        total = losses["image_text"] + self.identity_weight * losses["identity"] + self.word_weight * losses["word"]
        self.log_dict({f"train/loss/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(pixels))
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(pixels))
        return total

    def contrastive_losses(self, pixels: Tensor, batch: ContrastiveBatch) -> dict[str, Tensor]:
        features = self.model.image_features(pixels)
        images, texts = self.model.embed_images(features), self.model.embed_texts(batch.input_ids)
        people = self.model.embed_people(features)
        scale = self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        with torch.autocast(self.device.type, enabled=False):  # logits want more than bfloat16's three digits
            return {
                "image_text": image_text_loss(images.float(), texts.float(), batch.input_ids, scale).mean(),
                "identity": identity_loss(people.float(), batch.person, self.identity_temperature).mean(),
            }

    def word_loss(self, input_ids: Tensor, generator: torch.Generator) -> Tensor:
        tokenizer = self.model.tokenizer
        pad, unknown = tokenizer.pad_token_id, tokenizer.unk_token_id
        input_ids = input_ids[::WORD_STRIDE]
        states = self.model.text_states(hide_words(input_ids, self.word_hiding_rate, pad, unknown, generator))
        return word_loss(states, self.model.text_encoder.shared.weight, input_ids, pad)

    def validation_step(self, batch: LabelledPictures, batch_idx: int) -> None:
        """Top-1 of what is recognised by text, of all stills; whose they are, by the mean of the dense features."""
        features = self.model.image_features(to_float(batch.pixels))
        scores = ZeroShot(self.model)(self.model.embed_images(features).float())
        figures = {f"val/{name}": top_1(scores[name], batch.labels[name]) for name in scores}
        figures["val/identity"] = float(nearest_person(features.patch_mean.float(), batch.person))
        costs = torch.cat([recognition_loss(scores[name], batch.labels[name]) for name in scores])
        self.log_dict(figures, batch_size=len(batch.pixels), prog_bar=True)
        self.log("val/loss", costs.mean(), batch_size=len(batch.pixels))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory(self.parameters())
        schedule = self.lr_schedule_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def export(self, folder: str | Path) -> None:
        """Write text_encoder/, tokenizer/ and image_encoder/ into the model's folder, the projections beside it."""
        self.model.save_pretrained(folder, judge_folder_of(folder), self.export_dtype)

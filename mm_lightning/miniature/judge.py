"""Recognises what a clip shows: class, action and background. Trained on real clips of the train people only.

Text alignment is CLIP's: the cosine between a clip's frames and its prompt. Recognition is by linear classifiers on
what the vision tower says of a clip, its mean over the frames and its spread over them: frames tell an action together.

Letters: K clips, F frames, H W pixels, D features of a clip, E width of an embedding, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mm_lightning.backbone import check_base
from mm_lightning.miniature.captions import ACTIONS, BACKGROUNDS, CLASS_WORDS, parse_caption
from mm_lightning.miniature.image_text import ImageTextModel, Projections

WORDS = {"class_word": CLASS_WORDS, "action": tuple(ACTIONS), "background": BACKGROUNDS}
BATCH = 8  # clips
L2 = 0.1
MAX_ITERATIONS = 200


def judge_folder_of(model_folder: str | Path) -> Path:
    """Where the judge of a model lies: beside it, as generation needs none of it."""
    return Path(model_folder).absolute().parent / "judge"


def labels_of(captions: Sequence[str]) -> dict[str, Tensor]:
    """What captions ask for: by the name of what is told apart, (K, W) bool in the order of WORDS."""
    asked = [parse_caption(text) for text in captions]
    said = {
        "class_word": [(caption.class_word,) for caption in asked],
        "action": [caption.actions for caption in asked],
        "background": [(caption.background,) for caption in asked],
    }
    return {name: torch.tensor([[word in row for word in WORDS[name]] for row in rows]) for name, rows in said.items()}


def top_1(scores: Tensor, labels: Tensor) -> float:
    """Share whose best word is a right one: (K, W), (K, W) bool."""
    return float(labels.gather(1, scores.argmax(1, keepdim=True)).float().mean())


def chance(scores: Tensor, labels: Tensor) -> float:
    """`top_1` to expect of clips that have nothing to do with their prompts: the same answers, dealt out at random."""
    answers = F.one_hot(scores.argmax(1), scores.shape[1]).float().mean(0)
    return float(answers @ labels.float().mean(0))


class Classifier(nn.Linear):
    """Logistic regression on standardised features, a sigmoid for every word, as a clip may show two actions."""

    def __init__(self, num_features: int, num_words: int) -> None:
        super().__init__(num_features, num_words)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("deviation", torch.ones(num_features))

    def forward(self, features: Tensor) -> Tensor:
        """(K, D) -> logits (K, W)."""
        return super().forward((features - self.mean) / self.deviation)

    @torch.enable_grad()
    def fit(self, features: Tensor, labels: Tensor) -> Classifier:
        """The minimum of cross entropy plus L2 / 2 of the squared weights, found by L-BFGS."""
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0).clamp_min(1e-6))
        self.requires_grad_(True)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(self(features), labels.float(), reduction="none").sum(1).mean()
            loss = loss + L2 / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return self.requires_grad_(False)


class Judge(nn.Module):
    """See above.

    Args:
        model: trained, in evaluation mode.
    """

    def __init__(self, model: ImageTextModel) -> None:
        super().__init__()
        self.model = model
        num_features = 4 * model.vision.config.hidden_size
        self.classifiers = nn.ModuleDict({name: Classifier(num_features, len(words)) for name, words in WORDS.items()})
        self.requires_grad_(False).eval()

    @staticmethod
    def check(model_folder: str | Path, judge_folder: str | Path) -> None:
        """Raises FileNotFoundError or ValueError for what `from_pretrained` would not load, before it reads weights."""
        check_base(model_folder)
        Projections.from_pretrained(judge_folder)

    @classmethod
    def from_pretrained(cls, model_folder: str | Path, judge_folder: str | Path) -> Judge:
        """Without trained classifiers, see `fit`; raises as `ImageTextModel.from_pretrained`."""
        return cls(ImageTextModel.from_pretrained(model_folder, judge_folder))

    @torch.no_grad()
    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        """(K, F, H, W, 3) -> (K, D) on the CPU: class states and dense features, mean and spread over frames."""
        rows = []
        for part in torch.from_numpy(clips).split(BATCH):
            pixels = part.to(self.model.device).movedim(-1, -3).float() / 127.5 - 1
            states = torch.cat(self.model.image_features(pixels.flatten(0, 1)), dim=-1).unflatten(0, part.shape[:2])
            rows.append(torch.cat([states.mean(1), states.std(1, correction=0)], dim=-1).cpu())
        return torch.cat(rows)

    def fit(self, clips: NDArray[np.uint8], captions: Sequence[str]) -> Judge:
        """Train the classifiers on real clips (K, F, H, W, 3) with their captions."""
        return self.fit_features(self.features(clips), labels_of(captions))

    def fit_features(self, features: Tensor, labels: dict[str, Tensor]) -> Judge:
        for name, classifier in self.classifiers.items():
            classifier.cpu().fit(features, labels[name])
        return self

    def recognise(self, features: Tensor) -> dict[str, Tensor]:
        """(K, D) of `features` -> by the name of what is told apart, logits (K, W) in the order of WORDS."""
        return {name: classifier(features) for name, classifier in self.classifiers.items()}

    @torch.no_grad()
    def text_alignment(self, clips: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float32]:
        """(K, F, H, W, 3) and K prompts -> (K,): the mean cosine of frames and prompt."""
        texts = self.model.embed_texts(self.model.tokenize(list(captions)))  # (K, E)
        cosines = []
        for part, text in zip(torch.from_numpy(clips).split(BATCH), texts.split(BATCH), strict=True):
            pixels = part.to(self.model.device).movedim(-1, -3).float() / 127.5 - 1
            images = self.model.embed_images(self.model.image_features(pixels.flatten(0, 1)))
            cosines.append((images.unflatten(0, part.shape[:2]) * text[:, None]).sum(-1).mean(1))
        return torch.cat(cosines).cpu().numpy()

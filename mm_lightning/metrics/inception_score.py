"""Whether pictures are clear and varied. Letters: B videos, F frames, N pictures, K classes, H W pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_lightning.metrics.arithmetic import check_count, check_video
from mm_lightning.metrics.base import PlottedMetric

Classifier = Callable[[Tensor], Tensor]


def inception_score(probabilities: Tensor) -> Tensor:
    """(N, K), rows that sum to 1 -> scalar in [1, K]: exp of the mean divergence of the rows from their mean."""
    marginal = probabilities.mean(0)  # (K,)
    divergence = torch.xlogy(probabilities, probabilities) - torch.xlogy(probabilities, marginal)
    return divergence.sum(1).mean().exp()


def split_scores(probabilities: Tensor, splits: int) -> Tensor:
    """(N, K) -> (min(splits, N),), the scores of equal parts, in order."""
    num_pictures = len(probabilities)
    splits = min(splits, num_pictures)
    parts = probabilities.tensor_split([i * num_pictures // splits for i in range(1, splits)])
    return torch.stack([inception_score(part) for part in parts])


class OnnxClassifier:
    """A classifier in an ONNX file, such as InceptionV3, for `InceptionScore`; runs by onnxruntime on the CPU. Such a
    file holds a graph of known operators, no code.

    Args:
        file: its first input takes pictures (N, 3, S, S) float32, its first output gives (N, K).
        size: S; pictures are resized to it. None leaves theirs.
        pixels: what it takes black and white for; [0, 255] is that of TensorFlow's Inception.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no ONNX network.
    """

    def __init__(self, file: str | Path, size: int | None = 299, pixels: Sequence[float] = (0.0, 255.0)) -> None:
        import onnxruntime

        if not Path(file).is_file():
            raise FileNotFoundError(f"No classifier at {file}.")
        try:
            self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes share no other base
            raise ValueError(f"{file} is no ONNX network: {error}") from error
        self.size, (self.black, self.white) = size, pixels

    def __call__(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, K)."""
        if self.size is not None:
            sizes = {"size": (self.size, self.size), "mode": "bilinear", "antialias": True}
            pictures = nn.functional.interpolate(pictures, **sizes)
        inputs = (pictures + 1) / 2 * (self.white - self.black) + self.black
        given = {self.session.get_inputs()[0].name: inputs.float().cpu().numpy()}
        return torch.from_numpy(self.session.run(None, given)[0])


class InceptionScore(PlottedMetric):
    """Inception score (Salimans et al., NeurIPS 2016), as EvalCrafter (CVPR 2024) applies it to the frames of videos.

    In [1, K], higher is better. It is a figure of a set, not of a video, and rests on the classifier: the published
    ones are those of InceptionV3 with 1008 classes (TensorFlow's weights), which nothing here downloads. The mean over
    `splits` parts, in order of update; fewer where there are fewer frames. NaN before any update.

    Args:
        classifier: pictures (N, 3, H, W) in [-1, 1] -> (N, K); a module is put into evaluation mode. What else it
            wants, such as 299x299 pixels, it does itself.
        from_logits: it gives logits, not probabilities.
        splits: EvalCrafter's 10.
        batch_size: pictures for one call of the classifier.
        **kwargs: torchmetrics' own.
    """

    higher_is_better = True
    plot_lower_bound = 1.0
    # Flat, as a process without videos has an empty state, and that has one dimension.
    probabilities: Tensor
    num_classes: Tensor

    def __init__(
        self,
        classifier: Classifier | nn.Module,
        from_logits: bool = True,
        splits: int = 10,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        check_count("splits", splits)
        check_count("batch_size", batch_size)
        super().__init__(**kwargs)
        self.classifier = classifier
        self.from_logits, self.splits, self.batch_size = from_logits, splits, batch_size
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("num_classes", torch.tensor(0), dist_reduce_fx="max")

    def update(self, video: Tensor) -> None:
        """video: (B, F, 3, H, W) in [-1, 1].

        Raises:
            ValueError: another video, or a classifier that does not give what `from_logits` says.
        """
        probabilities = self.classify(video)
        self.num_classes.fill_(probabilities.shape[1])
        self.probabilities.append(probabilities.to(self.device, self.dtype).flatten())

    @torch.no_grad()
    def classify(self, video: Tensor) -> Tensor:
        """(B, F, 3, H, W) in [-1, 1] -> (B * F, K), rows that sum to 1. Raises what `update` raises."""
        check_video(video)
        if isinstance(self.classifier, nn.Module):
            self.classifier.eval()
        parts = video.flatten(0, 1).split(self.batch_size)
        return torch.cat([self._checked(self.classifier(pictures), len(pictures)) for pictures in parts])

    def score(self, probabilities: Tensor) -> Tensor:
        """(N, K) of pictures that have been classified -> scalar."""
        return split_scores(probabilities.double(), self.splits).mean().to(self.dtype)

    def _checked(self, outputs: Tensor, num_pictures: int) -> Tensor:
        if outputs.ndim != 2 or len(outputs) != num_pictures or int(self.num_classes) not in (0, outputs.shape[1]):
            raise ValueError(
                f"The classifier gave {tuple(outputs.shape)} for {num_pictures} pictures, and {int(self.num_classes)} "
                "classes before: it must give (pictures, classes)."
            )
        outputs = outputs.float()
        sums_to_one = bool((outputs >= 0).all()) and torch.allclose(outputs.sum(1), outputs.new_ones(()), atol=1e-3)
        if sums_to_one == self.from_logits:
            given = "probabilities" if sums_to_one else "no probabilities (rows of numbers from 0 that sum to 1)"
            raise ValueError(f"The classifier gives {given}: set from_logits={not self.from_logits}.")
        return outputs.softmax(1) if self.from_logits else outputs

    def compute(self) -> Tensor:
        """Scalar."""
        flat = self.gather("probabilities")
        if len(flat) == 0:
            return flat.new_tensor(torch.nan)
        return self.score(flat.reshape(-1, int(self.num_classes)))

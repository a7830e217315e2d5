"""Whose face is it, among all? Letters: N videos, P people, E width of the embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.metrics.arithmetic import check_count, check_faces, check_references, mean_embedding, mean_of_known
from mm_lightning.metrics.base import PlottedMetric
from mm_lightning.types import ReferenceFaces, VideoFaces

MAX_IDENTITY = 2**24  # whole numbers up to here are exact in float32


def identification_ranks(embeddings: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """At which place, from 1, the own person comes when people are sorted by Euclidean distance; ties count against it.

    Args:
        embeddings: (N, E), NaN where a video shows no face.
        gallery: (P, E).
        own: (N,) int64, rows of the gallery.

    Returns:
        (N,) floats, infinite where there is no face.
    """
    distance = torch.cdist(embeddings, gallery, compute_mode="donot_use_mm_for_euclid_dist")  # (N, P)
    ranks = (distance <= distance.gather(1, own[:, None])).sum(1).to(distance.dtype)
    return torch.where(embeddings.isnan().any(1), torch.inf, ranks)


def within_top(ranks: Tensor, k: int) -> Tensor:
    """(N,) places from 1 -> 1 where among the first k, else 0; NaN stays NaN."""
    return torch.where(ranks.isnan(), ranks, (ranks <= k).to(ranks.dtype))


class IdentityRetrieval(PlottedMetric):
    """Share of videos whose own person is among the k nearest of N people: in [0, 1], higher is better.

    The people are all whose references were given, each with the mean of their raw embeddings; a video is the mean of
    its frames with a face, compared by Euclidean distance. Chance is k / N, see `num_people`. A video without a face
    is a miss, whatever k. Closed-set identification as in face recognition (rank-k of the CMC curve, NIST FRVT 1:N);
    not in the paper, and harder to please than a similarity: an average face is near to everybody.

    NaN with fewer than two people. A video whose person has no reference with a face is in no mean: `num_unknown`.

    Args:
        top_k: k.
        **kwargs: torchmetrics' own.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    # Flat, as a process without videos has an empty state, and that has one dimension.
    videos: Tensor
    people: Tensor
    identities: Tensor
    embed_dim: Tensor

    def __init__(self, top_k: int = 1, **kwargs: Any) -> None:
        check_count("top_k", top_k)
        super().__init__(**kwargs)
        self.top_k = top_k
        for state in ("videos", "people", "identities"):
            self.add_state(state, [], dist_reduce_fx="cat")
        self.add_state("embed_dim", torch.tensor(0), dist_reduce_fx="max")

    def update(self, faces: VideoFaces, references: ReferenceFaces, identities: Tensor) -> None:
        """
        Args:
            identities: (B,) int64, who each video should show: the same number for the same person in all updates and
                processes.

        Raises:
            ValueError: tensors that do not fit together, or embeddings of another width than before.
        """
        check_faces(faces)
        check_references(references, faces)
        self._check(identities, faces)
        self.embed_dim.fill_(faces.embeddings.shape[-1])
        self._append("videos", mean_embedding(faces.embeddings, faces.found))
        self._append("people", mean_embedding(references.embeddings, references.mask))
        self._append("identities", identities)

    def _append(self, state: str, values: Tensor) -> None:
        getattr(self, state).append(values.detach().to(self.device, self.dtype).flatten())

    def _check(self, identities: Tensor, faces: VideoFaces) -> None:
        num_videos, width = len(faces.found), faces.embeddings.shape[-1]
        if identities.shape != (num_videos,) or identities.is_floating_point():
            raise ValueError(
                f"identities must be ({num_videos},) whole numbers, got {identities.dtype} {tuple(identities.shape)}."
            )
        if not ((identities >= 0) & (identities < MAX_IDENTITY)).all():
            raise ValueError(f"identities must lie in 0 to {MAX_IDENTITY - 1}: number the people from 0.")
        if int(self.embed_dim) not in (0, width):
            raise ValueError(
                f"Embeddings of width {width} after some of width {int(self.embed_dim)}: use one recogniser, or reset."
            )

    def _gather_all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of videos (N, E) and of their references (N, E), identities (N,)."""
        identities = self.gather("identities").to(torch.int64)
        shape = (len(identities), self.gather("videos").numel() // max(len(identities), 1))
        return self.gather("videos").reshape(shape), self.gather("people").reshape(shape), identities

    def ranks(self) -> Tensor:
        """(N,) the place of each video's person, from 1: infinite without a face, NaN without a reference.

        In the order of `gather`; every process must call it.
        """
        videos, people, identities = self._gather_all()
        known = ~people.isnan().any(1)
        persons, own, counts = identities[known].unique(return_inverse=True, return_counts=True)
        ranks = people.new_full((len(identities),), torch.nan)
        if len(persons) > 1:
            sums = people.new_zeros(len(persons), people.shape[1]).index_add(0, own, people[known])
            ranks[known] = identification_ranks(videos[known], sums / counts[:, None], own)
        return ranks

    def per_video(self) -> Tensor:
        """(N,) 1 for a hit, 0 for a miss, NaN where unknown."""
        return within_top(self.ranks(), self.top_k)

    def num_people(self) -> int:
        """N of the definition, the people with a reference."""
        _, people, identities = self._gather_all()
        return len(identities[~people.isnan().any(1)].unique())

    def num_unknown(self) -> int:
        """How many videos are not in the share."""
        return int(self.ranks().isnan().sum())

    def compute(self) -> Tensor:
        """Scalar."""
        return mean_of_known(self.per_video())

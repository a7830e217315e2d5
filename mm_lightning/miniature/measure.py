"""What dlib says of clips and stills: where the faces are, and whose.

Letters: K clips, F frames of a clip, S sampled frames, P people, E width of the embedding, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mm_lightning.encoders.recognizer import FaceRecognizer
from mm_lightning.media import to_uint8
from mm_lightning.miniature import figures
from mm_lightning.miniature.sampling import Subject, split_references

BATCH = 32


class ClipFaces(NamedTuple):
    """The faces of one clip in the sampled frames."""

    landmarks: NDArray[np.float64]  # (S, 5, 2) pixels, NaN where there is no face
    boxes: NDArray[np.float64]  # (S, 4) pixels, NaN where there is no face
    embeddings: NDArray[np.float64]  # (S, E), NaN where there is no face or none was asked for
    embedded: NDArray[np.bool_]  # (S,) frames whose face was to be embedded

    @property
    def found(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.boxes[:, 0])


class Gallery(NamedTuple):
    """What the clips are compared with: stills that the model was not shown."""

    people: list[str]  # P
    means: NDArray[np.float64]  # (P, E), average embedding of each person's stills
    landmarks: NDArray[np.float64]  # (P, 5, 2) and
    boxes: NDArray[np.float64]  # (P, 4) of the person's first such still
    num_undetected: int  # stills in which dlib finds no face: their rendered landmarks were taken


class ClipFigures(NamedTuple):
    """One clip in figures; NaN where it shows too few faces."""

    rank: int | None  # place of its person among all, from 1; None without a face
    own: float
    margin: float
    decay: float
    fm_ref: float
    fm_inter: float
    face_found: float  # share of the sampled frames
    colour_drift: float
    text: float = float("nan")  # alignment with the prompt, by the judge


def measure_clips(
    clips: Sequence[NDArray[np.uint8]], recognizer: FaceRecognizer, num_embedded: int, num_workers: int = 2
) -> list[ClipFaces]:
    """Detect faces in the frames that FM looks at, and embed those of `num_embedded` of them.

    Args:
        clips: each (F, H, W, 3).
    """
    from mm_lightning.miniature.detection import detect  # dlib, which a machine that only trains may lack

    sampled = [clip[figures.sample_frames(len(clip))] for clip in clips]
    frames = np.concatenate(sampled)
    seen = detect(frames, num_workers=num_workers)
    embedded = np.concatenate([embedded_frames(len(clip), num_embedded) for clip in sampled])
    embeddings = embed(frames, seen.landmarks, seen.found & embedded, recognizer)
    landmarks = np.where(seen.found[:, None, None], seen.landmarks, np.nan).astype(np.float64)
    boxes = np.where(seen.found[:, None], seen.boxes, np.nan).astype(np.float64)
    ends = np.cumsum([len(clip) for clip in sampled])[:-1]
    split = (np.split(values, ends) for values in (landmarks, boxes, embeddings, embedded))
    return [ClipFaces(*parts) for parts in zip(*split, strict=True)]


def embedded_frames(num_frames: int, count: int) -> NDArray[np.bool_]:
    chosen = np.zeros(num_frames, dtype=bool)
    chosen[figures.sample_frames(num_frames, count)] = True
    return chosen


@torch.no_grad()
def embed(
    frames: NDArray[np.uint8], landmarks: NDArray, wanted: NDArray[np.bool_], recognizer: FaceRecognizer
) -> NDArray[np.float64]:
    """Frames (N, H, W, 3) with landmarks (N, 5, 2) -> (N, E), NaN where not wanted."""
    embeddings = np.full((len(frames), recognizer.embed_dim), np.nan)
    device = recognizer.template.device
    for rows in np.array_split(np.flatnonzero(wanted), max(-(-int(wanted.sum()) // BATCH), 1)):
        if len(rows):
            pixels = torch.from_numpy(frames[rows]).to(device).movedim(-1, 1).float() / 127.5 - 1
            points = torch.from_numpy(np.asarray(landmarks[rows], np.float32)).to(device)
            embeddings[rows] = recognizer.embed(pixels, points).cpu().numpy()
    return embeddings


def build_gallery(
    subjects: Sequence[Subject], num_shown: int, recognizer: FaceRecognizer, num_workers: int = 2
) -> Gallery:
    """Average embeddings of the stills that the model is not shown, a row for each person in order of appearance."""
    from mm_lightning.miniature.detection import detect

    firsts = {subject.person: subject for subject in reversed(subjects)}
    people = list(dict.fromkeys(subject.person for subject in subjects))
    compared = [split_references(firsts[person].batch, num_shown)[1] for person in people]
    stills = np.concatenate(
        [to_uint8(firsts[person].batch.references[0][mask]) for person, mask in zip(people, compared, strict=True)]
    )
    rendered = torch.cat([firsts[p].batch.reference_landmarks[0][m] for p, m in zip(people, compared, strict=True)])
    seen = detect(stills, num_workers=num_workers)
    landmarks = np.where(seen.found[:, None, None], seen.landmarks, rendered.numpy()).astype(np.float64)
    boxes = np.where(seen.found[:, None], seen.boxes, np.nan).astype(np.float64)
    embeddings = embed(stills, landmarks, np.ones(len(stills), bool), recognizer)
    ends = np.cumsum([int(mask.sum()) for mask in compared])
    means = np.stack([part.mean(0) for part in np.split(embeddings, ends[:-1])])
    first = np.array([first_found(rows) for rows in np.split(seen.found, ends[:-1])]) + np.array([0, *ends[:-1]])
    return Gallery(people, means, landmarks[first], boxes[first], int((~seen.found).sum()))


def first_found(found: NDArray[np.bool_]) -> int:
    """The first still with a face, 0 where there is none (its box is NaN, and so is FM_ref)."""
    return int(found.argmax())


def clip_figures(clip: NDArray[np.uint8], faces: ClipFaces, gallery: Gallery, person: str) -> ClipFigures:
    own = gallery.people.index(person)
    known = ~np.isnan(faces.embeddings[:, 0])
    mean = faces.embeddings[known].mean(0) if known.any() else None
    times = np.linspace(0, 1, len(known))[known]
    alike = figures.similarity(faces.embeddings[known], gallery.means, own, times)
    return ClipFigures(
        rank=figures.identification_rank(mean, gallery.means, own),
        own=alike.own,
        margin=alike.margin,
        decay=alike.decay,
        fm_ref=figures.fm_ref(faces.landmarks, faces.boxes, gallery.landmarks[own], gallery.boxes[own]),
        fm_inter=figures.fm_inter(faces.landmarks, *clip.shape[1:3]),
        face_found=float(faces.found.mean()),
        colour_drift=figures.colour_drift(clip),
    )

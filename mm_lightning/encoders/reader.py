"""The person's face in videos and photos: found and embedded once, for all metrics.

Letters: F frames, H W pixels, N pictures, R references, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_lightning.encoders.detector import check_detector, face_size, load_detector
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.photos import Photo, find_faces, load_photo
from mm_lightning.encoders.recognizer import check_recognizer, load_recognizer
from mm_lightning.types import ReferenceFaces, VideoFaces


class FaceReader:
    """Finds and embeds the face of each picture: the largest, where there are several.

    Args:
        detector: see `load_detector`.
        recognizer: see `load_recognizer`; dlib as in the paper.
        root: insightface's folder.
        device: of the recogniser.

    Raises:
        FileNotFoundError, ValueError: as `load_detector` and `load_recognizer`, before weights are read.
    """

    def __init__(
        self,
        detector: str = "auto",
        recognizer: str = "dlib",
        root: str = DEFAULT_ROOT,
        device: str | torch.device = "cpu",
    ) -> None:
        check_detector(detector, root)
        check_recognizer(recognizer, root)
        self.detector = load_detector(detector, root)
        self.recognizer = load_recognizer(recognizer, root).to(device)
        self.device = device

    @property
    def info(self) -> dict[str, str]:
        """For the record."""
        return {"detector": self.detector.info["name"], "recognizer": self.recognizer.name}

    def read_video(self, frames: NDArray[np.uint8]) -> VideoFaces:
        """RGB (F, H, W, 3) -> its faces, a batch of one."""
        found, boxes, landmarks, embeddings = self.read(list(frames))
        sizes = torch.tensor([frames.shape[1:3]], dtype=torch.float32)
        return VideoFaces(found[None], boxes[None], landmarks[None], embeddings[None], sizes)

    def read_photos(self, photos: Sequence[Photo]) -> ReferenceFaces:
        """Photos of one person -> their faces, a batch of one; photos without a face are masked."""
        found, boxes, landmarks, embeddings = self.read([load_photo(photo) for photo in photos])
        return ReferenceFaces(boxes[None], landmarks[None], embeddings[None], found[None])

    @torch.no_grad()
    def read(self, pictures: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Found (N,), boxes (N, 4), landmarks (N, 5, 2), embeddings (N, E); zeros where there is no face."""
        count = len(pictures)
        found, boxes = torch.zeros(count, dtype=torch.bool), torch.zeros(count, 4)
        landmarks, embeddings = torch.zeros(count, 5, 2), torch.zeros(count, self.recognizer.embed_dim)
        for i, picture in enumerate(pictures):
            faces = find_faces(picture, self.detector)
            if not faces:
                continue
            face = max(faces, key=lambda face: face_size(face.box))
            found[i], boxes[i] = True, torch.from_numpy(face.box)
            landmarks[i] = torch.from_numpy(np.asarray(face.landmarks, np.float32))
            pixels = torch.from_numpy(picture).movedim(-1, 0)[None].to(self.device).float() / 127.5 - 1
            embeddings[i] = self.recognizer.embed(pixels, landmarks[i][None].to(self.device))[0].cpu()
        return found, boxes, landmarks, embeddings

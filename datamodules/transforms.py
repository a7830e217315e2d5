"""One sample of a shard -> tensors, with boxes and landmarks that follow every crop and resize; samples -> Batch.

Letters: F frames, F' latent frames, C latent channels, H W pixels, h w latent pixels, R references, S side of a
reference, T text tokens, L tokens of the vision encoder, D widths. Pixel (0, 0) is the centre of the first pixel, so
a resize by s takes x to (x + 0.5) s - 0.5.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import decord
import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info
from torch.utils.dlpack import from_dlpack

from datamodules.slots import Slot
from datamodules.tars import DamagedSample
from mm_lightning.pictures import to_rgb8
from mm_lightning.types import Batch, FaceFeatures, TextFeatures

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
VIDEO_SUFFIXES = ("mp4",)
EXIF_ORIENTATION = 0x0112
MAX_SIDE = 1_000_000  # pixels, and frames; a coordinate or number beyond it is no measurement
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
MIRRORED = [1, 0, 2, 4, 3]  # landmarks are ordered by the viewer's left and right

# decord reads the channels off linesize // width (dmlc/decord issues 93, 336), and FFmpeg pads a line to three bytes
# times the width rounded up to 64 at most: below 190 pixels that can reach four bytes per pixel (24, 48, 96, 144 wide).
SAFE_DECORD_WIDTH = 192

DECODE_ERRORS = (OSError, RuntimeError, SyntaxError, EOFError, decord.DECORDError)


class Sample(NamedTuple):
    """One decoded sample: the fields of `Batch` without the batch axis."""

    key: str
    caption: str
    pixels: Tensor | None  # (F, 3, H, W) in [-1, 1], or uint8
    latent_moments: Tensor | None  # (F', 2C, h, w)
    face_boxes: Tensor  # (F, 4)
    face_landmarks: Tensor  # (F, 5, 2)
    references: Tensor  # (R, 3, S, S) in [-1, 1], or uint8
    reference_landmarks: Tensor  # (R, 5, 2)
    reference_mask: Tensor  # (R,) bool
    text: dict[str, Tensor] | None  # prompt_embeds (T, D), id_token_mask (T,)
    face: dict[str, Tensor] | None  # last_hidden_state, penultimate_hidden_state (R, L, D), id_query (R, E)
    weight: float = 1.0


def stand_in(sample: Sample) -> Sample:
    """What takes the place of a damaged sample: of weight 0 and without a key."""
    return sample._replace(key="", weight=0.0)


class Faces(NamedTuple):
    """A face per frame; zeros where there is none."""

    boxes: Tensor  # (F, 4)
    landmarks: Tensor  # (F, 5, 2)


class CropPlan(NamedTuple):
    """Resize to `resized`, cut `target` out at `offset`, mirror. Everything as (x, y)."""

    source: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    target: tuple[int, int]
    mirror: bool = False

    def map_points(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) float32, pixels of the source -> pixels of the delivered picture."""
        scale = np.float32(self.resized) / np.float32(self.source)
        points = (points + np.float32(0.5)) * scale - np.float32(0.5) - np.float32(self.offset)
        if self.mirror:
            points[..., 0] = self.target[0] - 1 - points[..., 0]
        return points


def generator_for(seed: int, epoch: int, key: str) -> torch.Generator:
    """The sample's own randomness: the same on whichever rank and worker it lands."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def check_num_frames(num_frames: int) -> None:
    """Raises ValueError unless the video VAE takes so many frames (4k+1)."""
    if num_frames < 1 or num_frames % 4 != 1:
        nearest = max(1, round((num_frames - 1) / 4) * 4 + 1)
        raise ValueError(f"num_frames={num_frames}: the video VAE takes 4k+1 frames; the nearest is {nearest}.")


# Geometry


def plan_crop(source: tuple[int, int], target: tuple[int, int], boxes: Tensor, mirror: bool = False) -> CropPlan:
    """The smallest resize that covers the target, cut in the middle, moved as little as holds the faces.

    Args:
        source: width and height of the stored picture.
        target: width and height wanted.
        boxes: (F, 4) faces in pixels of the source, zero rows where there is none.
    """
    scale = max(target[0] / source[0], target[1] / source[1])
    resized = tuple(max(t, round(s * scale)) for s, t in zip(source, target, strict=True))
    extent = _extent(boxes)
    offset = []
    for axis in (0, 1):
        ratio = resized[axis] / source[axis]
        faces = None if extent is None else [(extent[axis + side] + 0.5) * ratio - 0.5 for side in (0, 2)]
        offset.append(crop_offset(resized[axis], target[axis], faces))
    return CropPlan(source, resized, tuple(offset), target, mirror)


def crop_offset(length: int, window: int, faces: list[float] | None) -> int:
    """Where a window of `window` pixels starts in `length`: the middle, or moved until it holds the span of `faces`."""
    start = (length - window) / 2
    if faces is not None:
        first, last = faces
        if last - first > window - 1:
            start = (first + last + 1 - window) / 2
        else:
            start = min(max(start, last + 1 - window), first)
    return min(max(math.floor(start + 0.5), 0), length - window)


def map_faces(plan: CropPlan, faces: Faces) -> Faces:
    """Faces of the source -> faces of the delivered picture; one whose centre is cut off counts as none."""
    boxes, landmarks = faces.boxes.numpy(), faces.landmarks.numpy()
    shown = has_face(boxes)
    points = plan.map_points(np.concatenate([boxes.reshape(-1, 2, 2), landmarks], 1))  # (F, 2 + 5, 2)
    first, last, landmarks = points[:, 0], points[:, 1], points[:, 2:]
    if plan.mirror:
        landmarks = landmarks[:, MIRRORED]
        first[:, 0], last[:, 0] = last[:, 0].copy(), first[:, 0].copy()
    edge, centre = np.float32(plan.target) - 1, (first + last) / 2
    kept = shown & (centre >= -0.5).all(-1) & (centre <= edge + 0.5).all(-1)
    boxes = np.concatenate([first, last], -1).clip(0, np.tile(edge, 2))  # (F, 4)
    return Faces(torch.from_numpy(boxes * kept[:, None]), torch.from_numpy(landmarks * kept[:, None, None]))


def has_face(boxes: np.ndarray) -> np.ndarray:
    """(F, 4) -> (F,) bool."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def _extent(boxes: Tensor) -> list[float] | None:
    boxes = boxes.numpy()
    shown = boxes[has_face(boxes)]
    return [*shown[:, :2].min(0).tolist(), *shown[:, 2:].max(0).tolist()] if len(shown) else None


# Pixels


def decode_picture(data: bytes, name: str) -> Image.Image:
    """Encoded picture -> 8-bit RGB, turned upright as its EXIF tag says; see `to_rgb8` for what is stored otherwise.

    Raises:
        DamagedSample: not a picture, or cut short.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.getexif().get(EXIF_ORIENTATION, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode != "RGB":
            return Image.fromarray(to_rgb8(picture))
        picture.load()
        return picture
    except (*DECODE_ERRORS, ValueError, Image.DecompressionBombError) as error:
        raise DamagedSample(f"{name} cannot be decoded ({_first_line(error)})") from error


def decode_frames(data: bytes, plan: CropPlan, start: int, num_frames: int, name: str) -> np.ndarray:
    """Encoded video -> `num_frames` frames from `start` on at the plan's resized size, (F, H', W', 3) uint8.

    Raises:
        DamagedSample: not a video, or fewer frames than wanted.
    """
    try:
        factor = -(-SAFE_DECORD_WIDTH // plan.resized[0])
        width, height = (factor * side for side in plan.resized)
        reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), width=width, height=height, num_threads=1)
        if len(reader) < start + num_frames:
            raise DamagedSample(f"{name} holds {len(reader)} frames, {start + num_frames} are wanted")
        frames = reader.get_batch(list(range(start, start + num_frames)))
        return _shrink(from_dlpack(frames.to_dlpack()).numpy(), factor)  # not copied, as asnumpy() would
    except DECODE_ERRORS as error:
        raise DamagedSample(f"{name} cannot be decoded ({_first_line(error)})") from error


def _shrink(frames: np.ndarray, factor: int) -> np.ndarray:
    """(F, k H', k W', 3) uint8 -> (F, H', W', 3) by averaging k x k pixels."""
    if factor == 1:
        return frames
    num_frames, height, width, _ = frames.shape
    blocks = frames.reshape(num_frames, height // factor, factor, width // factor, factor, 3)
    return np.rint(blocks.mean((2, 4))).astype(np.uint8)


def cut(frames: np.ndarray, plan: CropPlan) -> Tensor:
    """Frames at the resized size (F, H', W', 3) uint8 -> (F, 3, H, W) uint8, channels last in memory."""
    (x, y), (width, height) = plan.offset, plan.target
    frames = frames[:, y : y + height, x : x + width]
    return as_tensor(np.ascontiguousarray(frames[:, :, ::-1]) if plan.mirror else frames)


def as_tensor(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) -> (N, 3, H, W) that shares its memory, also where that is Pillow's and not to be written to."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch warns, once in a process, of memory that is not to be written to
    torch.from_numpy(np.frombuffer(b"0", np.uint8))


def to_float(pixels: Tensor) -> Tensor:
    """(..., 3, H, W) uint8, in any memory layout -> float32 in [-1, 1]."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def from_bytes(batch: Batch) -> Batch:
    """Pictures that are still uint8 become float32, on whichever device they lie."""
    pixels, references = batch.pixels, batch.references
    if pixels is not None and pixels.dtype == torch.uint8:
        pixels = to_float(pixels)
    if references.dtype == torch.uint8:
        references = to_float(references) * batch.reference_mask[..., None, None, None]
    return batch._replace(pixels=pixels, references=references)


def resize_picture(picture: Image.Image, plan: CropPlan) -> np.ndarray:
    """-> (1, H', W', 3) uint8, to be read only."""
    return np.asarray(picture.resize(plan.resized, Image.Resampling.LANCZOS))[None]


def _first_line(error: Exception) -> str:
    text = ADDRESS.sub("", (str(error).splitlines() or [""])[0])
    return f"{type(error).__name__}: {text[:120]}"


# A sample


class SampleTransform:
    """A sample of a shard -> `Sample`: (dict, epoch) -> Sample. Sizes in pixels.

    The target is resized until it covers (height, width) and cut so that the faces stay inside. Of a clip longer than
    `num_frames`, a window is drawn. References become squares of their shortest side around the face. Cached tensors
    replace what they were computed from, and must have been computed at this geometry.

    Args:
        num_frames: 4k+1; 1 for pictures.
        num_references: R; a sample with more gives R of them, drawn anew each pass, one with fewer is padded.
        flip_probability: of mirroring the target. 0 by default: faces are not symmetric.
        spatial_compression, temporal_compression: the VAE's, to check cached latents.
        random_window: False takes the first frames, and the first references.
        cache_id: what cached tensors must have been made with, `{"latents": {...}, "text": {...}, "face": {...}}`
            as `mm_lightning.prepare` records it in the json; parts that it does not name are not compared, None
            compares nothing.
        as_bytes: leaves pictures as uint8, a quarter of the size; `from_bytes` makes them floats on the device.

    Raises:
        ValueError: at construction, for sizes that cannot be; when called, for cached tensors of another geometry or of
            other models.
        DamagedSample: when called, for a sample that cannot be decoded.
    """

    def __init__(
        self,
        height: int,
        width: int,
        num_frames: int = 1,
        reference_size: int = 224,
        num_references: int = 1,
        seed: int = 0,
        flip_probability: float = 0.0,
        spatial_compression: int = 8,
        temporal_compression: int = 4,
        random_window: bool = True,
        cache_id: Mapping[str, Mapping[str, Any]] | None = None,
        as_bytes: bool = False,
    ) -> None:
        check_num_frames(num_frames)
        sizes = {"height": height, "width": width, "reference_size": reference_size, "num_references": num_references}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name, value in (("height", height), ("width", width)):
            if value % spatial_compression:
                raise ValueError(f"{name}={value}: the VAE needs a multiple of {spatial_compression}.")
        self.target, self.num_frames, self.seed = (width, height), num_frames, seed
        self.reference_size, self.num_references = reference_size, num_references
        self.flip_probability, self.random_window = flip_probability, random_window
        self.cache_id, self.as_bytes = cache_id or {}, as_bytes
        num_latent_frames = (num_frames - 1) // temporal_compression + 1
        self.latent_shape = (num_latent_frames, height // spatial_compression, width // spatial_compression)

    def __call__(self, sample: dict, epoch: int = 0) -> Sample:
        key = read_key(sample)
        generator = generator_for(self.seed, epoch, key)
        meta, caption = read_meta(sample), read_text(sample)
        self.check_cache(sample, meta["cache"], caption)
        latent_moments = self.cached_latents(sample)
        plan, window, faces = self.plan(meta, generator, has_latents=latent_moments is not None, key=key)
        faces = map_faces(plan, faces)
        pixels = None if latent_moments is not None else self.pixels(sample, plan, window)
        chosen = self.choose_references(len(meta["references"]), generator)
        references, landmarks, mask = self.references(sample, meta, chosen)
        text = cached_text(sample)
        face = self.cached_face(sample, chosen, len(meta["references"]))
        if not self.as_bytes:
            pixels = None if pixels is None else to_float(pixels)
            references = to_float(references) * mask[:, None, None, None]
        return Sample(key, caption, pixels, latent_moments, *faces, references, landmarks, mask, text, face)

    def check_cache(self, sample: Mapping, recorded: dict, caption: str) -> None:
        """Raises ValueError unless the sample's cached tensors were made with `cache_id`, and for this caption."""
        for part, wanted in self.cache_id.items():
            if f"{part}.safetensors" in sample:
                found = recorded.get(part) or {}
                if "caption_sha256" in found:
                    wanted = {**wanted, "caption_sha256": hashlib.sha256(caption.encode()).hexdigest()}
                compare_cache(f"{sample['__key__']}.{part}.safetensors", wanted, found)

    def plan(
        self, meta: dict, generator: torch.Generator, has_latents: bool, key: str
    ) -> tuple[CropPlan, range, Faces]:
        """Draws the window and the mirroring; faces as stored. Latents are of the whole clip, unmirrored."""
        spare = meta["num_frames"] - self.num_frames
        if spare < 0:
            raise DamagedSample(f"{meta['num_frames']} frames are fewer than the {self.num_frames} wanted")
        if has_latents and (spare or self.flip_probability):
            raise ValueError(
                f"{key}.latents.safetensors: cached latents hold {meta['num_frames']} frames, not mirrored, but "
                f"num_frames={self.num_frames} and flip_probability={self.flip_probability} are wanted; set these to "
                f"{meta['num_frames']} and 0, or remove the cached latents."
            )
        start = int(torch.randint(spare + 1, (), generator=generator)) if spare and self.random_window else 0
        mirror = bool(self.flip_probability) and float(torch.rand((), generator=generator)) < self.flip_probability
        window = range(start, start + self.num_frames)
        faces = read_faces(meta, window)
        return plan_crop((meta["width"], meta["height"]), self.target, faces.boxes, mirror), window, faces

    def pixels(self, sample: dict, plan: CropPlan, window: range) -> Tensor:
        """-> (F, 3, H, W) uint8."""
        for suffix in PICTURE_SUFFIXES:
            if suffix in sample:
                return cut(resize_picture(self._open_picture(sample, suffix, plan), plan), plan)
        for suffix in VIDEO_SUFFIXES:
            if suffix in sample:
                return cut(decode_frames(sample[suffix], plan, window.start, len(window), suffix), plan)
        raise DamagedSample(f"no target: none of {PICTURE_SUFFIXES + VIDEO_SUFFIXES} in the sample")

    def _open_picture(self, sample: dict, suffix: str, plan: CropPlan) -> Image.Image:
        picture = decode_picture(sample[suffix], suffix)
        if picture.size != plan.source:
            raise DamagedSample(f"{suffix} measures {picture.size}, json says {plan.source}")
        return picture

    def choose_references(self, available: int, generator: torch.Generator) -> list[int]:
        """Which of the stored references are shown, in stored order."""
        if not available:
            raise DamagedSample("no reference picture")
        if not self.random_window or available == 1:
            return list(range(min(available, self.num_references)))
        return sorted(torch.randperm(available, generator=generator)[: self.num_references].tolist())

    def references(self, sample: dict, meta: dict, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """-> pictures (R, 3, S, S) uint8, landmarks (R, 5, 2), mask (R,)."""
        size, padded = self.reference_size, self.num_references
        squares, landmarks = [], np.zeros((padded, 5, 2), np.float32)
        for place, index in enumerate(chosen):
            entry = meta["references"][index]
            if entry["file"] not in sample:
                raise DamagedSample(f"{entry['file']} is missing")
            picture = decode_picture(sample[entry["file"]], entry["file"])
            square, landmarks[place] = square_reference(picture, entry, size)
            squares.append(square)
        squares += [np.zeros_like(squares[0])] * (padded - len(chosen))
        pictures = squares[0][None] if padded == 1 else np.stack(squares)
        mask = torch.tensor([place < len(chosen) for place in range(padded)])
        return as_tensor(pictures), torch.from_numpy(landmarks), mask

    def cached_latents(self, sample: dict) -> Tensor | None:
        """-> (F', 2C, h, w): mean, then log-variance."""
        tensors = read_tensors(sample, "latents.safetensors")
        if tensors is None:
            return None
        mean, logvar = (_required(tensors, name, "latents.safetensors") for name in ("mean", "logvar"))
        found = (mean.shape[0], *mean.shape[2:])
        if found != self.latent_shape or mean.shape != logvar.shape:
            raise ValueError(
                f"{sample['__key__']}.latents.safetensors: mean {tuple(mean.shape)}, logvar {tuple(logvar.shape)}, but "
                f"{self.num_frames} frames of {self.target[1]}x{self.target[0]} need (F', h, w) = {self.latent_shape}; "
                "cache the latents at this size, train at theirs, or remove them."
            )
        return torch.cat([mean, logvar], 1).float()

    def cached_face(self, sample: dict, chosen: list[int], available: int) -> dict[str, Tensor] | None:
        """The chosen references' features, padded to R with zeros."""
        tensors = read_tensors(sample, "face.safetensors")
        if tensors is None:
            return None
        features = {}
        for name in ("last_hidden_state", "penultimate_hidden_state", "id_query"):
            stored = _required(tensors, name, "face.safetensors")
            if len(stored) != available:
                raise ValueError(
                    f"{sample['__key__']}.face.safetensors: {name} {tuple(stored.shape)} for {available} references; "
                    "cache the features again or remove them."
                )
            features[name] = stored.new_zeros(self.num_references, *stored.shape[1:])
            features[name][: len(chosen)] = stored[chosen]
        return features


def compare_cache(name: str, wanted: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Names of models are for people and not compared; fingerprints of weights only where both are known.

    Raises:
        ValueError: something else is recorded than wanted, or nothing.
    """
    for key, value in wanted.items():
        found = recorded.get(key)
        unknown = key == "weights" and None in (found, value)
        if key != "model" and not unknown and found != value:
            raise ValueError(
                f"{name} is stale: {key} is {found!r} in its record ({recorded.get('model', 'no model')}), but "
                f"{value!r} in cache_id ({wanted.get('model', 'no model')}); cache the tensors again with "
                "`python -m mm_lightning.prepare` (the miniature's: `python -m mm_lightning.miniature.cache`), or take "
                "them out of the shards."
            )


def square_reference(picture: Image.Image, entry: dict, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The square of the shortest side that holds the face, resized -> (S, S, 3) uint8, landmarks (5, 2)."""
    side = min(picture.size)
    x, y = (
        crop_offset(length, side, [entry["box"][axis], entry["box"][axis + 2]])
        for axis, length in enumerate(picture.size)
    )
    square = picture.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))
    landmarks = np.array(entry["landmarks"], np.float32) + np.float32(0.5) - np.float32([x, y])
    return np.asarray(square), landmarks * np.float32(size / side) - np.float32(0.5)


# Fields of a sample


def read_key(sample: dict) -> str:
    """Raises DamagedSample where the tar's name of the sample is not UTF-8."""
    key = sample["__key__"]
    try:
        key.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DamagedSample(f"the name {key!r} is not UTF-8") from error
    return key


def read_meta(sample: dict) -> dict:
    """Raises DamagedSample where `json` is missing, cut short, or lacks what is read here or holds it as another type.

    Sizes and num_frames are int, of faces and references the boxes (4,) and landmarks (5, 2) finite numbers.
    """
    try:
        meta = json.loads(sample["json"])
        sizes = {name: _whole(meta[name], name) for name in ("width", "height", "num_frames")}
        lists = {name: meta[name] for name in ("faces", "references")}
        meta = {**sizes, **lists, "cache": dict(meta.get("cache") or {})}
        for face in [*filter(None, meta["faces"]), *meta["references"]]:
            _check_points(face["box"], "box", (4,))
            _check_points(face["landmarks"], "landmarks", (5, 2))
        for reference in meta["references"]:
            if not isinstance(reference["file"], str):
                raise ValueError(f"file {reference['file']!r} of a reference is no name")
        if len(meta["faces"]) != meta["num_frames"]:
            raise ValueError(f"faces of {len(meta['faces'])} frames, num_frames {meta['num_frames']}")
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedSample(f"json cannot be used ({_first_line(error)})") from error
    return meta


def _whole(value: Any, name: str) -> int:
    if type(value) not in (int, float) or not 0 < value < MAX_SIDE or value != int(value):
        raise ValueError(f"{name} {value!r} is no whole number from 1 to {MAX_SIDE}")
    return int(value)


def _check_points(value: Any, name: str, shape: tuple[int, ...]) -> None:
    points = np.asarray(value)
    if points.shape != shape or points.dtype.kind not in "if" or not (np.abs(points) < MAX_SIDE).all():
        raise ValueError(f"{name} of shape {points.shape}, type {points.dtype}; finite numbers {shape} are wanted")


def read_text(sample: dict) -> str:
    try:
        return sample["txt"].decode("utf-8").strip()
    except (KeyError, UnicodeDecodeError) as error:
        raise DamagedSample(f"txt cannot be read ({_first_line(error)})") from error


def read_faces(meta: dict, window: range) -> Faces:
    """Faces of the window's frames, in pixels of the stored target."""
    boxes, landmarks = np.zeros((len(window), 4), np.float32), np.zeros((len(window), 5, 2), np.float32)
    for row, frame in enumerate(window):
        if face := meta["faces"][frame]:
            boxes[row], landmarks[row] = face["box"], face["landmarks"]
    return Faces(torch.from_numpy(boxes), torch.from_numpy(landmarks))


def read_tensors(sample: dict, name: str) -> dict[str, Tensor] | None:
    """A cached safetensors field, None where there is none."""
    if name not in sample:
        return None
    try:
        return load_safetensors(sample[name])
    except (SafetensorError, ValueError) as error:
        raise DamagedSample(f"{name} cannot be read ({_first_line(error)})") from error


def cached_text(sample: dict) -> dict[str, Tensor] | None:
    """-> prompt_embeds (T, D) and id_token_mask (T,)."""
    tensors = read_tensors(sample, "text.safetensors")
    if tensors is None:
        return None
    return {name: _required(tensors, name, "text.safetensors") for name in TextFeatures._fields}


def _required(tensors: dict[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise DamagedSample(f"{name} lacks {key!r}, it holds {sorted(tensors)}")
    return tensors[key]


# Samples -> Batch


def collate(samples: list[Sample], slot: Slot | None = None) -> Batch:
    """Stacks samples; bytes of pictures into `slot`, if it is given.

    Raises:
        ValueError: cached tensors in some samples and not in others, or of different shapes.
    """
    text = stack_cached(samples, "text")
    face = stack_cached(samples, "face")
    mask = torch.stack([s.reference_mask for s in samples])
    return Batch(
        keys=[s.key for s in samples],
        captions=[s.caption for s in samples],
        pixels=stack_optional(samples, "pixels", slot),
        latent_moments=stack_optional(samples, "latent_moments"),
        face_boxes=torch.stack([s.face_boxes for s in samples]),
        face_landmarks=torch.stack([s.face_landmarks for s in samples]),
        references=_stack(samples, [s.references for s in samples], "references", slot),
        reference_landmarks=torch.stack([s.reference_landmarks for s in samples]),
        reference_mask=mask,
        text=text and TextFeatures(text["prompt_embeds"], text["id_token_mask"].bool()),
        face=face and FaceFeatures(**face, reference_mask=mask),
        weights=torch.tensor([s.weight for s in samples]),
    )


def stack_optional(samples: list[Sample], name: str, slot: Slot | None = None) -> Tensor | None:
    """Stacks a tensor that all samples have or none has."""
    values = [getattr(sample, name) for sample in samples]
    return _stack(samples, values, name, slot) if _all_or_none(samples, values, name) else None


def stack_cached(samples: list[Sample], name: str) -> dict[str, Tensor] | None:
    """Stacks a dict of cached tensors that all samples have or none has."""
    values = [getattr(sample, name) for sample in samples]
    if not _all_or_none(samples, values, name):
        return None
    return {part: _stack(samples, [value[part] for value in values], f"{name}.{part}") for part in values[0]}


def _all_or_none(samples: list[Sample], values: list, name: str) -> bool:
    present = [s.key for s, value in zip(samples, values, strict=True) if value is not None]
    absent = [s.key for s, value in zip(samples, values, strict=True) if value is None]
    if present and absent:
        raise ValueError(
            f"{name}: there for {present[:3]} but not for {absent[:3]}: one batch cannot mix cached and uncached "
            "samples; cache the tensors of all shards, or of none."
        )
    return not absent


def _stack(samples: list[Sample], values: list[Tensor], name: str, slot: Slot | None = None) -> Tensor:
    if len({value.shape for value in values}) > 1:
        shapes = {s.key: tuple(value.shape) for s, value in zip(samples, values, strict=True)}
        raise ValueError(f"{name}: different shapes in one batch: {shapes}; cache all of them with the same settings.")
    if values[0].dtype == torch.uint8 and values[0].ndim == 4:
        return _stack_pictures(values, slot)
    return default_collate(values)  # within a worker straight into shared memory


def _stack_pictures(values: list[Tensor], slot: Slot | None) -> Tensor:
    """(F, 3, H, W) uint8 each -> (B, F, 3, H, W), channels last in memory as they were."""
    if len(values) == 1 and get_worker_info() is None:
        return values[0][None]
    rows = [value.permute(0, 2, 3, 1) for value in values]
    room = slot and slot.empty((len(rows), *rows[0].shape))
    stacked = default_collate(rows) if room is None else torch.stack(rows, out=room)
    return stacked.permute(0, 1, 4, 2, 3)

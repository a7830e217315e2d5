"""How good the small backbone is: what its VAE keeps of a face, and whether its clips show what the prompt says.

    python -m mm_lightning.miniature.quality --model mm_lightning/miniature/assets/model
    python -m mm_lightning.miniature.quality --only-vae --model outputs/miniature_model  # before there is a transformer

On held-out people: the VAE's reconstructions beside the originals, and clips by the captions of the split from
diffusers' plain CogVideoXPipeline, without any adapter. dlib finds and compares the faces, the judge (see `judge`)
recognises class, action and background. What was computed is kept under --work: an interrupted run goes on.

Letters: K clips, F frames, N pictures, H W pixels, F' latent frames, C latent channels, h w latent pixels.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from numpy.typing import NDArray
from tqdm import tqdm

from mm_lightning.backbone import Backbone
from mm_lightning.devices import find_device
from mm_lightning.encoders.recognizer import FaceRecognizer, load_recognizer
from mm_lightning.encoders.text import IdentityTokenizer, TextEncoder
from mm_lightning.files import write_bytes, write_json
from mm_lightning.media import SheetRow, contact_sheet, to_uint8, write_jpeg
from mm_lightning.miniature import figures
from mm_lightning.miniature.data import Items, load_split, to_float
from mm_lightning.miniature.detection import Detections, detect
from mm_lightning.miniature.judge import Judge, chance, judge_folder_of, labels_of, top_1
from mm_lightning.miniature.measure import embed
from mm_lightning.miniature.sampling import fingerprint
from mm_lightning.miniature.sheet import DISCLOSURE
from mm_lightning.miniature.table import ASSETS, Cache
from mm_lightning.module import sample_generators
from mm_lightning.preview import build_pipeline, decode_latents, generate_latents
from mm_lightning.types import IdentityCondition

SAME_PERSON = 0.6  # dlib's threshold, Euclidean
NUM_EMBEDDED = 4  # frames of a clip whose face is embedded
NUM_SHOWN, FRAMES_SHOWN = 8, 4  # on the contact sheet


class Bar(NamedTuple):
    """One figure and what is asked of it."""

    name: str
    value: float
    low: float | None = None  # the least that passes
    high: float | None = None  # the most that passes
    real: float | None = None  # the same of the real clips
    chance: float | None = None

    @property
    def passed(self) -> bool | None:
        """None where nothing is asked; a value that could not be measured (NaN) passes nothing."""
        if self.low is None and self.high is None:
            return None
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)


class HeldOut(NamedTuple):
    """People whom no part of the miniature was trained on."""

    names: list[str]  # K, of the clips
    captions: list[str]  # K
    clips: NDArray[np.uint8]  # (K, F, H, W, 3)
    clip_landmarks: NDArray[np.float32]  # (K, F, 5, 2), rendered
    stills: NDArray[np.uint8]  # (N, H, W, 3)
    still_landmarks: NDArray[np.float32]  # (N, 5, 2), rendered


def read_held_out(people: Path, split: str, num_clips: int) -> HeldOut:
    """The first clips of a split, and as many people's stills.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: it holds fewer clips.
    """
    tensors = load_split(people, split)
    if num_clips > len(tensors.clips.keys):
        raise ValueError(f"--num-clips={num_clips}: {people / split} holds {len(tensors.clips.keys)} clips.")
    clips = Items(*(values[:num_clips] for values in tensors.clips))
    shown = torch.isin(tensors.stills.person, clips.person)
    return HeldOut(
        names=clips.keys,
        captions=[said.caption for said in clips.words],
        clips=clips.pixels.movedim(-3, -1).numpy(),
        clip_landmarks=clips.landmarks.numpy(),
        stills=tensors.stills.pixels[shown, 0].movedim(-3, -1).numpy(),
        still_landmarks=tensors.stills.landmarks[shown, 0].numpy(),
    )


def to_pixels(frames: NDArray[np.uint8]) -> torch.Tensor:
    """(..., H, W, 3) bytes -> (..., 3, H, W) in [-1, 1]."""
    return to_float(torch.from_numpy(frames).movedim(-1, -3))


def psnr(original: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB of each picture or clip, (N, ...) -> (N,)."""
    difference = original.astype(np.float64) - other
    return 10 * np.log10(255**2 / np.square(difference).reshape(len(original), -1).mean(1).clip(1e-10))


def join_frames(clips: NDArray, stills: NDArray) -> NDArray:
    """(K, F, ...) and (N, ...) -> (K * F + N, ...)."""
    return np.concatenate([clips.reshape(-1, *clips.shape[2:]), stills])


def share_with_face(detections: Detections) -> float:
    """Share of the clips with a face in more than half of their frames, of fields (K, F, ...)."""
    return float((detections.found.mean(1) > 0.5).mean())


def mean_motion(detections: Detections, height: int, width: int) -> float:
    """Mean FM_inter of the clips in which two frames or more show a face, of fields (K, F, ...)."""
    landmarks = np.where(detections.found[..., None, None], detections.landmarks, np.nan).astype(np.float64)
    sampled = figures.sample_frames(landmarks.shape[1])
    return figures.mean_of_known([figures.fm_inter(clip[sampled], height, width) for clip in landmarks])


class VaeQuality:
    """What the VAE keeps, made on demand; reconstructions are kept. Arguments as those of the command.

    Raises:
        FileNotFoundError, ValueError: a folder is missing or something else, before a weight is read.
    """

    titles: tuple[str, ...] = ("real clip", "reconstructed")

    def __init__(
        self,
        people: Path,
        model: Path,
        work: Path,
        split: str = "test",
        num_clips: int = 64,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        num_workers: int = 2,
    ) -> None:
        for name, value in (("--num-clips", num_clips), ("--batch-size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: give a number from 1.")
        if not (model / "vae/config.json").is_file():
            raise FileNotFoundError(f"{model} holds no vae/: `python train.py experiment=miniature_vae` writes one.")
        self.people, self.split, self.model = people, split, model
        self.batch_size, self.device, self.num_workers = batch_size, device, num_workers
        self.held_out = read_held_out(people, split, num_clips)
        settings = fingerprint(model / "vae", people / split / "videos" / "index.json", num_clips)
        self.vae_cache = Cache(work / f"{split}-vae-{settings}")

    @property
    def settings(self) -> dict[str, Any]:
        """What the figures depend on, for the record."""
        return {"model": str(self.model), "split": self.split, "num_clips": len(self.held_out.names)}

    @cached_property
    def vae(self) -> AutoencoderKLCogVideoX:
        vae = AutoencoderKLCogVideoX.from_pretrained(self.model, subfolder="vae", torch_dtype=torch.float32)
        return vae.eval().to(self.device)

    @cached_property
    def recognizer(self) -> FaceRecognizer:
        return load_recognizer("dlib").to(self.device)

    def in_batches(
        self, name: str, num_items: int, make: Callable[[slice], NDArray[np.uint8]], cache: Cache
    ) -> NDArray[np.uint8]:
        """`make(slice)` for every batch, kept in a file each, in one array."""
        parts, starts = [], range(0, num_items, self.batch_size)
        for start in tqdm(starts, desc=name, unit="batch"):
            rows = slice(start, start + self.batch_size)
            stored = cache.get(f"{name}-{self.batch_size}-{start:05d}", lambda rows=rows: {"frames": make(rows)})
            parts.append(stored["frames"])
        return np.concatenate(parts)

    @torch.no_grad()
    def reconstruct_rows(self, clips: NDArray[np.uint8], rows: slice) -> NDArray[np.uint8]:
        """Some of (K, F, H, W, 3) through the VAE's mean and back."""
        posterior = self.vae.encode(to_pixels(clips[rows]).to(self.device).transpose(1, 2)).latent_dist
        mean = posterior.mean.transpose(1, 2)  # (K, F', C, h, w)
        return to_uint8(decode_latents(self.vae, mean * self.vae.config.scaling_factor))

    @cached_property
    def reconstructed_clips(self) -> NDArray[np.uint8]:
        clips = self.held_out.clips
        make = functools.partial(self.reconstruct_rows, clips)
        return self.in_batches("reconstructed clips", len(clips), make, self.vae_cache)

    @cached_property
    def reconstructed_stills(self) -> NDArray[np.uint8]:
        stills = self.held_out.stills[:, None]
        make = functools.partial(self.reconstruct_rows, stills)
        return self.in_batches("reconstructed stills", len(stills), make, self.vae_cache)[:, 0]

    def face_distance(self, a: NDArray[np.uint8], b: NDArray[np.uint8], landmarks: NDArray) -> NDArray[np.float64]:
        """Euclidean distance of dlib's embeddings of the same face in two versions of N pictures: (N,)."""
        both = [embed(pictures, landmarks, np.ones(len(pictures), bool), self.recognizer) for pictures in (a, b)]
        return np.linalg.norm(both[0] - both[1], axis=1)

    def bars(self) -> list[Bar]:
        held_out = self.held_out
        frames = figures.sample_frames(held_out.clips.shape[1], NUM_EMBEDDED)
        originals = join_frames(held_out.clips[:, frames], held_out.stills)
        reconstructed = join_frames(self.reconstructed_clips[:, frames], self.reconstructed_stills)
        landmarks = join_frames(held_out.clip_landmarks[:, frames], held_out.still_landmarks)
        distance = self.face_distance(originals, reconstructed, landmarks)
        found = [float(detect(pictures, self.num_workers).found.mean()) for pictures in (reconstructed, originals)]
        return [
            Bar("VAE: PSNR of clips, dB", float(psnr(held_out.clips, self.reconstructed_clips).mean()), low=28.0),
            Bar("VAE: PSNR of stills, dB", float(psnr(held_out.stills, self.reconstructed_stills).mean())),
            Bar("VAE: same person to dlib", float((distance < SAME_PERSON).mean()), low=0.95),
            Bar("VAE: dlib's distance to the original", float(distance.mean())),
            Bar("VAE: frames with a face", found[0], real=found[1]),
        ]

    def shown_clips(self) -> tuple[NDArray[np.uint8], ...]:
        """A column of the contact sheet each, (K, F, H, W, 3)."""
        return self.held_out.clips, self.reconstructed_clips

    def sheet_rows(self) -> list[SheetRow]:
        held_out, clips = self.held_out, self.shown_clips()
        chosen = figures.sample_frames(len(held_out.clips), NUM_SHOWN)
        return [SheetRow(held_out.captions[i], held_out.clips[i, 0], tuple(part[i] for part in clips)) for i in chosen]


class Quality(VaeQuality):
    """The VAE, and the clips that the transformer makes of captions.

    Raises:
        FileNotFoundError, ValueError: a folder is missing or something else, before a weight is read.
    """

    titles = ("real clip", "reconstructed", "generated")

    def __init__(
        self,
        people: Path,
        model: Path,
        judge: Path,
        work: Path,
        split: str = "test",
        num_clips: int = 64,
        steps: int = 25,
        guidance: float = 2.0,
        seed: int = 0,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        num_workers: int = 2,
    ) -> None:
        if steps < 1:
            raise ValueError(f"--steps={steps}: give a number from 1.")
        Judge.check(model, judge)
        super().__init__(people, model, work, split, num_clips, batch_size, device, num_workers)
        self.judge_folder, self.steps, self.guidance, self.seed = judge, steps, guidance, seed
        settings = fingerprint(model, people / split / "videos" / "index.json", num_clips, steps, guidance, seed)
        self.cache = Cache(work / f"{split}-{settings}")

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"steps": self.steps, "guidance": self.guidance, "seed": self.seed}

    @cached_property
    def backbone(self) -> Backbone:
        return Backbone.from_pretrained(self.model, torch.float32).to(self.device)

    @property
    def vae(self) -> AutoencoderKLCogVideoX:
        return self.backbone.vae

    @cached_property
    def judge(self) -> Judge:
        """Its classifiers are trained here, on the real clips of the train people."""
        judge = Judge.from_pretrained(self.model, self.judge_folder).to(self.device)
        clips = load_split(self.people, "train").clips
        return judge.fit(clips.pixels.movedim(-3, -1).numpy(), [said.caption for said in clips.words])

    @cached_property
    def text(self) -> TextEncoder:
        max_length = self.backbone.transformer_config.max_text_seq_length
        return TextEncoder(self.backbone.text_encoder, IdentityTokenizer(self.backbone.tokenizer, max_length))

    @torch.no_grad()
    def generate(self, rows: slice) -> NDArray[np.uint8]:
        """Clips by the captions of these rows; the noise of each follows from its name."""
        held_out, config = self.held_out, self.backbone.vae_config
        captions, names = held_out.captions[rows], held_out.names[rows]
        _, num_frames, height, width, _ = held_out.clips.shape
        ratio = self.backbone.vae_scale_factor_spatial
        num_latent_frames = 1 + (num_frames - 1) // self.backbone.vae_scale_factor_temporal
        latents = generate_latents(
            build_pipeline(self.backbone, self.backbone.transformer),
            torch.Size((len(names), num_latent_frames, config.latent_channels, height // ratio, width // ratio)),
            IdentityCondition(self.text(captions).prompt_embeds, face_hidden_states=None, id_embed=None),
            self.text.null_prompt_embeds(),
            self.steps,
            self.guidance,
            sample_generators(self.seed, -1, names),
        )
        return to_uint8(decode_latents(self.backbone.vae, latents))

    @cached_property
    def generated(self) -> NDArray[np.uint8]:
        return self.in_batches("generated clips", len(self.held_out.clips), self.generate, self.cache)

    # What is found in it ----------------------------------------------------------------------------------------------

    def detect(self, clips: NDArray[np.uint8], name: str) -> Detections:
        """Of every frame of (K, F, H, W, 3); the fields are (K, F, ...)."""
        frames = clips.reshape(-1, *clips.shape[2:])
        found = detect(frames, self.num_workers, progress=f"faces in {name}")
        return Detections(*(values.reshape(*clips.shape[:2], *values.shape[1:]) for values in found))

    def bars(self) -> list[Bar]:
        return [*super().bars(), *self.generation_bars()]

    def shown_clips(self) -> tuple[NDArray[np.uint8], ...]:
        return *super().shown_clips(), self.generated

    def generation_bars(self) -> list[Bar]:
        real = self.detect(self.held_out.clips, "real clips")
        generated = self.detect(self.generated, "generated clips")
        size = self.held_out.clips.shape[2:4]
        moved_real, moved = mean_motion(real, *size), mean_motion(generated, *size)
        with_face, with_face_real = share_with_face(generated), share_with_face(real)
        return [
            Bar("clips with a face in most frames", with_face, low=0.85, real=with_face_real),
            Bar("frames with a face", float(generated.found.mean()), real=float(real.found.mean())),
            Bar("FM_inter", moved, low=0.7 * moved_real, high=1.3 * moved_real, real=moved_real),
            *self.recognition_bars(),
        ]

    def recognition_bars(self) -> list[Bar]:
        """A clip counts where the judge's first choice is in its prompt. The bar lies half of the way from chance to
        what the judge reaches on the real clips."""
        captions, judge = self.held_out.captions, self.judge
        asked, bars = labels_of(captions), []
        scores_real = judge.recognise(judge.features(self.held_out.clips))
        scores = judge.recognise(judge.features(self.generated))
        for name, labels in asked.items():
            real, by_chance = top_1(scores_real[name], labels), chance(scores[name], labels)
            low = (by_chance + real) / 2
            right = top_1(scores[name], labels)
            bars.append(Bar(f"{name.replace('_', ' ')} recognised", right, low=low, real=real, chance=by_chance))
        aligned, aligned_real = (
            float(judge.text_alignment(clips, captions).mean()) for clips in (self.generated, self.held_out.clips)
        )
        return [*bars, Bar("text alignment, cosine", aligned, real=aligned_real)]


# Results --------------------------------------------------------------------------------------------------------------


def format_bars(bars: Sequence[Bar]) -> str:
    """A Markdown table."""
    lines = ["| figure | value | bar | real clips | chance | |", "|---|---|---|---|---|---|"]
    for bar in bars:
        asked = ", ".join(f"{sign} {v:.3f}" for sign, v in (("≥", bar.low), ("≤", bar.high)) if v is not None)
        verdict = {None: "", True: "pass", False: "FAIL"}[bar.passed]
        others = (format_value(value) for value in (bar.real, bar.chance))
        lines.append(f"| {bar.name} | {format_value(bar.value)} | {asked} | {' | '.join(others)} | {verdict} |")
    return "\n".join([*lines, ""])


def format_value(value: float | None) -> str:
    return "" if value is None else "-" if math.isnan(value) else f"{value:.3f}"


def describe(bar: Bar) -> dict[str, object]:
    """For JSON: NaN becomes null."""
    values = {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in bar._asdict().items()}
    return values | {"passed": bar.passed}


def run(quality: VaeQuality, out: Path) -> list[Bar]:
    """Everything: figures and the contact sheet into `out`."""
    bars = quality.bars()
    out.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(
        quality.sheet_rows(),
        quality.titles,
        figures.sample_frames(quality.held_out.clips.shape[1], FRAMES_SHOWN),
        height=2 * quality.held_out.clips.shape[2],
    )
    write_jpeg(out / "quality.jpg", sheet, DISCLOSURE)
    write_bytes(out / "quality.md", format_bars(bars).encode())
    write_json(out / "quality.json", {"settings": quality.settings, "figures": [describe(bar) for bar in bars]})
    return bars


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m mm_lightning.miniature.quality", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--people", type=Path, default=Path("data/miniature/people"))
    parser.add_argument("--model", type=Path, default=ASSETS / "model", help="the backbone in diffusers' layout")
    parser.add_argument("--judge", type=Path, help="default: judge/ beside the model")
    parser.add_argument("--only-vae", action="store_true", help="judge vae/ alone; there may be nothing else yet")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--num-clips", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes that look for faces")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/miniature_quality"))
    parser.add_argument("--work", type=Path, default=Path("data/miniature/quality"), help="clips, kept")
    return parser, parser.parse_args(arguments)


def build_quality(args: argparse.Namespace) -> VaeQuality:
    common = {"people": args.people, "model": args.model, "work": args.work, "split": args.split}
    common |= {"num_clips": args.num_clips, "batch_size": args.batch_size, "num_workers": args.workers}
    common["device"] = find_device(args.device)
    if args.only_vae:
        return VaeQuality(**common)
    judge = args.judge or judge_folder_of(args.model)
    return Quality(judge=judge, steps=args.steps, guidance=args.guidance, seed=args.seed, **common)


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 1 where a bar is missed, 2 for a user's mistake."""
    parser, args = parse(arguments)
    try:
        bars = run(build_quality(args), args.out)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(format_bars(bars))
    print(f"Contact sheet and figures: {args.out}")
    return int(any(bar.passed is False for bar in bars))


if __name__ == "__main__":
    sys.exit(main())

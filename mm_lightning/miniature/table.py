"""The table of the miniature: whose face is it, and does it move? Zero-shot, on people who were never trained on.

    python -m mm_lightning.miniature.table --adapter outputs/miniature_stage2/latest/adapter

For each test person a clip by the prompt of one of its own clips, from its first stills, once with the adapter and once
by the backbone alone, from the same noise. What the VAE leaves of a real clip is the most that either can reach. dlib
finds and embeds the faces; a clip is compared with the *other* stills of all test people. dlib is also the recogniser
of the condition and of the identity loss. A judge beside the model, where there is one, says how well a clip shows its
prompt.
Clips and faces are kept under --work: an interrupted run goes on, and what another run has made is not made again.

Letters: B clips of a batch, F frames, H W pixels.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mm_lightning.adapters.weights import read_adapter_config
from mm_lightning.backbone import Backbone
from mm_lightning.devices import find_device
from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.files import write_bytes, write_json
from mm_lightning.media import SheetRow, animation, contact_sheet, encode_gif, to_uint8, write_jpeg
from mm_lightning.miniature import figures
from mm_lightning.miniature.judge import Judge, judge_folder_of
from mm_lightning.miniature.layout import set_digest
from mm_lightning.miniature.measure import (
    ClipFaces,
    ClipFigures,
    Gallery,
    build_gallery,
    clip_figures,
    measure_clips,
)
from mm_lightning.miniature.sampling import (
    Sampling,
    Subject,
    fingerprint,
    generate_clips,
    join_batches,
    load_miniature,
    read_subjects,
    split_references,
)
from mm_lightning.miniature.sheet import DISCLOSURE, log_pictures
from mm_lightning.preview import decode_latents

REAL, RESTORED, FULL, ALONE = "real clips", "through the VAE", "full model", "backbone alone"
GENERATED = (FULL, ALONE)
ASSETS = Path("mm_lightning/miniature/assets")
DEFAULTS = Sampling()
NUM_SHOWN = 8  # people on the contact sheet
FRAMES_SHOWN = 4
FPS = 8.0
COLUMNS = {
    "top1": "top-1",
    "top5": "top-5",
    "margin": "own - others",
    "own": "similarity",
    "decay": "decay",
    "face_found": "face found",
    "fm_ref": "FM_ref",
    "fm_inter": "FM_inter",
    "text": "text",
    "colour_drift": "colour drift",
    "num_faceless": "faceless clips",
}
SHARES = ("top1", "top5", "face_found")


class Row(NamedTuple):
    """The clips of one line of the table."""

    name: str
    clips: list[NDArray[np.uint8]]  # (F, H, W, 3)
    faces: list[ClipFaces]


class Cache:
    """Arrays of one line of the table, a file for each batch, so that nothing is made twice.

    Args:
        folder: named after all that the arrays follow from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, make: Callable[[], dict[str, NDArray]]) -> dict[str, NDArray]:
        """The arrays of that name, made only if they are not there."""
        file = self.folder / f"{name}.npz"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **make())
            write_bytes(file, buffer.getvalue())
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)


class Table:
    """All that the figures are computed from, made on demand. Arguments as those of the command."""

    def __init__(
        self,
        people: Path,
        model: Path,
        adapter: Path | None,
        work: Path,
        split: str = "test",
        num_people: int = 64,
        clips_per_person: int = 1,
        sampling: Sampling = DEFAULTS,
        num_embedded: int = 4,
        batch_size: int = 16,
        device: str | torch.device = "cpu",
        num_workers: int = 2,
    ) -> None:
        for name, value in (("--num-people", num_people), ("--clips-per-person", clips_per_person)):
            if value < 1:
                raise ValueError(f"{name}={value}: give a number from 1.")
        if adapter is not None:
            read_adapter_config(adapter)
        self.model, self.adapter, self.work = model, adapter, work
        self.sampling, self.num_embedded, self.batch_size = sampling, num_embedded, batch_size
        self.device, self.num_workers = device, num_workers
        self.subjects = read_subjects(people / split / "videos", num_people, clips_per_person)
        for subject in self.subjects:
            split_references(subject.batch, sampling.num_references)
        self.names = [f"{subject.key}/{i % clips_per_person}" for i, subject in enumerate(self.subjects)]
        self.data_id = fingerprint(set_digest(people / split / "videos"), self.names, batch_size)
        self.model_id = fingerprint(model)

    @cached_property
    def judge(self) -> Judge | None:
        """What tells whether a clip shows its prompt, where one lies beside the model."""
        folder = judge_folder_of(self.model)
        return Judge.from_pretrained(self.model, folder).to(self.device) if folder.is_dir() else None

    @cached_property
    def module(self) -> Any:
        return load_miniature(self.model, self.adapter, self.device)

    @cached_property
    def recognizer(self) -> Any:
        return load_recognizer("dlib").to(self.device)

    @cached_property
    def gallery(self) -> Gallery:
        return build_gallery(self.subjects, self.sampling.num_references, self.recognizer, self.num_workers)

    @property
    def row_names(self) -> list[str]:
        return [REAL, RESTORED, ALONE] if self.adapter is None else [REAL, RESTORED, FULL, ALONE]

    def batches(self) -> list[range]:
        starts = range(0, len(self.subjects), self.batch_size)
        return [range(start, min(start + self.batch_size, len(self.subjects))) for start in starts]

    def cache(self, row: str) -> Cache:
        made_from: tuple[Any, ...] = (row, self.data_id)
        if row != REAL:
            made_from += (self.model_id,)
        if row in GENERATED:
            made_from += (tuple(self.sampling),)
        if row == FULL:
            made_from += (fingerprint(self.adapter),)
        return Cache(self.work / f"{row.replace(' ', '-')}-{fingerprint(*made_from)}")

    def clips(self, row: str) -> list[NDArray[np.uint8]]:
        """Each (F, H, W, 3), in the order of the subjects."""
        cache, clips = self.cache(row), []
        for i, rows in enumerate(tqdm(self.batches(), desc=f"{row}: clips", unit="batch")):
            stored = cache.get(f"clips-{i:04d}", lambda rows=rows: {"frames": self.make_clips(row, rows)})
            clips += list(stored["frames"])
        return clips

    def make_clips(self, row: str, rows: Sequence[int]) -> NDArray[np.uint8]:
        subjects = [self.subjects[i] for i in rows]
        if row not in GENERATED:
            clips = torch.cat([real_clip(subject) for subject in subjects])
            return to_uint8(clips if row == REAL else through_vae(self.module.backbone, clips.to(self.device)))
        names = [self.names[i] for i in rows]
        batch = join_batches([subject.batch for subject in subjects])
        return generate_clips(self.module, batch, names, self.sampling, with_identity=row == FULL)

    def measured(self, row: str) -> Row:
        clips, cache, faces = self.clips(row), self.cache(row), []
        for i, rows in enumerate(tqdm(self.batches(), desc=f"{row}: faces", unit="batch")):
            chosen = [clips[j] for j in rows]
            stored = cache.get(f"faces-{self.num_embedded}-{i:04d}", lambda chosen=chosen: self.make_faces(chosen))
            faces += [ClipFaces(*parts) for parts in zip(*(stored[name] for name in ClipFaces._fields), strict=True)]
        return Row(row, clips, faces)

    def make_faces(self, clips: list[NDArray[np.uint8]]) -> dict[str, NDArray]:
        faces = measure_clips(clips, self.recognizer, self.num_embedded, self.num_workers)
        return {name: np.stack([getattr(face, name) for face in faces]) for name in ClipFaces._fields}

    def figures(self, row: Row) -> list[ClipFigures]:
        people = [subject.person for subject in self.subjects]
        parts = zip(row.clips, row.faces, people, self.text_alignment(row.clips), strict=True)
        return [clip_figures(clip, faces, self.gallery, who)._replace(text=text) for clip, faces, who, text in parts]

    def text_alignment(self, clips: list[NDArray[np.uint8]]) -> list[float]:
        """Of each clip with its prompt, NaN without a judge."""
        if self.judge is None:
            return [math.nan] * len(clips)
        prompts = [subject.batch.captions[0] for subject in self.subjects]
        return self.judge.text_alignment(np.stack(clips), prompts).astype(float).tolist()


def real_clip(subject: Subject) -> torch.Tensor:
    """(1, F, 3, H, W) in [-1, 1].

    Raises:
        ValueError: the set holds cached latents in place of pictures.
    """
    if subject.batch.pixels is None:
        raise ValueError(f"Sample {subject.key} has cached latents and no pictures: give the people's own shards.")
    return subject.batch.pixels


@torch.no_grad()
def through_vae(backbone: Backbone, clips: torch.Tensor) -> torch.Tensor:
    """(B, F, 3, H, W) in [-1, 1] -> the same from the means of their latents."""
    mean, _ = backbone.encode_video(clips).chunk(2, dim=2)
    return decode_latents(backbone.vae, mean * backbone.vae_config.scaling_factor)


# Figures --------------------------------------------------------------------------------------------------------------


def summarize(clips: Sequence[ClipFigures]) -> dict[str, float]:
    """A line of the table: means over the clips in which a figure is known, shares over all clips."""
    ranks = [clip.rank for clip in clips]
    means = ("own", "margin", "decay", "face_found", "fm_ref", "fm_inter", "text", "colour_drift")
    summary = {name: figures.mean_of_known([getattr(clip, name) for clip in clips]) for name in means}
    summary |= {"top1": figures.top_share(ranks, 1), "top5": figures.top_share(ranks, 5)}
    return summary | {"num_clips": len(clips), "num_faceless": sum(clip.face_found == 0 for clip in clips)}


def format_table(rows: dict[str, dict[str, float]], note: str) -> str:
    """A Markdown table."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, summary in rows.items():
        lines.append(f"| {name} | " + " | ".join(format_figure(key, summary[key]) for key in COLUMNS) + " |")
    return "\n".join([*lines, "", note, ""])


def format_figure(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    if name in SHARES:
        return f"{value:.1%}"
    return f"{value:.0f}" if name == "num_faceless" else f"{value:.3f}" if name != "colour_drift" else f"{value:.1f}"


def describe(table: Table, clips_per_person: int) -> str:
    people, sampling = len(table.gallery.people), table.sampling
    return (
        f"{people} people, {clips_per_person} clip of each, by chance {1 / people:.1%} and {min(5 / people, 1):.1%}. "
        f"The model saw the first {sampling.num_references} stills of each person, compared is with the others (dlib "
        f"found no face in {table.gallery.num_undetected} of them). {sampling.steps} steps, guidance "
        f"{sampling.guidance:g}, of the identity {sampling.identity_guidance:g}, seed {sampling.seed}. dlib judges "
        "here, and the model was trained with dlib."
    )


# Pictures -------------------------------------------------------------------------------------------------------------


def sheet_rows(table: Table, generated: Sequence[Row]) -> list[SheetRow]:
    """As many people as fit, spread over all."""
    chosen = figures.sample_frames(len(table.subjects), NUM_SHOWN)
    stills = [to_uint8(table.subjects[i].batch.references[0, 0]) for i in chosen]
    captions = [f"{table.subjects[i].person}: {table.subjects[i].batch.captions[0]}" for i in chosen]
    clips = [tuple(row.clips[i] for row in generated) for i in chosen]
    return [SheetRow(*parts) for parts in zip(captions, stills, clips, strict=True)]


def write_pictures(rows: list[SheetRow], headings: list[str], out: Path, log_dir: Path | None, text: str) -> None:
    shown = figures.sample_frames(len(rows[0].clips[0]), FRAMES_SHOWN)
    height = 2 * rows[0].clips[0].shape[1]
    sheet = contact_sheet(rows, headings, shown, height)
    gif = encode_gif(animation(rows, height), FPS, DISCLOSURE)
    write_jpeg(out / "sheet.jpg", sheet, DISCLOSURE)
    write_bytes(out / "clips.gif", gif)
    if log_dir is not None:
        log_pictures(log_dir, sheet, gif, text)


# The command ----------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m mm_lightning.miniature.table", description=__doc__.split("\n")[0])
    parser.add_argument("--people", type=Path, default=Path("data/miniature/people"), help="folder with {split}/videos")
    parser.add_argument("--model", type=Path, default=ASSETS / "model", help="the backbone in diffusers' layout")
    parser.add_argument("--adapter", default=str(ASSETS / "adapter"), help="an adapter folder, or none")
    parser.add_argument("--split", default="test")
    parser.add_argument("--num-people", type=int, default=64)
    parser.add_argument("--clips-per-person", type=int, default=1)
    parser.add_argument("--references", type=int, default=DEFAULTS.num_references, help="stills shown to the model")
    parser.add_argument("--steps", type=int, default=DEFAULTS.steps)
    parser.add_argument("--guidance", type=float, default=DEFAULTS.guidance)
    parser.add_argument("--identity-guidance", type=float, default=DEFAULTS.identity_guidance)
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed)
    parser.add_argument("--embedded-frames", type=int, default=4, help="frames of a clip whose face is embedded")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes that look for faces")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/miniature_table"))
    parser.add_argument("--work", type=Path, default=Path("data/miniature/table"), help="clips and faces, kept")
    parser.add_argument("--log-dir", type=Path, help="a TensorBoard folder for sheet, clips and table")
    parser.add_argument("--generate-only", action="store_true", help="clips alone: no dlib is needed")
    return parser, parser.parse_args(arguments)


def build_table(args: argparse.Namespace) -> Table:
    return Table(
        people=args.people,
        model=args.model,
        adapter=None if args.adapter == "none" else Path(args.adapter),
        work=args.work,
        split=args.split,
        num_people=args.num_people,
        clips_per_person=args.clips_per_person,
        sampling=Sampling(args.steps, args.guidance, args.seed, args.references, args.identity_guidance),
        num_embedded=args.embedded_frames,
        batch_size=args.batch_size,
        device=find_device(args.device),
        num_workers=args.workers,
    )


def run(table: Table, out: Path, log_dir: Path | None, clips_per_person: int) -> str:
    """Everything: figures and pictures into `out`, the table as text."""
    rows = [table.measured(name) for name in table.row_names]
    by_clip = {row.name: table.figures(row) for row in rows}
    summaries = {name: summarize(clips) for name, clips in by_clip.items()}
    text = format_table(summaries, describe(table, clips_per_person))
    out.mkdir(parents=True, exist_ok=True)
    generated = [row for row in rows if row.name in GENERATED]
    write_pictures(sheet_rows(table, generated), [row.name for row in generated], out, log_dir, text)
    write_bytes(out / "results.md", text.encode())
    write_json(out / "results.json", results(table, summaries, by_clip))
    return text


def results(table: Table, summaries: dict[str, dict[str, float]], by_clip: dict[str, list[ClipFigures]]) -> dict:
    """What results.json holds; NaN becomes null."""
    settings = {"model": str(table.model), "adapter": table.adapter and str(table.adapter), "model_id": table.model_id}
    settings |= {"num_people": len(table.gallery.people), "references": table.sampling.num_references}
    settings |= {"num_undetected_stills": table.gallery.num_undetected, "embedded_frames": table.num_embedded}
    settings |= {name: getattr(table.sampling, name) for name in ("steps", "guidance", "identity_guidance", "seed")}
    people = [subject.person for subject in table.subjects]
    clips = {
        name: [{"person": person, **known(clip._asdict())} for person, clip in zip(people, found, strict=True)]
        for name, found in by_clip.items()
    }
    return {"settings": settings, "rows": {name: known(row) for name, row in summaries.items()}, "clips": clips}


def known(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser, args = parse(arguments)
    try:
        table = build_table(args)
        if args.generate_only:
            for name in table.row_names:
                table.clips(name)
            return
        print(run(table, args.out, args.log_dir, args.clips_per_person))
        print(f"Contact sheet, clips and all figures: {args.out}")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""Validation by what the model generates: fixed people and prompts, judged by the paper's metrics.

Letters: K people, R references, F frames, H W pixels, S side of a reference.
"""

from __future__ import annotations

import io
import itertools
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torchmetrics import Metric

from callbacks.ema import averaged_weights
from callbacks.every_n_steps import EveryNSteps, check_generates
from callbacks.tensorboard_media import evaluation
from mm_lightning.media import SheetRow, animation, contact_sheet, encode_gif, reduce_frames, sample_frames, to_uint8
from mm_lightning.metrics.face_detection_rate import FaceDetectionRate
from mm_lightning.metrics.face_motion_inter import FaceMotionInter
from mm_lightning.metrics.face_motion_ref import FaceMotionRef
from mm_lightning.metrics.id_distance import AverageIDDistance
from mm_lightning.metrics.id_similarity import AverageIDSimilarity, frame_similarity
from mm_lightning.metrics.identity_retrieval import IdentityRetrieval
from mm_lightning.metrics.similarity_decay import SimilarityDecay
from mm_lightning.metrics.text_alignment import TextAlignment
from mm_lightning.types import Batch, FaceFeatures, ReferenceFaces, VideoFaces

logger = logging.getLogger(__name__)

FRAMES_SHOWN, HEIGHT = 6, 128
BEST = ("similarity", "fm_inter")


class Reader(Protocol):
    """Finds and embeds faces; `mm_lightning.encoders.reader.FaceReader` is one."""

    def read_video(self, frames: NDArray[np.uint8]) -> VideoFaces: ...

    def read_photos(self, photos: Sequence[NDArray[np.uint8]]) -> ReferenceFaces: ...


class Person(NamedTuple):
    """One of the fixed people."""

    key: str  # of the validation sample it comes from
    caption: str
    photos: list[NDArray[np.uint8]]  # R, each (S, S, 3)
    features: FaceFeatures  # a batch of one, on the CPU
    references: ReferenceFaces  # a batch of one
    number: int = 0  # among the people


class Generated(NamedTuple):
    """One video and its faces."""

    person: Person
    prompt: str
    frames: NDArray[np.uint8]  # (F, H, W, 3)
    faces: VideoFaces


class GeneratedValidation(EveryNSteps):
    """Generates videos of the first people of the validation set every n steps and at the end, and judges them.

    Weights, text encoder and VAE are the module's own (`pl_module.build_pipeline()`), with averaged weights where there
    are some, in evaluation mode, and without touching training's random state. All ranks generate, each its share.

    Loggers get `validation/*`: similarity, distance, decay, face_found, top1 (among the K people, of chance 1 / K),
    fm_ref, fm_inter, and the names of `video_metrics`. TensorBoard also gets an animation of all ranks' videos with the
    references beside, a contact sheet and the similarity over the frames. The best adapter, by similarity among those
    that move enough, is kept in a folder of its own.

    Args:
        face_reader: finds and embeds faces.
        every_n_steps: optimizer steps between looks; 0 looks only at the end.
        num_people: K, with a reference that shows a face.
        stride: every so many samples of the validation set, which may have several of one person.
        prompts: of each person; None takes the caption of its validation sample.
        num_frames: 4k+1.
        height, width: pixels; None takes the base's own.
        num_inference_steps, guidance_scale, face_scale, identity_guidance_scale: see `MagicMirrorPipeline`.
        video_metrics: name -> metric of whole videos; `TextAlignment` is given the prompts too. None is none.
        seed: of the noise, the same at every look.
        best_folder: of the best adapter; None keeps none.
        min_motion: FM_inter that the best adapter must reach; still videos are easily alike.
        fps: of animations.
    """

    def __init__(
        self,
        face_reader: Reader,
        every_n_steps: int = 1000,
        num_people: int = 4,
        stride: int = 1,
        prompts: Sequence[str] | None = None,
        num_frames: int = 49,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 6.0,
        face_scale: float = 1.0,
        identity_guidance_scale: float = 1.0,
        video_metrics: Mapping[str, Metric | None] | None = None,
        seed: int = 0,
        best_folder: str | None = None,
        min_motion: float = 0.2,
        fps: float = 8.0,
    ) -> None:
        super().__init__(every_n_steps)
        if num_people < 1 or stride < 1:
            raise ValueError(f"num_people={num_people}, stride={stride}: give at least one person and a stride from 1.")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: give a number from 1.")
        self.face_reader, self.num_people, self.stride = face_reader, num_people, stride
        self.prompts = None if prompts is None else tuple(prompts)
        self.sampling = {"num_frames": num_frames, "num_inference_steps": num_inference_steps}
        self.sampling |= {"height": height, "width": width}
        self.sampling |= {"guidance_scale": guidance_scale, "face_scale": face_scale}
        self.sampling |= {"identity_guidance_scale": identity_guidance_scale}
        given = dict(video_metrics or {})
        self.video_metrics = {name: metric for name, metric in given.items() if metric is not None}
        self.seed, self.fps, self.min_motion = seed, fps, min_motion
        self.best_folder = None if best_folder is None else Path(best_folder)
        self.best: dict[str, float] | None = None
        self.former_folder = self.best_folder  # of the run that was resumed
        self.people: list[Person] = []

    # When

    def check_module(self, module: LightningModule) -> None:
        check_generates(module, "callbacks.generated")
        module.check_generation(
            *(self.sampling[name] for name in ("num_frames", "height", "width")), self.prompts or ()
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.bring_best(trainer)
        self.people = trainer.strategy.broadcast(self.choose_people(trainer, pl_module))
        if not self.people:
            logger.warning("No validation sample has a reference with a face: callbacks.generated shows nothing.")

    def state_dict(self) -> dict[str, Any]:
        folder = None if self.best_folder is None else str(self.best_folder.absolute())
        return {"best": self.best, "best_folder": folder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        folder = state_dict.get("best_folder")  # absent from checkpoints of earlier versions
        self.former_folder = self.best_folder if folder is None else Path(folder)

    def bring_best(self, trainer: Trainer) -> None:
        """A resumed run has a folder of its own; the best adapter comes along, or, where it is gone, is chosen anew."""
        if self.best is None or self.best_folder is None or self.best_folder.resolve() == self.former_folder.resolve():
            return
        if not trainer.strategy.broadcast(self.former_folder.is_dir()):
            logger.warning("The best adapter at %s is gone: it is chosen anew.", self.former_folder)
            self.best = None
        elif trainer.is_global_zero:
            shutil.copytree(self.former_folder, self.best_folder, dirs_exist_ok=True)

    # Whom

    @torch.no_grad()
    def choose_people(self, trainer: Trainer, pl_module: LightningModule) -> list[Person]:
        """The first of this rank's validation set whose references show a face."""
        people: list[Person] = []
        data, num_seen = trainer.datamodule, 0
        for batch in data.val_dataloader():
            batch = data.on_after_batch_transfer(move_data_to_device(batch, pl_module.device), 0)
            features = move_data_to_device(pl_module.encode_features(batch), "cpu")
            chosen = [i for i in range(len(batch.keys)) if (num_seen + i) % self.stride == 0]
            num_seen += len(batch.keys)
            for i in chosen:
                person = self.make_person(batch, features, i, len(people))
                people += [] if person is None else [person]
                if len(people) == self.num_people:
                    return people
        return people

    def make_person(self, batch: Batch, features: FaceFeatures, index: int, number: int) -> Person | None:
        """None where no reference shows a face."""
        present = batch.reference_mask[index]
        if not batch.keys[index] or not present.any():
            return None
        photos = list(to_uint8(batch.references[index][present]))
        references = self.face_reader.read_photos(photos)
        if not references.mask.any():
            return None
        own = FaceFeatures(*(tensor[index : index + 1] for tensor in features))
        return Person(batch.keys[index], batch.captions[index], photos, own, references, number)

    def shots(self) -> list[tuple[Person, str]]:
        return [(person, prompt) for person in self.people for prompt in self.prompts or (person.caption,)]

    # How

    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, judge, log, and keep the adapter if it is the best so far."""
        if not self.people:
            return
        with averaged_weights(trainer, pl_module):
            generated = self.generate(trainer, pl_module)
            figures = self.judge(generated, pl_module.device)
            named = {f"validation/{name}": value for name, value in figures.items()}
            for trainer_logger in trainer.loggers:
                trainer_logger.log_metrics(named, trainer.global_step)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
            shown = gather_videos(generated)
            if trainer.is_global_zero:
                self.show(trainer, shown)
            if self.is_best(figures):
                self.best = {name: figures[name] for name in BEST} | {"step": trainer.global_step}
                pl_module.save_adapter(self.best_folder)

    def generate(self, trainer: Trainer, pl_module: LightningModule) -> list[Generated]:
        """This rank's share. Sharded weights need every rank at every step, so a rank that has fewer than others
        repeats the first; repetitions are not in the result.
        """
        shots, size = self.shots(), trainer.world_size
        own = shots[trainer.global_rank :: size]
        rounds = -(-len(shots) // size)
        made = []
        with ExitStack() as stack:
            for context in (isolate_rng(), evaluation(pl_module), trainer.precision_plugin.forward_context()):
                stack.enter_context(context)
            pipeline = pl_module.build_pipeline()
            for i in range(rounds):
                person, prompt = own[i] if i < len(own) else shots[0]
                frames = self.generate_one(pipeline, person, prompt)
                if i < len(own):
                    made.append(Generated(person, prompt, frames, self.face_reader.read_video(frames)))
        return made

    def generate_one(self, pipeline: Any, person: Person, prompt: str) -> NDArray[np.uint8]:
        """(F, H, W, 3)."""
        identity = FaceFeatures(*(tensor.to(pipeline.device) for tensor in person.features))
        generator = torch.Generator().manual_seed(self.seed)
        options = {**self.sampling, "generator": generator, "output_type": "np"}
        [frames] = pipeline(prompt, identity=identity, **options).frames
        return (frames * 255).round().astype(np.uint8)

    def judge(self, generated: Sequence[Generated], device: torch.device) -> dict[str, float]:
        """Means over all ranks' videos; what is known of none is left out."""
        metrics = face_metrics() | self.video_metrics
        for metric in metrics.values():
            metric.reset()
            metric.to(device)
        for video in generated:
            update_metrics(metrics, video, device)
        figures = {name: float(metric.compute()) for name, metric in metrics.items()}
        return {name: value for name, value in figures.items() if value == value}

    def is_best(self, figures: dict[str, float]) -> bool:
        """The most similar so far among those that move enough."""
        if self.best_folder is None or any(name not in figures for name in BEST):
            return False
        moves = figures["fm_inter"] >= self.min_motion
        return moves and (self.best is None or figures["similarity"] > self.best["similarity"])

    def show(self, trainer: Trainer, generated: Sequence[Generated]) -> None:
        """In TensorBoard."""
        rows = [SheetRow(f"{g.person.key}: {g.prompt}", g.person.photos[0], (g.frames,)) for g in generated]
        shown = sample_frames(len(generated[0].frames), FRAMES_SHOWN)
        sheet = contact_sheet(rows, ["generated"], shown, HEIGHT)
        gif = encode_gif(animation(rows, HEIGHT), self.fps)
        figure = similarity_figure(generated)
        for trainer_logger in trainer.loggers:
            if isinstance(trainer_logger, TensorBoardLogger):
                writer, step = trainer_logger.experiment, trainer.global_step
                writer.add_image("validation/sheet", np.asarray(sheet), step, dataformats="HWC")
                writer.add_figure("validation/similarity_over_frames", figure, step, close=False)
                writer.file_writer.add_summary(gif_summary("validation/videos", gif), step)
                writer.flush()


def gather_videos(generated: Sequence[Generated], height: int = HEIGHT) -> list[Generated]:
    """All ranks' videos on rank zero, in the order of people, their frames reduced to what is shown; elsewhere none.

    Without other ranks, the videos as they are.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(generated)
    reduced = [video._replace(frames=reduce_frames(video.frames, height)) for video in generated]
    shares = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(reduced, shares)
    turns = itertools.zip_longest(*(shares or []))  # rank r made every n-th video from the r-th
    return [video for turn in turns for video in turn if video is not None]


def face_metrics() -> dict[str, Metric]:
    return {
        "similarity": AverageIDSimilarity(),
        "distance": AverageIDDistance(),
        "decay": SimilarityDecay(),
        "face_found": FaceDetectionRate(),
        "top1": IdentityRetrieval(),
        "fm_ref": FaceMotionRef(),
        "fm_inter": FaceMotionInter(),
    }


def update_metrics(metrics: Mapping[str, Metric], video: Generated, device: torch.device) -> None:
    faces, references = move_data_to_device((video.faces, video.person.references), device)
    pixels = torch.from_numpy(video.frames).movedim(-1, 1)[None].to(device).float() / 127.5 - 1
    for metric in metrics.values():
        match metric:
            case IdentityRetrieval():
                metric.update(faces, references, torch.tensor([video.person.number], device=device))
            case FaceDetectionRate() | FaceMotionInter():
                metric.update(faces)
            case AverageIDSimilarity() | AverageIDDistance() | SimilarityDecay() | FaceMotionRef():
                metric.update(faces, references)
            case TextAlignment():
                metric.update(pixels, [video.prompt])
            case _:
                metric.update(pixels)


def similarity_figure(generated: Sequence[Generated]) -> Figure:
    """A curve for each video; gaps where a frame shows no face."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for video in generated:
        embeddings, mask = video.person.references.embeddings, video.person.references.mask
        values: Tensor = frame_similarity(video.faces.embeddings, embeddings[mask].mean(0)[None])[0]
        values = torch.where(video.faces.found[0], values, torch.nan)
        axes.plot(values.numpy(), label=video.person.key, marker=".")
    axes.set(xlabel="frame", ylabel="similarity to the references")
    axes.legend(fontsize="x-small")
    return figure


def gif_summary(tag: str, gif: bytes) -> Summary:
    """SummaryWriter.add_video needs moviepy; an image summary may hold any encoded picture, also an animated one."""
    width, height = Image.open(io.BytesIO(gif)).size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    return Summary(value=[Summary.Value(tag=tag, image=image)])

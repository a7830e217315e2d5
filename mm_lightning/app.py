"""A page in the browser: photos and a prompt in, a video out.

    python -m mm_lightning.app
    python -m mm_lightning.app --base weights/CogVideoX-5b --adapter RUN/adapter --out outputs/app

Only this machine reaches it unless `--host` says otherwise. Uploads and results lie in `--out`, and no other folder is
served. Results are those of `mm_lightning.generate`: same files, same marks, and `generate --jobs` makes them again.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import ipaddress
import logging
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mm_lightning.credentials import read_signing
from mm_lightning.encoders import photos as photo_reading
from mm_lightning.encoders.photos import read_references
from mm_lightning.encoders.reader import FaceReader
from mm_lightning.encoders.recognizer import check_recognizer
from mm_lightning.evaluation.clips import read_clip
from mm_lightning.generate import (
    BASE_GUIDANCE,
    Generator,
    Guidance,
    add_signing,
    add_weights,
    check_output,
    default_guidance,
    describe_weights,
    load_pipeline,
)
from mm_lightning.jobs import Job, first_words, make_job
from mm_lightning.metrics.arithmetic import mean_embedding
from mm_lightning.metrics.id_similarity import frame_similarity
from mm_lightning.pipeline import MagicMirrorPipeline

try:
    import gradio as gr
except ModuleNotFoundError as error:
    message = f"The page needs the package {error.name}: pip install 'magicmirror-lightning[app]'."
    raise (SystemExit(f"error: {message}") if __name__ == "__main__" else ModuleNotFoundError(message)) from error

logger = logging.getLogger(__name__)

NOTICE = """# MagicMirror
Photos of one person and a prompt in, a video out. **Everything made here is generated: nothing in it was ever filmed.**
Each file says so, in a comment and in signed content credentials. **Use photos only of people who consent to it.**
Photos and results are kept in `{out}`, on the machine that serves this page.
"""
OPEN = "Whoever reaches this machine at %s can use the page, and fetch the photos and videos made with it."
OUT_OF_MEMORY = (
    "The device ran out of memory: take fewer frames or a smaller size, or start the page with --offload and --tiling."
)
PEOPLE = Path("data/miniature/people/test/images/test-000000.tar")  # where the miniature's people are unpacked
STILL = re.compile(r"p9\d+-s0\.jpg")  # one of each person held out
NUM_EXAMPLES = 4
MESSAGE_SECONDS = 30
SLIDERS = (
    ("num_inference_steps", 1, 100, 1, "Steps"),
    ("guidance_scale", 1, 15, 0.5, "Guidance by the prompt"),
    ("face_scale", 0, 1, 0.05, "Face strength"),
    ("identity_guidance_scale", 0, 5, 0.1, "Guidance by the person"),
)
FACES = [("the largest", ""), *((f"face_index={i}, from the left", str(i)) for i in range(10))]


class Result(NamedTuple):
    """What the page shows, in the order of `add_outputs`."""

    video: str | None  # None where a picture was made
    file: str  # the video or picture, to download
    record: str
    similarity: Figure | None  # None without photos
    sheet: str


class Studio:
    """Makes what the page shows.

    Args:
        generator: writes the files; its folder also takes the uploads.
        reader: compares the video's faces with the photos'.
    """

    def __init__(self, generator: Generator, reader: FaceReader) -> None:
        self.generator, self.reader = generator, reader
        self.pipeline, self.out = generator.pipeline, generator.out

    def make(self, values: Mapping[str, Any], progress: Callable[..., Any]) -> Result:
        """The video of the page's fields, and how alike it is.

        Args:
            values: by name of `Job`'s fields; photos as the gallery gives them, (file, caption) each.
            progress: a `gr.Progress`.

        Raises:
            gr.Error: what the user can mend, in one message.
        """
        files = [file for file, _ in values["photos"] or ()]
        with shown_on_page(files):
            job = read_job({**values, "photos": files})
            if not job.photos and job.face_scale:
                raise ValueError("No photo: upload at least one, or set the face strength to 0 for nobody.")
            progress(0, desc="looking at the photos")
            embeddings = self.embed_photos(job)
            self.generator.callback_on_step_end = report_steps(progress)  # one request runs at a time
            [path] = self.generator.run([job])
            progress(1.0, desc="comparing faces")
            figure = None if embeddings is None else self.draw(path, embeddings)
        video = str(path) if path.suffix == ".mp4" else None
        record, sheet = (str(path.with_suffix(ending)) for ending in (".json", ".sheet.jpg"))
        return Result(video, str(path), record, figure, sheet)

    @torch.no_grad()
    def embed_photos(self, job: Job) -> Tensor | None:
        """(1, R, E), of the faces that the condition is made of; warns on the page where the photos are not clear."""
        if not job.photos:
            return None
        with warnings_on_page(job.photos):
            references = read_references(job.photos, self.reader.detector, job.face_index)
        pixels, landmarks = (part[0].to(self.reader.device) for part in (references.pixels, references.landmarks))
        return self.reader.recognizer.embed(pixels, landmarks)[None].cpu()

    def draw(self, path: Path, embeddings: Tensor) -> Figure:
        """The similarity of the written video with photos (1, R, E)."""
        faces = self.reader.read_video(read_clip(path).frames)
        reference = mean_embedding(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool))  # (1, E)
        similarity = frame_similarity(faces.embeddings, reference)[0]  # (F,)
        values = torch.where(faces.found[0], similarity, torch.nan).tolist()
        judge, told = self.reader.recognizer.name, self.pipeline.face_encoder.recognizer.name
        conditions = told.removesuffix("_standardized") == judge
        return draw_similarity(values, embeddings.shape[1], judge, conditions)


def draw_similarity(values: Sequence[float], num_photos: int, recognizer: str, conditions: bool) -> Figure:
    """Cosine over frames; NaN stands for a frame without a face, a gap in the curve.

    Args:
        num_photos: whose mean the frames were compared with.
        recognizer: the judge's name.
        conditions: whether it also told the model who is to be seen, which flatters the result.
    """
    found = [value for value in values if not math.isnan(value)]
    absent = [i for i, value in enumerate(values) if math.isnan(value)]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(values, marker=".")
    for i in absent:
        axes.axvspan(i - 0.5, i + 0.5, color="0.9")
    axes.set(xlabel="frame", ylabel="cosine", xlim=(-0.5, len(values) - 0.5), ylim=None if found else (0, 1))
    axes.set_title(
        f"Similarity to the mean of {num_photos} photo{'s' * (num_photos != 1)}: "
        f"{f'mean {sum(found) / len(found):.3f}' if found else 'unknown'}\n"
        f"{len(absent)} of {len(values)} frames without a face{' (grey)' * bool(absent)}\n"
        f"judge: {recognizer}{', the recogniser that also conditions the video' * conditions}",
        fontsize=9,
        loc="left",
    )
    return figure


def read_job(values: Mapping[str, Any]) -> Job:
    """A job of the page's fields, named by its contents; an empty field is the default."""
    row = {name: None if value == "" else value for name, value in values.items()}
    job = make_job(row, Job(prompt="", photos=()), "the page's fields", Path())
    digest = hashlib.sha256(repr(job).encode()).hexdigest()[:10]
    return replace(job, name="-".join([digest, *first_words(job.prompt)]))


# Telling the user -----------------------------------------------------------------------------------------------------


def report_steps(progress: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """A `callback_on_step_end` that moves the bar."""

    def report(pipeline: Any, step: int, timestep: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        done, total = step + 1, pipeline.num_timesteps
        progress((done, total), desc="denoising" if done < total else "decoding")
        return kwargs

    return report


@contextmanager
def shown_on_page(photos: Sequence[str]) -> Iterator[None]:
    """Errors that the user can mend become messages; others keep their trace, in the log.

    Raises:
        gr.Error
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise gr.Error(OUT_OF_MEMORY, duration=MESSAGE_SECONDS, print_exception=False) from error
    except (OSError, ValueError) as error:
        raise gr.Error(readable(str(error), photos), duration=MESSAGE_SECONDS, print_exception=False) from error


@contextmanager
def warnings_on_page(photos: Sequence[str]) -> Iterator[None]:
    handler = PageHandler(photos)
    photo_reading.logger.addHandler(handler)
    try:
        yield
    finally:
        photo_reading.logger.removeHandler(handler)


class PageHandler(logging.Handler):
    """Shows warnings on the page whose request runs."""

    def __init__(self, photos: Sequence[str]) -> None:
        super().__init__(logging.WARNING)
        self.photos = photos

    def emit(self, record: logging.LogRecord) -> None:
        gr.Warning(readable(record.getMessage(), self.photos), duration=MESSAGE_SECONDS)


def readable(text: str, photos: Sequence[str]) -> str:
    """Photos by the name they were uploaded under; the page renders HTML, so signs are escaped."""
    for photo in photos:
        text = text.replace(photo, Path(photo).name)
    return html.escape(text, quote=False)


# The page -------------------------------------------------------------------------------------------------------------


def build(studio: Studio, examples: Sequence[tuple[str, str]] = (), guidance: Guidance = BASE_GUIDANCE) -> gr.Blocks:
    """The page; from here on, gradio keeps its files in the studio's folder.

    Args:
        examples: photo inside that folder, and prompt.
        guidance: where its sliders stand at first.
    """
    # What it uploads and caches it also serves.
    os.environ |= {"GRADIO_TEMP_DIR": str(studio.out), "GRADIO_EXAMPLES_CACHE": str(studio.out / "examples")}
    with gr.Blocks(title="MagicMirror", analytics_enabled=False) as page:
        gr.Markdown(NOTICE.format(out=studio.out))
        with gr.Row():
            with gr.Column():
                inputs = add_inputs(studio.pipeline, guidance)
                button = gr.Button("Generate", variant="primary")
                if examples:
                    rows = [[[photo], prompt] for photo, prompt in examples]
                    gr.Examples(rows, [inputs["photos"], inputs["prompt"]], label="People of the miniature (rendered)")
            with gr.Column():
                outputs, details = add_outputs()

        def make(values: dict, progress=gr.Progress()) -> tuple:  # noqa: B008 (where gradio looks for it)
            result = studio.make({name: values[field] for name, field in inputs.items()}, progress)
            return *result, gr.update(visible=True)

        def clear() -> tuple:
            return None, gr.update(visible=False)

        # A former result would stand beside the error of this request.
        cleared = button.click(clear, None, [outputs[0], details], queue=False, api_visibility="private")
        outputs = [*outputs, details]
        cleared.then(make, set(inputs.values()), outputs, show_progress_on=outputs[0], api_visibility="private")
    return page


def add_inputs(pipeline: MagicMirrorPipeline, guidance: Guidance) -> dict[str, gr.Component]:
    """Components by the name of `Job`'s fields."""
    default = Job(prompt="", photos=(), **guidance._asdict())
    height, width, num_frames = pipeline.check_shape(None, None, None)
    gallery = gr.Gallery(
        label="Photos of one person", type="filepath", file_types=["image"], object_fit="contain", height=260,
        columns=3, fit_columns=False, buttons=[],
    )  # fmt: skip
    prompt = gr.Textbox(
        label="Prompt", lines=3, placeholder="A woman img smiles in the rain",
        info="with a word for the person; img after it marks the word, otherwise the first one is taken",
    )  # fmt: skip
    with gr.Accordion("Settings", open=False):
        negative = gr.Textbox(label="Negative prompt", info="what should not be seen")
        with gr.Row():
            whole = partial(gr.Number, precision=0, min_width=80, maximum=2**32 - 1)
            shape = {
                "seed": whole(default.seed, label="Seed", minimum=0),
                "num_frames": whole(num_frames, label="Frames", minimum=1),
                "width": whole(width, label="Width", minimum=16),
                "height": whole(height, label="Height", minimum=16),
            }
        strengths = {
            name: gr.Slider(low, high, getattr(default, name), step=step, label=label)
            for name, low, high, step, label in SLIDERS
        }
        index = gr.Dropdown(FACES, value="", label="Which face, in photos with several")
    return {"photos": gallery, "prompt": prompt, "negative_prompt": negative, **shape, **strengths, "face_index": index}


def add_outputs() -> tuple[list[gr.Component], gr.Column]:
    """Components in the order of `Result`, and what holds all but the first; it appears with a result."""
    video = gr.Video(label="Generated video", autoplay=True, loop=True, interactive=False, height=360, buttons=[])
    with gr.Column(visible=False) as details:
        with gr.Row():
            files = [gr.File(label=label, interactive=False) for label in ("File", "Record (JSON)")]
        similarity = gr.Plot(show_label=False, format="png")
        sheet = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"])
    return [video, *files, similarity, sheet], details


def read_examples(tar: Path, folder: Path) -> list[tuple[str, str]]:
    """Some of the miniature's people, copied to the folder, with their captions; none where the tar is missing."""
    if not tar.is_file():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    with tarfile.open(tar) as archive:
        for name in sorted(filter(STILL.fullmatch, archive.getnames()))[:NUM_EXAMPLES]:
            photo, caption = (archive.extractfile(part).read() for part in (name, name.replace(".jpg", ".txt")))
            (folder / name).write_bytes(photo)
            examples.append((str((folder / name).absolute()), caption.decode()))
    return examples


# The command ----------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m mm_lightning.app", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 is all of this machine's")
    add("--port", type=int, help="the first free one from 7860 by default")
    add("--out", type=Path, default=Path("outputs/app"), help="folder of uploads and results; all of it is served")
    add("--fps", type=float, default=8.0, help="of the videos")
    add("--judge", default="dlib", help="recogniser that compares the video with the photos: dlib, or a pack")
    add_weights(parser)
    add_signing(parser)
    return parser.parse_args(arguments)


def load_studio(options: argparse.Namespace) -> Studio:
    """
    Raises:
        FileNotFoundError, ValueError: as `check_recognizer`, `check_output`, `read_signing` and `load_pipeline`.
    """
    check_recognizer(options.judge)
    check_output(options.out, options.fps)
    signing = read_signing(options.signing_key, options.signing_certificates)
    pipeline = load_pipeline(options)
    made_with, out = describe_weights(pipeline, options), options.out.absolute()
    reader = FaceReader(options.detector, options.judge)
    return Studio(Generator(pipeline, out, made_with, signing, options.fps), reader)


def serve(page: gr.Blocks, host: str, port: int | None, block: bool = True) -> None:
    """
    Args:
        port: None takes the first free one from 7860.
        block: until interrupted; otherwise `page.local_url` says where it is, and `page.close()` ends it.

    Raises:
        OSError: the port is taken.
    """
    if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        logger.warning(OPEN, host)
    page.queue(default_concurrency_limit=1)  # the pipeline keeps state while it runs
    page.launch(
        server_name=host, server_port=port, prevent_thread_lock=not block, quiet=not block, show_error=True,
        share=False, ssr_mode=False, mcp_server=False, enable_monitoring=False, run_history=False, footer_links=[],
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        _frontend=False,  # gradio gives up where its own page takes it more than 3 s, as beside a training
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = parse(arguments)
    try:
        studio = load_studio(options)
        examples = read_examples(PEOPLE, studio.out / "examples")
        serve(build(studio, examples, default_guidance(options.base)), options.host, options.port)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

"""What TensorBoard and the disk hold after a run, read back with other readers."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.ema import TrainableEMA
from callbacks.tensorboard_media import MediaPreview, side_by_side
from mm_lightning.checkpoint import trainable_state_dict
from mm_lightning.media import encode_gif, to_uint8, write_mp4
from mm_lightning.types import Preview
from tests.toy import ToyModule, assert_same, make_trainer, plain_run

F, H, W, S = 5, 33, 48, 20


class ToyBatch(NamedTuple):
    keys: list[str]
    pixels: Tensor
    cached: Tensor | None


def moving_square() -> Tensor:
    video = torch.full((F, 3, H, W), -1.0)
    for frame in range(F):
        video[frame, 0, 8:24, 4 + 6 * frame : 20 + 6 * frame] = 1
    return video


class Previewing(ToyModule):
    """A red square on the move; frozen `inner` is in evaluation mode, as a frozen backbone is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[ToyBatch] = []
        self.states: list[tuple[bool, bool, bool]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.noise: list[float] = []

    def on_train_start(self) -> None:
        self.net.inner.eval()

    def training_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        self.noise.append(torch.rand(()).item() + np.random.rand() + random.random())
        return super().training_step(batch.pixels, batch_idx)

    def generate_preview(self, batch: ToyBatch) -> Preview:
        torch.rand(3), np.random.rand(), random.random()
        self.seen.append(batch)
        self.states.append((self.training, self.net.training, torch.is_grad_enabled()))
        self.weights.append({name: tensor.clone() for name, tensor in trainable_state_dict(self).items()})
        return Preview(f"a {batch.keys[0]}", torch.ones(3, S, S), moving_square(), moving_square().flip(0)[:3])


def collate(samples: list[int]) -> ToyBatch:
    return ToyBatch([f"man {index}" for index in samples], torch.tensor(samples).float(), None)


def fit(folder: Path, preview: MediaPreview | None, logger: Any = False, num_steps: int = 5) -> Previewing:
    model = Previewing()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    callbacks = [TrainableEMA(decay=0.5)] + ([preview] if preview else [])
    data = DataLoader(range(20), batch_size=2, collate_fn=collate)
    make_trainer(folder, num_steps, callbacks, logger=logger).fit(model, data)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Previewing, TensorBoardLogger]:
    folder = tmp_path_factory.mktemp("media")
    logger = TensorBoardLogger(folder)
    return fit(folder, MediaPreview(every_n_steps=2, fps=8, max_height=22), logger), logger


def read_gif(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded))


def test_tensorboard_holds_animations_and_prompt(run: tuple[Previewing, TensorBoardLogger]) -> None:
    events = EventAccumulator(run[1].log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    assert set(events.Tags()["images"]) == {"preview/generated", "preview/denoised"}
    for tag, num_frames in (("preview/generated", F), ("preview/denoised", 3)):
        images = events.Images(tag)
        assert [event.step for event in images] == [2, 4, 5]
        gif = read_gif(images[-1].encoded_image_string)
        assert (gif.format, gif.n_frames) == ("GIF", num_frames)
        assert gif.size == (images[-1].width, images[-1].height) == (22 + 32, 22)
        assert gif.info["duration"] == 120
        assert b"AI-generated" in gif.info["comment"]
    (text,) = events.Tensors("preview/prompt/text_summary")[-1].tensor_proto.string_val
    assert text == b"a man 0"


def test_clip_beside_the_log(run: tuple[Previewing, TensorBoardLogger]) -> None:
    folder = Path(run[1].log_dir) / "previews"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:07d}.mp4" for n in (2, 4, 5)]
    with av.open(str(folder / "step-0000005.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
        assert "AI-generated" in container.metadata["comment"]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (F, H // 2 * 2, W, 3)
    for index, frame in enumerate(frames):
        centre = 12 + 6 * index
        assert frame[16, centre, 0] > 200
        assert frame[2, 2].max() < 40


def test_preview_does_not_disturb_training(run: tuple[Previewing, TensorBoardLogger], tmp_path: Path) -> None:
    model, undisturbed = run[0], fit(tmp_path, None)
    assert model.noise == undisturbed.noise
    assert model.losses == undisturbed.losses
    assert_same(trainable_state_dict(model), trainable_state_dict(undisturbed), atol=0)
    assert model.training
    assert not model.net.inner.training


def test_preview_conditions(run: tuple[Previewing, TensorBoardLogger]) -> None:
    model = run[0]
    assert model.states == [(False, False, False)] * 3
    for num_steps, weights in zip((2, 4, 5), model.weights, strict=True):
        assert_same(weights, plain_run(range(num_steps)).averages)
    for batch in model.seen:
        assert (batch.keys, batch.pixels.tolist(), batch.cached) == (["man 0"], [0.0], None)


def test_without_tensorboard_the_clip_remains(tmp_path: Path) -> None:
    fit(tmp_path, MediaPreview(every_n_steps=0), num_steps=3)
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["step-0000003.mp4"]


def test_side_by_side_pixels() -> None:
    reference = torch.stack([torch.full((S, S), value) for value in (1.0, -1.0, 0.0)])
    frames = side_by_side(reference, moving_square(), max_height=99)
    assert len(frames) == F
    for frame, pixels in zip(frames, moving_square(), strict=True):
        array = np.asarray(frame)
        assert array.shape == (H, H + W, 3)
        assert (array[:, :H] == (255, 0, 128)).all()
        assert (array[:, H:] == ((pixels + 1) * 127.5).byte().movedim(0, -1).numpy()).all()


def test_gif_keeps_colours() -> None:
    ramp = torch.linspace(-1, 1, W).expand(3, H, W)
    frames = side_by_side(torch.zeros(3, S, S), torch.stack([ramp, -ramp]), max_height=99)
    gif = read_gif(encode_gif(frames, fps=10))
    for index, frame in enumerate(frames):
        gif.seek(index)
        difference = np.abs(np.asarray(gif.convert("RGB"), dtype=int) - np.asarray(frame, dtype=int))
        assert difference.max() <= 16


def test_values_outside_are_clipped() -> None:
    assert to_uint8(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]


def test_one_frame_clip(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a/one.mp4", to_uint8(moving_square()[:1]), fps=8)
    with av.open(str(tmp_path / "a/one.mp4")) as container:
        assert len([*container.decode(video=0)]) == 1
    assert read_gif(encode_gif(side_by_side(torch.zeros(3, S, S), moving_square()[:1], 99), 8)).n_frames == 1


@pytest.mark.parametrize(("name", "value"), [("every_n_steps", -1), ("fps", 0), ("max_height", 0)])
def test_wrong_arguments(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        MediaPreview(**{name: value})

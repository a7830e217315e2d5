"""The commands that users type: both stages, sweeps, going on after an interruption, and what mistakes show."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from diffusers import CogVideoXTransformer3DModel
from hydra.utils import instantiate
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mm_lightning.backbone import HUB_ID
from mm_lightning.checkpoint import trainable_state_dict
from mm_lightning.config import UserError
from mm_lightning.tiny import make_tiny
from tests.conftest import ROOT
from tests.runs import compose_train, small_overrides
from tests.test_module import names
from train import train

SHORT = ("debug=tiny", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "model.preview_steps=1")
# The tiny model's face perceiver is as wide as its transformer and needs no projection.
TRAINED = names("id face fusion can", "can modulation norm2 face")


def run_command(*overrides: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python train.py OVERRIDES`, as typed in the project's folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "train.py", *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def succeed(*overrides: str, **kwargs) -> str:
    run = run_command(*overrides, **kwargs)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def read_events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()


def read_checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def data_dir(sample_shards, tmp_path_factory):
    """What `make data` makes."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "samples").symlink_to(sample_shards)
    make_tiny(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def paths(data_dir, tmp_path_factory):
    return f"paths.data_dir={data_dir}", f"paths.output_dir={tmp_path_factory.mktemp('outputs')}"


@pytest.fixture(scope="module")
def stages(paths):
    """Stage 1, then stage 2 from what it left: task -> folder of the run."""
    for experiment in ("stage1_image", "stage2_video"):
        succeed(f"experiment={experiment}", *SHORT, "trainer.max_steps=2", *paths)
    output_dir = Path(paths[1].partition("=")[2])
    return {experiment: output_dir / experiment / "latest" for experiment in ("stage1_image", "stage2_video")}


BOTH_STAGES = pytest.mark.parametrize("stage", ["stage1_image", "stage2_video"])


# Both stages


@BOTH_STAGES
def test_a_run_leaves_what_the_readme_lists(stages, stage):
    run = stages[stage]
    assert {path.name for path in run.iterdir()} == {".hydra", "adapter", "checkpoints", "tensorboard", "train.log"}
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter.safetensors", "config.json"}
    assert [path.name for path in run.parent.iterdir() if path.is_symlink()] == ["latest"]


@BOTH_STAGES
def test_losses_are_logged_and_finite(stages, stage):
    events = read_events(stages[stage])
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss/velocity", "train/grad_norm", "train/nonfinite_steps", "lr-AdamW"} <= tags
    assert {"throughput/samples_per_second", "throughput/seconds_per_step", "data/skipped_samples"} <= tags
    assert any(tag.startswith("train/velocity_at/") for tag in tags)
    assert {tag for tag in tags for event in events.Scalars(tag) if not np.isfinite(event.value)} == set()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]
    assert {event.value for event in events.Scalars("train/nonfinite_steps")} == {0.0}


@BOTH_STAGES
def test_previews_and_prompt_are_logged(stages, stage):
    events = read_events(stages[stage])
    assert {"preview/generated", "preview/denoised"} <= set(events.Tags()["images"])
    for tag in ("preview/generated", "preview/denoised"):
        (image,) = events.Images(tag)
        assert image.encoded_image_string[:4] == b"GIF8"
        assert (image.width, image.height) == (2 * 64, 64)  # reference and clip
    (prompt,) = events.Tensors("preview/prompt/text_summary")
    assert b" img" in prompt.tensor_proto.string_val[0]
    (clip,) = (stages[stage] / "tensorboard" / "previews").iterdir()
    assert clip.name == "step-0000002.mp4"
    with av.open(str(clip)) as container:
        shapes = {frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)}
        assert container.streams.video[0].frames == (1 if stage == "stage1_image" else 9)
    assert shapes == {(64, 64, 3)}


@BOTH_STAGES
def test_hyperparameters_are_those_of_the_run(stages, stage):
    logged = yaml.safe_load((stages[stage] / "tensorboard" / "hparams.yaml").read_text())
    assert logged["trainer.max_steps"] == 2
    assert logged["task"] == stage
    assert logged["model.optimizer.lr"] == 1e-3
    assert logged["model.adapter.conditioned_norm"] == "can"
    assert not [value for value in logged.values() if isinstance(value, dict | list) or "${" in str(value)]
    assert "_hparams_/session_start_info" in read_events(stages[stage]).summary_metadata


@BOTH_STAGES
def test_checkpoint_and_adapter_hold_exactly_what_trains(stages, stage, data_dir):
    checkpoint = read_checkpoint(stages[stage])
    assert set(checkpoint["state_dict"]) == set(checkpoint["ema_state_dict"]) == TRAINED
    (optimizer,) = checkpoint["optimizer_states"]
    assert len(optimizer["state"]) == len(TRAINED)
    assert checkpoint["global_step"] == 2
    adapter = load_file(stages[stage] / "adapter" / "adapter.safetensors")
    assert set(adapter) == TRAINED
    assert all(torch.equal(adapter[name], average) for name, average in checkpoint["ema_state_dict"].items())
    stock = CogVideoXTransformer3DModel.from_pretrained(data_dir / "tiny", subfolder="transformer")
    assert TRAINED.isdisjoint({f"transformer.{name}" for name, _ in stock.named_parameters()})


@BOTH_STAGES
def test_training_has_moved_the_adapter(stages, stage):
    checkpoint = read_checkpoint(stages[stage])
    last = "transformer.transformer_blocks.2.adapter.can.phi_cond.2.weight"
    assert checkpoint["state_dict"][last].any()  # zero before the first step
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_stage_2_starts_from_the_adapter_of_stage_1(stages, paths):
    recorded = json.loads((stages["stage2_video"] / "adapter" / "config.json").read_text())
    assert recorded == json.loads((stages["stage1_image"] / "adapter" / "config.json").read_text())
    module = instantiate(compose_train("experiment=stage2_video", *SHORT, *paths, "paths.run_dir=run").model)
    assert Path(module.init_adapter) == stages["stage1_image"] / "adapter"
    module.configure_model()
    adapter = load_file(stages["stage1_image"] / "adapter" / "adapter.safetensors")
    assert all(torch.equal(value, adapter[name]) for name, value in trainable_state_dict(module).items())


def test_a_run_goes_on_from_its_checkpoint(stages, paths, tmp_path):
    checkpoint = stages["stage1_image"] / "checkpoints" / "last.ckpt"
    overrides = (f"ckpt_path={checkpoint}", "trainer.max_steps=3", f"paths.run_dir={tmp_path / 'run'}")
    train(compose_train("experiment=stage1_image", *SHORT, *paths, *overrides))
    before, after = read_checkpoint(stages["stage1_image"]), read_checkpoint(tmp_path / "run")
    assert after["global_step"] == 3
    assert {float(state["step"]) for state in after["optimizer_states"][0]["state"].values()} == {3.0}
    assert after["lr_schedulers"][0]["last_epoch"] == 3
    assert (before["averaging_state"]["n_averaged"], after["averaging_state"]["n_averaged"]) == (2, 3)
    assert [event.step for event in read_events(tmp_path / "run").Scalars("train/loss")] == [2]
    assert (tmp_path / "latest").resolve() == (tmp_path / "run").resolve()


# Devices and sweeps


def test_eight_devices_compose_and_resolve():
    printed = succeed("experiment=stage2_video", "trainer.devices=8", "--cfg", "job", "--resolve")
    cfg = yaml.safe_load(printed)
    assert (cfg["trainer"]["devices"], cfg["trainer"]["accumulate_grad_batches"]) == (8, 1)
    assert cfg["trainer"]["max_steps"] == cfg["model"]["lr_schedule"]["num_training_steps"] == 5000
    assert "${" not in printed


def test_a_sweep_over_ablations_trains_each(data_dir, tmp_path):
    succeed(
        "--multirun",
        "ablation=no_can,no_face_branch",
        *SHORT,
        "trainer.max_steps=1",
        f"paths.data_dir={data_dir}",
        f"paths.output_dir={tmp_path}",
    )
    (sweep,) = (tmp_path / "train").iterdir()
    runs = sorted(path for path in sweep.iterdir() if path.is_dir() and not path.is_symlink())
    assert [run.name.partition(",")[0] for run in runs] == ["0_ablation=no_can", "1_ablation=no_face_branch"]
    expected = [names("id face fusion", "modulation norm2 face"), names("id fusion can", "can")]
    assert [set(load_file(run / "adapter" / "adapter.safetensors")) for run in runs] == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_two_devices_train_the_same_global_batch(strategy, data_dir, tmp_path):
    overrides = ("trainer.devices=2", f"strategy={strategy}", "model.init_adapter=null", "trainer.max_steps=1")
    paths = (f"paths.data_dir={data_dir}", f"paths.output_dir={tmp_path}")
    succeed("experiment=stage2_video", *SHORT, *overrides, *paths)
    run = tmp_path / "stage2_video" / "latest"
    logged = yaml.safe_load((run / "tensorboard" / "hparams.yaml").read_text())
    assert logged["data.batch_size"] * logged["trainer.accumulate_grad_batches"] * 2 == logged["global_batch_size"]
    assert set(load_file(run / "adapter" / "adapter.safetensors")) == TRAINED
    assert set(read_checkpoint(run)["state_dict"]) == TRAINED
    assert [path.name for path in run.parent.iterdir() if path.is_dir() and not path.is_symlink()] == [
        run.resolve().name
    ]


def test_a_run_that_is_told_to_stop_does_not_look_finished(tiny_folder, sample_shards, tmp_path):
    """What waits for it, such as `make train`, must not go on with the next stage."""
    overrides = [*small_overrides(tiny_folder, sample_shards), f"paths.output_dir={tmp_path}", "~callbacks.generated"]
    overrides += ["trainer.max_steps=100000", "callbacks.adapter.every_n_steps=1", "callbacks.preview.every_n_steps=0"]
    command = [sys.executable, "train.py", "experiment=stage1_image", *overrides]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: list(tmp_path.glob("stage1_image/*/adapter/adapter.safetensors")))
            process.terminate()
            assert process.wait(timeout=60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert not (tmp_path / "stage1_image" / "latest").exists()


def wait_for(condition, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# Mistakes


def test_a_wrong_experiment_lists_the_right_ones():
    run = run_command("experiment=stage3")
    assert run.returncode == 1
    assert "Could not find 'experiment/stage3'" in run.stderr
    listed = {line.strip() for line in run.stderr.splitlines()}
    assert {file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml")} <= listed
    assert "Traceback" not in run.stderr


def test_a_mistake_shows_one_message(sample_shards, tmp_path):
    overrides = (
        f"paths.shards_dir={sample_shards}",
        f"paths.output_dir={tmp_path}",
        "paths.base=./nowhere/CogVideoX-5b",
    )
    run = run_command("experiment=stage1_image", *overrides)
    assert run.returncode == 1
    first, message, *rest = run.stderr.strip().splitlines()
    assert first.startswith("Error executing job with overrides")
    assert message.startswith("The base model folder nowhere/CogVideoX-5b does not exist")
    assert "hf download THUDM/CogVideoX-5b" in message
    assert [line for line in rest if line] == [
        "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."
    ]


def test_no_default_folder_can_be_taken_for_a_hub_id():
    assert HUB_ID.fullmatch(compose_train().paths.base) is None


@pytest.fixture
def refused(tiny_folder, sample_shards, tmp_path, monkeypatch):
    """The message with which `train` refuses overrides, before a weight is read."""

    def refuse(*overrides: str, experiment: str = "stage1_image") -> str:
        monkeypatch.setattr("mm_lightning.backbone.load_component", lambda *args: pytest.fail("loaded"))
        small = small_overrides(tiny_folder, sample_shards)
        paths = (f"paths.output_dir={tmp_path}", f"paths.run_dir={tmp_path / 'run'}")
        with pytest.raises(UserError) as caught:
            train(compose_train(f"experiment={experiment}", *small, *paths, *overrides))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("callbacks.generated.num_frames=10", ["A clip of 10 frames", "the nearest are 9 and 13"]),
        ("callbacks.generated.height=50", ["height=50 is no multiple of 16"]),
        ("+callbacks.generated.prompts=[A dog runs]", ["No word for a person in the prompt 'A dog runs'"]),
        ("callbacks.generated.num_inference_steps=0", ["num_inference_steps=0: give a number from 1"]),
        ("data.batch_size=0", ["data.batch_size=0: give a whole number from 1"]),
        ("data.batch_size=null", ["data.batch_size=None: give a whole number from 1"]),
        ("global_batch_size=abc", ["global_batch_size=abc: give a whole number from 1"]),
        ("~logger", ["callbacks.learning_rate writes into a logger, and there is none"]),
        ("~logger.tensorboard", ["callbacks.learning_rate writes into a logger, and there is none"]),
        ("paths.shards_dir=nowhere", ["no shards matched 'nowhere/images'", "mm_lightning.prepare.samples"]),
        ("data.shards=nowhere/*.tar", ["no shards matched 'nowhere/*.tar'", "folder nowhere does not exist"]),
        ("model.base=nowhere", ["base model folder nowhere does not exist", "hf download", "mm_lightning.tiny"]),
        ("model.base=tests", ["tests is no complete CogVideoX", "missing: model_index.json", "hf download"]),
        ("model.vision=nowhere", ["No CLIP vision encoder at nowhere", "hf download"]),
        ("model.recognizer=nowhere", ["nowhere"]),
        ("model.loss_recognizer=nowhere", ["nowhere"]),
        ("model.init_adapter=nowhere", ["nowhere is not an adapter folder", "<run>/adapter"]),
        ("ckpt_path=nowhere", ["ckpt_path=nowhere is not there", "last.ckpt"]),
        ("ckpt_path=tests", ["tests is not complete", "resume from another"]),
        ("ckpt_path=LICENSE", ["LICENSE cannot be read as a training checkpoint"]),
        ("model.text_drop_rate=2", ["model.text_drop_rate=2 is no share", "from 0 to 1"]),
        ("model.frozen=[nonsense]", ["model.frozen names ['nonsense']", "'id_perceiver'"]),
        ("num_threads=0", ["num_threads=0: give a number from 1"]),
        ("data.batch_size=3", ["global_batch_size=8 is no multiple of data.batch_size=3"]),
        ("trainer.devices=3", ["global_batch_size=8 is no multiple of", "x 3 devices"]),
        ("model.base_dtype=bfloat16", ["needs trainer.precision=bf16-mixed", "not 32-true"]),
        ("model.base_dtype=half", ["model.base_dtype=half", "float32, bfloat16, float16"]),
        ("data.height=100", ["height=100", "multiple of 8"]),
        ("model.loss.identity_weight=-1", ["identity_weight must be 0", "not -1"]),
        ("callbacks.nonfinite.max_consecutive=0", ["max_consecutive is 0"]),
    ],
)
def test_mistakes_are_told_before_anything_loads(refused, override, words):
    message = refused(override)
    assert [word for word in words if word not in message] == []


def test_what_generates_needs_what_it_generates_with(refused):
    lean = ("model.components=[transformer]", "model.text_drop_rate=0", "model.loss.identity_weight=0")
    assert "callbacks.preview generates clips and needs text_encoder and vae" in refused(*lean, "~callbacks.generated")
    assert "or give ~callbacks.generated" in refused(*lean, "~callbacks.preview")


def test_shards_of_the_other_stage(refused, sample_shards):
    message = refused(f"data.shards={sample_shards}/images", "model.init_adapter=null", experiment="stage2_video")
    assert "a set of kind 'image', VideoDataModule takes 'video'" in message


def test_stage_2_without_stage_1(refused, tmp_path):
    message = refused(experiment="stage2_video")
    assert message.startswith(f"{tmp_path}/stage1_image/latest/adapter is not an adapter folder")


@pytest.fixture(scope="module")
def finished(tiny_folder, sample_shards, tmp_path_factory):
    """A run of one step on the smallest model: what is refused below belongs to another one."""
    run = tmp_path_factory.mktemp("finished") / "run"
    small = (*small_overrides(tiny_folder, sample_shards), "trainer.max_steps=1", f"paths.run_dir={run}")
    train(compose_train("experiment=stage1_image", *small))
    return run


@pytest.mark.parametrize(("key", "file"), [("model.init_adapter", "adapter"), ("ckpt_path", "checkpoints/last.ckpt")])
def test_what_belongs_to_another_model_is_refused(refused, finished, tiny_2b_folder, key, file):
    given = f"{key}={finished / file}"
    message = refused(given, f"model.base={tiny_2b_folder}")
    assert str(finished / file) in message
    assert "another base model (config_sha256" in message
    assert "another adapter preset (hidden_dim: 64 there, 32 here)" in refused(given, "model.adapter.hidden_dim=32")
    assert "conditioned_norm: 'can' there, 'none' here" in refused(given, "ablation=no_can")
    assert "another front-end (fusion" in refused(given, "ablation=no_text_branch")


def test_a_checkpoint_of_something_else_is_refused(refused, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "is no training checkpoint of this project" in refused(f"ckpt_path={tmp_path / 'other.ckpt'}")

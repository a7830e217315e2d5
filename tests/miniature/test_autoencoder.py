"""The VAE's training: its arithmetic against diffusers' own, its losses by hand, the command that users type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from omegaconf import OmegaConf
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mm_lightning.checkpoint import trainable_parameters
from mm_lightning.config import UserError
from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.fewer_operations import enlarging_weight, fewer_operations
from mm_lightning.miniature.autoencoder import (
    AutoencoderModule,
    build_autoencoder,
    edges,
    face_weight,
    identity_distance,
    kl_divergence,
    picture_grid,
    psnr,
    reconstruction_terms,
    temporal_weights,
)
from mm_lightning.miniature.data import MiniatureBatch, Words, collate, load_split
from tests.conftest import ROOT
from tests.miniature import real_people
from tests.miniature.small_people import write_people
from tests.runs import compose_train
from train import train

WIDTHS = (8, 16, 12, 8)
SMALL = {"block_out_channels": WIDTHS, "norm_num_groups": 4, "sample_size": 32}
OVERRIDES = ("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "model.block_out_channels=[8,8,8,8]")


def small_vae() -> AutoencoderKLCogVideoX:
    """In double precision, so that differences of rounding do not hide others."""
    torch.manual_seed(0)
    vae = build_autoencoder(WIDTHS, 1, 4, 32).double()
    with torch.no_grad():
        for parameter in vae.parameters():  # none that is zero, as some are where training starts
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return vae


def small_module(**options) -> AutoencoderModule:
    optimizer = partial(torch.optim.AdamW, lr=5e-3)
    schedule = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    return AutoencoderModule(optimizer, schedule, **SMALL, **options)


def batch_of(pixels: torch.Tensor) -> MiniatureBatch:
    count, frames = pixels.shape[:2]
    boxes = torch.tensor([8.0, 6.0, 24.0, 28.0]).expand(count, frames, 4)
    words, keys = [Words("A man img")] * count, [str(i) for i in range(count)]
    return MiniatureBatch(keys, pixels, boxes, torch.zeros(count, frames, 5, 2), torch.arange(count), words)


# Fewer operations -----------------------------------------------------------------------------------------------------


def passes(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Moments, pictures, and the gradients of a loss on both by the name of the parameter."""
    vae.zero_grad()
    moments = vae.encode(pixels).latent_dist.parameters
    decoded = vae.decode(moments.chunk(2, 1)[0]).sample
    target = torch.linspace(-1, 1, decoded.numel(), dtype=decoded.dtype).view(decoded.shape)
    ((decoded - target).square().mean() + moments.square().mean()).backward()
    return {"moments": moments, "decoded": decoded} | {name: p.grad.clone() for name, p in vae.named_parameters()}


@pytest.mark.parametrize("num_frames", [1, 9, 17])
def test_fewer_operations_give_what_diffusers_gives(num_frames):
    """In values and in the gradient of every parameter; 17 frames run in two parts that hand on their last frames."""
    vae = small_vae()
    pixels = torch.randn(2, 3, num_frames, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = passes(vae, pixels)
    with fewer_operations(vae):
        found = passes(vae, pixels)
    assert found["decoded"].shape == (2, 3, num_frames, 32, 32)
    assert wanted["decoded"].std() > 1e-3
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def count_operations(vae: AutoencoderKLCogVideoX) -> int:
    """Of convolutions and products, forward and backward, for a still."""
    with FlopCounterMode(display=False) as counter:
        passes(vae, torch.randn(1, 3, 1, 32, 32, dtype=torch.float64))
    return counter.get_total_flops()


def test_fewer_operations_are_fewer():
    vae = small_vae()
    usual = count_operations(vae)
    with fewer_operations(vae):
        assert count_operations(vae) < usual / 2.5


def is_replaced(vae: AutoencoderKLCogVideoX) -> bool:
    return any("forward" in module.__dict__ for module in vae.modules())


def fail_within(vae: AutoencoderKLCogVideoX) -> None:
    with fewer_operations(vae), fewer_operations(vae):
        assert is_replaced(vae)
        raise ZeroDivisionError


def test_modules_get_their_forward_back():
    vae = small_vae()
    with pytest.raises(ZeroDivisionError):
        fail_within(vae)
    assert not is_replaced(vae)


def test_an_inner_block_leaves_the_outer_one_in_force():
    vae = small_vae()
    with fewer_operations(vae):
        with fewer_operations(vae):
            pass
        assert is_replaced(vae)


def test_enlarging_weight():
    x, weight = torch.randn(2, 3, 5, 4), torch.randn(6, 3, 3, 3)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    found = F.conv_transpose2d(x, enlarging_weight(weight), stride=2, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Losses ---------------------------------------------------------------------------------------------------------------


def test_face_weight_by_hand():
    weight = face_weight(torch.tensor([[[1.0, 0.0, 2.0, 1.0]]]), height=3, width=4, inside=3.0)
    by_hand = torch.tensor([[1.0, 3, 3, 1], [1, 3, 3, 1], [1, 1, 1, 1]])
    torch.testing.assert_close(weight, (by_hand / by_hand.mean())[None, None, None])


def test_terms_by_hand():
    target = torch.zeros(1, 1, 3, 4, 4)
    pixels = target.clone()
    pixels[..., 2] = 0.5
    terms = reconstruction_terms(pixels, target, torch.ones(1, 1, 1, 4, 4))
    # A column of four is off by .5; it has an edge on both sides of each of its pixels, and none above or below.
    expected = {"l1": 0.5 / 4, "mse": 0.25 / 4, "edges": 2 * 0.5 / 4}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected)


def test_error_inside_the_face_counts_more():
    target = torch.zeros(1, 1, 3, 8, 8)
    weight = face_weight(torch.tensor([[[0.0, 0.0, 3.0, 7.0]]]), 8, 8, 3.0)
    inside, outside = target.clone(), target.clone()
    inside[..., :4], outside[..., 4:] = 1.0, 1.0
    ratio = reconstruction_terms(inside, target, weight)["l1"] / reconstruction_terms(outside, target, weight)["l1"]
    assert ratio.item() == pytest.approx(3.0)


def test_kl_agrees_with_torch():
    mean, logvar = torch.randn(2, 16, 1, 4, 4), torch.randn(2, 16, 1, 4, 4)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    wanted = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), wanted)


def test_psnr_agrees_with_skimage():
    rng = np.random.default_rng(0)
    target = rng.uniform(-1, 1, (3, 2, 3, 8, 8))
    pixels = np.clip(target + rng.normal(0, 0.1, target.shape), -1, 1)
    wanted = [peak_signal_noise_ratio(t, p, data_range=2) for t, p in zip(target, pixels, strict=True)]
    torch.testing.assert_close(psnr(torch.tensor(pixels), torch.tensor(target)), torch.tensor(wanted).float())


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> MiniatureBatch:
    """Nine frames each of two real people."""
    people = tmp_path_factory.mktemp("faces")
    real_people.write_people(people / "train")
    return collate(load_split(people, "train").clips, torch.arange(2), slice(0, 9))


def test_identity_distance_equals_numpy_over_the_frames_that_show_a_face(faces):
    recognizer = load_recognizer("dlib_standardized")
    pixels = (faces.pixels + 0.1 * torch.randn_like(faces.pixels)).requires_grad_()
    landmarks = faces.landmarks.clone()
    landmarks[1, 3:] = 0
    found = identity_distance(pixels, faces.pixels, landmarks, recognizer)
    frames = [(0, i) for i in range(9)] + [(1, i) for i in range(3)]
    cosines = []
    for at in frames:
        a, b = (recognizer.embed(p[at][None].detach(), landmarks[at][None])[0].double() for p in (pixels, faces.pixels))
        cosines.append(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.item() == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    found.backward()
    assert pixels.grad[0].any()
    assert not pixels.grad[1, 3:].any()


def test_identity_distance_of_the_same_and_of_another_person(faces):
    recognizer = load_recognizer("dlib_standardized")
    same = identity_distance(faces.pixels, faces.pixels, faces.landmarks, recognizer)
    other = identity_distance(faces.pixels[:1], faces.pixels[1:], faces.landmarks[1:], recognizer)
    assert same.item() == pytest.approx(0, abs=1e-5)
    assert other.item() > 0.5


def test_without_a_face_the_identity_distance_is_zero_and_has_a_gradient(faces):
    pixels = faces.pixels.clone().requires_grad_()
    nothing = identity_distance(pixels, faces.pixels, torch.zeros_like(faces.landmarks), load_recognizer("dlib"))
    nothing.backward()
    assert nothing.item() == 0
    assert not pixels.grad.any()


def test_edges_of_a_ramp():
    horizontal, vertical = edges(torch.arange(4.0).expand(1, 1, 1, 3, 4))
    assert horizontal[0, 0, 0].tolist() == [[1.0, 1.0, 1.0, 0.0]] * 3
    assert not vertical.any()


def test_grid_shows_originals_above_reconstructions():
    stills = torch.linspace(-1, 1, 16).view(16, 1, 1, 1, 1).expand(16, 1, 3, 4, 4)
    grid = picture_grid(stills, -stills, num_rows=4)
    assert grid.shape == (3, 4 * 4, 8 * 4)
    torch.testing.assert_close(grid[:, :4] + grid[:, 4:8], torch.ones(3, 4, 32))
    assert picture_grid(torch.zeros(2, 17, 3, 4, 4), torch.zeros(2, 17, 3, 4, 4), 4).shape == (3, 4 * 4, 5 * 4)


# Training -------------------------------------------------------------------------------------------------------------


def train_by_hand(
    module: AutoencoderModule, pixels: torch.Tensor, num_steps: int, landmarks: torch.Tensor | None = None
) -> list[float]:
    (optimizer, batch), losses = (module.configure_optimizers()["optimizer"], batch_of(pixels)), []
    batch = batch if landmarks is None else batch._replace(landmarks=landmarks)
    module.log = module.log_dict = lambda *args, **kwargs: None
    for _ in range(num_steps):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("num_frames", [1, 9])
def test_a_few_steps_fit_a_batch(num_frames, monkeypatch):
    monkeypatch.setattr(AutoencoderModule, "global_step", 0)
    ramp = torch.linspace(-1, 1, 32)
    pixels = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32)])[:, None, None]
    pixels = pixels.expand(2, num_frames, 3, 32, 32)
    losses = train_by_hand(small_module(), pixels, 12)
    assert losses[-1] < 0.7 * losses[0]


def test_stills_train_the_current_frame_alone(monkeypatch):
    """So that no clip is smeared by what stills left in the taps of the past."""
    monkeypatch.setattr(AutoencoderModule, "global_step", 0)
    module = small_module()
    train_by_hand(module, torch.rand(2, 1, 3, 32, 32) * 2 - 1, 3)
    weights = temporal_weights(module.vae)
    assert all(not weight[:, :, :-1].any() and weight[:, :, -1].any() for weight in weights)
    train_by_hand(module, torch.rand(1, 9, 3, 32, 32) * 2 - 1, 1)
    assert all(weight[:, :, :-1].any() for weight in weights[1:])


def test_export_brings_latents_to_unit_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderModule, "global_step", 0)
    module, pixels = small_module(export_dtype="float32"), torch.rand(4, 1, 3, 32, 32) * 2 - 1
    train_by_hand(module, pixels, 2)
    module.latent_std.fill_(module.reconstruct(pixels).mean.std().item())
    module.export(tmp_path)
    vae = AutoencoderKLCogVideoX.from_pretrained(tmp_path, subfolder="vae")
    latents = vae.encode(pixels.transpose(1, 2)).latent_dist.mean * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1.0, rel=1e-3)
    module.export(tmp_path)  # replaces
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_decoder_alone_keeps_latents_and_their_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderModule, "global_step", 0)
    pixels = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    first = small_module(export_dtype="float32")
    train_by_hand(first, pixels, 2)
    first.export(tmp_path / "first")
    second = small_module(export_dtype="float32", init=str(tmp_path / "first"), train_encoder=False)
    torch.testing.assert_close(second.reconstruct(pixels).pixels, first.reconstruct(pixels).pixels)
    train_by_hand(second, pixels, 2)
    second.export(tmp_path / "second")
    old, new = (
        AutoencoderKLCogVideoX.from_pretrained(tmp_path / name, subfolder="vae") for name in ("first", "second")
    )
    assert new.config.scaling_factor == old.config.scaling_factor
    changed = {name for name, tensor in new.state_dict().items() if not torch.equal(tensor, old.state_dict()[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder"}


def test_with_a_recogniser_the_decoder_learns_whose_face_it_is(faces, tmp_path, monkeypatch):
    """The recogniser takes no part in what trains, nor in a checkpoint, and a checkpoint without it loads strictly."""
    monkeypatch.setattr(AutoencoderModule, "global_step", 0)
    first = small_module(export_dtype="float32")
    train_by_hand(first, faces.pixels[:, :1, :, ::2, ::2], 2)
    first.export(tmp_path)
    options = {"recognizer": "dlib_standardized", "identity_weight": 1.0}
    module = small_module(init=str(tmp_path), train_encoder=False, **options)
    assert {name.split(".")[1] for name in trainable_parameters(module)} == {"decoder"}
    losses = train_by_hand(module, faces.pixels[:, :1], 6, faces.landmarks[:, :1])
    assert losses[-1] < losses[0]
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("recognizer")]
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def test_start_from_nothing_or_another_size(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere holds no vae/"):
        small_module(init="nowhere")
    monkeypatch.setattr(AutoencoderModule, "global_step", 0)
    module = small_module()
    train_by_hand(module, torch.zeros(1, 1, 3, 32, 32), 1)
    module.export(tmp_path)
    with pytest.raises(ValueError, match=r"has block_out_channels=\[8, 16, 12, 8\], asked for is \[8, 8, 8, 8\]"):
        AutoencoderModule(None, None, **(SMALL | {"block_out_channels": (8, 8, 8, 8)}), init=str(tmp_path))


def test_untrained_has_nothing_to_export(tmp_path):
    with pytest.raises(RuntimeError, match="export after a step"):
        small_module().export(tmp_path)
    assert not any(tmp_path.iterdir())


def test_running_scale_is_the_mean_of_the_first_values():
    module = small_module()
    batches = [torch.randn(64, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)]
    for batch in batches:
        module.update_latent_std(batch)
    assert module.latent_std.item() == pytest.approx(np.mean([batch.std().item() for batch in batches]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_out_channels": (8, 8, 8)},
            r"block_out_channels=\[8, 8, 8\]: give four multiples",
        ),
        ({"block_out_channels": (8, 8, 8, 6)}, "give four multiples"),
        ({"export_dtype": "int8"}, "model.export_dtype=int8: give one of float32"),
    ],
)
def test_values_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderModule(None, None, **(SMALL | options))


def test_default_size_fits_what_is_shipped():
    vae = build_autoencoder((16, 32, 48, 32), 1, 8, 64)
    assert sum(parameter.numel() for parameter in vae.parameters()) <= 1_100_000


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return write_people(tmp_path_factory.mktemp("people"))


def run_command(
    people: Path, out: Path, *overrides: str, experiment: str = "miniature_vae"
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA_", "PL_", "RANK", "LOCAL_RANK"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    small = ("global_batch_size=4", "data.clip_batch_size=1", f"data.people={people}", f"paths.output_dir={out}")
    command = [sys.executable, "train.py", f"experiment={experiment}", *OVERRIDES, *small, *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole_run(people, tmp_path_factory) -> Path:
    """Six steps, the last three mixed with clips."""
    out = tmp_path_factory.mktemp("whole")
    run = run_command(
        people, out, "scale=0.0002", "data.first_clip=3", "trainer.val_check_interval=6", f"hydra.run.dir={out}/run"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def test_command_trains_logs_and_exports(whole_run):
    events = EventAccumulator(str(whole_run / "run/tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"train/loss", "val/loss", "val/psnr_stills", "val/psnr_clips"} <= set(tags["scalars"])
    assert {"reconstruction/stills", "reconstruction/clips"} <= set(tags["images"])
    vae = AutoencoderKLCogVideoX.from_pretrained(whole_run / "miniature_model", subfolder="vae")
    assert vae.config.scaling_factor != 1.0
    tensors = load_file(whole_run / "miniature_model/vae/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert json.loads((whole_run / "miniature_model/vae/config.json").read_text())["latent_channels"] == 16


def test_decoder_goes_on_from_what_was_exported_and_replaces_it(people, whole_run, tmp_path):
    shutil.copytree(whole_run / "miniature_model", tmp_path / "miniature_model")
    run = run_command(people, tmp_path, "scale=0.0002", f"hydra.run.dir={tmp_path}/run", experiment="miniature_decoder")
    assert run.returncode == 0, run.stderr[-3000:]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert {"train/loss/identity", "val/identity"} <= set(events.Tags()["scalars"])
    file = "miniature_model/vae/diffusion_pytorch_model.safetensors"
    old, new = (load_file(folder / file) for folder in (whole_run, tmp_path))
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder"}
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("recognizer")]


@pytest.mark.slow
def test_a_resumed_run_ends_like_one_that_was_not_cut(people, whole_run, tmp_path):
    """Stopped after four steps of the same recipe, then gone on with."""
    recipe = ("scale=0.0002", "data.first_clip=3")
    limits = ("+trainer.limit_train_batches=4", "trainer.val_check_interval=null", "trainer.max_epochs=1")
    cut = run_command(
        people,
        tmp_path,
        *recipe,
        *limits,
        "callbacks.checkpoint.every_n_train_steps=4",
        f"hydra.run.dir={tmp_path}/cut",
    )
    assert cut.returncode == 0, cut.stderr[-3000:]
    checkpoint = tmp_path / "cut/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    rest = run_command(people, tmp_path, *recipe, f"ckpt_path={checkpoint}", f"hydra.run.dir={tmp_path}/rest")
    assert rest.returncode == 0, rest.stderr[-3000:]
    wanted, found = (
        load_file(out / "miniature_model/vae/diffusion_pytorch_model.safetensors") for out in (whole_run, tmp_path)
    )
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-3, msg=name)


def test_scale_shortens_the_whole_recipe_alike():
    scales = ("scale=1", "scale=0.1")
    long, short = (compose_train("experiment=miniature_vae", scale, "paths.run_dir=run") for scale in scales)
    for key in ("trainer.max_steps", "data.first_clip", "model.lr_schedule.num_warmup_steps"):
        assert OmegaConf.select(short, key) * 10 == OmegaConf.select(long, key), key
    assert long.data.first_clip < long.trainer.max_steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scale=0", "scale=0: give a positive number"),
        ("model.block_out_channels=[8,8]", "model.block_out_channels=[8, 8]: give four multiples"),
        ("model.export_dtype=half", "model.export_dtype=half: give one of float32"),
        ("data.mode=films", "data.mode=films: give one of stills, clips, mixed"),
        ("data.clip_lengths=[5]", "data.clip_lengths=[5]: give lengths such as 1, 9 or 17"),
        ("ckpt_path=nowhere", "ckpt_path=nowhere is not there"),
    ],
)
def test_mistakes_are_told_before_anything_loads(people, tmp_path, override, message):
    small = (f"data.people={people}", f"paths.run_dir={tmp_path}", "trainer.accelerator=cpu")
    with pytest.raises(UserError) as caught:
        train.__wrapped__(compose_train("experiment=miniature_vae", *small, override))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

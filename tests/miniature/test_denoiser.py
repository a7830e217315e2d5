"""The backbone's pre-training: its arithmetic against diffusers' own, its batches, the command that users type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mm_lightning.backbone import Backbone, RotaryEmbeddings, read_json
from mm_lightning.config import UserError
from mm_lightning.miniature.data import Words, load_split
from mm_lightning.miniature.denoiser import DenoiserModule, JointAttnProcessor, draw_timesteps
from mm_lightning.miniature.latents import (
    LatentBatch,
    LatentDataModule,
    LatentItems,
    LatentSplit,
    TrainLatents,
    mirrored,
    prompts_of,
)
from mm_lightning.tiny import build_scheduler
from tests.conftest import ROOT, SMALL
from tests.miniature.small_people import write_people
from tests.runs import compose_train
from train import train as run_training

train = run_training.__wrapped__

TRANSFORMER = {name: SMALL[name] for name in SMALL if name not in ("vae_channels", "image_encoder_dim")}
TRANSFORMER |= {"num_layers": 2, "use_rotary_positional_embeddings": True}
OVERRIDES = (
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "num_threads=1",
    "global_batch_size=4",
    "data.clip_batch_size=2",
    "data.clip_every=2",
    "data.num_val_stills=4",
    "data.num_val_clips=1",
    "model.num_samples=2",
    "model.num_inference_steps=2",
    *(f"model.transformer.{name}={value}" for name, value in TRANSFORMER.items()),
)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return write_people(tmp_path_factory.mktemp("people"))


def small_transformer(seed: int = 0) -> CogVideoXTransformer3DModel:
    torch.manual_seed(seed)
    return CogVideoXTransformer3DModel(**TRANSFORMER)


def small_module(base: Path, **options) -> DenoiserModule:
    module = DenoiserModule(
        str(base),
        partial(CogVideoXTransformer3DModel, **TRANSFORMER),
        partial(torch.optim.AdamW, lr=1e-3),
        partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        **options,
    )
    module.configure_model()
    return module


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def passes(transformer: CogVideoXTransformer3DModel, rotary: RotaryEmbeddings) -> dict[str, torch.Tensor]:
    """The velocity, and its gradients by the name of the parameter."""
    transformer.zero_grad()
    velocity = transformer(
        hidden_states=noise(2, 5, 16, 4, 4, dtype=torch.float64),
        encoder_hidden_states=noise(2, 32, 32, dtype=torch.float64),
        timestep=torch.tensor([20, 900]),
        image_rotary_emb=rotary,
    ).sample
    velocity.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}
    return {"velocity": velocity.detach()} | gradients


def test_attention_is_that_of_diffusers_in_values_and_gradients(tiny_folder):
    transformer = small_transformer().double()
    rotary = Backbone.from_pretrained(tiny_folder, components=()).rotary_embeddings(5, 32, 32)
    wanted = passes(transformer, rotary)
    transformer.set_attn_processor(JointAttnProcessor())
    found = passes(transformer, rotary)
    assert wanted["velocity"].std() > 1e-2
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # RoPE is computed in single precision by diffusers, whatever comes in
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)


def test_forward_is_that_of_the_pipeline(tiny_folder):
    """The arguments of the transformer inside `CogVideoXPipeline.__call__`, given to `predict`: the same bits."""
    module = small_module(tiny_folder)
    for block in module.transformer.transformer_blocks:
        block.attn1.set_processor(small_transformer().transformer_blocks[0].attn1.processor)
    pipeline = CogVideoXPipeline.from_pretrained(tiny_folder, transformer=module.transformer, torch_dtype=torch.float32)
    calls = []
    forward = module.transformer.forward

    def listen(*args, **kwargs):
        calls.append((kwargs, forward(*args, **kwargs)))
        return calls[-1][1]

    with patch.object(module.transformer, "forward", listen):
        pipeline("a man", height=32, width=32, num_frames=17, num_inference_steps=1, max_sequence_length=32,
                 output_type="latent", generator=torch.Generator().manual_seed(0))  # fmt: skip
    kwargs, velocity = calls[0]
    with torch.no_grad():
        found = module.predict(kwargs["hidden_states"], kwargs["timestep"], kwargs["encoder_hidden_states"])
    assert found.shape == (2, 5, 16, 4, 4)
    assert torch.equal(found, velocity[0])
    for found_table, table in zip(module.rotary_embeddings(5, 4, 4), kwargs["image_rotary_emb"], strict=True):
        assert torch.equal(found_table, table)


def test_loss_is_the_velocity_error(tiny_folder):
    """Against float64 from the formulas, with noise drawn again in the order that is promised."""
    module = small_module(tiny_folder)
    moments, prompts = noise(3, 1, 32, 4, 4), noise(3, 32, 32, seed=1)
    timestep = torch.tensor([0, 500, 999])
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    with torch.no_grad():
        loss, sample = module.compute_loss(LatentBatch(list("abc"), moments, prompts), generators, timestep)
        velocity = module.predict(sample.noisy_latents, timestep, prompts)
    scale = read_json(tiny_folder / "vae/config.json")["scaling_factor"]
    alpha_bar = build_scheduler().alphas_cumprod.double().numpy()
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        posterior, eps = (torch.randn(1, 16, 4, 4, generator=generator).double().numpy() for _ in range(2))
        mean, logvar = np.split(moments[i].double().numpy(), 2, axis=1)
        x, a = (mean + np.exp(logvar / 2) * posterior) * scale, alpha_bar[int(timestep[i])]
        np.testing.assert_allclose(sample.noisy_latents[i], a**0.5 * x + (1 - a) ** 0.5 * eps, rtol=1e-4, atol=1e-5)
        target = a**0.5 * eps - (1 - a) ** 0.5 * x
        np.testing.assert_allclose(loss[i], ((velocity[i].numpy() - target) ** 2).mean(), rtol=1e-4)


def test_timesteps_follow_the_logit_normal_distribution():
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([draw_timesteps(64, 1000, -0.3, 1.2, generator) for _ in range(500)])
    assert draws.min() >= 0
    assert draws.max() <= 999
    places = (draws.double() + 0.5) / 1000
    logits = (places / (1 - places)).log()
    assert float(logits.mean()) == pytest.approx(-0.3, abs=0.02)
    assert float(logits.std()) == pytest.approx(1.2, abs=0.02)


def test_timesteps_of_a_batch_are_spread():
    """One of each sixteenth, in random order."""
    first, second = (draw_timesteps(16, 1000, 0.0, 1.0, torch.Generator().manual_seed(i)) for i in range(2))
    edges = torch.special.ndtri(torch.arange(1, 16).double() / 16).sigmoid() * 1000
    for draws in (first, second):
        assert torch.equal(torch.bucketize(draws.sort().values.double() + 0.5, edges), torch.arange(16))
    assert not torch.equal(first.argsort(), second.argsort())


# Batches --------------------------------------------------------------------------------------------------------------


def numbered_latents(num_stills: int = 10, num_clips: int = 3) -> LatentSplit:
    """Every moment is its item's number, negative where it is mirrored; every prompt is its row."""

    prompts = torch.arange(4).view(2, 2)

    def items(prefix: str, count: int, num_frames: int) -> LatentItems:
        number = torch.arange(1.0, count + 1).view(-1, 1, 1, 1, 1, 1).expand(count, 2, num_frames, 32, 1, 1)
        sign = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1, 1)
        return LatentItems([f"{prefix}{i}" for i in range(count)], number * sign, prompts.expand(count, 2, 2))

    table = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 2)
    return LatentSplit(items("s", num_stills, 1), items("c", num_clips, 5), table, torch.full((2, 2), -1.0))


def train_latents(**options) -> TrainLatents:
    settings = {"batch_size": 5, "clip_batch_size": 3, "clip_every": 4, "first_clip": 2, "flip_probability": 0.5,
                "rich_probability": 0.5, "text_drop_rate": 0.1, "seed": 0}  # fmt: skip
    return TrainLatents(numbered_latents(), **settings | options)


def test_every_fourth_batch_shows_clips():
    batches = train_latents()
    frames = [batches[step].latent_moments.shape[1] for step in range(12)]
    assert frames == [1, 1, 5, 1, 1, 1, 5, 1, 1, 1, 5, 1]


def test_a_pass_shows_every_item_once():
    batches = train_latents()
    stills = [step for step in range(12) if batches[step].latent_moments.shape[1] == 1]
    for first in (0, 2, 4):
        keys = [key for step in stills[first : first + 2] for key in batches[step].keys]
        assert sorted(keys) == sorted(f"s{i}" for i in range(10))
    assert batches[0].keys != batches[stills[2]].keys


def test_a_batch_follows_from_seed_and_step():
    first, again, other = train_latents()[7], train_latents()[7], train_latents(seed=1)[7]
    for found, wanted in zip(first[1:], again[1:], strict=True):
        assert torch.equal(found, wanted)
    assert first.keys == again.keys != other.keys


def test_captions_and_pictures_are_mirrored_together():
    """Row 0 and 1 are the caption and the rich one, 2 and 3 those of the mirror image; -1 tells nothing."""
    batches = [train_latents(batch_size=10)[step] for step in range(400)]
    stills = [batch for batch in batches if batch.latent_moments.shape[1] == 1]
    flipped = torch.cat([batch.latent_moments[:, 0, 0, 0, 0] for batch in stills]) < 0
    told = torch.cat([batch.prompt_embeds[:, 0, 0] for batch in stills])
    dropped = told < 0
    assert torch.equal(told[~dropped] >= 2, flipped[~dropped])
    assert float(dropped.double().mean()) == pytest.approx(0.1, abs=0.02)
    assert float(flipped.double().mean()) == pytest.approx(0.5, abs=0.03)
    assert float((told[~dropped] % 2).mean()) == pytest.approx(0.5, abs=0.03)


def test_the_caption_of_a_mirror_image():
    assert mirrored("A man img turns, lit from the left") == "A man img turns, lit from the right"
    assert mirrored("A girl img is upright, lit from the right") == "A girl img is upright, lit from the left"


def data_module(people: Path, base: Path, cache: Path, **options) -> LatentDataModule:
    settings = {"batch_size": 4, "clip_batch_size": 2, "max_text_seq_length": 32}
    return LatentDataModule(str(people), str(base), str(cache), **settings | options)


def test_latents_are_those_of_the_backbone(people, tiny_folder, tmp_path):
    """Stored ones of a picture and of its mirror image, against `Backbone.encode_video` and the text encoder."""
    module = data_module(people, tiny_folder, tmp_path)
    module.prepare_data()
    module.setup()
    backbone = Backbone.from_pretrained(tiny_folder, torch_dtype="float32")
    items = load_split(people, "train")
    for kind, shape in (("stills", (15, 2, 1, 32, 4, 4)), ("clips", (5, 2, 5, 32, 4, 4))):
        stored = getattr(module.train_latents, kind)
        pixels = getattr(items, kind).pixels[:1].float() / 127.5 - 1
        assert stored.moments.shape == shape
        for side, seen in enumerate((pixels, pixels.flip(-1))):
            torch.testing.assert_close(stored.moments[0, side], backbone.encode_video(seen)[0], rtol=1e-3, atol=1e-4)
    embeds = module.train_latents.prompt_embeds[stored.prompts[0, 0, 0]]
    tokens = backbone.tokenizer("A girl girl smiles", padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(embeds, backbone.text_encoder(tokens.input_ids)[0][0], rtol=1e-4, atol=1e-5)


def test_latents_are_encoded_once(people, tiny_folder, tmp_path):
    first = data_module(people, tiny_folder, tmp_path)
    first.prepare_data()
    with patch("mm_lightning.miniature.latents.encode_people", side_effect=AssertionError("encoded again")):
        second = data_module(people, tiny_folder, tmp_path)
        second.prepare_data()
        second.setup()
        with pytest.raises(AssertionError, match="encoded again"):
            data_module(people, tiny_folder, tmp_path, max_people=2).prepare_data()
    assert torch.equal(second.train_latents.clips.moments, first.encoded("train").clips.moments)


def test_prompts_of_an_item(people):
    items = load_split(people, "train").stills
    said = items._replace(words=[Words("A man img, lit from the left", "A tan man img")], keys=items.keys[:1])
    assert prompts_of(said) == [
        [["A man img, lit from the left", "A tan man img"], ["A man img, lit from the right", "A tan man img"]]
    ]


# The command ----------------------------------------------------------------------------------------------------------


def overrides_for(people: Path, base: Path, out: Path) -> list[str]:
    return [
        "experiment=miniature_backbone",
        f"data.people={people}",
        f"data.cache={people}/latents",
        f"model.base={base}",
        f"callbacks.export.folder={out}/model",
        f"paths.output_dir={out}",
        *OVERRIDES,
    ]


def run_command(people: Path, base: Path, out: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *overrides_for(people, base, out), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def whole_run(people, tiny_folder, tmp_path_factory) -> Path:
    """Six steps, of which the third and the fifth show clips."""
    out = tmp_path_factory.mktemp("whole")
    done = run_command(people, tiny_folder, out, "scale=0.0001", "data.first_clip=2", "trainer.val_check_interval=6")
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_run_is_logged(whole_run):
    events = EventAccumulator(str(whole_run / "miniature_backbone/latest/tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars, images = set(events.Tags()["scalars"]), set(events.Tags()["images"])
    assert {"train/loss", "val/loss", "val/loss_stills", "val/loss_clips"} <= scalars
    quarters = {f"{i}-{i + 249}" for i in (0, 250, 500, 750)}
    assert {f"train/velocity_at/{quarter}" for quarter in quarters} <= scalars
    assert {f"val/velocity_at/{quarter}" for quarter in quarters} & scalars
    assert images == {"samples/stills", "samples/clips"}
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))


def test_the_export_is_a_whole_model(whole_run, tiny_folder):
    folder = whole_run / "model"
    tensors = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    backbone = Backbone.from_pretrained(folder, torch_dtype="float32")
    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for transformer in (backbone.transformer, pipeline.transformer):
        assert transformer.dtype == torch.float32
        for name, tensor in transformer.state_dict().items():
            assert torch.equal(tensor, tensors[name].float()), name
    written, wanted = (
        {name: value for name, value in scheduler.config.items() if name[0] != "_"}
        for scheduler in (pipeline.scheduler, build_scheduler())
    )
    assert written == wanted
    weights = ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    for name in (*weights, "tokenizer/tokenizer.json"):
        assert (folder / name).read_bytes() == (tiny_folder / name).read_bytes()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_export_into_the_base_keeps_its_parts(tiny_folder, tmp_path):
    """The recipe's way: every part of the model is trained into one folder."""
    base = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    before = (base / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    module = small_module(base)
    module.export(base)
    assert (base / "vae/diffusion_pytorch_model.safetensors").read_bytes() == before
    found = Backbone.from_pretrained(base, torch_dtype="float32").transformer.state_dict()
    for name, tensor in module.transformer.state_dict().items():
        assert torch.equal(found[name], tensor.half().float()), name


@pytest.mark.slow
def test_a_resumed_run_is_the_run(people, tiny_folder, whole_run, tmp_path):
    """Stopped after four of six steps, then gone on with: every averaged weight, bit by bit."""
    recipe = ("scale=0.0001", "data.first_clip=2", "trainer.val_check_interval=6")
    limits = ("+trainer.limit_train_batches=4", "trainer.val_check_interval=null", "trainer.max_epochs=1")
    limits += ("callbacks.checkpoint.every_n_train_steps=4",)
    cut = run_command(people, tiny_folder, tmp_path, *recipe, *limits, f"hydra.run.dir={tmp_path}/cut")
    assert cut.returncode == 0, cut.stderr[-3000:]
    checkpoint = tmp_path / "cut/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    rest = run_command(
        people, tiny_folder, tmp_path, *recipe, f"ckpt_path={checkpoint}", f"hydra.run.dir={tmp_path}/rest"
    )
    assert rest.returncode == 0, rest.stderr[-3000:]
    name = "transformer/diffusion_pytorch_model.safetensors"
    wanted, found = (load_file(out / "model" / name) for out in (whole_run, tmp_path))
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.base=nowhere", "nowhere lacks vae/config.json, vae/diffusion_pytorch_model.safetensors, text_encoder/"),
        ("model.transformer.text_embed_dim=48", "model.transformer.text_embed_dim=48, but"),
        ("+model.transformer.in_channels=8", "model.transformer.in_channels=8, but"),
        ("model.init=nowhere", "model.init=nowhere holds no transformer/"),
        ("model.init={tiny} model.transformer.num_layers=3", "has num_layers=4 and not 3: change either"),
        ("model.timestep_std=0", "model.timestep_std=0: give a positive number"),
        ("model.export_dtype=half", "model.export_dtype=half: give one of float32"),
        ("data.text_drop_rate=1.5", "data.text_drop_rate=1.5: give a number from 0 to 1"),
        ("data.clip_every=0", "data.clip_every=0: give a number from 1"),
        ("scale=0", "scale=0: give a positive number"),
        ("ckpt_path=nowhere.ckpt", "ckpt_path=nowhere.ckpt is not there"),
    ],
)
def test_mistakes_are_told_before_anything_loads(people, tiny_folder, tmp_path, override, message):
    given = override.format(tiny=tiny_folder).split()
    overrides = [*overrides_for(people, tiny_folder, tmp_path), f"paths.run_dir={tmp_path}", *given]
    with pytest.raises(UserError) as caught:
        train(compose_train(*overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_goes_on_from_an_earlier_transformer(tiny_folder, tmp_path):
    earlier = small_transformer(seed=5)
    earlier.half().save_pretrained(tmp_path / "transformer")
    found = small_module(tiny_folder, init=str(tmp_path)).transformer
    assert found.state_dict().keys() == earlier.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], w.float()) for name, w in earlier.state_dict().items())
    assert found.dtype == torch.float32
    assert all(p.requires_grad for p in found.parameters())


def test_motion_is_trained_on_clips_alone(people, tiny_folder, tmp_path):
    """The command's configuration: from the backbone's folder into the same, no batch of stills."""
    cfg = compose_train("experiment=miniature_motion", "scale=0.16", f"paths.run_dir={tmp_path}")
    OmegaConf.resolve(cfg)
    assert cfg.model.init == cfg.model.base == cfg.callbacks.export.folder
    assert cfg.trainer.max_steps == cfg.model.lr_schedule.num_training_steps == 3200
    assert cfg.data.clip_every == 1
    assert cfg.data.first_clip == 0


def test_the_recipe_is_the_contract():
    """Sizes of the shipped model, and the steps of two cores."""
    cfg = compose_train("experiment=miniature_backbone", "scale=0.12", "paths.run_dir=run")
    OmegaConf.resolve(cfg)
    transformer = CogVideoXTransformer3DModel(**{k: v for k, v in cfg.model.transformer.items() if k[0] != "_"})
    assert sum(p.numel() for p in transformer.parameters()) <= 4_900_000
    assert transformer.config.num_layers == 8
    assert transformer.config.max_text_seq_length == 24
    assert cfg.trainer.max_steps == cfg.model.lr_schedule.num_training_steps == 7200

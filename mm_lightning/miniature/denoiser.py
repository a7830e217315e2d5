"""The miniature's transformer, trained from scratch as text-to-video on the train people's latents.

    python train.py experiment=miniature_backbone
    python train.py experiment=miniature_motion  # then once more, on clips alone

Letters: B batch, F frames, F' latent frames, C latent channels, h w latent pixels, T text tokens, D_txt width of T5,
N text and video tokens, M heads, K width of one, P num_train_timesteps.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from mm_lightning.backbone import Backbone, RotaryEmbeddings, read_json
from mm_lightning.checkpoint import check_checkpoint, filter_checkpoint, remove_path, replace_path, require_complete
from mm_lightning.diffusion import Diffusion
from mm_lightning.losses.diffusion import VelocityLoss
from mm_lightning.losses.means import EpochSums, means_of, timestep_sums
from mm_lightning.miniature.autoencoder import EXPORT_DTYPES, KINDS, picture_grid
from mm_lightning.miniature.latents import LatentBatch, build_text, load_frozen, require_frozen
from mm_lightning.module import sample_generators
from mm_lightning.preview import build_pipeline, decode_latents, generate_latents
from mm_lightning.types import IdentityCondition, NoisySample

COPIED_PARTS = ("vae", "text_encoder", "tokenizer", "image_encoder")


# Arithmetic -----------------------------------------------------------------------------------------------------------


class JointAttnProcessor:
    """`CogVideoXAttnProcessor2_0` for training on short sequences: the same weights, the same result.

    One product makes query, key and value, and RoPE is not written into a slice. Attention is plain products: the
    fused kernel of the CPU takes, in bfloat16, ten times as long for its backward pass.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: RotaryEmbeddings | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert attention_mask is None, "CogVideoX attends to all tokens"
        num_text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, N, M*K)
        query, key, value = joint_projection(attn, joint).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        query = rotate(attn.norm_q(query), image_rotary_emb, num_text)  # (B, M, N, K)
        key = rotate(attn.norm_k(key), image_rotary_emb, num_text)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, M, N, N)
        joint = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)  # (B, N, M*K)
        joint = attn.to_out[1](attn.to_out[0](joint))
        return joint[:, num_text:], joint[:, :num_text]


def joint_projection(attn: Attention, joint: Tensor) -> Tensor:
    """(B, N, D) -> (B, N, 3*M*K), query, key and value side by side."""
    layers = (attn.to_q, attn.to_k, attn.to_v)
    bias = None if attn.to_q.bias is None else torch.cat([layer.bias for layer in layers])
    return F.linear(joint, torch.cat([layer.weight for layer in layers]), bias)


def rotate(states: Tensor, image_rotary_emb: RotaryEmbeddings | None, num_text: int) -> Tensor:
    """RoPE on the video tokens of (B, M, N, K), which stand behind `num_text` of text."""
    if image_rotary_emb is None:
        return states
    text, video = states.split([num_text, states.shape[2] - num_text], dim=2)
    return torch.cat([text, apply_rotary_emb(video, image_rotary_emb)], dim=2)


def draw_timesteps(count: int, num_timesteps: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Logit-normal: t / P = sigmoid(z), z ~ N(mean, std), as in Stable Diffusion 3 (arXiv:2403.03206, section 3.1).

    Stratified: each `count`-th part of the distribution is drawn from once, so that batches differ less.

    Returns:
        (count,) int64 in [0, num_timesteps), in random order.
    """
    places = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    normal = mean + std * torch.special.ndtri(places.double().clamp(1e-9, 1 - 1e-9))
    return (normal.sigmoid() * num_timesteps).long().clamp_max(num_timesteps - 1)


def check_transformer(folder: str | Path, wanted: Mapping[str, Any]) -> None:
    """
    Raises:
        FileNotFoundError: `folder` holds no transformer.
        ValueError: it is another one than `wanted` describes.
    """
    path = Path(folder, "transformer", "config.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"model.init={folder} holds no transformer/: `python train.py experiment=miniature_backbone` writes one; "
            "null is anew."
        )
    found = read_json(path)
    other = [name for name in wanted if not name.startswith("_") and found.get(name) != wanted[name]]
    if other:
        told = ", ".join(f"{name}={found.get(name)} and not {wanted[name]}" for name in other)
        raise ValueError(f"model.init={folder} has {told}: change either.")


# Training -------------------------------------------------------------------------------------------------------------


class DenoiserModule(L.LightningModule):
    """Trains a `CogVideoXTransformer3DModel` by velocity error on cached latents, with CogVideoX-5B's noise schedule.

    Construction checks and loads nothing; `configure_model` loads.

    Args:
        base: folder with the trained `vae/`, `text_encoder/` and `tokenizer/`, diffusers' layout.
        transformer: () -> untrained transformer.
        init: folder with the transformer/ of an earlier run to go on from; None starts from scratch.
        optimizer: named parameters -> optimizer.
        lr_schedule: optimizer -> schedule, stepped once per step.
        timestep_mean, timestep_std: of the logit of training timesteps, see `draw_timesteps`.
        num_samples: pictures, and clips, that validation generates for a look.
        num_inference_steps, guidance_scale: of those.
        export_dtype: of the weights that `export` writes.
        seed: of the weights and of all noise.

    Raises:
        FileNotFoundError: a part of the base is missing, or `init` holds no transformer.
        ValueError: the transformer does not fit the base, `init` holds another, or a dtype or number that cannot be.
    """

    strict_loading = False  # checkpoints hold what trains; on_load_checkpoint compares the names

    def __init__(
        self,
        base: str,
        transformer: Callable[[], CogVideoXTransformer3DModel],
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        lr_schedule: Callable[[torch.optim.Optimizer], Any],
        init: str | None = None,
        timestep_mean: float = 0.0,
        timestep_std: float = 1.0,
        num_samples: int = 16,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        export_dtype: str = "float16",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if export_dtype not in EXPORT_DTYPES:
            raise ValueError(f"model.export_dtype={export_dtype}: give one of {', '.join(EXPORT_DTYPES)}.")
        if timestep_std <= 0:
            raise ValueError(f"model.timestep_std={timestep_std}: give a positive number.")
        self.base, self.transformer_factory, self.init = require_frozen(base), transformer, init
        self.optimizer_factory, self.lr_schedule_factory = optimizer, lr_schedule
        self.timestep_mean, self.timestep_std = timestep_mean, timestep_std
        self.num_samples, self.num_inference_steps = num_samples, num_inference_steps
        self.guidance_scale, self.export_dtype, self.seed = guidance_scale, getattr(torch, export_dtype), seed
        self.velocity_loss = VelocityLoss()
        self.transformer: CogVideoXTransformer3DModel | None = None
        self.rotary: dict[tuple[int, ...], RotaryEmbeddings | None] = {}
        self.check_sizes()

    def check_sizes(self) -> None:
        """The transformer is drawn without memory, its config compared with those of VAE and T5."""
        with torch.device("meta"):
            config = self.transformer_factory().config
        channels = read_json(self.base / "vae/config.json")["latent_channels"]
        widths = {"in_channels": channels, "out_channels": channels}
        widths["text_embed_dim"] = read_json(self.base / "text_encoder/config.json")["d_model"]
        for name, width in widths.items():
            if config[name] != width:
                raise ValueError(f"model.transformer.{name}={config[name]}, but {self.base} is made for {width}.")
        if self.init is not None:
            check_transformer(self.init, config)

    def check_resume(self, path: str | Path) -> None:
        """Before anything large loads: raises what `require_complete` raises."""
        require_complete(path)

    def configure_model(self) -> None:
        """Draw the transformer from the seed, load VAE and text encoder."""
        if self.transformer is not None:
            return
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            self.transformer = self.transformer_factory()
        if self.init is not None:
            stored = CogVideoXTransformer3DModel.from_pretrained(
                self.init, subfolder="transformer", torch_dtype=torch.float32
            )
            self.transformer.load_state_dict(stored.state_dict())
        self.transformer.set_attn_processor(JointAttnProcessor())
        self.frozen: Backbone = load_frozen(self.base, self.transformer.config)
        self.text = build_text(self.frozen)
        self.diffusion = Diffusion.from_backbone(self.frozen.scheduler.config, self.frozen.vae_config)

    # One step

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        count = len(batch.keys)
        generator = sample_generators(self.seed, self.global_step, ["/".join(batch.keys)])[0]
        timestep = draw_timesteps(
            count, self.diffusion.num_train_timesteps, self.timestep_mean, self.timestep_std, generator
        )
        loss, sample = self.compute_loss(batch, [generator] * count, timestep)
        self.log("train/loss", loss.mean(), prog_bar=True, batch_size=count)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            for name, value in means_of(self.sums_by_timestep(loss.detach(), sample)).items():
                self.log(f"train/{name}", value, batch_size=count)
        return loss.mean()

    def on_validation_epoch_start(self) -> None:
        self.validation = EpochSums()

    def on_validation_epoch_end(self) -> None:
        for name, value in self.validation.means(self.trainer.strategy.reduce).items():
            self.log(f"val/{name}", value)

    def validation_step(self, batch: LatentBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Uniform timesteps, and noise that depends on the sample alone: steps and runs can be compared."""
        loss, sample = self.compute_loss(batch, sample_generators(self.seed, -1, batch.keys))
        kind, options = KINDS[dataloader_idx], {"add_dataloader_idx": False, "sync_dist": True}
        self.log(f"val/loss_{kind}", loss.mean(), prog_bar=True, batch_size=len(loss), **options)
        if kind == KINDS[0]:  # hyper-parameters are compared by it
            self.log("val/loss", loss.mean(), batch_size=len(loss), **options)
            self.validation.add(self.sums_by_timestep(loss, sample))
        if batch_idx == 0:
            self.show(kind, batch)

    def compute_loss(
        self, batch: LatentBatch, generators: Sequence[torch.Generator], timestep: Tensor | None = None
    ) -> tuple[Tensor, NoisySample]:
        """Mean squared error of the velocity (B,), and the noise that it was for; uniform where `timestep` is None."""
        latents = self.diffusion.encode_moments(batch.latent_moments, generators)  # (B, F', C, h, w)
        sample = self.diffusion.add_noise(latents, generators, timestep)
        velocity = self.predict(sample.noisy_latents, sample.timestep, batch.prompt_embeds)
        return self.velocity_loss(velocity, sample.velocity), sample

    def predict(self, noisy_latents: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Velocity (B, F', C, h, w)."""
        _, num_frames, _, height, width = noisy_latents.shape
        return self.transformer(
            hidden_states=noisy_latents,
            encoder_hidden_states=prompt_embeds,
            timestep=timestep,
            image_rotary_emb=self.rotary_embeddings(num_frames, height, width),
            return_dict=False,
        )[0]

    def rotary_embeddings(self, num_frames: int, height: int, width: int) -> RotaryEmbeddings | None:
        """For F' frames of h x w; there are few sizes, so they are kept."""
        size, ratio = (num_frames, height, width), self.frozen.vae_scale_factor_spatial
        if size not in self.rotary:
            self.rotary[size] = self.frozen.rotary_embeddings(num_frames, height * ratio, width * ratio, self.device)
        return self.rotary[size]

    def sums_by_timestep(self, loss: Tensor, sample: NoisySample) -> dict[str, Tensor]:
        chosen = torch.ones_like(sample.timestep, dtype=torch.bool)
        return timestep_sums(loss, sample.timestep, self.diffusion.num_train_timesteps, chosen)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory([(n, p) for n, p in self.named_parameters() if p.requires_grad])
        schedule = self.lr_schedule_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # What is seen and kept

    @torch.no_grad()
    def show(self, kind: str, batch: LatentBatch) -> None:
        """In TensorBoard: pictures of the batch, and below each what the model makes of its caption."""
        moments, prompt_embeds = batch.latent_moments[: self.num_samples], batch.prompt_embeds[: self.num_samples]
        latents = moments.chunk(2, dim=2)[0] * self.diffusion.scaling_factor
        generated = self.generate(prompt_embeds, latents.shape, batch.keys[: self.num_samples])
        pictures = [decode_latents(self.frozen.vae, each) for each in (latents, generated)]
        for own_logger in self.loggers:
            if isinstance(own_logger, TensorBoardLogger):
                own_logger.experiment.add_image(f"samples/{kind}", picture_grid(*pictures, 4), self.global_step)

    def generate(self, prompt_embeds: Tensor, shape: torch.Size, keys: Sequence[str]) -> Tensor:
        """Latents (B, F', C, h, w), scaled, by diffusers' pipeline; the noise depends on the keys alone."""
        return generate_latents(
            build_pipeline(self.frozen, self.transformer),
            shape,
            IdentityCondition(prompt_embeds, None, None),
            self.text.null_prompt_embeds(),
            self.num_inference_steps,
            self.guidance_scale,
            sample_generators(self.seed, -2, keys),
        )

    def export(self, folder: str | Path) -> None:
        """Write `folder` as a CogVideoX in diffusers' layout: transformer, scheduler, copies of the base's parts.

        Each part is replaced when the new one is whole, and `model_index.json` comes last.
        """
        folder = Path(folder)
        transformer = copy.deepcopy(self.transformer).to("cpu", self.export_dtype)
        write_part(folder / "transformer", transformer.save_pretrained)
        write_part(folder / "scheduler", self.frozen.scheduler.save_pretrained)
        if folder.resolve() != self.base.resolve():
            for name in COPIED_PARTS:
                if (self.base / name).is_dir():
                    write_part(folder / name, lambda fresh, name=name: shutil.copytree(self.base / name, fresh))
        index = folder / ".model_index"
        build_pipeline(self.frozen, transformer).save_config(index)
        replace_path(index / "model_index.json", folder / "model_index.json")
        remove_path(index)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        filter_checkpoint(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self)


def write_part(final: Path, write: Callable[[Path], Any]) -> None:
    """`write` a folder beside `final`, then put it in its place."""
    fresh = final.with_name(f".{final.name}.new")
    remove_path(fresh)
    write(fresh)
    replace_path(fresh, final)

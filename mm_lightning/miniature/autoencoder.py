"""The miniature's video VAE, trained from scratch on the train people's stills and clips.

    python train.py experiment=miniature_vae
    python train.py experiment=miniature_decoder  # then its decoder alone, on whose face it is

Letters: B batch, F frames, F' latent frames, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSpatialNorm3D
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from mm_lightning.checkpoint import remove_path, replace_path, require_complete
from mm_lightning.encoders.recognizer import FaceRecognizer, load_recognizer
from mm_lightning.fewer_operations import fewer_operations
from mm_lightning.miniature.data import MiniatureBatch

KINDS = ("stills", "clips")
LATENT_CHANNELS = 16
FIRST_LOGVAR = -5.0  # of the posterior, where training starts
SCALE_MOMENTUM = 0.99  # of the running standard deviation of the latents
RECOGNIZER = "recognizer."  # names of its weights begin so
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


def build_autoencoder(
    block_out_channels: Sequence[int], layers_per_block: int, norm_num_groups: int, sample_size: int
) -> AutoencoderKLCogVideoX:
    """Untrained; 8 times smaller in space, 4 times in time, 16 latent channels. `sample_size` in pixels.

    Raises:
        ValueError: not four widths, or one that the norm cannot divide into its groups.
    """
    wrong = [width for width in block_out_channels if width < 1 or width % norm_num_groups]
    if len(block_out_channels) != 4 or wrong:
        raise ValueError(
            f"model.block_out_channels={list(block_out_channels)}: give four multiples of norm_num_groups="
            f"{norm_num_groups}; four levels make the VAE 8 times smaller."
        )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        latent_channels=LATENT_CHANNELS,
        sample_height=sample_size,
        sample_width=sample_size,
        scaling_factor=1.0,
    )
    start_simple(vae)
    return vae


@torch.no_grad()
def start_simple(vae: AutoencoderKLCogVideoX) -> None:
    """Norms condition nothing yet, convolutions see the current frame alone, with what all their taps had together, and
    latents are hardly noised: with the posterior's usual start of N(0, 1) the decoder first learns to ignore them."""
    vae.encoder.conv_out.conv.bias[LATENT_CHANNELS:] = FIRST_LOGVAR
    for module in vae.modules():
        if isinstance(module, CogVideoXSpatialNorm3D):
            nn.init.zeros_(module.conv_y.conv.weight)
            nn.init.ones_(module.conv_y.conv.bias)
            nn.init.zeros_(module.conv_b.conv.weight)
            nn.init.zeros_(module.conv_b.conv.bias)
    for weight in temporal_weights(vae):
        weight[:, :, -1] = weight.sum(2)
        weight[:, :, :-1] = 0


def temporal_weights(vae: nn.Module) -> list[nn.Parameter]:
    """Weights (C', C, 3, 3, 3) of the convolutions that see earlier frames; the last tap is the current one."""
    convolutions = (module for module in vae.modules() if isinstance(module, CogVideoXCausalConv3d))
    return [module.conv.weight for module in convolutions if module.time_kernel_size > 1]


def load_autoencoder(folder: str | Path, block_out_channels: Sequence[int]) -> AutoencoderKLCogVideoX:
    """What `AutoencoderModule.export` wrote into `folder`, in fp32.

    Raises:
        FileNotFoundError: there is no VAE.
        ValueError: it has other widths than `block_out_channels`.
    """
    if not Path(folder, "vae", "config.json").is_file():
        raise FileNotFoundError(
            f"model.init={folder} holds no vae/: `python train.py experiment=miniature_vae` writes one; null is anew."
        )
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    found, wanted = list(vae.config.block_out_channels), list(block_out_channels)
    if found != wanted:
        raise ValueError(f"model.init={folder} has block_out_channels={found}, asked for is {wanted}: change either.")
    return vae.train()


# Losses ---------------------------------------------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """What became of a batch."""

    pixels: Tensor  # (B, F, 3, H, W), about [-1, 1]
    mean: Tensor  # (B, C, F', h, w), of the posterior
    logvar: Tensor  # (B, C, F', h, w)


def face_weight(boxes: Tensor, height: int, width: int, inside: float) -> Tensor:
    """(B, F, 4) in pixels -> (B, F, 1, H, W): `inside` within the face box, 1 outside, divided by the mean."""
    x = torch.arange(width, device=boxes.device)
    y = torch.arange(height, device=boxes.device)
    x0, y0, x1, y1 = boxes[..., None].unbind(-2)  # (B, F, 1) each
    within = ((y >= y0) & (y <= y1))[..., :, None] & ((x >= x0) & (x <= x1))[..., None, :]
    weight = 1 + (inside - 1) * within.float()
    return (weight / weight.mean()).unsqueeze(2)


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours, horizontal and vertical, the last of a line 0: twice the input's shape."""
    horizontal = nn.functional.pad(pixels.diff(dim=-1), (0, 1))
    return horizontal, nn.functional.pad(pixels.diff(dim=-2), (0, 0, 0, 1))


def reconstruction_terms(pixels: Tensor, target: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Weighted means: |error|, error^2, |error of the edges|."""
    error = pixels - target
    horizontal, vertical = edges(error)
    return {
        "l1": (weight * error.abs()).mean(),
        "mse": (weight * error.square()).mean(),
        "edges": (weight * (horizontal.abs() + vertical.abs())).mean(),
    }


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """From the posterior to N(0, 1), mean over latents, nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def identity_distance(pixels: Tensor, target: Tensor, landmarks: Tensor, recognizer: FaceRecognizer) -> Tensor:
    """1 - cos(F_id(target), F_id(pixels)), mean over the frames that show a face; without any, 0.

    (B, F, 3, H, W) twice, landmarks (B, F, 5, 2) in pixels, zeros where a frame shows no face.
    """
    shown = landmarks.flatten(2).any(-1)  # (B, F)
    if not shown.any():
        return pixels.sum() * 0
    with torch.no_grad():
        wanted = recognizer.embed(target[shown], landmarks[shown])
    found = recognizer.embed(pixels[shown], landmarks[shown])
    return (1 - nn.functional.cosine_similarity(found, wanted)).mean()


def psnr(pixels: Tensor, target: Tensor) -> Tensor:
    """Of each picture or clip, dB: (B, ...) in [-1, 1] -> (B,); what lies outside is clipped."""
    error = pixels.clamp(-1, 1).float() - target.float()
    return 10 * torch.log10(4 / error.square().flatten(1).mean(1).clamp_min(1e-10))


# Training -------------------------------------------------------------------------------------------------------------


class AutoencoderModule(L.LightningModule):
    """Trains an `AutoencoderKLCogVideoX`: L1 + MSE + edges + a little KL, more where the face is; whose face, if asked.

    Args:
        optimizer: parameters -> optimizer.
        lr_schedule: optimizer -> schedule, stepped once per step.
        block_out_channels: widths of the four levels, finest first.
        layers_per_block, norm_num_groups: as in diffusers.
        sample_size: side of the pictures, pixels.
        mse_weight, edge_weight, kl_weight: beside the L1 loss, of weight 1.
        face_weight: of pixels inside the face box, against 1 outside.
        init: folder with the vae/ of an earlier run to go on from; None starts from scratch.
        recognizer: tells whose face it is, see `load_recognizer`; None does without that loss.
        identity_weight: of 1 - cosine, between the face and what became of it.
        train_encoder: False trains the decoder alone, so that latents, and what was trained on them, stay valid.
        export_dtype: of the weights that `export` writes.
        seed: of the weights and of the posterior's draws.

    Raises:
        FileNotFoundError, ValueError: `init` holds no VAE or another one, the recogniser's weights are missing; a width
            or a dtype that cannot be.
    """

    def __init__(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        lr_schedule: Callable[[torch.optim.Optimizer], Any],
        block_out_channels: Sequence[int] = (16, 32, 48, 32),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        sample_size: int = 64,
        mse_weight: float = 1.0,
        edge_weight: float = 0.5,
        kl_weight: float = 1e-4,
        face_weight: float = 3.0,
        recognizer: str | None = None,
        identity_weight: float = 0.1,
        init: str | None = None,
        train_encoder: bool = True,
        export_dtype: str = "float16",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if export_dtype not in EXPORT_DTYPES:
            raise ValueError(f"model.export_dtype={export_dtype}: give one of {', '.join(EXPORT_DTYPES)}.")
        self.optimizer_factory, self.lr_schedule_factory = optimizer, lr_schedule
        self.weights = {"l1": 1.0, "mse": mse_weight, "edges": edge_weight, "kl": kl_weight}
        self.weights["identity"] = identity_weight
        self.face_weight, self.export_dtype, self.seed = face_weight, getattr(torch, export_dtype), seed
        self.register_buffer("latent_std", torch.zeros(()))
        self.register_buffer("num_latent_stds", torch.zeros(()))
        self.train_encoder = train_encoder
        if init is None:
            self.start_anew(block_out_channels, layers_per_block, norm_num_groups, sample_size)
        else:
            self.vae = load_autoencoder(init, block_out_channels)
        if not train_encoder:
            self.keep_latents()
        self.recognizer = None if recognizer is None else load_recognizer(recognizer)
        self.sees_stills = False
        for weight in temporal_weights(self.vae):
            if weight.requires_grad:
                weight.register_hook(self.keep_time)

    def keep_time(self, gradient: Tensor) -> Tensor:
        """A still cannot tell temporal taps apart: it trains the one of the current frame, so that clips stay sharp."""
        return nn.functional.pad(gradient[:, :, -1:], (0, 0, 0, 0, 2, 0)) if self.sees_stills else gradient

    def start_anew(
        self, block_out_channels: Sequence[int], layers_per_block: int, norm_num_groups: int, sample_size: int
    ) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            self.vae = build_autoencoder(block_out_channels, layers_per_block, norm_num_groups, sample_size)

    def keep_latents(self) -> None:
        """Freeze the encoder, and with it the scale that the earlier run measured."""
        self.vae.encoder.requires_grad_(False)
        self.latent_std.fill_(1 / self.vae.config.scaling_factor)
        self.num_latent_stds.fill_(1)

    def check_resume(self, path: str | Path) -> None:
        """Before anything large loads: raises what `require_complete` raises."""
        require_complete(path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Without the recogniser, which is never trained."""
        kept = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(RECOGNIZER)}
        checkpoint["state_dict"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = {name: value for name, value in self.state_dict().items() if name.startswith(RECOGNIZER)}
        checkpoint["state_dict"] = own | checkpoint["state_dict"]

    # One step

    def reconstruct(self, pixels: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """(B, F, 3, H, W) in [-1, 1]; a draw of the posterior is decoded, or its mean where there is no generator."""
        with fewer_operations(self.vae):
            posterior = self.vae.encode(pixels.transpose(1, 2)).latent_dist
            latents = posterior.mode() if generator is None else posterior.sample(generator)
            decoded = self.vae.decode(latents).sample
        return Reconstruction(decoded.transpose(1, 2), posterior.mean, posterior.logvar)

    def training_step(self, batch: MiniatureBatch, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        self.sees_stills = batch.pixels.shape[1] == 1
        found = self.reconstruct(batch.pixels, generator)
        terms = self.loss_terms(found, batch)
        if self.train_encoder:
            self.update_latent_std(found.mean.detach().float())
        kind, size = KINDS[not self.sees_stills], len(batch.keys)
        self.log_dict({f"train/loss/{name}": term for name, term in terms.items()}, batch_size=size)
        self.log(f"train/psnr_{kind}", psnr(found.pixels.detach(), batch.pixels).mean(), prog_bar=True, batch_size=size)
        total = self.total(terms)
        self.log("train/loss", total, batch_size=size)
        return total

    def loss_terms(self, found: Reconstruction, batch: MiniatureBatch) -> dict[str, Tensor]:
        weight = face_weight(batch.boxes, *batch.pixels.shape[-2:], self.face_weight)
        terms = reconstruction_terms(found.pixels.float(), batch.pixels, weight)
        if self.recognizer is not None:
            pixels = found.pixels.float()
            terms["identity"] = identity_distance(pixels, batch.pixels, batch.landmarks, self.recognizer)
        return terms | {"kl": kl_divergence(found.mean.float(), found.logvar.float())}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        return sum(self.weights[name] * term for name, term in terms.items())

    def update_latent_std(self, mean: Tensor) -> None:
        """A running mean that counts early values as much as later ones until there are many."""
        self.num_latent_stds += 1
        share = (1 / self.num_latent_stds).clamp_min(1 - SCALE_MOMENTUM)
        self.latent_std += share * (mean.std() - self.latent_std)

    def validation_step(self, batch: MiniatureBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        found = self.reconstruct(batch.pixels)
        kind, size = KINDS[batch.pixels.shape[1] > 1], len(batch.keys)
        options = {"batch_size": size, "add_dataloader_idx": False, "sync_dist": True}
        self.log(f"val/psnr_{kind}", psnr(found.pixels, batch.pixels).mean(), prog_bar=True, **options)
        if kind == KINDS[0]:  # hyper-parameters are compared by it
            terms = self.loss_terms(found, batch)
            named = {f"val/{name}": term for name, term in terms.items()}
            self.log_dict(named | {"val/loss": self.total(terms)}, **options)
        if batch_idx == 0:
            self.show(kind, batch.pixels, found.pixels)

    # What is seen and kept

    def show(self, kind: str, target: Tensor, pixels: Tensor, num_rows: int = 4) -> None:
        """A grid in TensorBoard: originals above what became of them."""
        grid = picture_grid(target, pixels, num_rows)
        for own_logger in self.loggers:
            if isinstance(own_logger, TensorBoardLogger):
                own_logger.experiment.add_image(f"reconstruction/{kind}", grid, self.global_step)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        schedule = self.lr_schedule_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def export(self, folder: str | Path) -> None:
        """Write `folder`/vae in diffusers' layout; its scaling factor brings the latents to unit scale.

        An older one is replaced when the new one is whole.

        Raises:
            RuntimeError: nothing was trained, so that the scale of the latents is not known.
        """
        if not self.num_latent_stds:
            raise RuntimeError("The scale of the latents is measured in training: export after a step at least.")
        final = Path(folder, "vae")
        fresh = final.with_name(f".{final.name}.new")
        remove_path(fresh)
        vae = copy.deepcopy(self.vae).to("cpu", self.export_dtype)
        # Diffusers notes where weights came from: a place on this machine, which is nobody's business.
        vae.register_to_config(scaling_factor=round(1 / self.latent_std.item(), 4), _name_or_path="")
        vae.save_pretrained(fresh)
        replace_path(fresh, final)


def picture_grid(target: Tensor, pixels: Tensor, num_rows: int) -> Tensor:
    """(B, F, 3, H, W) each -> (3, height, width) in [0, 1]: rows of originals, below each what became of it.

    A row shows eight stills, or every fourth frame of a clip.
    """
    num_cells = 8 if target.shape[1] == 1 else len(range(0, target.shape[1], 4))
    cells = [clips[:, ::4].flatten(0, 1)[: num_rows * num_cells] for clips in (target, pixels)]
    num_rows = max(1, len(cells[0]) // num_cells)
    rows = [pictures.split(num_cells)[:num_rows] for pictures in cells]
    lines = [torch.cat(list(row), dim=-1) for pair in zip(*rows, strict=True) for row in pair]
    return (torch.cat(lines, dim=-2).float().clamp(-1, 1) + 1).div(2).cpu()

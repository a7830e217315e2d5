"""The forward process of CogVideoX in training: v-prediction on a schedule that ends in pure noise.

Letters: B batch, F' latent frames, C latent channels, h w latent pixels, T diffusion steps.

Everything random is drawn per sample, from one CPU generator each, so that a sample's draw does not depend on its
batch, its rank or its device. The order of the draws is `encode_moments`, then `add_noise` (timestep, then noise).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from mm_lightning.types import NoisySample

# One training schedule, two samplers: which of them a folder names matters at inference only.
_SCHEDULERS = {cls.__name__: cls for cls in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)}


class Diffusion:
    """Noise, its target and the way back to the clean latents.

    All results are fp32 whatever the precision of the inputs and of the run (fp64 where the inputs are): in bf16
    1 - alpha_bar is zero at the first two steps of the 5B schedule, which would see no noise, and far off at the next.

    Args:
        alphas_cumprod: (T,) in [0, 1], alpha_bar of each step; its last value must be 0.
        scaling_factor: of the VAE, latents = scaling_factor * (a draw of the VAE's posterior).

    Raises:
        ValueError: the schedule does not end at zero signal, or the scaling factor is not positive.
    """

    def __init__(self, alphas_cumprod: Tensor, scaling_factor: float) -> None:
        terminal = float(alphas_cumprod[-1])
        if not 0.0 <= terminal < 1e-8:
            raise ValueError(
                f"The noise schedule ends at alpha_bar = {terminal:.3g}, CogVideoX trains down to exactly 0. "
                "Set rescale_betas_zero_snr to true in the base model's scheduler/scheduler_config.json."
            )
        if not scaling_factor > 0:
            raise ValueError(f"The VAE's scaling_factor must be positive, not {scaling_factor}; see vae/config.json.")
        # A plain attribute, not a buffer: casting a module to bf16 casts its buffers too.
        self.alphas_cumprod = alphas_cumprod.double().cpu()
        self.scaling_factor = float(scaling_factor)

    @classmethod
    def from_backbone(cls, scheduler_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> Diffusion:
        """Read the schedule and the latent scale from the configs of a loaded scheduler and VAE (`.config`).

        Raises:
            ValueError: the model does not predict velocity, the scheduler is of another family, the schedule does not
                end at zero signal, or a value whose default differs between the CogVideoX models is not stated.
        """
        if (prediction_type := scheduler_config.get("prediction_type")) != "v_prediction":
            raise ValueError(
                f"The base model's scheduler says prediction_type = {prediction_type!r}; the losses are written for "
                "'v_prediction', which every CogVideoX uses. Correct scheduler/scheduler_config.json."
            )
        name = scheduler_config.get("_class_name", CogVideoXDDIMScheduler.__name__)
        if name not in _SCHEDULERS:
            raise ValueError(f"Cannot train on the schedule of {name!r}; expected one of {', '.join(_SCHEDULERS)}.")
        _require(scheduler_config, "snr_shift_scale", "scheduler/scheduler_config.json")
        scaling_factor = _require(vae_config, "scaling_factor", "vae/config.json")
        return cls(_SCHEDULERS[name].from_config(scheduler_config).alphas_cumprod, scaling_factor)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def sample_timesteps(self, generators: Sequence[torch.Generator]) -> Tensor:
        """One timestep per generator, uniform in [0, T): (B,) int64 on the CPU."""
        return torch.stack([torch.randint(self.num_train_timesteps, (), generator=g) for g in generators])

    def encode_moments(self, latent_moments: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw scaled latents from the VAE's posterior.

        Args:
            latent_moments: (B, F', 2C, h, w), mean and log-variance along the channels, unscaled. The log-variance is
                clamped to [-30, 20] as in diffusers' `DiagonalGaussianDistribution`.
            generators: one CPU generator per sample.

        Returns:
            latents (B, F', C, h, w).
        """
        mean, logvar = _at_least_fp32(latent_moments).chunk(2, dim=2)
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
        return (mean + std * _randn(mean, generators)) * self.scaling_factor

    def add_noise(
        self, latents: Tensor, generators: Sequence[torch.Generator], timestep: Tensor | None = None
    ) -> NoisySample:
        """Draw x_t = sqrt(a) x_0 + sqrt(1 - a) eps and its velocity v = sqrt(a) eps - sqrt(1 - a) x_0.

        Args:
            latents: (B, F', C, h, w), clean and scaled.
            generators: one CPU generator per sample.
            timestep: (B,) int in [0, T); drawn uniformly when None.
        """
        timestep = self.sample_timesteps(generators) if timestep is None else timestep.long()
        latents = _at_least_fp32(latents)
        noise = _randn(latents, generators)
        signal, sigma = self._coefficients(timestep, latents)
        return NoisySample(
            latents=latents,
            noise=noise,
            noisy_latents=signal * latents + sigma * noise,
            velocity=signal * noise - sigma * latents,
            timestep=timestep.to(latents.device),
            alpha_bar=self.alphas_cumprod[timestep.cpu()].to(latents.dtype).to(latents.device),
        )

    def denoised(self, noisy_latents: Tensor, velocity: Tensor, timestep: Tensor) -> Tensor:
        """The clean latents that a velocity stands for: x_0 = sqrt(a) x_t - sqrt(1 - a) v, (B, F', C, h, w)."""
        noisy_latents = _at_least_fp32(noisy_latents)
        signal, sigma = self._coefficients(timestep, noisy_latents)
        return signal * noisy_latents - sigma * _at_least_fp32(velocity)

    def _coefficients(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        # The roots are taken in fp64, 1 - alpha_bar cancels at the first steps; on the CPU, as MPS has no fp64.
        alpha_bar = self.alphas_cumprod[timestep.cpu()].view(-1, *[1] * (like.ndim - 1))
        signal, sigma = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        return signal.to(like.dtype).to(like.device), sigma.to(like.dtype).to(like.device)


def _require(config: Mapping[str, Any], key: str, file: str) -> Any:
    # diffusers fills a missing key with the class default (the value of the 2B model) and lists it here.
    if key not in config or key in config.get("_use_default_values", ()):
        raise ValueError(
            f"The base model's {file} does not state {key!r}, which differs between CogVideoX models "
            f"(2B: snr_shift_scale 3.0, scaling_factor 1.15258426; 5B: 1.0, 0.7). Add it."
        )
    return config[key]


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _randn(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (B, ...) in the shape of `like`, drawn in fp32 on the CPU, sample by sample."""
    assert len(generators) == len(like), f"{len(generators)} generators for {len(like)} samples"
    return torch.stack([torch.randn(like.shape[1:], generator=g, dtype=torch.float32) for g in generators]).to(like)

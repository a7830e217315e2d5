"""The forward process against diffusers' schedulers, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from mm_lightning.diffusion import Diffusion

SHAPE = (2, 3, 4, 5)  # F', C, h, w
SCHEDULE = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
# The published 2B folder names the DDIM sampler, the 5B one DPM in our recommended use.
MODELS = {"2B": (CogVideoXDDIMScheduler, 3.0, 1.15258426), "5B": (CogVideoXDPMScheduler, 1.0, 0.7)}


def write_configs(folder: Path, model: str) -> None:
    scheduler_class, snr_shift_scale, scaling_factor = MODELS[model]
    scheduler_class(**SCHEDULE, snr_shift_scale=snr_shift_scale).save_config(folder / "scheduler")
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )
    vae.save_config(folder / "vae")


def load(folder: Path) -> tuple[Diffusion, CogVideoXDDIMScheduler]:
    scheduler = CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler")
    vae_config = AutoencoderKLCogVideoX.load_config(folder / "vae")
    return Diffusion.from_backbone(scheduler.config, vae_config), scheduler


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loaded(model: str, tmp_path: Path) -> tuple[Diffusion, CogVideoXDDIMScheduler]:
    write_configs(tmp_path, model)
    return load(tmp_path)


def five_b() -> Diffusion:
    scheduler = CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0)
    return Diffusion.from_backbone(scheduler.config, {"scaling_factor": 0.7})


def test_noise_and_target_are_the_schedulers_own(loaded):
    diffusion, scheduler = loaded
    timestep = torch.tensor([0, 1, 2, 10, 500, 998, 999])
    latents = torch.randn(7, *SHAPE, dtype=torch.float64)

    sample = diffusion.add_noise(latents, generators(*range(7)), timestep)

    noisy = scheduler.add_noise(latents, sample.noise, timestep)
    velocity = scheduler.get_velocity(latents, sample.noise, timestep)
    torch.testing.assert_close(sample.noisy_latents, noisy, rtol=0, atol=1e-14)
    torch.testing.assert_close(sample.velocity, velocity, rtol=0, atol=1e-14)
    assert torch.equal(sample.alpha_bar, scheduler.alphas_cumprod[timestep])
    assert torch.equal(sample.noisy_latents[-1], sample.noise[-1]), "the last step holds signal"


def test_alpha_bar_and_scale_are_the_models(loaded, model):
    diffusion, _ = loaded
    # Written by hand: betas, then the SNR shift, then the rescaling to zero terminal SNR (in this order).
    _, shift, scaling_factor = MODELS[model]
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    root = (alpha_bar / (shift + (1 - shift) * alpha_bar)).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(diffusion.alphas_cumprod, expected, rtol=1e-12, atol=1e-14)
    assert diffusion.scaling_factor == scaling_factor


def test_velocity_and_clean_latents_round_trip(loaded):
    diffusion, _ = loaded
    timestep = torch.tensor([0, 1, 300, 700, 999])
    latents = torch.randn(5, *SHAPE, dtype=torch.float64)
    sample = diffusion.add_noise(latents, generators(*range(5)), timestep)
    denoised = diffusion.denoised(sample.noisy_latents, sample.velocity, timestep)
    torch.testing.assert_close(denoised, latents, rtol=0, atol=1e-14)


def test_denoised_passes_the_gradient_to_the_velocity():
    diffusion = five_b()
    velocity = torch.randn(1, *SHAPE, requires_grad=True)
    diffusion.denoised(torch.randn(1, *SHAPE), velocity, torch.tensor([400])).sum().backward()
    expected = -(1 - diffusion.alphas_cumprod[400]).sqrt().float()
    torch.testing.assert_close(velocity.grad, expected.expand_as(velocity))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_steps_have_noise_whatever_the_precision(dtype):
    """In bf16 1 - alpha_bar is 0 at the steps 0 and 1 (no noise, another target) and half too large at step 2."""
    timestep = torch.tensor([0, 1, 2])
    latents = torch.randn(3, *SHAPE).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = five_b().add_noise(latents, generators(0, 1, 2), timestep)

    assert {x.dtype for x in sample if x.is_floating_point()} == {torch.float32}
    scheduler = CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0)
    velocity = scheduler.get_velocity(latents.double(), sample.noise.double(), timestep)
    torch.testing.assert_close(sample.velocity.double(), velocity, rtol=1e-6, atol=1e-6)
    added = (sample.noisy_latents - latents.float()).abs().flatten(1).amax(1)
    assert (added > 0.01).all()


def test_the_pitfall_is_real():
    """What the fp32 rule protects from: diffusers casts alpha_bar to the dtype of the samples, and bf16 knows no number
    between 0.9961 and 1."""
    scheduler = CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0)
    latents, noise = torch.zeros(3, 8, dtype=torch.bfloat16), torch.ones(3, 8, dtype=torch.bfloat16)
    noisy = scheduler.add_noise(latents, noise, torch.tensor([0, 1, 2]))[:, 0].double()
    exact = (1 - scheduler.alphas_cumprod[:3]).sqrt()
    assert noisy[:2].tolist() == [0.0, 0.0]
    assert noisy[2] > 1.15 * exact[2]


def test_a_sample_does_not_depend_on_its_batch():
    diffusion = five_b()
    moments = torch.randn(3, 2, 6, 4, 5)

    def draw(rows: list[int]):
        rngs = generators(*(100 + row for row in rows))
        latents = diffusion.encode_moments(moments[rows], rngs)
        return diffusion.add_noise(latents, rngs)

    together, alone = draw([0, 1, 2]), draw([1])
    shuffled = draw([2, 1])
    for whole, single, other in zip(together, alone, shuffled, strict=True):
        assert torch.equal(whole[1], single[0])
        assert torch.equal(whole[1], other[1])
    assert not torch.equal(together.noise[0], together.noise[1])


def test_timesteps_are_uniform():
    rng = torch.Generator().manual_seed(7)
    num_draws, num_bins = 40_000, 50
    timestep = five_b().sample_timesteps([rng] * num_draws)
    assert timestep.dtype == torch.int64
    assert timestep.min() == 0
    assert timestep.max() == 999
    counts = torch.histc(timestep.float(), bins=num_bins, min=0, max=1000)
    chi_square = ((counts - num_draws / num_bins) ** 2 / (num_draws / num_bins)).sum()
    assert 23 < chi_square < 86, "outside of the 0.1 % quantiles of chi-square with 49 degrees of freedom"


def test_latents_are_a_scaled_draw_of_diffusers_posterior():
    diffusion = five_b()
    moments = torch.randn(1, 2, 6, 4, 5) * 40  # log-variances beyond both clamps
    latents = diffusion.encode_moments(moments, generators(3))

    eps = torch.randn(2, 3, 4, 5, generator=generators(3)[0])
    posterior = DiagonalGaussianDistribution(moments.permute(0, 2, 1, 3, 4).double())
    expected = 0.7 * (posterior.mean + posterior.std * eps.permute(1, 0, 2, 3)).permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(latents.double(), expected, rtol=1e-5, atol=1e-5)
    assert (moments[:, :, 3:] > 20).any()
    assert (moments[:, :, 3:] < -30).any()


def test_cached_half_precision_moments_give_fp32_latents():
    latents = five_b().encode_moments(torch.zeros(1, 2, 6, 4, 5, dtype=torch.bfloat16), generators(0))
    assert latents.dtype == torch.float32


def test_generators_must_match_the_batch():
    with pytest.raises(AssertionError, match="1 generators for 2 samples"):
        five_b().add_noise(torch.zeros(2, *SHAPE), generators(0), torch.tensor([1, 2]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", None])
def test_other_predictions_are_refused(prediction_type):
    config = {**SCHEDULE, "snr_shift_scale": 1.0, "prediction_type": prediction_type}
    with pytest.raises(ValueError, match=f"prediction_type = {prediction_type!r}"):
        Diffusion.from_backbone(config, {"scaling_factor": 0.7})


def test_a_schedule_that_keeps_signal_is_refused():
    config = CogVideoXDPMScheduler(**{**SCHEDULE, "rescale_betas_zero_snr": False}, snr_shift_scale=1.0).config
    with pytest.raises(ValueError, match=r"ends at alpha_bar = 0\.00\d+.*rescale_betas_zero_snr"):
        Diffusion.from_backbone(config, {"scaling_factor": 0.7})


@pytest.mark.parametrize(
    ("file", "key"), [("scheduler/scheduler_config.json", "snr_shift_scale"), ("vae/config.json", "scaling_factor")]
)
def test_class_defaults_never_fill_in(tmp_path, file, key):
    write_configs(tmp_path, "5B")
    config = json.loads((tmp_path / file).read_text())
    del config[key]
    (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{file} does not state '{key}'"):
        load(tmp_path)


def test_a_default_that_diffusers_filled_in_is_refused():
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=4
    )
    scheduler = CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0)
    with pytest.raises(ValueError, match="scaling_factor"):
        Diffusion.from_backbone(scheduler.config, vae.config)


def test_a_scheduler_of_another_family_is_refused():
    config = {**SCHEDULE, "_class_name": "EulerDiscreteScheduler", "snr_shift_scale": 1.0}
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        Diffusion.from_backbone(config, {"scaling_factor": 0.7})


@pytest.mark.parametrize("scaling_factor", [0.0, -0.7, float("nan")])
def test_a_useless_scaling_factor_is_refused(scaling_factor):
    with pytest.raises(ValueError, match="scaling_factor must be positive"):
        Diffusion(torch.tensor([0.9, 0.0]), scaling_factor)

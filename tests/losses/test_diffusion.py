"""Velocity MSE against the form of diffusers' trainers; face boxes against cells counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import CogVideoXDPMScheduler

from mm_lightning.losses import DiffusionLoss, FaceRegion, VelocityLoss, WholeFrame, boxes_to_latent_mask

SHAPE = (3, 4, 6, 8)  # F', C, h, w: 9 frames of 48 x 64 pixels


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def boxes(num_frames: int, box: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(box).expand(1, num_frames, 4).clone()


def brute_force_mask(face_boxes: torch.Tensor, num_latent_frames: int, height: int, width: int) -> torch.Tensor:
    """Cell by cell: does the box overlap the square that the cell's pixels cover?"""
    mask = torch.zeros(len(face_boxes), num_latent_frames, 1, height, width, dtype=torch.bool)
    for b, clip in enumerate(face_boxes.tolist()):
        for f, (x0, y0, x1, y1) in enumerate(clip):
            latent_frame = math.ceil(f / 4)
            for row in range(height):
                for column in range(width):
                    top, left = row * 8 - 0.5, column * 8 - 0.5
                    overlap_x = min(x1, left + 8) - max(x0, left)
                    overlap_y = min(y1, top + 8) - max(y0, top)
                    mask[b, latent_frame, 0, row, column] |= x1 > x0 and y1 > y0 and overlap_x > 0 and overlap_y > 0
    return mask


@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
def test_plain_mse_is_the_weighted_x0_loss_of_diffusers_trainers(snr_shift_scale):
    scheduler = CogVideoXDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=snr_shift_scale
    )
    timestep = torch.tensor([0, 3, 10, 500, 999])
    latents, noise, velocity_pred = torch.randn(3, 5, *SHAPE, dtype=torch.float64)
    noisy = scheduler.add_noise(latents, noise, timestep)
    velocity = scheduler.get_velocity(latents, noise, timestep)

    # train_cogvideox_lora.py: x0 by the same formula with the roles swapped, then the weighted error
    denoised = scheduler.get_velocity(velocity_pred, noisy, timestep)
    weights = 1 / (1 - scheduler.alphas_cumprod[timestep])
    expected = (weights.view(-1, 1, 1, 1, 1) * (denoised - latents) ** 2).reshape(5, -1).mean(1)

    torch.testing.assert_close(VelocityLoss()(velocity_pred, velocity), expected, rtol=1e-11, atol=0)


def test_masked_loss_is_the_mean_inside():
    pred, velocity = torch.randn(2, 2, *SHAPE, dtype=torch.float64)
    mask = torch.rand(2, 3, 1, 6, 8) < 0.3
    loss = VelocityLoss()(pred, velocity, mask)
    for b in range(2):
        inside = (pred - velocity)[b].permute(0, 2, 3, 1)[mask[b, :, 0]]  # (cells, C)
        torch.testing.assert_close(loss[b], (inside**2).mean(), rtol=1e-12, atol=0)


def test_full_mask_is_no_mask():
    pred, velocity = torch.randn(2, 2, *SHAPE, dtype=torch.float64)
    mask = torch.ones(2, 3, 1, 6, 8, dtype=torch.bool)
    torch.testing.assert_close(VelocityLoss()(pred, velocity, mask), VelocityLoss()(pred, velocity))


def test_loss_is_fp32_under_autocast_and_for_a_bf16_prediction():
    pred, velocity = torch.randn(2, 2, *SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = VelocityLoss()(pred.bfloat16(), velocity)
    expected = (pred.bfloat16().double() - velocity.double()).square().flatten(1).mean(1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((0, 0, 7, 7), [0], [0]),  # the first cell's pixel centres exactly
        ((7.4, 0, 7.6, 7), [0], [0, 1]),  # across the edge between pixels 7 and 8
        ((8, 16, 23, 31), [2, 3], [1, 2]),
        ((-50, -50, 3, 3), [0], [0]),
        ((60, 40, 500, 500), [5], [7]),
        ((-10, -10, 100, 100), range(6), range(8)),
        ((0, 0, 0, 0), [], []),
        ((20, 20, 20, 40), [], []),
        ((40, 20, 20, 40), [], []),
        ((70, 0, 90, 10), [], []),
        ((0, -30, 10, -2), [], []),
        ((float("nan"), 0, 10, 10), [], []),
    ],
)
def test_cells_that_a_box_touches(box, rows, columns):
    mask = boxes_to_latent_mask(boxes(1, box), 1, 6, 8)
    expected = torch.zeros(1, 1, 1, 6, 8, dtype=torch.bool)
    for row in rows:
        expected[..., row, list(columns)] = True
    assert torch.equal(mask, expected)


def test_masks_of_random_clips_equal_a_cell_by_cell_count():
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 9, 2, generator=rng) * 90 - 20
    face_boxes = torch.cat([corner, corner + torch.rand(3, 9, 2, generator=rng) * 30 - 3], dim=-1)
    mask = boxes_to_latent_mask(face_boxes, 3, 6, 8)
    assert mask.shape == (3, 3, 1, 6, 8)
    assert torch.equal(mask, brute_force_mask(face_boxes, 3, 6, 8))
    assert 0 < mask.float().mean() < 1


@pytest.mark.parametrize(("frame", "latent_frame"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_first_frame_stands_apart_from_the_groups_of_four(frame, latent_frame):
    face_boxes = torch.zeros(1, 9, 4)
    face_boxes[0, frame] = torch.tensor([8.0, 8.0, 15.0, 15.0])
    touched = boxes_to_latent_mask(face_boxes, 3, 6, 8).flatten(2).any(2)
    assert touched.nonzero().tolist() == [[0, latent_frame]]


def test_a_group_gets_the_union_of_its_boxes():
    face_boxes = torch.zeros(1, 5, 4)
    face_boxes[0, 1] = torch.tensor([0.0, 0.0, 7.0, 7.0])
    face_boxes[0, 4] = torch.tensor([56.0, 40.0, 63.0, 47.0])
    assert boxes_to_latent_mask(face_boxes, 2, 6, 8).nonzero().tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 5, 7]]


@pytest.mark.parametrize("num_frames", [1, 8, 10, 12])
def test_a_wrong_number_of_frames_is_explained(num_frames):
    with pytest.raises(ValueError, match=f"{num_frames} frames of face boxes for 3 latent frames, which hold 9"):
        boxes_to_latent_mask(torch.zeros(1, num_frames, 4), 3, 6, 8)


def test_about_half_of_the_samples_look_at_the_face_only():
    batch = 400
    face_boxes = boxes(1, (8, 8, 15, 15)).expand(batch, 1, 4)
    mask, num_fallbacks = FaceRegion(prob=0.5)(face_boxes, (batch, 1, 4, 6, 8), generators(*range(batch)))
    areas = mask.flatten(1).sum(1)
    assert set(areas.tolist()) == {1, 48}
    assert 160 < (areas == 1).sum() < 240  # 4 standard deviations
    assert num_fallbacks == 0


def test_the_region_of_a_sample_does_not_depend_on_its_batch():
    face_boxes = boxes(9, (8, 8, 15, 15)).expand(6, 9, 4)
    together = FaceRegion()(face_boxes, (6, *SHAPE), generators(*range(6))).mask
    for i in range(6):
        assert torch.equal(FaceRegion()(face_boxes[:1], (1, *SHAPE), generators(i)).mask[0], together[i])


def test_a_clip_without_a_face_falls_back_to_the_whole_frame_and_is_counted():
    face_boxes = torch.cat([boxes(9, (0, 0, 0, 0)), boxes(9, (8, 8, 15, 15)), boxes(9, (90, 0, 99, 9))])
    mask, num_fallbacks = FaceRegion(prob=1.0)(face_boxes, (3, *SHAPE), generators(0, 1, 2))
    assert mask.flatten(1).sum(1).tolist() == [3 * 48, 3, 3 * 48]
    assert num_fallbacks == 2


def test_only_drawn_samples_count_as_fallbacks():
    mask, num_fallbacks = FaceRegion(prob=0.0)(torch.zeros(2, 9, 4), (2, *SHAPE), generators(0, 1))
    assert mask.all()
    assert num_fallbacks == 0


def test_whole_frame_is_plain_mse():
    pred, velocity = torch.randn(2, 2, *SHAPE, dtype=torch.float64)
    # Constructed with its counterpart's arguments, as a configuration that swaps the class alone does.
    loss_fn = DiffusionLoss(WholeFrame(prob=1.0, spatial_ratio=8, temporal_ratio=4))
    loss, num_fallbacks = loss_fn(pred, velocity, boxes(9, (8, 8, 15, 15)).expand(2, 9, 4), generators(0, 1))
    torch.testing.assert_close(loss, (pred - velocity).square().flatten(1).mean(1))
    assert num_fallbacks == 0


def test_face_region_sees_errors_in_the_face_only():
    velocity = torch.zeros(1, *SHAPE)
    pred = torch.ones(1, *SHAPE, requires_grad=True)
    loss, _ = DiffusionLoss(FaceRegion(prob=1.0))(pred, velocity, boxes(9, (8, 8, 15, 15)), generators(0))
    loss.sum().backward()
    assert loss.item() == 1.0
    assert pred.grad.abs().sum((0, 1, 2)).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("prob", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_0_1_is_refused(prob):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        FaceRegion(prob=prob)

"""The differentiable way from latents to a face embedding, with a small real VAE and dlib's real recogniser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler
from torch import Tensor, nn

from mm_lightning.diffusion import Diffusion
from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.face_decoder import FaceDecoder, LatentCrop
from mm_lightning.losses import CombinedLoss, DiffusionLoss, IdentityLoss, WholeFrame

CHANNELS, HEIGHT, WIDTH = 4, 10, 14  # of the latents: pictures of 80 x 112 pixels
BOX = (42.0, 34.0, 58.0, 52.0)  # latent cells 5..7 of 14 and 4..6 of 10
LANDMARKS = ((46.0, 40.0), (54.0, 40.0), (50.0, 44.0), (47.0, 48.0), (53.0, 48.0))


def make_vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        scaling_factor=0.7,
    )


@pytest.fixture(scope="module")
def recognizer() -> nn.Module:
    return load_recognizer("dlib")


@pytest.fixture
def decoder(recognizer: nn.Module) -> FaceDecoder:
    return FaceDecoder(make_vae(), recognizer, crop_size=6, margin=1)


@pytest.fixture
def decoded(decoder: FaceDecoder) -> Iterator[list[torch.Size]]:
    """Shapes (B, C, F, h, w) of everything that went into the VAE's decoder."""
    shapes: list[torch.Size] = []
    handle = decoder.vae.decoder.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    yield shapes
    handle.remove()


def make_latents(batch: int = 1, num_latent_frames: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(batch, num_latent_frames, CHANNELS, HEIGHT, WIDTH, generator=rng)


def make_faces(batch: int = 1, num_frames: int = 9) -> tuple[Tensor, Tensor]:
    boxes = torch.zeros(batch, num_frames, 4)
    landmarks = torch.zeros(batch, num_frames, 5, 2)
    boxes[:, 0], landmarks[:, 0] = torch.tensor(BOX), torch.tensor(LANDMARKS)
    return boxes, landmarks


def everyone(batch: int = 1) -> Tensor:
    return torch.ones(batch, dtype=torch.bool)


def embed_by_hand(decoder: FaceDecoder, latents: Tensor) -> Tensor:
    """Rows 2..7 and columns 3..8: six cells around the face's three; no checkpointing, no helper of the class."""
    video = latents[:, :1, :, 2:8, 3:9].permute(0, 2, 1, 3, 4) / 0.7
    decoder.vae.disable_gradient_checkpointing()
    pixels = decoder.vae.decode(video).sample[:, :, 0]
    decoder.vae.enable_gradient_checkpointing()
    landmarks = (torch.tensor(LANDMARKS) - torch.tensor([24.0, 16.0])).expand(len(latents), 5, 2)
    return decoder.recognizer.embed(pixels, landmarks)


# -- the crop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "crop"),
    [
        ((320, 200, 399, 279), LatentCrop(14, 29, 46, 61)),  # 10 cells + margins = 18 < 32: grown around the middle
        ((0, 0, 79, 79), LatentCrop(0, 0, 32, 32)),
        ((640, 400, 719, 479), LatentCrop(28, 58, 60, 90)),
        ((160, 80, 479, 399), LatentCrop(6, 16, 54, 64)),  # 40 cells + 2 x 4
        ((0, 0, 719, 479), LatentCrop(0, 0, 60, 90)),
    ],
)
def test_crop_of_a_480x720_picture(recognizer, box, crop):
    assert FaceDecoder(make_vae(), recognizer).crop_around(box, 60, 90) == crop


def test_crops_hold_the_face_its_margin_and_lie_inside(recognizer):
    decoder = FaceDecoder(make_vae(), recognizer, crop_size=12, margin=2)
    rng = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=rng) * torch.tensor([200.0, 140.0])
    boxes = torch.cat([corners, corners + 1 + torch.rand(300, 2, generator=rng) * 150], dim=1)
    for x0, y0, x1, y1 in boxes.clamp(max=torch.tensor([239.5, 159.5, 239.5, 159.5])).tolist():
        top, left, bottom, right = decoder.crop_around([x0, y0, x1, y1], 20, 30)
        assert 0 <= top <= bottom - 12
        assert 0 <= left <= right - 12
        assert bottom <= 20
        assert right <= 30
        # The left edge of the pixel at 0 is at -0.5, where the latent grid begins.
        assert left <= max((x0 + 0.5) / 8 - 2, 0)
        assert top <= max((y0 + 0.5) / 8 - 2, 0)
        assert right >= min((x1 + 0.5) / 8 + 2, 30)
        assert bottom >= min((y1 + 0.5) / 8 + 2, 20)


def test_a_picture_smaller_than_the_crop_is_decoded_whole(recognizer):
    assert FaceDecoder(make_vae(), recognizer).crop_around([10, 10, 20, 20], 4, 6) == LatentCrop(0, 0, 4, 6)


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_equals_decode_and_embedding_by_hand(decoder):
    latents = make_latents(2)
    embeddings, valid = decoder(latents, *make_faces(2), everyone(2))
    assert valid.all()
    assert embeddings.shape == (2, 128)
    torch.testing.assert_close(embeddings, embed_by_hand(decoder, latents), rtol=1e-4, atol=1e-5)
    assert (embeddings[0] - embeddings[1]).norm() > 1e-3


def test_a_crop_that_covers_the_picture_is_the_plain_decode(recognizer):
    decoder = FaceDecoder(make_vae(), recognizer, crop_size=32)
    latents = make_latents()
    embeddings, _ = decoder(latents, *make_faces(), everyone())
    pixels = decoder.vae.decode(latents[:, :1].transpose(1, 2) / 0.7).sample[:, :, 0]
    expected = recognizer.embed(pixels, torch.tensor(LANDMARKS)[None])
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(decoder):
    latents, (boxes, landmarks) = make_latents(3), make_faces(3)
    boxes[0, 0], landmarks[0] = torch.tensor([0.0, 0.0, 90.0, 70.0]), landmarks[0] * 1.5  # a larger crop
    together, _ = decoder(latents, boxes, landmarks, everyone(3))
    alone, _ = decoder(latents[2:], boxes[2:], landmarks[2:], everyone())
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=1e-6)  # one product or two: the last bits differ


def test_crops_of_one_size_are_decoded_together(decoder, decoded):
    latents, (boxes, landmarks) = make_latents(4), make_faces(4)
    boxes[1, 0] = torch.tensor([0.0, 0.0, 90.0, 70.0])  # a larger crop
    boxes[3, 0] += torch.tensor([16.0, 8.0, 16.0, 8.0])  # elsewhere
    landmarks[3] += torch.tensor([16.0, 8.0])
    embeddings, _ = decoder(latents, boxes, landmarks, everyone(4))
    assert sorted(shape[0] for shape in decoded) == [1, 3]
    for i in range(4):
        alone, _ = decoder(latents[i : i + 1], boxes[i : i + 1], landmarks[i : i + 1], everyone())
        torch.testing.assert_close(embeddings[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_only_wanted_samples_are_decoded(decoder, decoded):
    wanted = torch.tensor([False, True, False])
    embeddings, valid = decoder(make_latents(3), *make_faces(3), wanted)
    assert torch.equal(valid, wanted)
    assert decoded == [(1, CHANNELS, 1, 6, 6)]
    assert (embeddings != 0).any(1).tolist() == wanted.tolist()


def test_nothing_is_decoded_when_no_sample_is_wanted(decoder, decoded):
    latents = make_latents(2).requires_grad_()
    embeddings, valid = decoder(latents, *make_faces(2), ~everyone(2))
    assert decoded == []
    assert torch.equal(embeddings, torch.zeros(2, 128))
    assert not valid.any()


NO_FACE = {
    "zeros": ((0.0, 0.0, 0.0, 0.0), LANDMARKS),
    "no area": ((50.0, 34.0, 50.0, 52.0), LANDMARKS),
    "turned around": ((58.0, 52.0, 42.0, 34.0), LANDMARKS),
    "right of the picture": ((112.0, 10.0, 130.0, 30.0), LANDMARKS),
    "above the picture": ((10.0, -30.0, 30.0, -1.0), LANDMARKS),
    "not a number": ((float("nan"), 34.0, 58.0, 52.0), LANDMARKS),
    "no landmarks": (BOX, ((0.0, 0.0),) * 5),
}


@pytest.mark.parametrize("case", NO_FACE)
def test_an_empty_face_is_not_valid_and_not_decoded(decoder, decoded, case):
    latents = make_latents(2).requires_grad_()
    boxes, landmarks = make_faces(2)
    boxes[0, 0], landmarks[0, 0] = (torch.tensor(x) for x in NO_FACE[case])
    embeddings, valid = decoder(latents, boxes, landmarks, everyone(2))
    assert valid.tolist() == [False, True]
    assert len(decoded) == 1
    assert torch.equal(embeddings[0], torch.zeros(128))
    embeddings.square().sum().backward()
    assert latents.grad.isfinite().all()
    assert latents.grad[0].abs().sum() == 0
    assert latents.grad[1].abs().sum() > 0


def test_a_face_in_a_later_frame_only_is_not_valid(decoder, decoded):
    boxes, landmarks = make_faces()
    _, valid = decoder(make_latents(), boxes.roll(1, dims=1), landmarks.roll(1, dims=1), everyone())
    assert not valid.any()
    assert decoded == []


def test_an_infinite_box_means_the_whole_picture(decoder, decoded):
    boxes, landmarks = make_faces()
    boxes[0, 0] = torch.tensor([-torch.inf, -torch.inf, torch.inf, torch.inf])
    _, valid = decoder(make_latents(), boxes, landmarks, everyone())
    assert valid.all()
    assert decoded == [(1, CHANNELS, 1, HEIGHT, WIDTH)]


# -- the gradient ------------------------------------------------------------------------------------------------------


def test_gradient_reaches_the_crop_of_the_first_latent_frame(decoder):
    latents = make_latents().requires_grad_()
    embeddings, _ = decoder(latents, *make_faces(), everyone())
    embeddings.square().sum().backward()
    inside = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool)
    inside[0, 2:8, 3:9] = True
    assert torch.equal((latents.grad[0] != 0).any(1), inside)


def test_checkpointing_does_not_change_the_gradient(decoder):
    direction = torch.randn(1, 128)
    gradients = []
    for embed in (lambda x: decoder(x, *make_faces(), everyone())[0], lambda x: embed_by_hand(decoder, x)):
        latents = make_latents().requires_grad_()
        (embed(latents) * direction).sum().backward()
        gradients.append(latents.grad)
    assert decoder.vae.decoder.gradient_checkpointing
    scale = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4 * scale)


def test_checkpointing_recomputes_the_blocks_in_evaluation_mode(decoder):
    """diffusers asks for grad mode only, not for training mode, unlike many other models."""
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    decoder.vae.decoder.mid_block.register_forward_pre_hook(count)
    assert not decoder.vae.training
    embeddings, _ = decoder(make_latents().requires_grad_(), *make_faces(), everyone())
    assert num_calls == 1
    embeddings.sum().backward()
    assert num_calls == 2


@pytest.mark.parametrize("culprit", ["vae", "recognizer"])
def test_no_grad_around_the_decode_is_caught(decoder, culprit, monkeypatch):
    module, method = {"vae": (decoder.vae, "decode"), "recognizer": (decoder.recognizer, "embed")}[culprit]
    monkeypatch.setattr(module, method, torch.no_grad()(getattr(module, method)))
    latents = make_latents()
    with pytest.raises(RuntimeError, match="gradient ends in the face decode"):
        decoder(latents.requires_grad_(), *make_faces(), everyone())
    with torch.no_grad():
        _, valid = decoder(latents, *make_faces(), everyone())  # validation needs none
    assert valid.all()


def test_descent_on_the_latents_brings_the_identity_closer(decoder):
    target, _ = decoder(-make_latents(2)[1:], *make_faces(), everyone())
    latents = make_latents().requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=0.05)
    distances = []
    for _ in range(6):
        embeddings, _ = decoder(latents, *make_faces(), everyone())
        loss = 1 - torch.cosine_similarity(embeddings, target.detach())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        distances.append(loss.item())
    assert distances[-1] < 0.7 * distances[0]


def test_identity_loss_reaches_what_predicts_the_velocity(decoder):
    """Adapter -> velocity -> clean latents -> picture -> face -> loss: the whole chain, in a bf16-mixed step."""
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    diffusion = Diffusion.from_backbone(scheduler.config, decoder.vae.config)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    sample = diffusion.add_noise(make_latents(2), generators, torch.tensor([200, 700]))
    boxes, landmarks = make_faces(2)
    adapter = nn.Conv3d(3, 3, 1)  # over the latent frames
    reference = torch.randn(2, 128)

    def identity_gradient(weight: float) -> Tensor:
        adapter.zero_grad()
        loss = CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss(600), weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity_pred = adapter(sample.noisy_latents)
            output = loss(
                velocity_pred,
                sample,
                boxes,
                reference,
                lambda denoised, wanted: decoder(denoised, boxes, landmarks, wanted),
                generators,
            )
        assert output.terms["identity"].isnan().tolist() == [False, True]
        output.total.sum().backward()
        return adapter.weight.grad.clone()

    difference = identity_gradient(2.0) - identity_gradient(1.0)
    assert difference.isfinite().all()
    assert (difference[0].abs() > 0).all(), "rows are the predicted latent frames: 0 is the one that is decoded"
    assert (difference[1:] == 0).all()
    assert all(parameter.grad is None for parameter in decoder.parameters())


# -- pitfalls of the VAE and of training -------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_latent_frames", "num_frames"), [(1, 1), (2, 8), (3, 9), (4, 16), (5, 17)])
def test_an_even_number_of_latents_decodes_to_too_many_frames(decoder, num_latent_frames, num_frames):
    """Two latents stand for five frames but decode to eight, the first frame lost among them."""
    video = torch.randn(1, CHANNELS, num_latent_frames, 4, 4)
    with torch.no_grad():
        assert decoder.vae.decode(video).sample.shape[2] == num_frames


@pytest.mark.parametrize("num_latent_frames", [1, 2, 3])
def test_one_latent_frame_is_decoded_whatever_the_length(decoder, decoded, num_latent_frames):
    faces = make_faces(num_frames=4 * num_latent_frames - 3)
    embeddings, _ = decoder(make_latents(1, num_latent_frames), *faces, everyone())
    assert decoded == [(1, CHANNELS, 1, 6, 6)]
    assert embeddings.shape == (1, 128)


def test_stays_frozen_and_in_evaluation_mode():
    class BatchNormRecognizer(nn.Module):
        embed_dim = 3

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def embed(self, pixels: Tensor, landmarks: Tensor) -> Tensor:
            return self.norm(pixels).mean((2, 3))

    whole = nn.ModuleList([FaceDecoder(make_vae(), BatchNormRecognizer(), crop_size=6, margin=1)]).train()
    decoder = whole[0]
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    decoder(make_latents().requires_grad_(), *make_faces(), everyone())[0].sum().backward()
    assert not any(module.training for module in decoder.modules())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


def test_autocast_does_not_reach_in(decoder):
    latents = make_latents()
    expected, _ = decoder(latents, *make_faces(), everyone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, _ = decoder(latents, *make_faces(), everyone())
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, expected)


def test_a_bf16_vae_feeds_an_fp32_recogniser(recognizer):
    decoder = FaceDecoder(make_vae().bfloat16(), recognizer, crop_size=6, margin=1)
    latents = make_latents().requires_grad_()
    embeddings, _ = decoder(latents, *make_faces(), everyone())
    embeddings.sum().backward()
    assert embeddings.dtype == latents.grad.dtype == torch.float32
    assert latents.grad[0, 0].abs().sum() > 0
    exact = embed_by_hand(FaceDecoder(make_vae(), recognizer), latents.detach())
    assert torch.cosine_similarity(embeddings.detach(), exact).item() > 0.99


@pytest.mark.parametrize(("crop_size", "margin"), [(0, 4), (32, -1)])
def test_a_crop_that_is_none_is_refused(recognizer, crop_size, margin):
    with pytest.raises(ValueError, match=f"not {crop_size} and {margin}"):
        FaceDecoder(make_vae(), recognizer, crop_size=crop_size, margin=margin)

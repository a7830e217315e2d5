"""Similarity alignment of faces by landmarks, batched and differentiable in the pixels.

Letters: B batch, K landmarks, H W pixels, S side of the aligned face.
Coordinates are OpenCV's: (0, 0) is the centre of the first pixel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLACK = -1.0


def similarity_transform(landmarks: Tensor, template: Tensor) -> Tensor:
    """Least-squares similarity that carries `landmarks` onto `template`.

    In two dimensions Umeyama's estimate (IEEE TPAMI 1991, equations 40-43) is linear: with z = scale * exp(i * angle),
    z = sum(conj(source) * target) / sum(|source|^2) over the centred points, so no SVD is needed.

    Args:
        landmarks: (B, K, 2) pixel positions, K >= 2.
        template: (K, 2) or (B, K, 2) pixel positions in the aligned face.

    Returns:
        (B, 2, 3) float32 (float64 for float64 landmarks), target = M[:, :2] @ source + M[:, 2]. Landmarks that
        coincide, such as the zeros of an absent face, give the finite but meaningless transform of scale zero.
    """
    if landmarks.ndim != 3 or landmarks.shape[-2:] != template.shape[-2:] or landmarks.shape[-1] != 2:
        raise ValueError(
            f"landmarks {tuple(landmarks.shape)} and template {tuple(template.shape)} must be (B, K, 2) and (K, 2)"
        )
    landmarks = landmarks.to(torch.promote_types(landmarks.dtype, torch.float32))
    template = template.to(landmarks)
    source_mean, target_mean = landmarks.mean(-2), template.mean(-2)
    source = landmarks - source_mean[:, None]  # (B, K, 2)
    target = template - target_mean[..., None, :]  # (K, 2) or (B, K, 2)

    power = source.square().sum((-1, -2)).clamp_min(torch.finfo(source.dtype).eps)  # (B,)
    real = (source * target).sum((-1, -2)) / power
    imag = (source[..., 0] * target[..., 1] - source[..., 1] * target[..., 0]).sum(-1) / power
    linear = torch.stack([real, -imag, imag, real], dim=-1).unflatten(-1, (2, 2))  # (B, 2, 2)
    shift = target_mean - (linear @ source_mean[..., None]).squeeze(-1)
    return torch.cat([linear, shift[..., None]], dim=-1)


def invert_similarity(transform: Tensor) -> Tensor:
    """(B, 2, 3) similarity -> its inverse (B, 2, 3); a scale of zero inverts to a scale of zero."""
    linear, shift = transform[..., :2], transform[..., 2:]
    scale_squared = linear[..., 0, :].square().sum(-1)[..., None, None]  # (B, 1, 1)
    inverse = linear.mT / scale_squared.clamp_min(torch.finfo(linear.dtype).eps)
    return torch.cat([inverse, -inverse @ shift], dim=-1)


def warp_similarity(pixels: Tensor, transform: Tensor, image_size: int) -> Tensor:
    """`cv2.warpAffine` with bilinear interpolation, for a batch.

    Agrees with OpenCV 5 within 0.05 grey levels of 255 in float32, and up to its rounding (0.5) in uint8. OpenCV 4
    rounds positions to 1/32 pixel: there the difference reaches 1/32 of the local contrast along x and along y.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        transform: (B, 2, 3), source pixels -> target pixels.
        image_size: S.

    Returns:
        (B, 3, S, S) in the dtype of `pixels`, black (-1) outside of the picture. Interpolated in float32 or wider.
    """
    height, width = pixels.shape[-2:]
    values = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    inverse = invert_similarity(transform).to(values)
    steps = torch.arange(image_size, device=values.device, dtype=values.dtype)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    targets = torch.stack([x, y, torch.ones_like(x)])  # (3, S, S)
    sources = torch.einsum("bij,jyx->byxi", inverse, targets)  # (B, S, S, 2)
    # grid_sample (align_corners=False) has the picture's outer edges at -1 and 1, half a pixel beyond the centres.
    grid = (2 * sources + 1) / sources.new_tensor([width, height]) - 1
    aligned = F.grid_sample(values - BLACK, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + BLACK
    return aligned.to(pixels.dtype)


def align_faces(pixels: Tensor, landmarks: Tensor, template: Tensor, image_size: int) -> Tensor:
    """Cut the face that the landmarks mark, upright and at the template's scale.

    Equal to insightface's `norm_crop` with ArcFace's template (112 px), see `warp_similarity` for the tolerance. Like
    it, plain bilinear: a face much larger than `image_size` is aliased, so reduce such pictures first.

    Args:
        pixels: (B, 3, H, W) RGB in [-1, 1].
        landmarks: (B, K, 2) in pixels of `pixels`; all equal where there is no face (the result is then meaningless
            but finite: mask it).
        template: (K, 2) in pixels of the aligned face.
        image_size: S.

    Returns:
        (B, 3, S, S) in the range of `pixels`, differentiable in `pixels`.
    """
    if pixels.ndim != 4 or len(pixels) != len(landmarks):
        raise ValueError(
            f"one face per picture: pixels {tuple(pixels.shape)} must be (B, 3, H, W) for landmarks "
            f"{tuple(landmarks.shape)}; repeat a picture that shows several"
        )
    return warp_similarity(pixels, similarity_transform(landmarks, template), image_size)

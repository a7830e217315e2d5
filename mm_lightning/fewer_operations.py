"""The arithmetic of `AutoencoderKLCogVideoX` in fewer operations: same modules, same weights, same results.

- A single frame stands at all temporal taps of a causal convolution: a 2-D convolution with the sum of the taps.
- The spatially conditioned norm enlarges its condition and then multiplies every pixel: the product comes first.
- Nearest enlargement and a 3x3 convolution are one transposed 4x4 convolution: 16 products for a pixel instead of 36.
- Pairs of frames are averaged where they lie, without moving time to the last axis.

Letters: B batch, C channels, T frames, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn
from torch.nn import functional as F

Cache = Tensor | dict[str, Tensor] | None


@contextmanager
def fewer_operations(vae: AutoencoderKLCogVideoX) -> Iterator[None]:
    """Inside the block `vae.encode` and `vae.decode` compute what diffusers computes, with gradients, in less time.

    Only the `forward` of modules is replaced, and given back afterwards: what is saved or copied meanwhile is as ever.
    """
    replaced = []
    for module, forward in shortcuts(vae):
        if "forward" not in module.__dict__:  # else an outer block has replaced it
            module.forward = MethodType(forward, module)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def shortcuts(vae: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    """The modules for which there is another way, and that way."""
    for module in vae.modules():
        if type(module) in FORWARDS:
            yield module, FORWARDS[type(module)]
        if isinstance(module, CogVideoXResnetBlock3D) and isinstance(
            getattr(module, "conv_shortcut", None), CogVideoXSafeConv3d
        ):
            yield module.conv_shortcut, pointwise


def as_frames(hidden_states: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)."""
    return hidden_states[:, :, 0] if hidden_states.shape[2] == 1 else hidden_states.transpose(1, 2).flatten(0, 1)


def as_clips(frames: Tensor, batch_size: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)."""
    return frames.unflatten(0, (batch_size, -1)).transpose(1, 2)


def pointwise(conv: CogVideoXSafeConv3d, hidden_states: Tensor) -> Tensor:
    """A 1x1x1 convolution as a matrix product: (B, C, T, H, W) -> (B, C', T, H, W)."""
    weight = conv.weight.flatten(1).expand(len(hidden_states), -1, -1)
    product = torch.baddbmm(conv.bias[:, None], weight, hidden_states.flatten(2))
    return product.unflatten(2, hidden_states.shape[2:])


def causal_convolution(
    self: CogVideoXCausalConv3d, inputs: Tensor, conv_cache: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, C, T, H, W) -> (B, C', T, H, W), and what the next frames need of these."""
    num_before, padding = self.time_kernel_size - 1, (self.height_pad, self.width_pad)
    if inputs.shape[2] == 1 and conv_cache is None:
        frame = F.conv2d(inputs[:, :, 0], self.conv.weight.sum(2), self.conv.bias, padding=padding)
        return frame.unsqueeze(2), inputs.expand(-1, -1, num_before, -1, -1)
    before = inputs[:, :, :1].expand(-1, -1, num_before, -1, -1) if conv_cache is None else conv_cache
    inputs = torch.cat([before, inputs], dim=2)
    return F.conv3d(inputs, self.conv.weight, self.conv.bias, padding=(0, *padding)), inputs[:, :, -num_before:]


def spatial_norm(
    self: CogVideoXSpatialNorm3D, f: Tensor, zq: Tensor, conv_cache: Cache = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """norm(f) * scale + shift: f (B, C, T, H, W), zq (B, 16, t, h, w) -> (B, C, T, H, W)."""
    scale, shift = (enlarge(pointwise(conv.conv, zq), f.shape[2:]) for conv in (self.conv_y, self.conv_b))
    return torch.addcmul(shift, self.norm_layer(f), scale), {}  # 1x1x1 convolutions need nothing of earlier frames


def enlarge(condition: Tensor, size: torch.Size) -> Tensor:
    """Nearest, to (T, H, W); of an odd number of frames the first stays alone."""
    num_frames = size[0]
    if num_frames == 1:
        return F.interpolate(condition[:, :, 0], size=size[1:]).unsqueeze(2)
    if num_frames % 2 == 0:
        return F.interpolate(condition, size=size)
    first = F.interpolate(condition[:, :, :1], size=(1, *size[1:]))
    return torch.cat([first, F.interpolate(condition[:, :, 1:], size=(num_frames - 1, *size[1:]))], dim=2)


def downsample(self: CogVideoXDownsample3D, x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T', H/2, W/2)."""
    if self.compress_time and x.shape[2] > 1:
        alone = x.shape[2] % 2
        pairs = (x[:, :, alone::2] + x[:, :, alone + 1 :: 2]) / 2
        x = torch.cat([x[:, :, :alone], pairs], dim=2)
    return as_clips(self.conv(F.pad(as_frames(x), (0, 1, 0, 1))), len(x))


def upsample(self: CogVideoXUpsample3D, inputs: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T', 2H, 2W)."""
    if self.compress_time and inputs.shape[2] > 1:
        alone = inputs.shape[2] % 2
        inputs = torch.cat([inputs[:, :, :alone], inputs[:, :, alone:].repeat_interleave(2, dim=2)], dim=2)
    weight = enlarging_weight(self.conv.weight)
    frames = F.conv_transpose2d(as_frames(inputs), weight, self.conv.bias, stride=2, padding=1)
    return as_clips(frames, len(inputs))


def enlarging_weight(weight: Tensor) -> Tensor:
    """Weight of the 3x3 convolution after the enlargement (C', C, 3, 3) -> of the transposed one (C, C', 4, 4)."""
    flipped = weight.flip(-2, -1).transpose(0, 1)
    return sum(F.pad(flipped, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1))


FORWARDS = {
    CogVideoXCausalConv3d: causal_convolution,
    CogVideoXSpatialNorm3D: spatial_norm,
    CogVideoXDownsample3D: downsample,
    CogVideoXUpsample3D: upsample,
}

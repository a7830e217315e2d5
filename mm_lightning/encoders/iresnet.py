"""IResNet, ArcFace's backbone, filled from an ONNX file so that gradients pass through it.

The architecture is that of insightface's `arcface_torch` (IResNet-18/34/50/100): improved residual blocks
batch norm - conv - batch norm - PReLU - conv - batch norm, then batch norm - flatten - linear - batch norm.
Here it is in inference form: a batch norm that follows a convolution or the linear layer is folded into it (exporters
may or may not have done so already), one that precedes a zero-padded convolution stays as a per-channel affine map.

Letters: B batch, C channels, S side of the aligned face, E embedding.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from onnx import NodeProto, numpy_helper
from torch import Tensor, nn

from mm_lightning.encoders.packs import load_onnx

TRANSPARENT_OPS = ("Identity", "Dropout", "Cast")
RESHAPING_OPS = ("Unsqueeze", "Squeeze", "Reshape")


class ChannelAffine(nn.Module):
    """x * scale + shift per channel: a batch norm at inference."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim, 1, 1))
        self.shift = nn.Parameter(torch.zeros(dim, 1, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.addcmul(self.shift, hidden_states, self.scale)


class IBasicBlock(nn.Module):
    """Improved residual block, no activation after the sum."""

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.norm = ChannelAffine(in_dim)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.act = nn.PReLU(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, stride, padding=1)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_dim, out_dim, 1, stride)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = self.conv2(self.act(self.conv1(self.norm(hidden_states))))
        return self.shortcut(hidden_states) + residual


class IResNet(nn.Module):
    """Aligned faces -> embeddings.

    Args:
        stem_dim: channels after the first convolution.
        widths: channels of each stage; every stage halves the side with its first block.
        depths: blocks of each stage, (3, 4, 14, 3) is IResNet-50 and (3, 13, 30, 3) IResNet-100.
        embed_dim: E.
        image_size: S, a multiple of 2 ** len(widths).
    """

    def __init__(
        self, stem_dim: int, widths: Sequence[int], depths: Sequence[int], embed_dim: int = 512, image_size: int = 112
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, stem_dim, 3, padding=1)
        self.act = nn.PReLU(stem_dim)
        blocks, in_dim = [], stem_dim
        for width, depth in zip(widths, depths, strict=True):
            blocks.append(IBasicBlock(in_dim, width, stride=2))
            blocks.extend(IBasicBlock(width, width, stride=1) for _ in range(depth - 1))
            in_dim = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = ChannelAffine(in_dim)
        self.linear = nn.Linear(in_dim * (image_size // 2 ** len(widths)) ** 2, embed_dim)

    def forward(self, faces: Tensor) -> Tensor:
        hidden_states = self.act(self.conv(faces))  # (B, C, S, S)
        hidden_states = self.norm(self.blocks(hidden_states))  # (B, C', S / 16, S / 16)
        return self.linear(hidden_states.flatten(1))  # (B, E)


class OnnxIResNet(NamedTuple):
    """An IResNet out of an ONNX file; it takes `faces * input_scale + input_shift` for faces in [-1, 1]."""

    network: IResNet
    embed_dim: int
    image_size: int
    input_scale: Tensor  # broadcasts over (B, 3, S, S)
    input_shift: Tensor


def read_iresnet(path: Path) -> OnnxIResNet:
    """Read architecture and weights out of an ONNX graph, batch norms folded or not, along its data flow.

    Raises:
        ValueError: the graph is not an IResNet (such as the MobileFaceNet of buffalo_s), or not an ONNX file.
    """
    graph = OnnxGraph(path)
    input_scale, input_shift, tensor = _read_preprocessing(graph)
    conv, tensor = graph.read_conv(tensor, "conv", kernel=3)
    slopes, tensor = graph.read_prelu(tensor, "act")
    state = {**conv, **slopes}
    strides: list[int] = []
    while len(graph.consumers[tensor]) > 1:
        block, stride, tensor = _read_block(graph, tensor, f"blocks.{len(strides)}.")
        state |= block
        strides.append(stride)
    norm, tensor = graph.read_affine(tensor, "norm")
    linear, tensor = graph.read_linear(graph.take(tensor, "Flatten", "Reshape").output[0])
    if tensor not in graph.outputs:
        raise graph.error(f"the embedding {tensor!r} is not the graph's output")
    network, image_size = _build(graph, state | norm | linear, strides)
    return OnnxIResNet(network, network.linear.out_features, image_size, input_scale, input_shift)


def _build(graph: "OnnxGraph", state: dict[str, Tensor], strides: list[int]) -> tuple[IResNet, int]:
    """The network whose stages start at the blocks of stride 2, and its S."""
    if strides[:1] != [2]:
        raise graph.error("there is no residual block that halves the picture behind the first convolution")
    starts = [index for index, stride in enumerate(strides) if stride == 2]
    depths = [end - start for start, end in pairwise([*starts, len(strides)])]
    widths = [len(state[f"blocks.{start}.act.weight"]) for start in starts]
    embed_dim, num_features = state["linear.weight"].shape
    image_size = isqrt(num_features // widths[-1]) * 2 ** len(widths)
    with torch.device("meta"):
        network = IResNet(len(state["act.weight"]), widths, depths, embed_dim, image_size)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise graph.error(str(error)) from error
    return network, image_size


def _read_preprocessing(graph: "OnnxGraph") -> tuple[Tensor, Tensor, str]:
    """Scale and shift of the input, and the tensor behind.

    Graphs from MXNet subtract and multiply themselves and want 0..255, as insightface's `ArcFaceONNX` knows; others
    want [-1, 1].
    """
    tensor = graph.input
    if [node.op_type for node in graph.consumers[tensor]] != ["Sub"]:
        return torch.tensor(1.0), torch.tensor(0.0), tensor
    subtract = graph.take(tensor, "Sub")
    multiply = graph.take(subtract.output[0], "Mul")
    mean, factor = graph.constant(subtract, 1), graph.constant_operand(multiply)
    return 127.5 * factor, (127.5 - mean) * factor, multiply.output[0]


def _read_block(graph: "OnnxGraph", tensor: str, prefix: str) -> tuple[dict[str, Tensor], int, str]:
    """One residual block that starts at `tensor` -> its weights, its stride, the tensor it ends in."""
    norm, main = graph.read_affine(tensor, f"{prefix}norm")
    conv1, main = graph.read_conv(main, f"{prefix}conv1", kernel=3)
    slopes, main = graph.read_prelu(main, f"{prefix}act")
    stride = graph.stride(graph.take(main, "Conv"))
    conv2, main = graph.read_conv(main, f"{prefix}conv2", kernel=3, stride=stride)
    shortcut, side = {}, tensor
    if stride != 1:
        shortcut, side = graph.read_conv(tensor, f"{prefix}shortcut", kernel=1, stride=stride)
    add = graph.take(main, "Add")
    if set(graph.inputs(add)) != {main, side}:
        raise graph.error(f"node {add.name or add.output[0]!r} does not add the shortcut of its block")
    return norm | conv1 | slopes | conv2 | shortcut, stride, add.output[0]


class OnnxGraph:
    """An ONNX graph, read step by step along its data flow; node names and their order in the file do not matter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        graph = load_onnx(path).graph
        self.constants = {weight.name: _to_tensor(weight) for weight in graph.initializer}
        self.consumers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        self._aliases: dict[str, str] = {}
        for node in graph.node:
            self._register(node)
        self.input = next(value.name for value in graph.input if value.name not in self.constants)
        self.outputs = {self._aliases.get(value.name, value.name) for value in graph.output}

    def _register(self, node: NodeProto) -> None:
        inputs = self.inputs(node)
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            self.constants[node.output[0]] = _to_tensor(node.attribute[0].t)
        elif node.op_type in TRANSPARENT_OPS + RESHAPING_OPS and inputs[0] in self.constants:
            self.constants[node.output[0]] = self.constants[inputs[0]]
        elif node.op_type in TRANSPARENT_OPS:
            self._aliases[node.output[0]] = inputs[0]
        else:
            for name in inputs:
                self.consumers[name].append(node)

    def inputs(self, node: NodeProto) -> list[str]:
        return [self._aliases.get(name, name) for name in node.input]

    def error(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.path} is not an IResNet: {reason}. Packs with one: buffalo_l and buffalo_m (w600k_r50.onnx), "
            "antelopev2 (glintr100.onnx); the MobileFaceNet of buffalo_s and buffalo_sc is not supported"
        )

    def take(self, tensor: str, *op_types: str) -> NodeProto:
        """The one node of these types that reads `tensor`."""
        nodes = self.consumers[tensor]
        matching = [node for node in nodes if node.op_type in op_types]
        if len(matching) != 1:
            found = ", ".join(node.op_type for node in nodes) or "nothing"
            raise self.error(f"after tensor {tensor!r} one {' or '.join(op_types)} was expected, there is {found}")
        return matching[0]

    def constant(self, node: NodeProto, index: int) -> Tensor:
        names = self.inputs(node)
        if index >= len(names) or names[index] not in self.constants:
            raise self.error(f"input {index} of node {node.name or node.output[0]!r} ({node.op_type}) is not a weight")
        return self.constants[names[index]]

    def constant_operand(self, node: NodeProto) -> Tensor:
        """The weight of a binary node whose other operand is data, whichever comes first."""
        return self.constant(node, int(self.inputs(node)[0] not in self.constants))

    def stride(self, conv: NodeProto) -> int:
        strides = _attributes(conv).get("strides", [1, 1])
        if strides not in ([1, 1], [2, 2]):
            raise self.error(f"node {conv.name or conv.output[0]!r} has strides {strides}")
        return strides[0]

    def read_conv(self, tensor: str, key: str, kernel: int, stride: int = 1) -> tuple[dict[str, Tensor], str]:
        """A convolution padded to keep the size, and the batch norm behind it if there is one."""
        node = self.take(tensor, "Conv")
        attributes, weight = _attributes(node), self.constant(node, 1)
        pads, group = attributes.get("pads", [0] * 4), attributes.get("group", 1)
        found = (list(weight.shape[2:]), self.stride(node), pads, group)
        expected = ([kernel, kernel], stride, [kernel // 2] * 4, 1)
        if found != expected:
            raise self.error(
                f"node {node.name or node.output[0]!r} is a convolution of (kernel, stride, pads, group) {found} "
                f"where {expected} was expected"
            )
        bias = self.constant(node, 2) if len(node.input) > 2 else torch.zeros(len(weight))
        weight, bias, tensor = self._fold_norm(weight, bias, node.output[0])
        return {f"{key}.weight": weight, f"{key}.bias": bias}, tensor

    def read_linear(self, tensor: str) -> tuple[dict[str, Tensor], str]:
        """Gemm, or MatMul and Add, and the batch norm behind it if there is one."""
        node = self.take(tensor, "Gemm", "MatMul")
        weight = self.constant(node, 1)
        if node.op_type == "MatMul":
            add = self.take(node.output[0], "Add")
            weight, bias, tensor = weight.mT.contiguous(), self.constant_operand(add), add.output[0]
        else:
            attributes = _attributes(node)
            weight = attributes.get("alpha", 1.0) * (weight if attributes.get("transB", 0) else weight.mT.contiguous())
            bias, tensor = attributes.get("beta", 1.0) * self.constant(node, 2), node.output[0]
        weight, bias, tensor = self._fold_norm(weight, bias.flatten(), tensor)
        return {"linear.weight": weight, "linear.bias": bias}, tensor

    def read_prelu(self, tensor: str, key: str) -> tuple[dict[str, Tensor], str]:
        node = self.take(tensor, "PRelu")
        return {f"{key}.weight": self.constant(node, 1).flatten()}, node.output[0]

    def read_affine(self, tensor: str, key: str) -> tuple[dict[str, Tensor], str]:
        node = self.take(tensor, "BatchNormalization")
        scale, shift = self._norm_affine(node)
        state = {f"{key}.scale": scale.float()[:, None, None], f"{key}.shift": shift.float()[:, None, None]}
        return state, node.output[0]

    def _norm_affine(self, node: NodeProto) -> tuple[Tensor, Tensor]:
        gamma, beta, mean, variance = (self.constant(node, index).double() for index in range(1, 5))
        scale = gamma / (variance + _attributes(node).get("epsilon", 1e-5)).sqrt()
        return scale, beta - mean * scale

    def _fold_norm(self, weight: Tensor, bias: Tensor, tensor: str) -> tuple[Tensor, Tensor, str]:
        """Weight (out, ...) and bias (out,) with the batch norm that reads `tensor` multiplied in, in float64."""
        if [node.op_type for node in self.consumers[tensor]] != ["BatchNormalization"]:
            return weight, bias, tensor
        node = self.consumers[tensor][0]
        scale, shift = self._norm_affine(node)
        weight = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
        return weight.float(), (bias.double() * scale + shift).float(), node.output[0]


def _attributes(node: NodeProto) -> dict:
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: list(value) if isinstance(value, Sequence) else value for name, value in values.items()}


def _to_tensor(weight: onnx.TensorProto) -> Tensor:
    array = numpy_helper.to_array(weight)
    return torch.from_numpy(array.copy()).float() if array.dtype.kind == "f" else torch.from_numpy(array.copy())

"""insightface's IResNet with its batch norms, random weights, and ONNX files of it in the forms that packs come in."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn


class Block(nn.Module):
    def __init__(self, in_dim, out_dim, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_dim, eps=1e-5)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_dim, eps=1e-5)
        self.prelu = nn.PReLU(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_dim, eps=1e-5)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim))

    def forward(self, x):
        out = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))


class ReferenceIResNet(nn.Module):
    def __init__(self, widths, depths, image_size):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0], eps=1e-5)
        self.prelu = nn.PReLU(widths[0])
        dims = [widths[0], *widths]
        for index, depth in enumerate(depths):
            blocks = [Block(dims[index + min(i, 1)], dims[index + 1], 2 if i == 0 else 1) for i in range(depth)]
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.num_stages = len(depths)
        self.bn2 = nn.BatchNorm2d(widths[-1], eps=1e-5)
        self.dropout = nn.Dropout(0.4)
        self.fc = nn.Linear(widths[-1] * (image_size // 2 ** len(depths)) ** 2, 512)
        self.features = nn.BatchNorm1d(512, eps=1e-5)

    def forward(self, x):
        x = self.prelu(self.bn1(self.conv1(x)))
        for index in range(self.num_stages):
            x = getattr(self, f"layer{index + 1}")(x)
        return self.features(self.fc(self.dropout(self.bn2(x)).flatten(1)))


def random_iresnet(widths, depths, image_size=112):
    """Evaluation mode; no norm, slope or shift is at its neutral value, so that each one forgotten or swapped shows."""
    torch.manual_seed(0)
    network = ReferenceIResNet(widths, depths, image_size).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.5, 0.5)
    return network


def export_folded(network, path: Path, image_size=112) -> Path:
    """As insightface's packs: the exporter has folded every batch norm that follows a convolution."""
    dummy = torch.zeros(1, 3, image_size, image_size)
    axes = {"input.1": {0: "None"}, "output": {0: "None"}}
    torch.onnx.export(
        network, dummy, path, dynamo=False, input_names=["input.1"], output_names=["output"], dynamic_axes=axes
    )
    return path


def export_unfolded(network, path: Path, image_size=112) -> Path:
    dummy = torch.zeros(1, 3, image_size, image_size)
    torch.onnx.export(
        network,
        dummy,
        path,
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=["data"],
    )
    return path


def prepend_mxnet_preprocessing(source: Path, path: Path) -> Path:
    """(x - mean) * 0.0078125 inside of the graph, as MXNet's exporter leaves it, with a mean per channel."""
    model = onnx.load(source)
    graph = model.graph
    name = graph.input[0].name
    for node in graph.node:
        node.input[:] = ["scaled" if value == name else value for value in node.input]
    graph.initializer.append(
        numpy_helper.from_array(np.array([120, 125, 132], np.float32).reshape(1, 3, 1, 1), "scalar0")
    )
    graph.initializer.append(numpy_helper.from_array(np.array([0.0078125], np.float32), "scalar1"))
    graph.node.insert(0, helper.make_node("Sub", [name, "scalar0"], ["shifted"], name="_minusscalar0"))
    graph.node.insert(1, helper.make_node("Mul", ["shifted", "scalar1"], ["scaled"], name="_mulscalar0"))
    onnx.save(model, path)
    return path


def gemm_to_matmul(source: Path, path: Path) -> Path:
    """The linear layer as MatMul and Add, and the flattening as Reshape, as other exporters write them."""
    model = onnx.load(source)
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    for index, node in enumerate(list(graph.node)):
        if node.op_type == "Flatten":
            graph.initializer.append(numpy_helper.from_array(np.array([0, -1]), "flat"))
            node.CopyFrom(helper.make_node("Reshape", [node.input[0], "flat"], list(node.output)))
        if node.op_type == "Gemm":
            weight = numpy_helper.to_array(weights[node.input[1]]).T.copy()
            graph.initializer.append(numpy_helper.from_array(weight, "transposed"))
            graph.node.insert(index + 1, helper.make_node("Add", [node.input[2], "product"], list(node.output)))
            node.CopyFrom(helper.make_node("MatMul", [node.input[0], "transposed"], ["product"]))
    onnx.save(model, path)
    return path

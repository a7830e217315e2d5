"""A face detector in SCRFD's layout that takes every red block of 8 pixels for a face of 64."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STRIDES = (8, 16, 32)
DISTANCES = (4, 4, 4, 4)  # left, top, right, bottom in strides
POINTS = (-2, -2, 2, -2, 0, 0, -2, 2, 2, 2)


def write_detector(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nodes, constants = [], {}

    def constant(name: str, values, dtype=np.float32) -> str:
        constants[name] = numpy_helper.from_array(np.array(values, dtype), name)
        return name

    def add(kind: str, inputs: list[str], output: str, **attributes) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    red = add("Gather", ["input", constant("first", [0], np.int64)], "red", axis=1)  # (1, 1, H, W)
    outputs = {"score": [], "box": [], "points": []}
    for stride in STRIDES:
        pooled = add("AveragePool", [red], f"pooled{stride}", kernel_shape=[stride] * 2, strides=[stride] * 2)
        found = 1.0 if stride == 8 else 0.0
        clipped = add("Clip", [pooled, constant("low", 0.0), constant("high", 0.9)], f"clipped{stride}")
        first = add("Mul", [clipped, constant(f"found{stride}", found)], f"first{stride}")
        second = add("Mul", [clipped, constant("zero", 0.0)], f"second{stride}")
        both = add("Concat", [first, second], f"both{stride}", axis=1)
        last = add("Transpose", [both], f"last{stride}", perm=[0, 2, 3, 1])
        score = add("Reshape", [last, constant("flat", [-1, 1], np.int64)], f"score{stride}")
        nothing = add("Mul", [score, "zero"], f"nothing{stride}")
        outputs["score"].append(score)
        outputs["box"].append(add("Add", [nothing, constant("distances", [DISTANCES])], f"box{stride}"))
        outputs["points"].append(add("Add", [nothing, constant("offsets", [POINTS])], f"points{stride}"))
    widths = {"score": 1, "box": 4, "points": 10}
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, widths[kind]])
        for kind, names in outputs.items()
        for name in names
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, None, None])]
    graph = helper.make_graph(nodes, "detector", inputs, values, list(constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path

"""Small ONNX models for tests, built operator by operator, and random ones that onnxruntime can run."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from spikeport.models.datasets import load_dataset

OPSET = 17


class Builder:
    """Adds nodes one after another; `value` is what the last one made, `shape` its shape without the batch."""

    def __init__(self, shape: tuple[int, ...], opset: int = OPSET, batch: int | str = "batch") -> None:
        self.in_shape = self.shape = shape
        self.opset, self.batch = opset, batch
        self.value = "x"
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: list[onnx.TensorProto] = []

    def array(self, values: Any, listed: bool = False) -> str:
        """Store an array, as raw bytes or as a list of numbers; returns its name."""
        values = np.asarray(values)
        if values.dtype == np.float64:
            values = values.astype(np.float32)
        name = f"array{len(self.arrays)}"
        if listed:
            kind = helper.np_dtype_to_tensor_dtype(values.dtype)
            self.arrays.append(helper.make_tensor(name, kind, values.shape, values.ravel().tolist()))
        else:
            self.arrays.append(numpy_helper.from_array(values, name))
        return name

    def add(self, operator: str, *inputs: str, shape: tuple[int, ...] | None = None, **attributes: Any) -> str:
        """A node on the last value and on `inputs`; returns the name of what it makes."""
        name = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, [self.value, *inputs], [f"{name}_out"], name, **attributes))
        self.value = f"{name}_out"
        self.shape = self.shape if shape is None else shape
        return self.value

    def model(self, **fields: Any) -> onnx.ModelProto:
        """The model, whose output is the last value."""
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.batch, *self.in_shape])
        y = helper.make_tensor_value_info(self.value, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "network", [x], [y], self.arrays)
        opsets = [helper.make_opsetid("", self.opset)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        for key, value in fields.items():
            setattr(made, key, value)
        return made

    def save(self, path: Path) -> Path:
        onnx.save_model(self.model(), path)
        return path


def load(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    """A model in onnxruntime, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(
    model: onnx.ModelProto | Path | onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What onnxruntime computes, by output name."""
    session = model if isinstance(model, onnxruntime.InferenceSession) else load(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def random_model(seed: int) -> Builder:
    """A network of every operator that is read, over random geometry, attributes and ways to store arrays."""
    rng = np.random.default_rng(seed)
    vector = rng.random() < 0.2
    shape = (
        (int(rng.integers(2, 7)),) if vector else (int(rng.integers(1, 4)), *(int(n) for n in rng.integers(5, 10, 2)))
    )
    made = Builder(shape, int(rng.choice([9, 12, 13, 15, 17, 21])), "batch" if rng.random() < 0.7 else 2)
    if not vector:
        for _ in range(int(rng.integers(1, 6))):
            _image_layer(made, rng)
        if rng.random() < 0.2:
            made.add("GlobalAveragePool", shape=(made.shape[0], 1, 1))
        _flatten(made, rng)
    for _ in range(int(rng.integers(1, 4))):
        _vector_layer(made, rng)
    if rng.random() < 0.2:
        made.add("Softmax", axis=1)
    return made


def _array(made: Builder, rng: np.random.Generator, values: np.ndarray) -> str:
    """Stored, or as the output of a Constant or an Identity."""
    name = made.array(values, listed=bool(rng.random() < 0.3))
    kind = rng.random()
    if kind < 0.15:
        tensor = made.arrays.pop()
        made.nodes.append(helper.make_node("Constant", [], [name], f"constant_{name}", value=tensor))
        made.arrays.append(numpy_helper.from_array(np.zeros(1, np.float32), f"unused_{name}"))
    elif kind < 0.25:
        made.nodes.append(helper.make_node("Identity", [name], [f"{name}_same"], f"same_{name}"))
        return f"{name}_same"
    return name


def _image_layer(made: Builder, rng: np.random.Generator) -> None:
    channels, height, width = made.shape
    kind = rng.choice(["conv", "conv", "conv", "norm", "relu", "average", "max", "residual", "constant", "nothing"])
    if kind == "conv":
        _conv(made, rng)
    elif kind == "norm":
        arrays = [rng.normal(1, 0.3, channels), rng.normal(0, 0.3, channels), rng.normal(0, 0.3, channels)]
        names = [_array(made, rng, array) for array in (*arrays, rng.uniform(0.5, 2, channels))]
        made.add("BatchNormalization", *names, epsilon=1e-3)
    elif kind == "relu":
        made.add("Relu")
    elif kind in ("average", "max") and min(height, width) >= 2:
        _pool(made, rng, "AveragePool" if kind == "average" else "MaxPool")
    elif kind == "residual":
        before = made.value
        weight = rng.normal(0, 0.4, (channels, channels, 3, 3))
        made.add("Conv", _array(made, rng, weight), pads=[1, 1, 1, 1])
        made.add("Add", before)
        if rng.random() < 0.3:
            made.add("Add", made.value)
    elif kind == "constant":
        values = rng.uniform(0.5, 2, (channels, 1, 1) if rng.random() < 0.5 else (1,))
        made.add(str(rng.choice(["Add", "Sub", "Mul", "Div"])), _array(made, rng, values))
    else:
        made.add(str(rng.choice(["Identity", "Dropout"])))


def _conv(made: Builder, rng: np.random.Generator) -> None:
    channels, *extents = made.shape
    groups = int(rng.choice([g for g in (1, 2, 3) if channels % g == 0]))
    out = groups * int(rng.integers(1, 4))
    kernel = [int(rng.integers(1, min(3, extent) + 1)) for extent in extents]
    strides = rng.integers(1, 3, 2).tolist()
    attributes: dict[str, Any] = {"strides": strides, "group": groups}
    if rng.random() < 0.3:
        attributes["auto_pad"] = str(rng.choice(["VALID", "SAME_UPPER", "SAME_LOWER"]))
        same = attributes["auto_pad"] != "VALID"
        size = [-(-e // s) if same else (e - k) // s + 1 for e, s, k in zip(extents, strides, kernel, strict=True)]
    else:
        first = rng.integers(0, 2, 2)
        last = first if rng.random() < 0.6 else rng.integers(0, 2, 2)
        gaps = [1, 1]
        if (first == last).all() and rng.random() < 0.3:
            gaps = [2 if e + 2 * f > 2 * (k - 1) else 1 for e, f, k in zip(extents, first, kernel, strict=True)]
        attributes |= {"pads": [*first.tolist(), *last.tolist()], "dilations": gaps, "kernel_shape": kernel}
        size = [
            (e + f + b - (k - 1) * g - 1) // s + 1
            for e, f, b, k, g, s in zip(extents, first, last, kernel, gaps, strides, strict=True)
        ]
    weight = rng.normal(0, 0.5, (out, channels // groups, *kernel))
    names = [_array(made, rng, weight)]
    if rng.random() < 0.6:
        names.append(_array(made, rng, rng.normal(0, 0.5, out)))
    made.add("Conv", *names, shape=(out, *(int(n) for n in size)), **attributes)


def _pool(made: Builder, rng: np.random.Generator, operator: str) -> None:
    channels, *extents = made.shape
    kernel = [int(rng.integers(1, min(3, extent) + 1)) for extent in extents]
    strides = rng.integers(1, 3, 2).tolist()
    pads = [0, 0]
    if operator == "MaxPool":
        pads = [int(rng.integers(0, k)) for k in kernel]
    size = [(e + 2 * p - k) // s + 1 for e, p, k, s in zip(extents, pads, kernel, strides, strict=True)]
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": pads * 2}
    made.add(operator, shape=(channels, *size), **attributes)


def _flatten(made: Builder, rng: np.random.Generator) -> None:
    size = int(np.prod(made.shape))
    kind = rng.random()
    if kind < 0.5:
        made.add("Flatten", shape=(size,))
    else:
        targets = [[0, -1], [-1, size]] if made.batch == "batch" else [[0, -1], [2, -1], [-1, size], [0, size]]
        target = targets[int(rng.integers(len(targets)))]
        made.add("Reshape", made.array(np.array(target, np.int64)), shape=(size,))


def _vector_layer(made: Builder, rng: np.random.Generator) -> None:
    (size,) = made.shape
    out = int(rng.integers(1, 8))
    kind = rng.choice(["gemm", "gemm", "matmul", "relu", "norm", "residual"])
    weight = rng.normal(0, 0.5, (size, out))
    if kind == "gemm":
        turned = bool(rng.random() < 0.5)
        names = [_array(made, rng, weight.T.copy() if turned else weight)]
        if made.opset < 11 or rng.random() < 0.7:
            shapes = [(out,), (1, out), (1,)]
            names.append(_array(made, rng, rng.normal(0, 0.5, shapes[int(rng.integers(3))])))
        made.add("Gemm", *names, shape=(out,), transB=int(turned), alpha=float(rng.uniform(0.5, 2)), beta=0.5)
    elif kind == "matmul":
        made.add("MatMul", _array(made, rng, weight), shape=(out,))
        made.add("Add", _array(made, rng, rng.normal(0, 0.5, (out,))))
    elif kind == "norm":
        names = [_array(made, rng, rng.uniform(0.5, 2, size)) for _ in range(4)]
        made.add("BatchNormalization", *names)
    elif kind == "residual":
        before = made.value
        made.add("Gemm", _array(made, rng, rng.normal(0, 0.5, (size, size))), made.array(np.zeros(size)))
        made.add("Add", before)
    else:
        made.add("Relu")


def trained_on_digits(path: Path) -> Path:
    """A small ANN with batch normalisation, trained on the digits and written by torch."""
    torch.manual_seed(0)
    data = load_dataset("digits", 200, 0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    images, labels = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(25):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's newer exporter needs a package more
        torch.onnx.export(
            net.eval(), (images[:1],), path, dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"]
        )
    return path

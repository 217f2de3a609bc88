"""ONNX files that nobody would write: whatever the bytes, the reader answers with a network or with a clear error.

`make test` looks at some hundreds of files, `make fuzz` at many more. What was found and mended is kept below.
"""

import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_models import Builder, random_model

from spikeport.converters.ann import Ann, forward
from spikeport.converters.onnx_operators import SUPPORTED
from spikeport.converters.onnx_reader import read_onnx
from spikeport.models.errors import GraphError

MANY = settings(max_examples=4 * settings().max_examples)
LARGEST_MEMORY = 32 << 20
"""Bytes that reading a file of some kilobytes may take."""

SEEDS = st.integers(0, 2**32 - 1)


def read(content: bytes, folder: Path) -> Ann | None:
    """What is read of a file; None where it is refused in a line or two, as it must be if it is not read."""
    path = folder / "fuzzed.onnx"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        return read_onnx(path)
    except GraphError as error:
        message = str(error)
        assert 1 <= len(message.splitlines()) <= 2
        assert len(message) < 8_000
        assert message.isprintable() or "\n" in message
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < LARGEST_MEMORY


def assert_sound(ann: Ann | None) -> None:
    """What is read can be computed, and every layer has the shape that it says."""
    if ann is None or sum(int(np.prod(layer.shape)) for layer in ann.layers) > 100_000:
        return
    made = forward(ann, torch.zeros((1, *ann.input_shape), dtype=torch.float64), [layer.name for layer in ann.layers])
    assert {name: tuple(value.shape[1:]) for name, value in made.items()} == {x.name: x.shape for x in ann.layers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ---- bytes ----------------------------------------------------------------------------------------------------------


@MANY
@given(seed=SEEDS, times=st.integers(1, 6))
def test_mutated_bytes_are_read_or_refused(seed: int, times: int, folder: Path) -> None:
    """A valid file with bytes changed, taken out, doubled or put in at a few places."""
    rng = np.random.default_rng(seed)
    content = bytearray(random_model(int(rng.integers(50))).model().SerializeToString())
    for _ in range(times):
        first = int(rng.integers(len(content) + 1))
        end = first + int(rng.choice([1, 1, 1, 2, 5, 40]))
        new = (rng.bytes(end - first), b"", 2 * bytes(content[first:end]), rng.bytes(3) + bytes(content[first:end]))
        content[first:end] = new[int(rng.integers(4))]
    assert_sound(read(bytes(content), folder))


@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused(content: bytes, folder: Path) -> None:
    assert read(content, folder) is None


# ---- structure ------------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 3, 7, 1 << 15, 1 << 31, -(1 << 31), (1 << 62), -(1 << 63), (1 << 63) - 1)
WORDS = (
    "",
    "x",
    "conv0_out",
    "array0",
    "input",
    "Relu",
    "Conv",
    "Add",
    "Reshape",
    "strides",
    "a\nb",
    "\u202e",
    "é" * 100,
)
FLOATS = (0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-40)


def messages(message: Message) -> list[Message]:
    """A message and all inside it."""
    found = [message]
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            parts: Sequence[Any] = value if isinstance(value, Sequence) or hasattr(value, "add") else [value]
            found += [inner for part in parts for inner in messages(part)]
    return found


def spoil(message: Message, rng: np.random.Generator) -> None:
    """Set, clear, shorten or lengthen one field of a message."""
    field = message.DESCRIPTOR.fields[int(rng.integers(len(message.DESCRIPTOR.fields)))]
    if rng.random() < 0.2:
        message.ClearField(field.name)
        return
    kinds: dict[int, Callable[[], Any]] = {
        FieldDescriptor.TYPE_INT64: lambda: NUMBERS[int(rng.integers(len(NUMBERS)))],
        FieldDescriptor.TYPE_INT32: lambda: int(rng.integers(-3, 30)),
        FieldDescriptor.TYPE_UINT64: lambda: int(rng.integers(0, 9)),
        FieldDescriptor.TYPE_ENUM: lambda: int(rng.integers(0, 16)),
        FieldDescriptor.TYPE_FLOAT: lambda: FLOATS[int(rng.integers(len(FLOATS)))],
        FieldDescriptor.TYPE_DOUBLE: lambda: FLOATS[int(rng.integers(len(FLOATS)))],
        FieldDescriptor.TYPE_STRING: lambda: WORDS[int(rng.integers(len(WORDS)))],
        FieldDescriptor.TYPE_BYTES: lambda: rng.bytes(int(rng.integers(0, 64))),
    }
    value = getattr(message, field.name)
    repeated = hasattr(value, "extend")
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if repeated and len(value) and rng.random() < 0.5:
            del value[int(rng.integers(len(value)))]
        elif repeated and len(value):
            value.append(value[int(rng.integers(len(value)))])
        return
    try:
        if not repeated:
            setattr(message, field.name, kinds[field.type]())
        elif len(value) and rng.random() < 0.7:
            value[int(rng.integers(len(value)))] = kinds[field.type]()
        else:
            value.append(kinds[field.type]())
    except ValueError:  # of an enumeration that is closed
        message.ClearField(field.name)


@MANY
@given(seed=SEEDS, times=st.integers(1, 5))
def test_spoiled_models_are_read_or_refused(seed: int, times: int, folder: Path) -> None:
    rng = np.random.default_rng(seed)
    model = random_model(int(rng.integers(200))).model()
    for _ in range(times):
        inside = messages(model)
        spoil(inside[int(rng.integers(len(inside)))], rng)
    assert_sound(read(model.SerializeToString(), folder))


@MANY
@given(seed=SEEDS)
def test_nodes_of_any_operator_and_attributes_are_read_or_refused(seed: int, folder: Path) -> None:
    """Nodes that are put together at random, of values that are there and of arrays of any shape."""
    rng = np.random.default_rng(seed)
    made = Builder((2, 5, 4) if rng.random() < 0.7 else (6,))
    operators = ["Conv", "Gemm", "MatMul", "Add", "Mul", "Div", "Sub", "BatchNormalization", "AveragePool", "MaxPool"]
    operators += ["Flatten", "Reshape", "Relu", "Identity", "Dropout", "GlobalAveragePool", "Constant", "Softmax"]
    names = [
        "kernel_shape",
        "strides",
        "pads",
        "dilations",
        "group",
        "axis",
        "auto_pad",
        "ceil_mode",
        "transB",
        "alpha",
    ]
    for _ in range(int(rng.integers(1, 4))):
        arrays = []
        for _ in range(int(rng.integers(0, 3))):
            shapes = [(2,), (1,), (), (2, 2, 1, 1), (2, 2, 2, 3), (2, 1, 3, 3), (6, 6), (3, 6), (40, 2), (2, 1, 1)]
            shape = shapes[int(rng.integers(len(shapes)))]
            kind = np.int64 if rng.random() < 0.2 else np.float32
            arrays.append(made.array(rng.integers(-2, 7, shape).astype(kind)))
        attributes: dict[str, Any] = {}
        for name in rng.choice(names, int(rng.choice([0, 0, 1, 3])), replace=False):
            numbers = rng.integers(-1, 4, int(rng.integers(0, 5))).tolist()
            choices: list[Any] = [numbers or 1, int(rng.integers(-2, 4)), "SAME_UPPER", "VALID", 0.5]
            attributes[str(name)] = choices[int(rng.integers(len(choices)))]
        made.add(str(rng.choice(operators)), *arrays, **attributes)
    assert_sound(read(made.model().SerializeToString(), folder))


# ---- what was found -------------------------------------------------------------------------------------------------


def test_signalling_nans_are_refused_without_a_warning(tmp_path: Path) -> None:
    """Widening one raises the processor's flag for invalid values."""
    made = Builder((1,))
    bits = np.array([0x7FA00001], np.uint32).tobytes()
    made.arrays.append(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1, 1], raw_data=bits))
    made.nodes.append(helper.make_node("Gemm", ["x", "w"], ["y"], "gemm"))
    made.value = "y"
    with pytest.raises(GraphError, match="'w' holds NaN"):
        read_onnx(made.save(tmp_path / "m.onnx"))


@pytest.mark.parametrize("operator", sorted(SUPPORTED))
def test_an_operator_without_inputs_is_refused(operator: str, tmp_path: Path) -> None:
    """Reshape looked at an input that was not there."""
    made = Builder((1,))
    made.nodes.append(helper.make_node(operator, [], ["y"], "bare"))
    made.value = "y"
    with pytest.raises(GraphError, match="node 'bare'"):
        read_onnx(made.save(tmp_path / "m.onnx"))

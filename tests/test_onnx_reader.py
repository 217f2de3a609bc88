"""ONNX files: what is read computes what onnxruntime does, and no file, however wrong, gets past a clear error."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from onnx_models import Builder, random_model, run

from spikeport.converters import onnx_arrays, onnx_operators, onnx_reader
from spikeport.converters.ann import forward
from spikeport.converters.onnx_operators import SUPPORTED
from spikeport.converters.onnx_reader import OPSETS, read_onnx
from spikeport.models.errors import GraphError


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path, *mentions: str) -> str:
    """The message with which a file is refused: one or two lines, with the file's name and the mentions in it."""
    with pytest.raises(GraphError) as caught:
        read_onnx(path)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2, message
    assert path.name in message, message
    for mention in mentions:
        assert mention in message, message
    return message


def small(**fixed: Any) -> Builder:
    """A convolution, a ReLU, a pooling and a matrix."""
    made = Builder((1, 6, 6), **fixed)
    rng = np.random.default_rng(0)
    made.add("Conv", made.array(rng.normal(0, 1, (2, 1, 3, 3))), made.array(rng.normal(0, 1, 2)), shape=(2, 4, 4))
    made.add("Relu")
    made.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2], shape=(2, 2, 2))
    made.add("Flatten", shape=(8,))
    made.add("Gemm", made.array(rng.normal(0, 1, (8, 3))), made.array(rng.normal(0, 1, 3)), shape=(3,))
    return made


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_read_computes_what_onnxruntime_does(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = random_model(seed)
    path = made.save(tmp_path_factory.getbasetemp() / "random.onnx")
    ann = read_onnx(path)
    x = np.random.default_rng(seed).uniform(-1, 1, (2, *made.in_shape)).astype(np.float32)
    (expected,) = run(path, {"x": x}).values()
    found = forward(ann, torch.from_numpy(x).double())[ann.output]
    if made.nodes[-1].op_type == "Softmax":  # it changes no decision, and is left out
        found = found.softmax(dim=1)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3 * max(1.0, np.abs(expected).max()))


def test_every_supported_operator_is_in_the_random_models() -> None:
    seen = {node.op_type for seed in range(200) for node in random_model(seed).nodes}
    assert seen | {"LogSoftmax"} == set(SUPPORTED)


def test_no_operator_has_changed_since_it_was_looked_at() -> None:
    """A newer version of an operator has to be read before OPSETS may hold it."""
    looked_at = {
        **dict.fromkeys(("Add", "Div", "Mul", "Sub", "Relu"), 14),
        **dict.fromkeys(("AveragePool", "Conv", "Dropout", "GlobalAveragePool", "MaxPool"), 22),
        **dict.fromkeys(("BatchNormalization",), 15),
        **dict.fromkeys(("Constant", "Flatten", "Identity", "Reshape"), 25),
        **dict.fromkeys(("Gemm", "LogSoftmax", "MatMul", "Softmax"), 13),
    }
    newest = OPSETS.stop - 1
    assert {name: onnx.defs.get_schema(name, newest).since_version for name in SUPPORTED} == looked_at


@pytest.mark.parametrize("opset", [7, 13, 17, 28])
def test_opsets_at_both_ends_are_read(opset: int, tmp_path: Path) -> None:
    assert read_onnx(small(opset=opset).save(tmp_path / "m.onnx")).input_shape == (1, 6, 6)


def test_what_the_output_does_not_need_is_left_out(tmp_path: Path) -> None:
    made = small()
    kept = made.value
    made.add("Relu")
    made.value = kept
    assert len(read_onnx(made.save(tmp_path / "m.onnx")).layers) == 5


def test_nodes_in_any_order_are_read(tmp_path: Path) -> None:
    made = small()
    made.nodes.reverse()
    ann = read_onnx(made.save(tmp_path / "m.onnx"))
    assert [layer.name for layer in ann.layers] == ["conv0", "relu1", "averagepool2", "flatten3", "gemm4"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"value_float": 2.0}, 2),
        ({"value_floats": [1.0, 3.0]}, [1, 3]),
        ({"value_int": 2}, 2),
        ({"value_ints": [4]}, 4),
    ],
)
def test_constants_are_read_in_every_form(value: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    made = Builder((2,))
    made.nodes.append(helper.make_node("Constant", [], ["c"], "c", **value))
    made.add("Mul", "c")
    ann = read_onnx(made.save(tmp_path / "m.onnx"))
    out = forward(ann, torch.ones((1, 2), dtype=torch.float64))[ann.output]
    np.testing.assert_array_equal(out[0].numpy(), np.broadcast_to(expected, 2))


@pytest.mark.parametrize("listed", [False, True])
def test_halves_are_read_from_bytes_and_from_their_bits(listed: bool, tmp_path: Path) -> None:
    weight = np.array([[1.5, -0.25], [2.0, 65504.0]], np.float16)
    made = Builder((2,))
    made.add("Gemm", "w", shape=(2,), transB=1)
    if listed:
        bits = weight.view(np.uint16).ravel().tolist()
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=weight.shape, int32_data=bits)
    else:
        tensor = numpy_helper.from_array(weight, "w")
    made.arrays.append(tensor)
    (layer,) = read_onnx(made.save(tmp_path / "m.onnx")).layers
    np.testing.assert_array_equal(layer.weight, weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "batch"),
    [([0, -1], "n"), ([-1, 12], "n"), ([1, -1], 1), ([1, 12], 1), ([0, 12], 1), ([0, 3, 2, 2], "n")],
)
def test_reshapes_that_flatten_are_read(target: list[int], batch: int | str, tmp_path: Path) -> None:
    made = Builder((3, 2, 2), batch=batch)
    made.add("Relu")
    made.add("Reshape", made.array(np.array(target)))
    ann = read_onnx(made.save(tmp_path / "m.onnx"))
    assert ann.shape_of(ann.output) == ((12,) if len(target) == 2 else (3, 2, 2))


@pytest.mark.parametrize(
    ("target", "batch"),
    [
        ([1, -1], "n"),
        ([-1], "n"),
        ([-1, -1], "n"),
        ([2, 6], 1),
        ([0, 4, 3], "n"),
        ([], "n"),
        ([-1, 6], "n"),
        ([0, 0], "n"),
    ],
)
def test_other_reshapes_are_refused(target: list[int], batch: int | str, tmp_path: Path) -> None:
    made = Builder((3, 2, 2), batch=batch)
    made.add("Relu")
    made.add("Reshape", made.array(np.array(target, np.int64)))
    refused(made.save(tmp_path / "m.onnx"), "reshape1", str(target))


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_all_unsupported_operators_are_named_at_once(tmp_path: Path) -> None:
    made = Builder((3,))
    for operator in ("Sigmoid", "Tanh", "Relu", "Tanh", "Elu", "Tanh", "Tanh"):
        made.add(operator)
    made.nodes.append(helper.make_node("Spike", [made.value], ["y"], "mine", domain="example.org"))
    made.value = "y"
    message = refused(made.save(tmp_path / "m.onnx"), "'Sigmoid' (node 'sigmoid0')", "'Elu'", "'example.org::Spike'")
    assert "'Tanh' (node 'tanh1', 'tanh3', 'tanh5' and 1 more)" in message
    assert "Supported: Add, AveragePool" in message


@pytest.mark.parametrize("opset", [1, 6, OPSETS.stop, 10**9])
def test_an_unknown_opset_is_refused_with_the_remedy(opset: int, tmp_path: Path) -> None:
    refused(small(opset=opset).save(tmp_path / "m.onnx"), f"opset {opset};", "7 to 28", "opset_version=17")


def test_a_model_without_an_opset_is_refused(tmp_path: Path) -> None:
    model = small().model()
    del model.opset_import[:]
    refused(save(tmp_path / "m.onnx", model), "no opset")


def test_a_file_that_is_not_there_or_no_model_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "does not exist")
    for name, content in {"empty": b"", "text": b"solid cube\n" * 9, "zeros": bytes(100)}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        refused(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = small().model().SerializeToString()
    for length in range(0, len(whole) - 8, 7):
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[:length])
        refused(path)


def _dangling(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "nowhere"


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "gemm4_out"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node[2].output[0] = "relu1_out"


def _no_such_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


def _output_is_input(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "x"


def _two_outputs(model: onnx.ModelProto) -> None:
    model.graph.output.add(name="relu1_out")


def _two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.add(name="more")


def _not_a_number(model: onnx.ModelProto) -> None:
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight.flat[3] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "array0"))


def _infinite(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array([1, -np.inf], np.float32), "array1"))


def _overflowing(model: onnx.ModelProto) -> None:
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.full((8, 3), 1e308), "array2"))
    model.graph.node[4].attribute.append(helper.make_attribute("alpha", 1e30))


def _huge_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 40]


def _negative_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-2, 1, 3, 3]


def _short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 3


def _text(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.STRING


def _no_weight(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[1:]


def _weight_left_out(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[1] = ""


def _computed_weight(model: onnx.ModelProto) -> None:
    model.graph.node[4].input[1] = "flatten3_out"


def _dynamic_height(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


def _huge_image(model: onnx.ModelProto) -> None:
    for place in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_value = 1 << 40


def _whole_numbers(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def _no_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def _two_arrays_of_one_name(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def _unknown_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("colour", "red"))


def _wrong_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("strides", "two"))


def _huge_stride(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute[0].ints[:] = [1 << 62, 1 << 62]


def _huge_padding(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("pads", [1 << 25] * 4))


def _unequal_padding(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("pads", [0, 0, 1 << 25, 0]))


@pytest.mark.parametrize(
    ("spoil", "mention"),
    [
        (_dangling, "'relu1' takes 'nowhere'"),
        (_cycle, "are a cycle"),
        (_twice, "made twice"),
        (_no_such_output, "no node makes the output"),
        (_output_is_input, "no node makes the output"),
        (_two_outputs, "2 outputs"),
        (_two_inputs, "2 inputs"),
        (_not_a_number, "'array0' holds NaN"),
        (_infinite, "'array1' holds NaN or infinity"),
        (_overflowing, "'gemm4' (Gemm): its values become NaN or infinite"),
        (_huge_shape, "more than a network can hold"),
        (_negative_shape, "has the shape (-2,"),
        (_short, "declares 108 bytes and has 72"),
        (_text, "of a type that is not read"),
        (_no_weight, "its weight is missing"),
        (_weight_left_out, "its weight is missing"),
        (_computed_weight, "its weight is computed from the input"),
        (_dynamic_height, "dimension 2 of the input 'x' is dynamic"),
        (_huge_image, "more than"),
        (_whole_numbers, "no tensor of floating-point numbers"),
        (_no_shape, "0 dimensions"),
        (_two_arrays_of_one_name, "two arrays of one name"),
        (_unknown_attribute, "attribute 'colour'"),
        (_wrong_attribute, "attribute strides"),
        (_huge_stride, "is not possible"),
        (_huge_padding, "more than"),
        (_unequal_padding, "its padding is unequal"),
    ],
)
def test_a_wrong_model_is_refused_by_name(spoil: Callable[[Any], None], mention: str, tmp_path: Path) -> None:
    model = small().model()
    spoil(model)
    refused(save(tmp_path / "m.onnx", model), mention)


def _one(operator: str, *arrays: Any, shape: tuple[int, ...] = (2, 4, 4), **attributes: Any) -> Builder:
    made = Builder(shape)
    made.add(operator, *[made.array(array) for array in arrays], **attributes)
    return made


@pytest.mark.parametrize(
    ("made", "mention"),
    [
        (_one("Conv", np.ones((2, 2, 3))), "3 dimensions"),
        (_one("Conv", np.ones((2, 3, 1, 1))), "do not fit"),
        (_one("Conv", np.ones((2, 2, 5, 5))), "larger than its input"),
        (_one("Conv", np.ones((2, 2, 1, 1)), np.ones(3)), "bias of shape (3,)"),
        (_one("Conv", np.ones((2, 2, 1, 1)), group=0), "0 groups"),
        (_one("Conv", np.ones((2, 2, 1, 1)), strides=[0, 1]), "not possible"),
        (_one("Conv", np.ones((2, 2, 1, 1)), strides=[1]), "height's and the width's"),
        (_one("Conv", np.ones((2, 2, 3, 3)), kernel_shape=[2, 2]), "kernel_shape"),
        (_one("Conv", np.ones((2, 2, 1, 1)), auto_pad="AROUND"), "auto_pad"),
        (_one("Conv", np.ones((2, 2, 2, 2)), pads=[0, 0, 1, 1], dilations=[2, 2]), "unequal"),
        (_one("Gemm", np.ones((2, 2))), "flatten them first"),
        (_one("Gemm", np.ones((3, 2)), shape=(2,)), "for 2 features"),
        (_one("Gemm", np.ones((2, 2)), np.ones((2, 2)), shape=(2,)), "constant of shape (2, 2)"),
        (_one("Gemm", np.ones((2, 2)), shape=(2,), transA=1), "mixes the samples"),
        (_one("MatMul", np.ones((2, 2, 2)), shape=(2,)), "a matrix of shape"),
        (_one("Add", np.ones((4, 4))[:, :1] * np.arange(4.0)[:, None]), "differs from place to place"),
        (_one("Add", np.ones((3, 1, 1))), "constant of shape (3, 1, 1)"),
        (_one("Div", np.zeros(1)), "NaN or infinite"),
        (_one("BatchNormalization", *[np.ones(3)] * 4), "2 channels"),
        (_one("BatchNormalization", *[np.ones(2)] * 3, -np.ones(2)), "variance is negative"),
        (_one("BatchNormalization", *[np.ones(2)] * 4, training_mode=1), "training mode"),
        (_one("AveragePool", kernel_shape=[2, 2], pads=[1, 1, 1, 1]), "without padding"),
        (_one("AveragePool", kernel_shape=[5, 5]), "does not fit"),
        (_one("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), "ceil_mode"),
        (_one("AveragePool", kernel_shape=[1 << 30, 1 << 30]), "not possible"),
        (_one("MaxPool", kernel_shape=[2, 2], pads=[2, 2, 2, 2]), "padding is larger"),
        (_one("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]), "gaps"),
        (_one("MaxPool", kernel_shape=[2, 2], pads=[0, 0, 1, 1]), "unequal"),
        (_one("MaxPool"), "not possible"),
        (_one("Flatten", axis=2), "from dimension 2 on"),
        (_one("Flatten", axis=1 << 40), "from dimension"),
        (_one("Softmax"), "takes vectors"),
        (_one("Softmax", shape=(3,), axis=0), "very end"),
        (_one("Dropout", np.float32(0.5), np.array(True)), "training mode"),
    ],
)
def test_what_an_operator_cannot_be_is_refused_by_name(made: Builder, mention: str, tmp_path: Path) -> None:
    refused(made.save(tmp_path / "m.onnx"), f"node {made.nodes[-1].name!r} ({made.nodes[-1].op_type})", mention)


def test_a_softmax_in_the_middle_is_refused(tmp_path: Path) -> None:
    made = Builder((3,))
    made.add("Softmax")
    made.add("Relu")
    refused(made.save(tmp_path / "m.onnx"), "'softmax0'", "very end")


def test_names_of_a_file_stay_on_one_line(tmp_path: Path) -> None:
    model = small().model()
    model.graph.node[1].input[0] = "a\nb\x1b[31m" + "c" * 10_000
    assert len(refused(save(tmp_path / "m.onnx", model), "'a\\nb\\x1b[31mccc")) < 600


def test_limits_on_the_size_of_a_model_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small().save(tmp_path / "m.onnx")
    for module, limit, value, mention in (
        (onnx_reader, "LARGEST_FILE", 100, "at most 100"),
        (onnx_reader, "LARGEST_COUNT", 3, "5 nodes; at most 3"),
        (onnx_arrays, "LARGEST_TOTAL", 200, "more than a network can hold"),
        (onnx_operators, "LARGEST_VALUE", 30, "more than 30 numbers"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, value)
            refused(path, mention)


# ---- data in other files --------------------------------------------------------------------------------------------


def external(path: Path, location: str = "data.bin", **entries: Any) -> Path:
    """A model whose first array is kept in another file; `entries` replace what it says about the place."""
    model = small().model()
    tensor = model.graph.initializer[0]
    raw = tensor.raw_data
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": location, "offset": 5, "length": len(raw)} | entries).items():
        tensor.external_data.add(key=key, value=str(value))
    tensor.ClearField("raw_data")
    path.parent.mkdir(exist_ok=True)
    (path.parent / "data.bin").write_bytes(b"12345" + raw)
    return save(path, model)


def test_data_in_the_models_folder_is_read(tmp_path: Path) -> None:
    beside = read_onnx(external(tmp_path / "model" / "m.onnx"))
    inside = read_onnx(small().save(tmp_path / "m.onnx"))
    np.testing.assert_array_equal(beside.layers[0].weight, inside.layers[0].weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "location",
    [
        "../data.bin",
        "sub/../../data.bin",
        "{absolute}",
        "C:\\data.bin",
        "..\\data.bin",
        "\\\\host\\data.bin",
        "",
        "C:data",
    ],
)
def test_data_outside_the_models_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(1000))
    (tmp_path / "model" / "sub").mkdir(parents=True)
    location = location.format(absolute=tmp_path / "data.bin")
    refused(external(tmp_path / "model" / "m.onnx", location), "'conv0'", "only files in the model's folder are read")


@pytest.mark.parametrize("of_folder", [False, True])
def test_a_link_out_of_the_models_folder_is_refused(of_folder: bool, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret.bin").write_bytes(bytes(1000))
    path = external(tmp_path / "model" / "m.onnx", "linked/secret.bin" if of_folder else "linked.bin")
    target = tmp_path / "other" if of_folder else tmp_path / "other" / "secret.bin"
    (path.parent / ("linked" if of_folder else "linked.bin")).symlink_to(target)
    refused(path, "a link out of the model's folder")


@pytest.mark.parametrize(
    ("entries", "mention"),
    [
        ({"offset": 6}, "from byte 6"),
        ({"offset": -1}, "from byte -1"),
        ({"length": 10**12}, "1000000000000 bytes"),
        ({"length": 4}, "declares 72"),
        ({"offset": "many"}, "cannot be read"),
        ({"offset": 10**30}, "from byte"),
        ({"location": "missing.bin"}, "cannot be read"),
        ({"location": "nul\0.bin"}, "cannot be read"),
        ({"location": "x" * 5000}, "cannot be read"),
        ({"location": "."}, "no file"),
    ],
)
def test_data_that_is_not_there_is_refused(entries: dict[str, Any], mention: str, tmp_path: Path) -> None:
    location = entries.pop("location", "data.bin")
    refused(external(tmp_path / "m.onnx", location, **entries), "'array0'", mention)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "pipe")
    os.mkfifo(tmp_path / "pipe")
    refused(path, "no file")


def test_data_as_large_as_declared_is_not_read_where_no_network_holds_it(tmp_path: Path) -> None:
    """A file with holes is as large as it says, and takes no space."""
    model = small().model()
    tensor = model.graph.initializer[0]
    external_data_helper.set_external_data(tensor, "hole.bin")
    tensor.ClearField("raw_data")
    tensor.dims[:] = [1 << 36]
    with (tmp_path / "hole.bin").open("wb") as stream:
        stream.truncate(1 << 38)
    refused(save(tmp_path / "m.onnx", model), "more than a network can hold")

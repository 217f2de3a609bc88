"""Rate conversion: firing rates are the ANN's activations, whatever its layers, and its decisions stay."""

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any, get_args

import nir
import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import Builder, random_model, trained_on_digits

from spikeport.converters.ann import (
    INPUT,
    Affine,
    Ann,
    Convolution,
    Layer,
    Matrix,
    MaxPool,
    Relu,
    Sum,
    fold_affine,
    forward,
)
from spikeport.converters.graph import ProcessGraph
from spikeport.converters.lower import lower
from spikeport.converters.max_pooling import without_max_pool
from spikeport.converters.onnx_reader import read_onnx
from spikeport.converters.operators import Pair, SumPool
from spikeport.converters.quantize import quantize
from spikeport.converters.rate_conversion import Conversion, NeuronKind, balance_thresholds, convert, convert_onnx
from spikeport.converters.reference import Reference
from spikeport.deploy import event_simulator, torch_backend
from spikeport.deploy.trace import decisions
from spikeport.models.datasets import load_dataset
from spikeport.models.encoders import Encoder
from spikeport.models.errors import GraphError

KINDS: tuple[NeuronKind, ...] = get_args(NeuronKind)


def encoded(images: np.ndarray, steps: int, bits: int = 8) -> dict[str, np.ndarray]:
    spikes = Encoder("graded" if bits > 1 else "rate", steps, bits)(torch.as_tensor(images))
    return {"input": spikes.transpose(0, 1).to(torch.uint8).contiguous().numpy()}


def spiking(ann: Ann, images: np.ndarray, steps: int, **fixed: Any) -> ProcessGraph:
    return lower(convert(ann, images, Conversion(steps, **({"message_bits": 8} | fixed))), "converted")


def levels(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Images that 8 bits hold exactly."""
    return rng.integers(0, 256, shape) / 255


# ---- one neuron -----------------------------------------------------------------------------------------------------


def relu_of_the_input(size: int) -> Ann:
    return Ann("relus", (size,), (Relu("relu", (INPUT,), (size,)),), "relu")


@pytest.mark.parametrize("steps", [1, 5, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_neuron_fires_as_often_as_its_equation_says(kind: NeuronKind, steps: int) -> None:
    """256 neurons with constant currents y from 0 to the threshold, 1."""
    y = np.arange(256) / 255
    graph = spiking(relu_of_the_input(256), y[None], steps, neuron=kind, percentile=100, per_channel=False)
    fired = Reference(graph).run(encoded(y[None], steps)).spikes["relu"][0].sum(dim=0).numpy()
    if kind == "zero":  # needs the least n with n y > 1 for a spike, again and again
        expected = np.array([0 if value == 0 else steps // (math.floor(1 / value + 1e-9) + 1) for value in y])
        np.testing.assert_array_equal(fired, expected)
    else:
        lost = 1e-9 if kind == "subtract" else steps / 4096  # u loses 1/4096 of at most one threshold in a step
        assert (np.abs(fired - steps * y) <= 0.5 + lost).all()


def test_a_last_relu_is_read_by_what_its_spikes_stand_for() -> None:
    """Its neurons have thresholds of their own, so that their counts do not compare; the membrane that sums up does."""
    y = np.array([[0.2, 0.6, 0.4], [0.1, 0.1, 0.8]])
    graph = spiking(relu_of_the_input(3), y, 50, percentile=100)
    run = Reference(graph).run(encoded(y, 50))
    assert run.membrane is not None
    np.testing.assert_allclose(run.membrane / 50, y, atol=0.02)


# ---- whole networks -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["synapse", "subtract"]), per_channel=st.booleans())
@settings(max_examples=15)
def test_membranes_approach_the_output_of_any_ann(seed: int, kind: NeuronKind, per_channel: bool) -> None:
    """With residual sums, normalisation, both poolings, constants, padding, strides and groups."""
    made = random_model(seed)
    ann = ann_of(made)
    images = levels(np.random.default_rng(seed), 4, *ann.input_shape)
    steps = 100
    found = convert_or_why_not(
        ann, images, Conversion(steps, kind, message_bits=8, percentile=100, per_channel=per_channel)
    )
    if isinstance(found, str):
        assert "maximum of values that may be negative" in found or "never active" in found
        return
    graph = lower(found, "converted")
    run = Reference(graph).run(encoded(images, steps))
    expected = forward(ann, torch.from_numpy(images))[ann.output].numpy()
    assert run.membrane is not None
    rates = run.membrane.numpy() / steps
    # a neuron is off by about a spike in all; layers and their sums pass that on
    largest = max(float(value.abs().max()) for value in forward(ann, torch.from_numpy(images), names(ann)).values())
    assert np.abs(rates - expected).max() <= 0.03 * max(largest, 1e-3)


def convert_or_why_not(ann: Ann, images: np.ndarray, made: Conversion) -> nir.NIRGraph | str:
    try:
        return convert(ann, images, made)
    except GraphError as error:
        return str(error)


def names(ann: Ann) -> list[str]:
    return [layer.name for layer in ann.layers]


def ann_of(made: Builder) -> Ann:
    with tempfile.TemporaryDirectory() as folder:
        return read_onnx(made.save(Path(folder) / "m.onnx"))


def test_weights_stay_shared_and_a_branch_waits_for_the_other() -> None:
    rng = np.random.default_rng(0)
    made = Builder((2, 8, 8))
    made.add("Conv", made.array(rng.normal(0, 0.3, (4, 2, 3, 3))), shape=(4, 8, 8), pads=[1, 1, 1, 1])
    short = made.add("Relu")
    made.add("Conv", made.array(rng.normal(0, 0.3, (4, 4, 3, 3))), pads=[1, 1, 1, 1])
    made.add("Relu")
    made.add("Conv", made.array(rng.normal(0, 0.3, (4, 4, 3, 3))), pads=[1, 1, 1, 1])
    made.add("Add", short)
    made.add("Relu")
    made.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2], shape=(4, 4, 4))
    made.add("Conv", made.array(rng.normal(0, 0.3, (3, 4, 3, 3))), pads=[1, 1, 1, 1], shape=(3, 4, 4))
    made.add("GlobalAveragePool", shape=(3, 1, 1))
    made.add("Flatten", shape=(3,))
    graph = spiking(ann_of(made), levels(rng, 4, 2, 8, 8), 16)
    between = {(p.source, p.target): (p.operator.kind, p.delay) for p in graph.projections if p.source != p.target}
    assert between == {
        ("input", "relu1"): ("conv", 0),
        ("relu1", "relu3"): ("conv", 0),
        ("relu3", "relu6"): ("conv", 0),
        ("relu1", "relu6"): ("one_to_one", 1),
        ("relu6", "readout"): ("conv", 0),
    }


def test_images_are_normalised_on_the_chip() -> None:
    """(x - mean) / std before a padded convolution: what is padded is the normalised zero, so the bias is a map."""
    rng = np.random.default_rng(2)
    made = Builder((2, 5, 5))
    made.add("Conv", made.array(rng.normal(0, 0.5, (3, 2, 3, 3))), pads=[1, 1, 1, 1], shape=(3, 5, 5))
    made.add("Flatten", shape=(75,))
    ann, images = ann_of(made), levels(rng, 3, 2, 5, 5)
    mean, std = (0.4, 0.1), (0.3, 2.0)
    graph = spiking(ann, images, 4, mean=mean, std=std)
    column = (2, 1, 1)
    expected = forward(ann, torch.from_numpy((images - np.reshape(mean, column)) / np.reshape(std, column)))[ann.output]
    found = Reference(graph).run(encoded(images, 4)).membrane
    assert found is not None
    np.testing.assert_allclose(found / 4, expected, atol=1e-6)


# ---- balancing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [100, 99, 50])
@pytest.mark.parametrize("per_channel", [False, True])
def test_thresholds_are_percentiles_of_the_activations(percentile: float, per_channel: bool) -> None:
    rng = np.random.default_rng(1)
    ann = Ann("relus", (3, 4, 5), (Relu("relu", (INPUT,), (3, 4, 5)),), "relu")
    images = rng.uniform(0, 1, (600, 3, 4, 5))  # several batches
    made = Conversion(8, percentile=percentile, per_channel=per_channel)
    (found,) = balance_thresholds(ann, images, made).values()
    axes = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    np.testing.assert_allclose(found, np.percentile(images, percentile, axis=axes, method="lower"), rtol=0.01)
    if percentile == 100:
        np.testing.assert_array_equal(found, images.max(axis=axes))


def test_channels_that_are_rarely_or_never_active_have_a_threshold() -> None:
    images = np.zeros((500, 3))
    images[:, 0] = np.linspace(0, 1, 500)
    images[7, 1] = 0.25
    found = balance_thresholds(relu_of_the_input(3), images, Conversion(8, percentile=99))["relu"]
    np.testing.assert_allclose(found, [0.99, 0.25, 0.99], rtol=0.01)


# ---- max pooling ----------------------------------------------------------------------------------------------------

WINDOWS: list[tuple[Pair, Pair, Pair]] = [
    ((2, 2), (2, 2), (0, 0)),
    ((3, 3), (2, 2), (1, 1)),
    ((3, 2), (1, 2), (1, 0)),
    ((1, 3), (1, 1), (0, 1)),
    ((1, 1), (2, 2), (0, 0)),
]


@pytest.mark.parametrize(("kernel", "stride", "padding"), WINDOWS)
def test_max_pooling_is_written_as_relus_exactly(kernel: Pair, stride: Pair, padding: Pair) -> None:
    out = SumPool(kernel, stride).out_shape((3, 7 + 2 * padding[0], 8 + 2 * padding[1]))
    pool = MaxPool("pool", ("relu",), out, kernel, stride, padding)
    ann = Ann("pooled", (3, 7, 8), (Relu("relu", (INPUT,), (3, 7, 8)), pool), "pool")
    rewritten = without_max_pool(ann)
    x = torch.from_numpy(np.random.default_rng(3).normal(0, 1, (4, 3, 7, 8)))
    torch.testing.assert_close(forward(rewritten, x)["pool"], forward(ann, x)["pool"], rtol=0, atol=1e-12)
    relus = sum(isinstance(layer, Relu) for layer in rewritten.layers) - 1
    assert relus == math.prod(kernel) - 1
    assert not any(isinstance(layer, MaxPool) for layer in rewritten.layers)


def test_a_relu_after_max_pooling_changes_place_with_it() -> None:
    layers = (
        Affine("minus", (INPUT,), (1, 4, 4), -np.ones(1), np.full(1, 0.3)),
        MaxPool("pool", ("minus",), (1, 2, 2), (2, 2), (2, 2)),
        Relu("relu", ("pool",), (1, 2, 2)),
        Affine("last", ("relu",), (1, 2, 2), np.ones(1), np.ones(1)),
    )
    ann = Ann("swapped", (1, 4, 4), layers, "last")
    x = torch.from_numpy(np.random.default_rng(4).uniform(0, 1, (5, 1, 4, 4)))
    torch.testing.assert_close(forward(without_max_pool(ann), x)["last"], forward(ann, x)["last"])


def test_the_maximum_of_values_that_may_be_negative_is_refused_with_the_remedy() -> None:
    layers: tuple[Layer, ...] = (
        Affine("minus", (INPUT,), (1, 4, 4), -np.ones(1), np.ones(1)),
        MaxPool("pool", ("minus",), (1, 2, 2), (2, 2), (2, 2)),
    )
    with pytest.raises(GraphError, match=r"'pool' takes the maximum of values that may be negative.*average pooling"):
        without_max_pool(Ann("negative", (1, 4, 4), layers, "pool"))


# ---- folding --------------------------------------------------------------------------------------------------------


def test_normalisation_is_folded_into_what_comes_before_unless_that_is_read_elsewhere() -> None:
    rng = np.random.default_rng(5)
    shape = (2, 5, 5)
    conv = Convolution("conv", (INPUT,), shape, rng.normal(size=(2, 2, 3, 3)), rng.normal(size=2), padding=(1, 1))
    norms = [
        Affine(f"norm{i}", (source,), shape, rng.normal(size=2), rng.normal(size=2))
        for i, source in enumerate(("conv", "norm0"))
    ]
    x = torch.from_numpy(rng.normal(size=(3, *shape)))
    alone = Ann("alone", shape, (conv, *norms, Relu("relu", ("norm1",), shape)), "relu")
    shared = Ann("shared", shape, (conv, *norms, Sum("sum", ("norm1", "conv"), shape)), "sum")
    for ann, left in ((alone, ["conv", "relu"]), (shared, ["conv", "norm0", "norm1", "sum"])):
        folded = fold_affine(ann)
        assert names(folded) == left
        torch.testing.assert_close(forward(folded, x)[folded.output], forward(ann, x)[ann.output])


def test_normalisation_in_front_of_a_matrix_is_folded_into_it() -> None:
    rng = np.random.default_rng(6)
    norm = Affine("norm", ("relu",), (4,), rng.normal(size=4), rng.normal(size=4))
    matrices = [Matrix(f"matrix{i}", ("norm",), (3,), rng.normal(size=(3, 4)), rng.normal(size=3)) for i in range(2)]
    layers = (Relu("relu", (INPUT,), (4,)), norm, *matrices, Sum("sum", ("matrix0", "matrix1"), (3,)))
    ann = Ann("before", (4,), layers, "sum")
    x = torch.from_numpy(rng.normal(size=(5, 4)))
    folded = fold_affine(ann)
    assert names(folded) == ["relu", "matrix0", "matrix1", "sum"]
    torch.testing.assert_close(forward(folded, x)["sum"], forward(ann, x)["sum"])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_wrong_settings_and_data_are_refused() -> None:
    ann, images = relu_of_the_input(3), np.full((4, 3), 0.5)
    for made, data, mention in (
        (Conversion(0), images, "0 steps"),
        (Conversion(8, percentile=0), images, "percentile"),
        (Conversion(8, message_bits=0), images, "message_bits"),
        (Conversion(8, std=(0.0,)), images, "std"),
        (Conversion(8, mean=(0.1, 0.2)), images, "3 channels"),
        (Conversion(8), images[:, :2], r"\(3,\).*\(2,\)"),
        (Conversion(8), images[:0], "no calibration"),
        (Conversion(8), 0 * images, "'relu' is never active"),
        (Conversion(8), np.full((4, 3), np.inf), "NaN or infinite"),
    ):
        with pytest.raises(GraphError, match=mention):
            convert(ann, data, made)


# ---- a trained network ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on_digits(tmp_path_factory.mktemp("onnx") / "digits.onnx")


@pytest.mark.parametrize(
    ("kind", "steps", "bits", "points"),
    [("synapse", 12, 4, 2.0), ("synapse", 32, 1, 2.0), ("subtract", 12, 8, 2.0), ("zero", 24, 8, 10.0)],
)
def test_decisions_stay_through_conversion_and_quantisation(
    kind: NeuronKind, steps: int, bits: int, points: float, digits_onnx: Path
) -> None:
    data = load_dataset("digits", 200, 0)
    ann = read_onnx(digits_onnx)
    images, labels = data.test.images[:200], data.test.labels[:200]
    wanted = forward(ann, torch.from_numpy(images).double())[ann.output].argmax(dim=1).numpy()
    assert (wanted == labels).mean() > 0.93
    made = Conversion(steps, neuron=kind, message_bits=bits)
    graph = lower(convert_onnx(digits_onnx, data.train.images[:200], made), "digits")
    integer, _ = quantize(graph, encoded(data.train.images[:4], steps, bits))
    inputs = encoded(images, steps, bits)
    for network in (graph, integer):
        trace = torch_backend.run(network, inputs)
        right = 100 * (decisions(network.readout, trace) == labels).mean()
        assert right >= 100 * (wanted == labels).mean() - points
    events = event_simulator.run(integer, {"input": inputs["input"][:20]})
    for name in events.sizes:
        np.testing.assert_array_equal(events.spikes(name), trace.head(20).spikes(name))


def test_the_matrix_and_its_bias_are_kept_without_neurons() -> None:
    """A network without a ReLU is linear, and exact from the first step on."""
    rng = np.random.default_rng(6)
    weight, bias = rng.normal(size=(3, 4)), rng.normal(size=3)
    ann = Ann("linear", (4,), (Matrix("matrix", (INPUT,), (3,), weight, bias),), "matrix")
    images = levels(rng, 5, 4)
    for steps, kind in itertools.product((1, 3), KINDS):
        run = Reference(spiking(ann, images, steps, neuron=kind)).run(encoded(images, steps))
        assert run.membrane is not None
        np.testing.assert_allclose(run.membrane / steps, images @ weight.T + bias, atol=1e-9)

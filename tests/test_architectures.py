"""Architecture strings and names: what they build, and which part of a wrong one is named."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from network_examples import network, nodes

from spikeport.models.architectures import NAMES, Add, Convolution, Dense, Dropout, Neurons, Pool
from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.errors import RecipeError
from spikeport.models.pooling import Pooling

IMAGE = (1, 28, 28)
COLOURS = (3, 32, 32)


def populations(architecture: str, in_shape: tuple[int, ...], classes: int, **settings: Any) -> dict[str, Neurons]:
    found = nodes(architecture, in_shape, classes, **settings).values()
    return {node.name: node for node in found if isinstance(node, Neurons)}


def shapes(architecture: str, in_shape: tuple[int, ...], classes: int, **settings: Any) -> dict[str, tuple[int, ...]]:
    return {name: node.shape for name, node in populations(architecture, in_shape, classes, **settings).items()}


def test_the_network_of_the_mnist_tables() -> None:
    found = nodes("15C5-P2-40C5-P2-300-10", IMAGE, 10)
    assert {name: (node.inputs, node.shape) for name, node in found.items()} == {
        "input": ((), IMAGE),
        "conv1_weight": (("input",), (15, 24, 24)),
        "conv1": (("conv1_weight",), (15, 24, 24)),
        "pool1": (("conv1",), (15, 12, 12)),
        "conv2_weight": (("pool1",), (40, 8, 8)),
        "conv2": (("conv2_weight",), (40, 8, 8)),
        "pool2": (("conv2",), (40, 4, 4)),
        "dense1_flatten": (("pool2",), (640,)),
        "dense1_weight": (("dense1_flatten",), (300,)),
        "dense1": (("dense1_weight",), (300,)),
        "dense2_weight": (("dense1",), (10,)),
        "dense2": (("dense2_weight",), (10,)),
    }


TDBN = {"norm": "tdbn"}


@pytest.mark.parametrize(
    ("text", "in_shape", "classes", "settings", "parameters"),
    [
        ("15C5-P2-40C5-P2-300-10", IMAGE, 10, {}, 210_375),
        ("12C5p1-P2-64C5-P2-10", (2, 34, 34), 10, {}, 42_840),
        ("400-400-10", IMAGE, 10, {}, 477_600),
        ("32C5p2-P2-64C5p2-P2-1024-10", IMAGE, 10, {}, 3_273_504),
        ("cnn1", COLOURS, 10, {}, 21_156_384),
        ("cnn2", COLOURS, 10, {}, 44_999_040),
        ("lenet", IMAGE, 10, {}, 517_500),
        ("vgg9", COLOURS, 10, {}, 5_938_880),
        ("resnet11", COLOURS, 10, {}, 17_936_064),
        ("ds-resnet20", COLOURS, 10, TDBN, 4_327_754),
        ("ds-resnet20:16-32-64", (2, 32, 32), 11, TDBN, 272_395),
        ("ds-resnet14:32-64-128", (2, 42, 42), 10, TDBN, 696_330),
        ("4C3s2-10", (3, 9, 7), 10, {}, 4 * 3 * 9 + 4 * 4 * 3 * 10),
        ("4C3s2-10", (3, 9, 7), 10, {"bias": True}, 4 * 3 * 9 + 4 + 4 * 4 * 3 * 10 + 10),
        ("4C3s2-10", (3, 9, 7), 10, {"bias": True, "norm": "tdbn"}, 4 * 3 * 9 + 8 + 4 * 4 * 3 * 10 + 10),
        ("10", (2, 3, 3), 10, {}, 180),
    ],
)
def test_parameter_counts(
    text: str, in_shape: tuple[int, ...], classes: int, settings: dict[str, Any], parameters: int
) -> None:
    built = network(text, in_shape, classes, **settings)
    assert sum(weight.numel() for weight in built.parameters()) == parameters


@pytest.mark.parametrize(
    ("blocks", "millions"), [(14, 2.78), (32, 7.43), (44, 10.5), (68, 16.7)], ids=lambda value: str(value)
)
def test_ds_resnets_of_other_depths(blocks: int, millions: float) -> None:
    sizes = 0
    for node in nodes(f"ds-resnet{blocks}", COLOURS, 10, norm="tdbn").values():
        match node:
            case Convolution():
                sizes += node.shape[0] * (node.in_shape[0] * node.kernel**2 + 2)  # two numbers a channel normalise it
            case Dense():
                sizes += node.shape[0] * (node.in_shape[0] + 1)
    assert sizes / 1e6 == pytest.approx(millions, rel=4e-3)


@pytest.mark.parametrize("name", NAMES)
def test_named_networks_run_forwards_and_backwards(name: str) -> None:
    shape = IMAGE if name == "lenet" else COLOURS
    # without normalisation, initial weights alone leave deep layers silent: a low threshold lets spikes through
    norm = "tdbn" if name.startswith("ds") else "none"
    torch.manual_seed(1)
    built = network(name, shape, 10, norm=norm, tau_syn=1.0, threshold=0.1, steps=2, pool="average")
    found = built((torch.rand(2, 1, *shape) < 0.5).float())
    assert list(found) == list(built.populations)
    assert all(found[key].shape == (2, 1, *node.shape) for key, node in built.populations.items())
    assert all(bool(spikes.any()) for key, spikes in found.items() if key != built.output)
    found[built.output].sum().backward()
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in built.parameters())
    assert bool(next(built.parameters()).grad.any())  # type: ignore[union-attr]


def test_named_networks_start_as_their_authors_start_them() -> None:
    for name, gain in (("lenet", 2.0), ("resnet9", 1.0)):
        built = network(name, (1, 16, 16), 10)
        for weight in built.parameters():
            if weight.numel() > 3000:
                assert float(weight.detach().std()) == pytest.approx(math.sqrt(gain / weight[0].numel()), rel=0.06)


def test_the_weight_scale_multiplies_convolutions() -> None:
    torch.manual_seed(0)
    plain = network("8C5-3", (2, 6, 6))
    torch.manual_seed(0)
    scaled = network("8C5-3", (2, 6, 6), weight_scale=5.0)
    torch.testing.assert_close(scaled.maps["conv1_weight"].weight, 5 * plain.maps["conv1_weight"].weight)
    torch.testing.assert_close(scaled.maps["dense1_weight"].weight, plain.maps["dense1_weight"].weight)


@pytest.mark.parametrize(
    ("text", "in_shape", "expected"),
    [
        ("4C3", (1, 8, 8), [(4, 6, 6)]),
        ("4C3p1", (1, 8, 8), [(4, 8, 8)]),
        ("4C3s2", (1, 8, 8), [(4, 3, 3)]),
        ("4C3p1s2", (1, 8, 8), [(4, 4, 4)]),
        ("4C5p2s3", (2, 9, 11), [(4, 3, 4)]),  # height and width apart
        ("4C8", (1, 8, 8), [(4, 1, 1)]),
        ("P2-4C3", (1, 9, 9), [(4, 2, 2)]),  # pooling drops the odd row
        ("4C1-P3-5C1", (1, 8, 8), [(4, 8, 8), (5, 2, 2)]),
        ("4C1-P2-P2-5C1", (1, 8, 8), [(4, 8, 8), (5, 2, 2)]),
        ("P8-4C1", (1, 8, 8), [(4, 1, 1)]),
        ("A-4C1", (2, 8, 7), [(4, 1, 1)]),
        ("R4s2", (2, 9, 7), [(4, 5, 4), (4, 5, 4), (4, 5, 4)]),
    ],
)
def test_shapes(text: str, in_shape: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
    assert list(shapes(f"{text}-3", in_shape, 3).values()) == [*expected, (3,)]


@given(
    kernel=st.integers(1, 5),
    padding=st.integers(0, 3),
    stride=st.integers(1, 3),
    pool=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_a_shape_is_what_the_layer_makes_or_the_layer_is_refused(
    kernel: int, padding: int, stride: int, pool: int, height: int, width: int
) -> None:
    text = f"P{pool}-2C{kernel}p{padding}s{stride}-3"
    image = torch.zeros(1, 1, height, width)
    try:
        expected = F.conv2d(F.avg_pool2d(image, pool), torch.zeros(2, 1, kernel, kernel), None, stride, padding).shape
    except RuntimeError:
        with pytest.raises(RecipeError, match=r"does not fit|cannot pool"):
            nodes(text, (1, height, width), 3)
        return
    built = network(text, (1, height, width))
    assert built.populations["conv1"].shape == expected[1:]
    assert built(image[None])["conv1"].shape[2:] == expected[1:]


# ---- what settings change -------------------------------------------------------------------------------------------


def test_pooling_neurons_fire_on_the_average() -> None:
    found = nodes("4C3-P2-3", (1, 8, 8), 3, pool="neurons", pool_threshold=0.6, reset="subtract", levels=(2.0,))
    assert found["pool1"] == Neurons("pool1", ("pool1_average",), (4, 3, 3), CubaLIF(1.0, math.inf, 0.6, "subtract"))
    assert found["pool1_average"] == Pool("pool1_average", ("conv1",), (4, 3, 3), Pooling((2, 2), (2, 2), average=True))


@pytest.mark.parametrize(("pool", "average"), [("sum", False), ("average", True)])
def test_pooling_sums_or_averages(pool: str, average: bool) -> None:
    found = nodes("4C3-P2-A-3", (1, 8, 8), 3, pool=pool)
    assert found["pool1"] == Pool("pool1", ("conv1",), (4, 3, 3), Pooling((2, 2), (2, 2), average))
    assert found["pool2"] == Pool("pool2", ("pool1",), (4, 1, 1), Pooling((3, 3), (3, 3), average=True))


def test_every_hidden_population_drops_out_and_no_other() -> None:
    found = nodes("4C3-P2-R5-7-3", (1, 8, 8), 3, dropout=0.3, pool="neurons")
    dropped = {node.inputs[0] for node in found.values() if isinstance(node, Dropout)}
    assert dropped == {"conv1", "block1_1", "block1_2", "block1_skip", "dense1"}
    assert found["pool1_average"].inputs == ("conv1_dropout",)


def test_the_output_has_one_threshold_or_none() -> None:
    fires = populations("4C3-3", (1, 8, 8), 3, levels=(2.0, 3.0))
    assert fires["conv1"].neuron.levels == (2.0, 3.0)
    assert fires["dense1"].neuron == replace(fires["conv1"].neuron, levels=())
    assert not fires["dense1"].integrates
    reads = populations("4C3-3", (1, 8, 8), 3, output="membrane", levels=(2.0,))["dense1"]
    assert reads.integrates
    assert (reads.neuron.tau_syn, reads.neuron.tau_mem) == (3.0, 5.0)


def test_a_ds_resnet_reads_the_sum_of_its_output_currents() -> None:
    reads = populations("ds-resnet14:2-3-4", (1, 8, 8), 3, output="membrane")["dense1"]
    assert (reads.neuron.tau_syn, reads.neuron.tau_mem, reads.integrates) == (1.0, math.inf, True)


# ---- residual blocks ------------------------------------------------------------------------------------------------


def joins(block: str, text: str, in_shape: tuple[int, ...] = (2, 8, 8)) -> dict[str, tuple[str, ...]]:
    found = nodes(text, in_shape, 3, block=block)
    return {node.name: node.inputs for node in found.values() if isinstance(node, (Add, Neurons, Pool))}


def test_spike_addition_adds_after_the_last_neurons() -> None:
    found = joins("spike-add", "R2-R4s2-A-3")
    assert found["block1_add"] == ("block1_2", "input")
    assert found["block2_add"] == ("block2_2", "block2_skip")  # the way round has neurons where it has weights
    assert found["block2_skip"] == ("block2_skip_weight",)


def test_the_early_order_adds_before_the_last_neurons() -> None:
    found = joins("early", "R2-R4s2-R4s2-A-3")
    assert found["block1_add"] == ("block1_2_weight", "input")
    assert found["block1_2"] == ("block1_add",)
    assert found["block2_add"] == ("block2_2_weight", "block2_skip_weight")
    assert found["block3_add"] == ("block3_2_weight", "block3_skip")  # as many channels: every second row and column
    assert nodes("R2-R2s2-3", (2, 8, 8), 3, block="early")["block2_skip"] == Pool(
        "block2_skip",
        ("block1_2",),
        (2, 4, 4),
        Pooling((1, 1), (2, 2)),
    )


def test_membranes_are_added_without_neurons_on_the_way() -> None:
    found = joins("membrane", "2C3p1-R2-R4s2-A-3")
    assert "conv1" not in found  # the block's own neurons are the first to fire
    assert found["block1_1"] == ("conv1_weight",)
    assert found["block1_add"] == ("block1_2_weight", "conv1_weight")
    assert found["block2_1"] == ("block1_add",)
    assert found["block2_skip_pool"] == ("block1_add",)
    assert found["block2_add"] == ("block2_2_weight", "block2_skip_weight")
    assert found["block2_out"] == ("block2_add",)  # what follows takes spikes
    assert found["pool1"] == ("block2_out",)


def test_the_second_gain_of_a_membrane_block_starts_at_zero() -> None:
    built = network("2C3p1-R2-A-3", (2, 8, 8), norm="tdbn", block="membrane")
    gains = {name: float(module.weight.detach().mean()) for name, module in built.maps.items() if name.endswith("norm")}
    assert gains == {"conv1_norm": 1.0, "block1_1_norm": 1.0, "block1_2_norm": 0.0}


def test_the_stride_of_a_block_is_the_first_convolution_s_but_in_lee_s_networks() -> None:
    def strides(text: str) -> list[int]:
        found = nodes(text, COLOURS, 10).values()
        return [node.stride for node in found if isinstance(node, Convolution) and node.kernel == 3]

    assert strides("R8s2-A-10") == [2, 1]
    assert strides("resnet11") == [1, 1, 1, 1, 2, 1, 1, 1, 2]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("15X5-10", "15X5"),
        ("15c5-10", "15c5"),
        ("15C5--10", "''"),
        ("15C5-10-", "''"),
        ("", "''"),
        ("15C5 -10", "'15C5 '"),
        ("15C5s2p2-10", "15C5s2p2"),
        ("-15C5-10", "''"),
        ("15C5-0-10", "'0'"),
        ("15C-10", "15C"),
        ("P-10", "'P'"),
        ("1e3-10", "1e3"),
        ("R-10", "'R'"),
        ("a-10", "'a'"),
        ("lenet-10", "'lenet'"),
        ("vgg8", "'vgg8'"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(text: str, part: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot read") as raised:
        nodes(text, IMAGE, 10)
    assert part in str(raised.value)
    assert "15C5p2" in str(raised.value)  # how to write it
    assert "resnet11" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "part", "shape"),
    [
        ("15C29-10", "15C29", "(1, 28, 28)"),
        ("15C5-P2-40C13-10", "40C13", "(15, 12, 12)"),
        ("0C5-10", "0C5", "(1, 28, 28)"),
        ("15C0-10", "15C0", "(1, 28, 28)"),
        ("P0-15C5-10", "P0", "(1, 28, 28)"),
        ("P29-10", "P29", "(1, 28, 28)"),
        ("15C5-P5-P5-10", "P5", "(15, 4, 4)"),
        ("300-P2-10", "P2", "(300,)"),
        ("300-A-10", "A", "(300,)"),
        ("300-15C5-10", "15C5", "dense"),
        ("300-R5-10", "R5", "dense"),
        ("R0-10", "R0", "(1, 28, 28)"),
        ("R4s0-10", "R4s0", "(1, 28, 28)"),
    ],
)
def test_a_part_that_does_not_fit_its_input_is_named(text: str, part: str, shape: str) -> None:
    with pytest.raises(RecipeError) as raised:
        nodes(text, IMAGE, 10)
    assert f": {part} " in str(raised.value)
    assert shape in str(raised.value)


def test_pooled_shortcuts_need_sides_that_divide() -> None:
    with pytest.raises(RecipeError, match=r"R4s2 does not fit an input of shape \(2, 7, 8\)"):
        nodes("R4s2-10", (2, 7, 8), 10, block="membrane")
    assert nodes("R4s2-10", (2, 7, 8), 10, block="early")


def test_a_stride_of_zero_is_refused() -> None:
    with pytest.raises(RecipeError, match="15C5s0"):
        nodes("15C5s0-10", IMAGE, 10)


@pytest.mark.parametrize("text", ["300", "300-11", "300-9", "15C5", "10-P1", "10C28", "300-10-P2", "R10-A", "10C3-A"])
def test_a_network_that_does_not_end_in_its_classes_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"dense layer of 10 neurons|cannot pool"):
        nodes(text, IMAGE, 10)


def test_pooling_without_a_layer_behind_it_is_refused() -> None:
    with pytest.raises(RecipeError, match="dense layer of 10 neurons"):
        nodes("15C5-P2", IMAGE, 10)


@pytest.mark.parametrize("text", ["ds-resnet18", "ds-resnet2", "ds-resnet0"])
def test_a_ds_resnet_of_no_whole_blocks_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"6 n \+ 2 layers"):
        nodes(text, COLOURS, 10)

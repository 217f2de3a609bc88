"""Architecture strings: what they build, and which part of a wrong one is named."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from spikeport.models.cuba_lif import CubaLIF, simulate
from spikeport.models.errors import RecipeError
from spikeport.models.networks import LayerSpec, SpikingNetwork, parse_architecture
from spikeport.models.rules import CSBP

IMAGE = (1, 28, 28)


def network(text: str, in_shape: tuple[int, ...], classes: int, input_unit: float = 1.0) -> SpikingNetwork:
    specs = parse_architecture(text, in_shape, classes)
    return SpikingNetwork(specs, CubaLIF(3, 5, 0.2), CSBP(), input_unit)


def test_the_network_of_the_mnist_tables() -> None:
    specs = parse_architecture("15C5-P2-40C5-P2-300-10", IMAGE, 10)
    assert specs == [
        LayerSpec("conv1", "conv", IMAGE, (15, 24, 24), kernel=5),
        LayerSpec("conv2", "conv", (15, 24, 24), (40, 8, 8), kernel=5, pool=2),
        LayerSpec("dense1", "dense", (40, 8, 8), (300,), pool=2),
        LayerSpec("dense2", "dense", (300,), (10,)),
    ]
    assert [spec.pooled_shape for spec in specs] == [IMAGE, (15, 12, 12), (40, 4, 4), (300,)]


@pytest.mark.parametrize(
    ("text", "in_shape", "parameters"),
    [
        ("15C5-P2-40C5-P2-300-10", IMAGE, 15 * 25 + 40 * 15 * 25 + 640 * 300 + 300 * 10),  # 210,375
        ("32C5p2-P2-64C5p2-P2-1024-10", IMAGE, 32 * 25 + 64 * 32 * 25 + 64 * 49 * 1024 + 1024 * 10),
        ("400-400-10", IMAGE, 784 * 400 + 400 * 400 + 400 * 10),
        ("4C3s2-10", (3, 9, 7), 4 * 3 * 9 + 4 * 4 * 3 * 10),
        ("10", (2, 3, 3), 180),
    ],
)
def test_parameter_counts(text: str, in_shape: tuple[int, ...], parameters: int) -> None:
    assert sum(weight.numel() for weight in network(text, in_shape, 10).parameters()) == parameters


@pytest.mark.parametrize(
    ("text", "in_shape", "shapes"),
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
    ],
)
def test_shapes(text: str, in_shape: tuple[int, ...], shapes: list[tuple[int, ...]]) -> None:
    specs = parse_architecture(f"{text}-3", in_shape, 3)
    assert [spec.out_shape for spec in specs[:-1]] == shapes
    assert [spec.in_shape for spec in specs] == [in_shape, *shapes]


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
            parse_architecture(text, (1, height, width), 3)
        return
    built = network(text, (1, height, width), 3)
    assert built.specs[0].out_shape == expected[1:]
    assert built(image[None])["conv1"].shape[2:] == expected[1:]


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
    ],
)
def test_a_part_that_cannot_be_read_is_named(text: str, part: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot read") as raised:
        parse_architecture(text, IMAGE, 10)
    assert part in str(raised.value)
    assert "15C5p2" in str(raised.value)  # how to write it


@pytest.mark.parametrize(
    ("text", "part", "shape"),
    [
        ("15C29-10", "15C29", "(1, 28, 28)"),
        ("15C5-P2-40C13-10", "40C13", "(15, 12, 12)"),
        ("0C5-10", "0C5", "(1, 28, 28)"),
        ("15C0-10", "15C0", "(1, 28, 28)"),
        ("P0-15C5-10", "P0", "(1, 28, 28)"),
        ("P29-10", "P29", "(1, 28, 28)"),
        ("15C5-P5-P5-10", "P5", "(15, 24, 24)"),
        ("300-P2-10", "P2", "(300,)"),
        ("300-15C5-10", "15C5", "dense"),
    ],
)
def test_a_part_that_does_not_fit_its_input_is_named(text: str, part: str, shape: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_architecture(text, IMAGE, 10)
    assert f": {part} " in str(raised.value)
    assert shape in str(raised.value)


def test_a_stride_of_zero_is_refused() -> None:
    with pytest.raises(RecipeError, match="15C5s0"):
        parse_architecture("15C5s0-10", IMAGE, 10)


@pytest.mark.parametrize("text", ["300", "300-11", "300-9", "15C5", "10-P1", "10C28", "300-10-P2"])
def test_a_network_that_does_not_end_in_its_classes_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"dense layer of 10 neurons|cannot pool"):
        parse_architecture(text, IMAGE, 10)


def test_pooling_without_a_layer_behind_it_is_refused() -> None:
    with pytest.raises(RecipeError, match="dense layer of 10 neurons"):
        parse_architecture("15C5-P2", IMAGE, 10)


def test_a_window_is_each_map_and_each_population_in_turn() -> None:
    """Against the plain functions: sum pooling of the spikes, the map of every step, the neuron over time."""
    built = network("3C3p1-P2-4C2s2-6-2", (2, 6, 6), 2, input_unit=0.25)
    x = torch.randint(0, 5, (7, 5, 2, 6, 6), generator=torch.Generator().manual_seed(0)).float()
    found = built(x)
    assert list(found) == ["conv1", "conv2", "dense1", "dense2"]
    assert built.output == "dense2"

    weights = {name: built.maps[name].weight for name in found}

    def population(drive: list[torch.Tensor]) -> torch.Tensor:
        return simulate(torch.stack(drive).detach(), built.neuron).spikes

    conv1 = population([F.conv2d(step / 4, weights["conv1"], padding=1) for step in x])
    pooled = [sum(step[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) for step in conv1]
    conv2 = population([F.conv2d(step, weights["conv2"], stride=2) for step in pooled])  # type: ignore[arg-type]
    dense1 = population([step.flatten(1) @ weights["dense1"].T for step in conv2])
    dense2 = population([step @ weights["dense2"].T for step in dense1])
    for name, expected in (("conv1", conv1), ("conv2", conv2), ("dense1", dense1), ("dense2", dense2)):
        assert found[name].shape == (7, 5, *built.specs[list(found).index(name)].out_shape)
        assert 0 < expected.sum() < expected.numel()
        assert (found[name] != expected).sum() <= 1  # sums in another order may graze the threshold once

"""NIR files: what is written is read back to the same spikes, and no file, however wrong, gets past a clear error."""

import functools
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from network_examples import network as built
from network_examples import settled

from spikeport.converters import nir_reader
from spikeport.converters.lower import lower
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_writer import level_names, to_nir, write_nir
from spikeport.converters.reference import Reference
from spikeport.models.errors import SpikeportError
from spikeport.models.networks import SpikingNetwork

STEPS = 6
DT = 1e-3


def network(
    architecture: str = "3C3p1-P2-4C2s2-6-3", reset: str = "zero", input_unit: float = 1.0, **settings: Any
) -> SpikingNetwork:
    """An untrained network of 64-bit weights, large enough to fire."""
    torch.manual_seed(3)
    constants = {"tau_syn": 2.5, "tau_mem": 4.0, "threshold": 0.4} | settings
    made = built(architecture, (2, 9, 8), 3, input_unit=input_unit, reset=reset, **constants).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(2).add_(0.08 if weight.ndim == 4 else 0.02)
    return made


def save(path: Path, graph: nir.NIRGraph | None = None) -> Path:
    write_nir(to_nir(network(), DT, STEPS) if graph is None else graph, path)
    return path


def small_graph(*, weight: np.ndarray | None = None, tau: np.ndarray | None = None) -> nir.NIRGraph:
    ones = np.ones(3)
    nodes = {
        "input": nir.Input(np.array([4])),
        "matrix": nir.Linear(np.ones((3, 4)) if weight is None else weight),
        "neurons": nir.LIF(tau=2 * ones if tau is None else tau, r=ones, v_leak=0 * ones, v_threshold=ones),
        "output": nir.Output(np.array([3])),
    }
    return nir.NIRGraph(nodes, [("input", "matrix"), ("matrix", "neurons"), ("neurons", "output")])


def refused(path: Path, *mentions: str) -> str:
    """The message with which a file is refused: one or two lines, with the file's name and the mentions in it."""
    with pytest.raises(SpikeportError) as caught:
        read_nir(path)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2, message
    assert len(message) < 600, message
    assert path.name in message, message
    for mention in mentions:
        assert mention in message, message
    return message


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize(
    ("architecture", "input_unit", "bits"),
    [("3C3p1-P2-4C2s2-6-3", 1.0, 1), ("5C2-P2-P2-3", 1.0, 1), ("7-3", 1.0, 1), ("3C3-3", 1 / 15, 4)],
)
def test_a_network_read_back_fires_as_it_was_trained(
    architecture: str, input_unit: float, bits: int, reset: str, tmp_path: Path
) -> None:
    made = network(architecture, reset, input_unit)
    path = tmp_path / "network.nir"
    write_nir(to_nir(made, DT, STEPS, bits), path)
    graph = lower(read_nir(path), "network")
    inputs = np.random.default_rng(0).integers(0, 1 << bits, (5, STEPS, 2, 9, 8))
    with torch.no_grad():
        expected = made(torch.as_tensor(inputs, dtype=torch.float64).transpose(0, 1))
    run = Reference(graph).run({"input": inputs})
    assert list(run.spikes) == list(expected)
    for name, spikes in expected.items():
        assert torch.equal(run.spikes[name].to(torch.float64), spikes.transpose(0, 1)), name
    assert all(0.02 < float(spikes.mean()) < 0.98 for spikes in expected.values())


def test_what_nir_has_no_field_for_is_recorded(tmp_path: Path) -> None:
    graph = read_nir(save(tmp_path / "network.nir"))
    neurons = [node for node in graph.nodes.values() if isinstance(node, nir.CubaLIF)]
    assert len(neurons) == 4
    for node in neurons:
        assert node.metadata == {"dt": DT, "reset": "zero", "discretization": "euler"}
    assert graph.metadata == {"steps": STEPS, "readout": "psc", "readout_keep": pytest.approx(0.6), "message_bits": 1}


def test_time_constants_are_written_in_seconds(tmp_path: Path) -> None:
    node = read_nir(save(tmp_path / "network.nir")).nodes["dense1"]
    np.testing.assert_allclose(node.tau_syn, 2.5 * DT)
    np.testing.assert_allclose(node.tau_mem, 4.0 * DT)
    np.testing.assert_allclose(node.v_threshold, 0.4)


def test_lowering_takes_everything_from_the_file(tmp_path: Path) -> None:
    graph = lower(read_nir(save(tmp_path / "network.nir")), "network")
    assert (graph.steps, graph.dt, graph.inputs[0].message_bits) == (STEPS, DT, 1)
    assert (graph.readout.population, graph.readout.kind) == ("dense2", "psc")
    assert graph.readout.keep == pytest.approx(0.6)


def test_another_reader_finds_a_plain_nir_graph(tmp_path: Path) -> None:
    """The NIR package by itself reads the file, shapes checked, and finds the trained weights."""
    made = network()
    path = save(tmp_path / "network.nir", to_nir(made, DT, STEPS))
    plain = nir.read(path)
    np.testing.assert_array_equal(plain.nodes["conv2_weight"].weight, made.maps["conv2_weight"].weight.detach().numpy())
    assert plain.check_types()


def test_the_readout_is_the_recipe_s_or_what_the_output_can_give() -> None:
    def readout(made: SpikingNetwork, **given: Any) -> object:
        return to_nir(made, DT, STEPS, **given).metadata["readout"]

    assert readout(network()) == "psc"
    assert readout(network(), readout="count") == "count"
    assert readout(network(output="membrane")) == "membrane"


def test_normalisation_is_folded_into_the_convolution() -> None:
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(4, 3, 2, 9, 8)))
    made = settled(network("3C3p1-3", norm="tdbn"), x)
    node = to_nir(made, DT, STEPS).nodes["conv1_weight"]
    found = torch.nn.functional.conv2d(x[0], torch.as_tensor(node.weight), torch.as_tensor(node.bias), padding=1)
    expected = made.maps["conv1_norm"](made.maps["conv1_weight"](x[0]))
    torch.testing.assert_close(found, expected.detach())
    assert "conv1_norm" not in to_nir(made, DT, STEPS).nodes


def test_levels_are_populations_with_the_same_edges(tmp_path: Path) -> None:
    made = network("3C3p1-5-3", levels=(0.8, 1.2), dropout=0.5)
    assert level_names(made.populations["conv1"]) == ["conv1_level1", "conv1_level2", "conv1_level3"]
    assert level_names(made.populations["dense2"]) == ["dense2"]
    graph = read_nir(save(tmp_path / "network.nir", to_nir(made, DT, STEPS)))
    for level, threshold in enumerate((0.4, 0.8, 1.2), 1):
        name = f"conv1_level{level}"
        np.testing.assert_allclose(graph.nodes[name].v_threshold, threshold)
        assert [edge for edge in graph.edges if name in edge] == [("conv1_weight", name), (name, "dense1_flatten")]
    lowered = lower(graph, "network")
    for target in level_names(made.populations["dense1"]):
        weights = [projection.operator.weight for projection in lowered.incoming(target)]
        assert len(weights) == 3
        assert all(weight is weights[0] for weight in weights)  # shared, not copied


def test_what_does_not_leak_is_written_as_if_or_i() -> None:
    made = network("3C3p1-P2-5-3", pool="neurons", tau_syn=1.0, leak=False, output="membrane")
    nodes = to_nir(made, DT, STEPS).nodes
    assert [type(nodes[name]) for name in ("conv1", "pool1", "dense1", "dense2")] == [nir.IF, nir.IF, nir.IF, nir.I]
    filtered = to_nir(network("3C3p1-3", leak=False, output="membrane"), DT, STEPS).nodes
    assert [type(filtered[name]) for name in ("conv1", "dense1")] == [nir.CubaLIF, nir.CubaLI]
    neuron = lower(to_nir(network("3C3p1-3", leak=False), DT, STEPS), "network").populations[0].neuron
    assert (float(neuron.voltage_keep), float(neuron.threshold)) == (1.0, pytest.approx(0.4 * 2.5))


@pytest.mark.parametrize("dt", [1e-3, 1e-4, 1.0, 1 / 49, 0.03, 7e-5, 1 / 103])
def test_a_membrane_that_meets_its_threshold_exactly_does_not_fire(dt: float) -> None:
    """Pooling neurons add quarters to a threshold of three quarters; r dt must be 1 and not almost 1."""
    made = network("2C1-P2-3", pool="neurons", pool_threshold=0.75)
    pooling = next(p for p in lower(to_nir(made, dt, STEPS), "network").populations if p.name == "pool1")
    assert float(pooling.neuron.threshold) == 0.75


def test_writing_leaves_the_old_file_where_it_fails(tmp_path: Path) -> None:
    path = save(tmp_path / "network.nir")
    before = path.read_bytes()
    broken = small_graph()
    broken.nodes["matrix"].weight = object()
    with pytest.raises((TypeError, SpikeportError)):
        write_nir(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- files that are wrong -------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.nir", "does not exist")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    refused(tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused(fraction: float, tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.nir").read_bytes()
    path = tmp_path / "part.nir"
    path.write_bytes(whole[: int(fraction * len(whole))])
    refused(path)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"{'nodes': []}", b"PK\x03\x04" + bytes(100)])
def test_another_kind_of_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.nir"
    path.write_bytes(content)
    refused(path)


def test_hdf5_without_a_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.nir"
    with h5py.File(path, "w") as file:
        file["spikes"] = np.zeros(3)
    refused(path, "node")


def test_a_single_node_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "node.nir"
    nir.write(path, nir.Linear(np.ones((2, 2))))
    refused(path, "Linear")


def test_nan_weights_are_named(tmp_path: Path) -> None:
    weight = np.ones((3, 4))
    weight[1, 2] = np.nan
    refused(save(tmp_path / "nan.nir", small_graph(weight=weight)), "weight", "'matrix'", "NaN")


def test_an_infinite_time_constant_is_named(tmp_path: Path) -> None:
    tau = np.array([1.0, np.inf, 1.0])
    refused(save(tmp_path / "infinite.nir", small_graph(tau=tau)), "tau", "'neurons'", "infinity")


Edit = Callable[[h5py.Group], None]


def edited(path: Path, edit: Edit) -> Path:
    """A good file with something changed in it; `edit` is given the group of the graph."""
    save(path, small_graph())
    with h5py.File(path, "r+") as file:
        edit(file["node"])
    return path


def replace(group: h5py.Group, name: str, value: Any) -> None:
    if name in group:
        del group[name]
    group[name] = value


def edges(*pairs: tuple[str, str]) -> Edit:
    table = np.array(pairs, dtype=h5py.string_dtype())
    return lambda graph: replace(graph, "edges", table)


def set_at(place: str, value: Any) -> Edit:
    return lambda graph: replace(graph, place, value)


def drop(place: str) -> Edit:
    return lambda graph: graph.__delitem__(place)


FAULTS: dict[str, tuple[Edit, str]] = {
    "an unknown type": (set_at("nodes/neurons/type", "Izhikevich"), "Izhikevich"),
    "a type that is a number": (set_at("nodes/neurons/type", 7), ""),
    "a node without a type": (drop("nodes/neurons/type"), "type"),
    "a node without a parameter": (drop("nodes/neurons/tau"), "tau"),
    "a node with a surplus field": (set_at("nodes/neurons/colour", 3), "colour"),
    "no nodes": (drop("nodes"), "nodes"),
    "no edges": (drop("edges"), "edges"),
    "an edge to a node that is not there": (
        edges(("input", "matrix"), ("matrix", "ghost"), ("neurons", "output")),
        "ghost",
    ),
    "an edge of one end": (set_at("edges", np.array([["input"]], dtype=h5py.string_dtype())), ""),
    "edges that are numbers": (set_at("edges", np.ones((3, 2))), ""),
    "an edge given twice": (
        edges(("input", "matrix"), ("matrix", "neurons"), ("matrix", "neurons"), ("neurons", "output")),
        "matrix",
    ),
    "neurons that nothing feeds": (edges(("input", "matrix"), ("neurons", "output")), "neurons"),
    "a node that leads nowhere": (edges(("input", "matrix"), ("matrix", "neurons")), "output"),
    "a matrix that nothing feeds": (edges(("matrix", "neurons"), ("neurons", "output")), "matrix"),
    "shapes that do not fit": (set_at("nodes/matrix/weight", np.ones((3, 5))), "matrix"),
    "a weight that is text": (set_at("nodes/matrix/weight", "heavy"), ""),
    "a weight of one dimension": (set_at("nodes/matrix/weight", np.ones(3)), ""),
    "parameters of different shapes": (set_at("nodes/neurons/tau", np.ones(2)), ""),
    "complex weights": (set_at("nodes/matrix/weight", np.ones((3, 4)) * 1j), "matrix"),
    "a graph that is a dataset": (set_at("nodes", np.ones(3)), ""),
    "a shape that is no shape": (set_at("nodes/input/shape", "wide"), ""),
    "a negative shape": (set_at("nodes/input/shape", np.array([-4])), ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_consistent_graph_is_refused(fault: str, tmp_path: Path) -> None:
    edit, mention = FAULTS[fault]
    refused(edited(tmp_path / "edited.nir", edit), mention)


@pytest.mark.parametrize(
    "geometry",
    [{"stride": (0, 0)}, {"padding": (-9, -9)}, {"groups": 0}, {"dilation": (0, 0)}, {"stride": (-1, -1)}],
    ids=lambda value: next(iter(value)),
)
def test_a_convolution_of_impossible_geometry_is_refused(geometry: dict[str, Any], tmp_path: Path) -> None:
    """By the reader or by lowering, with an error of ours."""
    good = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    conv = nir.Conv2d(None, np.ones((2, 1, 3, 3)), bias=np.zeros(2), **good)
    ones = np.ones((2, 3, 3))
    nodes = {
        "input": nir.Input(np.array([1, 5, 5])),
        "conv": conv,
        "neurons": nir.LIF(tau=2 * ones, r=ones, v_leak=0 * ones, v_threshold=ones),
        "output": nir.Output(np.array([2, 3, 3])),
    }
    graph = nir.NIRGraph(nodes, [("input", "conv"), ("conv", "neurons"), ("neurons", "output")])
    path = save(tmp_path / "conv.nir", graph)
    lower(read_nir(path), "network", dt=1.0, reset="zero", steps=3)
    with h5py.File(path, "r+") as file:
        for key, value in geometry.items():
            replace(file["node/nodes/conv"], key, value)
    with pytest.raises(SpikeportError):
        lower(read_nir(path), "network", dt=1.0, reset="zero", steps=3)


# ---- files that are hostile -----------------------------------------------------------------------------------------


def huge(shape: tuple[int, ...], dtype: Any = np.float64) -> Edit:
    """An array that is declared and never written: a few hundred bytes in the file."""

    def edit(graph: h5py.Group) -> None:
        del graph["nodes/matrix/weight"]
        graph.create_dataset("nodes/matrix/weight", shape=shape, dtype=dtype, chunks=tuple(min(n, 64) for n in shape))

    return edit


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20), (1 << 31, 1, 1 << 31)])
def test_a_huge_array_is_refused_before_it_is_allocated(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = edited(tmp_path / "huge.nir", huge(shape))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    refused(path, "weight", "entries")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


# The limits themselves are lowered from here on, so that a reader without them does not fill this machine's memory.


def test_the_limit_holds_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "good.nir", small_graph())
    sizes: list[int] = []
    with h5py.File(path) as file:
        file.visititems(lambda _, item: sizes.append(item.nbytes) if isinstance(item, h5py.Dataset) else None)
    monkeypatch.setattr(nir_reader, "LARGEST_FILE", sum(sizes))
    read_nir(path)
    monkeypatch.setattr(nir_reader, "LARGEST_FILE", sum(sizes) - 1)
    refused(path, "entries")


def test_many_arrays_that_are_large_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nir_reader, "LARGEST_FILE", 8000)

    def edit(graph: h5py.Group) -> None:
        for index in range(4):
            graph.create_dataset(f"nodes/matrix/metadata/extra{index}", data=np.ones(300))

    refused(edited(tmp_path / "large.nir", edit), "entries")


def test_an_array_of_large_entries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten entries of ten kilobytes each are more than a thousand numbers."""
    monkeypatch.setattr(nir_reader, "LARGEST_FILE", 8000)

    def edit(graph: h5py.Group) -> None:
        graph.create_dataset("nodes/matrix/metadata/note", data=np.array([b"x" * 10_000] * 10))

    refused(edited(tmp_path / "wide.nir", edit))


def test_one_array_under_many_names_is_counted_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link costs the file a few bytes, and the reader another copy."""
    monkeypatch.setattr(nir_reader, "LARGEST_FILE", 8000)

    def edit(graph: h5py.Group) -> None:
        first = graph.create_dataset("nodes/matrix/metadata/first", data=np.ones(300))
        for index in range(3):
            graph[f"nodes/matrix/metadata/again{index}"] = first

    refused(edited(tmp_path / "links.nir", edit))


def test_a_group_that_holds_itself_is_refused(tmp_path: Path) -> None:
    def edit(graph: h5py.Group) -> None:
        graph["nodes/matrix/metadata"] = graph["nodes"]

    refused(edited(tmp_path / "loop.nir", edit))


def test_deep_groups_are_refused(tmp_path: Path) -> None:
    def edit(graph: h5py.Group) -> None:
        graph.create_group("/".join(["nodes/matrix/metadata", *["g"] * sys.getrecursionlimit()]))

    refused(edited(tmp_path / "deep.nir", edit))


@pytest.mark.parametrize("kind", ["external link", "soft link", "external storage", "virtual dataset"])
def test_a_file_may_not_read_other_files(kind: str, tmp_path: Path) -> None:
    """What a stranger's file names on this machine stays unread; a soft link to nowhere is an error like others."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.full((3, 4), 7.0).tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weight"] = np.full((3, 4), 7.0)

    def edit(graph: h5py.Group) -> None:
        del graph["nodes/matrix/weight"]
        if kind == "external link":
            graph["nodes/matrix/weight"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "weight")
        elif kind == "soft link":
            graph["nodes/matrix/weight"] = h5py.SoftLink("/node/nowhere")
        elif kind == "external storage":
            graph.create_dataset(
                "nodes/matrix/weight", (3, 4), np.float64, external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
            )
        else:
            layout = h5py.VirtualLayout((3, 4), np.float64)
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "weight", (3, 4))
            graph.create_virtual_dataset("nodes/matrix/weight", layout)

    refused(edited(tmp_path / "reaching.nir", edit))


@functools.cache
def good_bytes() -> bytes:
    """A file with a convolution, pooling, a flatten node, matrices and metadata."""
    with tempfile.TemporaryDirectory() as folder:
        return save(Path(folder) / "good.nir").read_bytes()


@functools.cache
def used_places() -> tuple[int, ...]:
    """Where the good file is not zero: most of an HDF5 file of this size is empty."""
    return tuple(index for index, value in enumerate(good_bytes()) if value)


def check_survives(content: bytes, folder: Path) -> None:
    """Reading and lowering end in a graph or in an error of ours of at most two lines."""
    path = folder / "damaged.nir"
    path.write_bytes(content)
    try:
        lower(read_nir(path), "damaged")
    except SpikeportError as error:
        message = str(error)
    else:
        return
    assert 1 <= len(message.splitlines()) <= 2


PLACES = st.floats(0, 1, exclude_max=True)


@given(places=st.lists(st.tuples(PLACES, st.integers(0, 7)), min_size=1, max_size=4))
@settings(max_examples=50)
def test_flipped_bits_raise_nothing_but_our_errors(
    places: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(good_bytes())
    for where, bit in places:
        content[used_places()[int(where * len(used_places()))]] ^= 1 << bit
    check_survives(bytes(content), tmp_path_factory.mktemp("flipped"))


@given(start=PLACES, length=st.integers(1, 64), fill=st.sampled_from([0x00, 0xFF, 0x41]))
@settings(max_examples=25)
def test_overwritten_stretches_raise_nothing_but_our_errors(
    start: float, length: int, fill: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(good_bytes())
    first = used_places()[int(start * len(used_places()))]
    content[first : first + length] = bytes([fill]) * len(content[first : first + length])
    check_survives(bytes(content), tmp_path_factory.mktemp("overwritten"))


def test_the_good_file_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.nir"
    path.write_bytes(good_bytes())
    assert lower(read_nir(path), "good").steps == STEPS

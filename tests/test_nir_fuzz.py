"""Files that no writer would write: whatever is in them, the reader, the float run and lowering raise nothing but ours.

Each example is a good random file with a few things changed in it, as data of the file or as bytes. A few seconds in
`make test`; `make fuzz` looks at more, and at new ones each time. What it has found stands below as tests of their own.
"""

import itertools
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
import pytest
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from nir_strategies import random_nir

from spikeport.converters import nir_reader
from spikeport.converters.lower import lower
from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.nir_graph import plain
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_writer import write_nir
from spikeport.models.errors import SpikeportError

EXAMPLES = int(os.environ.get("SPIKEPORT_FUZZ_EXAMPLES", "25"))

STRANGE: list[Any] = [
    np.nan,
    -np.inf,
    0,
    -1,
    1 << 40,
    2**63 - 1,
    1e300,
    "",
    "same",
    "NIRGraph",
    "LI",
    "x" * 5000,
    b"\xff\xfe",
    True,
    1j,
    np.zeros(0),
    np.zeros((0, 2)),
    np.zeros((1,) * 12),
    np.ones((3, 2)),
    np.array([-1, 2]),
    np.array([1 << 30, 1 << 30]),
    np.array([b"in", b"out"]),
    np.array([np.nan, 1.0]),
    h5py.Empty("f8"),
]


def places(file: h5py.File) -> list[str]:
    """Every group and array of the file."""
    found: list[str] = []
    file.visit(found.append)
    return sorted(found)


def change(file: h5py.File, draw: random.Random) -> None:
    """One thing put otherwise; what HDF5 itself refuses is left as it is."""
    names = places(file)
    place, other = draw.choice(names), draw.choice(names)
    kind = draw.randrange(9)
    if kind == 0:
        del file[place]
    elif kind in (1, 2):
        put(file, place, draw.choice(STRANGE))
    elif kind == 3:
        put(file, f"{place}/extra" if isinstance(file[place], h5py.Group) else place, draw.choice(STRANGE))
    elif kind == 4:
        file[f"{other}-again"] = file[place]
    elif kind == 5:
        del file[place]
        file[place] = draw.choice([h5py.SoftLink(f"/{other}"), h5py.ExternalLink("/etc/hostname", "/node")])
    elif kind == 6 and place != other and not place.startswith(other) and not other.startswith(place):
        del file[place]
        file[place] = file[other]
    elif kind == 7:
        shape = draw.choice([(1 << 40,), (1 << 20, 1 << 20), (0,), (1, 1, 1), (1 << 14, 1 << 14)])
        del file[place]
        file.create_dataset(place, shape=shape, dtype=draw.choice(["f8", "i8", "c16", "S9", "f2"]), chunks=True)
    elif kind == 8 and "node/edges" in file:
        rewire(file, draw)


def put(file: h5py.File, place: str, value: Any) -> None:
    if place in file:
        del file[place]
    file[place] = value


def rewire(file: h5py.File, draw: random.Random) -> None:
    nodes = [*file["node/nodes"], "ghost"] if "node/nodes" in file else ["ghost"]
    edges = [tuple(pair) for pair in file["node/edges"][()].tolist()] if file["node/edges"].shape else []
    edges += [(draw.choice(nodes), draw.choice(nodes)) for _ in range(draw.randrange(1, 4))]
    draw.shuffle(edges)
    text = [tuple(end.decode() if isinstance(end, bytes) else str(end) for end in pair) for pair in edges[:40]]
    put(file, "node/edges", np.array([pair for pair in text if len(pair) == 2], dtype=h5py.string_dtype()))


def ours_or_nothing(work: Callable[[], Any]) -> Any:
    """What a call gives; None where it raises an error of ours, of one or two lines."""
    try:
        return work()
    except SpikeportError as error:
        said = str(error)
    assert 1 <= len(said.splitlines()) <= 2, said
    assert len(said) < 1500, said
    return None


def survives(path: Path) -> None:
    """Read, run in floats, lower: results, or errors of ours."""
    graph = ours_or_nothing(lambda: read_nir(path))
    if graph is None:
        return
    sizes = [int(np.prod(node.output_type["output"])) for node in graph.nodes.values()]
    if sum(sizes) > 1 << 16:
        return  # a large network is no fault
    choice: dict[str, Any] = {"dt": None if "dt" in graph.metadata else 1e-3}
    network = ours_or_nothing(lambda: FloatNetwork(graph, "fuzz", **choice))
    if network is not None:
        inputs = {key: np.zeros((1, 2, *node.output_type["output"])) for key, node in network.graph.inputs.items()}
        ours_or_nothing(lambda: network.run(inputs, []))
    ours_or_nothing(lambda: lower(graph, "fuzz", steps=2, **choice))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=EXAMPLES)
def test_files_with_things_changed_in_them(seed: int, changes: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.nir"
        write_nir(random_nir(seed, 2), path)
        with h5py.File(path, "r+") as file:
            for _ in range(changes):
                try:
                    change(file, draw)
                except (KeyError, ValueError, TypeError, RuntimeError, OSError):
                    continue  # HDF5 does not write such a thing
        survives(path)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
@settings(max_examples=EXAMPLES)
def test_files_with_bytes_changed_in_them(seed: int, changes: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes.nir"
        write_nir(random_nir(seed % 7, 2), path)
        content = bytearray(path.read_bytes())
        for _ in range(changes):
            place = draw.randrange(len(content))
            content[place] = draw.randrange(256)
        if draw.random() < 0.2:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        survives(path)


# ---- what a reader has to withstand, case by case --------------------------------------------------------------------


def line(nodes: dict[str, nir.NIRNode]) -> nir.NIRGraph:
    return nir.NIRGraph(nodes, list(itertools.pairwise(nodes)), {}, type_check=False)


def ends(size: int = 1) -> tuple[nir.Input, nir.Output]:
    return nir.Input({"input": np.array([size])}), nir.Output({"output": np.array([size])})


def test_the_limit_of_what_a_node_sends_is_checked_before_anything_is_made() -> None:
    """An input of a few bytes, and a convolution that pads it to terabytes."""
    conv = nir.Conv2d(None, np.ones((1, 1, 1, 1)), (1, 1), (1 << 20, 1 << 20), (1, 1), 1, np.zeros(1))
    nodes = {"in": nir.Input({"input": np.array([1, 2, 2])}), "conv": conv, "out": ends()[1]}
    with pytest.raises(SpikeportError, match=r"'conv' \(Conv2d\) sends"):
        plain(line(nodes), "padded")
    with pytest.raises(SpikeportError, match=r"'in' \(Input\) sends"):
        plain(line({"in": nir.Input({"input": np.array([1 << 40, 1 << 40])}), "out": ends()[1]}), "wide")


def test_a_chain_of_many_nodes_is_no_recursion() -> None:
    source, sink = ends()
    nodes = {"in": source, **{f"n{index}": nir.Scale(np.ones(1)) for index in range(2000)}}
    nodes |= {"a": nir.IF(r=np.ones(1), v_threshold=np.ones(1)), "out": sink}
    assert lower(line(nodes), "long", dt=1.0, reset="zero", steps=1).populations[0].name == "a"
    with pytest.raises(SpikeportError, match="nodes"):
        plain(line({"in": source, **{f"n{index}": nir.Scale(np.ones(1)) for index in range(20000)}}), "longer")


def test_branches_that_multiply_are_bound() -> None:
    """Twenty times two ways to the same sum are a million paths."""
    source, sink = ends()
    nodes: dict[str, nir.NIRNode] = {"in": source}
    edges, last = [], "in"
    for index in range(20):
        for way in "ab":
            nodes[f"{way}{index}"] = nir.Scale(np.ones(1))
            edges.append((last, f"{way}{index}"))
        nodes[f"sum{index}"] = nir.Scale(np.ones(1))
        edges += [(f"{way}{index}", f"sum{index}") for way in "ab"]
        last = f"sum{index}"
    nodes |= {"n": nir.IF(r=np.ones(1), v_threshold=np.ones(1)), "out": sink}
    graph = nir.NIRGraph(nodes, [*edges, (last, "n"), ("n", "out")], {}, type_check=False)
    with pytest.raises(SpikeportError, match="linear paths"):
        lower(graph, "branches", dt=1.0, reset="zero", steps=1)


def test_a_nested_graph_needs_one_way_in_and_one_way_out() -> None:
    source, sink = ends()
    inner = line({"in": source, "n": nir.Scale(np.ones(1)), "out": sink})
    del inner.nodes["in"]
    inner.edges.remove(("in", "n"))
    graph = line({"in": source, "sub": inner, "out": sink})
    with pytest.raises(SpikeportError, match="'sub' has 0 Input nodes"):
        plain(graph, "nested")


def test_a_nested_graph_in_a_file_is_inlined(tmp_path: Path) -> None:
    source, sink = ends()
    inner = line({"in": source, "n": nir.LI(tau=np.ones(1), r=np.ones(1), v_leak=np.zeros(1)), "out": sink})
    inner.metadata = {"dt": 0.5}
    write_nir(line({"in": source, "sub": inner, "out": sink}), tmp_path / "nested.nir")
    graph = read_nir(tmp_path / "nested.nir")
    assert list(graph.nodes) == ["in", "out", "sub.n"]
    assert graph.nodes["sub.n"].metadata == {"dt": 0.5}
    assert set(graph.edges) == {("in", "sub.n"), ("sub.n", "out")}


def test_one_value_for_all_neurons_fits_any_shape(tmp_path: Path) -> None:
    """As some writers have it: a scalar beside arrays, and a shape that only follows from what arrives."""
    neuron = nir.LIF(*(np.ones(1) for _ in range(4)))
    neuron.tau = 2.0
    nodes = {"in": nir.Input({"input": np.array([2, 3])}), "n": neuron, "out": nir.Output({"output": np.array([2, 3])})}
    write_nir(line(nodes), tmp_path / "scalar.nir")
    node = read_nir(tmp_path / "scalar.nir").nodes["n"]
    assert node.tau.shape == node.v_reset.shape == (2, 3)
    assert (node.tau == 2.0).all()


@pytest.mark.parametrize("value", [0.0, -1e-3])
def test_time_constants_that_are_not_positive_are_named(value: float, tmp_path: Path) -> None:
    source, sink = ends()
    nodes = {"in": source, "n": nir.LI(tau=np.full(1, value), r=np.ones(1), v_leak=np.zeros(1)), "out": sink}
    write_nir(line(nodes), tmp_path / "tau.nir")
    with pytest.raises(SpikeportError, match=r"tau = .* of node 'n' is not positive"):
        read_nir(tmp_path / "tau.nir")


def test_every_node_of_nir_is_read(tmp_path: Path) -> None:
    """NIR 1.0 has these; none may be missing from the reader."""
    every = {name for name in nir.ir.__all__ if isinstance(getattr(nir, name), type)} - {"NIRNode", "NIRGraph"}
    assert set(nir_reader.KINDS) == every

"""Reading NIR files as data from strangers: sizes checked before anything is allocated, every fault named."""

import math
import warnings
from pathlib import Path

import h5py
import nir
import numpy as np

from spikeport.models.errors import GraphError

LARGEST_FILE = 1 << 32
"""Bytes that all arrays of a file may take together once read."""

LARGEST_DEPTH = 32
"""Groups inside groups; a graph inside a graph takes two."""

LARGEST_COUNT = 1 << 17
"""Groups and arrays of a file."""


def read_nir(path: Path) -> nir.NIRGraph:
    """Read a .nir file.

    Raises GraphError, in one or two lines, where the file is missing, damaged, declares arrays that are too large,
    refers to other files, holds values that are not finite numbers, or is no consistent graph.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path} does not exist.")
    try:
        stored = _survey(path)
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error")  # a division by zero in a shape is a refusal, not a remark
            graph = nir.read(path)
    except GraphError:
        raise
    except OSError as error:
        raise GraphError(f"{path} is truncated or no HDF5 file ({_first_line(error)}).") from None
    except Exception as error:  # nir asserts, indexes and converts freely, so anything may come out of a strange file
        raise GraphError(f"{path} is no consistent NIR graph: {_first_line(error)}.") from None
    if not isinstance(graph, nir.NIRGraph):
        raise GraphError(f"{path} holds a single {type(graph).__name__} node, not a graph.")
    added = [name for name in graph.nodes if name not in stored]
    for source, target in graph.edges:
        # nir.read completes loose ends with Input and Output nodes of its own: silence where a network is broken
        if source in added:
            raise GraphError(f"{path}: nothing is connected to the input of node {target!r}.")
        if target in added:
            raise GraphError(f"{path}: the output of node {source!r} is not connected.")
    check_nir(graph, str(path))
    return graph


def check_nir(graph: nir.NIRGraph, origin: str) -> None:
    """Check nodes and edges. Raises GraphError naming the node or edge that is wrong."""
    for source, target in graph.edges:
        for end in (source, target):
            if end not in graph.nodes:
                raise GraphError(f"{origin}: edge {source} -> {target} refers to {end!r}, which is not a node.")
    starts, ends = {edge[0] for edge in graph.edges}, {edge[1] for edge in graph.edges}
    for name, node in graph.nodes.items():
        if not isinstance(node, nir.Input) and name not in ends:
            raise GraphError(f"{origin}: nothing is connected to the input of node {name!r} ({type(node).__name__}).")
        if not isinstance(node, nir.Output) and name not in starts:
            raise GraphError(f"{origin}: the output of node {name!r} ({type(node).__name__}) is not connected.")
        for key, value in vars(node).items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                raise GraphError(f"{origin}: {key} of node {name!r} holds NaN or infinity.")
    if not graph.inputs or not graph.outputs:
        raise GraphError(f"{origin} has no Input or no Output node.")


def _survey(path: Path) -> set[str]:
    """Look at the whole file before an array is read; return the names of the nodes.

    Raises GraphError for what no network needs: links out of the tree, data kept in other files, deep nesting, more
    bytes than fit, numbers that are not real, and nodes of a type that NIR does not have.
    """
    total = count = 0

    def visit(group: h5py.Group, where: str, depth: int) -> None:
        nonlocal total, count
        if depth > LARGEST_DEPTH:
            raise GraphError(f"{path}: groups are nested more than {LARGEST_DEPTH} deep at {where[:60]!r}.")
        if "type" in group and isinstance(group.get("type"), h5py.Dataset):
            _check_type(path, where, group["type"][()])
        for name in group:
            place = f"{where}/{name}"
            count += 1
            if count > LARGEST_COUNT:
                raise GraphError(f"{path} holds more than {LARGEST_COUNT} groups and arrays.")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise GraphError(f"{path}: {place} is a link to another place; a network keeps its data in one file.")
            item = group[name]
            if isinstance(item, h5py.Group):
                visit(item, place, depth + 1)
            elif isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    raise GraphError(f"{path}: {place} keeps its data in another file.")
                if item.dtype.kind not in "biufSO":
                    raise GraphError(f"{path}: {place} holds {item.dtype}; real numbers and text are read.")
                total += math.prod(item.shape or ()) * item.dtype.itemsize
                if total > LARGEST_FILE:
                    raise GraphError(f"{path}: {place} declares {item.shape} entries, more than a network can hold.")

    with h5py.File(path, "r") as file:
        if not isinstance(file.get("node"), h5py.Group):
            raise GraphError(f"{path} is an HDF5 file, but no NIR graph: it has no group 'node'.")
        visit(file, "", 0)
        nodes = file["node"].get("nodes", {})
        return set(nodes)


def _check_type(path: Path, where: str, value: object) -> None:
    name = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    kind = getattr(nir, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nir.NIRNode)):
        raise GraphError(f"{path}: {where} is of the unknown type {name[:60]!r}.")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")

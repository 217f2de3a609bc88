"""Reading NIR files as data from strangers: sizes checked before anything is allocated, every fault named."""

import math
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np

from spikeport.models.errors import GraphError

LARGEST_ARRAY = 1 << 28
"""Entries of one stored array that are read at most (2 GiB of float64)."""

LARGEST_TOTAL = 1 << 29
"""Entries of all stored arrays of a file together."""


def read_nir(path: Path) -> nir.NIRGraph:
    """Read a .nir file.

    Raises GraphError, in one or two lines, where the file is missing, damaged, declares arrays that are too large,
    holds values that are not finite numbers, or is no consistent graph.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path} does not exist.")
    try:
        stored = _check_sizes(path)
        graph = nir.read(path)
    except GraphError:
        raise
    except OSError as error:
        raise GraphError(f"{path} is truncated or no HDF5 file ({_first_line(error)}).") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise GraphError(f"{path} is no NIR graph: {_first_line(error)} is missing or of another type.") from None
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise GraphError(f"{path}: {_first_line(error)}.") from None
    if not isinstance(graph, nir.NIRGraph):
        raise GraphError(f"{path} holds a single {type(graph).__name__} node, not a graph.")
    added = [name for name in getattr(graph, "nodes", {}) if name not in stored]
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


def _check_sizes(path: Path) -> set[str]:
    """Refuse arrays that are too large before one is read; return the names of the stored nodes."""
    total = 0

    def visit(name: str, item: Any) -> None:
        nonlocal total
        if isinstance(item, h5py.Dataset):
            size = math.prod(item.shape or ())
            total += size
            if size > LARGEST_ARRAY or total > LARGEST_TOTAL:
                raise GraphError(f"{path}: {name} declares {item.shape} entries, more than a network can hold.")

    with h5py.File(path, "r") as file:
        if "node" not in file:
            raise GraphError(f"{path} is an HDF5 file, but no NIR graph: it has no group 'node'.")
        file.visititems(visit)
        return set(file["node"].get("nodes", {}))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")

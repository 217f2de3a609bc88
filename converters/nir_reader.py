"""Reading NIR files as data from strangers: sizes checked before anything is allocated, every fault named.

The file is read here and not by `nir.read`, which trusts what it finds: it converts and allocates before it checks, and
completes loose ends with nodes of its own. What is read is then made plain (`spikeport.converters.nir_graph`), so that
nested graphs, scalar parameters and shapes that only follow from other nodes are all settled.
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np

from spikeport.converters.nir_graph import PARAMETERS, plain
from spikeport.models.errors import GraphError

LARGEST_FILE = 1 << 32
"""Bytes that all arrays of a file may take together once read."""

LARGEST_DEPTH = 32
"""Groups inside groups; a graph inside a graph takes two."""

LARGEST_COUNT = 1 << 17
"""Groups and arrays of a file."""

OPTIONAL = {"v_reset", "w_in", "input_shape", "input_type", "start_dim", "end_dim", "metadata"}
"""What a node may leave out: the NIR package has defaults for it."""

_DEFAULTS: dict[str, Any] = {"input_shape": None, "input_type": None}

KINDS = {
    kind.__name__: kind
    for kind in (
        *(*PARAMETERS, nir.Input, nir.Output, nir.Affine, nir.Linear),
        *(nir.Conv1d, nir.Conv2d, nir.Flatten, nir.SumPool2d, nir.AvgPool2d),
    )
}


def read_nir(path: Path) -> nir.NIRGraph:
    """Read a .nir file as a plain graph (`spikeport.converters.nir_graph.plain`).

    Raises GraphError, in one or two lines, where the file is missing, damaged, declares arrays that are too large,
    refers to other files, holds values that are not finite numbers, or is no consistent graph.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path} does not exist.")
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("node"), h5py.Group):
                raise GraphError(f"{path} is an HDF5 file, but no NIR graph: it has no group 'node'.")
            _survey(path, file)
            kind = _type(path, "/node", file["node"])
            if kind != "NIRGraph":
                raise GraphError(f"{path} holds a single {kind} node, not a graph.")
            graph = _graph(path, "/node", file["node"])
    except GraphError:
        raise
    except Exception as error:  # a damaged file makes h5py raise anything, RuntimeError and KeyError among it
        raise GraphError(f"{path} is truncated, damaged or no HDF5 file ({_first_line(error)}).") from None
    return plain(graph, str(path))


def _survey(path: Path, file: h5py.File) -> None:
    """Look at the whole file before an array is read.

    Raises GraphError for what no network needs: links out of the tree, data kept in other files, deep nesting, more
    bytes than fit, numbers that are not real.
    """
    total = count = 0

    def visit(group: h5py.Group, where: str, depth: int) -> None:
        nonlocal total, count
        if depth > LARGEST_DEPTH:
            raise GraphError(f"{path}: groups are nested more than {LARGEST_DEPTH} deep at {where[:60]!r}.")
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
                text = h5py.check_string_dtype(item.dtype) is not None
                if item.dtype.kind not in "biufS" and not text:
                    raise GraphError(f"{path}: {place} holds {item.dtype}; real numbers and text are read.")
                total += math.prod(item.shape or ()) * item.dtype.itemsize
                if total > LARGEST_FILE:
                    raise GraphError(f"{path}: {place} declares {item.shape} entries, more than a network can hold.")

    visit(file, "", 0)


def _graph(path: Path, where: str, group: h5py.Group) -> nir.NIRGraph:
    for part in ("nodes", "edges"):
        if part not in group:
            raise GraphError(f"{path}: {where} is a graph without {part!r}.")
    if not isinstance(group["nodes"], h5py.Group):
        raise GraphError(f"{path}: {where}/nodes is no group of nodes.")
    _check_known(path, where, group, {"nodes", "edges"})
    nodes = {name: _node(path, f"{where}/nodes/{name}", group["nodes"][name]) for name in group["nodes"]}
    return nir.NIRGraph(nodes, _edges(path, where, group["edges"]), _metadata(group), type_check=False)


def _node(path: Path, where: str, group: h5py.Group) -> nir.NIRNode:
    if not isinstance(group, h5py.Group):
        raise GraphError(f"{path}: {where} is no group; a node is one.")
    name = _type(path, where, group)
    if name == "NIRGraph":
        return _graph(path, where, group)
    kind = KINDS[name]
    if kind in (nir.Input, nir.Output):
        _check_known(path, where, group, {"shape"})
        if "shape" not in group:
            raise GraphError(f"{path}: {where} ({name}) has no 'shape'.")
        made = kind({("input" if kind is nir.Input else "output"): _value(group["shape"])})
        made.metadata = _metadata(group)
        return made
    known = {field.name for field in fields(kind)} - {"input_type", "output_type", "metadata"}
    if kind is nir.Flatten:
        known.add("input_type")
    _check_known(path, where, group, known)
    values: dict[str, Any] = {}
    for key in known:
        if key in group:
            values[key] = _value(group[key])
        elif key in _DEFAULTS:
            values[key] = _DEFAULTS[key]
        elif key not in OPTIONAL:
            raise GraphError(f"{path}: {where} ({name}) has no {key!r}.")
    _check_arrays(path, where, name, values)
    if kind in PARAMETERS:
        present = [key for key in PARAMETERS[kind] if key in values]
        try:  # writers mix one value for all with one for each
            values |= zip(present, np.broadcast_arrays(*(values[key] for key in present)), strict=True)
        except ValueError:
            shapes = ", ".join(f"{key} {np.shape(values[key])}" for key in present)
            raise GraphError(f"{path}: {where} ({name}) has parameters of different shapes: {shapes}.") from None
    if kind is nir.Flatten:
        values["input_type"] = {"input": values["input_type"]}
    if kind in (nir.Conv1d, nir.Conv2d):
        # its shapes follow from what arrives; the constructor would work them out before they are checked
        stated, values["input_shape"] = values["input_shape"], None
        made = kind(**values)
        made.input_shape = stated
    else:
        made = _quietly(path, where, kind, values)
    made.metadata = _metadata(group)
    return made


def _quietly(path: Path, where: str, kind: type[nir.NIRNode], values: dict[str, Any]) -> nir.NIRNode:
    try:
        return kind(**values)
    except Exception as error:  # its constructor asserts and indexes freely
        raise GraphError(f"{path}: {where} is no consistent {kind.__name__}: {_first_line(error)}.") from None


def _check_arrays(path: Path, where: str, name: str, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if value is None or (key == "padding" and isinstance(value, str)):
            continue
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or not value.size:
            raise GraphError(f"{path}: {key} of {where} ({name}) holds no numbers.")


def _check_known(path: Path, where: str, group: h5py.Group, known: set[str]) -> None:
    for key in group:
        if key not in known and key not in ("type", "metadata", "version"):
            raise GraphError(f"{path}: {where} has a field {key[:60]!r} that its type does not know.")


def _type(path: Path, where: str, group: h5py.Group) -> str:
    value = _value(group["type"]) if isinstance(group.get("type"), h5py.Dataset) else None
    if value is None:
        raise GraphError(f"{path}: {where} has no 'type'.")
    if not isinstance(value, str) or (value not in KINDS and value != "NIRGraph"):
        raise GraphError(
            f"{path}: {where} is of the unknown type {str(value)[:60]!r}. NIR 1.0 has {', '.join(sorted(KINDS))}."
        )
    return value


def _edges(path: Path, where: str, data: h5py.Dataset) -> list[tuple[str, str]]:
    wrong = GraphError(f"{path}: {where}/edges is no list of pairs of names.")
    if not isinstance(data, h5py.Dataset) or data.shape is None:
        raise wrong
    if data.shape == (0,) or 0 in data.shape:
        return []
    if len(data.shape) != 2 or data.shape[1] != 2:
        raise wrong
    table = data[()]
    if table.dtype.kind not in "SO":
        raise wrong
    return [(_text(source), _text(target)) for source, target in table.tolist()]


def _metadata(group: h5py.Group) -> dict[str, Any]:
    """What a node says beside its equation: text, numbers, arrays, and such tables in turn."""
    found = group.get("metadata")
    return _table(found) if isinstance(found, h5py.Group) else {}


def _table(group: h5py.Group) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, item in group.items():
        if isinstance(item, h5py.Group):
            values[key] = _table(item)
        elif isinstance(item, h5py.Dataset):
            value = _value(item)
            values[key] = value.item() if isinstance(value, np.ndarray) and not value.ndim else value
    return values


def _value(data: Any) -> Any:
    """Text as str, numbers as an array; anything else as it is, to be refused by whoever asked for it."""
    if not isinstance(data, h5py.Dataset) or data.shape is None:
        return None
    value = data[()]
    if isinstance(value, bytes | np.bytes_ | str):
        return _text(value)
    return np.asarray(value)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")

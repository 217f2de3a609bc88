"""Reading a trained ANN from an ONNX file as data from a stranger: sizes checked before anything is allocated, every
fault named.
"""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from spikeport.converters.ann import INPUT, Ann
from spikeport.converters.onnx_arrays import Arrays, Fault, shown
from spikeport.converters.onnx_operators import SUPPORTED, Activation, Operators, Value, limited
from spikeport.converters.operators import Shape
from spikeport.models.errors import GraphError

OPSETS = range(7, 29)
"""Opset 7 brought today's broadcasting; 28 is the newest whose operators were looked at."""

LARGEST_FILE = 1 << 31
"""Bytes of a file; protobuf itself reads no more."""

LARGEST_COUNT = 5_000
"""Nodes, and arrays, of a model."""

DOMAINS = ("", "ai.onnx")


def read_onnx(path: Path) -> Ann:
    """Read an .onnx file.

    Raises GraphError, in one or two lines, where the file is missing, damaged, of an opset that is not known, declares
    arrays that are too large or are not there, refers to data outside of its folder, holds values that are not finite
    numbers, uses operators that have no spiking form (all of them named), or is no consistent network.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path} does not exist.")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise GraphError(f"{path} takes {size:,} bytes; an ONNX file has at most {LARGEST_FILE:,}.")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise GraphError(f"{path} is truncated, damaged or no ONNX file.") from None
    return _Reader(model, path).ann()


class _Reader:
    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.graph, self.path = model.graph, path
        self.arrays = Arrays(path.parent)
        self.values: dict[str, Value] = {}
        self._check_opset(model)
        for what, count in (("nodes", len(self.graph.node)), ("arrays", len(self.graph.initializer))):
            if count > LARGEST_COUNT:
                raise GraphError(f"{path} has {count:,} {what}; at most {LARGEST_COUNT:,} are read.")

    def _check_opset(self, model: onnx.ModelProto) -> None:
        versions = {entry.version for entry in model.opset_import if entry.domain in DOMAINS}
        if len(versions) != 1 or not self.graph.node:
            raise GraphError(f"{self.path} is no ONNX network: it has no nodes, or names no opset for them.")
        version = int(versions.pop())
        if version not in OPSETS:
            remedy = "Export it again" if version < OPSETS.start else "Export it with an older opset"
            raise GraphError(
                f"{self.path} is written in ONNX opset {version}; opsets {OPSETS.start} to {OPSETS.stop - 1} are read. "
                f"{remedy} (torch.onnx.export(..., opset_version=17))."
            )

    def ann(self) -> Ann:
        self._check_operators()
        stored = self._initializers()
        shape, batch = self._input(stored)
        if len(self.graph.output) != 1:
            count, names = len(self.graph.output), ", ".join(shown(value.name) for value in self.graph.output[:9])
            raise GraphError(f"{self.path} has {count} outputs ({names}); a decision is read from one.")
        output = self.graph.output[0].name
        operators = Operators(self.arrays, batch)
        for node in self._order(output, stored):
            try:
                inputs = [self._value(name, stored) for name in node.input]
                self.values[node.output[0]] = operators.apply(node, inputs, output in node.output)
            except (Fault, GraphError) as error:
                where = f"{self.path}: node {_label(node)} ({node.op_type})"
                raise GraphError(f"{where}: {str(error).rstrip('.')}.") from None
        result = self.values.get(output)
        if not isinstance(result, Activation) or result.layer == INPUT:
            raise GraphError(f"{self.path}: the output {shown(output)} does not depend on the input, or is the input.")
        return Ann(self.path.stem, shape, tuple(operators.layers), result.layer)

    def _check_operators(self) -> None:
        """Refuse what has no spiking form: every operator is named, with the first of its nodes."""
        found: dict[str, list[str]] = {}
        for node in self.graph.node:
            if node.domain not in DOMAINS or node.op_type not in SUPPORTED:
                prefix = "" if node.domain in DOMAINS else f"{node.domain}::"
                found.setdefault(f"{prefix}{node.op_type}"[:60], []).append(_label(node))
        if not found:
            return

        def listed(labels: list[str]) -> str:
            return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")

        names = [f"{operator!r} (node {listed(labels)})" for operator, labels in found.items()]
        more = f" and {len(names) - 40} others" if len(names) > 40 else ""
        raise GraphError(
            f"{self.path} uses operators without a spiking form: {', '.join(names[:40])}{more}.\n"
            f"Supported: {', '.join(SUPPORTED)}."
        )

    def _initializers(self) -> dict[str, onnx.TensorProto]:
        stored = {tensor.name: tensor for tensor in self.graph.initializer}
        if len(stored) != len(self.graph.initializer) or self.graph.sparse_initializer:
            raise GraphError(f"{self.path} holds two arrays of one name, or sparse ones, which are not read.")
        return stored

    def _input(self, stored: dict[str, onnx.TensorProto]) -> tuple[Shape, int | None]:
        """Shape of the input without the batch, and the batch if it is fixed."""
        inputs = [value for value in self.graph.input if value.name not in stored]
        if len(inputs) != 1:
            names = ", ".join(shown(value.name) for value in inputs[:9])
            raise GraphError(f"{self.path} has {len(inputs)} inputs ({names}); a network with one is converted.")
        (value,) = inputs
        tensor = value.type.tensor_type
        kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
        if not value.type.HasField("tensor_type") or tensor.elem_type not in kinds:
            raise GraphError(f"{self.path}: the input {shown(value.name)} is no tensor of floating-point numbers.")
        extents = [int(dim.dim_value) if dim.HasField("dim_value") else 0 for dim in tensor.shape.dim[:9]]
        if len(extents) not in (2, 4):
            raise GraphError(
                f"{self.path}: the input {shown(value.name)} has {len(extents)} dimensions; networks on "
                "(batch, features) and (batch, channels, height, width) are converted."
            )
        for place, extent in enumerate(extents[1:], 1):
            if extent < 1:
                raise GraphError(
                    f"{self.path}: dimension {place} of the input {shown(value.name)} is dynamic; only the batch may "
                    "be. Export the network for images of one size."
                )
        self.values[value.name] = Activation(INPUT, limited(tuple(extents[1:]), f"{self.path}: the input"))
        return tuple(extents[1:]), extents[0] if extents[0] > 0 else None

    def _order(self, output: str, stored: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
        """The nodes that the output needs, sources first."""
        makers: dict[str, int] = {}
        for index, node in enumerate(self.graph.node):
            if not node.output or not node.output[0]:
                raise GraphError(f"{self.path}: node {_label(node)} has no output.")
            for name in filter(None, node.output):
                if name in makers or name in stored or name in self.values:
                    raise GraphError(f"{self.path}: {shown(name)} is made twice, the second time by {_label(node)}.")
                makers[name] = index
        if output not in makers:
            raise GraphError(f"{self.path}: no node makes the output {shown(output)}.")
        needs: dict[int, set[int]] = {}
        waiting = [makers[output]]
        while waiting:
            index = waiting.pop()
            if index in needs:
                continue
            node = self.graph.node[index]
            for name in filter(None, node.input):
                if name not in makers and name not in stored and name not in self.values:
                    raise GraphError(f"{self.path}: node {_label(node)} takes {shown(name)}, which nothing makes.")
            needs[index] = {makers[name] for name in node.input if name in makers}
            waiting += needs[index]
        try:
            return [self.graph.node[index] for index in TopologicalSorter(needs).static_order()]
        except CycleError as error:
            nodes = [_label(self.graph.node[index]) for index in error.args[1]]
            more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
            raise GraphError(f"{self.path}: nodes {', '.join(nodes[:5])}{more} are a cycle.") from None

    def _value(self, name: str, stored: dict[str, onnx.TensorProto]) -> Value | None:
        """A node's input; None for one that is left out."""
        if name and name not in self.values:
            self.values[name] = self.arrays.read(stored[name])
        return self.values[name] if name else None


def _label(node: onnx.NodeProto) -> str:
    """A node's name, or what it makes."""
    return shown(node.name or (node.output[0] if node.output else ""))

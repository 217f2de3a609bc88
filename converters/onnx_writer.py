"""Writing an integer `ProcessGraph` as ONNX: a model of one step, and one of a whole sample.

Both compute what `spikeport.converters.reference` does, with the integers of `spikeport.models.loihi_integers`: layer
by layer within a step and without pipeline delay, recurrent projections with the spikes of the step before. Weights
are stored as the integers that they are, states and sums are int64. tz(x k, 12) is a division of integers, which ONNX
rounds towards zero; an arithmetic shift to the right is (x - x mod 2^n) / 2^n.

onnxruntime has convolutions of floats only. A sum of integers in a floating type is exact, in any order, as long as the
sum of all magnitudes stays below 2^24 (float32) or 2^53 (float64); the export proves this for every projection from
`Operator.magnitude_bound` and the payload's bits. Where a convolution of graded spikes would reach 2^24, it is made of
several, each of so many bits of the payload that it does not.

step    in   NAME of each input (batch, *shape); NAME.u.before, NAME.v.before of each population, and
             NAME.spikes.before of those whose spikes a recurrent projection carries; all 0 at a sample's first step
        out  NAME.spikes, NAME.u, NAME.v of each population
window  in   NAME of each input (batch, steps, *shape)
        out  NAME.spikes of each population (batch, steps, *shape); `membrane` (batch, *shape), after the last step, of
             the population whose membrane decides

Spikes are uint8, u and v int64, payloads of more than 8 bits int64.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Sparse, SumPool
from spikeport.models.errors import GraphError
from spikeport.models.files import atomic_path
from spikeport.models.loihi_integers import (
    DECAY_BITS,
    DECAY_UNITY,
    INPUT_SHIFT,
    STATE_LIMIT,
    THRESHOLD_SHIFT,
    shift_bias,
)

OPSET = 17
IR_VERSION = 8
EXACT_FLOAT = 1 << 24
EXACT_DOUBLE = 1 << 53

LARGEST_FILE = (1 << 31) - 1
"""Bytes; protobuf writes and reads no more."""

State = tuple[str, str]
"""A population's name and what of it: u, v or spikes."""


def step_model(graph: ProcessGraph) -> onnx.ModelProto:
    """One step: states and spikes in, states and spikes out. Raises GraphError where the graph has no such form."""
    writer = _Writer(graph)
    after = writer.step({node.name: node.name for node in graph.event_inputs})
    inputs = [_info(node.name, _payload_type(node), node.shape) for node in graph.event_inputs]
    inputs += [writer.info(state, ".before") for state in writer.carried]
    renamed = [helper.make_node("Identity", [value], [_label(state)]) for state, value in after.items()]
    outputs = [writer.info(state) for state in after]
    return writer.model([*writer.prepared, *writer.inside, *renamed], inputs, outputs)


def window_model(graph: ProcessGraph) -> onnx.ModelProto:
    """All steps of a sample, from rest: a Scan over the step. Raises GraphError where the graph has no such form."""
    writer = _Writer(graph)
    feeds = {node.name: writer.unused(f"{node.name}.now") for node in graph.event_inputs}
    after = writer.step(feeds)
    carried = [(state, writer.unused(f"{_label(state)}.after")) for state in writer.carried]
    fired = [((p.name, "spikes"), writer.unused(f"{p.name}.fired")) for p in graph.populations]
    renamed = [helper.make_node("Identity", [after[state]], [name]) for state, name in (*carried, *fired)]
    body = helper.make_graph(
        [*writer.inside, *renamed],
        "step",
        [writer.info(state, ".before") for state in writer.carried]
        + [_info(feeds[node.name], _payload_type(node), node.shape) for node in graph.event_inputs],
        [_info(name, *writer.kind(state)) for state, name in (*carried, *fired)],
    )
    probed = graph.probed
    last = [  # onnxruntime 1.32 wants a name for every state, read or not
        "membrane" if probed is not None and state == (probed.name, "v") else writer.unused(f"{_label(state)}.last")
        for state in writer.carried
    ]
    scan = helper.make_node(
        "Scan",
        [*(writer.rest(state) for state in writer.carried), *feeds],
        [*last, *(_label(state) for state, _ in fired)],
        body=body,
        num_scan_inputs=len(feeds),
        scan_input_axes=[1] * len(feeds),
        scan_output_axes=[1] * len(fired),
    )
    inputs = [_info(node.name, _payload_type(node), node.shape, steps=True) for node in graph.event_inputs]
    outputs = [_info(_label(state), *writer.kind(state), steps=True) for state, _ in fired]
    if probed is not None:
        outputs.append(_info("membrane", TensorProto.INT64, probed.shape))
    return writer.model([*writer.prepared, scan], inputs, outputs)


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a model to a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


class _Writer:
    """Writes nodes. `prepared` are those that do not depend on the step, `inside` those of the step itself."""

    def __init__(self, graph: ProcessGraph) -> None:
        if not graph.is_integer:
            raise GraphError(f"{graph.name} holds floats; ONNX is written of integers. Quantize the graph first.")
        if not graph.event_inputs:
            raise GraphError(f"{graph.name} has no input that is fed, so that an ONNX model of it would have none.")
        self.graph = graph
        self.prepared: list[onnx.NodeProto] = []
        self.inside: list[onnx.NodeProto] = []
        self.arrays: list[onnx.TensorProto] = []
        self.shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.batch = ""
        late = {projection.source for projection in graph.projections if projection.recurrent}
        self.carried: list[State] = []
        for population in graph.populations:
            self.carried += [(population.name, "u"), (population.name, "v")]
            self.carried += [(population.name, "spikes")] if population.name in late else []
        self.taken = {node.name for node in graph.event_inputs} | {"membrane"}
        for population in graph.populations:
            for state in ((population.name, kind) for kind in ("u", "v", "spikes")):
                for name in (_label(state), f"{_label(state)}.before"):
                    if name in self.taken:
                        raise GraphError(f"two values of the ONNX model would be called {name!r}; rename the nodes.")
                    self.taken.add(name)

    # ---- parts of a model -------------------------------------------------------------------------------------------

    def unused(self, name: str) -> str:
        """A name for a value; `name`, unless that is taken."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node of the step; returns the name of what it makes."""
        name = self.unused(f"{operator}.{len(self.inside)}")
        self.inside.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def prepare(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node in front of all steps."""
        name = self.unused(f"{operator}.prepared.{len(self.prepared)}")
        self.prepared.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def constant(self, values: Any) -> str:
        """A stored array, once however often it is needed; Python's integers are int64."""
        array = np.ascontiguousarray(values, np.int64 if isinstance(values, int) else None)
        array = array.reshape(np.shape(values))  # a number has no dimension of its own
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.shared:
            self.shared[key] = self.unused(f"constant.{len(self.arrays)}")
            self.arrays.append(numpy_helper.from_array(array, self.shared[key]))
        return self.shared[key]

    def weights(self, values: np.ndarray, kind: int) -> str:
        """Weights, stored in the smallest integers that hold them, as numbers of another type."""
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        stored = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high), np.int8)
        return self.prepare("Cast", self.constant(values.astype(stored)), to=kind)

    def reshaped(self, value: str, shape: tuple[int, ...]) -> str:
        """(batch, *shape), whatever the shape was."""
        return self.node("Reshape", value, self.constant(np.array([-1, *shape], np.int64)))

    def kind(self, state: State) -> tuple[int, tuple[int, ...]]:
        """Type and shape of a state or of spikes."""
        return TensorProto.UINT8 if state[1] == "spikes" else TensorProto.INT64, self.graph.population(state[0]).shape

    def info(self, state: State, suffix: str = "") -> onnx.ValueInfoProto:
        return _info(f"{_label(state)}{suffix}", *self.kind(state))

    def rest(self, state: State) -> str:
        """The state in which a sample begins: zeros for the whole batch."""
        kind, shape = self.kind(state)
        return self.zeros(kind, shape)

    def zeros(self, kind: int, shape: tuple[int, ...]) -> str:
        """Zeros of (batch, *shape)."""
        self.batch = self.batch or self.prepare("Shape", self.graph.event_inputs[0].name, start=0, end=1)
        extents = self.prepare("Concat", self.batch, self.constant(np.array(shape, np.int64)), axis=0)
        zero = numpy_helper.from_array(np.zeros(1, helper.tensor_dtype_to_np_dtype(kind)))
        return self.prepare("ConstantOfShape", extents, value=zero)

    def model(
        self, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        graph = helper.make_graph(nodes, self.graph.name or "spikeport", inputs, outputs, self.arrays)
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="spikeport"
        )
        readout = self.graph.readout
        facts = {
            "graph": self.graph.fingerprint(),
            "steps": self.graph.steps,
            "readout": readout.kind,
            "readout_population": readout.population,
            "readout_keep": readout.keep,
        }
        helper.set_model_props(made, {f"spikeport.{key}": str(value) for key, value in facts.items()})
        if made.ByteSize() > LARGEST_FILE:
            raise GraphError(f"{self.graph.name} takes {made.ByteSize():,} bytes; an ONNX file has {LARGEST_FILE:,}.")
        return made

    # ---- the step ---------------------------------------------------------------------------------------------------

    def step(self, feeds: Mapping[str, str]) -> dict[State, str]:
        """The values after a step, by state. feeds: the values of the inputs, by name."""
        sent = dict(feeds)
        after: dict[State, str] = {}
        for population in self.graph.populations:
            name = population.name
            u, v, fired = self._neurons(population, self._current(population, sent))
            sent[name] = self.node("Cast", fired, to=TensorProto.UINT8)
            after |= {(name, "u"): u, (name, "v"): v, (name, "spikes"): sent[name]}
        return after

    def _current(self, population: Population, sent: Mapping[str, str]) -> str | None:
        """Summed synaptic input a, int64 (batch, *shape); None where nothing comes in."""
        constant = np.zeros(population.shape, np.int64)
        parts: list[str] = []
        for projection in self.graph.incoming(population.name):
            source = self.graph.node(projection.source)
            if not projection.operator.weight.any():
                continue
            if isinstance(source, Input) and source.constant:
                ones = torch.ones((1, *projection.operator.in_shape), dtype=torch.float64)
                total = projection.operator.apply(ones).to(torch.int64).numpy().reshape(population.shape)
                e = projection.exponent
                constant += total << e if e >= 0 else total >> -e
                continue
            value = f"{_label((source.name, 'spikes'))}.before" if projection.recurrent else sent[source.name]
            parts.append(self._shifted(self._projected(projection, source, population, value), projection.exponent))
        if constant.any():
            parts.append(self.constant(constant[None]))
        if not parts:
            return None
        total_value = parts[0]
        for part in parts[1:]:
            total_value = self.node("Add", total_value, part)
        return total_value

    def _shifted(self, value: str, places: int) -> str:
        """value << places; a negative number of places shifts right, towards minus infinity."""
        if places == 0:
            return value
        unit = self.constant(1 << abs(places))
        if places > 0:
            return self.node("Mul", value, unit)
        return self.node("Div", self.node("Sub", value, self.node("Mod", value, unit)), unit)

    def _neurons(self, population: Population, a: str | None) -> tuple[str, str, str]:
        """u, v after the reset, and whether each neuron fired (`spikeport.models.loihi_integers`)."""
        neuron, name = population.neuron, population.name
        assert isinstance(neuron, LoihiNeuron)

        def own(values: np.ndarray) -> np.ndarray:
            array = np.asarray(values, np.int64)
            return array if array.ndim == 0 else array.reshape(1, *population.shape)

        u = self._decayed(f"{name}.u.before", DECAY_UNITY - (own(neuron.du) + neuron.ds_offset))
        if a is not None:
            u = self.node("Add", u, self._shifted(a, INPUT_SHIFT))
        limit, turn = self.constant(STATE_LIMIT), self.constant(2 * STATE_LIMIT)
        low = self.node("Where", self.node("Greater", u, limit), self.node("Sub", u, turn), u)
        below = self.node("LessOrEqual", low, self.constant(-STATE_LIMIT))
        u = self.node("Where", below, self.node("Add", u, turn), low)
        v = self.node("Add", self._decayed(f"{name}.v.before", DECAY_UNITY - own(neuron.dv)), u)
        mant, exponent = (torch.from_numpy(np.array(own(value))) for value in (neuron.bias_mant, neuron.bias_exp))
        bias = shift_bias(mant, exponent).numpy()
        if bias.any():
            v = self.node("Add", v, self.constant(bias))
        v = self.node("Clip", v, self.constant(1 - STATE_LIMIT), self.constant(STATE_LIMIT - 1))
        level = self.constant(own(neuron.vth) << THRESHOLD_SHIFT)
        fired = self.node("Greater", v, level)
        reset = self.node("Sub", v, level) if neuron.reset == "subtract" else self.constant(0)
        return u, self.node("Where", fired, reset, v), fired

    def _decayed(self, state: str, keep: np.ndarray) -> str:
        """tz(state keep, 12)."""
        if (keep == DECAY_UNITY).all():
            return state
        return self.node("Div", self.node("Mul", state, self.constant(keep)), self.constant(1 << DECAY_BITS))

    # ---- projections ------------------------------------------------------------------------------------------------

    def _projected(self, projection: Projection, source: Input | Population, target: Population, value: str) -> str:
        """The operator on spikes, before the exponent: int64 (batch, *target.shape)."""
        operator = projection.operator
        bits = source.message_bits if isinstance(source, Input) else 1
        x = value if operator.in_shape == source.shape else self.reshaped(value, operator.in_shape)
        if isinstance(operator, OneToOne | Sparse):
            y = self._listed(operator, x)
        else:
            bound = max(operator.magnitude_bound(), float(math.prod(operator.pool.kernel) if operator.pool else 1))
            plain = isinstance(operator, Dense) and operator.pool is None
            if bound * ((1 << bits) - 1) < EXACT_FLOAT:
                y = self._summed(operator, x, TensorProto.FLOAT)
            elif plain and bound * ((1 << bits) - 1) < EXACT_DOUBLE:
                y = self._summed(operator, x, TensorProto.DOUBLE)
            else:
                y = self._in_parts(projection, x, bits, bound)
        return y if operator.out_shape == target.shape else self.reshaped(y, target.shape)

    def _in_parts(self, projection: Projection, x: str, bits: int, bound: float) -> str:
        """The sum over parts of the payload that are so short that each one's sums are exact."""
        width = int(math.log2(EXACT_FLOAT / bound)) if bound < EXACT_FLOAT else 0
        if width < 1:
            raise GraphError(
                f"projection {projection.name!r} sums up to {bound:,.0f} for binary spikes; convolutions in ONNX are "
                f"exact below {EXACT_FLOAT:,}."
            )
        x = self.node("Cast", x, to=TensorProto.INT64)
        total = ""
        for first in range(0, bits, width):
            part = self.node("Div", x, self.constant(1 << first)) if first else x
            part = self.node("Mod", part, self.constant(1 << width))
            part = self._shifted(self._summed(projection.operator, part, TensorProto.FLOAT), first)
            total = self.node("Add", total, part) if total else part
        return total

    def _summed(self, operator: Operator, x: str, kind: int) -> str:
        """A matrix or convolution, pooled before where the operator pools; its sums are exact in `kind`."""
        x = self.node("Cast", x, to=kind)
        if operator.pool is not None:
            x = self._pooled(operator.pool, x, operator.in_shape[0])
        if isinstance(operator, Conv2d):
            y = self.node(
                "Conv",
                x,
                self.weights(operator.weight, kind),
                strides=operator.stride,
                pads=(*operator.padding, *operator.padding),
                dilations=operator.dilation,
                group=operator.groups,
            )
        else:
            flat = x if len(operator.pooled_shape) == 1 else self.reshaped(x, (math.prod(operator.pooled_shape),))
            y = self.node("MatMul", flat, self.weights(operator.weight.T, kind))
            y = y if len(operator.out_shape) == 1 else self.reshaped(y, operator.out_shape)
        return self.node("Cast", y, to=TensorProto.INT64)

    def _pooled(self, pool: SumPool, x: str, channels: int) -> str:
        """Sums over windows, by a convolution of each channel with ones."""
        ones = self.weights(np.ones((channels, 1, *pool.kernel), np.int64), TensorProto.FLOAT)
        return self.node("Conv", x, ones, strides=pool.stride, group=channels)

    def _listed(self, operator: OneToOne | Sparse, x: str) -> str:
        """Synapse by synapse, in integers."""
        flat = self.reshaped(self.node("Cast", x, to=TensorProto.INT64), (operator.n_in,))
        weight = self.weights(operator.weight, TensorProto.INT64)
        if isinstance(operator, OneToOne):
            return self.reshaped(self.node("Mul", flat, weight), operator.out_shape)
        gathered = self.node("Gather", flat, self.constant(operator.source.astype(np.int64)), axis=1)
        terms = self.node("Mul", gathered, weight)
        places = self.node("Expand", self.constant(operator.target.astype(np.int64)[None]), self.node("Shape", terms))
        rest = self.zeros(TensorProto.INT64, (operator.n_out,))
        y = self.node("ScatterElements", rest, places, terms, axis=1, reduction="add")
        return self.reshaped(y, operator.out_shape)


def _label(state: State) -> str:
    return f"{state[0]}.{state[1]}"


def _payload_type(node: Input) -> int:
    return TensorProto.UINT8 if node.message_bits <= 8 else TensorProto.INT64


def _info(name: str, kind: int, shape: tuple[int, ...], steps: bool = False) -> onnx.ValueInfoProto:
    """The type of a value with a batch of any size, and with any number of steps where it has them."""
    return helper.make_tensor_value_info(name, kind, ["batch", *(["steps"] if steps else []), *shape])

"""`Trace`: what a backend did: the spikes of every population, by sample and step, and what was counted on the way.

Where the readout is a membrane, the trace also holds that membrane as it stood after the last step of each sample.

Spikes are bit-packed: ten thousand samples of a twelve-thousand-neuron network take tens of megabytes, and two traces
are compared by exclusive or. Sample steps are those of the reference (stage delays of a streamed run are taken out).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spikeport.converters.graph import ProcessGraph, Readout
from spikeport.models.errors import SpikeportError
from spikeport.models.files import read_arrays, write_arrays
from spikeport.models.readouts import decide

FORMAT = "spikeport-trace"
FORMAT_VERSION = 2
STATES = ("a", "u", "v")


@dataclass(eq=False)
class Trace:
    """Result of one run.

    Attributes:
        backend: name of the backend.
        graph: `ProcessGraph.fingerprint()` of the graph that ran.
        samples, steps: the run's extent.
        sizes: neurons of each population, in graph order.
        packed: per population, uint8 (samples, steps, ceil(size / 8)), `numpy.packbits` over the flat neuron index.
        synops: per projection, int64 (samples, steps): synaptic operations counted while running; may be empty.
        active: per population, packed as the spikes: neurons that had a state, an input or a bias; may be empty.
        membrane: v of the readout population after the last step of each sample, (samples, size), int64, or float64 of
            a float network; None where spikes decide.
        states: per population, where asked for, "u", "v" (after reset) and of some backends "a", the summed synaptic
            input: integers, or floats of a float network, (samples, steps, size).
        seconds: wall time of the run.
    """

    backend: str
    graph: str
    samples: int
    steps: int
    sizes: dict[str, int]
    packed: dict[str, np.ndarray]
    synops: dict[str, np.ndarray] = field(default_factory=dict)
    active: dict[str, np.ndarray] = field(default_factory=dict)
    membrane: np.ndarray | None = None
    states: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    seconds: float = 0.0

    def spikes(self, population: str, samples: slice = slice(None)) -> np.ndarray:
        """Spikes of a population as uint8 (samples, steps, size)."""
        bits: np.ndarray = np.unpackbits(self.packed[population][samples], axis=-1, count=self.sizes[population])
        return bits

    def spike_counts(self, population: str) -> np.ndarray:
        """Spikes of a population by sample and step, int64 (samples, steps)."""
        counts: np.ndarray = np.bitwise_count(self.packed[population]).sum(axis=-1, dtype=np.int64)
        return counts

    def active_counts(self, population: str) -> np.ndarray:
        """Active neurons of a population by sample and step, int64 (samples, steps)."""
        counts: np.ndarray = np.bitwise_count(self.active[population]).sum(axis=-1, dtype=np.int64)
        return counts

    def head(self, samples: int) -> "Trace":
        """The first samples of this trace."""
        if samples > self.samples:
            raise SpikeportError(f"the {self.backend} trace has {self.samples} samples; {samples} were asked for.")
        cut = slice(0, samples)
        return Trace(
            self.backend,
            self.graph,
            samples,
            self.steps,
            self.sizes,
            {name: array[cut] for name, array in self.packed.items()},
            {name: array[cut] for name, array in self.synops.items()},
            {name: array[cut] for name, array in self.active.items()},
            None if self.membrane is None else self.membrane[cut],
            {name: {key: array[cut] for key, array in state.items()} for name, state in self.states.items()},
            self.seconds,
        )

    def save(self, path: Path) -> None:
        """Write the trace to one .npz file, without pickle."""
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "backend": self.backend,
            "graph": self.graph,
            "samples": self.samples,
            "steps": self.steps,
            "sizes": self.sizes,
            "seconds": self.seconds,
        }
        arrays = {f"spikes.{name}": array for name, array in self.packed.items()}
        arrays |= {f"synops.{name}": array for name, array in self.synops.items()}
        arrays |= {f"active.{name}": array for name, array in self.active.items()}
        arrays |= {} if self.membrane is None else {"membrane": self.membrane}
        for name, state in self.states.items():
            arrays |= {f"{key}.{name}": _narrow(values) for key, values in state.items()}
        write_arrays(path, header, arrays)

    @staticmethod
    def load(path: Path, graph: ProcessGraph | None = None) -> "Trace":
        """Read a trace written by `save`, or by the runner of a bundle.

        Raises SpikeportError where the file is damaged, or is not a trace of `graph`, if one is given.
        """
        header, arrays = read_arrays(path, "spikeport simulate")
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, FORMAT_VERSION):
            raise SpikeportError(
                f"{path} is not a trace of version {FORMAT_VERSION}. Run the stage that writes it again: "
                "`spikeport train` for the float trace, `spikeport simulate` for the others."
            )
        groups: dict[str, dict[str, np.ndarray]] = {key: {} for key in ("spikes", "synops", "active", *STATES)}
        membrane = arrays.pop("membrane", None)
        try:
            for key, array in arrays.items():
                group, name = key.split(".", 1)
                groups[group][name] = array
            fields = {key: header[key] for key in ("backend", "graph", "samples", "steps", "sizes", "seconds")}
            packed, synops, active = groups["spikes"], groups["synops"], groups["active"]
            states = {
                name: {key: groups[key][name] for key in STATES if name in groups[key]}
                for name in dict.fromkeys(name for key in STATES for name in groups[key])
            }
            trace = Trace(**fields, packed=packed, synops=synops, active=active, membrane=membrane, states=states)
            trace._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpikeportError(f"{path} contradicts itself ({error}). Run `spikeport simulate` again.") from None
        if graph is not None:
            trace.check_graph(graph, str(path))
        return trace

    def check_graph(self, graph: ProcessGraph, origin: str) -> None:
        """Raise SpikeportError where this is not a trace of `graph`; `origin` says what it is."""
        if self.graph != graph.fingerprint():
            raise SpikeportError(
                f"{origin} was made with another network (graph {self.graph}, here {graph.fingerprint()}).\n"
                "Run `spikeport simulate` again, or compare two networks with a --graph for each."
            )
        sizes = {population.name: population.size for population in graph.populations}
        if self.steps != graph.steps or sizes.items() - self.sizes.items():
            raise SpikeportError(f"{origin} has not the steps and populations of its network. It is damaged.")

    def _check(self) -> None:
        """Raise ValueError where shapes or types contradict samples, steps and sizes."""
        extent = (int(self.samples), int(self.steps))
        if set(self.packed) != set(self.sizes):
            raise ValueError("not every population has spikes")
        for what, bits in (("spikes", self.packed), ("active neurons", self.active)):
            for name, array in bits.items():
                if array.shape != (*extent, -(-self.sizes[name] // 8)) or array.dtype != np.uint8:
                    raise ValueError(f"{what} of {name!r} have shape {array.shape} and type {array.dtype}")
        for name, array in self.synops.items():
            if array.shape != extent:
                raise ValueError(f"counts of {name!r} have shape {array.shape}")
        for name, state in self.states.items():
            for key, array in state.items():
                if array.shape != (*extent, self.sizes[name]) or not {"u", "v"} <= set(state):
                    raise ValueError(f"{key} of {name!r} has shape {array.shape}, or u or v is missing")
        if self.membrane is not None:
            rows, dtype = self.membrane.shape[:1], self.membrane.dtype
            if self.membrane.ndim != 2 or rows != extent[:1] or dtype not in (np.int64, np.float64):
                raise ValueError(f"the membrane has shape {self.membrane.shape} and type {dtype}")


def _narrow(values: np.ndarray) -> np.ndarray:
    """Integers as int32 where that holds them."""
    fits = np.issubdtype(values.dtype, np.integer) and np.abs(values).max(initial=0) < 1 << 31
    return values.astype(np.int32) if fits else values


def pack(spikes: np.ndarray) -> np.ndarray:
    """Bit-pack 0/1 spikes (samples, steps, size) for `Trace.packed`."""
    return np.packbits(spikes.astype(bool), axis=-1)


def check_inputs(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> int:
    """Check the arrays (samples, steps, *shape) that a backend is given against the graph; return the samples.

    Raises SpikeportError naming the input that is missing, of the wrong shape, or out of the range of its bits.
    """
    expected = {node.name for node in graph.event_inputs}
    if set(inputs) != expected:
        raise SpikeportError(f"the graph takes the inputs {sorted(expected)}, but was given {sorted(inputs)}.")
    for node in graph.event_inputs:
        array = inputs[node.name]
        if array.ndim < 2 or array.shape[1:] != (graph.steps, *node.shape):
            raise SpikeportError(
                f"input {node.name!r} has shape {array.shape[1:]} a sample; "
                f"the graph takes {(graph.steps, *node.shape)}."
            )
    samples = {int(array.shape[0]) for array in inputs.values()}
    if len(samples) != 1 or 0 in samples:
        raise SpikeportError("there are no samples to run, or the inputs differ in their number of samples.")
    for node in graph.event_inputs:
        array = inputs[node.name]
        if not np.issubdtype(array.dtype, np.integer) and array.dtype != np.bool_:
            raise SpikeportError(f"input {node.name!r} is {array.dtype}; spikes are integers.")
        if array.min() < 0 or int(array.max()) >= 1 << node.message_bits:
            raise SpikeportError(f"input {node.name!r} has values outside 0..{(1 << node.message_bits) - 1}.")
    return samples.pop()


def decisions(readout: Readout, trace: Trace, steps: int | None = None) -> np.ndarray:
    """Class of each sample, int64 (samples,).

    Args:
        steps: read the spikes of the first so many steps only. A membrane is read after the last step alone.

    Raises SpikeportError where the trace lacks the membrane that decides, or that is to be read earlier.
    """
    if readout.kind != "membrane":
        return decide(readout.kind, readout.keep, trace.spikes(readout.population)[:, :steps])
    if steps is not None and steps != trace.steps:
        raise SpikeportError(f"the membrane of {readout.population!r} is read after {trace.steps} steps, not {steps}.")
    return decide(readout.kind, readout.keep, final_membrane(readout, trace))


def final_membrane(readout: Readout, trace: Trace) -> np.ndarray:
    """The membrane that decides, (samples, size). Raises SpikeportError where the trace does not hold it."""
    size = trace.sizes[readout.population]
    if trace.membrane is None or trace.membrane.shape != (trace.samples, size):
        raise SpikeportError(
            f"the {trace.backend} trace does not hold the membrane of {readout.population!r}, which decides. "
            "Run the stage that writes it again."
        )
    return trace.membrane

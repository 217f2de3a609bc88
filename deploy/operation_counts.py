"""Synaptic operations of a network under NeuroBench's definitions, from a graph and the trace of its run.

The definitions are those of NeuroBench (Yik et al., "The neurobench framework for benchmarking neuromorphic computing
algorithms and systems", Nature Communications 16, 2025), read in and checked against the metrics `SynapticOperations`,
`ActivationSparsity` and `ConnectionSparsity` of its package, version 2.3.0:

    Dense            every weight times every input at every step, zeros included
    Effective_ACs    non-zero weights times non-zero inputs, at the steps in which a layer's inputs are all 0 or 1
    Effective_MACs   the same at all other steps
    activation sparsity   share of zeros among the outputs of all neurons at all steps; inputs are no neurons
    connection sparsity   share of zeros among the stored weights; a shared weight is one weight

A layer's step is all AC or all MAC for a whole batch: one input above 1 in one sample makes MACs of the operations of
all samples of that batch at that step. A convolution's padded border is no input and counts nowhere. Biases, pooling
and what neurons do inside count nothing.

Where our own synaptic operations (`Trace.synops`, `Counts.by_projection`) differ: a zero weight is a synapse to them,
as to the chip; pooling is folded into their addresses, so that every spike of a window counts, where NeuroBench sees
one pooled number, and MACs where it exceeds 1; and they count a constant source, which NeuroBench sees as a bias.
Projections from constant sources therefore have no operations here. The weights are those of the graph: in a quantised
one, weights that were rounded to zero are zeros. A sparse or one-to-one operator has no layer in NeuroBench; its dense
operations are its listed synapses.

NeuroBench sums each layer's call in the type of the weights, so its own figures are rounded where a float32 layer does
more than 2^24 operations a batch and step; these are not.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from spikeport.converters.graph import Input, ProcessGraph, Projection
from spikeport.converters.operators import Operator
from spikeport.deploy.trace import Trace, check_inputs, pack
from spikeport.models.errors import SpikeportError

NEUROBENCH_VERSION = "2.3.0"
"""The release of the package that these counts are tested against."""

VALUES_PER_CHUNK = 4_000_000


@dataclass(frozen=True)
class Operations:
    """Synaptic operations of a whole run."""

    dense: int = 0
    effective_acs: int = 0
    effective_macs: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(
            self.dense + other.dense,
            self.effective_acs + other.effective_acs,
            self.effective_macs + other.effective_macs,
        )


@dataclass(frozen=True)
class OperationCounts:
    """What `count_operations` found.

    Attributes:
        samples: inferences in the run.
        projections: operations by projection, over all samples.
        activation_sparsity, connection_sparsity: shares, 0..1; NeuroBench rounds the latter to four places.
    """

    samples: int
    projections: dict[str, Operations]
    activation_sparsity: float
    connection_sparsity: float

    @property
    def total(self) -> Operations:
        """All projections and samples together."""
        return sum(self.projections.values(), Operations())

    @property
    def dense(self) -> float:
        """NeuroBench's `Dense`, per inference."""
        return self.total.dense / self.samples

    @property
    def effective_acs(self) -> float:
        """NeuroBench's `Effective_ACs`, per inference."""
        return self.total.effective_acs / self.samples

    @property
    def effective_macs(self) -> float:
        """NeuroBench's `Effective_MACs`, per inference."""
        return self.total.effective_macs / self.samples


def count_operations(
    graph: ProcessGraph, trace: Trace, inputs: dict[str, np.ndarray] | None = None, batch: int | None = None
) -> OperationCounts:
    """Count the synaptic operations of a run as NeuroBench would.

    Args:
        trace: of the same graph.
        inputs: what the run was given. A trace knows that a graded input sent, not what: without `inputs` every step at
            which a graded input sends anything counts as MACs. They also stand in for inputs that a trace lacks.
        batch: samples that NeuroBench is given at a time; all at once by default.

    Raises SpikeportError if the trace is of another graph, the inputs of another run, or the batch empty.
    """
    if trace.graph != graph.fingerprint():
        raise SpikeportError(f"the {trace.backend} trace was made with another network than {graph.name!r}.")
    if inputs is not None:
        _check_same_run(graph, trace, inputs)
    size = trace.samples if batch is None else batch
    if size < 1:
        raise SpikeportError(f"a batch of {size} samples is not possible.")
    dense = dense_operations(graph)
    projections = {}
    for projection in graph.projections:
        effective, binary = _effective(graph, projection, trace, inputs)
        starts = np.arange(0, trace.samples, size)
        by_batch = np.add.reduceat(effective, starts, axis=0)
        accumulates = np.logical_and.reduceat(binary, starts, axis=0)
        projections[projection.name] = Operations(
            dense=trace.samples * trace.steps * dense[projection.name],
            effective_acs=int(by_batch[accumulates].sum()),
            effective_macs=int(by_batch[~accumulates].sum()),
        )
    return OperationCounts(trace.samples, projections, activation_sparsity(graph, trace), connection_sparsity(graph))


def dense_operations(graph: ProcessGraph) -> dict[str, int]:
    """Multiply-accumulates of each projection in one step if no zero is skipped; pooling is done before."""
    return {
        projection.name: 0 if _is_bias(graph, projection) else _unpooled(projection.operator).n_synapses()
        for projection in graph.projections
    }


def activation_sparsity(graph: ProcessGraph, trace: Trace) -> float:
    """Share of neuron-steps without a spike, over all populations."""
    spikes = sum(int(trace.spike_counts(population.name).sum()) for population in graph.populations)
    neuron_steps = trace.samples * trace.steps * sum(population.size for population in graph.populations)
    return (neuron_steps - spikes) / neuron_steps


def connection_sparsity(graph: ProcessGraph) -> float:
    """Share of zeros among the weights of all projections, each counted once however many synapses share it."""
    weights = [p.operator.weight for p in graph.projections if not _is_bias(graph, p)]
    stored = sum(weight.size for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / stored if stored else 0.0


def _is_bias(graph: ProcessGraph, projection: Projection) -> bool:
    source = graph.node(projection.source)
    return isinstance(source, Input) and source.constant


def _unpooled(operator: Operator) -> Operator:
    """The operator as it sees its input after pooling."""
    return replace(operator, in_shape=operator.pooled_shape, pool=None)


def _effective(
    graph: ProcessGraph, projection: Projection, trace: Trace, inputs: dict[str, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Effective operations, int64, and whether all values into the weights are 0 or 1, bool; both (samples, steps)."""
    effective = np.zeros((trace.samples, trace.steps), np.int64)
    binary = np.ones((trace.samples, trace.steps), bool)
    if _is_bias(graph, projection):
        return effective, binary
    source, operator = graph.node(projection.source), projection.operator
    graded = isinstance(source, Input) and source.message_bits > 1
    weights = _unpooled(operator).with_weight((operator.weight != 0).astype(np.float64))
    ones = torch.ones((1, *operator.out_shape), dtype=torch.float64)
    fan_out = weights.transpose_apply(ones).flatten()
    chunk = max(1, VALUES_PER_CHUNK // max(1, trace.steps * source.size))
    late = int(projection.recurrent)
    for start in range(0, trace.samples, chunk):
        part = slice(start, start + chunk)
        if isinstance(source, Input) and inputs is not None:
            sent = inputs[source.name][part]
        elif source.name in trace.packed:
            sent = trace.spikes(source.name, part)
        else:
            raise SpikeportError(
                f"the {trace.backend} trace holds no spikes of input {source.name!r}; give the inputs of its run."
            )
        sent = sent[:, : trace.steps - late]  # a recurrent projection carries the spikes of the step before
        values = torch.as_tensor(sent.astype(np.float64)).reshape(-1, *operator.in_shape)
        if operator.pool is not None:
            values = operator.pool.apply(values)
        values = values.reshape(*sent.shape[:2], fan_out.numel())
        sends = (values != 0).to(torch.float64)
        effective[part, late:] = (sends @ fan_out).round().to(torch.int64).numpy()
        exceeds = sends if graded and inputs is None else values > 1
        binary[part, late:] = ~exceeds.to(torch.bool).any(dim=2).numpy()
    return effective, binary


def _check_same_run(graph: ProcessGraph, trace: Trace, inputs: dict[str, np.ndarray]) -> None:
    samples = check_inputs(graph, inputs)
    if samples != trace.samples:
        raise SpikeportError(f"the {trace.backend} trace has {trace.samples} samples, but {samples} inputs were given.")
    for name, array in inputs.items():
        if name in trace.packed:
            sent = pack(array.reshape(*array.shape[:2], -1) != 0)
            if not np.array_equal(sent, trace.packed[name]):
                raise SpikeportError(f"input {name!r} is not the one that the {trace.backend} trace was made with.")

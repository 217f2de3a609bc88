"""The reference run of a `ProcessGraph` in torch: batched, sample by sample, layer by layer and without pipeline delay.

Integer graphs follow `spikeport.models.loihi_integers` exactly: synaptic sums are computed in the narrowest floating
type that holds every possible sum of that projection without rounding. Float graphs run in float64.

A feed-forward projection carries spikes within a sample step; a recurrent one carries those of the step before.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from spikeport.converters.graph import FloatNeuron, LoihiNeuron, Population, ProcessGraph, Projection
from spikeport.models.errors import QuantizationError
from spikeport.models.loihi_integers import IntegerState, integer_step, shift_bias


@dataclass(eq=False)
class Run:
    """What a batch left. Tensors of shape (samples, steps, *shape) by population name.

    spikes: uint8. currents: summed synaptic input `a`, only if recorded. u, v: after the step (v after reset), only if
    recorded. active: bool, neurons that had a state, an input or a bias at that step. membrane: (samples, *shape), v of
    the population that a membrane readout reads, after the last step; None for other readouts.
    """

    spikes: dict[str, torch.Tensor] = field(default_factory=dict)
    currents: dict[str, torch.Tensor] = field(default_factory=dict)
    u: dict[str, torch.Tensor] = field(default_factory=dict)
    v: dict[str, torch.Tensor] = field(default_factory=dict)
    active: dict[str, torch.Tensor] = field(default_factory=dict)
    membrane: torch.Tensor | None = None


class Reference:
    """A graph prepared to run on a device; use it for many batches."""

    def __init__(self, graph: ProcessGraph, device: str | torch.device = "cpu") -> None:
        self.graph = graph
        self.device = torch.device(device)
        self.neurons = {p.name: _PreparedNeuron(p, self.device) for p in graph.populations}
        self.projections = {p.name: _PreparedProjection(graph, p, self.device) for p in graph.projections}

    @torch.no_grad()
    def run(self, inputs: dict[str, np.ndarray], record: bool = False) -> Run:
        """Run a batch. inputs: (samples, steps, *shape) integers by input name, constant inputs left out."""
        graph = self.graph
        samples = next(iter(inputs.values())).shape[0]
        sent = {
            name: torch.as_tensor(np.ascontiguousarray(array), device=self.device) for name, array in inputs.items()
        }
        for node in graph.inputs:
            if node.constant:
                sent[node.name] = torch.ones((samples, graph.steps, *node.shape), dtype=torch.uint8, device=self.device)
        for population in graph.populations:
            shape = (samples, graph.steps, *population.shape)
            sent[population.name] = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        run = Run(spikes={population.name: sent[population.name] for population in graph.populations})
        states = {p.name: self.neurons[p.name].rest(samples) for p in graph.populations}
        for t in range(graph.steps):
            for population in graph.populations:
                name = population.name
                a = self._input(name, sent, t, samples)
                before = states[name]
                states[name], spikes = self.neurons[name].step(before, a)
                sent[name][:, t] = spikes
                _store(run.active, name, t, graph.steps, self.neurons[name].active(before, a))
                if record:
                    for target, value in ((run.currents, a), (run.u, states[name].u), (run.v, states[name].v)):
                        _store(target, name, t, graph.steps, value)
        if graph.probed is not None:
            run.membrane = states[graph.probed.name].v
        return run

    def _input(self, name: str, sent: dict[str, torch.Tensor], t: int, samples: int) -> torch.Tensor:
        population = self.graph.population(name)
        total = torch.zeros((samples, *population.shape), dtype=self.neurons[name].dtype, device=self.device)
        for projection in self.graph.incoming(name):
            when = t - 1 if projection.recurrent else t
            if when >= 0:
                total += self.projections[projection.name].apply(sent[projection.source][:, when], total)
        return total


def _store(target: dict[str, torch.Tensor], name: str, t: int, steps: int, value: torch.Tensor) -> None:
    if name not in target:
        target[name] = torch.zeros((value.shape[0], steps, *value.shape[1:]), dtype=value.dtype, device=value.device)
    target[name][:, t] = value


class _PreparedNeuron:
    """A population's parameters as tensors, shaped to broadcast over (samples, *shape)."""

    def __init__(self, population: Population, device: torch.device) -> None:
        self.shape = population.shape
        self.neuron = population.neuron
        self.device = device
        self.dtype = torch.int64 if isinstance(self.neuron, LoihiNeuron) else torch.float64

        def tensor(value: np.ndarray) -> torch.Tensor:
            array = np.asarray(value)
            whole = array if array.ndim == 0 else array.reshape(self.shape)
            return torch.as_tensor(whole, dtype=self.dtype, device=device)

        if isinstance(self.neuron, LoihiNeuron):
            self.du, self.dv, self.vth = (tensor(v) for v in (self.neuron.du, self.neuron.dv, self.neuron.vth))
            self.bias = shift_bias(tensor(self.neuron.bias_mant), tensor(self.neuron.bias_exp))
        else:
            self.current_keep, self.voltage_keep = tensor(self.neuron.current_keep), tensor(self.neuron.voltage_keep)
            self.threshold, self.bias = tensor(self.neuron.threshold), tensor(self.neuron.bias)

    def rest(self, samples: int) -> IntegerState:
        zero = torch.zeros((samples, *self.shape), dtype=self.dtype, device=self.device)
        return IntegerState(zero, zero)

    def active(self, before: IntegerState, a: torch.Tensor) -> torch.Tensor:
        return (before.u != 0) | (before.v != 0) | (a != 0) | (self.bias != 0)

    def step(self, state: IntegerState, a: torch.Tensor) -> tuple[IntegerState, torch.Tensor]:
        neuron = self.neuron
        if isinstance(neuron, LoihiNeuron):
            return integer_step(
                state,
                a,
                du=self.du,
                dv=self.dv,
                vth=self.vth,
                bias=self.bias,
                ds_offset=neuron.ds_offset,
                reset=neuron.reset,
            )
        u = self.current_keep * state.u + a
        v = self.voltage_keep * state.v + u + self.bias
        spikes = v > self.threshold
        after = v - self.threshold if neuron.reset == "subtract" else torch.zeros_like(v)
        return IntegerState(u, torch.where(spikes, after, v)), spikes


class _PreparedProjection:
    """A projection whose sums are exact in `dtype`."""

    def __init__(self, graph: ProcessGraph, projection: Projection, device: torch.device) -> None:
        self.projection = projection
        self.dtype = torch.float64
        target = graph.population(projection.target)
        if isinstance(target.neuron, FloatNeuron):
            return
        source = graph.node(projection.source)
        payload = (1 << getattr(source, "message_bits", 1)) - 1
        bound = projection.operator.magnitude_bound() * payload
        if bound >= 2**53:
            raise QuantizationError(f"sums of projection {projection.name!r} exceed 53 bits and cannot be exact.")
        self.dtype = torch.float32 if bound < 2**24 else torch.float64

    def apply(self, spikes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        operator = self.projection.operator
        out = operator.apply(spikes.reshape(-1, *operator.in_shape).to(self.dtype)).reshape(like.shape)
        if like.dtype != torch.int64:
            return out * 2.0**self.projection.exponent
        exact = out.to(torch.int64)
        exponent = self.projection.exponent
        return exact << exponent if exponent >= 0 else exact >> -exponent

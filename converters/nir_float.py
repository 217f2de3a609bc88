"""Running any NIR graph in floats: node by node, step by step, batched over samples, in float64.

This is what the file itself says, without lowering: integrators in the middle of a network, thresholds by themselves,
delays of any length and loops run here, whether or not a chip can do them. `spikeport.converters.nir_timing` has the
equations of a step, and `spikeport.converters.nir_graph.schedule` says what a loop carries from step to step.

    Delay       y[t] = x[t - k] for k whole steps; between whole steps, the mean over the step of the delayed input:
                y[t] = (1 - f) x[t - k] + f x[t - k - 1]
    Threshold   1 where x > threshold, else 0

Before the first step, for delays and loops, no input comes and nothing fires; linear nodes send their bias.
"""

from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import nir
import numpy as np
import torch
import torch.nn.functional as F

from spikeport.converters.nir_graph import NEURONS, POPULATIONS, SPIKING, out_shape, plain, schedule, wiring_order
from spikeport.converters.nir_timing import Timing, dynamics, timing_of
from spikeport.models.errors import GraphError

Step = Callable[[torch.Tensor], torch.Tensor]


class FloatNetwork:
    """A NIR graph prepared to run; use it for many batches.

    Args:
        dt, reset, discretization: as in `spikeport.converters.nir_timing.timing_of`.

    Raises GraphError naming the node that is wrong, or the choice that is missing.
    """

    def __init__(
        self,
        graph: nir.NIRGraph,
        name: str,
        *,
        dt: float | None = None,
        reset: str | None = None,
        discretization: str | None = None,
    ) -> None:
        self.graph = plain(graph, name)
        self.timing = timing_of(self.graph, name, dt=dt, reset=reset, discretization=discretization)
        self.order, self.recurrent = schedule(self.graph, holding_nodes(self.graph, self.timing))
        self._sources: dict[str, list[str]] = {key: [] for key in self.graph.nodes}
        for source, target in self.graph.edges:
            self._sources[target].append(source)

    @torch.no_grad()
    def run(self, inputs: dict[str, np.ndarray], record: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """What each node sends, float64 (samples, steps, *shape) by node name.

        Args:
            inputs: (samples, steps, *shape) by the name of the Input node.
            record: nodes to give back; all of them by default.
        """
        samples, steps = self._check(inputs)
        fed = {key: torch.as_tensor(np.ascontiguousarray(array)) for key, array in inputs.items()}
        kept = set(self.graph.nodes) if record is None else set(record)
        sent = {
            key: torch.zeros((samples, steps, *out_shape(self.graph.nodes[key])), dtype=torch.float64) for key in kept
        }
        work = {key: _step(key, self.graph.nodes[key], self.timing, samples, steps) for key in self.order}
        last = self._before(work, samples)
        # a node that holds its input back sends before that input is known
        holding = [key for key in self.order if isinstance(work[key], _Held)]
        for t in range(steps):
            now: dict[str, torch.Tensor] = {}
            for key in self.order:
                held = work[key]
                if isinstance(self.graph.nodes[key], nir.Input):
                    now[key] = fed[key][:, t].to(torch.float64)
                elif isinstance(held, _Held):
                    now[key] = held.sent()
                else:
                    now[key] = held(self._arriving(key, now, last))
                if key in kept:
                    sent[key][:, t] = now[key]
            for key in holding:
                work[key](self._arriving(key, now, last))
            last = now
        return sent

    def _before(self, work: dict[str, Step], samples: int) -> dict[str, torch.Tensor]:
        """What each node sent before the first step; delays are filled with it."""
        sent: dict[str, torch.Tensor] = {}
        for key, node in self.graph.nodes.items():
            if isinstance(node, (nir.Input, *POPULATIONS)):
                sent[key] = torch.zeros((samples, *out_shape(node)), dtype=torch.float64)
        for key in wiring_order(self.graph):
            if key in sent:
                continue
            step = work[key]
            arriving = self._arriving(key, sent, sent)
            if isinstance(step, _Delay):
                step.fill(arriving)
                sent[key] = arriving
            else:
                sent[key] = step(arriving)
        return sent

    def _arriving(self, key: str, now: dict[str, torch.Tensor], last: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [(last if (source, key) in self.recurrent else now)[source] for source in self._sources[key]]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _check(self, inputs: dict[str, np.ndarray]) -> tuple[int, int]:
        wanted = {key: out_shape(node) for key, node in self.graph.nodes.items() if isinstance(node, nir.Input)}
        if set(inputs) != set(wanted):
            raise GraphError(f"inputs are given for {sorted(inputs)}, but the graph's are {sorted(wanted)}.")
        frames = {array.shape[:2] for array in inputs.values()}
        for key, array in inputs.items():
            if array.shape[2:] != wanted[key] or len(frames) > 1:
                raise GraphError(
                    f"input {key!r} is of shape {array.shape}; it takes (samples, steps, "
                    f"{', '.join(map(str, wanted[key]))}), with as many samples and steps as every other."
                )
        samples, steps = frames.pop()
        return samples, steps


def holding_nodes(graph: nir.NIRGraph, timing: Timing) -> frozenset[str]:
    """The Delay nodes that hold everything back for a step or more."""
    return frozenset(
        key
        for key, node in graph.nodes.items()
        if isinstance(node, nir.Delay) and float(np.min(node.delay)) >= timing.dt * (1 - 1e-6)
    )


def _step(key: str, node: nir.NIRNode, timing: Timing, samples: int, steps: int) -> Step:
    """What a node does with what arrives in a step."""
    match node:
        case nir.Input() | nir.Output():
            return lambda x: x
        case nir.Linear() | nir.Affine():
            weight = _tensor(node.weight)
            bias = _tensor(node.bias) if isinstance(node, nir.Affine) else None
            return lambda x: F.linear(x, weight, bias)
        case nir.Conv1d() | nir.Conv2d():
            return _convolution(node)
        case nir.SumPool2d() | nir.AvgPool2d():
            kernel, stride, padding = node.kernel_size, node.stride, node.padding
            divisor = 1 if isinstance(node, nir.SumPool2d) else None
            return lambda x: F.avg_pool2d(x, kernel, stride, padding, divisor_override=divisor)
        case nir.Flatten():
            shape = out_shape(node)
            return lambda x: x.reshape(len(x), *shape)
        case nir.Scale():
            scale = _tensor(node.scale)
            return lambda x: x * scale
        case nir.Threshold():
            threshold = _tensor(node.threshold)
            return lambda x: (x > threshold).to(x.dtype)
        case nir.Delay():
            delay = _tensor(node.delay) / timing.dt
            delay = delay.clamp(max=steps)  # and nothing of it arrives within the sample
            whole = (delay + 1e-6).floor()  # what is a whole number of steps but for rounding is one
            kind = _Held if int(whole.min()) >= 1 else _Delay
            return kind(whole.to(torch.int64), (delay - whole).clamp(min=0.0), samples)
    if isinstance(node, NEURONS):
        return _Neuron(key, node, timing, samples)
    raise TypeError(f"no equation for a {type(node).__name__}.")


def _convolution(node: nir.Conv1d | nir.Conv2d) -> Step:
    function: Callable[..., torch.Tensor] = F.conv1d if isinstance(node, nir.Conv1d) else F.conv2d
    geometry: tuple[Any, ...] = (node.stride, node.padding, node.dilation, node.groups)
    weight, bias = _tensor(node.weight), _tensor(node.bias)
    return lambda x: function(x, weight, bias, *geometry)


def _tensor(value: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(value, dtype=np.float64))


class _Neuron:
    """A neuron's state, from rest."""

    def __init__(self, key: str, node: nir.NIRNode, timing: Timing, samples: int) -> None:
        made = dynamics(key, node, timing)
        self.current_keep, self.current_gain = _tensor(made.current_keep), _tensor(made.current_gain)
        self.voltage_keep, self.voltage_gain = _tensor(made.voltage_keep), _tensor(made.voltage_gain)
        self.leak = _tensor(made.leak)
        self.fires = isinstance(node, SPIKING)
        self.subtracts = timing.reset == "subtract"
        self.threshold = _tensor(node.v_threshold) if self.fires else torch.zeros(())
        self.reset = _tensor(node.v_reset) if self.fires else torch.zeros((), dtype=torch.float64)
        check_reset(key, node, timing)
        self.current = torch.zeros((samples, *out_shape(node)), dtype=torch.float64)
        self.voltage = self.current + self.reset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.current = self.current_keep * self.current + self.current_gain * x
        self.voltage = self.voltage_keep * self.voltage + self.voltage_gain * self.current + self.leak
        if not self.fires:
            return self.voltage
        spikes = self.voltage > self.threshold
        after = self.voltage - self.threshold if self.subtracts else self.reset
        self.voltage = torch.where(spikes, after, self.voltage)
        return spikes.to(torch.float64)


def check_reset(key: str, node: nir.NIRNode, timing: Timing) -> None:
    """Raises GraphError where a neuron has a reset potential that its reset does not use."""
    if isinstance(node, SPIKING) and timing.reset == "subtract" and np.any(np.asarray(node.v_reset) != 0):
        raise GraphError(
            f"node {key!r} ({type(node).__name__}): it has a reset potential other than 0, and reset 'subtract' knows "
            "none; give reset 'zero', which puts a membrane that fired to v_reset."
        )


class _Delay:
    """What arrived in the last steps, newest first; each element takes its own."""

    def __init__(self, whole: torch.Tensor, rest: torch.Tensor, samples: int) -> None:
        self.rest = rest
        self.samples = samples
        self.places = [whole, whole + 1]
        self.line: deque[torch.Tensor] = deque(maxlen=int(whole.max()) + 2)

    def fill(self, x: torch.Tensor) -> None:
        """As if x had arrived for ever."""
        self.line.extend([x] * (self.line.maxlen or 0))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.line.appendleft(x)
        return self._taken(0)

    def _taken(self, ahead: int) -> torch.Tensor:
        """What leaves now, where the newest of the line is `ahead` steps old."""
        near, far = (self._at(place - ahead) for place in self.places)
        return (1 - self.rest) * near + self.rest * far

    def _at(self, place: torch.Tensor) -> torch.Tensor:
        first = int(place.flatten()[0])
        if bool((place == first).all()):
            return self.line[first]
        stacked = torch.stack(list(self.line))
        index = place.expand(1, self.samples, *place.shape)
        return stacked.gather(0, index)[0]


class _Held(_Delay):
    """A delay of a step or more: what leaves does not wait for what arrives."""

    def sent(self) -> torch.Tensor:
        return self._taken(1)

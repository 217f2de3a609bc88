"""From continuous time to steps: dt, reset and discretisation of a NIR graph, and what they make of a neuron.

NIR describes neurons by differential equations and stores neither dt, nor the reset, nor how to discretise. All three
are taken from the file's metadata where it has them, else from the caller; nothing is guessed.

A step of dt multiplies what is there by a factor and adds the rest from the drive, which is held over the step:

    keep = 1 - dt/tau            "euler", forward Euler; needs tau >= dt
    keep = exp(-dt/tau)          "exponential", the exact solution for a drive that is constant over the step

    CubaLIF, CubaLI   I = keep_syn I + (1 - keep_syn) w_in x,  then  v = keep_mem v + (1 - keep_mem) (v_leak + r I)
    LIF, LI           v = keep v + (1 - keep) (v_leak + r x)
    IF, I             v = v + dt r x
    spike             where v > v_threshold; then v = v_reset ("zero") or v - v_threshold ("subtract")

A neuron starts at v_reset, and I at 0. The two equations of a current-based neuron are solved in turn, the current
first: this is the order of Norse, snnTorch and SpikingJelly.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import nir
import numpy as np

from spikeport.converters.graph import Reset
from spikeport.converters.nir_graph import NEURONS, SPIKING, TIME_CONSTANTS
from spikeport.models.errors import GraphError

Discretization = Literal["euler", "exponential"]


@dataclass(frozen=True)
class Timing:
    """How a graph runs in steps. dt in seconds (or in whatever unit the file's time constants are)."""

    dt: float
    reset: Reset
    discretization: Discretization


@dataclass(frozen=True, eq=False)
class Dynamics:
    """A neuron in steps: I = current_keep I + current_gain x; v = voltage_keep v + voltage_gain I + leak.

    Neurons without a synaptic filter have current_keep 0 and current_gain 1. Arrays of the neurons' shape, or of ().
    """

    current_keep: np.ndarray
    current_gain: np.ndarray
    voltage_keep: np.ndarray
    voltage_gain: np.ndarray
    leak: np.ndarray

    @property
    def gain(self) -> np.ndarray:
        """What one unit of weighted input adds to the membrane in the step in which it arrives."""
        product: np.ndarray = self.current_gain * self.voltage_gain
        return product


def timing_of(
    graph: nir.NIRGraph,
    name: str,
    *,
    dt: float | None = None,
    reset: str | None = None,
    discretization: str | None = None,
) -> Timing:
    """What the metadata of a plain graph's neurons and the caller agree on.

    dt and reset are needed in one of the two places (reset only where a neuron fires); discretization is "euler" where
    neither says otherwise. Raises GraphError where one is missing, unknown or contradictory.
    """
    neurons = {key: node for key, node in graph.nodes.items() if isinstance(node, NEURONS)}
    spiking = {key: node for key, node in neurons.items() if isinstance(node, SPIKING)}
    in_time = any(isinstance(node, nir.Delay) for node in graph.nodes.values())
    step = _agreed(graph, name, neurons, "dt", dt, needed=bool(neurons) or in_time)
    mode = _agreed(graph, name, spiking, "reset", reset, needed=bool(spiking))
    scheme = _agreed(graph, name, neurons, "discretization", discretization, needed=False)
    return Timing(1.0 if step is None else step, mode or "zero", scheme or "euler")


_CHOICES: dict[str, tuple[str, ...]] = {"reset": get_args(Reset), "discretization": get_args(Discretization)}


def _agreed(graph: nir.NIRGraph, name: str, nodes: dict[str, nir.NIRNode], field: str, given: Any, needed: bool) -> Any:
    found = {key: node.metadata[field] for key, node in nodes.items() if field in (node.metadata or {})}
    own = graph.metadata if isinstance(graph.metadata, dict) else {}
    values = {key: _checked(f"node {key!r}", field, value) for key, value in found.items()}
    if field in own:
        values["the graph"] = _checked("the graph", field, own[field])
    if given is not None:
        values["the argument"] = _checked("the argument", field, given)
    different = sorted(set(values.values()), key=str)
    if len(different) > 1:
        raise GraphError(f"{name}: {field} is contradictory: {', '.join(map(str, different))}.")
    if not different:
        if needed:
            raise GraphError(
                f"{name}: {field} is not recorded in the file and was not given. NIR has no field for it; {_ASK[field]}"
                f"\n{what_others_mean(graph)}"
            )
        return None
    return different[0]


_ASK = {
    "dt": "give dt (--dt), the length of a step in the unit of the time constants.",
    "reset": "give reset (--reset): 'zero' puts a membrane that fired to v_reset, 'subtract' takes the threshold off.",
}


def _checked(where: str, field: str, value: Any) -> Any:
    if field in _CHOICES:
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if text not in _CHOICES[field]:
            choices = " or ".join(map(repr, _CHOICES[field]))
            raise GraphError(f"{where}: {field} = {str(text)[:40]!r} is unknown; it is {choices}.")
        return str(text)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise GraphError(f"{where}: {field} = {str(value)[:40]} must be a positive number.")
    return number


def what_others_mean(graph: nir.NIRGraph) -> str:
    """One line: what Norse, snnTorch, Sinabs and SpikingJelly make of this very graph when they import it."""
    smallest = min(
        (
            (float(np.min(getattr(node, constant))), constant, key)
            for key, node in graph.nodes.items()
            for constant in TIME_CONSTANTS
            if hasattr(node, constant)
        ),
        default=None,
    )
    if smallest is None:
        return (
            "No time constants here: Norse and Sinabs add inputs to an IF as if r dt were 1 (reset zero; Sinabs "
            "subtract), SpikingJelly asks for r dt = 1 with dt=1e-4 unless told, snnTorch has no IF."
        )
    tau, constant, key = smallest
    return (
        f"{constant} = {tau:g} of {key!r} is {tau / 1e-3:g} steps to Norse (dt=1e-3, reset zero), {tau / 1e-4:g} to "
        f"snnTorch (dt=1e-4, zero) and SpikingJelly (dt=1e-4 unless told, zero), {tau:g} to Sinabs (dt=1, subtract, "
        "exponential)."
    )


def dynamics(key: str, node: nir.NIRNode, timing: Timing) -> Dynamics:
    """A neuron of a plain graph in steps. Raises GraphError where Euler's step is too long for a time constant."""
    one, zero = np.ones(()), np.zeros(())
    resistance = np.asarray(node.r, dtype=np.float64)
    if isinstance(node, (nir.IF, nir.I)):
        return Dynamics(zero, one, one, timing.dt * resistance, zero)
    cuba = isinstance(node, (nir.CubaLIF, nir.CubaLI))
    keep, gain = _factors(key, "tau_mem" if cuba else "tau", node, timing)
    leak = gain * np.asarray(node.v_leak, dtype=np.float64)
    if not cuba:
        return Dynamics(zero, one, keep, gain * resistance, leak)
    current_keep, current_gain = _factors(key, "tau_syn", node, timing)
    weight = np.asarray(node.w_in, dtype=np.float64)
    return Dynamics(current_keep, current_gain * weight, keep, gain * resistance, leak)


def _factors(key: str, constant: str, node: nir.NIRNode, timing: Timing) -> tuple[np.ndarray, np.ndarray]:
    """keep and 1 - keep, each rounded once."""
    tau = np.asarray(getattr(node, constant), dtype=np.float64)
    ratio = timing.dt / tau
    if timing.discretization == "exponential":
        return np.exp(-ratio), -np.expm1(-ratio)
    if np.any(tau < timing.dt):
        raise GraphError(
            f"node {key!r}: {constant} = {float(tau.min()):g} s is shorter than dt = {timing.dt:g} s, and Euler's step "
            "would overshoot; give a smaller dt or discretization 'exponential'."
        )
    return 1 - ratio, ratio


def whole_steps(key: str, node: nir.Delay, timing: Timing) -> np.ndarray:
    """The delay of each element in steps, int64. Raises GraphError where it is no whole number of steps."""
    exact = np.asarray(node.delay, dtype=np.float64) / timing.dt
    steps = np.rint(exact)
    if np.any(np.abs(exact - steps) > 1e-6 * np.maximum(steps, 1)):
        worst = float(exact.flat[int(np.argmax(np.abs(exact - steps)))])
        raise GraphError(f"node {key!r} (Delay): {worst:g} steps of dt = {timing.dt:g} s is no whole number of steps.")
    return steps.astype(np.int64)

"""Post-training quantisation to Loihi's integers by a calibrated scale search.

One scale per population takes its threshold, its bias and every weight into it to integers together: with S integers
per unit of input, w_int 2^exponent = S w, vth = S threshold, bias = 64 S bias (bias and states carry six more bits).
Decays become du = round(4096 (1 - current_keep)) - 1 and dv = round(4096 (1 - voltage_keep)). Mixed-sign weights of
8 bits are even, so they have 255 levels from -256 to 254.

The scale is searched on sample data, population by population in topological order: each candidate runs the integer
population on the spikes that the already quantised populations before it really send, and the one whose spikes differ
least from the float network's wins; the error of the weights decides a draw. A population whose membrane is the readout
sends no spikes: there the share of samples that are decided otherwise and the error of the last membrane count, and v
has to stay within half of its range on the sample data, as beyond the largest threshold it would fire.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from spikeport.converters.graph import (
    FloatNeuron,
    Input,
    LoihiNeuron,
    Population,
    ProcessGraph,
    Projection,
    Readout,
    with_populations,
)
from spikeport.converters.reference import Reference
from spikeport.models.errors import QuantizationError
from spikeport.models.loihi_integers import (
    BIAS_MANT_LIMIT,
    DECAY_UNITY,
    MAX_BIAS_EXP,
    MAX_DECAY,
    MAX_THRESHOLD,
    STATE_LIMIT,
    THRESHOLD_SHIFT,
    WEIGHT_RANGE,
)
from spikeport.models.readouts import decide

WEIGHT_BITS = 8
STEP_BEFORE = " (step before)"
"""Marks the source of a projection that carries the spikes of the step before, where it is cut off as an input."""
MAX_WEIGHT_EXPONENT = 7
HEADROOM = 0.5
"""Share of the range of u that the calibration data may fill; beyond the whole of it u would wrap. For a membrane that
is read, of the range of v."""
CANDIDATES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5)
"""Scales tried, as multiples of the one at which the largest weight just fits; above 1 the largest are clipped."""


@dataclass(frozen=True)
class LayerError:
    """What quantisation did to one population on the calibration data.

    scale: integers per unit of input. weight_error, current_error: root mean square error over root mean square value.
    spike_error: share of neuron-steps that differ from the float network. headroom: largest |u| seen over 2^23, where
    u would wrap.

    Of a population whose membrane is the readout, headroom is that of v too, which saturates at 2^23. membrane_error:
    root mean square error of v after the last step over its root mean square value. decision_error: share of samples
    that are decided otherwise. Both are None elsewhere.
    """

    population: str
    scale: float
    weight_bits: int
    clipped_weights: float
    weight_error: float
    current_error: float
    spike_error: float
    headroom: float
    threshold: int
    membrane_error: float | None = None
    decision_error: float | None = None

    @property
    def rank(self) -> tuple[float, ...]:
        """The scale of the smallest rank wins."""
        if self.membrane_error is None or self.decision_error is None:
            return self.spike_error, self.weight_error
        return float(self.headroom > HEADROOM), self.decision_error, self.membrane_error, self.weight_error


@dataclass(frozen=True)
class QuantizationReport:
    """Errors per population and the share of calibration samples decided as the float network decides."""

    samples: int
    layers: tuple[LayerError, ...]

    def to_json(self) -> dict[str, Any]:
        return {"samples": self.samples, "layers": [asdict(layer) for layer in self.layers]}


def quantize(
    graph: ProcessGraph,
    calibration: dict[str, np.ndarray],
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[ProcessGraph, QuantizationReport]:
    """Quantise a float graph.

    Args:
        calibration: sample inputs (samples, steps, *shape) by input name.
        on_step: called with (trials done, trials in all).

    Raises QuantizationError naming the population whose values have no integer form.
    """
    _check_finite(graph)
    truth = Reference(graph).run(calibration, record=True)
    sent = dict(calibration)
    done, trials = 0, len(graph.populations) * len(CANDIDATES)
    populations: dict[str, Population] = {}
    projections: dict[str, Projection] = {}
    errors: list[LayerError] = []
    for population in graph.populations:
        incoming = graph.incoming(population.name)
        best: tuple[Population, list[Projection], LayerError] | None = None
        refusal: QuantizationError | None = None
        reach = float(truth.u[population.name].abs().max())
        if population is graph.probed:
            reach = max(reach, float(truth.v[population.name].abs().max()))
        largest = largest_scale(population, incoming, reach)
        for fraction in CANDIDATES:
            scale = fraction * largest
            try:
                candidate, scaled = _at_scale(population, incoming, scale)
            except QuantizationError as error_at_scale:
                refusal = error_at_scale
                continue
            error = _measure(graph, population, candidate, incoming, scaled, sent, truth, scale)
            if best is None or error.rank < best[2].rank:
                best = (candidate, scaled, error)
            done += 1
            if on_step:
                on_step(done, trials)
        if best is None:
            raise refusal or QuantizationError(f"population {population.name!r} has no scale.")
        populations[population.name], chosen, error = best
        projections |= {projection.name: projection for projection in chosen}
        errors.append(error)
        alone = _alone(graph, populations[population.name], chosen, sent)
        sent[population.name] = alone.run(_feeds(alone.graph, sent)).spikes[population.name].numpy()
    integer = replace(
        with_populations(graph, populations.values()),
        projections=tuple(projections[projection.name] for projection in graph.projections),
    )
    samples = next(iter(calibration.values())).shape[0]
    return integer, QuantizationReport(samples, tuple(errors))


def largest_scale(population: Population, incoming: list[Projection], reach: float) -> float:
    """The scale at which the weights of the projection with the smallest range just fill 8 bits.

    Projections with larger weights take an exponent, and those beyond the largest exponent ask for a smaller scale. So
    may the bias, the threshold's 17 bits, unless it is infinite, and u: `reach`, the largest |u| of the float network
    on the calibration data (or |v|, where the membrane is read), must stay inside 24 bits with room left.
    """
    neuron = population.neuron
    if not isinstance(neuron, FloatNeuron):
        raise QuantizationError(f"population {population.name!r} is already quantised.")
    peaks = [peak for projection in incoming if (peak := _peak(projection)) > 0]
    scales = [min(254.0 / min(peaks), 254.0 * 2**MAX_WEIGHT_EXPONENT / max(peaks)) if peaks else 1.0]
    bias = float(np.max(np.abs(neuron.bias)))
    if bias > 0:
        scales.append((BIAS_MANT_LIMIT - 1) * 2**MAX_BIAS_EXP / 2**THRESHOLD_SHIFT / bias)
    threshold = float(np.max(np.abs(neuron.threshold)))
    if 0 < threshold < np.inf:
        scales.append(0.5 * MAX_THRESHOLD / threshold)
    if reach > 0:
        scales.append(HEADROOM * STATE_LIMIT / 2**THRESHOLD_SHIFT / reach)
    return min(scales)


def _check_finite(graph: ProcessGraph) -> None:
    for projection in graph.projections:
        if not np.isfinite(projection.operator.weight).all():
            raise QuantizationError(f"projection {projection.name!r} holds weights that are NaN or infinite.")
    for population in graph.populations:
        if isinstance(population.neuron, FloatNeuron):
            for entry in fields(population.neuron):
                value = getattr(population.neuron, entry.name)
                integrates = entry.name == "threshold" and population is graph.probed
                if isinstance(value, np.ndarray) and not integrates and not np.isfinite(value).all():
                    raise QuantizationError(f"population {population.name!r}: its {entry.name} is NaN or infinite.")


def _peak(projection: Projection) -> float:
    weight = projection.operator.weight
    return float(np.abs(weight).max()) if weight.size else 0.0


def _at_scale(population: Population, incoming: list[Projection], scale: float) -> tuple[Population, list[Projection]]:
    neuron = population.neuron
    if not isinstance(neuron, FloatNeuron):
        raise QuantizationError(f"population {population.name!r} is already quantised.")
    du = np.rint(DECAY_UNITY * (1 - neuron.current_keep)).astype(np.int64) - 1
    dv = np.rint(DECAY_UNITY * (1 - neuron.voltage_keep)).astype(np.int64)
    integrates = np.isposinf(neuron.threshold).all()
    vth = np.asarray(MAX_THRESHOLD) if integrates else np.rint(scale * neuron.threshold).astype(np.int64)
    name = population.name
    if np.any((du < -1) | (du > MAX_DECAY)) or np.any((dv < 0) | (dv > DECAY_UNITY)):
        raise QuantizationError(f"population {name!r} has decays outside 0..1.")
    if np.any(vth < 0) or np.any(vth > MAX_THRESHOLD):
        raise QuantizationError(
            f"population {name!r}: thresholds {int(vth.min())}..{int(vth.max())} do not fit 17 bits unsigned."
        )
    mant, exponent = _bias(name, scale * 2**THRESHOLD_SHIFT * neuron.bias)
    integers = LoihiNeuron(np.maximum(du, 0), np.minimum(dv, MAX_DECAY), vth, mant, exponent, 1, neuron.reset)
    return replace(population, neuron=integers), [_scaled(projection, scale) for projection in incoming]


def _bias(name: str, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    peak = float(np.abs(bias).max()) if np.size(bias) else 0.0
    exponent = max(0, int(np.ceil(np.log2(peak / (BIAS_MANT_LIMIT - 1))))) if peak > 0 else 0
    if exponent > MAX_BIAS_EXP:
        raise QuantizationError(f"population {name!r}: its bias needs an exponent of {exponent}, the chip has 3 bits.")
    return np.rint(bias / 2**exponent).astype(np.int64), np.asarray(exponent, dtype=np.int64)


def _scaled(projection: Projection, scale: float) -> Projection:
    weight = projection.operator.weight * scale
    peak = float(np.abs(weight).max()) if weight.size else 0.0
    # clipping at scales above the largest one is wanted, an exponent only where another projection forces the scale
    exponent = max(0, int(np.ceil(np.log2(peak / (254.0 * max(CANDIDATES)))))) if peak > 0 else 0
    if exponent > MAX_WEIGHT_EXPONENT:
        raise QuantizationError(
            f"projection {projection.name!r}: its weights are {2**exponent} times larger than the smallest ones into "
            f"{projection.target!r}; 8 bits and an exponent of {MAX_WEIGHT_EXPONENT} cannot hold both."
        )
    low, high, step = WEIGHT_RANGE[sign_mode(weight)]
    integers = np.clip(np.rint(weight / (step * 2**exponent)) * step, low, high).astype(np.int16)
    if peak > 0 and not integers.any():
        raise QuantizationError(
            f"projection {projection.name!r}: beside the other weights of {projection.target!r}, its threshold or its "
            "bias the weights round to nothing."
        )
    return replace(projection, operator=projection.operator.with_weight(integers), exponent=exponent)


def sign_mode(weight: np.ndarray) -> str:
    """mixed, excitatory or inhibitory, as the chip's synapse formats know them."""
    if not weight.size or weight.min() >= 0:
        return "excitatory"
    return "inhibitory" if weight.max() <= 0 else "mixed"


def _alone(graph: ProcessGraph, population: Population, incoming: list[Projection], sent: dict[str, Any]) -> Reference:
    """The population by itself, fed with spikes that other populations have sent, now or in the step before."""
    name = population.name
    inputs: list[Input] = []
    late = [projection for projection in incoming if projection.recurrent and projection.source != name]
    renamed = {projection.name: projection.source + STEP_BEFORE for projection in late}
    for label in sorted({renamed.get(projection.name, projection.source) for projection in incoming} - {name}):
        source = label.removesuffix(STEP_BEFORE)
        node = graph.node(source)
        if isinstance(node, Population):
            if source not in sent:
                raise QuantizationError(
                    f"population {name!r} is in a loop with {source!r}; quantising loops over several "
                    "populations is not supported."
                )
            inputs.append(Input(label, node.shape))
        else:
            inputs.append(node)
    straight = tuple(
        replace(p, delay=0, source=renamed.get(p.name, p.source), recurrent=p.recurrent and p.name not in renamed)
        for p in incoming
    )
    readout = graph.readout if graph.readout.population == name else Readout(name)
    cut = ProcessGraph(
        graph.name, graph.steps, graph.dt, tuple(inputs), (replace(population, stage=1),), straight, readout
    )
    return Reference(cut)


def _feeds(cut: ProcessGraph, sent: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    feeds = {}
    for node in cut.event_inputs:
        spikes = sent[node.name.removesuffix(STEP_BEFORE)]
        if node.name.endswith(STEP_BEFORE):
            spikes = np.concatenate([np.zeros_like(spikes[:, :1]), spikes[:, :-1]], axis=1)
        feeds[node.name] = spikes
    return feeds


def _measure(
    graph: ProcessGraph,
    population: Population,
    candidate: Population,
    incoming: list[Projection],
    scaled: list[Projection],
    sent: dict[str, np.ndarray],
    truth: Any,
    scale: float,
) -> LayerError:
    alone = _alone(graph, candidate, scaled, sent)
    run = alone.run(_feeds(alone.graph, sent), record=True)
    name = population.name
    u = run.u[name].numpy()
    true_u = truth.u[name].numpy()
    unit = scale * 2**THRESHOLD_SHIFT
    largest = float(np.abs(u).max())
    membrane_error = decision_error = None
    if run.membrane is not None:
        last, true_last = run.membrane.flatten(1).numpy(), truth.membrane.flatten(1).numpy()
        largest = max(largest, float(run.v[name].abs().max()))
        membrane_error = _relative(last / unit, true_last)
        decided, wanted = (decide("membrane", 0.0, v) for v in (last, true_last))
        decision_error = float((decided != wanted).mean())
    weights = np.concatenate([projection.operator.weight.ravel() for projection in incoming])
    integers = np.concatenate([p.operator.weight.ravel() * 2.0**p.exponent for p in scaled])
    neuron = candidate.neuron
    return LayerError(
        population=name,
        scale=float(scale),
        weight_bits=WEIGHT_BITS,
        clipped_weights=float((np.abs(weights * scale - integers) > 2.0 ** max(p.exponent for p in scaled)).mean()),
        weight_error=_relative(integers / scale, weights),
        current_error=_relative(u / unit, true_u),
        spike_error=float((run.spikes[name].numpy() != truth.spikes[name].numpy()).mean()),
        headroom=largest / STATE_LIMIT,
        threshold=int(np.max(neuron.vth)) if isinstance(neuron, LoihiNeuron) else 0,
        membrane_error=membrane_error,
        decision_error=decision_error,
    )


def _relative(found: np.ndarray, true: np.ndarray) -> float:
    size = float(np.sqrt(np.mean(np.square(true))))
    return float(np.sqrt(np.mean(np.square(found - true)))) / size if size > 0 else 0.0

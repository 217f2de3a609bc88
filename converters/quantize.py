"""Post-training quantisation to Loihi's integers by a calibrated scale search.

One scale per population takes its threshold, its bias and every weight into it to integers together: with S integers
per unit of input, w_int 2^exponent = S w, vth = S threshold, bias = 64 S bias (bias and states carry six more bits).
Decays become du = round(4096 (1 - current_keep)) - 1 and dv = round(4096 (1 - voltage_keep)); they and the thresholds
have registers of their own, of 12 and 17 bits, and keep them whatever the bits of the weights. Weights of b bits have
2^b levels in the range of 8 bits: mixed-sign ones the multiples of 2^(9 - b) from -256 to below 256.

The scale is searched on sample data, population by population in topological order: each candidate runs the integer
population on the spikes that the already quantised populations before it really send, and the one whose spikes differ
least from the float network's wins, of those of whose spikes most agree with it if there are any; the error of the
weights decides a draw. A population whose membrane is the readout sends no spikes: there the share of samples that are
decided otherwise and the error of the last membrane count. u, and the v that is read, have to stay within half of their
range on the sample data: beyond it u wraps, and v would fire.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from spikeport.converters import slices as sliced
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
from spikeport.converters.operators import Conv2d, Dense
from spikeport.converters.reference import Reference, Run
from spikeport.models.errors import QuantizationError
from spikeport.models.loihi_integers import (
    BIAS_MANT_LIMIT,
    DECAY_UNITY,
    MAX_BIAS_EXP,
    MAX_DECAY,
    MAX_THRESHOLD,
    MAX_WEIGHT_BITS,
    MAX_WEIGHT_EXPONENT,
    MIN_WEIGHT_BITS,
    STATE_LIMIT,
    THRESHOLD_SHIFT,
    sign_mode,
    weight_range,
)
from spikeport.models.readouts import decide

STEP_BEFORE = " (step before)"
"""Marks the source of a projection that carries the spikes of the step before, where it is cut off as an input."""
HEADROOM = 0.5
"""Share of the range of u that the calibration data may fill; beyond the whole of it u would wrap. For a membrane that
is read, of the range of v."""
CANDIDATES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5)
"""Scales tried, as multiples of the one at which the largest weight just fits; above 1 the largest are clipped."""
CLIPPING = (1.7, 2.0, 2.4, 2.8, 3.4, 4.0, 4.8, 5.7, 6.8, 8.1)
"""Scales tried beside them where the levels are few: finer steps for most weights then pay for clipping the others."""
MOST_CLIPPED = {8: 1.5, 7: 1.7, 6: 2.0, 5: 2.8, 4: 4.0, 3: 5.7, 2: 8.1}
"""The largest scale tried, by bits."""

ROUGH = 0.5
"""Dice's distance of the spikes beyond which a population is kept only roughly."""
ROUNDING = 1e-9
"""What a scale that was computed to just fit may be beyond fitting, in powers of two."""


@dataclass(frozen=True)
class LayerError:
    """What quantisation did to one population on the calibration data.

    scale: integers per unit of input. weight_error, current_error: root mean square error over root mean square value.
    spike_error: share of neuron-steps that differ from the float network. spike_distance: the same neuron-steps over
    the spikes of both (Dice's distance): 0 where all spikes agree, 1 where none does, so that a silent population is as
    far away as can be, however rarely it should fire. headroom: largest |u| seen over 2^23, where u would wrap.
    current_decay_error, voltage_decay_error: largest difference in the share of u or v that survives a step.
    threshold_error: largest difference of a threshold, over the threshold.

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
    spike_distance: float
    headroom: float
    threshold: int
    current_decay_error: float
    voltage_decay_error: float
    threshold_error: float
    membrane_error: float | None = None
    decision_error: float | None = None

    def rank(self, room: float) -> tuple[float, ...]:
        """The scale of the smallest rank wins. room: share of the range of u that may be filled."""
        overfull = float(self.headroom > room)
        if self.membrane_error is None or self.decision_error is None:
            # where few spikes agree, those that do count: a silent population would differ at the fewest neuron-steps
            return overfull, max(self.spike_distance, ROUGH), self.spike_error, self.weight_error
        return overfull, self.decision_error, self.membrane_error, self.weight_error


@dataclass(frozen=True)
class QuantizationReport:
    """Errors of each population on so many calibration samples. graph: the float graph that the integers stand for,
    with the same spikes on these samples as the one that was given."""

    samples: int
    weight_bits: int
    layers: tuple[LayerError, ...]
    graph: ProcessGraph

    @property
    def scales(self) -> dict[str, float]:
        """Integers per unit of input, by population."""
        return {layer.population: layer.scale for layer in self.layers}

    def to_json(self) -> dict[str, Any]:
        layers = [asdict(layer) for layer in self.layers]
        return {"samples": self.samples, "weight_bits": self.weight_bits, "layers": layers}


def quantize(
    graph: ProcessGraph,
    calibration: dict[str, np.ndarray],
    on_step: Callable[[int, int], None] | None = None,
    bits: int = MAX_WEIGHT_BITS,
    slices: int = 1,
) -> tuple[ProcessGraph, QuantizationReport]:
    """Quantise a float graph.

    Args:
        calibration: sample inputs (samples, steps, *shape) by input name.
        on_step: called with (trials done, trials in all).
        bits: of a weight, 2..8.
        slices: 2 gives each weight of 8 bits a fine synapse beside the coarse one (`spikeport.converters.slices`).

    Raises QuantizationError naming the population whose values have no integer form.
    """
    if slices == 2 and (bits != MAX_WEIGHT_BITS or graph.probed is not None):
        what = (
            f"weights of {bits} bits"
            if graph.probed is None
            else f"the membrane of {graph.probed.name!r}, which is read"
        )
        raise QuantizationError(f"slices = 2 is for weights of 8 bits and decisions by spikes, not for {what}.")
    if not MIN_WEIGHT_BITS <= bits <= MAX_WEIGHT_BITS:
        raise QuantizationError(f"weights of {bits} bits are not possible; {MIN_WEIGHT_BITS}..{MAX_WEIGHT_BITS} are.")
    _check_finite(graph)
    truth = Reference(graph).run(calibration, record=True)
    if (in_range := _with_silent_ones_in_range(graph, truth, bits)) is not graph:
        graph, truth = in_range, Reference(in_range).run(calibration, record=True)
    sent = dict(calibration)
    scales = {population.name: _scales(graph, population, truth, bits, slices) for population in graph.populations}
    room = sliced.HEADROOM if slices == 2 else HEADROOM
    done, trials = 0, sum(map(len, scales.values()))
    populations: dict[str, Population] = {}
    projections: dict[str, list[Projection]] = {}
    errors: list[LayerError] = []
    for population in graph.populations:
        incoming = graph.incoming(population.name)
        best: tuple[Population, list[list[Projection]], LayerError] | None = None
        refusal: QuantizationError | None = None
        for trial in scales[population.name]:
            done += 1
            try:
                candidate, scaled = _at_scale(population, incoming, trial, bits, slices)
            except QuantizationError as error_at_scale:
                refusal = error_at_scale
            else:
                error = _measure(graph, population, candidate, incoming, scaled, sent, truth, trial.scale)
                if best is None or error.rank(room) < best[2].rank(room):
                    best = (candidate, scaled, error)
            if on_step:
                on_step(done, trials)
        if best is None:
            raise refusal or QuantizationError(f"population {population.name!r} has no scale.")
        populations[population.name], chosen, error = best
        projections |= {projection.name: parts for projection, parts in zip(incoming, chosen, strict=True)}
        errors.append(error)
        alone = _alone(graph, populations[population.name], _joined(chosen), sent)
        sent[population.name] = alone.run(_feeds(alone.graph, sent)).spikes[population.name].numpy()
    integer = replace(
        with_populations(graph, populations.values()),
        projections=tuple(part for projection in graph.projections for part in projections[projection.name]),
    )
    samples = next(iter(calibration.values())).shape[0]
    return integer, QuantizationReport(samples, bits, tuple(errors), graph)


def layer_errors(
    graph: ProcessGraph, integer: ProcessGraph, scales: dict[str, float], calibration: dict[str, np.ndarray]
) -> QuantizationReport:
    """The errors of an integer graph, as `quantize` reports them, whose numbers are not the nearest ones any more."""
    truth = Reference(graph).run(calibration, record=True)
    sent = calibration | {name: array.numpy() for name, array in Reference(integer).run(calibration).spikes.items()}
    errors = []
    for population, found in zip(graph.populations, integer.populations, strict=True):
        name = population.name
        incoming, scaled = graph.incoming(name), [[projection] for projection in integer.incoming(name)]
        errors.append(_measure(graph, population, found, incoming, scaled, sent, truth, scales[name]))
    bits = max((projection.weight_bits for projection in integer.projections), default=MAX_WEIGHT_BITS)
    return QuantizationReport(next(iter(calibration.values())).shape[0], bits, tuple(errors), graph)


@dataclass(frozen=True)
class _Trial:
    """A scale to try. clipped: how many times it is the one at which the weights of the projection with the smallest
    range just fit. finer: it is bound by u, a threshold or a bias, and exponents may be negative."""

    scale: float
    clipped: float = 1.0
    finer: bool = False


def _scales(graph: ProcessGraph, population: Population, truth: Run, bits: int, slices: int) -> list["_Trial"]:
    reach = float(truth.u[population.name].abs().max())
    if slices == 2:
        largest = sliced.largest_scale(population, graph.incoming(population.name), reach)
        return [_Trial(fraction * largest) for fraction in sliced.CANDIDATES]
    if population is graph.probed:
        reach = max(reach, float(truth.v[population.name].abs().max()))
    fitting, bound = _largest_scales(population, graph.incoming(population.name), reach, bits)
    largest = min(fitting, bound)
    tried = [fraction * largest for fraction in CANDIDATES]
    tried += [
        fraction * largest for fraction in CLIPPING if fraction <= MOST_CLIPPED[bits] and fraction * largest <= bound
    ]
    return [_Trial(scale, scale / fitting, finer=bound < fitting) for scale in tried]


def _with_silent_ones_in_range(graph: ProcessGraph, truth: Run, bits: int) -> ProcessGraph:
    """The graph in which no output channel or row that never fires has a larger |u| than all that do, where that would
    leave the weights fewer levels than they have bits for.

    Training leaves neurons that are inhibited ever more and never fire, and u's 24 bits would have to hold theirs.
    Their weights and bias are made smaller by one factor, and so are u and v, which stay below a threshold that is
    positive.
    """
    room = HEADROOM * STATE_LIMIT / 2**THRESHOLD_SHIFT
    populations, projections = [], {projection.name: projection for projection in graph.projections}
    for population in graph.populations:
        name, neuron = population.name, population.neuron
        incoming = graph.incoming(name)
        channels = population.shape[0]
        plain = all(isinstance(p.operator, (Dense, Conv2d)) and len(p.operator.weight) == channels for p in incoming)
        if isinstance(neuron, FloatNeuron) and incoming and plain and _fires(neuron):
            u, spikes = (values[name].transpose(0, 2).flatten(1) for values in (truth.u, truth.spikes))
            reach, fires = u.abs().amax(dim=1).numpy(), (spikes != 0).any(dim=1).numpy()
            fits = [fit for projection in incoming if (fit := _fit(projection, bits)) < np.inf]
            limit = max(reach[fires].max(initial=0.0), room / max(fits, default=1.0))
            factor = np.where(fires, 1.0, limit / np.maximum(reach, limit))
            if (factor < 1).any():
                for p in incoming:
                    rows = factor.reshape(-1, *[1] * (p.operator.weight.ndim - 1))
                    projections[p.name] = replace(p, operator=p.operator.with_weight(p.operator.weight * rows))
                bias = np.broadcast_to(neuron.bias, population.shape)
                bias = bias * factor.reshape(-1, *[1] * (len(population.shape) - 1))
                scaled = replace(neuron, bias=bias if bias.any() else np.asarray(0.0))
                populations.append(replace(population, neuron=scaled))
                continue
        populations.append(population)
    if all(one is other for one, other in zip(populations, graph.populations, strict=True)):
        return graph
    return replace(with_populations(graph, populations), projections=tuple(projections.values()))


def _fires(neuron: FloatNeuron) -> bool:
    return bool(((neuron.threshold > 0) & (neuron.threshold < np.inf)).all())


def _largest_scales(population: Population, incoming: list[Projection], reach: float, bits: int) -> tuple[float, float]:
    """The scale at which the projection with the smallest range just fits its bits, and that which the rest allows.

    Projections with larger weights take an exponent, and those beyond the largest exponent ask for a smaller scale. So
    may the bias, the threshold's 17 bits, unless it is infinite, and u: `reach`, the largest |u| of the float network
    on the calibration data (or |v|, where the membrane is read), must stay inside 24 bits with room left.
    """
    neuron = population.neuron
    if not isinstance(neuron, FloatNeuron):
        raise QuantizationError(f"population {population.name!r} is already quantised.")
    fits = [fit for projection in incoming if (fit := _fit(projection, bits)) < np.inf]
    scales = [min(fits) * 2**MAX_WEIGHT_EXPONENT] if fits else [1.0]
    bias = float(np.max(np.abs(neuron.bias)))
    if bias > 0:
        scales.append((BIAS_MANT_LIMIT - 1) * 2**MAX_BIAS_EXP / 2**THRESHOLD_SHIFT / bias)
    threshold = float(np.max(np.abs(neuron.threshold)))
    if 0 < threshold < np.inf:
        scales.append(0.5 * MAX_THRESHOLD / threshold)
    if reach > 0:
        scales.append(HEADROOM * STATE_LIMIT / 2**THRESHOLD_SHIFT / reach)
    return max(fits, default=1.0), min(scales)


def _fit(projection: Projection, bits: int) -> float:
    """The scale at which the largest weights of a projection just fit; infinite where all are zero."""
    weight = projection.operator.weight
    low, high, _ = weight_range(sign_mode(weight), bits)
    # the lowest level of both signs is one step farther out than the highest, which weights are not to hang on
    largest = max(float(weight.max()), -float(weight.min())) if weight.size else 0.0
    return (high or -low) / largest if largest > 0 else np.inf


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


def _at_scale(
    population: Population, incoming: list[Projection], trial: "_Trial", bits: int, slices: int
) -> tuple[Population, list[list[Projection]]]:
    """The population in integers, and the synapses that each of its projections becomes."""
    neuron, scale = population.neuron, trial.scale
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
    integer = replace(population, neuron=integers)
    if slices == 2:
        return integer, [sliced.slices(projection, scale) for projection in incoming]
    return integer, [[_scaled(projection, trial, bits)] for projection in incoming]


def _joined(parts: list[list[Projection]]) -> list[Projection]:
    return [each for made in parts for each in made]


def _bias(name: str, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    peak = float(np.abs(bias).max()) if np.size(bias) else 0.0
    exponent = max(0, int(np.ceil(np.log2(peak / (BIAS_MANT_LIMIT - 1))))) if peak > 0 else 0
    if exponent > MAX_BIAS_EXP:
        raise QuantizationError(f"population {name!r}: its bias needs an exponent of {exponent}, the chip has 3 bits.")
    return np.rint(bias / 2**exponent).astype(np.int64), np.asarray(exponent, dtype=np.int64)


def _scaled(projection: Projection, trial: "_Trial", bits: int) -> Projection:
    weight, scale, fit = projection.operator.weight, trial.scale, _fit(projection, bits)
    low, high, step = weight_range(sign_mode(weight), bits)
    # clipping at scales above the largest one is wanted, an exponent only where another projection forces the scale, or
    # where the scale leaves much of the range of the weights empty: down to steps of 1, so that no sum is rounded
    least = -(step.bit_length() - 1) if trial.finer else 0
    wanted = np.ceil(np.log2(scale / fit / max(1.0, trial.clipped)) - ROUNDING) if fit < np.inf else 0
    exponent = max(least, int(wanted))
    if exponent > MAX_WEIGHT_EXPONENT:
        raise QuantizationError(
            f"projection {projection.name!r}: its weights are {2**exponent} times larger than the smallest ones into "
            f"{projection.target!r}; {bits} bits and an exponent of {MAX_WEIGHT_EXPONENT} cannot hold both."
        )
    integers = np.clip(np.rint(weight * scale / (step * 2.0**exponent)) * step, low, high).astype(np.int16)
    if fit < np.inf and not integers.any():
        raise QuantizationError(
            f"projection {projection.name!r}: beside the other weights of {projection.target!r}, its threshold or its "
            "bias the weights round to nothing."
        )
    operator = projection.operator.with_weight(integers)
    return replace(projection, operator=operator, exponent=exponent, weight_bits=bits)


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
    scaled: list[list[Projection]],
    sent: dict[str, np.ndarray],
    truth: Run,
    scale: float,
) -> LayerError:
    alone = _alone(graph, candidate, _joined(scaled), sent)
    run = alone.run(_feeds(alone.graph, sent), record=True)
    name = population.name
    u = run.u[name].numpy()
    true_u = truth.u[name].numpy()
    unit = scale * 2**THRESHOLD_SHIFT
    largest = float(np.abs(u).max())
    membrane_error = decision_error = None
    if run.membrane is not None and truth.membrane is not None:
        last, true_last = run.membrane.flatten(1).numpy(), truth.membrane.flatten(1).numpy()
        largest = max(largest, float(run.v[name].abs().max()))
        membrane_error = _relative(last / unit, true_last)
        decided, wanted = (decide("membrane", 0.0, v) for v in (last, true_last))
        decision_error = float((decided != wanted).mean())
    fired, wanted_to = run.spikes[name].numpy() != 0, truth.spikes[name].numpy() != 0
    differing, spikes = int((fired != wanted_to).sum()), int(fired.sum() + wanted_to.sum())
    weights = np.concatenate([projection.operator.weight.ravel() for projection in incoming])
    integers = np.concatenate([_summed(parts).ravel() for parts in scaled])
    true, neuron = population.neuron, candidate.neuron
    assert isinstance(true, FloatNeuron)
    assert isinstance(neuron, LoihiNeuron)
    vth, threshold = np.broadcast_arrays(neuron.vth, true.threshold)
    fires = np.isfinite(threshold) & (threshold > 0)
    return LayerError(
        population=name,
        scale=float(scale),
        weight_bits=max((part.weight_bits for part in _joined(scaled)), default=MAX_WEIGHT_BITS),
        clipped_weights=float(
            np.concatenate([_clipped(p, q, scale) for p, q in zip(incoming, scaled, strict=True)]).mean()
        ),
        weight_error=_relative(integers / scale, weights),
        current_error=_relative(u / unit, true_u),
        spike_error=differing / fired.size,
        spike_distance=differing / spikes if spikes else 0.0,
        headroom=largest / STATE_LIMIT,
        threshold=int(np.max(neuron.vth)),
        current_decay_error=_farthest(1 - (neuron.du + neuron.ds_offset) / DECAY_UNITY, true.current_keep),
        voltage_decay_error=_farthest(1 - neuron.dv / DECAY_UNITY, true.voltage_keep),
        threshold_error=_farthest(vth[fires] / (scale * threshold[fires]), np.ones(())),
        membrane_error=membrane_error,
        decision_error=decision_error,
    )


def _summed(parts: list[Projection]) -> np.ndarray:
    """The weights that synapses side by side make together."""
    return np.sum([part.operator.weight * 2.0**part.exponent for part in parts], axis=0)  # type: ignore[no-any-return]


def _clipped(projection: Projection, parts: list[Projection], scale: float) -> np.ndarray:
    """Which weights lie outside the levels by more than rounding, bool."""
    weight = projection.operator.weight
    steps = [weight_range(sign_mode(weight), part.weight_bits)[2] * 2.0**part.exponent for part in parts]
    away = np.abs(weight * scale - _summed(parts)).ravel()
    clipped: np.ndarray = away > min(steps) / 2 * (1 + 1e-9)
    return clipped


def _farthest(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.abs(found - true).max(initial=0.0))


def _relative(found: np.ndarray, true: np.ndarray) -> float:
    size = float(np.sqrt(np.mean(np.square(true))))
    return float(np.sqrt(np.mean(np.square(found - true)))) / size if size > 0 else 0.0

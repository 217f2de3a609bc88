"""Post-training quantisation with several synapses for one weight, where 8 bits are too few: up to 15 bits.

A weight of 8 bits has 255 levels. Where one projection holds weights of very different size, as a recurrent one with a
few strong inhibitory synapses, small weights fall between them. Here each weight is the sum of two: a coarse one, whose
projection has an exponent, and a fine one of exponent 0, which holds what the coarse one leaves. The fine part is kept
in two projections, one for each sign, since weights of one sign have 256 levels and those of both only even ones.

The scale is then bound by the 24 bits of u and by the coarse exponent alone. It is searched near the largest one, per
population in topological order, for the fewest spikes that differ from the float network on the calibration samples.
The price is up to three times the synapses and synaptic operations.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from spikeport.converters.graph import FloatNeuron, LoihiNeuron, Population, ProcessGraph, Projection, with_populations
from spikeport.converters.quantize import (
    MAX_WEIGHT_EXPONENT,
    WEIGHT_BITS,
    LayerError,
    QuantizationReport,
    _alone,
    _at_scale,
    _check_finite,
    _feeds,
    _relative,
)
from spikeport.converters.reference import Reference
from spikeport.models.errors import QuantizationError
from spikeport.models.loihi_integers import MAX_THRESHOLD, STATE_LIMIT, THRESHOLD_SHIFT, WEIGHT_RANGE

HEADROOM = 0.95
"""Share of the range of u that the calibration data may fill; beyond the whole of it u would wrap."""

CANDIDATES = tuple(np.linspace(1.0, 0.7, 31))
"""Scales tried, as multiples of the largest one."""

COARSE_LIMIT, FINE_LIMIT = WEIGHT_RANGE["mixed"][1], WEIGHT_RANGE["excitatory"][1]


def quantize_in_slices(
    graph: ProcessGraph,
    calibration: dict[str, np.ndarray],
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[ProcessGraph, QuantizationReport]:
    """Quantise a float graph whose decisions are read from spikes; arguments as those of `quantize`.

    Raises QuantizationError naming the population whose values have no integer form.
    """
    _check_finite(graph)
    if graph.probed is not None:
        raise QuantizationError(f"weights in slices are for spikes; the membrane of {graph.probed.name!r} is read.")
    truth = Reference(graph).run(calibration, record=True)
    sent = dict(calibration)
    populations: list[Population] = []
    projections: list[Projection] = []
    errors: list[LayerError] = []
    for population in graph.populations:
        name, incoming = population.name, graph.incoming(population.name)
        expected = truth.spikes[name].numpy()
        largest = _largest(population, incoming, float(truth.u[name].abs().max()))
        best: tuple[LayerError, Population, list[Projection], np.ndarray] | None = None
        for fraction in CANDIDATES:
            scale = float(fraction) * largest
            integer, _ = _at_scale(population, [], scale)
            sliced = [part for projection in incoming for part in slices(projection, scale)]
            alone = _alone(graph, integer, sliced, sent)
            run = alone.run(_feeds(alone.graph, sent), record=True)
            spikes, u = run.spikes[name].numpy(), run.u[name].numpy()
            error = LayerError(
                population=name,
                scale=scale,
                weight_bits=WEIGHT_BITS + max((part.exponent for part in sliced), default=0),
                clipped_weights=0.0,
                weight_error=_weight_error(incoming, sliced, scale),
                current_error=_relative(u / (scale * 2**THRESHOLD_SHIFT), truth.u[name].numpy()),
                spike_error=float((spikes != expected).mean()),
                headroom=float(np.abs(u).max()) / STATE_LIMIT,
                threshold=int(np.max(integer.neuron.vth)) if isinstance(integer.neuron, LoihiNeuron) else 0,
            )
            if best is None or error.rank < best[0].rank:
                best = (error, integer, sliced, spikes)
            if on_step:
                on_step(len(populations) * len(CANDIDATES) + 1, len(graph.populations) * len(CANDIDATES))
        assert best is not None
        error, integer, sliced, sent[name] = best
        populations.append(integer)
        projections += sliced
        errors.append(error)
    quantized = replace(with_populations(graph, populations), projections=tuple(projections))
    return quantized, QuantizationReport(next(iter(calibration.values())).shape[0], tuple(errors))


def slices(projection: Projection, scale: float) -> list[Projection]:
    """A projection with `scale` integers a unit, as one coarse and up to two fine ones."""
    wanted = projection.operator.weight * scale
    peak = float(np.abs(wanted).max()) if wanted.size else 0.0
    exponent = max(0, int(np.ceil(np.log2(peak / COARSE_LIMIT)))) if peak > 0 else 0
    step = 2 * 2**exponent
    coarse = np.clip(2 * np.rint(wanted / step), -COARSE_LIMIT, COARSE_LIMIT)
    rest = np.rint(wanted - coarse * 2**exponent)
    made = [replace(projection, operator=projection.operator.with_weight(coarse.astype(np.int16)), exponent=exponent)]
    for sign, part in (("+", np.clip(rest, 0, FINE_LIMIT)), ("-", np.clip(rest, -FINE_LIMIT, 0))):
        if part.any():
            operator = projection.operator.with_weight(part.astype(np.int16))
            made.append(replace(projection, name=f"{projection.name} fine{sign}", operator=operator))
    return made


def _largest(population: Population, incoming: list[Projection], reach: float) -> float:
    """The scale at which the coarse weights, the threshold or u, of which the largest was `reach`, just fit."""
    neuron = population.neuron
    if not isinstance(neuron, FloatNeuron):
        raise QuantizationError(f"population {population.name!r} is already quantised.")
    peak = max((float(np.abs(p.operator.weight).max(initial=0.0)) for p in incoming), default=0.0)
    threshold = float(np.max(np.abs(neuron.threshold)))
    bounds = (
        (COARSE_LIMIT * 2**MAX_WEIGHT_EXPONENT, peak),
        (MAX_THRESHOLD, threshold),
        (HEADROOM * STATE_LIMIT / 2**THRESHOLD_SHIFT, reach),
    )
    scales = [limit / value for limit, value in bounds if value > 0]
    if not scales:
        raise QuantizationError(f"population {population.name!r} has neither weights nor thresholds.")
    return min(scales)


def _weight_error(incoming: list[Projection], sliced: list[Projection], scale: float) -> float:
    """Root mean square error of the summed slices over the root mean square weight."""
    found = {projection.name: np.zeros(projection.operator.weight.shape) for projection in incoming}
    for part in sliced:
        found[part.name.partition(" fine")[0]] += part.operator.weight * 2.0**part.exponent / scale
    return _relative(
        np.concatenate([found[projection.name].ravel() for projection in incoming]),
        np.concatenate([projection.operator.weight.ravel() for projection in incoming]),
    )

"""Post-training quantisation with several synapses for one weight, where 8 bits are too few: up to 15 bits.

A weight of 8 bits has 255 levels. Where one projection holds weights of very different size, as a recurrent one with a
few strong inhibitory synapses, small weights fall between them. Here each weight is the sum of two: a coarse one, whose
projection has an exponent, and a fine one of exponent 0, which holds what the coarse one leaves. The fine part is kept
in two projections, one for each sign, since weights of one sign have 256 levels and those of both only even ones.

The scale is then bound by the 24 bits of u and by the coarse exponent alone. It is searched near the largest one, per
population in topological order, for the fewest spikes that differ from the float network on the calibration samples.
The price is up to three times the synapses and synaptic operations.
"""

from dataclasses import replace

import numpy as np

from spikeport.converters.graph import FloatNeuron, Population, Projection
from spikeport.models.errors import QuantizationError
from spikeport.models.loihi_integers import (
    MAX_THRESHOLD,
    MAX_WEIGHT_EXPONENT,
    STATE_LIMIT,
    THRESHOLD_SHIFT,
    weight_range,
)

HEADROOM = 0.95
"""Share of the range of u that the calibration data may fill; beyond the whole of it u would wrap."""

CANDIDATES = tuple(float(fraction) for fraction in np.linspace(1.0, 0.7, 31))
"""Scales tried, as multiples of the largest one."""

COARSE_LIMIT, FINE_LIMIT = weight_range("mixed")[1], weight_range("excitatory")[1]


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


def largest_scale(population: Population, incoming: list[Projection], reach: float) -> float:
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

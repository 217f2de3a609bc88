"""Max pooling as linear layers and ReLUs, which spiking neurons can be made of.

A maximum of rates has no linear form, and the maximum of spikes in one step is not that of the rates. But

    max(a, b) = a + relu(b - a)

holds for every a and b, and for a window of more values pair by pair, in a tournament. So a window of k values becomes
k - 1 ReLUs, of which log2 k come one after another, and what reads the pooling adds up one of the values and the ReLUs
that lie above it. The rewritten network is exactly the same; rates then approach it like any other.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spikeport.converters.ann import (
    INPUT,
    Affine,
    Ann,
    AveragePool,
    Convolution,
    Flatten,
    Layer,
    MaxPool,
    Relu,
    Sum,
)
from spikeport.converters.operators import Shape, SumPool
from spikeport.models.errors import GraphError


def without_max_pool(ann: Ann) -> Ann:
    """The same network with every max pooling written as linear layers and ReLUs, exactly.

    Raises GraphError where what is pooled may be negative: rates are not.
    """
    layers: list[Layer] = []
    for layer in _relu_before_max(ann).layers:
        if not isinstance(layer, MaxPool):
            layers.append(layer)
            continue
        so_far = replace(ann, layers=tuple(layers))
        if not _nonnegative(so_far, layer.inputs[0]):
            raise GraphError(
                f"layer {layer.name!r} takes the maximum of values that may be negative, which no rate stands for. "
                "Put a ReLU before it, or retrain with average pooling."
            )
        layers += _max_layers(layer, so_far.shape_of(layer.inputs[0]), {other.name for other in ann.layers})
    return replace(ann, layers=tuple(layers))


def _relu_before_max(ann: Ann) -> Ann:
    """A ReLU after a max pooling changes place with it, which is the same."""
    layers = {layer.name: layer for layer in ann.layers}
    output, order = ann.output, [layer.name for layer in ann.layers]
    for layer in ann.layers:
        readers = ann.readers(layer.name)
        if not (isinstance(layer, MaxPool) and len(readers) == 1 and isinstance(readers[0], Relu)):
            continue
        pooled, relu = layer.name, readers[0].name
        if pooled == output:
            continue
        # the two trade names, so that whoever read the ReLU reads the pooling
        layers[pooled] = Relu(pooled, layer.inputs, ann.shape_of(layer.inputs[0]))
        layers[relu] = replace(layer, name=relu, inputs=(pooled,))
    return replace(ann, layers=tuple(layers[name] for name in order), output=output)


def _nonnegative(ann: Ann, name: str) -> bool:
    if name == INPUT:
        return True
    layer = ann.layer(name)
    linear = isinstance(layer, AveragePool | MaxPool | Flatten | Sum)
    return isinstance(layer, Relu) or (linear and all(_nonnegative(ann, source) for source in layer.inputs))


@dataclass(frozen=True, eq=False)
class _Largest:
    """The largest of some places of a window: one place, and ReLUs on top. taps: (height, width), 1 at that place."""

    taps: np.ndarray
    relus: tuple[str, ...] = ()


def _max_layers(layer: MaxPool, in_shape: Shape, taken_names: set[str]) -> list[Layer]:
    """max(a, b) = a + relu(b - a) over the places of a window, in a tournament."""
    made: list[Layer] = []
    shape, channels = layer.shape, in_shape[0]

    def added(name: str, *inputs: str, kind: type[Layer] = Sum, **arguments: Any) -> str:
        name = f"{layer.name}_{name}"
        while name in taken_names:
            name += "_"
        made.append(kind(name, inputs, shape, **arguments))
        return name

    def taken(name: str, taps: np.ndarray) -> str:
        weight = np.broadcast_to(taps, (channels, 1, *taps.shape))
        geometry = {"stride": layer.stride, "padding": layer.padding, "groups": channels}
        return added(name, *layer.inputs, kind=Convolution, weight=weight, bias=np.zeros(channels), **geometry)

    def larger(first: _Largest, second: _Largest) -> _Largest:
        number = sum(isinstance(each, Relu) for each in made) + 1
        inputs = [taken(f"difference{number}", second.taps - first.taps), *second.relus]
        minus = {"factor": np.full(channels, -1.0), "shift": np.zeros(channels)}
        inputs += [added(f"minus{number}_{i}", name, kind=Affine, **minus) for i, name in enumerate(first.relus)]
        total = added(f"lead{number}", *inputs) if len(inputs) > 1 else inputs[0]
        return _Largest(first.taps, (*first.relus, added(f"relu{number}", total, kind=Relu)))

    places = []
    for index in range(math.prod(layer.kernel)):
        taps = np.zeros(math.prod(layer.kernel))
        taps[index] = 1
        places.append(_Largest(taps.reshape(layer.kernel)))
    # the place that needs no padding comes first: it is what remains of the window when the ReLUs are added
    places.insert(0, places.pop(layer.padding[0] * layer.kernel[1] + layer.padding[1]))
    while len(places) > 1:
        pairs = [larger(*places[i : i + 2]) for i in range(0, len(places) - 1, 2)]
        places = pairs + places[2 * len(pairs) :]
    # as a pooling it goes before a padded convolution, which one more convolution does not
    strided = SumPool((1, 1), layer.stride).out_shape(in_shape) == shape
    window = {"kernel": (1, 1), "stride": layer.stride}
    first = added("first", *layer.inputs, kind=AveragePool, **window) if strided else taken("first", places[0].taps)
    made.append(Sum(layer.name, (first, *places[0].relus), shape))
    return made

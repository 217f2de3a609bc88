"""The faults that a network meets on its way to a chip, each as a change of one population's cell.

Two uses: a weight array that differs is given the name of the change that makes it from the right one, and spikes that
differ are held against those of the cell with each change, one after another.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from spikeport.converters.graph import LoihiNeuron, Population
from spikeport.converters.operators import Conv2d, Dense, Operator, Shape
from spikeport.deploy.replay import Arm, Cell
from spikeport.models.loihi_integers import MAX_DECAY, MAX_THRESHOLD

MOST_CHANNELS_PERMUTED = 4
"""Up to so many channels every order of them is a fault to be tried; of more, the reversed one."""

AXES = ("channel", "row", "column")


@dataclass(frozen=True)
class Cause:
    """where: a population or projection; what: a short name; backend: whose fault it is, empty where graphs differ."""

    where: str
    what: str
    text: str
    backend: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class Fault:
    """A change of a cell. where: the population or projection; what: its short name; text: what it does."""

    where: str
    what: str
    text: str
    cell: Cell


def faults(cell: Cell) -> Iterator[Fault]:
    """The cell with each known fault, one at a time."""
    for index, arm in enumerate(cell.arms):
        for what, text, changed in _arm_faults(arm):
            yield Fault(arm.projection.name, what, text, cell.with_arm(index, changed))
    for what, text, neuron in neuron_faults(cell.population):
        yield Fault(cell.population.name, what, text, cell.with_neuron(neuron))


def _arm_faults(arm: Arm) -> Iterator[tuple[str, str, Arm]]:
    projection = arm.projection
    yield "late branch", "its spikes arrive one step late", replace(arm, lag=arm.lag + 1)
    yield "early branch", "its spikes arrive one step early", replace(arm, lag=arm.lag - 1)
    for by in (1, -1):
        text = f"the exponent is {projection.exponent + by} instead of {projection.exponent}"
        yield "wrong exponent", text, replace(arm, projection=replace(projection, exponent=projection.exponent + by))
    for what, text, weight in weight_faults(projection.operator):
        changed = replace(projection, operator=projection.operator.with_weight(weight))
        yield what, text, replace(arm, projection=changed)


def weight_faults(operator: Operator) -> Iterator[tuple[str, str, np.ndarray]]:
    """(short name, what it does, weights) for each known way in which the weights of an operator go wrong."""
    weight = operator.weight
    for what, text, changed in _weight_faults(operator):
        if not np.array_equal(changed, weight):
            yield what, text, np.ascontiguousarray(changed)


def _weight_faults(operator: Operator) -> Iterator[tuple[str, str, np.ndarray]]:
    weight = operator.weight
    yield "lost projection", "it carries nothing: all weights are zero", np.zeros_like(weight)
    yield "wrong sign", "all weights have the opposite sign", -weight
    yield "lost last bit", "odd weights have lost their last bit", np.sign(weight) * (np.abs(weight) // 2 * 2)
    if isinstance(operator, Conv2d):
        yield from _kernel_faults(weight)
    elif isinstance(operator, Dense):
        turned = weight.T.reshape(weight.shape)
        yield "transposed weights", "the matrix is transposed: rows were read as columns", turned
        for what, text, columns in _orders(operator.pooled_shape):
            yield what, f"the columns lie {text}", weight[:, columns]
        for what, text, rows in _orders(operator.out_shape):
            yield what, f"the rows lie {text}", weight[rows]


def _kernel_faults(weight: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    yield "flipped kernel", "the kernel is flipped in both axes (convolution and correlation)", weight[..., ::-1, ::-1]
    yield "flipped kernel", "the kernel is flipped upside down", weight[..., ::-1, :]
    yield "flipped kernel", "the kernel is flipped left to right", weight[..., ::-1]
    if weight.shape[2] == weight.shape[3]:
        yield "transposed kernel", "the kernel's rows and columns are exchanged", weight.swapaxes(2, 3)
        both = weight.swapaxes(2, 3)[..., ::-1, ::-1]
        yield "transposed kernel", "the kernel's rows and columns are exchanged, and it is flipped", both
    if weight.shape[0] == weight.shape[1]:
        yield "transposed channels", "input and output channels are exchanged", weight.swapaxes(0, 1)
    for axis, kind in ((1, "input"), (0, "output")):
        for order in _channel_orders(weight.shape[axis]):
            text = f"the {kind} channels are in the order {', '.join(map(str, order))}"
            yield "permuted channels", text, weight.take(order, axis=axis)


def _channel_orders(channels: int) -> Iterator[tuple[int, ...]]:
    usual = tuple(range(channels))
    if channels <= MOST_CHANNELS_PERMUTED:
        yield from (order for order in itertools.permutations(usual) if order != usual)
    else:
        yield usual[::-1]


def _orders(shape: Shape) -> Iterator[tuple[str, str, np.ndarray]]:
    """For an image: the places of its neurons where the axes were flattened in another order, both ways round."""
    if len(shape) != 3:
        return
    index = np.arange(math.prod(shape)).reshape(shape)
    for axes in itertools.permutations(range(3)):
        if axes != (0, 1, 2):
            order = index.transpose(axes).reshape(-1)
            name = ", ".join(AXES[axis] for axis in axes)
            yield "permuted neurons", f"in ({name}) order, the neurons in (channel, row, column) order", order
            back = np.argsort(order)
            yield "permuted neurons", f"in (channel, row, column) order, the neurons in ({name}) order", back


def neuron_faults(population: Population) -> Iterator[tuple[str, str, LoihiNeuron]]:
    """(short name, what it does, neuron) for each known way in which a population's parameters go wrong."""
    neuron = population.neuron
    assert isinstance(neuron, LoihiNeuron)
    if np.any(neuron.bias_mant):
        yield "lost bias", "the bias is lost", replace(neuron, bias_mant=np.asarray(0))
        yield "wrong bias", "the bias has the opposite sign", replace(neuron, bias_mant=-neuron.bias_mant)
        if np.any(neuron.bias_exp):
            yield "wrong bias", "the bias has lost its exponent", replace(neuron, bias_exp=np.asarray(0))
        if np.shape(neuron.bias_mant) == population.shape:
            for _, text, order in _orders(population.shape):
                moved = neuron.bias_mant.reshape(-1)[order].reshape(population.shape)
                yield "permuted bias", f"the biases lie {text}", replace(neuron, bias_mant=moved)
    for key, of in (("du", "current"), ("dv", "voltage")):
        value = np.asarray(getattr(neuron, key))
        for by in (1, -1):
            if value.min() + by < 0 or value.max() + by > MAX_DECAY:
                continue
            text = f"the decay of the {of} is off by one: {key} is {_shown(value + by)} instead of {_shown(value)}"
            yield f"{of} decay off by one", text, replace(neuron, **{key: value + by})  # type: ignore[arg-type]
    text = f"ds_offset, the register added to du, is {1 - neuron.ds_offset} instead of {neuron.ds_offset}"
    yield "other ds_offset", text, replace(neuron, ds_offset=1 - neuron.ds_offset)
    if not np.array_equal(neuron.du, neuron.dv):
        yield "exchanged decays", "du and dv are exchanged", replace(neuron, du=neuron.dv, dv=neuron.du)
    vth = np.asarray(neuron.vth)
    for by in (1, -1):
        if vth.min() + by >= 0 and vth.max() + by <= MAX_THRESHOLD:
            text = f"the threshold is off by one: vth is {_shown(vth + by)} instead of {_shown(vth)}"
            yield "threshold off by one", text, replace(neuron, vth=vth + by)
    other = "subtract" if neuron.reset == "zero" else "zero"
    text = f"a spike resets the membrane by {other!r} instead of {neuron.reset!r}"
    yield "wrong reset", text, replace(neuron, reset=other)  # type: ignore[arg-type]


def _shown(value: np.ndarray) -> str:
    """A parameter in words: the number, or the range of those of the neurons."""
    low, high = int(value.min()), int(value.max())
    return str(low) if low == high else f"{low}..{high}"

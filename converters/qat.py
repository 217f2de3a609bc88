"""Quantisation-aware fine-tuning: what is trained is what runs.

An `IntegerNetwork` is a quantised `ProcessGraph` that can be trained: one float parameter for each array of weights of
the float graph, and for each bias. Scales, thresholds and decays stay those of post-training quantisation. Forward:

    level = clip(round(w scale / (step 2^exponent)))        the chip's levels, `loihi_integers.weight_range`
    a = step 2^exponent sum(level spikes)                   exact: in float32 while every sum fits 24 bits, or float64
    spikes = the integer step of every population           `spikeport.converters.integer_window`

Backward, rounding counts for nothing (a straight-through gradient): the window's backward pass of any rule of
`spikeport.models.rules` at x = a c, under a `CubaLIF` with the quantised decays and threshold. With tau = 1 / (1 -
current_keep), the rule's u is that of the integers times c / (64 tau), so that its threshold is c vth / tau. c = 1 /
scale for a graph whose units are the rule's own, as those of a recipe; otherwise c = tau / vth, which makes every
threshold one. A bias is a constant current behind the synaptic filter: x[0] holds tau times it, each later x once.

Gradients of a weight outside the levels pass where they lead back inside.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from spikeport.converters.graph import FloatNeuron, Input, LoihiNeuron, Population, ProcessGraph, Projection
from spikeport.converters.integer_window import IntegerNeurons, run_window
from spikeport.converters.operators import Conv2d
from spikeport.models.architectures import Neurons
from spikeport.models.checkpoint import Epoch, best_epoch
from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.datasets import Dataset
from spikeport.models.errors import QuantizationError
from spikeport.models.evaluate import evaluate
from spikeport.models.loihi_integers import (
    BIAS_MANT_LIMIT,
    DECAY_UNITY,
    THRESHOLD_SHIFT,
    sign_mode,
    weight_range,
)
from spikeport.models.networks import TrainableNetwork
from spikeport.models.recipe import Recipe
from spikeport.models.rules import Rule
from spikeport.models.spike_convolution import Geometry, convolve
from spikeport.models.trainer import SECONDS_BETWEEN_STATES, train_network

EXACT_SUM = 1 << 24
"""Below this every whole number is a float32."""


class IntegerNetwork(TrainableNetwork):
    """A quantised network to train on.

    Args:
        graph: the float graph. integer: what `spikeport.converters.quantize` made of it.
        scales: integers per unit of input, by population.
        rule: whose backward pass trains.
        native_units: the graph's units are those that the rule's settings (widths, floors) are in. Otherwise each
            population's threshold is taken as one, as it always is where its neurons have different ones.

    Raises QuantizationError naming the population that cannot be trained: one in a loop, or with more than one decay;
    RecipeError where the rule is not defined for one.
    """

    def __init__(
        self,
        graph: ProcessGraph,
        integer: ProcessGraph,
        scales: dict[str, float],
        rule: Rule,
        native_units: bool = True,
    ) -> None:
        super().__init__()
        if len(graph.event_inputs) != 1:
            raise QuantizationError(f"fine-tuning takes one input; {graph.name!r} has {len(graph.event_inputs)}.")
        if graph.readout.population != graph.populations[-1].name:
            raise QuantizationError(f"fine-tuning reads the last population, and not {graph.readout.population!r}.")
        self.graph, self.integer, self.rule, self.spike_cost = graph, integer, rule, 0.0
        self.neuron = CubaLIF(tau_syn=1 / (1 - graph.readout.keep))
        shared: dict[tuple[Any, ...], nn.Parameter] = {}
        self.synapses = nn.ModuleDict()
        self.somata = nn.ModuleDict()
        for population in integer.populations:
            name = population.name
            incoming = [p for p in graph.projections if p.target == name]
            if any(projection.recurrent for projection in incoming):
                raise QuantizationError(f"population {name!r} is in a loop; fine-tuning takes feed-forward graphs.")
            found = {p.name: p for p in integer.incoming(name)}
            pairs = [(projection, found[projection.name]) for projection in incoming]
            dtype = _exact_type(graph, pairs)
            for projection, made in pairs:
                weight = projection.operator.weight
                key = (weight.shape, weight.tobytes())  # of several levels or branches: one array, trained as one
                if key not in shared:
                    shared[key] = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
                self.synapses[_key(projection.name)] = _Synapses(projection, made, scales[name], shared[key], dtype)
            true = graph.population(name).neuron
            assert isinstance(true, FloatNeuron)
            self.somata[_key(name)] = _Somata(
                population, true, scales[name], native_units, population is integer.probed
            )
            if population is not integer.probed:
                rule.check(self._somata(name).cuba)

    def _synapses(self, projection: str) -> "_Synapses":
        return cast(_Synapses, self.synapses[_key(projection)])

    def _somata(self, population: str) -> "_Somata":
        return cast(_Somata, self.somata[_key(population)])

    @property
    def populations(self) -> dict[str, Neurons]:
        found = {}
        for population in self.graph.populations:
            sources = tuple(projection.source for projection in self.graph.incoming(population.name))
            soma = self._somata(population.name)
            found[population.name] = Neurons(population.name, sources, population.shape, soma.cuba, soma.integrates)
        return found

    @property
    def output(self) -> str:
        return self.graph.readout.population

    def forward(self, x: torch.Tensor, output_alone: bool = False) -> dict[str, torch.Tensor]:
        """The spikes of the exported integers, bit for bit."""
        steps, batch = x.shape[:2]
        # the same frame at every step goes through the synapses once
        sent = {self.graph.event_inputs[0].name: x[:1] if steps > 1 and x.stride(0) == 0 else x}
        for node in self.graph.inputs:
            if node.constant:
                sent[node.name] = torch.ones((1, 1, *node.shape), device=x.device).expand(1, batch, *node.shape)
        found = {}
        for population in self.graph.populations:
            name = population.name
            sums = [
                self._synapses(projection.name)(sent[projection.source]).unflatten(0, (-1, batch))
                for projection in self.graph.incoming(name)
            ]
            shape = (steps, batch, *population.shape)
            total = sum(each.reshape(-1, *shape[1:]) for each in sums) if sums else torch.zeros(shape, device=x.device)
            cost = 0.0 if name == self.output else self.spike_cost
            rule = replace(self.rule, spike_cost=cost) if cost else self.rule
            sent[name] = found[name] = self._somata(name)(total.expand(shape), rule)
        return found

    @torch.no_grad()
    def export(self) -> ProcessGraph:
        """The integer graph that runs as this network does."""
        populations = []
        for population in self.integer.populations:
            neuron = population.neuron
            assert isinstance(neuron, LoihiNeuron)
            mant = self._somata(population.name).mantissa().cpu().numpy().astype(np.int64)
            populations.append(replace(population, neuron=replace(neuron, bias_mant=mant)))
        projections = []
        for projection in self.integer.projections:
            synapses = self._synapses(projection.name)
            weight = (synapses.levels() * synapses.step).cpu().numpy().astype(np.int16)
            projections.append(replace(projection, operator=projection.operator.with_weight(weight)))
        return replace(self.integer, populations=tuple(populations), projections=tuple(projections))


def _key(name: str) -> str:
    """Modules take no dots in their names, nor names of their own methods."""
    return "of " + name.replace(".", "\u2024")


def _exact_type(graph: ProcessGraph, pairs: list[tuple[Projection, Projection]]) -> torch.dtype:
    """The narrowest type in which no sum into a population is rounded, whatever its weights become."""
    total, units = 0, []
    for projection, made in pairs:
        source = graph.node(projection.source)
        payload = (1 << source.message_bits) - 1 if isinstance(source, Input) else 1
        weight = projection.operator.weight
        low, high, step = weight_range(sign_mode(weight), made.weight_bits)
        full = projection.operator.with_weight(np.full(weight.shape, max(high, -low), dtype=np.int64))
        total += int(full.magnitude_bound() * payload * 2.0**made.exponent)
        units.append(_unit(step, made))
    if units and total // min(units) >= 1 << 53:
        raise QuantizationError(f"sums into population {pairs[0][0].target!r} exceed 53 bits and cannot be exact.")
    return torch.float32 if not units or total // min(units) < EXACT_SUM else torch.float64


def _unit(step: int, made: Projection) -> int:
    """What one level of a weight adds to the sums; no sum is rounded, as `quantize` has it."""
    unit = step * 2.0**made.exponent
    if unit < 1:
        raise QuantizationError(
            f"projection {made.name!r} rounds its sums: exponent {made.exponent}, levels {step} apart."
        )
    return int(unit)


class _Synapses(nn.Module):
    """One projection with trained weights: whole synaptic sums."""

    def __init__(
        self, projection: Projection, made: Projection, scale: float, weight: nn.Parameter, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.operator, self.dtype, self.weight = projection.operator, dtype, weight
        low, high, self.step = weight_range(sign_mode(projection.operator.weight), made.weight_bits)
        self.low, self.high = low // self.step, high // self.step
        self.unit = _unit(self.step, made)
        self.gain = scale / self.unit
        match projection.operator:
            case Conv2d(stride=stride, padding=padding, dilation=dilation, groups=groups):
                self.geometry: Geometry | None = Geometry(stride, padding, dilation, groups)
            case _:
                self.geometry = None

    def levels(self) -> torch.Tensor:
        """The weights in steps of the chip's levels, whole numbers."""
        found: torch.Tensor = _Levels.apply(self.weight, self.gain, self.low, self.high)  # type: ignore[no-untyped-call]
        return found

    def forward(self, spikes: torch.Tensor) -> torch.Tensor:
        """(steps, batch, *) -> (steps x batch, *)"""
        inputs = spikes.reshape(-1, *self.operator.in_shape).to(self.dtype)
        weight = (self.levels() * self.unit).to(self.dtype)  # the unit is a power of two: no sum is rounded for it
        if self.geometry is not None:
            return convolve(self.operator.pooled(inputs), weight, self.geometry)
        return self.operator.apply(inputs, weight)


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, gain: float, low: int, high: int) -> torch.Tensor:
        scaled = weight * gain
        ctx.gain = gain
        ctx.save_for_backward(scaled > high, scaled < low)
        return scaled.round().clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        above, below = ctx.saved_tensors
        (gradient,) = gradients
        farther = (above & (gradient < 0)) | (below & (gradient > 0))  # descent goes against the gradient
        return gradient.masked_fill(farther, 0.0) * ctx.gain, None, None, None


class _Somata(nn.Module):
    """One population with a trained bias: spikes, or membranes in the float graph's unit where it integrates."""

    vth: torch.Tensor
    factor: torch.Tensor

    def __init__(
        self, population: Population, true: FloatNeuron, scale: float, native_units: bool, integrates: bool
    ) -> None:
        super().__init__()
        neuron = population.neuron
        assert isinstance(neuron, LoihiNeuron)
        du, dv = (_only(value, population, what) for value, what in ((neuron.du, "du"), (neuron.dv, "dv")))
        vth = torch.from_numpy(_shaped(neuron.vth, population))
        self.register_buffer("vth", vth, persistent=False)
        self.settings = IntegerNeurons(du, dv, vth, neuron.ds_offset, neuron.reset)
        self.integrates, self.scale = integrates, scale
        tau = DECAY_UNITY / (du + neuron.ds_offset)
        native = native_units and vth.numel() == 1
        threshold = float(vth.max()) / (scale * tau) if native else 1.0
        if not native and not integrates and int(vth.min()) < 1:
            raise QuantizationError(f"population {population.name!r} has a threshold of zero.")
        factor = torch.tensor(1 / scale) if native or integrates else tau / vth
        self.register_buffer("factor", factor.float(), persistent=False)
        self.cuba = CubaLIF(tau, DECAY_UNITY / dv if dv else float("inf"), threshold, neuron.reset)
        if np.any(neuron.bias_exp != neuron.bias_exp.flat[0]):
            raise QuantizationError(f"population {population.name!r} has more than one exponent of its bias.")
        self.bias_unit = 2.0 ** int(neuron.bias_exp.flat[0])
        self.bias_gain = scale * 2**THRESHOLD_SHIFT / self.bias_unit
        bias = torch.tensor(_shaped(true.bias, population), dtype=torch.float32)
        self.bias = nn.Parameter(bias) if bias.any() else None
        self.register_buffer("no_bias", torch.zeros_like(bias), persistent=False)

    def mantissa(self) -> torch.Tensor:
        """bias_mant, whole numbers."""
        if self.bias is None:
            return self.get_buffer("no_bias")
        limits = -BIAS_MANT_LIMIT, BIAS_MANT_LIMIT - 1
        found: torch.Tensor = _Levels.apply(self.bias, self.bias_gain, *limits)  # type: ignore[no-untyped-call]
        return found

    def forward(self, a: torch.Tensor, rule: Rule) -> torch.Tensor:
        bias = self.mantissa() * self.bias_unit
        settings = replace(self.settings, vth=self.vth)
        if not self.integrates:
            how = self.factor, self.cuba, rule
            spikes: torch.Tensor = _SpikingWindow.apply(a, bias, settings, *how)  # type: ignore[no-untyped-call]
            return spikes
        unit = self.scale * 2**THRESHOLD_SHIFT
        exact: torch.Tensor = run_window(a, bias, settings, membranes=True) / unit
        if not torch.is_grad_enabled():
            return exact
        u = v = torch.zeros_like(exact[0])
        linear = []
        for at_step in a.double() / self.scale:
            u = settings.current_keep * u + at_step
            v = settings.voltage_keep * v + u + bias / unit
            linear.append(v)
        straight = torch.stack(linear)
        out: torch.Tensor = exact + (straight - straight.detach())
        return out


class _SpikingWindow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        bias: torch.Tensor,
        neurons: IntegerNeurons,
        factor: torch.Tensor,
        cuba: CubaLIF,
        rule: Rule,
    ) -> torch.Tensor:
        ctx.save_for_backward(a, bias, factor)
        ctx.settings = cuba, rule
        return run_window(a, bias, neurons)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, bias, factor = ctx.saved_tensors
        cuba, rule = ctx.settings
        x = (a * factor).float()
        # the bias enters behind the filter and without its shift of six bits
        of_bias = factor / (cuba.tau_syn * 2**THRESHOLD_SHIFT)
        if bias.any():
            x += bias * of_bias
            x[0] += (cuba.tau_syn - 1) * bias * of_bias
        errors = rule.window_errors(x, gradients[0].float(), cuba)
        bias_errors = None
        if ctx.needs_input_grad[1]:
            per_neuron = (errors.sum(dim=0) + (cuba.tau_syn - 1) * errors[0]).sum(dim=0)
            bias_errors = (per_neuron * of_bias).sum_to_size(bias.shape)
        return (errors * factor).to(a.dtype), bias_errors, None, None, None, None


def _only(value: np.ndarray, population: Population, what: str) -> int:
    if np.any(value != value.flat[0]):
        raise QuantizationError(
            f"population {population.name!r} has a {what} for each neuron; fine-tuning takes one for a population."
        )
    return int(value.flat[0])


def _shaped(value: np.ndarray, population: Population) -> np.ndarray:
    """One value, as an array of shape (), or the population's shape."""
    if np.all(value == value.flat[0]):
        return np.asarray(value.flat[0])
    return np.array(value).reshape(population.shape)


@dataclass(frozen=True, eq=False)
class FineTuned:
    """The network that was kept, and how it came about.

    start_accuracy: of the integer network before, on the validation split. best_epoch: the one that was kept, 0 where
    all were worse than the start. accuracy: of what was kept. seconds: spent, over all parts of an interrupted one.
    """

    graph: ProcessGraph
    start_accuracy: float
    best_epoch: int
    accuracy: float
    history: list[Epoch]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        found = {key: getattr(self, key) for key in ("start_accuracy", "best_epoch", "accuracy", "seconds")}
        return found | {"history": [asdict(epoch) for epoch in self.history]}


def fine_tune(
    network: IntegerNetwork,
    recipe: Recipe,
    data: Dataset,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    device: str | None = None,
    *,
    state_file: Path | None = None,
    save_every_s: float = SECONDS_BETWEEN_STATES,
) -> FineTuned:
    """Train an integer network on, as the recipe's [training] says (`Recipe.with_fine_tuning`), in place.

    Kept is the epoch whose integer network decides best on the validation split, or the start if all are worse. The
    other arguments are those of `spikeport.models.trainer.train`.
    """
    start = network.export()
    split, encoder = data.validation, recipe.build_encoder()
    before = evaluate(network, split.images, split.labels, encoder, recipe.readout_kind).accuracy
    history, seconds = train_network(
        network, recipe, data, on_epoch, on_batch, device, state_file=state_file, save_every_s=save_every_s
    )
    best = best_epoch(history)
    if best.validation_accuracy < before:
        return FineTuned(start, before, 0, before, history, seconds)
    return FineTuned(network.export(), before, best.epoch, best.validation_accuracy, history, seconds)

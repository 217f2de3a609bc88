"""Networks over a window: what each node does to the spikes, in training and out of it, and where gradients go."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_strategies import one_thread  # noqa: F401
from network_examples import network, settled

from spikeport.models.cuba_lif import CubaLIF, integrate, simulate
from spikeport.models.encoders import Encoder
from spikeport.models.errors import RecipeError
from spikeport.models.networks import SpikingNetwork, TdBatchNorm, build_network
from spikeport.models.recipe import load_recipe
from spikeport.models.rules import STBP, RateBP, SpikeBP


def random_spikes(*shape: int, seed: int = 0, rate: float = 0.5) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


@contextmanager
def recorded(built: SpikingNetwork, *names: str) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """(input, output) of the maps of those names at each of their runs."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}

    def record(name: str) -> Any:
        return lambda module, given, out: found[name].append((given[0].detach(), out.detach()))

    handles = [built.maps[name].register_forward_hook(record(name)) for name in names]
    yield found
    for handle in handles:
        handle.remove()


# ---- spikes ---------------------------------------------------------------------------------------------------------


def test_a_window_is_each_map_and_each_population_in_turn() -> None:
    """Against the plain functions: sum pooling of the spikes, the map of every step, the neuron over time."""
    built = network("3C3p1-P2-4C2s2-6-2", (2, 6, 6), 2, input_unit=0.25, threshold=0.2)
    x = torch.randint(0, 5, (7, 5, 2, 6, 6), generator=torch.Generator().manual_seed(0)).float()
    found = built(x)
    assert list(found) == list(built.populations) == ["conv1", "conv2", "dense1", "dense2"]
    assert (built.output, built.in_shape) == ("dense2", (2, 6, 6))

    weights = {name: built.maps[f"{name}_weight"].weight for name in found}

    def population(drive: list[torch.Tensor]) -> torch.Tensor:
        return simulate(torch.stack(drive).detach(), built.neuron).spikes

    conv1 = population([F.conv2d(step / 4, weights["conv1"], padding=1) for step in x])
    pooled = [sum(step[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) for step in conv1]
    conv2 = population([F.conv2d(step, weights["conv2"], stride=2) for step in pooled])  # type: ignore[arg-type]
    dense1 = population([step.flatten(1) @ weights["dense1"].T for step in conv2])
    dense2 = population([step @ weights["dense2"].T for step in dense1])
    for name, expected in (("conv1", conv1), ("conv2", conv2), ("dense1", dense1), ("dense2", dense2)):
        assert found[name].shape == (7, 5, *built.populations[name].shape)
        assert 0 < expected.sum() < expected.numel()
        assert (found[name] != expected).sum() <= 1  # sums in another order may graze the threshold once


def test_an_output_that_integrates_gives_its_membranes() -> None:
    built = network("6-3", (4,), 3, output="membrane", tau_syn=2.0, threshold=0.3)
    x = random_spikes(6, 5, 4)
    found = built(x)
    expected = integrate(found["dense1"] @ built.maps["dense2_weight"].weight.T, CubaLIF(2.0, 5.0))
    torch.testing.assert_close(found["dense2"], expected)
    assert found["dense2"].unique().numel() > 50


def test_levels_add_up() -> None:
    levels = (0.6, 1.0)
    built = network("8-3", (4,), 3, levels=levels, threshold=0.3, tau_syn=1.0, tau_mem=4 / 3)
    x = 2 * random_spikes(6, 50, 4)
    found = built(x)
    drive = built.maps["dense1_weight"](x).detach()
    singles = [simulate(drive, CubaLIF(1.0, 4 / 3, threshold)).spikes for threshold in (0.3, *levels)]
    assert torch.equal(found["dense1"], sum(singles))
    assert found["dense1"].unique().tolist() == [0, 1, 2, 3]
    assert found["dense2"].max() <= 1


def test_pooling_neurons_count_to_their_threshold() -> None:
    built = network("1C1-P2-3", (1, 2, 2), 3, pool="neurons", pool_threshold=0.75, threshold=0.5, tau_syn=1.0)
    with torch.no_grad():
        built.maps["conv1_weight"].weight.fill_(1.0)
    x = torch.zeros(6, 1, 1, 2, 2)
    x[:, 0, 0].flatten(1)[:, :1] = 1  # one of four spikes at each step adds a quarter; a fourth one passes 0.75
    assert built(x)["pool1"].flatten().tolist() == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("order", ["spike-add", "early", "membrane"])
def test_a_residual_block_does_what_its_formula_says(order: str) -> None:
    built = network("3C3p1-R3-R4s2-5", (2, 6, 6), 5, block=order, norm="tdbn", tau_syn=1.0, tau_mem=2.0, threshold=0.3)
    x = random_spikes(4, 3, 2, 6, 6).double()
    settled(built, x)

    def sn(current: torch.Tensor) -> torch.Tensor:
        return simulate(current, built.neuron).spikes

    def bn_c(name: str, s: torch.Tensor, stride: int = 1, padding: int = 1) -> torch.Tensor:
        norm: Any = built.maps[f"{name}_norm"]
        y = F.conv2d(s.flatten(0, 1), built.maps[f"{name}_weight"].weight, None, stride, padding)  # type: ignore[arg-type]
        mean, deviation = norm.running_mean[:, None, None], (norm.running_var + norm.eps).sqrt()[:, None, None]
        y = norm.weight[:, None, None] * 0.3 * (y - mean) / deviation + norm.bias[:, None, None]
        return y.unflatten(0, s.shape[:2])

    with torch.no_grad():
        found = built(x)
        stem = bn_c("conv1", x)
        if order == "membrane":
            y = stem + bn_c("block1_2", sn(bn_c("block1_1", sn(stem))))
            halves = F.avg_pool2d(y.flatten(0, 1), 2).unflatten(0, (4, 3))
            z = bn_c("block2_skip", halves, 1, 0) + bn_c("block2_2", sn(bn_c("block2_1", sn(y), 2)))
            last = sn(z)
        elif order == "early":
            s = sn(stem)
            s = sn(bn_c("block1_2", sn(bn_c("block1_1", s))) + s)
            last = sn(bn_c("block2_2", sn(bn_c("block2_1", s, 2))) + bn_c("block2_skip", s, 2, 0))
        else:
            s = sn(stem)
            s = sn(bn_c("block1_2", sn(bn_c("block1_1", s)))) + s
            last = sn(bn_c("block2_2", sn(bn_c("block2_1", s, 2)))) + sn(bn_c("block2_skip", s, 2, 0))
        output = sn(last.flatten(2) @ built.maps["dense1_weight"].weight.T)  # type: ignore[operator]
    assert torch.equal(found["dense1"], output)
    assert all(0.02 < float(spikes.mean()) < 0.98 for spikes in found.values())


def test_a_frame_that_never_changes_is_convolved_once() -> None:
    built = network("4C3-P2-3", (1, 8, 8), 3, threshold=0.2, input_unit=1 / 15)
    frames = Encoder("graded", 5, message_bits=4)(torch.rand(6, 1, 8, 8))
    with recorded(built, "conv1_weight", "dense1_weight") as found:
        once = built(frames)
        every = built(frames.clone())
    assert [len(given) for given, _ in found["conv1_weight"]] == [6, 30]
    assert [len(given) for given, _ in found["dense1_weight"]] == [30, 30]
    assert 0 < once["conv1"].mean() < 1
    for name, spikes in every.items():
        assert torch.equal(once[name], spikes)


def test_images_keep_one_memory_layout() -> None:
    """The channels of a pixel together, from the first convolution (of a single channel, too) to the last."""
    built = network("4C3p1-R4-P2-6C3-3", (1, 8, 8), 3, norm="tdbn", threshold=0.2)
    names = [name for name in built.maps if name != "dense1_weight"]
    with recorded(built, *names) as found:
        spikes = built(random_spikes(3, 4, 1, 8, 8))
    for name in names:
        ((given, out),) = found[name]
        assert out.is_contiguous(memory_format=torch.channels_last), name
        if name != "conv1_weight":
            assert given.is_contiguous(memory_format=torch.channels_last), name
    assert spikes["block1_2"].stride(2) == 1


def test_bfloat16_goes_through_and_spikes_stay_whole() -> None:
    built = network("4C3p1-R4-P2-3", (2, 8, 8), 3, norm="tdbn", threshold=0.3, levels=(0.6, 0.9))
    with torch.autocast("cpu", torch.bfloat16), recorded(built, "conv1_weight", "conv1_norm", "dense1_weight") as found:
        spikes = built(random_spikes(3, 4, 2, 8, 8))
    for pairs in found.values():
        assert pairs[0][1].dtype == torch.bfloat16
    for each in spikes.values():
        assert each.dtype == torch.bfloat16
        assert torch.equal(each, each.round())
    given = found["dense1_weight"][0][0]
    pooled = (spikes["conv1"] + spikes["block1_2"]).float().flatten(0, 1)
    assert torch.equal(given.float(), F.avg_pool2d(pooled, 2, divisor_override=1).flatten(1))
    spikes["dense1"].float().sum().backward()
    assert all(weight.grad is not None for weight in built.parameters())


# ---- training mode --------------------------------------------------------------------------------------------------


def test_normalisation_is_over_time_and_batch_and_images() -> None:
    module = TdBatchNorm(3, threshold=0.6, gain=2.0)
    x = 5 + 3 * torch.randn(40, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    y = module(x)
    torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(dim=(0, 2, 3), correction=0), torch.full((3,), 1.2), atol=1e-4, rtol=0)
    for _ in range(200):
        module(x)
    module.eval()
    shifted = x + 1.0
    factor, shift = module.factor_and_shift()
    expected = shifted * factor[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(module(shifted).double(), expected, atol=1e-4, rtol=1e-4)
    assert float(module(shifted).detach().mean()) > 0.3  # running statistics, not those of the batch


def test_dropout_silences_a_neuron_for_a_whole_window() -> None:
    torch.manual_seed(0)
    built = network("40-3", (4,), 3, dropout=0.25, threshold=0.2)
    x = random_spikes(6, 200, 4)
    with recorded(built, "dense2_weight") as found:
        fired = built(x)["dense1"]
        built(x)
        built.eval()
        built(x)
    first, second, evaluated = (given.unflatten(0, (6, 200)) for given, _ in found["dense2_weight"])
    assert torch.equal(evaluated, fired)  # what a population is said to send is before dropout
    assert first[fired > 0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert not torch.equal(first, second)
    both = (fired[0] > 0) & (fired[-1] > 0)
    assert int(both.sum()) > 500
    assert torch.equal(first[0][both], first[-1][both])
    assert float((first[0][both] == 0).float().mean()) == pytest.approx(0.25, abs=0.05)


# ---- rules of rates -------------------------------------------------------------------------------------------------

RATES = {"threshold": 0.3, "tau_syn": 2.0, "tau_mem": 4.0}


def test_rate_gradients_are_those_of_the_window_interface() -> None:
    """One pass over rates gives the gradients that every window by itself would give."""
    rule = RateBP()
    built = network("3C3p1-P2-6-2", (2, 6, 6), 2, rule, **RATES).double()
    x = random_spikes(7, 5, 2, 6, 6).double()
    target = torch.randn(7, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = built(x)
    ((found["dense2"] - target) ** 2).sum().backward()
    by_rates = [weight.grad.clone() for weight in built.parameters() if weight.grad is not None]
    built.zero_grad()

    def window(name: str, s: torch.Tensor) -> torch.Tensor:
        return rule(built.maps[f"{name}_weight"](s.flatten(0, 1)).unflatten(0, (7, 5)), built.neuron)

    s = F.avg_pool2d(window("conv1", x).flatten(0, 1), 2, divisor_override=1).unflatten(0, (7, 5))
    s = window("dense2", window("dense1", s.flatten(2)))
    assert torch.equal(found["dense2"], s)
    ((s - target) ** 2).sum().backward()
    assert len(by_rates) == 3
    for weight, gradient in zip(built.parameters(), by_rates, strict=True):
        assert weight.grad is not None
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(gradient, weight.grad)


def test_rate_gradients_reach_every_part_of_a_residual_network() -> None:
    settings = RATES | {"pool": "neurons", "pool_threshold": 0.3, "bias": True}
    built = network("3C3p1-R4s2-P2-2", (2, 8, 8), 2, RateBP(), block="early", **settings)
    built(random_spikes(7, 5, 2, 8, 8))["dense1"].sum().backward()
    for name, weight in built.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.any()), name


def test_rate_gradients_of_an_integrator_are_those_of_a_constant_input() -> None:
    by_rates = network("3", (4,), 3, RateBP(), output="membrane", **RATES)
    by_steps = network("3", (4,), 3, STBP(), output="membrane", **RATES)
    by_steps.load_state_dict(by_rates.state_dict())
    x = torch.rand(5, 4).expand(6, 5, 4).clone()
    factors = torch.randn(6, 5, 3)
    for built in (by_rates, by_steps):
        (built(x)["dense1"] * factors).sum().backward()
    assert torch.equal(by_rates(x)["dense1"], by_steps(x)["dense1"])
    torch.testing.assert_close(by_rates.maps["dense1_weight"].weight.grad, by_steps.maps["dense1_weight"].weight.grad)


def test_rate_gradients_drop_out_the_neurons_that_the_window_dropped() -> None:
    built = network("30-3", (4,), 3, RateBP(), dropout=0.5, **RATES)
    with recorded(built, "dense2_weight") as found:
        built(random_spikes(6, 20, 4))
    window, rates = (given for given, _ in found["dense2_weight"])
    assert (len(window), len(rates)) == (120, 20)
    torch.testing.assert_close(window.unflatten(0, (6, 20)).mean(dim=0), rates)


def test_what_rates_keep_for_the_backward_pass_does_not_grow_with_the_window() -> None:
    def kept(steps: int) -> int:
        built = network("3C3p1-P2-6-2", (2, 6, 6), 2, RateBP(), **RATES)
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            built(random_spikes(steps, 5, 2, 6, 6))
        return total

    assert kept(4) == kept(32) > 0


def test_evaluation_under_a_rule_of_rates_is_the_plain_window() -> None:
    built = network("3C3p1-P2-6-2", (2, 6, 6), 2, RateBP(), **RATES)
    x = random_spikes(7, 5, 2, 6, 6)
    with torch.no_grad():
        plain = built(x)
    trained = built(x)
    assert not plain["dense2"].requires_grad
    assert trained["dense2"].requires_grad
    for name, spikes in plain.items():
        assert torch.equal(spikes, trained[name])


# ---- what does not go together --------------------------------------------------------------------------------------


def test_rates_have_no_batch_normalisation() -> None:
    with pytest.raises(RecipeError, match=r'network\.norm = "none"'):
        network("3C3-2", (1, 5, 5), 2, RateBP(), norm="tdbn")


def test_a_rule_refuses_neurons_that_it_is_not_defined_for() -> None:
    with pytest.raises(RecipeError, match=r"network\.tau_syn = 1"):
        network("5-2", (4,), 2, SpikeBP(), tau_syn=2.0)
    assert network("5-2", (4,), 2, SpikeBP(), tau_syn=1.0)


def test_a_recipe_builds_its_network() -> None:
    recipe = load_recipe("mnist")
    built = build_network(recipe, (1, 28, 28), 10)
    assert built.neuron == recipe.network.neuron()
    assert built.rule == recipe.rule.build()
    assert built.input_unit == recipe.build_encoder().unit
    assert built.populations[built.output].shape == (10,)
    with pytest.raises(RecipeError, match="11 neurons"):
        build_network(recipe, (1, 28, 28), 11)

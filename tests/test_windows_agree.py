"""The compiled window against the eager one: the same spikes and, to float tolerance, the same dL/dx."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rule_windows import three_threads  # noqa: F401

from spikeport.models.cuba_lif import CubaLIF, Window, filter_spikes, fire
from spikeport.models.rules import CSBP, MLF, STBP, TSSL, RateBP, Rule, SpikeBP, window_compiled, window_loops
from spikeport.models.rules.spike_bp import FORGOTTEN

pytestmark = pytest.mark.oracle

RULES: dict[str, st.SearchStrategy[Rule]] = {
    "csbp": st.builds(
        CSBP, st.sampled_from(["existence", "shift"]), st.sampled_from([0.1, 0.5]), st.booleans(), st.booleans()
    ),
    "tssl": st.builds(TSSL, st.sampled_from(["author", "timing"]), st.booleans()),
    "stbp": st.builds(
        STBP,
        st.sampled_from(["rectangular", "triangular", "arctan", "logistic"]),
        st.sampled_from([0.2, 1.0, 2.5]),
        st.booleans(),
    ),
    "mlf": st.just(MLF()),
    "spike_bp": st.builds(SpikeBP, st.booleans()),
    "rate_bp": st.just(RateBP()),
}
EACH_RULE = pytest.mark.parametrize("name", RULES)


@st.composite
def neurons(draw: st.DrawFn, name: str) -> CubaLIF:
    """A neuron that the rule is defined for; for rate_bp one of a few, as each is fitted first."""
    if name == "rate_bp":
        return draw(st.sampled_from([CubaLIF(), CubaLIF(1, math.inf, 0.7, "subtract", (1.6,))]))
    threshold = draw(st.floats(0.1, 2))
    levels = draw(st.lists(st.floats(0.2, 2), min_size=1 if name == "mlf" else 0, max_size=3))
    return CubaLIF(
        tau_syn=1 if name == "spike_bp" else draw(st.floats(1, 8)),
        tau_mem=draw(st.floats(1.05, 20) | st.just(math.inf)),
        threshold=threshold,
        reset="zero" if name in ("tssl", "spike_bp") else draw(st.sampled_from(["zero", "subtract"])),
        levels=tuple(threshold + sum(levels[: k + 1]) for k in range(len(levels))),
    )


def gradient(x: torch.Tensor, errors: torch.Tensor, neuron: CubaLIF, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and dL/dx."""
    assert window_compiled.handles(x, rule) is not rule.eager
    values = x.detach().requires_grad_()
    spikes = rule(values, neuron)
    (found,) = torch.autograd.grad(spikes, values, errors)
    return spikes.detach(), found


def eager(rule: Rule) -> Rule:
    return type(rule)(**{name: value for name, value in vars(rule).items() if name in _settings(rule)}, eager=True)


def _settings(rule: Rule) -> set[str]:
    return {name for name, entry in rule.__dataclass_fields__.items() if entry.init and name != "eager"}


def is_decided(x: torch.Tensor, neuron: CubaLIF, rule: Rule, margin: float) -> bool:
    """Whether no value lies so near to where a rule decides that rounding could decide it."""
    current = filter_spikes(x, neuron.tau_syn)
    for threshold in neuron.thresholds:
        window: Window = fire(current, neuron, threshold)
        distance = (window.membrane - threshold).abs()
        edges = [distance]
        if isinstance(rule, STBP) and rule.surrogate == "rectangular":
            edges.append(distance - rule.width / 2)
        if isinstance(rule, CSBP | TSSL) and rule.dead_neuron_rule:
            edges.append(filter_spikes(window.spikes, neuron.tau_syn) - 1 / (4 * neuron.tau_syn))
        if isinstance(rule, SpikeBP):
            lasting = sum(neuron.voltage_keep**n * s for n, s in enumerate(window.spikes.flip(0)))
            edges.append(torch.as_tensor(lasting) - FORGOTTEN)
        if any(float(edge.abs().min()) <= margin for edge in edges):
            return False
    return True


TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 1e-2}


def assert_agree(x: torch.Tensor, errors: torch.Tensor, neuron: CubaLIF, rule: Rule) -> None:
    """bfloat16 is computed in float32 and rounded once, so it is held against the eager window of its numbers."""
    spikes, found = gradient(x, errors, neuron, rule)
    wide = x.float() if x.dtype == torch.bfloat16 else x
    eager_spikes, expected = gradient(wide, errors.to(wide.dtype), neuron, eager(rule))
    assert eager_spikes.dtype == expected.dtype == wide.dtype
    assert spikes.dtype == found.dtype == x.dtype
    assert spikes.shape == found.shape == x.shape
    assert torch.equal(spikes.to(wide.dtype), eager_spikes)
    tolerance = TOLERANCES[x.dtype]
    largest = expected.abs().amax(dim=0, keepdim=True)  # each neuron's own: errors grow along its chain of spikes
    assert bool(((found.to(wide.dtype) - expected).abs() <= tolerance * (largest + 1e-3)).all())


@EACH_RULE
@given(
    data=st.data(),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(list(TOLERANCES)),
    steps=st.integers(1, 12),
    size=st.sampled_from([1, 2, 3, 7, 8, 9, 31, 33]),
)
def test_any_neuron_under_any_rule(
    name: str, data: st.DataObject, seed: int, dtype: torch.dtype, steps: int, size: int
) -> None:
    rule, neuron = data.draw(RULES[name]), data.draw(neurons(name))
    rule.check(neuron)
    x, errors = torch.randn(2, steps, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (2 * x).to(dtype)
    assume(is_decided(x.double(), neuron, rule, 1e-12 if dtype == torch.float64 else 1e-5))
    assert_agree(x, errors.to(dtype), neuron, rule)


# --- Populations of a network's size and layout ----------------------------------------------------------------------

BUSY: dict[str, tuple[Rule, CubaLIF]] = {
    "csbp": (CSBP(), CubaLIF()),
    "tssl": (TSSL("timing"), CubaLIF()),
    "stbp": (STBP("arctan", 2.0), CubaLIF(2, 4, 0.7, "subtract")),
    "mlf": (MLF(), CubaLIF(1, 4 / 3, 0.6, levels=(1.6, 2.6))),
    "spike_bp": (SpikeBP(), CubaLIF(1, 2, 0.9)),
    "rate_bp": (RateBP(), CubaLIF()),
}


def busy(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs under which the population of a rule fires often, and errors."""
    x, errors = torch.randn(2, *shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = (3 * x).to(dtype)
    rule, neuron = BUSY[name]
    assert 0.05 < float(rule(x, neuron).double().mean()) / len(neuron.thresholds) < 0.6
    return x, errors.to(dtype)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """(steps, batch, channels, height, width) as convolutions in channels_last leave it."""
    images = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return images.unflatten(0, x.shape[:2])


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "channels last, one image": lambda x: channels_last(x)[:, :1],
    "batch before steps": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "steps innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda x: x.repeat_interleave(2, dim=3)[:, :, :, ::2],
    "every second step": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "one image for a batch": lambda x: x[:, :1].expand_as(x),
    "one step for all": lambda x: x[:1].expand_as(x),
    "one number for all": lambda x: x[:1, :1, :1, :1, :1].expand_as(x),
}


LAYOUT_PAIRS = {(name, other) for name in LAYOUTS for other in (name, "contiguous", "channels last")}


@EACH_RULE
@pytest.mark.parametrize(("of_inputs", "of_errors"), sorted(LAYOUT_PAIRS | {pair[::-1] for pair in LAYOUT_PAIRS}))
def test_any_layout(name: str, of_inputs: str, of_errors: str) -> None:
    x, errors = busy(name, 6, 3, 5, 4, 7)
    x, errors = LAYOUTS[of_inputs](x), LAYOUTS[of_errors](errors)
    if x.shape != errors.shape:  # one image
        x, errors = x[:, :1], errors[:, :1]
    before = x.clone(), errors.clone()
    assert_agree(x, errors, BUSY[name][1], BUSY[name][0])
    assert torch.equal(x, before[0])
    assert torch.equal(errors, before[1])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_channels_last_stays_channels_last(dtype: torch.dtype) -> None:
    """No convolution behind a window has to reorder its input."""
    x, errors = map(channels_last, busy("csbp", 6, 3, 5, 4, 7, dtype=dtype))
    spikes, found = gradient(x, errors, CubaLIF(), CSBP())
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@EACH_RULE
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_window_in_which_much_happens(name: str, dtype: torch.dtype) -> None:
    rule, neuron = BUSY[name]
    x, errors = busy(name, 20, 200, dtype=dtype)
    assert is_decided(x.double(), neuron, rule, 1e-6)
    assert_agree(x, errors, neuron, rule)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (1, 3, 1, 1), (6, 0, 4)], ids=str)
@EACH_RULE
def test_shapes_at_the_edge(name: str, shape: tuple[int, ...]) -> None:
    x, errors = torch.randn(2, *shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    rule, neuron = BUSY[name]
    spikes, found = gradient(3 * x, errors, neuron, rule)
    eager_spikes, expected = gradient(3 * x, errors, neuron, eager(rule))
    assert spikes.shape == found.shape == x.shape
    assert torch.equal(spikes, eager_spikes)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wide", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [name for name in RULES if name != "rate_bp"])
def test_the_levels_of_a_neuron_are_neurons_that_share_its_input(name: str, wide: bool) -> None:
    rule = eager(BUSY[name][0]) if wide else BUSY[name][0]
    x, errors = busy(name, 9, 40)
    tau_syn = 1 if name == "spike_bp" else 2
    spikes, found = gradient(x, errors, CubaLIF(tau_syn, 5, 0.6, levels=(1.6, 2.6)), rule)
    alone = [gradient(x, errors, CubaLIF(tau_syn, 5, threshold), rule) for threshold in (0.6, 1.6, 2.6)]
    assert torch.equal(spikes, torch.stack([s for s, _ in alone]).sum(dim=0))
    torch.testing.assert_close(found, torch.stack([g for _, g in alone]).sum(dim=0), rtol=1e-12, atol=1e-12)


# --- Blocks and threads ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("difference", [-1, 0, 1])
@pytest.mark.parametrize("blocks", [1, 2, 13])
def test_populations_around_the_boundaries_of_blocks(blocks: int, difference: int) -> None:
    steps = 16
    size = blocks * (window_compiled.BLOCK_VALUES // steps) + difference
    assert_agree(*busy("csbp", steps, size), *BUSY["csbp"][::-1])


@EACH_RULE
def test_populations_around_the_boundaries_of_tiles(name: str) -> None:
    steps = 5
    tile = window_loops.TILE_VALUES // (steps + 1)
    assert window_loops.SMALLEST_TILE < tile < window_compiled.BLOCK_VALUES // steps
    for size in (tile - 1, tile + 1, 3 * tile + 7):
        assert_agree(*busy(name, steps, size), *BUSY[name][::-1])


@pytest.mark.usefixtures("three_threads")
@EACH_RULE
def test_many_small_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_compiled, "BLOCK_VALUES", 1)
    monkeypatch.setattr(window_compiled, "SMALLEST_TILE", 64)
    for size in (63, 64, 65, 1000):
        assert_agree(*busy(name, 5, size), *BUSY[name][::-1])


@pytest.mark.parametrize("kept", [window_loops.SMALLEST_TILE - 1, 3 * window_loops.SMALLEST_TILE + 5])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@EACH_RULE
def test_one_step_that_stands_for_all(name: str, dtype: torch.dtype, kept: int) -> None:
    rule, neuron = BUSY[name]
    x, errors = busy(name, 6, kept, dtype=dtype)
    first = x[:1].abs()
    spikes, found = gradient(first.expand_as(x), errors, neuron, rule)
    assert bool(spikes.any())
    expected = found.double().sum(dim=0, keepdim=True)
    largest = found.double().abs().sum(dim=0, keepdim=True)
    for kind in (rule, eager(rule))[: 1 if dtype == torch.bfloat16 else 2]:  # eager windows compute in bfloat16
        alone = first.clone().requires_grad_()
        out = kind(alone, neuron, 6)
        assert torch.equal(out, spikes)
        out.backward(errors)
        assert alone.grad is not None
        assert alone.grad.dtype == dtype
        assert alone.grad.shape == first.shape
        # in bfloat16 each step of the window of all steps is rounded
        assert bool(((alone.grad.double() - expected).abs() <= TOLERANCES[dtype] * (largest + 1e-3)).all())


def test_a_window_that_was_not_finished_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of machine code cannot raise; it says how many neurons it has done."""
    monkeypatch.setattr(window_compiled, "run_task", lambda *_: None)
    with pytest.raises(MemoryError):
        CSBP()(torch.ones(3, 5), CubaLIF())

"""The integer step against Loihi's equations, written out once more in plain Python integers."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikeport.models.loihi_integers import IntegerState, integer_step, shift_bias, truncate_shift

Reset = Literal["zero", "subtract"]

TOP = 2**23
RESETS = ["zero", "subtract"]


def towards_zero(x: int, bits: int) -> int:
    """sign(x) * (|x| >> bits), as a quotient."""
    return abs(x) // 2**bits * (-1 if x < 0 else 1)


def plain_step(
    u: int, v: int, a: int, *, du: int, dv: int, vth: int, bias: int, ds_offset: int, reset: str
) -> tuple[int, int, bool]:
    """One neuron, one step."""
    u = towards_zero(u * (4096 - du - ds_offset), 12) + 64 * a
    if u > TOP:
        u -= 2**24
    if u <= -TOP:
        u += 2**24
    v = towards_zero(v * (4096 - dv), 12) + u + bias
    v = min(max(v, 1 - TOP), TOP - 1)
    fired = v > 64 * vth
    if fired:
        v = v - 64 * vth if reset == "subtract" else 0
    return u, v, fired


def step(
    u: int = 0,
    v: int = 0,
    a: int = 0,
    *,
    du: int = 0,
    dv: int = 0,
    vth: int = 2**17 - 1,
    bias: int = 0,
    ds_offset: int = 0,
    reset: Reset = "zero",
) -> tuple[int, int, bool]:
    """The project's step on one neuron; by default nothing decays and nothing fires."""
    state = IntegerState(torch.tensor([u]), torch.tensor([v]))
    register = {"du": du, "dv": dv, "vth": vth, "bias": bias}
    tensors = {name: torch.tensor([value]) for name, value in register.items()}
    after, spikes = integer_step(state, torch.tensor([a]), **tensors, ds_offset=ds_offset, reset=reset)
    assert after.u.dtype == after.v.dtype == torch.int64
    assert spikes.dtype == torch.bool
    return int(after.u), int(after.v), bool(spikes)


def near(*values: int) -> st.SearchStrategy[int]:
    """Integers within two of any of the values."""
    return st.builds(lambda value, offset: value + offset, st.sampled_from(values), st.integers(-2, 2))


# ranges of the registers, with their edges made likely; inputs up to the sums that wrap more than once over
CURRENT = st.integers(1 - TOP, TOP) | st.sampled_from([0, 1, -1, TOP, TOP - 1, 1 - TOP])
MEMBRANE = st.integers(1 - TOP, TOP - 1) | st.sampled_from([0, 1, -1, TOP - 1, 1 - TOP])
INPUT = st.integers(-(2**21), 2**21) | st.integers(-300, 300) | near(0, TOP // 64, -TOP // 64, TOP // 32, -TOP // 32)
DECAY = st.integers(0, 4095) | st.sampled_from([0, 1, 4094, 4095])
LEVEL = st.integers(0, 2**17 - 1) | st.sampled_from([0, 1, 2**17 - 1])
MANTISSA = st.integers(-(2**12), 2**12 - 1)
EXPONENT = st.integers(0, 7)


@given(
    u=CURRENT,
    v=MEMBRANE,
    a=INPUT,
    du=DECAY,
    dv=DECAY,
    vth=LEVEL,
    mant=MANTISSA,
    exponent=EXPONENT,
    ds_offset=st.sampled_from([0, 1]),
    reset=st.sampled_from(RESETS),
)
def test_one_step_equals_plain_integers(
    u: int,
    v: int,
    a: int,
    du: int,
    dv: int,
    vth: int,
    mant: int,
    exponent: int,
    ds_offset: int,
    reset: Reset,
) -> None:
    bias = mant * 2**exponent
    assert int(shift_bias(torch.tensor(mant), torch.tensor(exponent))) == bias
    settings = {"du": du, "dv": dv, "vth": vth, "bias": bias, "ds_offset": ds_offset}
    assert step(u, v, a, **settings, reset=reset) == plain_step(u, v, a, **settings, reset=reset)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("ds_offset", [0, 1])
@pytest.mark.parametrize("scale", [200, 2**17])
def test_many_neurons_over_many_steps_equal_plain_integers(reset: Reset, ds_offset: int, scale: int) -> None:
    """Registers of a population broadcast; both ordinary inputs and inputs that wrap and saturate."""
    steps, neurons = 40, 16
    generator = torch.Generator().manual_seed(scale + ds_offset)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    inputs = draw(-scale, 2 * scale, steps, 2, neurons)
    du, dv, vth = draw(0, 4096, neurons), draw(0, 4096, 1), draw(0, scale, neurons)
    bias = draw(-3000, 3000, 1)
    state = IntegerState(torch.zeros(2, neurons, dtype=torch.int64), torch.zeros(2, neurons, dtype=torch.int64))
    expected = [[(0, 0) for _ in range(neurons)] for _ in range(2)]
    fired_in_all = wrapped = saturated = 0
    for a in inputs:
        state, spikes = integer_step(state, a, du=du, dv=dv, vth=vth, bias=bias, ds_offset=ds_offset, reset=reset)
        for sample in range(2):
            for i in range(neurons):
                u, v, fired = plain_step(
                    *expected[sample][i],
                    int(a[sample, i]),
                    du=int(du[i]),
                    dv=int(dv),
                    vth=int(vth[i]),
                    bias=int(bias),
                    ds_offset=ds_offset,
                    reset=reset,
                )
                expected[sample][i] = u, v
                assert (int(state.u[sample, i]), int(state.v[sample, i])) == (u, v)
                assert bool(spikes[sample, i]) == fired
                fired_in_all += fired
                wrapped += abs(64 * int(a[sample, i])) > TOP
                saturated += abs(v) == TOP - 1
    assert 20 < fired_in_all < steps * 2 * neurons - 20
    if scale > 200:
        assert wrapped > 20
        assert saturated > 20


@given(st.integers(-(2**36), 2**36), st.integers(0, 20))
def test_shifts_truncate_towards_zero(x: int, bits: int) -> None:
    assert int(truncate_shift(torch.tensor(x), bits)) == towards_zero(x, bits)


@pytest.mark.parametrize(
    ("u", "a", "expected"),
    [
        (TOP - 64, 1, TOP),  # exactly 2^23 stays: the comparison is strict
        (TOP - 63, 1, 1 - TOP),  # one above wraps to the lowest value
        (64 - TOP, -1, TOP),  # exactly -2^23 wraps, to 2^23
        (65 - TOP, -1, 1 - TOP),  # one above it stays
        (0, 2**18, 0),  # 2^24 wraps once to 0
        (0, 3 * 2**17 + 1, 64 - TOP + 2**24),  # beyond 3 * 2^23: the wrap down is followed by none, u stays above 2^23
        (0, -3 * 2**17, -TOP),  # and below: -3 * 2^23 + 2^24
    ],
)
def test_the_current_wraps_once(u: int, a: int, expected: int) -> None:
    assert step(u, 0, a, vth=2**17 - 1)[0] == expected


@pytest.mark.parametrize(
    ("v", "bias", "expected"),
    [
        (TOP - 10, 8, TOP - 2),
        (TOP - 10, 9, TOP - 1),
        (TOP - 10, 4000, TOP - 1),
        (10 - TOP, -9, 1 - TOP),
        (10 - TOP, -4000, 1 - TOP),
    ],
)
def test_the_membrane_saturates_instead_of_wrapping(v: int, bias: int, expected: int) -> None:
    """Seen before reset: with reset by subtraction the highest threshold, 2^23 - 64, is what is missing."""
    _, after, fired = step(0, v, bias=bias, reset="subtract")
    assert after + fired * 64 * (2**17 - 1) == expected


def test_decays_truncate_towards_zero_on_both_sides() -> None:
    # 3 * 2048 / 4096 = 1.5
    assert step(u=3, du=2048)[0] == 1
    assert step(u=-3, du=2048)[0] == -1
    assert step(v=3, dv=2048)[1] == 1
    assert step(v=-3, dv=2048)[1] == -1
    # a decay of one part in 4096 takes every small value to zero in the end, from both sides
    assert step(u=1, du=1)[0] == step(u=-1, du=1)[0] == 0


def test_the_offset_of_the_current_decay_counts_as_one_more() -> None:
    assert step(u=4096, du=10, ds_offset=0)[0] == 4086
    assert step(u=4096, du=10, ds_offset=1)[0] == 4085
    assert step(u=TOP - 1, du=4095, ds_offset=1)[0] == 0  # forgets u
    assert step(u=TOP - 1, du=4095, ds_offset=0)[0] == 2047
    assert step(v=4096, dv=10, ds_offset=1)[1] == 4086  # the membrane's decay has none


def test_an_offset_of_one_is_the_default() -> None:
    state = IntegerState(torch.tensor([4096]), torch.tensor([0]))
    zero = torch.tensor([0])
    after, _ = integer_step(state, zero, du=zero, dv=zero, vth=torch.tensor([1000]), bias=zero)
    assert int(after.u) == 4095


@pytest.mark.parametrize("reset", RESETS)
def test_the_threshold_is_strict(reset: Reset) -> None:
    assert step(0, 640, vth=10, reset=reset) == (0, 640, False)
    assert step(0, 641, vth=10, reset=reset) == (0, 1 if reset == "subtract" else 0, True)
    assert step(0, 0, vth=0, reset=reset) == (0, 0, False)


def test_reset_clears_the_membrane_and_keeps_the_current() -> None:
    assert step(0, 100, 10, vth=5) == (640, 0, True)
    assert step(0, 100, 10, vth=5, reset="subtract") == (640, 740 - 320, True)


def test_input_and_bias_act_in_the_step_in_which_they_arrive() -> None:
    assert step(0, 0, 3, bias=-7) == (192, 185, False)


@pytest.mark.parametrize(
    ("mant", "exponent", "expected"),
    [(5, 0, 5), (5, 7, 640), (-5, 7, -640), (4095, 7, 524160), (5, -1, 2), (-5, -1, -3), (-1, -3, -1), (7, -3, 0)],
)
def test_a_negative_bias_exponent_shifts_right_arithmetically(mant: int, exponent: int, expected: int) -> None:
    """Towards minus infinity, as numpy's right_shift in Lava's LIF does; unlike the decays."""
    assert int(shift_bias(torch.tensor(mant), torch.tensor(exponent))) == expected


def test_the_step_leaves_its_arguments_unchanged() -> None:
    u, v, a = torch.tensor([TOP - 1]), torch.tensor([5000]), torch.tensor([100])
    zero = torch.tensor([0])
    integer_step(IntegerState(u, v), a, du=zero, dv=zero, vth=zero, bias=zero)
    assert (int(u), int(v), int(a)) == (TOP - 1, 5000, 100)

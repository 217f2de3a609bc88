"""What goes into a network and how a decision is read from what comes out; the float neuron in between."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spikeport.models.cuba_lif import CubaLIF, filter_errors, filter_spikes, simulate
from spikeport.models.encoders import Encoder, EncoderName
from spikeport.models.errors import DataError
from spikeport.models.readouts import decide, scores

# --- Encoders --------------------------------------------------------------------------------------------------------

GREY_LEVELS = st.sampled_from([16, 255]).flatmap(lambda top: st.tuples(st.integers(0, top), st.just(top)))


def rate_train(value: float, steps: int) -> list[float]:
    return Encoder("rate", steps)(torch.tensor([value], dtype=torch.float32))[:, 0].tolist()


@given(GREY_LEVELS, st.integers(1, 64))
def test_a_rate_is_as_many_spikes_as_its_share_of_the_steps_halves_rounded_up(
    level: tuple[int, int], steps: int
) -> None:
    train = rate_train(level[0] / level[1], steps)
    assert set(train) <= {0.0, 1.0}
    assert sum(train) == (Fraction(*level) * steps + Fraction(1, 2)).__floor__()


@given(GREY_LEVELS, st.integers(1, 40))
def test_the_spikes_of_a_rate_are_spread_evenly(level: tuple[int, int], steps: int) -> None:
    """Every stretch of a train holds its share of spikes to within one."""
    train = rate_train(level[0] / level[1], steps)
    share = Fraction(*level)
    for start in range(steps):
        for stop in range(start + 1, steps + 1):
            assert abs(int(sum(train[start:stop])) - share * (stop - start)) <= 1


@given(st.floats(0, 1, width=32), st.integers(1, 1024))
def test_a_rate_stays_binary_for_every_float(value: float, steps: int) -> None:
    train = rate_train(value, steps)
    assert set(train) <= {0.0, 1.0}
    assert abs(sum(train) - value * steps) <= 0.5 + 1e-3


def test_rate_trains_by_hand() -> None:
    assert rate_train(0.0, 4) == [0, 0, 0, 0]
    assert rate_train(1.0, 4) == [1, 1, 1, 1]
    assert rate_train(0.5, 4) == [1, 0, 1, 0]
    assert rate_train(0.25, 4) == [0, 1, 0, 0]
    assert rate_train(0.1, 5) == [0, 0, 0, 0, 1]  # half a spike is rounded up
    assert rate_train(0.099, 5) == [0, 0, 0, 0, 0]


def test_the_rate_encoder_puts_time_first_and_keeps_shape_and_dtype() -> None:
    images = torch.rand(3, 1, 4, 5, dtype=torch.float64)
    spikes = Encoder("rate", 6)(images)
    assert spikes.shape == (6, 3, 1, 4, 5)
    assert spikes.dtype == torch.float64
    for pixel in ((0, 0, 1, 2), (2, 0, 3, 4)):
        expected = Encoder("rate", 6)(images[pixel].view(1))[:, 0]
        assert torch.equal(spikes[(slice(None), *pixel)], expected)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_graded_spike_times_its_unit_is_the_value_to_half_a_level(bits: int) -> None:
    encoder = Encoder("graded", 3, message_bits=bits)
    values = torch.linspace(0, 1, 101).view(1, 101)
    spikes = encoder(values)
    assert spikes.shape == (3, 1, 101)
    assert torch.equal(spikes, spikes.round())
    assert spikes.min() == 0
    assert spikes.max() == 2**bits - 1
    assert (spikes * encoder.unit - values).abs().max() <= encoder.unit / 2 * (1 + 1e-5)
    assert all(torch.equal(step, spikes[0]) for step in spikes)


@pytest.mark.parametrize("name", ["rate", "poisson", "latency", "events"])
def test_a_binary_spike_stands_for_the_gain_whatever_the_message_bits(name: EncoderName) -> None:
    assert Encoder(name, 5).unit == Encoder(name, 5, message_bits=8).unit == 1.0
    assert Encoder(name, 5, message_bits=8, gain=2.5).unit == 2.5


@pytest.mark.parametrize("name", ["rate", "graded", "latency"])
def test_the_gain_changes_the_unit_and_no_spike(name: EncoderName) -> None:
    values = torch.linspace(0, 1, 256).view(2, 128)
    assert torch.equal(Encoder(name, 7, 4, gain=0.3)(values), Encoder(name, 7, 4)(values))
    assert Encoder("graded", 7, 4, gain=0.3).unit == pytest.approx(0.3 / 15)


def poisson(values: torch.Tensor, first_index: int, steps: int = 8, seed: int = 3) -> torch.Tensor:
    return Encoder("poisson", steps, seed=seed)(values, first_index=first_index)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("numbered", [True, False])
def test_poisson_spikes_come_at_their_rate_and_independently(scale: float, numbered: bool) -> None:
    drawn: dict[str, Any] = {"first_index": 5} if numbered else {"generator": torch.Generator().manual_seed(4)}
    values = torch.linspace(0, 1, 11).repeat(40, 50, 1)
    spikes = Encoder("poisson", 20, rate_scale=scale)(values, **drawn)
    assert spikes.shape == (20, 40, 50, 11)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    expected = values[0, 0] * scale
    deviation = (expected * (1 - expected) / 40_000).sqrt()
    assert ((spikes.mean((0, 1, 2)) - expected).abs() <= 5 * deviation).all()  # none at 0, always at 1
    halves = spikes[..., 5] - spikes[..., 5].mean()
    for one, next_one in (  # neighbours in step, in sample and in pixel
        (halves[1:], halves[:-1]),
        (halves[:, 1:], halves[:, :-1]),
        (halves[:, :, 1:], halves[:, :, :-1]),
    ):
        assert abs(float((one * next_one).mean() / halves.square().mean())) < 5 / one.numel() ** 0.5


def test_numbered_poisson_spikes_hang_on_seed_number_and_step_alone() -> None:
    values = torch.rand(10, 2, 3, 5)
    spikes = poisson(values, first_index=40)
    assert torch.equal(poisson(values, 40), spikes)
    assert torch.equal(torch.cat([poisson(values[:3], 40), poisson(values[3:], 43)], dim=1), spikes)
    assert torch.equal(poisson(values.double(), 40), spikes.double())
    assert torch.equal(poisson(values, 40, steps=3), spikes[:3])
    for other in (poisson(values, 41), poisson(values, 40, seed=4), poisson(values.flip(0), 40).flip(1)):
        assert not torch.equal(other, spikes)


def test_numbered_poisson_spikes_stay_the_same_between_versions() -> None:
    """A change here changes what every stored trace was made of."""
    drawn = poisson(torch.full((2, 4), 0.5), first_index=0, steps=6, seed=1)
    words = np.random.Philox(key=np.array([1, 1], np.uint64)).random_raw(12)
    low_first = np.stack([words & 0xFFFFFFFF, words >> 32], axis=1).reshape(6, 4)
    assert np.array_equal(drawn[:, 1].numpy(), low_first < 1 << 31)
    assert ["".join(str(int(s)) for s in step) for step in drawn[:, 0].tolist()] == [
        "1100",
        "1111",
        "0011",
        "0011",
        "0101",
        "0100",
    ]


def test_poisson_spikes_of_a_generator_are_fresh_at_each_call() -> None:
    values = torch.rand(4, 30)
    encoder = Encoder("poisson", 6)
    generator = torch.Generator().manual_seed(7)
    first, second = encoder(values, generator=generator), encoder(values, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(encoder(values, generator=torch.Generator().manual_seed(7)), first)
    state = torch.get_rng_state()
    encoder(values, 0)
    encoder(values, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)  # neither draws from the global state


def test_poisson_spikes_need_a_source() -> None:
    with pytest.raises(ValueError, match="first_index or a generator"):
        Encoder("poisson", 6)(torch.rand(2, 3))


@given(GREY_LEVELS, st.integers(1, 64))
def test_a_latency_spike_comes_once_and_sooner_for_a_larger_value(level: tuple[int, int], steps: int) -> None:
    value = Fraction(*level)
    for dtype in (torch.float32, torch.float64):
        pixel = torch.tensor([level[0]], dtype=torch.float32).div(level[1]).to(dtype)
        train = Encoder("latency", steps)(pixel)[:, 0].tolist()
        exact = (1 - value) * (steps - 1)
        if not value:
            assert train == [0] * steps
        else:
            assert sorted(train) == [0] * (steps - 1) + [1]
            # pixels are rounded to float32, so that a half may fall to either side
            assert abs(train.index(1) - exact) <= Fraction(1, 2) + Fraction(1, 10**4)


def test_latency_by_hand() -> None:
    values = torch.tensor([[1.0, 0.5, 0.25, 1 / 255, 0.49 / 255, 0.0]])
    spikes = Encoder("latency", 5)(values)
    assert spikes.dtype == values.dtype
    assert ["".join(str(int(s)) for s in train) for train in spikes[:, 0].T.tolist()] == [
        "10000",
        "00100",
        "00010",
        "00001",
        "00000",
        "00000",
    ]
    assert Encoder("latency", 1)(values).tolist() == [[[1, 1, 1, 1, 0, 0]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_events_are_their_own_spikes(dtype: torch.dtype) -> None:
    frames = torch.randint(0, 4, (3, 5, 2, 6, 7)).to(dtype)
    spikes = Encoder("events", 5)(frames)
    assert spikes.shape == (5, 3, 2, 6, 7)
    assert spikes.dtype == dtype
    assert torch.equal(spikes[4, 1], frames[1, 4])


@pytest.mark.parametrize("shape", [(3, 4, 2, 6, 7), (3, 6, 2, 6, 7), (5,)])
def test_events_of_other_steps_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="5 steps"):
        Encoder("events", 5)(torch.zeros(shape))


# --- Readouts --------------------------------------------------------------------------------------------------------


def trains(*classes: str) -> np.ndarray:
    """One sample of spike trains, written as strings of 0 and 1: (1, steps, classes)."""
    return np.array([[int(spike) for spike in train] for train in classes], dtype=np.uint8).T[None]


def test_scores_by_hand() -> None:
    spikes = trains("0110", "1000", "0000")
    assert scores("count", 0.5, spikes).tolist() == [[2, 1, 0]]
    assert scores("first_spike", 0.5, spikes).tolist() == [[-1, 0, -4]]
    # filtered by 1/2 a step: a spike at step 0 adds 1 + 1/2 + 1/4 + 1/8 over the window, at 1 one term less, ...
    assert scores("psc", 0.5, spikes).tolist() == [[1.75 + 1.5, 1.875, 0]]


@pytest.mark.parametrize(
    ("kind", "spikes", "expected"),
    [
        ("count", trains("001", "110", "011"), 1),  # 1 and 2 tie: the lower index
        ("psc", trains("001", "011", "110"), 2),  # equal counts: the earlier spikes weigh more
        ("psc", trains("001", "101", "101"), 1),
        ("first_spike", trains("001", "010", "011"), 1),
        ("first_spike", trains("000", "000", "001"), 2),  # a class that is silent loses to the latest spike
        ("count", trains("000", "000"), 0),
        ("psc", trains("000", "000"), 0),
        ("first_spike", trains("000", "000"), 0),
    ],
)
def test_decisions_and_ties(kind: str, spikes: np.ndarray, expected: int) -> None:
    found = decide(kind, 0.5, spikes)  # type: ignore[arg-type]
    assert found.tolist() == [expected]
    assert found.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float64])
def test_the_highest_membrane_decides_and_ties_go_to_the_lower_class(dtype: type[np.generic]) -> None:
    membranes = np.array([[-5, -3, -4], [0, 0, 0], [1, 7, 7], [8388607, 8388606, -8388607]], dtype)
    assert decide("membrane", 0.5, membranes).tolist() == [1, 0, 1, 0]
    assert scores("membrane", 0.5, membranes).tolist() == membranes.tolist()
    assert scores("membrane", 0.5, membranes).dtype == np.float64


@pytest.mark.parametrize("kind", ["count", "psc", "first_spike", "membrane"])
def test_spikes_are_not_taken_for_membranes(kind: str) -> None:
    wrong = np.zeros((2, 3) if kind != "membrane" else (2, 4, 3))
    with pytest.raises(ValueError, match=kind):
        scores(kind, 0.5, wrong)  # type: ignore[arg-type]


SPIKES = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 5)),
    elements=st.integers(0, 1),
)


@given(SPIKES, st.floats(1, 20))
def test_the_psc_score_is_the_sum_of_the_filtered_spikes(spikes: np.ndarray, tau: float) -> None:
    """Up to the filter's factor 1 / tau, which no decision sees."""
    by_time = torch.from_numpy(spikes.astype(np.float64)).transpose(0, 1)
    expected = filter_spikes(by_time, tau).sum(0).numpy() * tau
    found = scores("psc", 1 - 1 / tau, spikes)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@given(SPIKES)
def test_count_and_first_spike_equal_their_definitions(spikes: np.ndarray) -> None:
    samples, steps, classes = spikes.shape
    for n in range(samples):
        for c in range(classes):
            when = [t for t in range(steps) if spikes[n, t, c]]
            assert scores("count", 0.3, spikes)[n, c] == len(when)
            assert scores("first_spike", 0.3, spikes)[n, c] == -(when[0] if when else steps)


def test_a_decision_does_not_hang_on_the_dtype_of_the_spikes() -> None:
    spikes = np.random.default_rng(0).integers(0, 2, (20, 300, 4))
    for kind in ("count", "psc", "first_spike"):
        expected = scores(kind, 0.9, spikes)  # 300 steps: a sum in uint8 would overflow
        for dtype in (np.uint8, np.bool_, np.float32):
            np.testing.assert_allclose(scores(kind, 0.9, spikes.astype(dtype)), expected, rtol=1e-12)


# --- The float neuron ------------------------------------------------------------------------------------------------

VALUES = arrays.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(3)), elements=st.floats(-5, 5))


@given(VALUES, st.floats(1, 20), st.integers(0, 2**31))
def test_filtering_errors_is_the_transpose_of_filtering_spikes(values: np.ndarray, tau: float, seed: int) -> None:
    s = torch.from_numpy(values)
    e = torch.randn(s.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    left = float((filter_spikes(s, tau) * e).sum())
    assert float((s * filter_errors(e, tau)).sum()) == pytest.approx(left, abs=1e-9)


def test_the_filter_has_unit_area() -> None:
    one = torch.zeros(200, 1, dtype=torch.float64)
    one[3] = 1
    trace = filter_spikes(one, 4.0)[:, 0]
    assert float(trace.sum()) == pytest.approx(1)
    assert trace[:3].tolist() == [0, 0, 0]
    assert trace[3:6].tolist() == pytest.approx([1 / 4, 3 / 16, 9 / 64])


def test_the_current_of_a_neuron_is_its_filtered_input() -> None:
    x = torch.randn(15, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window = simulate(x, CubaLIF(tau_syn=3, tau_mem=5))
    torch.testing.assert_close(window.current, filter_spikes(x, 3.0))


def windows(x: list[float], neuron: CubaLIF) -> dict[str, list[float]]:
    window = simulate(torch.tensor(x, dtype=torch.float64)[:, None], neuron)
    return {name: getattr(window, name)[:, 0].tolist() for name in ("spikes", "current", "membrane", "rise")}


# u = u/2 + x/2 and p = v/2 + u; a membrane of exactly 1 is not above the threshold
HAND_INPUT, HAND_CURRENT = [3, 0, 0.5, 2], [1.5, 0.75, 0.625, 1.3125]


def test_reset_to_zero_by_hand() -> None:
    assert windows(HAND_INPUT, CubaLIF(2, 2, 1, "zero")) == {
        "spikes": [1, 0, 0, 1],
        "current": HAND_CURRENT,
        "membrane": [1.5, 0.75, 1.0, 1.8125],
        "rise": [1.5, 0.75, 0.25, 0.8125],
    }


def test_reset_by_subtraction_by_hand() -> None:
    assert windows(HAND_INPUT, CubaLIF(2, 2, 1, "subtract")) == {
        "spikes": [1, 0, 1, 1],
        "current": HAND_CURRENT,
        "membrane": [1.5, 1.0, 1.125, 1.375],
        "rise": [1.5, 0.5, 0.125, 1.25],
    }


def test_neurons_of_a_window_do_not_see_each_other() -> None:
    x = torch.randn(10, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    together = simulate(x, CubaLIF(3, 5, 0.7))
    alone = simulate(x[:, 2:3, 1:2], CubaLIF(3, 5, 0.7))
    assert together.spikes.sum() > 5
    assert torch.equal(together.spikes[:, 2:3, 1:2], alone.spikes)
    assert torch.equal(together.membrane[:, 2:3, 1:2], alone.membrane)

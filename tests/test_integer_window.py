"""Windows of integer neurons: compiled and in tensors, equal to the one definition of the step."""

import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeport.converters import integer_window
from spikeport.converters.integer_window import IntegerNeurons, run_window
from spikeport.models.loihi_integers import IntegerState, integer_step


@st.composite
def windows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, IntegerNeurons]:
    """Inputs from single weights to sums that wrap u and saturate v; parameters at the ends of their ranges too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(7,), (2, 3, 4)]))
    steps, batch = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    size = draw(st.sampled_from([10, 300, 20_000, 200_000]))
    a = torch.from_numpy(rng.integers(-size, size + 1, (steps, batch, *shape)))
    whole = draw(st.booleans())
    vth = torch.from_numpy(rng.integers(0, 2 ** draw(st.integers(1, 17)), () if whole else shape))
    bias = torch.from_numpy(rng.integers(-4096, 4096, shape) << rng.integers(0, 8))
    decays = st.sampled_from([0, 1, 819, 1365, 4094, 4095])
    reset = draw(st.sampled_from(["zero", "subtract"]))
    return a, bias, IntegerNeurons(draw(decays), draw(decays), vth, draw(st.integers(0, 1)), reset)


@given(windows(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=150)
def test_every_window_takes_the_steps_of_the_definition(
    window: tuple[torch.Tensor, torch.Tensor, IntegerNeurons], dtype: torch.dtype
) -> None:
    a, bias, neurons = window
    state = IntegerState(torch.zeros_like(a[0]), torch.zeros_like(a[0]))
    spikes, membranes = [], []
    for at_step in a:
        state, fired = integer_step(
            state,
            at_step,
            du=torch.tensor(neurons.du),
            dv=torch.tensor(neurons.dv),
            vth=neurons.vth,
            bias=bias,
            ds_offset=neurons.ds_offset,
            reset=neurons.reset,
        )
        spikes.append(fired)
        membranes.append(state.v)
    for run in (run_window, integer_window._by_steps):
        found = run(a.to(dtype), bias, neurons, False)
        assert found.dtype == torch.float32
        assert torch.equal(found.bool(), torch.stack(spikes))
        found = run(a.to(dtype), bias, neurons, True)
        assert found.dtype == torch.float64
        assert torch.equal(found, torch.stack(membranes).double())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_window_of_many_blocks_is_one_window(threads: int) -> None:
    """Blocks are runs of neurons of several samples; a permuted memory changes nothing."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-300, 700, (4, 9, 20, 3, 31), generator=generator).float()
    vth = torch.randint(100, 900, (20, 3, 31), generator=generator)
    bias = torch.randint(-4000, 4000, (20, 3, 31), generator=generator)
    neurons = IntegerNeurons(1365, 819, vth, 1, "zero")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run_window(a, bias, neurons)
        moved = run_window(a.movedim(2, 4).contiguous().movedim(4, 2), bias, neurons)
    finally:
        torch.set_num_threads(before)
    assert 0.05 < found.mean() < 0.6
    assert torch.equal(found, integer_window._by_steps(a, bias, neurons, False))
    assert torch.equal(found, moved)

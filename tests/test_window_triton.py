"""Triton's windows give the spikes and gradients of the eager reference: on a GPU, else in Triton's interpreter."""

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.rules import CSBP, MLF, STBP, TSSL, RateBP, Rule, SpikeBP, window_triton
from spikeport.models.rules.stbp import Surrogate

Reset = Literal["zero", "subtract"]
RESETS = get_args(Reset)
MULTI_LEVEL = CubaLIF(levels=(1.6, 2.6))


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernels run. The interpreter is on in these tests alone, since other tests' windows would run in it."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    if not window_triton.handles(torch.zeros(1, 1, device=name), CSBP()):
        pytest.skip("Triton is not installed, or older than the kernels want")
    return name


def window(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Input sums that make a neuron fire in about a third of its steps, and errors of its spikes."""
    x, errors = torch.randn(2, *shape, dtype=torch.float64).mul_(3).add_(0.5)
    return x.to(device, dtype), errors.to(device, dtype)


def reference(x: torch.Tensor, errors: torch.Tensor, neuron: CubaLIF, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and dL/dx of the eager rule, in at least float32, as the kernels compute."""
    wide = torch.promote_types(x.dtype, torch.float32)
    leaf = x.detach().to(wide).requires_grad_()
    spikes = dataclasses.replace(rule, eager=True)(leaf, neuron)
    (gradient,) = torch.autograd.grad(spikes, leaf, errors.to(wide))
    return spikes.detach(), gradient


TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check(x: torch.Tensor, errors: torch.Tensor, neuron: CubaLIF, rule: Rule) -> None:
    spikes, gradient = reference(x, errors, neuron, rule)
    assert spikes.any()
    assert gradient.any()
    found = window_triton.forward(x, neuron)
    assert found.dtype == x.dtype
    assert torch.equal(found.to(spikes.dtype), spikes)
    found = window_triton.backward(x, errors, neuron, rule)
    assert found.dtype == x.dtype
    scale = float(gradient.abs().max())
    torch.testing.assert_close(
        found.to(gradient.dtype), gradient, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype] * scale
    )


@pytest.mark.parametrize("spike_error", ["existence", "shift"])
@pytest.mark.parametrize("dead_neuron_rule", [True, False])
@pytest.mark.parametrize("across_spikes", [True, False])
def test_csbp(
    device: str, spike_error: Literal["existence", "shift"], dead_neuron_rule: bool, across_spikes: bool
) -> None:
    """Each reset with every two of the settings."""
    rule = CSBP(spike_error, 0.3, across_spikes, dead_neuron_rule)
    reset = RESETS[(spike_error == "shift") ^ dead_neuron_rule ^ across_spikes]
    check(*window(device, 4, 2, 50), CubaLIF(reset=reset), rule)


@pytest.mark.parametrize("mode", ["author", "timing"])
@pytest.mark.parametrize("dead_neuron_rule", [True, False])
def test_tssl(device: str, mode: Literal["author", "timing"], dead_neuron_rule: bool) -> None:
    check(*window(device, 4, 2, 50), CubaLIF(), TSSL(mode, dead_neuron_rule))


STBP_CASES = [
    *itertools.product(RESETS, ["rectangular"], [True, False]),
    *itertools.product(["subtract"], ["triangular", "arctan", "logistic"], [True]),
    *itertools.product(["zero"], ["triangular", "arctan", "logistic"], [False]),
]


@pytest.mark.parametrize(("reset", "surrogate", "through_reset"), STBP_CASES)
def test_stbp(device: str, reset: Reset, surrogate: Surrogate, through_reset: bool) -> None:
    check(*window(device, 4, 2, 50), CubaLIF(reset=reset), STBP(surrogate, 0.7, through_reset))


@pytest.mark.parametrize("leak_correction", [True, False])
def test_spike_bp(device: str, leak_correction: bool) -> None:
    check(*window(device, 4, 2, 50), CubaLIF(tau_syn=1), SpikeBP(leak_correction))


@pytest.mark.parametrize("rule", [MLF(), CSBP("shift"), TSSL("timing"), SpikeBP()], ids=lambda rule: rule.title)
def test_every_level_of_a_multi_level_neuron(device: str, rule: Rule) -> None:
    check(*window(device, 5, 2, 50), MULTI_LEVEL, rule)


@pytest.mark.parametrize("rule", [CSBP(), TSSL(), STBP(), SpikeBP()], ids=lambda rule: rule.title)
def test_neurons_without_a_leak_and_spikes_with_a_cost(device: str, rule: Rule) -> None:
    neuron = CubaLIF(tau_mem=float("inf"), threshold=2)
    check(*window(device, 5, 2, 50), neuron, dataclasses.replace(rule, spike_cost=0.25))


@pytest.mark.parametrize("steps", [1, 3, 17])
@pytest.mark.parametrize("rule", [CSBP("shift"), SpikeBP()], ids=lambda rule: rule.title)
def test_any_number_of_steps(device: str, steps: int, rule: Rule) -> None:
    check(*window(device, steps, 2, 50), CubaLIF(), rule)


@pytest.mark.parametrize(
    ("rule", "neuron"),
    [
        (CSBP("shift", spike_cost=0.5), CubaLIF()),
        (TSSL("timing"), CubaLIF()),
        (MLF(), MULTI_LEVEL),
        (SpikeBP(), MULTI_LEVEL),
    ],
    ids=lambda value: getattr(value, "title", ""),
)
def test_a_window_in_segments(device: str, rule: Rule, neuron: CubaLIF, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three segments of four steps, the last one not full: the first from rest, the second from what was written."""
    monkeypatch.setattr(window_triton, "LONGEST_SEGMENT", 4)
    check(*window(device, 11, 2, 50), neuron, rule)


@pytest.mark.parametrize("dtype", window_triton.DTYPES, ids=str)
def test_types(device: str, dtype: torch.dtype) -> None:
    for rule in (CSBP(), STBP("rectangular", 0.7)):
        check(*window(device, 5, 2, 50, dtype=dtype), CubaLIF(), rule)


@pytest.mark.parametrize("neurons", [1, 127, 128, 300])
def test_any_number_of_neurons(device: str, neurons: int) -> None:
    check(*window(device, 3, neurons), CubaLIF(threshold=0.2), CSBP())


def test_several_neurons_in_a_thread(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_triton, "FULL_GRID", 1)
    check(*window(device, 3, 700), CubaLIF(), CSBP())


def test_memory_layouts(device: str) -> None:
    x, errors = window(device, 3, 2, 4, 5, 6)
    channels_last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    layouts = {
        "channels_last": channels_last,
        "steps innermost": x.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
        "with gaps": torch.stack([x, x], dim=-1)[..., 0],
        "one step for all": channels_last[:1].expand_as(x),
    }
    for name, given in layouts.items():
        assert torch.equal(given, x[:1].expand_as(x) if name == "one step for all" else x), name
        check(given, errors, CubaLIF(), CSBP())
    for given in (channels_last, layouts["one step for all"]):
        assert window_triton.forward(given, CubaLIF()).stride() == channels_last.stride()
    assert window_triton.backward(channels_last, errors, CubaLIF(), CSBP()).stride() == channels_last.stride()
    check(x, torch.ones((), device=device).expand_as(x), CubaLIF(), CSBP())


def test_no_neurons(device: str) -> None:
    x = torch.zeros(3, 0, 5, device=device)
    assert window_triton.forward(x, CubaLIF()).shape == x.shape
    assert window_triton.backward(x, x, CubaLIF(), CSBP()).shape == x.shape


def test_rules_run_in_the_kernels_and_the_eager_ones_do_not(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("forward", "backward"):

        def spy(*arguments: object, name: str = name, run: object = getattr(window_triton, name)) -> object:
            calls.append(name)
            return run(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(window_triton, name, spy)
    x, errors = window(device, 3, 20)
    for rule, expected in (
        (CSBP(), ["forward", "backward"]),
        (RateBP(), ["forward"]),  # its error is one for the whole window
        (CSBP(eager=True), []),
    ):
        calls.clear()
        rule(x.requires_grad_(), CubaLIF()).backward(errors)
        assert calls == expected


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.rules import CSBP, MLF, STBP, TSSL, SpikeBP, window_kernels, window_triton


class NoGpu:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class CompileOnly:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: print(self.kernel.warmup(*arguments, grid=grid, **options).name)


driver.set_active(NoGpu())
for name in ("forward_kernel", "backward_kernel"):
    setattr(window_kernels, name, CompileOnly(getattr(window_kernels, name)))
window_triton.LONGEST_SEGMENT = 4
for steps, neurons, dtype, neuron, rule in (
    (2, 256, torch.float16, CubaLIF(reset="subtract"), CSBP("shift")),
    (2, 1, torch.float32, CubaLIF(), TSSL()),
    (2, 100, torch.float64, CubaLIF(), STBP("logistic")),
    (5, 100, torch.bfloat16, CubaLIF(tau_syn=1), SpikeBP()),
    (9, 100, torch.float32, CubaLIF(levels=(1.6,)), MLF()),
):
    x = torch.zeros(steps, neurons, dtype=dtype)
    window_triton.forward(x, neuron)
    window_triton.backward(x, x, neuron, rule)
"""


def test_the_kernels_compile_for_a_gpu(device: str, tmp_path: Path) -> None:
    """The interpreter forgives what the compiler does not. Triton brings all that compiling needs, but for a device."""
    if device != "cpu":
        pytest.skip("every other test compiles them")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["forward_kernel", "backward_kernel"] * 5

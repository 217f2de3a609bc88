"""Energy of one inference on an NVIDIA GPU: measured through NVML, beside the modelled energy of a chip.

What is measured is the GPU's own energy counter (`nvmlDeviceGetTotalEnergyConsumption`: millijoules since the driver
was loaded, Volta and newer) before and after some seconds of repeated inference. It is the energy of the board with
its memory, at its idle power and above, and of whatever other programs do on that GPU. The host is not in it. Idle
power is measured before, with the CUDA context open and nothing running, and reported apart; it is not taken off,
because a GPU that waits needs it too.

What runs is the network of the `torch` backend, prepared once: exact integers in floating point types, in the
backend's batches, inputs sent from the host at each batch. The trace that the backend packs on the host is left out.
Nothing is tuned for the GPU, so the figure says what this program needs there and not what the best one would.

The counter advances in steps, of 20 to 100 ms by PETSc's manual (`PetscLogGpuEnergyMeter`); over 5 s they make an error
of a few per cent at most.

Needs the package `nvidia-ml-py` (module `pynvml`) and NVIDIA's driver; both are looked for when asked for.
"""

import contextlib
import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.reference import Reference
from spikeport.deploy.torch_backend import STATES_PER_BATCH
from spikeport.deploy.trace import check_inputs

SECONDS = 5.0
IDLE_SECONDS = 3.0


class Nvml(Protocol):
    """What is used of the module `pynvml`."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> object: ...
    def nvmlShutdown(self) -> object: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any) -> str: ...
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int: ...


@dataclass(frozen=True)
class GpuEnergy:
    """One measurement of a whole board.

    Attributes:
        device, driver: name of the GPU and version of its driver.
        samples, seconds, energy_j: inferences done, their wall time, and the board's energy in it, idle power included.
        idle_power_w: the board's mean power before, with the CUDA context open and nothing running.
    """

    device: str
    driver: str
    samples: int
    seconds: float
    energy_j: float
    idle_power_w: float

    @property
    def energy_nj_per_inference(self) -> float:
        """Board energy of one inference, idle power included."""
        return self.energy_j * 1e9 / self.samples

    @property
    def energy_above_idle_nj_per_inference(self) -> float:
        """The same without the energy that the idle board takes in that time; a noisy small difference may be < 0."""
        return (self.energy_j - self.idle_power_w * self.seconds) * 1e9 / self.samples

    @property
    def power_w(self) -> float:
        """Mean power of the board while it worked."""
        return self.energy_j / self.seconds

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds


def measure_gpu_energy(
    graph: ProcessGraph,
    inputs: dict[str, np.ndarray],
    seconds: float = SECONDS,
    idle_seconds: float = IDLE_SECONDS,
    nvml: Nvml | None = None,
) -> tuple[GpuEnergy | None, str | None]:
    """Measure inference on the inputs (samples, steps, *shape), over and over for at least `seconds`.

    Args:
        nvml: stands in for the module `pynvml`.

    Returns the measurement, or None and the reason why there is none: no GPU, no NVML, no energy counter.
    Raises SpikeportError for inputs that do not fit the graph.
    """
    check_inputs(graph, inputs)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None, "torch finds no NVIDIA GPU here"
    if nvml is None:
        try:
            nvml = cast(Nvml, importlib.import_module("pynvml"))
        except ImportError:
            return None, "the package nvidia-ml-py is not installed"
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)  # opens the context, which raises the idle power
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return measure(inferences(graph, inputs, device), uuid, nvml, seconds, idle_seconds)


def inferences(graph: ProcessGraph, inputs: dict[str, np.ndarray], device: torch.device) -> Callable[[], int]:
    """A function that runs all samples once, waits for the device, and returns their number."""
    samples = check_inputs(graph, inputs)
    reference = Reference(graph, device)
    batch = max(1, STATES_PER_BATCH // max(node.size for node in graph.event_nodes))

    def work() -> int:
        for start in range(0, samples, batch):
            reference.run({name: array[start : start + batch] for name, array in inputs.items()})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return samples

    return work


def measure(
    work: Callable[[], int],
    uuid: str,
    nvml: Nvml,
    seconds: float = SECONDS,
    idle_seconds: float = IDLE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[GpuEnergy | None, str | None]:
    """The measurement itself: idle, one round to warm up, then rounds of `work` until `seconds` have passed.

    Args:
        work: does inferences, returns after the last one with their number, at least 1.
        uuid: of the GPU, as CUDA tells it; NVML may number the GPUs in another order.
        clock, sleep: seconds.

    Returns the measurement, or None and the reason why NVML gave none. What `work` raises passes through.
    """
    if not (math.isfinite(seconds) and math.isfinite(idle_seconds) and min(seconds, idle_seconds) > 0):
        raise ValueError(f"{seconds} s of work and {idle_seconds} s of rest cannot be measured; both must be positive.")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return None, f"NVML does not start ({error})"
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        counter = _Counter(nvml, handle, clock)
        idle_from = counter.read()
        sleep(idle_seconds)
        idle_to = counter.read()
        work()
        began, samples = counter.read(), 0
        while clock() - began.seconds < seconds:
            samples += work()
        ended = counter.read()
        device, driver = nvml.nvmlDeviceGetName(handle), nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError as error:
        return None, f"NVML does not tell the energy of this GPU ({error})"
    finally:
        _shut_down(nvml)
    if ended.millijoules <= began.millijoules or idle_to.millijoules < idle_from.millijoules:
        return None, f"the energy counter of {device} did not advance"
    return (
        GpuEnergy(
            device=device,
            driver=driver,
            samples=samples,
            seconds=ended.seconds - began.seconds,
            energy_j=(ended.millijoules - began.millijoules) / 1000,
            idle_power_w=(idle_to.millijoules - idle_from.millijoules) / 1000 / (idle_to.seconds - idle_from.seconds),
        ),
        None,
    )


@dataclass(frozen=True)
class _Reading:
    seconds: float
    millijoules: int


@dataclass(frozen=True)
class _Counter:
    nvml: Nvml
    handle: Any
    clock: Callable[[], float]

    def read(self) -> _Reading:
        millijoules = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        return _Reading(self.clock(), millijoules)


def _shut_down(nvml: Nvml) -> None:
    with contextlib.suppress(nvml.NVMLError):  # nothing depends on it, and an error on the way here matters more
        nvml.nvmlShutdown()

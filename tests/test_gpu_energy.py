"""The GPU measurement against a make-believe board, whose power and clock are known."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from graph_strategies import one_thread as one_thread
from graph_strategies import random_graph, random_inputs

from spikeport.deploy import gpu_energy
from spikeport.deploy.gpu_energy import GpuEnergy, inferences, measure, measure_gpu_energy
from spikeport.models.errors import SpikeportError


class BoardError(Exception):
    """What the make-believe NVML raises."""


@dataclass
class Board:
    """A GPU of 50 W that takes 250 W while it works; `fails` names calls that raise."""

    fails: tuple[str, ...] = ()
    now: float = 100.0
    joules: float = 7e6
    calls: list[str] = field(default_factory=list)
    uuid: str = ""

    NVMLError: type[Exception] = BoardError

    def pass_time(self, seconds: float, watts: float) -> None:
        self.now += seconds
        self.joules += seconds * watts

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds, 50)

    def work(self) -> int:
        """Ten inferences in 0.3 s."""
        self.pass_time(0.3, 250)
        return 10

    def called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise BoardError(f"{name} failed")

    def nvmlInit(self) -> None:
        self.called("init")

    def nvmlShutdown(self) -> None:
        self.called("shutdown")

    def nvmlSystemGetDriverVersion(self) -> str:
        self.called("driver")
        return "610.1"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.called("handle")
        self.uuid = uuid
        return "the handle"

    def nvmlDeviceGetName(self, handle: str) -> str:
        self.called("name")
        return "Board"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "the handle"
        self.called("energy")
        return int(self.joules * 1000)


def measured(
    board: Board, work: Callable[[], int] | None = None, seconds: float = 5, idle: float = 3, uuid: str = "0a-1b"
) -> tuple[GpuEnergy | None, str | None]:
    return measure(work or board.work, uuid, board, seconds, idle, lambda: board.now, board.sleep)


def test_energy_of_a_board_whose_power_is_known() -> None:
    board = Board()
    energy, reason = measured(board)
    assert energy is not None
    assert reason is None
    assert (energy.device, energy.driver) == ("Board", "610.1")
    assert energy.samples == 170  # 17 rounds of 0.3 s are the first that pass 5 s; the one before them warms up
    assert energy.seconds == pytest.approx(5.1)
    assert energy.energy_j == pytest.approx(250 * 5.1)
    assert energy.idle_power_w == pytest.approx(50)
    assert energy.power_w == pytest.approx(250)
    assert energy.samples_per_second == pytest.approx(10 / 0.3)
    assert energy.energy_nj_per_inference == pytest.approx(250 * 0.03 * 1e9)
    assert energy.energy_above_idle_nj_per_inference == pytest.approx(200 * 0.03 * 1e9)
    assert board.calls == ["init", "handle", "energy", "energy", "energy", "energy", "name", "driver", "shutdown"]


@pytest.mark.parametrize(("told", "asked"), [("0a-1b", "GPU-0a-1b"), ("GPU-0a", "GPU-0a"), ("MIG-0a", "MIG-0a")])
def test_the_gpu_is_found_by_its_uuid(told: str, asked: str) -> None:
    board = Board()
    measured(board, uuid=told)
    assert board.uuid == asked


def test_a_round_longer_than_the_time_asked_for_is_measured_whole() -> None:
    energy, _ = measured(Board(), seconds=0.01)
    assert energy is not None
    assert energy.samples == 10
    assert energy.seconds == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("init", r"NVML does not start \(init failed\)"),
        ("handle", r"NVML does not tell the energy of this GPU \(handle failed\)"),
        ("energy", r"NVML does not tell the energy of this GPU \(energy failed\)"),
        ("name", r"NVML does not tell the energy of this GPU \(name failed\)"),
        ("driver", r"NVML does not tell the energy of this GPU \(driver failed\)"),
    ],
)
def test_what_nvml_refuses_is_a_reason(call: str, reason: str) -> None:
    board = Board(fails=(call, "shutdown"))
    energy, said = measured(board)
    assert energy is None
    assert said is not None
    assert re.fullmatch(reason, said)
    assert board.calls[-1] == ("init" if call == "init" else "shutdown")


def test_a_counter_that_does_not_advance_is_a_reason() -> None:
    board = Board()

    def work() -> int:
        board.now += 1
        return 1

    assert measured(board, work) == (None, "the energy counter of Board did not advance")


def test_a_counter_that_starts_again_is_a_reason() -> None:
    """The driver was loaded anew between two readings."""
    board = Board()

    def sleep(seconds: float) -> None:
        board.pass_time(seconds, 0)
        board.joules = 0

    energy, reason = measure(board.work, "0a", board, 1, 1, lambda: board.now, sleep)
    assert (energy, reason) == (None, "the energy counter of Board did not advance")


def test_work_that_fails_is_not_swallowed_and_nvml_is_closed() -> None:
    board = Board()

    def work() -> int:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measured(board, work)
    assert board.calls[-1] == "shutdown"


@pytest.mark.parametrize(("seconds", "idle"), [(0, 1), (1, 0), (-1, 1), (float("nan"), 1), (1, float("inf"))])
def test_no_time_is_refused(seconds: float, idle: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        measured(Board(), seconds=seconds, idle=idle)


def test_inferences_run_every_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(1)
    inputs = random_inputs(graph, 1, samples=5)
    seen: list[int] = []
    run = gpu_energy.Reference.run

    def counting(self: gpu_energy.Reference, part: dict[str, np.ndarray], record: bool = False) -> object:
        seen.append(len(next(iter(part.values()))))
        return run(self, part, record)

    monkeypatch.setattr(gpu_energy.Reference, "run", counting)
    largest = max(node.size for node in graph.event_nodes)
    monkeypatch.setattr(gpu_energy, "STATES_PER_BATCH", 2 * largest)
    assert inferences(graph, inputs, torch.device("cpu"))() == 5
    assert seen == [2, 2, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_reason_says_so() -> None:
    graph = random_graph(1)
    board = Board()
    assert measure_gpu_energy(graph, random_inputs(graph, 1), nvml=board) == (None, "torch finds no NVIDIA GPU here")
    assert board.calls == []


def test_inputs_that_do_not_fit_are_refused_with_or_without_a_gpu() -> None:
    with pytest.raises(SpikeportError, match="takes the inputs"):
        measure_gpu_energy(random_graph(1), {}, nvml=Board())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_real_gpu_takes_energy() -> None:
    graph = random_graph(1)
    energy, reason = measure_gpu_energy(graph, random_inputs(graph, 1, samples=50), seconds=1, idle_seconds=1)
    if energy is None:
        pytest.skip(str(reason))
    assert 1 < energy.idle_power_w <= 2000
    assert 1 < energy.power_w <= 2000
    assert energy.samples >= 50

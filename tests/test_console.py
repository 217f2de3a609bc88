"""What the terminal shows at the end of a run, and how far a task is where no bars can be drawn."""

import io

import pytest
from report_examples import make_summary
from rich.console import Console

from spikeport.deploy import console
from spikeport.deploy.console import ConsoleProgress, show_summary
from spikeport.deploy.summary import Summary


def shown(summary: Summary) -> dict[str, str]:
    """Rows of the first table."""
    stream = io.StringIO()
    show_summary(Console(file=stream, width=250), summary)
    cells = [line.split("│") for line in stream.getvalue().split("layers")[0].splitlines() if line.count("│") == 3]
    return {title.strip(): text.strip() for _, title, text, _ in cells}


def test_the_summary_names_the_timing_model_and_what_steps_wait_for() -> None:
    rows = shown(make_summary())
    assert rows["chip"].endswith("15 of 128 cores, 1 chip")
    assert rows["time (model)"].endswith("31.5 µs per inference, latency 43.2 µs (cycle model, 256 samples)")
    expected = "synapses 55.2 %, neurons 19.7 %, barrier 8.6 %, 62.0 % of the steps for core 0 (conv1)"
    assert rows["steps wait for"] == expected
    rows = shown(make_summary(chips=2, model="simple"))
    assert rows["chip"].endswith("15 of 256 cores, 2 chips")
    assert "(simple model, 256 samples)" in rows["time (model)"]
    assert rows["steps wait for"].endswith("for core 0:0 (conv1)")


def test_names_are_no_markup() -> None:
    names = ["[red]a[/red]", "[/]", "[bold", "c"]
    assert "for core 0 ([red]a[/red])" in shown(make_summary(names=names))["steps wait for"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_long_task_tells_its_rate_and_the_time_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with ConsoleProgress(Console(file=stream, width=60)).task("simulate on events", 9000, "samples") as advance:
        for done in (0, 1000, 2000, 3000, 9000):
            advance(done)
            clock[0] += 10
    assert stream.getvalue().splitlines() == [
        "  simulate on events: 2,000 of 9,000 samples, 100 samples/s, 70 s left",
    ]


def test_without_a_terminal_notes_are_lines_and_a_task_without_a_unit_is_silent(clock: list[float]) -> None:
    stream = io.StringIO()
    with ConsoleProgress(Console(file=stream)).task("train", 3) as advance:
        for done, note in ((1, "epoch 1"), (1.5, "epoch 1"), (2, "epoch 2"), (2.5, None)):
            advance(done, note)
            clock[0] += 100
    assert stream.getvalue().splitlines() == ["  train: epoch 1", "  train: epoch 2"]


@pytest.mark.parametrize(("unit", "there"), [("samples", True), ("", False)])
def test_bars_show_the_rate_of_a_task_that_names_its_unit(unit: str, there: bool) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with ConsoleProgress(terminal).task("simulate on events", 100, unit) as advance:
        for done in range(0, 101, 10):
            advance(done)
    assert "simulate on events" in stream.getvalue()
    assert ("samples/s" in stream.getvalue()) == there
    assert " /s" not in stream.getvalue()


@pytest.mark.parametrize(
    ("speed", "text"), [(1234.5, "1,234 samples/s"), (10, "10 samples/s"), (0.26, "0.3 samples/s")]
)
def test_slow_rates_have_a_decimal(speed: float, text: str) -> None:
    assert console.rate(speed, "samples") == text

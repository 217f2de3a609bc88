"""What the terminal shows at the end of a run, and how far a task is where no bars can be drawn."""

import io

import pytest
from report_examples import make_summary
from rich.console import Console
from rich.table import Table

from spikeport.deploy import console
from spikeport.deploy.console import ConsoleProgress, epoch_table, population_table, show_summary
from spikeport.deploy.summary import Summary
from spikeport.models.checkpoint import Epoch


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


# --- Training


def epoch(number: int, accuracy: float, populations: int = 2) -> Epoch:
    names = [f"conv{i}" for i in range(1, populations + 1)]
    return Epoch(
        epoch=number,
        loss=1 / number,
        validation_accuracy=accuracy,
        firing_rate=dict.fromkeys(names, 0.125),
        dead_share={name: 0.75 if name == "conv2" else 0.25 for name in names},
        silent_share=dict.fromkeys(names, 0.5),
        spikes_per_sample=1234.0,
    )


def test_without_a_terminal_each_epoch_is_a_line() -> None:
    stream = io.StringIO()
    with ConsoleProgress(Console(file=stream, width=60)).training(batches=20, epochs=2) as view:
        for done in range(1, 21):
            view.advance(done)
            if done % 10 == 0:
                view.epoch(epoch(done // 10, 0.9))
    assert stream.getvalue().splitlines() == [
        f"  epoch {n} of 2: loss {loss}, validation 90.00%, firing 12.5%, dead 50.0%, 1,234 spikes a sample"
        for n, loss in ((1, "1"), (2, "0.5"))
    ]


def test_a_terminal_shows_epochs_populations_and_a_bar_while_training() -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with ConsoleProgress(terminal).training(batches=30, epochs=3) as view:
        view.advance(10)
        view.epoch(epoch(1, 0.9))
        view.advance(11)
    shown = stream.getvalue()
    assert "epoch 1 of 3" in shown
    assert "90.00 %" in shown
    assert "conv2" in shown
    assert "75.0 %" in shown
    assert "━" in shown


def text_of(table: Table) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=100).print(table)
    return stream.getvalue().splitlines()


def test_of_many_epochs_and_populations_a_few_are_shown() -> None:
    history = [epoch(number, 0.5) for number in range(1, 21)]
    lines = text_of(epoch_table(history, 30))
    assert "epoch 20 of 30" in lines[0]
    numbers = [int(line.split("│")[1]) for line in lines if line.startswith("│")]
    assert numbers == list(range(21 - console.EPOCHS_SHOWN, 21))
    lines = text_of(population_table(epoch(1, 0.5, populations=40)))
    assert sum(" conv" in line for line in lines) == console.POPULATIONS_SHOWN
    assert f"and {40 - console.POPULATIONS_SHOWN} more" in lines[-1]


def test_the_best_epoch_so_far_stands_out() -> None:
    table = epoch_table([epoch(1, 0.5), epoch(2, 0.8), epoch(3, 0.6)], 3)
    assert [row.style for row in table.rows] == [None, "bold", None]


def test_a_network_whose_only_population_integrates_has_no_firing_to_show() -> None:
    silent = epoch(1, 0.5, populations=0)
    assert "0.0 %" in "".join(text_of(epoch_table([silent], 1)))
    assert text_of(population_table(silent))
